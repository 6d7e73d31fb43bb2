"""A cache of draws: they follow the teacher's softmax, depend on nothing else, and come back as they were stored."""

import json
import shutil
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cache_schema import (
    CacheMismatchError,
    CacheReader,
    SampledRows,
    Sampling,
    ScoredSequence,
    TokenSequence,
    verify,
)
from cache_schema.encoding import DRAW_COLUMNS, shard_schema
from cache_schema.lookup_files import LoggedLogits
from cache_schema.lookup_writer import LookupWriter
from cache_schema.plan import Plan
from cache_schema.remote import local_copy
from tests.caches import (
    content,
    make_plan,
    make_scored,
    make_scoreds,
    write_cache,
)
from tests.command_line import pipeline
from tests.conftest import write_jsonl
from tests.dense import dense_rows
from tests.test_docs import code, section, table
from tests.test_kill import differences, kill_when
from tests.tiny import tiny_tokenizer
from tests.tiny_cache import load_teacher, random_sequences
from tests.tiny_models import save_tiny_llama
from workers.teacher.lm_head import LMHead
from workers.teacher.sampling import counted, draw, inverse_cdf, uniforms

PLAN = make_plan(sampling=Sampling(draws=50, seed=7), num_sequences=40, sequences_per_shard=20)
OPTIONS = ("--sampling", "random", "--set", "data.max_tokens=128", "--set", "cache.sequences_per_shard=8")


def teacher_dump(teacher_dir: Path, data_file: Path, out: Path, *options: object):
    return pipeline("teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--out", out, *OPTIONS, *options)


def dump_draws(teacher_dir: Path, data_file: Path, out: Path, *options: object) -> Path:
    result = teacher_dump(teacher_dir, data_file, out, *options)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="module")
