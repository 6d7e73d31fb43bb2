"""SIGKILL at any moment of a run, then --resume: the end is that of a run which nothing has disturbed."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config

from cache_schema.storage import sha256_of
from tests.command_line import pipeline
from tests.conftest import dump
from tests.forked import Forks, until
from tests.test_bad_input import snapshot
from tests.test_kill import differences, num_lines
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_models import save_tiny_model

NUM_STEPS = 12


@pytest.fixture(scope="module")
def held_out(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "held-out", "--limit", "5")


@pytest.fixture(scope="module")
def command(cache_dir: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A student with dropout, evaluations, a best student, an average of the weights and two checkpoints that stay.

    The learning rate is so high that the best student is one on the way.
    """
    tokenizer, folder = tiny_tokenizer(chat_template=CHATML), tmp_path_factory.mktemp("models") / "gpt2"
    student = save_tiny_model(folder, tokenizer, GPT2Config, num_hidden_layers=2)
    assert AutoConfig.from_pretrained(student).resid_pdrop == 0.1
    return [
        "distill", "--cache", cache_dir, "--student", student, "--steps", NUM_STEPS, "--dtype", "float32",
        "--device", "cpu", "--eval-cache", held_out, "--set", "eval_every=4", "--set", "checkpoint_every=3",
        "--keep-checkpoints", 2, "--set", "sequences_per_step=4", "--set", "micro_batch_sequences=2",
        "--set", "optimizer.lr=0.03", "--set", "optimizer.ema_decay=0.5", "--json", "--out",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    best = pipeline(*command, run).json["best"]
    assert best["step"] in (4, 8)
    return run


MOMENTS = {
    "the first checkpoint begins": r"os.mkdir .*/checkpoints/\.step-000003\S+ .*",
    "a checkpoint is whole but for its name": r"os.rename .*/\.step-000006\S+ .*",
    "a checkpoint is there and an older one goes": r"shutil.rmtree .*/checkpoints/step-000003 .*",
    "the best student is saved": r"os.rename .*/best/\.step-\S+ .*",
    "the last checkpoint is there and no model": r"os.mkdir .*/\.model\S+ .*",
    "the model is there and its average is not": r"os.rename .*/\.ema\S+ .*",
    "a best student on the way goes": r"shutil.rmtree .*/best/step-\S+ .*",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_files(
    moment: str, command: list[object], undisturbed: Path, commands: Forks, tmp_path: Path
) -> None:
    """Random numbers are those of a step, so that dropout is resumed too: weights, moments, evaluations bit for bit."""
    run = tmp_path / "run"
    killed = commands.start(*command, run, signalled=(signal.SIGKILL, MOMENTS[moment]))
    assert killed.wait().code == -signal.SIGKILL
    assert "summary" in (run / "run.json").read_text()
    assert json.loads((run / "run.json").read_text())["summary"] is None
    resumed = commands.start(*command, run, "--resume").wait().json
    assert said(resumed, run) == said(json.loads((undisturbed / "run.json").read_text())["summary"], undisturbed)
    assert without_times(run) == without_times(undisturbed)
    for folder in ("model", "ema", "best", "checkpoints"):
        assert differences(run / folder, undisturbed / folder) == []
    assert not list(run.rglob(".*.tmp"))


@pytest.mark.parametrize(
    "num_steps", [7, pytest.param(1, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.slow)]
)
def test_a_run_killed_at_any_instant_resumes_to_the_same_weights_and_losses(
    teacher_dir: Path, cache_dir: Path, commands: Forks, tmp_path: Path, num_steps: int
) -> None:
    command = [
        "distill", "--cache", cache_dir, "--student", teacher_dir, "--student-layers", "0,2", "--device", "cpu",
        "--steps", 40, "--dtype", "float32", "--set", "sequences_per_step=4", "--set", "micro_batch_sequences=2",
        "--set", "checkpoint_every=3", "--set", "optimizer.lr=1e-2", "--json", "--out",
    ]  # fmt: skip
    killed = tmp_path / "killed"
    process = commands.start(*command, killed)
    until(lambda: num_lines(killed / "metrics.jsonl") >= num_steps)
    process.send(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    assert not (killed / "model").exists()
    assert pipeline(*command, killed).code == 1  # a run is not gone on with by accident

    resumed = pipeline(*command, killed, "--resume").json
    undisturbed = pipeline(*command, tmp_path / "undisturbed").json
    assert resumed["loss"] == undisturbed["loss"]
    assert resumed["lookups"] == undisturbed["lookups"]
    assert without_times(killed) == without_times(tmp_path / "undisturbed")
    assert differences(killed / "model", tmp_path / "undisturbed" / "model") == []
    assert not (killed / "checkpoints").exists()


def test_resuming_a_finished_run_returns_its_summary(teacher_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    command = ["distill", "--cache", cache_dir, "--student", teacher_dir, "--steps", "2", "--out", tmp_path / "run"]
    first = pipeline(*command, "--json").json
    before = snapshot(tmp_path / "run")
    assert pipeline(*command, "--resume", "--json").json == first
    assert snapshot(tmp_path / "run") == before


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    """Every step's record but for what a clock says."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if key not in ("seconds", "positions_per_second")}
        for record in records
    ]


def said(summary: dict[str, Any], run: Path) -> dict[str, Any]:
    """A summary but for what a clock says, the memory, and where the run is."""
    timed = ("seconds", "positions_per_second", "peak_memory_bytes", "teacher_forwards")
    kept = {key: value for key, value in summary.items() if key not in timed}
    return json.loads(json.dumps(kept).replace(str(run), "RUN"))  # type: ignore[no-any-return]


RANKS = [
    "--student-layers", "0,2", "--steps", NUM_STEPS, "--dtype", "float32", "--device", "cpu", "--loss", "t_ld+kl",
    "--set", "sequences_per_step=6", "--set", "micro_batch_sequences=2", "--set", "checkpoint_every=3",
    "--set", "optimizer.lr=3e-3", "--json",
]  # fmt: skip


def test_a_killed_run_on_two_ranks_of_zero_2_resumes_to_the_same_losses_and_weights(
    teacher_dir: Path, cache_dir: Path, commands: Forks, tmp_path: Path
) -> None:
    """Bit for bit: what the ranks add up, they add up in the same order."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'logit-cache[deepspeed]'")
    command = [
        "distill", "--cache", cache_dir, "--student", teacher_dir, *RANKS, "--engine", "deepspeed", "--out",
    ]  # fmt: skip
    moment = signal.SIGKILL, r"os.rename .*/\.step-000006.*"
    first, other = commands.start_ranks(2, *command, tmp_path / "killed", signalled=moment)
    assert first.wait().code == -signal.SIGKILL
    other.send(signal.SIGKILL)
    other.wait()
    for run in ("killed", "undisturbed"):
        ranks = [rank.wait() for rank in commands.start_ranks(2, *command, tmp_path / run, "--resume")]
        assert [rank.code for rank in ranks] == [0, 0], ranks[0].err
    assert len(without_times(tmp_path / "killed")) == NUM_STEPS
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "undisturbed")
    assert differences(tmp_path / "killed" / "model", tmp_path / "undisturbed" / "model") == []


@pytest.mark.slow
def test_a_run_goes_on_with_any_engine_on_any_number_of_ranks(
    teacher_dir: Path, cache_dir: Path, commands: Forks, tmp_path: Path
) -> None:
    """Ranks divide float32 sums otherwise, which moves a loss by 3e-7 and a gradient norm by 5e-6 of itself."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'logit-cache[deepspeed]'")
    command = ["distill", "--cache", cache_dir, "--student", teacher_dir, *RANKS]
    run = tmp_path / "run"
    legs = [
        (2, ["--engine", "torch"]),
        (3, ["--engine", "fsdp2"]),
        (1, []),
        (2, ["--engine", "deepspeed", "--zero-stage", 3]),
    ]
    for leg, (num_ranks, engine) in enumerate(legs, 1):
        moment = (signal.SIGTERM, rf"os.mkdir .*/\.step-{3 * leg:06d}.*") if leg < len(legs) else None
        ranks = commands.start_ranks(num_ranks, *command, *engine, "--resume", "--out", run, signalled=moment)
        results = [rank.wait() for rank in ranks]
        assert {result.code for result in results} == {0}, results[0].err
        assert results[0].json["steps"] == 3 * leg
    assert pipeline(*command, "--out", tmp_path / "one").code == 0
    found, alone = without_times(run), without_times(tmp_path / "one")
    assert [record["ranks"] for record in found] == [2] * 3 + [3] * 3 + [1] * 3 + [2] * 3
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in alone], rel=2e-6)
    norms = [[record["grad_norm"] for record in records] for records in (found, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.fixture(scope="module")
def stopped(cache_dir: Path, teacher_dir: Path, commands: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after six steps, with two checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    command = ["distill", "--cache", cache_dir, "--student", teacher_dir, *RANKS, "--keep-checkpoints", 2]
    moment = (signal.SIGTERM, r"os.mkdir .*/\.step-000006.*")
    assert commands.start(*command, "--out", run, signalled=moment).wait().json["steps"] == 6
    return run


def flip_a_byte(folder: Path) -> None:
    file = folder / "model-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def cut(folder: Path) -> None:
    file = folder / "optimizer-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def of_another_student(folder: Path) -> None:
    """Of more layers."""
    weights = load_file(folder / "model-00000.safetensors")
    save_file(
        {**weights, "model.other": weights["model.model.norm.weight"].clone()}, folder / "model-00000.safetensors"
    )
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["model-00000.safetensors"] = sha256_of(folder / "model-00000.safetensors")
    (folder / "state.json").write_text(json.dumps(state))


DAMAGES = {
    "model-00000.safetensors is damaged": flip_a_byte,
    "optimizer-00000.safetensors is damaged": cut,
    "model-00000.safetensors cannot be read: No such file": lambda folder: (
        folder / "model-00000.safetensors"
    ).unlink(),
    "state.json": lambda folder: (folder / "state.json").unlink(),
    "it is of another model, with model.other": of_another_student,
    "Expecting value": lambda folder: (folder / "state.json").write_text(""),
    "it has no 'sha256'": lambda folder: (folder / "state.json").write_text('{"ranks": 1, "moving": {}}'),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_without_it_an_older_one_serves(
    stopped: Path, tmp_path: Path, says: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    latest = run / "checkpoints" / "step-000006"
    DAMAGES[says](latest)
    before = snapshot(run)
    refused = pipeline("distill", "--resume", "--out", run)
    assert refused.code == 1
    assert refused.err.startswith(f"error: {latest} cannot be resumed from: ")
    assert says in refused.err
    assert refused.err.endswith("Delete it to go on from an older checkpoint or the beginning.\n")
    assert snapshot(run) == before
    shutil.rmtree(latest)
    shutil.copytree(stopped, tmp_path / "whole")
    for folder in ("run", "whole"):
        assert pipeline("distill", "--resume", "--out", tmp_path / folder).code == 0
    for folder in ("model", "checkpoints"):
        assert differences(run / folder, tmp_path / "whole" / folder) == []
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000009", "step-000012"]
