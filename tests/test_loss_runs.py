"""Every loss of the catalogue through the command line, from real caches; sums, moving targets and refusals."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import pipeline
from tests.conftest import dump
from workers.losses.catalogue import LOSSES


@pytest.fixture(scope="module")
def all_positions(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "all", "--positions", "all")


@pytest.fixture(scope="module")
def bare(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without hidden states."""
    return dump(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "bare", "--no-hidden-states")


@pytest.fixture(scope="module")
def sampled(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "sampled"
    made = pipeline(
        "teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--out", out, "--sampling", "random",
        "--set", "data.max_tokens=128",
    )  # fmt: skip
    assert made.code == 0, made.err
    return out


def distill(cache: Path, student: Path, loss: str, *options: object) -> list[object]:
    return [
        "distill", "--cache", cache, "--student", student, "--student-layers", "0,2", "--loss", loss, "--dtype",
        "float32", "--set", "optimizer.lr=3e-3", *options,
    ]  # fmt: skip


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_a_student_from_a_cache(
    teacher_dir: Path, cache_dir: Path, all_positions: Path, sampled: Path, tmp_path: Path, name: str
) -> None:
    cache = sampled if name == "rskd" else all_positions if name == "bild_total" else cache_dir
    run = tmp_path / "run"
    result = pipeline(*distill(cache, teacher_dir, name, "--epochs", 4, "--out", run, "--json"))
    assert result.code == 0, result.err
    steps = steps_of(run)
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    epochs = [[step["loss"] for step in steps[first : first + 3]] for first in (0, 9)]
    if name != "taid":  # its target moves away from the student
        assert sum(epochs[1]) < sum(epochs[0])
    assert result.json["teacher_forwards"] == 0


def test_whole_rows_come_from_a_cache_of_draws_too(teacher_dir: Path, sampled: Path, tmp_path: Path) -> None:
    """From its hidden states; and without them, from the teacher."""
    run = tmp_path / "run"
    assert pipeline(*distill(sampled, teacher_dir, "rskd+kl", "--steps", 2, "--out", run)).code == 0
    bare = tmp_path / "bare"
    shutil.copytree(sampled, bare)
    for states in bare.glob("*.hidden.parquet"):
        states.unlink()
    live = tmp_path / "live"
    asked = ("--teacher", teacher_dir, "--steps", 2, "--out", live, "--json")
    assert pipeline(*distill(bare, teacher_dir, "rskd+kl", *asked)).json["teacher_forwards"] > 0
    assert [step["loss"] for step in steps_of(live)] == pytest.approx(
        [step["loss"] for step in steps_of(run)], rel=1e-4
    )


def test_a_log_of_a_cache_of_draws_serves_the_next_run(teacher_dir: Path, sampled: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(sampled, bare)
    for states in bare.glob("*.hidden.parquet"):
        states.unlink()
    first, second = (
        pipeline(*distill(bare, teacher_dir, "kl", *teacher, "--epochs", 1, "--out", tmp_path / name, "--json")).json
        for name, teacher in (("first", ("--teacher", teacher_dir)), ("second", ()))
    )
    assert first["teacher_forwards"] == 24
    assert second["teacher_forwards"] == 0
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)


def test_a_held_out_cache_of_draws_is_refused_before_the_run(
    teacher_dir: Path, cache_dir: Path, sampled: Path, tmp_path: Path
) -> None:
    result = pipeline(*distill(cache_dir, teacher_dir, "t_ld", "--eval-cache", sampled, "--out", tmp_path / "run"))
    assert result.code == 1
    assert "dump the held-out data" in " ".join(result.err.split())
    assert not (tmp_path / "run").exists()


def test_a_sum_s_loss_is_the_sum_of_its_weighted_terms(teacher_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    for name, loss in (("sum", "bild+0.5*sft"), ("bild", "bild"), ("sft", "sft")):
        assert pipeline(*distill(cache_dir, teacher_dir, loss, "--steps", 1, "--out", tmp_path / name)).code == 0
    whole, bild, sft = (steps_of(tmp_path / name)[0] for name in ("sum", "bild", "sft"))
    assert whole["terms"] == pytest.approx([bild["loss"], 0.5 * sft["loss"]], rel=1e-5)
    assert whole["loss"] == pytest.approx(bild["loss"] + 0.5 * sft["loss"], rel=1e-5)


def test_a_loss_that_brings_one_for_the_prompt_gives_it_its_weight(
    teacher_dir: Path, all_positions: Path, tmp_path: Path
) -> None:
    terms = {}
    for name, loss in (("whole", "bild_total+sft"), ("half", "0.5*bild_total+sft")):
        assert pipeline(*distill(all_positions, teacher_dir, loss, "--steps", 1, "--out", tmp_path / name)).code == 0
        terms[name] = steps_of(tmp_path / name)[0]["terms"]
    bild, sft, prompt = terms["whole"]
    assert terms["half"] == pytest.approx([0.5 * bild, sft, 0.5 * prompt], rel=1e-5)


def test_parameters_of_a_sum_stand_in_their_loss_s_table(teacher_dir: Path, cache_dir: Path) -> None:
    asked = distill(
        cache_dir, teacher_dir, "bild+kl", "--set", "loss.k=5", "--set", "loss.kl.temperature=1.5", "--dry-run",
        "--json", "--out", "r",
    )  # fmt: skip
    assert pipeline(*asked).json["loss"] == {
        "name": "bild+kl",
        "bild": {"k": 5, "temperature": 3.0},
        "kl": {"temperature": 1.5, "T2": False},
    }


def test_the_dynamic_factor_weighs_the_other_losses_down(teacher_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    for name, options in (("plain", ()), ("dynamic", ("--set", "loss.dynamic=true"))):
        command = distill(cache_dir, teacher_dir, "2*rank_loss+kl", *options, "--steps", 1, "--out", tmp_path / name)
        assert pipeline(*command).code == 0
    plain, dynamic = (steps_of(tmp_path / name)[0]["terms"] for name in ("plain", "dynamic"))
    assert dynamic[0] == plain[0]
    assert 0 < dynamic[1] < plain[1]


def test_a_moving_target_goes_on_where_it_stood(teacher_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    command = distill(cache_dir, teacher_dir, "taid", "--steps", 9, "--set", "checkpoint_every=3")
    assert pipeline(*command, "--out", tmp_path / "whole").code == 0
    whole = steps_of(tmp_path / "whole")
    targets = [step["taid_t"][0] for step in whole]
    assert targets[0] == 0.4
    assert targets == sorted(targets)
    assert targets[-1] == pytest.approx(0.4 + 0.6 * 8 / 9)
    from tests.test_kill import kill_when, num_lines

    killed = tmp_path / "killed"
    kill_when([*map(str, command), "--out", str(killed)], lambda: num_lines(killed / "metrics.jsonl") >= 4)
    assert pipeline(*command, "--out", killed, "--resume").code == 0
    compared = [[(step["loss"], step["taid_t"]) for step in steps] for steps in (whole, steps_of(killed))]
    assert compared[0] == compared[1]


@pytest.mark.parametrize(
    ("loss", "options", "says"),
    [
        ("kl", (), "choose a loss that the stored top-k serves (tail_gjsd --set loss.temperature=3.0)"),
        ("rkl", (), "(tail_gjsd --set loss.beta=1.0 --set loss.temperature=3.0)"),
        ("csd", (), "--hidden-states"),
        ("tail_gjsd", ("--set", "loss.temperature=2.0"), "cache.temperatures=[1,2,3]"),
        ("tail_gjsd", ("--set", "loss.temperature=2.0"), "give --set loss.temperature=1"),
        ("rskd", (), "dump with --sampling random"),
        ("bild_total", (), "--positions all"),
        ("t_ld+rank_loss", ("--set", "loss.k=5"), "loss.t_ld.k=5"),
        ("t_ld+topk_kl", ("--set", "loss.kl.temperature=1.0"), "has no loss of that name"),
        ("t_ld+t_ld", (), "names t_ld twice"),
        ("0*t_ld", (), "write a number above 0"),
        ("t_ld+", (), "no sum of losses"),
        ("rank_loss", ("--set", "loss.dynamic=true"), "write 2*rank_loss+kl"),
        ("csd", ("--set", "loss.w1=X"), "give one of S, T, U"),
        ("gjsd", ("--set", "loss.beta=1.5"), "give at most 1"),
        ("bild_total", ("--prompt-loss", "kl"), "leave prompt_loss out"),
        ("t_ld", ("--prompt-loss", "bild_total"), "is for the response"),
        ("t_ld", ("--set", "prompt_loss.temperature=1.0"), "give --prompt-loss NAME"),
        ("tail_gjsd+t_ld", ("--set", "loss.tail_gjsd.temperature=2.0"), "--set loss.tail_gjsd.temperature=1"),
        ("t_ld+hinge", ("--set", "loss.hinge.k=99"), "--set loss.hinge.k=16"),
        ("taid", ("--set", "loss.t=0.5", "--set", "loss.t_start=0.3"), "give one or the other"),
        ("1 0*sft+t_ld", (), "is no weight"),
    ],
)
def test_what_a_top_k_cache_cannot_serve_is_refused_with_the_way_out(
    teacher_dir: Path, bare: Path, tmp_path: Path, loss: str, options: tuple[str, ...], says: str
) -> None:
    result = pipeline(*distill(bare, teacher_dir, loss, *options, "--out", tmp_path / "run"))
    assert result.code == 1
    assert says in " ".join(result.err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", ["bild", "t_ld", "tail_gjsd", "rank_loss"])
def test_a_cache_of_draws_serves_no_loss_on_leading_ids(
    teacher_dir: Path, sampled: Path, tmp_path: Path, loss: str
) -> None:
    result = pipeline(*distill(sampled, teacher_dir, loss, "--out", tmp_path / "run"))
    assert result.code == 1
    assert "choose rskd, or dump with --sampling top-k" in " ".join(result.err.split())


def test_the_list_of_losses_names_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = pipeline("losses").out
    facts = pipeline("losses", "--json").json["losses"]
    assert [loss["name"] for loss in facts] == list(LOSSES)
    assert all(f"  {name} " in words for name in LOSSES)
    one = pipeline("losses", "tail_gjsd").out
    assert "--set loss.beta=0.0" in one
    assert "log-sum-exp" not in one or "logsumexp" in one
    assert pipeline("losses", "klx").code == 1