def sampled_dir(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of 50 draws with hidden states, of three shards. Tests read it and never change it."""
    return dump_draws(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "sampled")


@pytest.fixture
def sampled_copy(sampled_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sampled_dir, tmp_path / "copy")


@pytest.fixture(scope="module")
def bare_dir(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump_draws(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "bare", "--no-hidden-states")


def draws_by_sequence(cache_dir: Path) -> dict[bytes, list[Counter]]:
    """How often each id was drawn at each position."""
    return {
        scored.sequence.sequence_id: [
            Counter({token: count for token, count in zip(ids, counts, strict=True) if count})
            for ids, counts in zip(scored.rows.token_ids.tolist(), scored.rows.counts.tolist(), strict=True)
        ]
        for scored in CacheReader(cache_dir)
    }


# ---- what is drawn ----


def test_draws_follow_the_softmax(teacher_dir: Path) -> None:
    """The mean of count / draws over many seeds is the probability, for each id of some real rows."""
    plan = make_plan(vocab_size=384, hidden_dtype="float32")
    teacher = load_teacher(teacher_dir, plan.model_copy(update={"teacher": plan.teacher}))
    sequence = random_sequences()[3]
    hidden_PD = teacher.hidden_states([sequence], "response")[0]
    num_seeds, draws = 2000, 50
    drawn = []
    for seed in range(num_seeds):
        seeded = plan.model_copy(update={"sampling": Sampling(draws=draws, seed=seed)})
        numbers_PS = torch.from_numpy(uniforms(sequence, seeded))
        drawn.append(draw(teacher.lm_head, hidden_PD, numbers_PS).numpy())
    number = num_seeds * draws
    expected = teacher.lm_head.logits(hidden_PD).detach().double().softmax(1).numpy()
    found = np.stack([np.bincount(row, minlength=384) for row in np.concatenate(drawn, axis=1)]) / number
    # Bernstein's bound on a mean of so many draws: of these ids, one in some ten thousand tests lies outside.
    log_odds = np.log(2 * expected.size * 1e4)
    bound = np.sqrt(2 * expected * (1 - expected) * log_odds / number) + log_odds / (3 * number)
    assert (np.abs(found - expected) <= bound).all()
    # The bound is narrow enough to tell another temperature.
    other = (teacher.lm_head.logits(hidden_PD).detach().double() / 1.05).softmax(1).numpy()
    assert (np.abs(found - other) > bound).any()


def test_a_draw_is_where_the_cumulative_sum_passes_its_number() -> None:
    rng = np.random.default_rng(0)
    logits, numbers = (4 * rng.standard_normal((40, 101))).astype(np.float32), rng.random((40, 30))
    found = inverse_cdf(torch.from_numpy(logits), torch.from_numpy(numbers))
    assert found.dtype == torch.int32
    for row, wanted, ids in zip(logits.astype(np.float64), numbers, found.tolist(), strict=True):
        sums = list(accumulate(np.exp(row - row.max()).tolist()))
        assert ids == [bisect_right(sums, number * sums[-1]) for number in wanted]


def test_a_number_on_a_border_draws_the_id_after_it() -> None:
    logits, numbers = torch.zeros(1, 4), torch.tensor([[0.0, 0.25, 0.5, 0.75]], dtype=torch.float64)
    assert inverse_cdf(logits, numbers).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("below", [-np.inf, -1e4, -200.0])
@pytest.mark.parametrize("vocab_size", [3, 1000])
def test_no_id_without_probability_is_drawn_even_at_the_ends(below: float, vocab_size: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((500, vocab_size)).astype(np.float32)
    impossible = rng.random(logits.shape) < 0.5
    impossible[:, [0, -1]], impossible[:, 1] = True, False
    logits[impossible] = below
    ends = np.array([0.0, 5e-324, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0])
    ids = inverse_cdf(torch.from_numpy(logits), torch.from_numpy(np.tile(ends, (500, 1)))).numpy()
    assert ids.min() >= 0
    assert ids.max() < vocab_size
    assert not np.take_along_axis(impossible, ids, axis=1).any()


def test_padding_rows_of_the_head_are_never_drawn(data_file: Path, tmp_path: Path) -> None:
    teacher = save_tiny_llama(tmp_path / "teacher", tiny_tokenizer(), vocab_size=448, tie_word_embeddings=False)
    weights = load_file(teacher / "model.safetensors")
    with torch.no_grad():  # every state is near one of them
        weights["lm_head.weight"][384:] *= 100
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    reader = CacheReader(dump_draws(teacher, data_file, tmp_path / "cache", "--limit", 4))
    assert reader.plan.tokenizer.vocab_size == 384
    assert max(scored.rows.token_ids.max() for scored in reader) < 384
    assert pipeline("verify", tmp_path / "cache").code == 0


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda draws: st.lists(st.lists(st.integers(0, 5), min_size=draws, max_size=draws), min_size=1, max_size=5)
    )
)
def test_ids_are_counted_and_ordered_by_count_then_id(drawn: list[list[int]]) -> None:
    rows = counted(np.array(drawn, np.int32))
    assert (rows.token_ids.dtype, rows.counts.dtype) == (np.int32, np.int32)
    assert rows.token_ids.shape == rows.counts.shape == (len(drawn), max(len(set(ids)) for ids in drawn))
    for ids, found, counts in zip(drawn, rows.token_ids.tolist(), rows.counts.tolist(), strict=True):
        wanted = sorted(Counter(ids).items(), key=lambda pair: (-pair[1], pair[0]))
        wanted += [(0, 0)] * (len(found) - len(wanted))
        assert list(zip(found, counts, strict=True)) == wanted


# ---- what decides a draw ----


def test_the_numbers_of_a_row_are_those_of_seed_sequence_and_target_row() -> None:
    sequence = TokenSequence(np.array([1, 2, 3, 4], np.int32), np.array([False, False, True, True]), "rows")

    def numbers(seed=0, draws=3, positions="all", of=sequence):
        return uniforms(of, make_plan(sampling=Sampling(draws=draws, seed=seed), positions=positions))

    assert numbers().shape == (3, 3)
    assert numbers().dtype == np.float64
    # Pinned: another number is another cache, whatever NumPy, platform or release made it.
    assert numbers(seed=5)[1].tolist() == [0.6436049243700053, 0.4764816727883363, 0.2831399869370006]
    np.testing.assert_array_equal(numbers(positions="response"), numbers()[1:])
    other = TokenSequence(sequence.input_ids + 1, sequence.loss_mask, "rows")
    for different in (numbers(seed=1), numbers(seed=2**63 - 1), numbers(of=other)):
        assert not np.isin(different, numbers()).any()


def test_a_row_is_drawn_from_alike_alone_and_among_others() -> None:
    rng = np.random.default_rng(1)
    logits_CV = torch.from_numpy((6 * rng.standard_normal((64, 997))).astype(np.float32))
    numbers_CS = torch.from_numpy(rng.random((64, 50)))
    together = inverse_cdf(logits_CV, numbers_CS)
    for row in range(64):
        assert torch.equal(inverse_cdf(logits_CV[row : row + 1], numbers_CS[row : row + 1])[0], together[row])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_change_memory_not_the_draws(teacher_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    rng = np.random.default_rng(2)
    head = LMHead(torch.from_numpy(rng.standard_normal((101, 16)).astype(np.float32)).to(getattr(torch, dtype)))
    hidden_ND = torch.from_numpy(rng.standard_normal((40, 16)).astype(np.float32)).to(getattr(torch, dtype))
    numbers_NS = torch.from_numpy(rng.random((40, 20)))
    whole = draw(head, hidden_ND, numbers_NS)
    assert torch.equal(whole, inverse_cdf(head.logits(hidden_ND), numbers_NS))
    monkeypatch.setattr("workers.teacher.lm_head.CHUNK_BYTES", 8 * 101 * 7)
    assert torch.equal(draw(head, hidden_ND, numbers_NS), whole)


@pytest.mark.parametrize("setting", ["engine.tokens_per_batch=64", "cache.sequences_per_shard=5"])
def test_other_batches_and_shards_draw_the_same(
    bare_dir: Path, teacher_dir: Path, data_file: Path, tmp_path: Path, setting: str
) -> None:
    """But where a number lies between two ids, and another batch rounds the row's logits otherwise."""
    other = dump_draws(teacher_dir, data_file, tmp_path / "other", "--no-hidden-states", "--set", setting)
    here, there = draws_by_sequence(bare_dir), draws_by_sequence(other)
    assert here.keys() == there.keys()
    pairs = [pair for sequence_id in here for pair in zip(here[sequence_id], there[sequence_id], strict=True)]
    assert len(pairs) > 500
    assert sum((left - right).total() for left, right in pairs) < 50 * len(pairs) / 1000


def test_hidden_states_beside_them_change_no_draw(sampled_dir: Path, bare_dir: Path) -> None:
    assert draws_by_sequence(sampled_dir) == draws_by_sequence(bare_dir)
    assert CacheReader(sampled_dir).has_hidden_states
    assert not CacheReader(bare_dir).has_hidden_states


def test_the_draws_of_responses_are_among_those_of_all_positions(
    bare_dir: Path, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    options = ("--no-hidden-states", "--positions", "all")
    whole = draws_by_sequence(dump_draws(teacher_dir, data_file, tmp_path / "all", *options))
    for scored in CacheReader(bare_dir):
        sequence = scored.sequence
        kept = [whole[sequence.sequence_id][row] for row in sequence.target_rows("response")]
        assert kept == draws_by_sequence(bare_dir)[sequence.sequence_id]


def test_another_seed_draws_other_ids(bare_dir: Path, teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    options = ("--no-hidden-states", "--set", "cache.sample_seed=1")
    other = dump_draws(teacher_dir, data_file, tmp_path / "seed", *options)
    assert CacheReader(other).plan.sampling == Sampling(draws=50, seed=1)
    here, there = draws_by_sequence(bare_dir), draws_by_sequence(other)
    assert here.keys() == there.keys()
    assert all(here[sequence_id] != there[sequence_id] for sequence_id in here)


def test_a_cache_s_draws_are_those_of_whole_rows(bare_dir: Path, teacher_dir: Path) -> None:
    reader = CacheReader(bare_dir)
    stored = draws_by_sequence(bare_dir)
    differing = number = 0
    for scored, rows_PV in zip(reader, dense_rows(teacher_dir, [s.sequence for s in reader]), strict=True):
        sums_PV = rows_PV.double().softmax(1).cumsum(1).tolist()
        numbers_PS = uniforms(scored.sequence, reader.plan)
        for sums, numbers, found in zip(sums_PV, numbers_PS, stored[scored.sequence.sequence_id], strict=True):
            wanted = Counter(bisect_right(sums, value) for value in numbers)
            differing, number = differing + (wanted - found).total(), number + 50
            assert found.total() == 50
    # A number between two ids falls to the other where a logit is rounded otherwise: about one in ten thousand.
    assert number > 10_000
    assert differing < number / 1000


def test_a_killed_dump_of_draws_ends_with_the_same_bytes(teacher_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Number {number}? ", "response": "one two three " * (1 + number % 7)} for number in range(120)]
    data = write_jsonl(tmp_path / "many.jsonl", rows)
    command = [
        "teacher-dump", "--teacher", str(teacher_dir), "--data", str(data), "--sampling", "random", "--draws", "20",
        "--set", "cache.sequences_per_shard=1", "--out",
    ]  # fmt: skip
    killed = tmp_path / "killed"
    kill_when([*command, str(killed)], lambda: len(list(killed.glob("shard-*.json"))) >= 3)
    assert not (killed / "manifest.json").exists()
    facts = pipeline("inspect", killed, "--json").json
    assert (facts["complete"], facts["sampling"]) == (False, {"draws": 20, "seed": 0})
    again = pipeline(*command, killed, "--json").json
    assert 0 < again["scored_sequences"] < 120
    assert pipeline(*command, tmp_path / "undisturbed").code == 0
    assert differences(killed, tmp_path / "undisturbed") == []
    assert pipeline("verify", killed).code == 0


# ---- what is stored ----


@st.composite
def plans(draw_from):
    return make_plan(
        vocab_size=draw_from(st.integers(2, 40)),
        sampling=Sampling(draws=draw_from(st.sampled_from([1, 2, 50, 65_535])), seed=draw_from(st.integers(0, 9))),
        hidden_dtype=draw_from(st.sampled_from(["float32", "bfloat16", None])),
        positions=draw_from(st.sampled_from(["response", "all"])),
        num_sequences=draw_from(st.integers(1, 40)),
        sequences_per_shard=draw_from(st.integers(1, 40)),
    )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(), lengths=st.lists(st.sampled_from([2, 3, 9, 40]), min_size=1), seed=st.integers(0, 2**32 - 1))
def test_draws_that_are_written_are_read_back_in_any_order(tmp_path_factory, plan, lengths, seed) -> None:
    rng = np.random.default_rng(seed)
    written = [make_scored(plan, rng, lengths[index % len(lengths)]) for index in range(plan.num_sequences)]
    folder = write_cache(tmp_path_factory.mktemp("caches") / "cache", plan, written)
    reader = CacheReader(folder)
    assert verify(folder).ok
    for index in rng.permutation(len(written)).tolist():
        read = reader[index]
        assert read.sequence.sequence_id == written[index].sequence.sequence_id
        for name in ("token_ids", "counts"):
            got, expected = getattr(read.sampled_rows, name), getattr(written[index].rows, name)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, expected)
        assert read.rows.num_positions == written[index].rows.num_positions
        if plan.hidden_states:
            assert reader.hidden_states(index).tobytes() == written[index].hidden_states.tobytes()


def test_a_shard_holds_ids_and_counts_without_padding_and_nothing_else_of_a_row(sampled_dir: Path) -> None:
    table = pq.read_table(sampled_dir / "shard-00001.parquet")
    assert table.column_names == ["sequence_id", "source", "input_ids", "loss_mask", *DRAW_COLUMNS]
    assert table.schema.equals(shard_schema(CacheReader(sampled_dir).plan))
    assert [str(table.schema.field(name).type.value_type) for name in DRAW_COLUMNS] == ["uint16", "int32", "uint16"]
    stored = CacheReader(sampled_dir)[8 : 8 + len(table)]
    for row, scored in zip(table.to_pylist(), stored, strict=True):
        drawn = scored.rows.counts > 0
        assert row["num_ids"] == drawn.sum(1).tolist()
        assert row["token_ids"] == scored.rows.token_ids[drawn].tolist()
        assert row["counts"] == scored.rows.counts[drawn].tolist()
        assert len(set(row["num_ids"])) > 1


def test_rows_of_the_other_kind_are_refused_by_name() -> None:
    drawn, top_k = make_scoreds(PLAN)[0], make_scoreds(make_plan())[0]
    assert drawn.sampled_rows is drawn.rows
    assert top_k.top_k_rows is top_k.rows
    with pytest.raises(CacheMismatchError, match=f"{drawn.sequence.sequence_id.hex()}.*stores draws.*--sampling top-k"):
        _ = drawn.top_k_rows
    with pytest.raises(CacheMismatchError, match=r"stores a top-k and no draws: .* --sampling random"):
        _ = top_k.sampled_rows


# ---- the commands ----


def test_inspect_says_what_is_drawn(sampled_dir: Path, bare_dir: Path) -> None:
    facts = pipeline("inspect", sampled_dir, "--json").json
    assert facts["sampling"] == {"draws": 50, "seed": 0}
    assert (facts["complete"], facts["top_k"], facts["temperatures"]) == (True, 0, [])
    assert (facts["max_logit_error"], facts["scalar_bytes_per_position"]) == (None, 0)
    assert facts["hidden_states"]
    assert facts["bytes_per_position"] > 0
    words = pipeline("inspect", sampled_dir).out
    assert "50 draws from each softmax, seed 0, hidden states: yes, float32" in words
    assert f"{facts['bytes_per_position']} B ids and counts, " in words
    assert "hidden states: no" in pipeline("inspect", bare_dir).out
    assert pipeline("inspect", bare_dir, "--json").json["bytes_per_position"] == facts["bytes_per_position"]
    assert {receipt.scalar_bytes for receipt in CacheReader(sampled_dir).manifest.receipts} == {0}


def test_inspect_of_a_top_k_says_there_are_no_draws(cache_dir: Path) -> None:
    facts = pipeline("inspect", cache_dir, "--json").json
    assert (facts["sampling"], facts["top_k"], facts["max_logit_error"]) == (None, 16, 1 / 128)
    assert (
        "top 16 logits within 0.0078125 nat, tails at T = 1, 3, hidden states: yes"
        in pipeline("inspect", cache_dir).out
    )


def test_inspect_shows_the_ids_drawn_most_often(bare_dir: Path) -> None:
    scored = CacheReader(bare_dir)[3]
    shown = pipeline("inspect", bare_dir, "--sequence", 3, "--json").json["positions"]
    drawn = draws_by_sequence(bare_dir)[scored.sequence.sequence_id]
    assert len(shown) == len(drawn)
    labels = scored.sequence.input_ids[scored.sequence.target_rows("response") + 1].tolist()
    for position, counts, label in zip(shown, drawn, labels, strict=True):
        best = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
        assert [(entry["id"], entry["count"]) for entry in position["teacher"]] == best
        assert position["label_count"] == counts[label]
        assert "label_logit" not in position
    assert any(position["label_count"] for position in shown)
    first = shown[0]["teacher"][0]
    assert f"{first['token']!r} {first['count']}" in pipeline("inspect", bare_dir, "--sequence", 3).out


def test_statistics_count_ids_and_bytes(sampled_dir: Path) -> None:
    found = pipeline("inspect", sampled_dir, "--stats", "--json").json["stats"]
    drawn = [counts for sequence in draws_by_sequence(sampled_dir).values() for counts in sequence]
    assert found["ids_per_position"] == pytest.approx(np.mean([len(counts) for counts in drawn]), abs=0.006)
    assert 1 < found["ids_per_position"] < 50
    assert (found["mass_outside"], found["misses"]) == (None, None)
    assert {*DRAW_COLUMNS, "hidden_states", "input_ids"} <= found["columns"].keys()
    assert (
        f"{found['ids_per_position']:.2f} ids a position among 50 draws"
        in pipeline("inspect", sampled_dir, "--stats").out
    )


def test_a_dry_run_says_about_what_the_dump_will_hold(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    said = teacher_dump(teacher_dir, data_file, tmp_path / "cache", "--dry-run", "--json").json
    assert said["draws"] == 50
    assert said["hidden_bytes"] == said["num_positions"] * 32 * 4
    assert not (tmp_path / "cache").exists()
    words = teacher_dump(teacher_dir, data_file, tmp_path / "cache", "--dry-run", "--no-hidden-states").out
    assert "draws          about" in words
    assert "ask for more than the draws will need the teacher again" in words
    more = teacher_dump(teacher_dir, data_file, tmp_path / "cache", "--dry-run", "--draws", 200, "--json").json
    assert said["logits_bytes"] < more["logits_bytes"] < 4 * said["logits_bytes"]


@pytest.mark.parametrize(
    "option", [("--top-k", 64), ("--set", "cache.logit_step=0"), ("--set", "cache.temperatures=[1]")]
)
def test_what_only_a_top_k_has_is_refused_beside_draws(teacher_dir, data_file, tmp_path, option) -> None:
    result = teacher_dump(teacher_dir, data_file, tmp_path / "cache", *option)
    assert result.code == 1
    assert "--sampling random stores draws and no logits" in result.err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("option", [("--draws", 50), ("--set", "cache.sample_seed=0")])
def test_what_only_draws_have_is_refused_beside_a_top_k(teacher_dir, data_file, tmp_path, option) -> None:
    result = pipeline("teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "x", *option)
    assert result.code == 1
    assert "only --sampling random draws ids" in result.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--draws", 0), "cache.draws: Input should be greater than or equal to 1"),
        (("--draws", 65_536), "cache.draws: Input should be less than or equal to 65535"),
        (("--set", "cache.sample_seed=-1"), "cache.sample_seed: Input should be greater than or equal to 0"),
        (("--sampling", "beam"), "cache.sampling: Input should be 'top-k' or 'random'"),
    ],
)
def test_impossible_draws_are_refused(teacher_dir, data_file, tmp_path, options, said) -> None:
    result = teacher_dump(teacher_dir, data_file, tmp_path / "cache", *options)
    assert result.code == 1
    assert said in result.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--draws", 49), "its sampling.draws is 50, this command's is 49"),
        (("--set", "cache.sample_seed=1"), "its sampling.seed is 0, this command's is 1"),
        (("--sampling", "top-k"), r"its sampling is {'draws': 50, 'seed': 0}, this command's is None"),
    ],
)
def test_a_dump_does_not_go_on_with_other_draws(sampled_copy, teacher_dir, data_file, options, said) -> None:
    before = content(sampled_copy)
    result = teacher_dump(teacher_dir, data_file, sampled_copy, *options)
    assert result.code == 1
    assert said in result.err
    assert content(sampled_copy) == before


