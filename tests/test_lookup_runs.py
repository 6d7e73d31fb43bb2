"""Runs whose lookups leave the stored top-k: what they cost, what they leave behind, and that it changes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_schema import CacheReader
from cache_schema.errors import StorageError
from tests.caches import flip_bit
from tests.command_line import Result, pipeline
from tests.conftest import dump, write_jsonl
from tests.test_bad_input import refused
from tests.test_kill import kill_when
from tests.tiny import tiny_tokenizer
from tests.tiny_models import save_tiny_llama

NUM_SEQUENCES = 12
RUN = [
    "--student-layers", "0,2", "--dtype", "float32", "--epochs", 2, "--set", "sequences_per_step=4",
    "--set", "micro_batch_sequences=3", "--set", "optimizer.lr=3e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole_cache(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With hidden states. Read and never changed."""
    return dump(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "whole", "--limit", str(NUM_SEQUENCES))


@pytest.fixture(scope="module")
def bare_cache(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without. Read and never changed: a test copies it."""
    out = tmp_path_factory.mktemp("caches") / "bare"
    return dump(teacher_dir, data_file, out, "--limit", str(NUM_SEQUENCES), "--no-hidden-states")


@pytest.fixture
def cache(bare_cache: Path, tmp_path: Path) -> Path:
    """Without hidden states, the test's own."""
    return Path(shutil.copytree(bare_cache, tmp_path / "cache"))


@pytest.fixture(scope="module")
def logged_cache(bare_cache: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a run with a live teacher. Read and never changed."""
    cache = Path(shutil.copytree(bare_cache, tmp_path_factory.mktemp("caches") / "logged"))
    run(cache, teacher_dir, cache.parent / "run", "--teacher", teacher_dir)
    return cache


@pytest.fixture
def logged(logged_cache: Path, tmp_path: Path) -> Path:
    """The test's own."""
    return Path(shutil.copytree(logged_cache, tmp_path / "logged"))


@pytest.fixture(scope="module")
def whole_run(whole_cache: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From stored hidden states."""
    return run(whole_cache, teacher_dir, tmp_path_factory.mktemp("runs") / "whole")


def distill(cache: Path | list[Path], student: Path, out: Path, *options: object) -> Result:
    caches = [part for each in (cache if isinstance(cache, list) else [cache]) for part in ("--cache", each)]
    return pipeline("distill", *caches, "--student", student, "--out", out, *RUN, *options, "--json")


def run(cache: Path | list[Path], student: Path, out: Path, *options: object) -> Path:
    """Train, or fail. Returns the run's directory."""
    result = distill(cache, student, out, *options)
    assert result.code == 0, result.err
    return out


def summary(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "run.json").read_text())["summary"]
    return found


def steps(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [step["loss"] for step in steps(run_dir)]


def forwards_by_epoch(run_dir: Path) -> list[int]:
    """Of runs whose epochs are NUM_SEQUENCES / 4 steps."""
    forwards = [step["teacher_forwards"] for step in steps(run_dir)]
    per_epoch = NUM_SEQUENCES // 4
    return [sum(forwards[first : first + per_epoch]) for first in range(0, len(forwards), per_epoch)]


def tiers(run_dir: Path) -> set[str]:
    return {tier for tier, pairs in summary(run_dir)["lookups"].items() if pairs}


def assert_same_training(run_dir: Path, other: Path) -> None:
    """A live teacher reads other batches than the dump's did, so float32 sums differ in their last bits: 1e-6 of a
    logit, hence 1e-5 of the first loss; Adam carries that on, below 1e-3 in these few steps."""
    assert losses(run_dir)[0] == pytest.approx(losses(other)[0], rel=1e-5)
    assert losses(run_dir) == pytest.approx(losses(other), rel=1e-3)


# The log of hidden states


def test_a_live_teacher_is_asked_once_a_sequence_and_by_no_run_after_that(
    cache: Path, teacher_dir: Path, whole_run: Path, tmp_path: Path
) -> None:
    live = run(cache, teacher_dir, tmp_path / "live", "--teacher", teacher_dir)
    assert tiers(live) == {"cached", "live", "logged"}
    assert forwards_by_epoch(live) == [NUM_SEQUENCES, 0]
    second = run(cache, teacher_dir, tmp_path / "second", "--teacher", teacher_dir)
    alone = run(cache, teacher_dir, tmp_path / "alone")
    for run_dir in (second, alone):
        assert summary(run_dir)["teacher_forwards"] == 0
        assert tiers(run_dir) == {"cached", "logged"}
        assert losses(run_dir) == losses(live)  # logged states are the live ones, bit for bit
    assert tiers(whole_run) == {"cached", "hidden"}
    assert_same_training(live, whole_run)
    pairs = [sum(summary(each)["lookups"].values()) for each in (live, second, alone, whole_run)]
    assert pairs == [summary(live)["positions"] * 8] * 4
    assert summary(live)["bound_share"] == 0


@pytest.mark.parametrize("loss", ["kl", "rkl"])
def test_losses_on_whole_rows_train_alike_from_hidden_states_a_teacher_and_the_log(
    cache: Path, whole_cache: Path, teacher_dir: Path, tmp_path: Path, loss: str
) -> None:
    options = ["--loss", loss, "--epochs", 1]
    whole = run(whole_cache, teacher_dir, tmp_path / "whole", *options)
    live = run(cache, teacher_dir, tmp_path / "live", *options, "--teacher", teacher_dir)
    alone = run(cache, teacher_dir, tmp_path / "alone", *options)
    assert_same_training(live, whole)
    assert losses(alone) == losses(live)
    assert [summary(each)["teacher_forwards"] for each in (whole, live, alone)] == [0, NUM_SEQUENCES, 0]


def test_other_students_and_losses_are_answered_from_the_same_log(
    logged: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    for name, options in (("layers", ["--student-layers", "1,3"]), ("seed", ["--seed", 5]), ("loss", ["--loss", "kl"])):
        assert summary(run(logged, teacher_dir, tmp_path / name, *options))["teacher_forwards"] == 0


def test_without_hidden_states_teacher_log_or_bound_every_way_out_is_named(
    cache: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    name = CacheReader(cache).plan.teacher.name
    command = ["distill", "--cache", cache, "--student", teacher_dir, *RUN]
    for says in (f"Give --teacher {name}", "--on-miss bound", "without --no-hidden-states", "t_ld, topk_kl"):
        refused(*command, out=tmp_path / "run", says=says)
    refused(*command, "--loss", "kl", "--on-miss", "bound", out=tmp_path / "run", says="the teacher's whole rows")


def test_a_log_of_some_sequences_is_not_enough_and_the_refusal_counts_them(
    cache: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    first = run(cache, teacher_dir, tmp_path / "first", "--teacher", teacher_dir, "--steps", 2)
    assert summary(first)["teacher_forwards"] == 8
    command = ["distill", "--cache", cache, "--student", teacher_dir, *RUN]
    refused(*command, out=tmp_path / "run", says="and its log those of 8 of 12 sequences")
    second = run(cache, teacher_dir, tmp_path / "second", "--teacher", teacher_dir)
    assert summary(second)["teacher_forwards"] == NUM_SEQUENCES - 8
    assert summary(run(cache, teacher_dir, tmp_path / "third"))["teacher_forwards"] == 0


def test_no_log_is_left_where_none_is_asked_for(
    cache: Path, teacher_dir: Path, whole_run: Path, tmp_path: Path
) -> None:
    bare = run(cache, teacher_dir, tmp_path / "run", "--teacher", teacher_dir, "--log", "none")
    assert forwards_by_epoch(bare) == [NUM_SEQUENCES, NUM_SEQUENCES]
    assert not (cache / "lookups").exists()
    assert_same_training(bare, whole_run)


def test_the_teacher_and_its_head_run_where_they_are_told_to(
    cache: Path, logged: Path, teacher_dir: Path, whole_cache: Path, whole_run: Path, tmp_path: Path
) -> None:
    options = ["--teacher", teacher_dir, "--log", "none"]
    for name, device in (("offloaded", "offload"), ("placed", "cpu")):
        run_dir = run(cache, teacher_dir, tmp_path / name, *options, "--teacher-device", device)
        assert_same_training(run_dir, whole_run)
        assert forwards_by_epoch(run_dir) == [NUM_SEQUENCES, NUM_SEQUENCES]
    for name, of in (("head of the cache", whole_cache), ("head of the log", logged)):
        assert_same_training(run(of, teacher_dir, tmp_path / name, "--head-device", "cpu"), whole_run)
    for option in ("--teacher-device", "--head-device"):
        command = ["distill", "--cache", cache, "--student", teacher_dir, *RUN, *options]
        refused(*command, option, "cuda:7", out=tmp_path / "none", says="cuda:7")


# The log elsewhere


def test_a_cache_that_cannot_be_written_has_its_log_elsewhere(
    cache: Path, teacher_dir: Path, whole_run: Path, tmp_path: Path
) -> None:
    (cache / "lookups").write_text("in the way")
    command = ["distill", "--cache", cache, "--student", teacher_dir, *RUN, "--teacher", teacher_dir]
    refused(*command, out=tmp_path / "run", says="give --lookups DIR for another place, or --log none")
    options = ["--lookups", tmp_path / "logs"]
    live = run(cache, teacher_dir, tmp_path / "live", *options, "--teacher", teacher_dir)
    assert forwards_by_epoch(live) == [NUM_SEQUENCES, 0]
    assert losses(run(cache, teacher_dir, tmp_path / "alone", *options)) == losses(live)
    assert_same_training(live, whole_run)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [CacheReader(cache).manifest_sha256[:16]]
    assert (cache / "lookups").read_text() == "in the way"
    folded = pipeline("compact", cache, "--lookups", tmp_path / "logs", "--json").json
    assert (folded["files_before"], folded["files_after"]) == (3, 1)
    assert losses(run(cache, teacher_dir, tmp_path / "folded", *options)) == losses(live)


def test_two_caches_share_a_directory_of_logs_and_a_log_inside_a_cache_is_read_too(
    cache: Path, logged: Path, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    other = dump(teacher_dir, data_file, tmp_path / "other", "--limit", "5", "--no-hidden-states")
    options = ["--lookups", tmp_path / "logs", "--epochs", 1]
    both = run([cache, other], teacher_dir, tmp_path / "both", *options, "--teacher", teacher_dir)
    assert summary(both)["teacher_forwards"] == NUM_SEQUENCES + 5
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        CacheReader(each).manifest_sha256[:16] for each in (cache, other)
    }
    assert losses(run([cache, other], teacher_dir, tmp_path / "again", *options)) == losses(both)
    elsewhere = ["--lookups", tmp_path / "empty"]
    assert summary(run(logged, teacher_dir, tmp_path / "inside", *elsewhere))["teacher_forwards"] == 0


# A log of answers


def test_a_log_of_answers_costs_fewer_forwards_in_every_later_epoch(
    cache: Path, teacher_dir: Path, whole_run: Path, tmp_path: Path
) -> None:
    options = ["--teacher", teacher_dir, "--log", "logits"]
    ahead = run(cache, teacher_dir, tmp_path / "ahead", *options)
    without = Path(shutil.copytree(cache, tmp_path / "copy"))
    shutil.rmtree(without / "lookups")
    none = run(without, teacher_dir, tmp_path / "none", *options, "--set", "lookups.fetch_ahead=0")
    for run_dir in (ahead, none):
        assert_same_training(run_dir, whole_run)  # answers are exact
        assert forwards_by_epoch(run_dir)[0] == NUM_SEQUENCES
    assert forwards_by_epoch(ahead)[1] < forwards_by_epoch(none)[1]
    again = run(cache, teacher_dir, tmp_path / "again", *options)
    assert_same_training(again, ahead)
    # The same student asks the same, but where its own logits tie to the last bit.
    assert summary(again)["teacher_forwards"] <= 1
    assert tiers(again) >= {"cached", "logged"}
    assert all(".logits." in path.name for path in cache.glob("lookups/*/*.parquet"))


def test_whole_rows_are_no_business_of_a_log_of_answers(cache: Path, teacher_dir: Path, tmp_path: Path) -> None:
    command = ["distill", "--cache", cache, "--student", teacher_dir, *RUN, "--teacher", teacher_dir]
    refused(*command, "--loss", "kl", "--log", "logits", out=tmp_path / "run", says="give --log hidden, or --log none")
    refused(*command, "--log", "all", out=tmp_path / "run", says="lookups.log")


# The bound


def test_bounded_lookups_are_counted_and_said_to_be_inexact(
    cache: Path, teacher_dir: Path, whole_run: Path, tmp_path: Path
) -> None:
    command = ["distill", "--cache", cache, "--student", teacher_dir, *RUN, "--on-miss", "bound"]
    result = pipeline(*command, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert "bound: the log has hidden states of 0 of 12 sequences; other misses get an upper bound" in result.err
    found = summary(tmp_path / "run")
    assert tiers(tmp_path / "run") == {"cached", "bound"}
    assert found["bound_share"] == found["lookups"]["bound"] / sum(found["lookups"].values()) > 0.2
    assert f"NOT exact {found['bound_share']:.1%} of the lookups" in result.out
    assert losses(tmp_path / "run")[0] != pytest.approx(losses(whole_run)[0], rel=1e-3)
    assert not (cache / "lookups").exists()
    exact = pipeline(
        "distill", "--cache", cache, "--student", teacher_dir, *RUN, "--loss", "t_ld", "--out", tmp_path / "t"
    )
    assert "NOT exact" not in exact.out


# Several caches


@pytest.fixture(scope="module")
def second_cache(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of other prompts, with hidden states. Read and never changed."""
    folder = tmp_path_factory.mktemp("second")
    rows: list[dict[str, object]] = [
        {"prompt": f"Say {word}: ", "response": f"{word} {word}"} for word in ("mask", "disk", "four")
    ]
    return dump(teacher_dir, write_jsonl(folder / "rows.jsonl", rows), folder / "cache")


def test_caches_with_and_without_hidden_states_are_mixed_and_the_teacher_runs_for_the_latter(
    cache: Path, second_cache: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    options = ["--teacher", teacher_dir]
    live = run([cache, second_cache], teacher_dir, tmp_path / "live", *options)
    assert tiers(live) == {"cached", "hidden", "live", "logged"}
    found = summary(live)
    assert (found["teacher_forwards"], found["sequences"], found["epochs"]) == (NUM_SEQUENCES, 2 * 15, 2)
    again = run([cache, second_cache], teacher_dir, tmp_path / "again")
    assert losses(again) == losses(live)
    record = json.loads((live / "run.json").read_text())
    assert record["manifest_sha256"] == [CacheReader(each).manifest_sha256 for each in (cache, second_cache)]
    assert not (second_cache / "lookups").exists()


def test_weights_share_an_epoch_among_caches(
    whole_cache: Path, second_cache: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    caches = [whole_cache, second_cache]
    plan = distill(caches, teacher_dir, tmp_path / "run", "--weights", "1,2", "--dry-run").json
    assert (plan["sequences_per_epoch"], plan["sequences_in_cache"], plan["steps"]) == ([5, 10], 15, 8)
    assert distill(caches, teacher_dir, tmp_path / "run", "--dry-run").json["sequences_per_epoch"] == [12, 3]
    weighted = run(caches, teacher_dir, tmp_path / "run", "--weights", "1,2")
    plain = run(caches, teacher_dir, tmp_path / "plain")
    assert summary(weighted)["sequences"] == summary(plain)["sequences"] == 30
    # The second cache's responses are short: with most of the epoch its own, there are fewer positions.
    assert summary(weighted)["positions"] < summary(plain)["positions"]


def test_caches_that_do_not_go_together_are_refused(
    whole_cache: Path, second_cache: Path, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    foreign_dir = save_tiny_llama(tmp_path / "foreign", tiny_tokenizer(corpus=("zebras quiz jazzy foxes " * 3,)))
    foreign = dump(foreign_dir, data_file, tmp_path / "foreign-cache", "--limit", "3")

    def command(*caches: Path) -> list[object]:
        return ["distill", *[part for each in caches for part in ("--cache", each)], "--student", teacher_dir, *RUN]

    out = tmp_path / "run"
    refused(*command(whole_cache, foreign), out=out, says="was made with another tokenizer than")
    refused(*command(whole_cache, whole_cache), out=out, says="names one cache twice")
    (tmp_path / "link").symlink_to(whole_cache)
    for spelling in (whole_cache / ".." / whole_cache.name, tmp_path / "link"):
        refused(*command(whole_cache, spelling), out=out, says="names one cache twice")
    both = command(whole_cache, second_cache)
    refused(*both, "--weights", "1,2,3", out=out, says="weights has 3 entries for 2 caches")
    refused(*both, "--weights", "1,0", out=out, says="weights")
    refused(*both, "--weights", "1,1e-4", out=out, says="without a single sequence in an epoch")
    assert pipeline(*both, "--weights", "1e308,1e308", "--out", out, "--dry-run").code == 0
    refused(*both, "--weights", "nan,1", out=out, says="weights")
    assert pipeline(*both, "--weights", "1;2", "--out", out).code == 2


# Killed


def test_a_killed_live_run_ends_with_the_same_losses_and_asks_for_no_sequence_twice(
    bare_cache: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    command = ["--student", teacher_dir, "--teacher", teacher_dir, *RUN, "--set", "sequences_per_step=1"]
    command += ["--set", "checkpoint_every=3", "--epochs", 4]
    caches = [Path(shutil.copytree(bare_cache, tmp_path / name)) for name in ("cache", "other")]
    killed = tmp_path / "killed"
    arguments = ["distill", "--cache", caches[0], *command, "--out", killed]
    kill_when(
        [str(part) for part in arguments],
        lambda: (killed / "metrics.jsonl").exists() and (killed / "metrics.jsonl").read_text().count("\n") >= 7,
    )
    before = {path: path.read_bytes() for path in caches[0].glob("lookups/*/*.*")}
    assert before
    resumed = pipeline(*arguments, "--resume", "--json").json
    undisturbed = run(caches[1], teacher_dir, tmp_path / "undisturbed", *command)
    assert losses(killed) == losses(undisturbed)
    # What the killed part asked counts too, though its last steps were done again.
    assert resumed["teacher_forwards"] == NUM_SEQUENCES == summary(undisturbed)["teacher_forwards"]
    assert {path: path.read_bytes() for path in before} == before
    logged = [json.loads(path.read_text())["indexes"] for path in caches[0].glob("lookups/*/*.json")]
    assert sorted(index for indexes in logged for index in indexes) == list(range(NUM_SEQUENCES))
    assert pipeline("compact", caches[0]).code == 0
    assert pipeline("verify", caches[0]).code == 0


# inspect, verify, compact


def test_inspect_counts_what_is_logged(
    cache: Path, logged: Path, bare_cache: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    nothing = {
        "pairs": 0, "answered_pairs": 0, "sequences": 0, "sequences_with_hidden_states": 0, "files": 0, "bytes": 0,
        "error": None,
    }  # fmt: skip
    assert pipeline("inspect", bare_cache, "--json").json["lookups"] == nothing
    facts = pipeline("inspect", logged, "--json").json
    assert facts["lookups"] == {
        "pairs": facts["num_positions"] * facts["tokenizer"]["vocab_size"],
        "answered_pairs": 0,
        "sequences": NUM_SEQUENCES,
        "sequences_with_hidden_states": NUM_SEQUENCES,
        "files": NUM_SEQUENCES // 4,
        "bytes": sum(path.stat().st_size for path in logged.glob("lookups/*/*.parquet")),
        "error": None,
    }
    assert "  lookup log  12 of 12 sequences with hidden states, 3 files, " in pipeline("inspect", logged).out
    assert "lookup log" not in pipeline("inspect", bare_cache).out
    assert facts["bytes"] == pipeline("inspect", bare_cache, "--json").json["bytes"]
    live = run(
        cache, teacher_dir, tmp_path / "run", "--teacher", teacher_dir, "--log", "logits", "--steps", 1,
        "--set", "lookups.fetch_ahead=0",
    )  # fmt: skip
    lookups = pipeline("inspect", cache, "--json").json["lookups"]
    assert (lookups["pairs"], lookups["sequences"]) == (summary(live)["lookups"]["live"], 4)
    assert f"  lookup log  answers of {lookups['pairs']:,} pairs, 2 files, " in pipeline("inspect", cache).out


def first(cache: Path, pattern: str) -> Path:
    return min(cache.glob(f"lookups/{pattern}"))


def flip_name(file: Path) -> None:
    """Of the program that wrote it."""
    flip_bit(file, 8 * file.read_bytes().index(b"parquet-cpp-arrow"))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (lambda cache: flip_bit(first(cache, "*/*.parquet"), 1000), "000000.hidden.parquet"),
    "a flipped bit that nothing reads": (lambda cache: flip_name(first(cache, "*/*.parquet")), "000000.hidden.parquet"),
    "a missing file": (lambda cache: first(cache, "*/*.parquet").unlink(), "000000.hidden.parquet"),
    "a damaged receipt": (lambda cache: first(cache, "*/*.json").write_text("{"), "000000.json"),
    "a flipped bit in the head": (lambda cache: flip_bit(first(cache, "*.safetensors"), 90_000), "lm_head.safetensors"),
    "a missing head": (lambda cache: first(cache, "*.safetensors").unlink(), "lm_head.safetensors"),
}


@pytest.mark.parametrize(("damage", "file"), DAMAGES.values(), ids=DAMAGES.keys())
def test_verify_finds_damage_in_the_log(logged: Path, damage: Callable[[Path], None], file: str) -> None:
    assert json.loads(pipeline("verify", logged, "--json").out)["ok"]
    assert ", and 3 files of the lookup log" in pipeline("verify", logged).out
    damage(logged)
    result = pipeline("verify", logged, "--json")
    assert result.code == 1
    (error,) = json.loads(result.out)["errors"]
    assert error["file"].startswith("lookups")
    assert error["file"].endswith(file)


@pytest.mark.parametrize("name", ["a flipped bit", "a missing file", "a damaged receipt", "a flipped bit in the head"])
def test_a_run_that_meets_damage_in_the_log_says_so(logged: Path, teacher_dir: Path, tmp_path: Path, name: str) -> None:
    DAMAGES[name][0](logged)
    result = distill(logged, teacher_dir, tmp_path / "run")
    assert result.code == 1
    assert "lookups" in result.err
    assert "elete" in result.err  # says what to do
    assert not (tmp_path / "run" / "model").exists()


def test_a_compaction_folds_the_log_of_several_runs_and_changes_no_answer(
    logged: Path, logged_cache: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    # A second run that did not know of the first logs some sequences again.
    copy = Path(shutil.copytree(logged, tmp_path / "copy"))
    shutil.rmtree(copy / "lookups")
    run(copy, teacher_dir, tmp_path / "second", "--teacher", teacher_dir, "--steps", 2)
    for directory in (copy / "lookups").iterdir():
        if directory.is_dir():
            shutil.copytree(directory, logged / "lookups" / directory.name)
    folded = pipeline("compact", logged, "--json").json
    assert (folded["files_before"], folded["files_after"], folded["duplicates"]) == (5, 1, 8)
    assert pipeline("verify", logged).code == 0
    assert pipeline("inspect", logged, "--json").json["lookups"]["sequences"] == NUM_SEQUENCES
    again = pipeline("compact", logged, "--json").json
    assert (again["files_before"], again["files_after"], again["duplicates"]) == (1, 1, 0)
    assert "1 files" in pipeline("compact", logged).out
    after = run(logged, teacher_dir, tmp_path / "after")
    assert losses(after) == losses(run(logged_cache, teacher_dir, tmp_path / "before"))
    assert summary(after)["teacher_forwards"] == 0


def test_a_compaction_of_nothing_is_an_error_that_says_why(bare_cache: Path, tmp_path: Path) -> None:
    refused("compact", bare_cache, says="no run has asked a live teacher about")
    refused("compact", bare_cache, "--lookups", tmp_path / "logs", says="does not exist")
    refused("compact", tmp_path / "none", says="is not a directory")


@pytest.mark.parametrize("dangling", [False, True], ids=["a file", "a dangling link"])
def test_what_stands_where_the_log_should_be_is_named(
    cache: Path, teacher_dir: Path, tmp_path: Path, dangling: bool
) -> None:
    place = cache / "lookups"
    if dangling:
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.write_text("in the way")
    what = "a link that leads nowhere" if dangling else "a file"
    says = f"{place} is {what}, not the directory of a lookup log"
    refused("compact", cache, says=says)
    assert says in pipeline("inspect", cache, "--json").json["lookups"]["error"]
    assert says in pipeline("inspect", cache).out
    (error,) = json.loads(pipeline("verify", cache, "--json").out)["errors"]
    assert error["file"] == "lookups"
    assert says in error["reason"]
    command = ["distill", "--cache", cache, "--student", teacher_dir, *RUN, "--teacher", teacher_dir, "--dry-run"]
    before = sorted(tmp_path.rglob("*"))
    refused(*command, out=tmp_path / "run", says="give --lookups DIR for another place, or --log none")
    for options in (["--log", "none"], ["--lookups", tmp_path / "a" / "b"], ["--loss", "t_ld"]):
        assert pipeline(*command, *options, "--out", tmp_path / "run").code == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bad_log_does_not_take_a_good_cache_with_it(logged: Path, teacher_dir: Path) -> None:
    command = ["evaluate", teacher_dir, "--cache", logged, "--json"]
    good = pipeline(*command)
    assert good.json["kl"] == pytest.approx(0, abs=1e-4)
    first(logged, "*/*.json").write_text("{")
    facts = pipeline("inspect", logged, "--json").json
    assert facts["num_sequences"] == NUM_SEQUENCES
    assert "000000.json" in facts["lookups"]["error"]
    assert "  lookup log  cannot be used: " in pipeline("inspect", logged).out
    assert pipeline("inspect", logged, "--stats", "--student", teacher_dir).code == 0
    bad = pipeline(*command)
    assert bad.json == {**good.json, "kl": None}
    assert "warning: no KL" in bad.err


def test_a_log_elsewhere_serves_evaluations(cache: Path, logged: Path, teacher_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(logged / "lookups", tmp_path / "logs" / CacheReader(logged).manifest_sha256[:16])
    command = ["evaluate", teacher_dir, "--cache", cache, "--json"]
    assert pipeline(*command).json["kl"] is None
    options = ["--lookups", tmp_path / "logs"]
    assert pipeline(*command, *options).json["kl"] == pytest.approx(0, abs=1e-4)
    run_dir = run(cache, teacher_dir, tmp_path / "run", *options, "--eval-cache", cache, "--steps", 1)
    assert summary(run_dir)["eval"]["kl"] > 0


def test_verify_goes_on_after_each_odd_thing_in_a_log(logged: Path) -> None:
    files = sorted(logged.glob("lookups/*/*.parquet"))
    files[0].unlink()
    files[0].mkdir()
    flip_bit(files[1], 1000)
    head = first(logged, "*.safetensors")
    head.unlink()
    head.mkdir()
    errors = json.loads(pipeline("verify", logged, "--json").out)["errors"]
    assert {error["file"].split("/")[-1] for error in errors} == {files[0].name, files[1].name, head.name}
    receipt = files[2].with_name("000002.json")
    receipt.unlink()
    receipt.mkdir()
    errors = json.loads(pipeline("verify", logged, "--json").out)["errors"]
    assert {error["file"].split("/")[-1] for error in errors} >= {receipt.name, files[1].name}


def test_a_full_disk_under_the_log_names_the_ways_out_and_they_work(
    cache: Path, teacher_dir: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise StorageError(f"{cache / 'lookups'} cannot be written: No space left on device.")

    with monkeypatch.context() as patched:
        patched.setattr("cache_schema.lookup_writer.write_log_file", full)
        result = distill(cache, teacher_dir, tmp_path / "run", "--teacher", teacher_dir)
    assert result.code == 1
    assert "No space left" in result.err
    assert "--resume and --lookups DIR" in result.err
    assert "--resume and --log none" in result.err
    assert "Traceback" not in result.err
    copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    for run_dir, options in ((tmp_path / "run", ["--lookups", tmp_path / "l"]), (copy, ["--log", "none"])):
        again = run(cache, teacher_dir, run_dir, "--teacher", teacher_dir, "--resume", *options)
        assert_same_training(again, whole_run)
