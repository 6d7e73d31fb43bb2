"""The whole path on SmolLM2-135M-Instruct, fetched as the demo fetches it. `make test-slow`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import pipeline

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_a_student_of_a_real_teacher_learns_from_its_cache(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    subprocess.run([sys.executable, str(EXAMPLES / "fetch_teacher.py"), str(teacher)], check=True)
    lines = (EXAMPLES / "prompts-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(lines[:32]), encoding="utf-8")
    dumped = pipeline(
        "teacher-dump", "--teacher", teacher, "--data", prompts, "--responses", "teacher", "--out", tmp_path / "cache",
        "--set", "responses.max_new_tokens=32", "--set", "data.max_tokens=128", "--json",
    ).json  # fmt: skip
    assert (dumped["num_sequences"], dumped["top_k"], dumped["hidden_states"]) == (32, 64, True)
    assert pipeline("verify", tmp_path / "cache", "--json").json["ok"]
    run = pipeline(
        "distill", "--cache", tmp_path / "cache", "--student", teacher, "--student-layers", "0,3,6,9,12,15,18,21,25,29",
        "--steps", 12, "--dtype", "float32", "--set", "optimizer.lr=7e-4", "--set", "sequences_per_step=4",
        "--eval-cache", tmp_path / "cache", "--out", tmp_path / "run", "--json",
    ).json  # fmt: skip
    assert run["loss"] < 0.8 * run["first_loss"]
    assert run["eval"]["overlap"]["8"] > run["eval_before"]["overlap"]["8"]
    assert run["lookups"]["live"] == run["lookups"]["bound"] == run["teacher_forwards"] == 0
    assert run["lookups"]["hidden"] > run["lookups"]["cached"] > 0
    itself = pipeline("evaluate", teacher, "--cache", tmp_path / "cache", "--json").json
    assert itself["overlap"]["8"] == pytest.approx(1.0, abs=0.002)  # float32 ties in another batch
    assert itself["kl"] == pytest.approx(0.0, abs=1e-4)
