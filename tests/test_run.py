"""A run's directory: one writer at a time, gone on with from its own record, refused when its files are not its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from cache_schema.storage import exclusive
from tests.command_line import Result, pipeline
from tests.conftest import dump
from tests.test_bad_input import refused
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_models import save_tiny_llama, save_tiny_model
from workers.distill import student_loss as student_loss_module


def distill(cache: Path, student: Path, out: Path, *options: object) -> Result:
    return pipeline(
        "distill", "--cache", cache, "--student", student, "--out", out, "--dtype", "float32", "--steps", 6, *options
    )


def stop_after(cache: Path, student: Path, out: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """Leave a run as a kill after ``num_steps`` would, with a checkpoint every second step."""
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.distill.save_models", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = distill(cache, student, out, "--set", "checkpoint_every=2")
    assert result.code == 130
    assert "interrupted; finished work is kept" in result.err
    for folder in (out / "checkpoints").iterdir():
        assert folder.name == "step-000006"
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:num_steps]))


def test_a_run_s_directory_has_one_writer_at_a_time(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path / "run"):
        busy = distill(cache_dir, teacher_dir, tmp_path / "run")
    assert busy.code == 1
    assert "is being written by another process" in busy.err
    assert not (tmp_path / "run").exists()
    assert distill(cache_dir, teacher_dir, tmp_path / "run").code == 0


def test_resume_needs_no_more_than_the_directory(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(cache_dir, teacher_dir, tmp_path / "run", monkeypatch, 6)
    resumed = pipeline("distill", "--resume", "--out", tmp_path / "run", "--json").json
    assert (resumed["steps"], resumed["model"]) == (6, str(tmp_path / "run" / "model"))


def test_metrics_that_do_not_reach_the_checkpoint_are_refused(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(cache_dir, teacher_dir, tmp_path / "run", monkeypatch, 3)
    result = pipeline("distill", "--resume", "--out", tmp_path / "run")
    assert result.code == 1
    assert "holds 3 of the 6 steps before the checkpoint" in result.err


@pytest.mark.parametrize("content", ["", "{}", "[]", "{"])
def test_a_damaged_record_is_refused(cache_dir: Path, teacher_dir: Path, tmp_path: Path, content: str) -> None:
    assert distill(cache_dir, teacher_dir, tmp_path / "run").code == 0
    (tmp_path / "run" / "run.json").write_text(content)
    result = distill(cache_dir, teacher_dir, tmp_path / "run", "--resume")
    assert result.code == 1
    assert "run.json cannot be read" in result.err


def test_a_finished_run_without_its_model_says_so(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    assert distill(cache_dir, teacher_dir, tmp_path / "run").code == 0
    shutil.rmtree(tmp_path / "run" / "model")
    result = distill(cache_dir, teacher_dir, tmp_path / "run", "--resume")
    assert result.code == 1
    assert "its model/ is gone" in result.err


def test_a_held_out_cache_made_anew_is_another_run(
    cache_dir: Path, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    held_out = dump(teacher_dir, data_file, tmp_path / "held-out", "--limit", "3")
    assert distill(cache_dir, teacher_dir, tmp_path / "run", "--eval-cache", held_out).code == 0
    shutil.rmtree(held_out)
    dump(teacher_dir, data_file, held_out, "--limit", "4")
    result = distill(cache_dir, teacher_dir, tmp_path / "run", "--eval-cache", held_out, "--resume")
    assert "eval_manifest_sha256" in result.err


def test_a_cache_may_move_while_a_run_rests(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(cache_dir, tmp_path / "a")
    stop_after(tmp_path / "a", teacher_dir, tmp_path / "run", monkeypatch, 6)
    (tmp_path / "a").rename(tmp_path / "b")
    assert distill(tmp_path / "b", teacher_dir, tmp_path / "run", "--resume", "--set", "checkpoint_every=2").code == 0


def test_a_student_that_cannot_read_the_longest_sequence_is_refused(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    short = save_tiny_model(tmp_path / "gpt2", tokenizer, GPT2Config, max_position_embeddings=16)
    refused(
        "distill", "--cache", cache_dir, "--student", short, out=tmp_path / "run", says="reads 16 tokens",
    )  # fmt: skip


def test_the_saved_student_ends_where_the_base_model_and_the_cache_do(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    student = save_tiny_llama(tmp_path / "student", tiny_tokenizer(chat_template=CHATML), layers=2)
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    assert distill(cache_dir, student, tmp_path / "run").code == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").generation_config.eos_token_id
    assert saved == sorted({0, 7, tiny_tokenizer().eos_token_id})


def test_bf16_runs_the_head_in_bf16(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = student_loss_module.student_top_k
    monkeypatch.setattr(
        student_loss_module,
        "student_top_k",
        lambda head, hidden, k: (seen.append(hidden.dtype), original(head, hidden, k))[1],
    )
    assert distill(cache_dir, teacher_dir, tmp_path / "run", "--dtype", "bfloat16").code == 0
    assert set(seen) == {torch.bfloat16}


def test_the_first_step_already_moves_the_weights(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    assert distill(cache_dir, teacher_dir, tmp_path / "run", "--set", "optimizer.warmup=0.5").code == 0
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates[:3] == pytest.approx([2e-5 / 3, 4e-5 / 3, 2e-5])
    assert rates[3] == pytest.approx(2e-5)
    assert 0 < rates[-1] < rates[-2]


def test_a_dry_run_refuses_what_the_run_would(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    for options, says in (
        (["--student-layers", "7,1"], "ascending"),
        (["--device", "foo"], "foo"),
        (["--eval-cache", tmp_path / "none"], "none"),
        (["--teacher", tmp_path / "nobody"], "nobody"),
    ):
        result = distill(cache_dir, teacher_dir, tmp_path / "run", "--dry-run", *options)
        assert result.code == 1
        assert says in result.err


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from pipeline.cli import main
main()
"""


@pytest.mark.parametrize("num_bytes", [900, 20_000, 100_000])
def test_a_full_disk_is_one_error_and_the_same_command_goes_on(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, num_bytes: int
) -> None:
    """RLIMIT_FSIZE makes every write beyond it fail as a full disk does: in run.json, in the weights, in the model."""
    command = ["distill", "--cache", str(cache_dir), "--student", str(teacher_dir), "--out", str(tmp_path / "run"),
               "--steps", "2", "--dtype", "float32"]  # fmt: skip
    full = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(num_bytes), *command], capture_output=True, text=True, check=False
    )
    assert full.returncode == 1, full.stderr
    assert "cannot be written: " in full.stderr
    assert "Traceback" not in full.stderr
    again = pipeline(*command, *(["--resume"] if (tmp_path / "run" / "run.json").exists() else []))
    assert again.code == 0, again.err
    assert not list((tmp_path / "run").glob(".*"))
