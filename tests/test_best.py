"""The best student of a run, and the end of one that improves no more."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluations import Evaluations
from tests.command_line import Result, pipeline
from tests.conftest import dump
from tests.forked import Forks
from tests.test_kill import differences
from tests.test_resume import without_times
from workers.distill.config import EarlyStoppingConfig


@pytest.fixture(scope="module")
def held_out(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "held-out", "--limit", "5")


@pytest.fixture(scope="module")
def diverging(cache_dir: Path, held_out: Path, teacher_dir: Path) -> list[object]:
    """A run whose student is the teacher and only gets worse, evaluated every second step."""
    return [
        "distill", "--cache", cache_dir, "--student", teacher_dir, "--eval-cache", held_out, "--device", "cpu",
        "--steps", 16, "--dtype", "float32", "--loss", "sft", "--set", "sequences_per_step=4", "--json",
        "--set", "optimizer.lr=0.02", "--set", "eval_every=2", "--set", "checkpoint_every=3", "--out",
    ]  # fmt: skip


def stopping(metric: str, patience: int = 2, min_delta: float = 0.0) -> list[object]:
    settings = {"metric": metric, "patience": patience, "min_delta": min_delta}
    return [word for key, value in settings.items() for word in ("--set", f"early_stopping.{key}={value}")]


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    """Those during the run, by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["eval"] for record in records if "eval" in record}


def test_the_best_student_on_the_way_is_kept(diverging: list[object], held_out: Path, tmp_path: Path) -> None:
    summary = pipeline(*diverging, tmp_path / "run").json
    by_step = evaluations(tmp_path / "run")
    assert list(by_step) == [2, 4, 6, 8, 10, 12, 14]
    best = max(by_step, key=lambda step: by_step[step]["overlap"]["8"])
    assert by_step[best]["overlap"]["8"] > summary["eval"]["overlap"]["8"]
    model = tmp_path / "run" / "best" / f"step-{best:06d}"
    assert summary["best"] == {"step": best, "overlap@8": by_step[best]["overlap"]["8"], "model": str(model)}
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == [model.name]
    assert pipeline("evaluate", model, "--cache", held_out, "--device", "cpu", "--json").json == by_step[best]
    assert not summary["stopped_early"]


