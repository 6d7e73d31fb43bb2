"""``inspect --stats`` counts what its words say, on real models, against whole rows and Python sets."""

import shutil
from pathlib import Path

import pytest

from cache_schema import CacheReader
from cache_schema.manifest import shard_name
from tests.command_line import pipeline
from tests.conftest import dump
from tests.dense import dense_mass_outside, dense_rows, missing_by_sequence
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_models import save_tiny_llama

STORED_KS, ALL_KS = (8, 16), (8, 16, 32, 64, 128, 256)
ROUNDING = 1 / 64
"""Stored logits are within half a step of 1/64, so a probability made of them is within this share of the truth."""


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "student", tokenizer, seed=3)


@pytest.fixture(scope="module")
def bare_dir(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "bare", "--no-hidden-states")


def stats(cache: Path, *options: object) -> dict:
    return pipeline("inspect", cache, "--stats", *options, "--json").json["stats"]


def test_misses_are_those_of_whole_rows_within_the_stored_k_and_beyond(
    cache_dir: Path, teacher_dir: Path, student_dir: Path
) -> None:
    found = stats(cache_dir, "--student", student_dir)["misses"]
    sequences = [scored.sequence for scored in CacheReader(cache_dir)]
    student, teacher = (dense_rows(folder, sequences) for folder in (student_dir, teacher_dir))
    assert (found["k"], found["pairs"]) == (8, 8 * sum(map(len, teacher)))
    assert set(found["share_of_pairs"]) == set(map(str, ALL_KS))
    for top_k in ALL_KS:
        missing = missing_by_sequence(student, teacher, 8, top_k)
        assert found["share_of_pairs"][str(top_k)] == sum(missing) / found["pairs"]
        assert found["share_of_sequences"][str(top_k)] == sum(map(bool, missing)) / len(sequences)
    assert 0 < found["share_of_pairs"]["256"] < found["share_of_pairs"]["8"] < 1


def test_the_mass_outside_is_that_of_whole_rows(cache_dir: Path, bare_dir: Path, teacher_dir: Path) -> None:
    expected = dense_mass_outside(dense_rows(teacher_dir, [s.sequence for s in CacheReader(cache_dir)]), STORED_KS)
    assert 0.05 < expected["16"] < expected["8"]
    for cache in (cache_dir, bare_dir):
        assert stats(cache)["mass_outside"] == pytest.approx(expected, rel=ROUNDING)