def test_a_finished_dump_of_draws_scores_nothing_again(sampled_copy, teacher_dir, data_file) -> None:
    before = content(sampled_copy)
    assert teacher_dump(teacher_dir, data_file, sampled_copy, "--json").json["scored_sequences"] == 0
    assert content(sampled_copy) == before


def test_what_needs_a_top_k_refuses_draws_and_says_what_to_do(
    sampled_dir: Path, teacher_dir: Path, data_file: Path
) -> None:
    evaluated = pipeline("evaluate", "no-such-model", "--cache", sampled_dir)  # before any model is looked for
    counted_misses = pipeline("inspect", sampled_dir, "--stats", "--student", teacher_dir)
    estimated = pipeline("estimate", "--teacher", teacher_dir, "--data", data_file, "--set", "cache.sampling=random")
    for result, says in (
        (evaluated, f"{sampled_dir} stores draws, and a model is evaluated by the teacher's top-k: dump the held-out"),
        (counted_misses, f"--student: misses are counted outside a stored top-k, and {sampled_dir} stores draws"),
        (estimated, "--sampling random stores draws: leave cache.sampling out, or see the size"),
    ):
        assert result.code == 1
        assert says in result.err
        assert result.err.count("error:") == 1
        assert "Traceback" not in result.err


def test_a_log_beside_draws_is_folded_and_verified(sampled_copy: Path) -> None:
    reader = CacheReader(sampled_copy)
    for index in range(2):
        writer = LookupWriter(sampled_copy / "lookups", reader.manifest_sha256)
        pairs = (np.array([0]), np.array([index]), np.array([1.5], np.float32))
        answers = LoggedLogits.of_pairs(reader[index].rows.num_positions, *pairs)
        writer.write("logits", [(index, reader[index].sequence.sequence_id, answers)])
        writer.close()
    assert pipeline("inspect", sampled_copy, "--json").json["lookups"]["answered_pairs"] == 2
    folded = pipeline("compact", sampled_copy, "--json").json
    assert (folded["files_before"], folded["files_after"]) == (2, 1)
    assert pipeline("verify", sampled_copy, "--json").json["log_files"] == 1


