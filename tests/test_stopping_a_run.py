"""SIGTERM, with which a scheduler takes its machine back: a checkpoint of the steps done, exit code 0, and no more."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import pipeline
from tests.forked import Forks, until
from tests.test_kill import differences, num_lines
from tests.test_resume import without_times

NUM_STEPS = 40


@pytest.fixture(scope="module")
def command(cache_dir: Path, teacher_dir: Path) -> list[object]:
    return [
        "distill", "--cache", cache_dir, "--student", teacher_dir, "--student-layers", "0,2", "--device", "cpu",
        "--steps", NUM_STEPS, "--dtype", "float32", "--set", "sequences_per_step=4", "--loss", "t_ld+kl",
        "--set", "micro_batch_sequences=2", "--set", "optimizer.lr=1e-2", "--json", "--out",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert pipeline(*command, run).code == 0
    return run


def has_steps(run: Path, number: int = 3) -> Callable[[], bool]:
    return lambda: num_lines(run / "metrics.jsonl") >= number


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_sigterm_ends_with_a_checkpoint_of_the_steps_in_the_metrics(
    command: list[object], undisturbed: Path, commands: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = commands.start(*command, run)
    until(has_steps(run))
    process.send(signal.SIGTERM)
    done = process.wait().json
    num_done = num_lines(run / "metrics.jsonl")
    assert done == {"run": str(run), "steps": num_done, "of_steps": NUM_STEPS, "stopped": True}
    assert 3 <= num_done < NUM_STEPS
    assert checkpoints(run) == [f"step-{num_done:06d}"]
    assert not (run / "model").exists()
    assert commands.start(*command, run, "--resume").wait().json["steps"] == NUM_STEPS
    assert without_times(run) == without_times(undisturbed)
    assert differences(run / "model", undisturbed / "model") == []


def test_a_stopped_run_says_how_to_go_on(command: list[object], commands: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [argument for argument in command if argument != "--json"]
    said = commands.start(*words, run, signalled=(signal.SIGTERM, r"os.rename .*/config\.toml.*")).wait()
    assert said.code == 0
    assert "stopped" in said.out
    assert "--resume" in said.out


def test_sigterm_before_the_first_step_leaves_a_run_that_resumes(
    command: list[object], undisturbed: Path, commands: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped = commands.start(*command, run, signalled=(signal.SIGTERM, r"os.rename .*/run\.json.*")).wait().json
    assert (stopped["steps"], stopped["stopped"]) == (0, True)
    assert not (run / "checkpoints").exists()
    assert commands.start(*command, run, "--resume").wait().code == 0
    assert differences(run / "model", undisturbed / "model") == []


def test_sigterm_in_the_last_step_ends_with_the_model(command: list[object], commands: Forks, tmp_path: Path) -> None:
    last = rf"os.mkdir .*/\.step-{NUM_STEPS:06d}.*"
    summary = commands.start(*command, tmp_path / "run", signalled=(signal.SIGTERM, last)).wait().json
    assert summary["steps"] == NUM_STEPS
    assert (tmp_path / "run" / "model").exists()


def test_a_second_sigterm_changes_nothing(command: list[object], commands: Forks, tmp_path: Path) -> None:
    """A job's end reaches a worker by itself and once more through its launcher."""
    run = tmp_path / "run"
    process = commands.start(*command, run, signalled=(signal.SIGTERM, r"os.rename .*/\.step-.*"))
    until(has_steps(run))
    process.send(signal.SIGTERM)
    done = process.wait().json
    assert done["stopped"]
    assert checkpoints(run) == [f"step-{done['steps']:06d}"]


def test_sigint_in_the_checkpoint_of_a_sigterm_ends_at_once(
    command: list[object], undisturbed: Path, commands: Forks, tmp_path: Path
) -> None:
    """The checkpoint then does not count."""
    run = tmp_path / "run"
    process = commands.start(*command, run, signalled=(signal.SIGINT, r"os.rename .*/\.step-.*"))
    until(has_steps(run))
    process.send(signal.SIGTERM)
    assert process.wait().code == 130
    assert checkpoints(run) == []
    assert commands.start(*command, run, "--resume").wait().json["steps"] == NUM_STEPS
    assert differences(run / "model", undisturbed / "model") == []


def test_sigterm_to_one_rank_stops_all_after_the_same_step(
    command: list[object], commands: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks = commands.start_ranks(2, *command, run)
    until(has_steps(run))
    ranks[1].send(signal.SIGTERM)
    first, other = [rank.wait() for rank in ranks]
    assert (first.code, other.code) == (0, 0), first.err + other.err
    num_done = num_lines(run / "metrics.jsonl")
    assert first.json == {"run": str(run), "steps": num_done, "of_steps": NUM_STEPS, "stopped": True}
    assert other.out == ""
    assert 3 <= num_done < NUM_STEPS
    assert checkpoints(run) == [f"step-{num_done:06d}"]


def torchrun(*command: object) -> "subprocess.Popen[str]":
    """Two ranks."""
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "pipeline"]
    return subprocess.Popen([*started, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_the_run_with_a_checkpoint(command: list[object], tmp_path: Path) -> None:
    """torchrun hands it on and waits for its workers; its own exit code is that of an agent that was signalled."""
    run = tmp_path / "run"
    with torchrun(*command, run, "--steps", 400) as launched:
        until(has_steps(run))
        launched.send_signal(signal.SIGTERM)
        out, err = launched.communicate(timeout=120)
    num_done = num_lines(run / "metrics.jsonl")
    assert json.loads(out) == {"run": str(run), "steps": num_done, "of_steps": 400, "stopped": True}
    assert checkpoints(run) == [f"step-{num_done:06d}"]
    assert (launched.returncode, "SignalException" in err) == (1, True)