def test_layers_make_another_student(cache_dir: Path, teacher_dir: Path) -> None:
    whole, cut = (
        stats(cache_dir, "--student", teacher_dir, *layers)["misses"]["share_of_pairs"]
        for layers in ([], ["--student-layers", "0,2"])
    )
    assert set(whole.values()) == {0.0}  # the teacher never leaves its own top 8
    assert cut["8"] > 0


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "live"])
def test_an_epoch_asks_what_a_run_of_one_epoch_then_asks(
    hidden: bool, cache_dir: Path, bare_dir: Path, teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    cache, tier = (cache_dir, "hidden") if hidden else (bare_dir, "live")
    epoch = stats(cache, "--student", student_dir)["one_epoch"]
    run = pipeline(
        "distill", "--cache", cache, "--student", student_dir, "--teacher", teacher_dir, "--epochs", 1,
        "--dtype", "float32", "--set", "optimizer.lr=1e-30", "--lookups", tmp_path / "log", "--out", tmp_path / "run",
        "--json",
    ).json  # fmt: skip
    # A student that does not move asks in a whole run what it asks at the start.
    asked = {name: pairs for name, pairs in run["lookups"].items() if pairs}
    assert epoch["lookups"] == {"cached": asked["cached"], tier: asked[tier]}
    assert epoch["teacher_forwards"] == (0 if hidden else len(CacheReader(cache)))
    if hidden:
        assert run["teacher_forwards"] == 0


def test_what_a_log_of_answers_spares_is_said_to_be_unknown(
    bare_dir: Path, teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert stats(bare_dir, "--student", student_dir, "--lookups", log)["one_epoch"]["at_most"] is False
    run = pipeline(
        "distill", "--cache", bare_dir, "--student", student_dir, "--teacher", teacher_dir, "--steps", 1,
        "--lookups", log, "--log", "logits", "--out", tmp_path / "run",
    )  # fmt: skip
    assert run.code == 0, run.err
    options = ["--student", student_dir, "--lookups", log]
    epoch = stats(bare_dir, *options)["one_epoch"]
    assert (epoch["at_most"], set(epoch["lookups"])) == (True, {"cached", "live"})
    assert "teacher forwards are upper limits" in pipeline("inspect", bare_dir, "--stats", *options).out
    every = ["--teacher", teacher_dir, "--epochs", 1, "--out", tmp_path / "every", "--lookups", tmp_path / "whole"]
    assert pipeline("distill", "--cache", bare_dir, "--student", student_dir, *every).code == 0
    epoch = stats(bare_dir, "--student", student_dir, "--lookups", tmp_path / "whole")["one_epoch"]
    assert (epoch["at_most"], epoch["teacher_forwards"], set(epoch["lookups"])) == (False, 0, {"cached", "logged"})


def test_without_hidden_states_nothing_beyond_the_stored_k_is_said(bare_dir: Path, student_dir: Path) -> None:
    found = stats(bare_dir, "--student", student_dir)
    assert set(found["misses"]["share_of_pairs"]) == set(map(str, STORED_KS))
    assert "hidden_states" not in found["columns"]


def test_of_all_positions_those_that_are_trained_count(
    cache_dir: Path, teacher_dir: Path, data_file: Path, student_dir: Path, tmp_path: Path
) -> None:
    everything = dump(teacher_dir, data_file, tmp_path / "all", "--positions", "all")
    there, here = (stats(cache, "--student", student_dir) for cache in (cache_dir, everything))
    assert here["misses"]["share_of_pairs"] == there["misses"]["share_of_pairs"]
    assert here["one_epoch"] == there["one_epoch"]


def test_a_sample_is_spread_from_the_first_to_the_last(cache_dir: Path, teacher_dir: Path, student_dir: Path) -> None:
    found = stats(cache_dir, "--student", student_dir, "--sample", 3)
    assert found["sample"] == {"sequences": 3, "indexes": [0, 11, 23]}
    reader = CacheReader(cache_dir)
    sequences = [reader[index].sequence for index in (0, 11, 23)]
    student, teacher = (dense_rows(folder, sequences) for folder in (student_dir, teacher_dir))
    missing = missing_by_sequence(student, teacher, 8, 16)
    assert found["misses"]["share_of_pairs"]["16"] == sum(missing) / (8 * sum(map(len, teacher)))
    assert found["mass_outside"] == pytest.approx(dense_mass_outside(teacher, STORED_KS), rel=ROUNDING)
    # An epoch is that of the whole cache, by the sample's shares.
    assert sum(found["one_epoch"]["lookups"].values()) == 8 * reader.manifest.num_positions
    assert stats(cache_dir, "--sample", 1)["sample"]["indexes"] == [0]


def test_columns_take_the_bytes_of_the_receipts(cache_dir: Path) -> None:
    columns, manifest = stats(cache_dir)["columns"], CacheReader(cache_dir).manifest
    logits = columns["token_ids"] + columns["top_logit_steps"] + columns["logit_drops"]
    assert logits == sum(receipt.logits_bytes for receipt in manifest.receipts)
    scalars = sum(columns[name] for name in ("tail_logsumexp", "label_logit", "row_mean", "row_std"))
    assert scalars == sum(receipt.scalar_bytes for receipt in manifest.receipts)
    assert columns["hidden_states"] >= manifest.num_positions * 32 * 4
    files = [file for receipt in manifest.receipts for file in receipt.files]
    assert sum(columns.values()) < sum(file.num_bytes for file in files)


def test_words_say_every_number(cache_dir: Path, student_dir: Path) -> None:
    found = stats(cache_dir, "--student", student_dir, "--sample", 5)
    words = pipeline("inspect", cache_dir, "--stats", "--student", student_dir, "--sample", 5).out
    shares = [found["mass_outside"], found["misses"]["share_of_pairs"], found["misses"]["share_of_sequences"]]
    for top_k in ALL_KS:
        row = next(line.split() for line in words.splitlines() if line.split()[:1] == [str(top_k)])
        assert row[1:] == [f"{share[str(top_k)]:.2%}" for share in shares if str(top_k) in share]
    assert "5 of 24 sequences" in words
    assert f"hidden {found['one_epoch']['lookups']['hidden']:,}" in words
    assert set(found["columns"]) <= set(words.split())


def test_without_a_tail_at_temperature_1_the_mass_is_unknown(
    teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    cache = dump(teacher_dir, data_file, tmp_path / "hot", "--set", "cache.temperatures=[3.0]", "--limit", "3")
    assert stats(cache)["mass_outside"] is None
    assert "unknown" in pipeline("inspect", cache, "--stats").out


# ---- what is refused ----


@pytest.mark.parametrize(
    "options",
    [
        ["--student", "s"],
        ["--stats", "--student-layers", "0"],
        ["--stats", "--sequence", "0"],
        ["--stats", "--sample", "0"],
    ],
    ids=["student alone", "layers alone", "sequence too", "no sample"],
)
def test_options_that_mean_nothing_together_are_wrong_usage(cache_dir: Path, options: list[str]) -> None:
    result = pipeline("inspect", cache_dir, *options)
    assert (result.code, result.out) == (2, "")


def test_a_student_or_cache_that_does_not_fit_is_one_error(cache_dir: Path, student_dir: Path, tmp_path: Path) -> None:
    foreign = save_tiny_llama(tmp_path / "foreign", tiny_tokenizer(corpus=("other words",)))
    short = save_tiny_llama(tmp_path / "short", tiny_tokenizer(chat_template=CHATML), max_position_embeddings=16)
    shutil.copytree(cache_dir, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "manifest.json").unlink()
    shutil.copytree(cache_dir, tmp_path / "damaged")
    shard = tmp_path / "damaged" / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-8] + b"\xff" * 8)
    for cache, options, said in (
        (cache_dir, ["--student", foreign], "token id"),
        (cache_dir, ["--student", short], "reads 16 tokens"),
        (cache_dir, ["--student", student_dir, "--student-layers", "0,9"], "from 0 to 3"),
        (cache_dir, ["--student", tmp_path / "none"], "neither a folder nor a model the hub gives"),
        (tmp_path / "unfinished", [], "has not finished"),
        (tmp_path / "damaged", [], f"{shard_name(1)} is damaged"),
    ):
        result = pipeline("inspect", cache, "--stats", *options)
        assert (result.code, result.out) == (1, ""), said
        assert result.err.startswith("error: ")
        assert said in result.err