def test_a_copy_of_a_remote_cache_of_draws_is_the_cache(
    sampled_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    copy = local_copy(sampled_dir.as_uri())
    assert copy != sampled_dir
    assert content(copy) == content(sampled_dir)
    assert pipeline("verify", copy).code == 0


# ---- the format page ----


def test_the_columns_of_draws_are_those_specified(sampled_dir: Path) -> None:
    schema = pq.read_metadata(sampled_dir / "shard-00000.parquet").schema
    stored = {}
    for column in (schema.column(index) for index in range(len(schema))):
        kind = " (UINT_16)" if "bitWidth=16, isSigned=false" in str(column.logical_type) else ""
        stored[column.path.split(".")[0]] = f"LIST of {column.physical_type}{kind}"
    assert {row[0]: row[1] for row in table(section("Draws"))} == {name: stored[name] for name in DRAW_COLUMNS}


def test_the_numpy_example_gives_the_readers_draws(
    sampled_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / "draws").symlink_to(sampled_dir)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code(section("Draws"), "python"), names)
    rows = CacheReader(sampled_dir)[0].sampled_rows
    wanted = np.zeros((rows.num_positions, 384))
    for position, (ids, counts) in enumerate(zip(rows.token_ids, rows.counts, strict=True)):
        np.add.at(wanted[position], ids, counts / 50)
    np.testing.assert_allclose(names["estimate"], wanted, rtol=1e-12)