def test_no_best_student_is_kept_beside_a_last_one_that_is_better(
    cache_dir: Path, held_out: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    summary = pipeline(
        "distill", "--cache", cache_dir, "--student", teacher_dir, "--student-layers", "0,2", "--steps", 12,
        "--eval-cache", held_out, "--dtype", "float32", "--set", "optimizer.lr=3e-3", "--set", "eval_every=4",
        "--out", run, "--json",
    ).json  # fmt: skip
    overlaps = [evaluation["overlap"]["8"] for evaluation in evaluations(run).values()]
    assert max(overlaps) < summary["eval"]["overlap"]["8"]
    assert summary["best"] == {
        "step": 12, "overlap@8": summary["eval"]["overlap"]["8"], "model": str(run / "model"),
    }  # fmt: skip
    assert not (run / "best").exists()


@pytest.mark.parametrize("metric", ["overlap@8", "kl", "loss"])
def test_a_run_ends_when_so_many_evaluations_are_no_better(
    diverging: list[object], tmp_path: Path, metric: str
) -> None:
    command = [*diverging, tmp_path / "run", *stopping(metric)]
    if metric == "loss":  # the loss on the labels, which sft lowers at rates that are not as high
        command += ["--set", "optimizer.lr=1.0"]
    summary = pipeline(*command).json
    values = {
        step: -evaluation["overlap"]["8"] if metric == "overlap@8" else evaluation[metric]
        for step, evaluation in evaluations(tmp_path / "run").items()
    }
    steps = list(values)
    assert summary["stopped_early"]
    assert summary["steps"] == steps[-1] < 16
    best = min(values, key=values.__getitem__)
    assert (summary["best"]["step"], steps[-2:]) == (best, [best + 2, best + 4])
    assert abs(summary["best"][metric]) == abs(values[best])
    assert summary["eval"] == evaluations(tmp_path / "run")[steps[-1]]
    before = differences_of(tmp_path / "run")
    assert pipeline(*command, "--resume").json == summary
    assert differences_of(tmp_path / "run") == before


def test_improvements_below_min_delta_do_not_count_but_the_best_is_the_best(
    cache_dir: Path, held_out: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    command = [
        "distill", "--cache", cache_dir, "--student", teacher_dir, "--student-layers", "0,2", "--steps", 12,
        "--eval-cache", held_out, "--dtype", "float32", "--set", "optimizer.lr=3e-3", "--set", "eval_every=2", "--json",
    ]  # fmt: skip
    summary = pipeline(*command, *stopping("kl", 2, 100.0), "--out", tmp_path / "run").json
    kls = {step: evaluation["kl"] for step, evaluation in evaluations(tmp_path / "run").items()}
    assert list(kls) == [2, 4, 6]  # the first is one, the two after it are not better by 100 nats
    assert kls[6] < kls[4] < kls[2]
    assert summary["best"] == {"step": 6, "kl": kls[6], "model": str(tmp_path / "run" / "model")}


@pytest.mark.parametrize(
    "moment",
    [
        r"os.mkdir .*/\.model\..*",  # after the checkpoint of the step that ends it
        r"open .*/\.step-000006\..*/state\.json .*",  # in that checkpoint
        r"os.mkdir .*/best/\.step-.*",
    ],
)
def test_a_run_killed_when_it_is_to_end_ends_there_all_the_same(
    diverging: list[object], commands: Forks, tmp_path: Path, moment: str
) -> None:
    command = [*diverging[:-1], *stopping("overlap@8"), "--out"]
    killed = commands.start(*command, tmp_path / "run", signalled=(signal.SIGKILL, moment))
    assert killed.wait().code == -signal.SIGKILL
    summary = commands.start(*command, tmp_path / "run", "--resume").wait().json
    assert pipeline(*command, tmp_path / "undisturbed").json["steps"] == summary["steps"] == 6
    assert without_times(tmp_path / "run") == without_times(tmp_path / "undisturbed")
    for folder in ("model", "best"):
        assert differences(tmp_path / "run" / folder, tmp_path / "undisturbed" / folder) == []


def refusal(cache_dir: Path, teacher_dir: Path, out: Path, *options: object) -> str:
    result: Result = pipeline(
        "distill", "--cache", cache_dir, "--student", teacher_dir, "--steps", 4, "--out", out, *options
    )
    assert result.code == 1
    assert not out.exists()
    return result.err


def test_early_stopping_without_evaluations_is_refused(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    err = refusal(cache_dir, teacher_dir, tmp_path / "run", *stopping("loss"))
    assert "give eval_cache and eval_every" in err
    err = refusal(cache_dir, teacher_dir, tmp_path / "run", "--set", "eval_every=2")
    assert "eval_every has nothing to evaluate on: give eval_cache" in err


def test_a_metric_that_the_held_out_cache_cannot_give_is_refused(
    cache_dir: Path, teacher_dir: Path, data_file: Path, held_out: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(held_out, bare)
    for states in bare.glob("*.hidden.parquet"):
        states.unlink()
    few = dump(teacher_dir, data_file, tmp_path / "few", "--limit", "3", "--top-k", "4")
    every = ["--set", "eval_every=2", "--eval-cache"]
    assert "has no hidden states" in refusal(cache_dir, teacher_dir, tmp_path / "run", *every, bare, *stopping("kl"))
    err = refusal(cache_dir, teacher_dir, tmp_path / "run", *every, few, *stopping("overlap@8"))
    assert "compares 8 ids" in err
    assert "stores 4" in err


def test_with_too_few_ids_for_an_overlap_the_best_is_that_of_the_least_loss(
    cache_dir: Path, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    few = dump(teacher_dir, data_file, tmp_path / "few", "--limit", "3", "--top-k", "4")
    summary = pipeline(
        "distill", "--cache", cache_dir, "--student", teacher_dir, "--steps", 4, "--out", tmp_path / "run",
        "--eval-cache", few, "--set", "eval_every=2", "--json",
    ).json  # fmt: skip
    assert set(summary["best"]) == {"step", "loss", "model"}


def differences_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_evaluations_that_are_not_finite_are_never_the_best() -> None:
    evaluations = Evaluations("loss", EarlyStoppingConfig(metric="loss", patience=2))
    assert [evaluations.add(step, {"loss": math.nan}) for step in (1, 2)] == [False, False]
    assert (evaluations.best_step, evaluations.are_over) == (None, True)
