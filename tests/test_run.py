"""A run's directory: one writer at a time, gone on with from its own record, refused when its files are not its own."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from cache_schema import CacheReader
from cache_schema.storage import exclusive
from tests.command_line import Result, pipeline
from tests.conftest import dump
from tests.forked import Forks
from tests.test_bad_input import refused, snapshot
from tests.test_kill import differences, num_lines
from tests.test_resume import without_times
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


@pytest.mark.parametrize(
    ("num_ranks", "lr", "what"),
    [
        (1, 1e38, "the loss is nan"),
        (2, 1e38, "the loss is nan"),
        (2, 1e30, r"the gradient norm is nan, the loss \d+\.\d+"),
    ],
)
def test_what_is_not_finite_stops_a_run_before_the_weights_change(
    cache_dir: Path, teacher_dir: Path, commands: Forks, tmp_path: Path, num_ranks: int, lr: float, what: str
) -> None:
    """A first step as large as that leaves weights that overflow in the second."""
    run = tmp_path / "run"
    command = [
        "distill", "--cache", cache_dir, "--student", teacher_dir, "--out", run, "--dtype", "float32", "--loss", "sft",
        "--steps", 4, "--device", "cpu", "--set", f"optimizer.lr={lr}", "--set", "checkpoint_every=1", "--resume",
    ]  # fmt: skip
    first, *others = [rank.wait() for rank in commands.start_ranks(num_ranks, *command)]
    assert [rank.code for rank in (first, *others)] == [1] * num_ranks
    printed = "".join(rank.err for rank in (first, *others))
    assert len(re.findall(rf"error: step 2: {what}, at sequences ", printed)) == 1
    assert "Traceback" not in printed
    assert f"The weights are those before the step; lower optimizer.lr ({lr:g})" in printed
    named = re.findall(r"([0-9a-f]{32,}) of train", printed)
    in_cache = {entry.sequence.sequence_id.hex() for entry in CacheReader(cache_dir)}
    assert 0 < len(named) <= 8
    assert len(set(named)) == len(named)
    assert set(named) <= in_cache
    assert num_lines(run / "metrics.jsonl") == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    before = snapshot(run)
    assert all(rank.wait().code == 1 for rank in commands.start_ranks(num_ranks, *command))
    assert snapshot(run) == before


def test_a_gradient_whose_norm_overflows_stops_a_run_too(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """The loss is 1e25 times another, and the squares of its gradient are beyond float32."""
    result = distill(cache_dir, teacher_dir, tmp_path / "run", "--loss", "1e25*sft", "--set", "checkpoint_every=1")
    assert result.code == 1
    assert re.search(
        r"error: step 1: the gradient norm is inf, the loss \d\.\d+e\+25, at sequences [0-9a-f]+ of", result.err
    )
    assert "the weights of 1e25*sft" in result.err
    assert num_lines(tmp_path / "run" / "metrics.jsonl") == 0
    assert not (tmp_path / "run" / "checkpoints").exists()


CURRICULUM = """
[filter]
max_tokens = {max_tokens}

[loss]
name = "t_ld+s_ld"

[[schedule]]
parameter = "loss.s_ld.weight"
start = 0.0
end = 1.0
to_step = 4

[[switch]]
step = 7
loss = {{ name = "taid" }}
"""


def test_a_run_of_a_filter_schedules_and_a_switch_resumes_on_either_side_of_it(
    cache_dir: Path, teacher_dir: Path, commands: Forks, tmp_path: Path
) -> None:
    lengths = sorted(len(entry.sequence.input_ids) for entry in CacheReader(cache_dir))
    config = tmp_path / "curriculum.toml"
    config.write_text(CURRICULUM.format(max_tokens=lengths[len(lengths) // 2]))
    command = [
        "distill", "--config", config, "--cache", cache_dir, "--student", teacher_dir, "--student-layers", "0,2",
        "--steps", 12, "--dtype", "float32", "--device", "cpu", "--set", "checkpoint_every=3", "--json", "--out",
    ]  # fmt: skip
    kept = sum(length <= lengths[len(lengths) // 2] for length in lengths)
    work = pipeline(*command, tmp_path / "none", "--dry-run").json
    assert (work["sequences_kept"], work["sequences_in_cache"]) == ([kept], len(lengths))
    assert 0 < kept < len(lengths)

    assert pipeline(*command, tmp_path / "undisturbed").code == 0
    records = without_times(tmp_path / "undisturbed")
    assert [record["loss_name"] for record in records] == ["t_ld+s_ld"] * 6 + ["taid"] * 6
    weights = [record["scheduled"]["loss.s_ld.weight"] for record in records[:6]]
    assert weights == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])
    assert all("scheduled" not in record for record in records[6:])
    assert ["taid_t" in record for record in records] == [False] * 6 + [True] * 6
    assert records[0]["terms"][1] == 0
    assert {record["sequences"] for record in records} <= {8, kept % 8}

    for last in (6, 9):  # the checkpoints that are not published when it is killed
        run = tmp_path / f"killed-{last}"
        moment = (signal.SIGKILL, rf"os.rename .*/\.step-{last:06d}.*")
        assert commands.start(*command, run, signalled=moment).wait().code == -signal.SIGKILL
        assert commands.start(*command, run, "--resume").wait().code == 0
        assert without_times(run) == records
        assert differences(run / "model", tmp_path / "undisturbed" / "model") == []