def test_the_numbers_are_those_specified(sampled_dir: Path) -> None:
    reader = CacheReader(sampled_dir)
    sequence, seed = reader[0].sequence, reader.plan.sampling.seed
    stream = np.random.Philox(key=int.from_bytes(sequence.sequence_id, "little"), counter=seed << 192)
    # NumPy makes its uniform numbers of the raw ones as the page says.
    numbers = np.random.Generator(stream).random(((sequence.num_tokens - 1), 50))
    np.testing.assert_array_equal(uniforms(sequence, reader.plan), numbers[sequence.target_rows("response")])


# ---- plans ----


def test_a_plan_stores_a_top_k_or_draws(tmp_path: Path) -> None:
    plan = json.loads(PLAN.model_dump_json())
    assert plan["sampling"] == {"draws": 50, "seed": 7}
    assert Plan.model_validate(plan) == PLAN
    for change, said in (
        ({"top_k": 8}, "sampling stores no logits"),
        ({"temperatures": [1.0]}, "sampling stores no logits"),
        ({"logit_step": 0.5}, "sampling stores no logits"),
        ({"sampling": None}, "top_k is 0 in a cache without sampling"),
        ({"sampling": {"draws": 0, "seed": 0}}, "draws"),
        ({"sampling": {"draws": 2**16, "seed": 0}}, "draws"),
        ({"sampling": {"draws": 1, "seed": -1}}, "seed"),
        ({"sampling": {"draws": 1, "seed": 0, "temperature": 2}}, "temperature"),
    ):
        with pytest.raises(ValueError, match=said):
            Plan.model_validate(plan | change)


def test_a_cache_from_before_there_were_draws_reads_verifies_and_is_finished(
    cache_dir: Path, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(cache_dir, tmp_path / "old")
    for name in ("plan.json", "manifest.json"):
        document = json.loads((old / name).read_text())
        assert document.get("plan", document).pop("sampling") is None
        (old / name).write_text(json.dumps(document))
    before = content(old)
    assert CacheReader(old).plan == CacheReader(cache_dir).plan
    assert pipeline("verify", old, "--json").json["ok"]
    again = pipeline(
        "teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--out", old, "--top-k", 16,
        "--set", "data.max_tokens=128", "--set", "cache.sequences_per_shard=8", "--json",
    ).json  # fmt: skip
    assert again["scored_sequences"] == 0
    assert content(old) == before


def test_the_rows_of_a_scored_sequence_say_how_many_positions_they_hold() -> None:
    sequence = TokenSequence(np.array([1, 2], np.int32), np.array([False, True]), "rows")
    rows = SampledRows(np.array([[4, 2]], np.int32), np.array([[3, 1]], np.int32))
    assert ScoredSequence(sequence, rows, None).rows.num_positions == 1
