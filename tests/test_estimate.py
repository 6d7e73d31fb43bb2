"""``estimate`` says beforehand what a dump and a run then show: bytes, misses, mass, passes."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from cache_schema import CacheReader
from cache_schema.manifest import hidden_name, shard_name
from cache_schema.sequence import TokenSequence
from pipeline.estimate import smallest_k_worth_its_bytes
from pipeline.pilot import narrowed, padded_tokens
from tests.command_line import pipeline
from tests.conftest import dump, write_jsonl
from tests.dense import dense_mass_outside, dense_rows, missing_by_sequence
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_models import save_tiny_llama

TOP_KS = (8, 16, 32, 64, 128, 256)
ONE_SHARD = ["--set", "cache.sequences_per_shard=512"]
STEPS, LR = 6, 2e-3


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "student", tokenizer, seed=3)


@pytest.fixture(autouse=True)
def temporary_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary caches go: seen by the test that looks for what is left of them."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def command(teacher: Path, data: Path, *options: object) -> list[object]:
    return [
        "estimate", "--teacher", teacher, "--data", data, "--set", "data.max_tokens=128", "--pilot-sequences", 24,
        *options,
    ]  # fmt: skip


# ---- against the dump ----


@pytest.mark.parametrize("positions", ["response", "all"])
def test_bytes_are_those_of_the_dumps(teacher_dir: Path, data_file: Path, tmp_path: Path, positions: str) -> None:
    options = ["--positions", positions]
    facts = pipeline(*command(teacher_dir, data_file, "--set", "cache.top_k=32", *options, "--json")).json
    assert set(facts["bytes_per_position"]) == set(map(str, TOP_KS))
    for top_k in (8, 32, 256):
        cache = dump(teacher_dir, data_file, tmp_path / str(top_k), "--top-k", str(top_k), *ONE_SHARD, *options)
        seen = pipeline("inspect", cache, "--json").json
        for name in ("num_sequences", "num_tokens", "num_positions"):
            assert facts[name] == seen[name]
        assert facts["positions_are_exact"]
        # The pilot is the whole data here, so that nothing is extrapolated.
        assert round(facts["bytes_per_position"][str(top_k)], 2) == seen["bytes_per_position"]
        assert facts["scalar_bytes_per_position"] == pytest.approx(seen["scalar_bytes_per_position"], rel=0.01)
        assert facts["bytes"][str(top_k)] == pytest.approx((cache / shard_name(0)).stat().st_size, rel=0.01)
        assert facts["hidden_bytes"] == (cache / hidden_name(0)).stat().st_size
        assert facts["lm_head_bytes"] == (cache / "lm_head.safetensors").stat().st_size


def test_hidden_states_are_of_the_dtype_that_the_dump_keeps(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    int8 = ["--set", "cache.hidden_dtype=int8"]
    facts = pipeline(*command(teacher_dir, data_file, *int8, "--json")).json
    cache = dump(teacher_dir, data_file, tmp_path / "int8", *ONE_SHARD, *int8)
    assert facts["hidden_dtype"] == "int8"
    assert facts["hidden_bytes"] == (cache / hidden_name(0)).stat().st_size
    assert "rounding of int8" in facts["recommendation"]["reason"]


def test_leaving_hidden_states_out_changes_nothing_that_is_said(teacher_dir: Path, data_file: Path) -> None:
    kept, left_out = (
        pipeline(*command(teacher_dir, data_file, "--set", f"cache.hidden_states={choice}", "--json")).json
        for choice in ("true", "false")
    )
    for measured in (kept, left_out):
        del measured["seconds"], measured["teacher_seconds"], measured["break_even"]
    assert kept == left_out


def test_the_mass_outside_is_that_of_whole_rows(teacher_dir: Path, data_file: Path, cache_dir: Path) -> None:
    facts = pipeline(*command(teacher_dir, data_file, "--set", "cache.temperatures=[3.0]", "--json")).json
    rows = dense_rows(teacher_dir, [scored.sequence for scored in CacheReader(cache_dir)])
    assert facts["mass_outside"] == pytest.approx(dense_mass_outside(rows, TOP_KS), rel=1 / 64)


def test_rows_are_narrowed_to_those_of_a_dump_of_fewer_ids(
    teacher_dir: Path, data_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    wide, narrow = (
        CacheReader(dump(teacher_dir, data_file, tmp_path / "wide", "--top-k", "256")),
        CacheReader(cache_dir),
    )
    assert narrow.plan.temperatures == (1.0, 3.0)
    for stored in narrow:
        scored = wide[wide.index_of(stored.sequence.sequence_id)]
        rows = narrowed(scored, 16, (3.0, 1.0), wide.plan.temperatures).rows
        np.testing.assert_array_equal(rows.token_ids, stored.rows.token_ids)
        np.testing.assert_array_equal(rows.logits, stored.rows.logits)
        np.testing.assert_allclose(rows.tail_logsumexp[:, ::-1], stored.rows.tail_logsumexp, atol=1 / 128)


def test_a_small_vocabulary_ends_the_list_of_ks(data_file: Path, tmp_path: Path) -> None:
    teacher = save_tiny_llama(tmp_path / "teacher", tiny_tokenizer(vocab_size=259))
    facts = pipeline(*command(teacher, data_file, "--set", "cache.top_k=259", "--json")).json
    assert facts["vocab_size"] == 259
    assert [int(top_k) for top_k in facts["bytes"]] == [*TOP_KS, 259]
    assert facts["mass_outside"]["259"] == 0.0


def test_what_the_teacher_is_still_to_write_is_extrapolated(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": json.loads(line)["prompt"]} for line in data_file.read_text().splitlines()]
    data = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    respond = ["--responses", "teacher", "--set", "responses.max_new_tokens=6"]
    facts = pipeline(*command(teacher_dir, data, *respond, "--json")).json
    seen = pipeline("inspect", dump(teacher_dir, data, tmp_path / "cache", *ONE_SHARD, *respond), "--json").json
    assert not facts["positions_are_exact"]
    assert facts["seconds"]["generation"] > 0
    assert (facts["num_positions"], facts["num_tokens"]) == (seen["num_positions"], seen["num_tokens"])
    fewer = pipeline(*command(teacher_dir, data, *respond, "--pilot-sequences", 4, "--json")).json
    assert fewer["pilot"]["sequences"] == 4
    assert fewer["num_positions"] == fewer["pilot"]["positions"] * 6


# ---- against whole rows ----


@pytest.fixture(scope="module")
def with_student(teacher_dir: Path, data_file: Path, student_dir: Path) -> dict:
    options = ["--student", student_dir, "--pilot-steps", STEPS, "--pilot-lr", LR, "--epochs", 8, "--students", 3]
    return pipeline(*command(teacher_dir, data_file, *options, "--json")).json


def test_misses_before_and_after_are_those_of_whole_rows(
    with_student: dict, teacher_dir: Path, student_dir: Path, data_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """The trained student is made again by ``distill``, from a dump of the sequences that are not held out."""
    lines = data_file.read_text().splitlines()
    trained = write_jsonl(tmp_path / "trained.jsonl", [json.loads(x) for n, x in enumerate(lines) if n % 4 != 3])
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [json.loads(x) for n, x in enumerate(lines) if n % 4 == 3])
    run = pipeline(
        "distill", "--cache", dump(teacher_dir, trained, tmp_path / "trained", "--top-k", "256", *ONE_SHARD),
        "--student", student_dir, "--steps", STEPS, "--set", f"optimizer.lr={LR}", "--set", "sequences_per_step=4",
        "--out", tmp_path / "run", "--json",
    ).json  # fmt: skip
    reader = CacheReader(dump(teacher_dir, held_out, tmp_path / "held-out"))
    sequences = [scored.sequence for scored in reader]
    teacher = dense_rows(teacher_dir, sequences)
    misses = with_student["misses"]
    assert (misses["k"], misses["steps"], misses["lr"]) == (8, STEPS, LR)
    assert with_student["pilot"]["held_out_sequences"] == len(sequences) == 6
    for when, model in (("before", student_dir), ("after", Path(run["model"]))):
        student = dense_rows(model, sequences)
        assert misses[when]["pairs"] == 8 * sum(map(len, teacher))
        for top_k in TOP_KS:
            missing = missing_by_sequence(student, teacher, 8, top_k)
            assert misses[when]["share_of_pairs"][str(top_k)] == sum(missing) / misses[when]["pairs"]
            assert misses[when]["share_of_sequences"][str(top_k)] == sum(map(bool, missing)) / 6
    assert misses["after"] != misses["before"]


def test_of_every_pilot_a_part_is_held_out(teacher_dir: Path, data_file: Path, student_dir: Path) -> None:
    for pilot_sequences, held_out in ((2, 1), (3, 1), (4, 1), (8, 2)):
        options = ["--student", student_dir, "--pilot-steps", 1, "--pilot-sequences", pilot_sequences, "--json"]
        pilot = pipeline(*command(teacher_dir, data_file, *options)).json["pilot"]
        assert (pilot["sequences"], pilot["held_out_sequences"]) == (pilot_sequences, held_out)


# ---- passes ----


def test_passes_and_break_even(with_student: dict) -> None:
    assert with_student["passes"] == {"live": 24, "hidden_states": 1, "no_hidden_states": 2}
    one, spent = with_student["seconds"]["teacher_pass"], with_student["teacher_seconds"]
    assert with_student["seconds"]["dump"] > one > 0
    assert spent["live"] == pytest.approx(24 * one)
    assert spent["no_hidden_states"] == pytest.approx(spent["hidden_states"] + one)
    even = with_student["break_even"]
    assert (even["hidden_states"]["passes"], even["no_hidden_states"]["passes"]) == (2, 3)
    for way in ("hidden_states", "no_hidden_states"):
        first = even[way]["seconds"]
        assert (first - 1) * one <= spent[way] < first * one


def test_padding_counts_as_read() -> None:
    sequences = [TokenSequence(np.arange(n, dtype=np.int32), np.arange(n) > 0, "") for n in (3, 10, 5, 9)]
    assert padded_tokens(sequences, tokens_per_batch=20) == 2 * 10 + 2 * 5
    assert padded_tokens(sequences, tokens_per_batch=10) == 10 + 9 + 2 * 5


def test_k_grows_while_it_spares_more_bytes_than_it_adds() -> None:
    sizes = {"8": 20.0, "16": 40.0, "32": 80.0, "64": 160.0}
    asking = {"8": 1.0, "16": 0.9, "32": 0.5, "64": 0.48}
    assert smallest_k_worth_its_bytes(sizes, 1000.0, asking, 8) == 32  # saves 100, 400, then 20 for 80
    assert smallest_k_worth_its_bytes(sizes, 150.0, asking, 8) == 8
    assert smallest_k_worth_its_bytes(sizes, 150.0, asking, 16) == 32
    assert smallest_k_worth_its_bytes(sizes, 150.0, dict.fromkeys(sizes, 1.0), 16) == 16


# ---- words, refusals, leftovers ----


def test_words_say_what_json_says(with_student: dict, teacher_dir: Path, data_file: Path, student_dir: Path) -> None:
    options = ["--student", student_dir, "--pilot-steps", STEPS, "--pilot-lr", LR]
    words = pipeline(*command(teacher_dir, data_file, *options)).out
    misses = with_student["misses"]
    for top_k in TOP_KS:
        row = next(line.split() for line in words.splitlines() if line.split()[:1] == [str(top_k)])
        assert row[1] == f"{with_student['bytes_per_position'][str(top_k)]:.1f}"
        shares = (misses["before"]["share_of_pairs"], misses["after"]["share_of_pairs"])
        assert row[-3:-1] == [f"{share[str(top_k)]:.2%}" for share in shares]
    assert with_student["recommendation"]["reason"] in " ".join(words.split())
    assert f"{with_student['num_positions']:,} positions (counted)" in words
    without = pipeline(*command(teacher_dir, data_file)).out
    assert "Give --student" in without
    assert "missed" not in without


def test_nothing_is_left_of_it_and_what_cannot_be_is_one_error(
    teacher_dir: Path, data_file: Path, student_dir: Path, tmp_path: Path, temporary_dir: Path
) -> None:
    foreign = save_tiny_llama(tmp_path / "foreign", tiny_tokenizer(corpus=("other words",)))
    one_row = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "Who?", "response": "The teacher."}])
    assert pipeline(*command(teacher_dir, data_file, "--student", student_dir, "--pilot-steps", 1)).code == 0
    assert list(temporary_dir.iterdir()) == []
    for data, options, said in (
        (data_file, ["--student", foreign], "token id"),
        (data_file, ["--student", student_dir, "--student-layers", "0,9"], "from 0 to 3"),
        (data_file, ["--student", student_dir, "--pilot-sequences", 1], "--pilot-sequences 2"),
        (one_row, ["--student", student_dir], "--pilot-sequences 2"),
        (data_file, ["--set", "cache.top_k=999"], "vocabulary of 384"),
        (tmp_path / "none.jsonl", [], "none.jsonl"),
    ):
        result = pipeline(*command(teacher_dir, data, *options))
        assert (result.code, result.out) == (1, ""), said
        assert result.err.startswith("error: ")
        assert said in result.err
        assert list(temporary_dir.iterdir()) == []
    for options in (["--student-layers", "0"], ["--epochs", 0], ["--pilot-sequences", 0]):
        assert pipeline(*command(teacher_dir, data_file, *options)).code == 2
