"""Damaged draws: refused by the writer, found by ``verify``, and never read as other draws."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from cache_schema import CacheCorruptError, CacheReader, Sampling, verify
from cache_schema.encoding import DRAW_COLUMNS
from cache_schema.writer import stored_file
from tests.caches import (
    make_plan,
    make_scored,
    make_scoreds,
    rewrite_column,
    rewrite_table,
    with_rows,
    write_cache,
    write_shard,
)
from tests.command_line import pipeline
from tests.test_verify import edited, put
from tests.tiny_cache import dump_tiny_cache, load_teacher, random_sequences
from workers.teacher.lm_head import LMHead
from workers.teacher.sampling import fault_in_draws

SAMPLING = Sampling(draws=50, seed=7)
PLAN = make_plan(sampling=SAMPLING, num_sequences=40, sequences_per_shard=20)


@pytest.fixture(scope="module")
def sampled_dir(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of 50 draws with hidden states. Tests read it and never change it."""
    folder = tmp_path_factory.mktemp("caches") / "sampled"
    return dump_tiny_cache(folder, teacher_dir, random_sequences(), sampling=SAMPLING).cache_dir


@pytest.fixture
def sampled_copy(sampled_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sampled_dir, tmp_path / "copy")


# ---- what the writer refuses, and verify finds ----


def changed(name, place, value):
    """A change of one stored number of the first position."""

    def change(scored):
        array = getattr(scored.rows, name).copy()
        array[0, place] = value(array[0]) if callable(value) else value
        return with_rows(scored, **{name: array})

    return change


def widened(scored):
    padded = {name: np.pad(getattr(scored.rows, name), ((0, 0), (0, 1))) for name in ("token_ids", "counts")}
    return with_rows(scored, **padded)


def with_id_twice(scored):
    """The first position's draws on one id, named twice with falling counts."""
    ids, counts = np.zeros_like(scored.rows.token_ids), np.zeros_like(scored.rows.counts)
    ids[1:], counts[1:] = scored.rows.token_ids[1:], scored.rows.counts[1:]
    ids[0, :2], counts[0, :2] = 5, (30, 20)
    return with_rows(scored, token_ids=ids, counts=counts)


def reversed_ties(scored):
    ids, counts = scored.rows.token_ids.copy(), scored.rows.counts
    place = next(
        (p, u) for p in range(len(ids)) for u in range(1, ids.shape[1]) if counts[p, u] == counts[p, u - 1] > 0
    )
    row, column = place
    ids[row, [column - 1, column]] = ids[row, [column, column - 1]]
    return with_rows(scored, token_ids=ids)


def in_rising_order(scored):
    rows = scored.rows
    num_ids = int((rows.counts[0] > 0).sum())
    assert rows.counts[0, 0] > rows.counts[0, num_ids - 1]
    ids, counts = rows.token_ids.copy(), rows.counts.copy()
    ids[0, :num_ids], counts[0, :num_ids] = ids[0, :num_ids][::-1], counts[0, :num_ids][::-1]
    return with_rows(scored, token_ids=ids, counts=counts)


def negative_and_large(scored):
    """Counts that still sum to the draws."""
    counts = scored.rows.counts.copy()
    counts[0, 0] += counts[0, 1] + 1
    counts[0, 1] = -1
    return with_rows(scored, counts=counts)


REFUSED = {
    "too few draws": (changed("counts", 0, lambda row: row[0] - 1), "do not sum to the plan's 50 draws"),
    "too many draws": (changed("counts", 0, lambda row: row[0] + 1), "do not sum to the plan's 50 draws"),
    "a negative count": (negative_and_large, "do not sum to the plan's 50 draws"),
    "id = V": (changed("token_ids", 0, 97), "token_ids holds 97, outside the vocabulary of 97"),
    "a negative id": (changed("token_ids", 0, -1), "token_ids holds -1, outside"),
    "an id twice": (with_id_twice, "stands twice"),
    "rising counts": (in_rising_order, "not in the order of their counts"),
    "ties not by id": (reversed_ties, "not in the order of their counts"),
    "padding too wide": (widened, "the padding is not id 0"),
    "an id in the padding": (
        lambda s: with_rows(s, token_ids=np.where(s.rows.counts == 0, 3, s.rows.token_ids)),
        "the padding is not id 0",
    ),
    "positions of another number": (
        lambda s: with_rows(s, token_ids=s.rows.token_ids[1:], counts=s.rows.counts[1:]),
        "the mask says",
    ),
    "counts of another shape": (lambda s: with_rows(s, counts=s.rows.counts[:, 1:]), "counts is .* the mask says"),
    "no ids": (
        lambda s: with_rows(s, token_ids=s.rows.token_ids[:, :0], counts=s.rows.counts[:, :0]),
        "the mask says",
    ),
    "a top-k": (
        lambda s: make_scored(make_plan(), np.random.default_rng(0), 12),
        "its rows are TopKRows, the plan's are draws",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_writer_refuses_draws_a_reader_could_not_trust(tmp_path: Path, kind: str) -> None:
    spoil, said = REFUSED[kind]
    plan = PLAN.model_copy(update={"num_sequences": 2, "sequences_per_shard": 2})
    good, bad = (make_scored(plan, np.random.default_rng(seed), 12) for seed in range(2))
    with pytest.raises(ValueError, match=said):
        write_shard(tmp_path, plan, 0, [good, spoil(bad)])
    assert list(tmp_path.iterdir()) == []


def test_draws_are_refused_where_the_plan_says_top_k(tmp_path: Path) -> None:
    plan = make_plan(num_sequences=1)
    with pytest.raises(ValueError, match="its rows are SampledRows, the plan's are a top-k"):
        write_shard(tmp_path, plan, 0, make_scoreds(PLAN)[:1])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("caches") / "cache", PLAN, make_scoreds(PLAN))


def moved(values):
    """One id from the first position to the second: the sums agree."""
    values[0] -= 1
    values[1] += 1
    return values


@pytest.mark.parametrize(
    ("column", "edit", "said"),
    [
        ("num_ids", edited(lambda values: values[:-1]), "num_ids is not"),
        ("num_ids", edited(put(0, 0)), "num_ids is not"),
        ("num_ids", edited(lambda values: values + 1), "num_ids says"),
        ("num_ids", edited(moved), "do not sum to the plan's 50 draws"),
        ("token_ids", edited(lambda values: values[:-1]), "token_ids and"),
        ("token_ids", edited(lambda values: np.append(values, 1)), "token_ids and"),
        ("token_ids", edited(put(0, 97)), "token_ids holds 97, outside the vocabulary of 97"),
        ("token_ids", edited(put(0, -1)), "token_ids holds -1, outside"),
        ("token_ids", edited(lambda values: np.r_[values[1], values[1:]]), "stands twice|order of their counts"),
        ("counts", edited(lambda values: values[:-1]), "counts are stored"),
        ("counts", edited(put(-1, 0)), "counts holds a 0"),
        ("counts", edited(lambda values: np.r_[values[0] + 1, values[1:]]), "do not sum to the plan's 50 draws"),
        ("counts", edited(lambda values: values[::-1].copy()), "counts|draws"),
        ("input_ids", edited(put(0, 1)), "have another id"),
    ],
)
def test_draws_that_break_the_format_are_found_behind_right_hashes(
    pristine: Path, tmp_path: Path, column: str, edit, said: str
) -> None:
    cache = shutil.copytree(pristine, tmp_path / "cache")
    rewrite_column(cache, PLAN, 1, "shard-00001.parquet", column, edit)
    report = verify(cache)
    assert [damage.file for damage in report.errors] == ["shard-00001.parquet"]
    assert any(part in report.errors[0].reason for part in said.split("|"))


def test_a_truncated_column_is_found(pristine: Path, tmp_path: Path) -> None:
    """The last row of a column lost: what a reader gives out is an error, never other draws."""
    for column in DRAW_COLUMNS:
        cache = shutil.copytree(pristine, tmp_path / column)
        rewrite_column(cache, PLAN, 1, "shard-00001.parquet", column, edited(lambda values: values[:0], row=19))
        assert [damage.file for damage in verify(cache).errors] == ["shard-00001.parquet"]
        with pytest.raises(CacheCorruptError, match=r"shard-00001\.parquet is damaged: .*num_ids"):
            list(CacheReader(cache))


def test_a_column_of_a_top_k_is_refused_in_a_cache_of_draws(pristine: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(pristine, tmp_path / "cache")
    label_logit = pa.array([[0.0]] * 20, pa.list_(pa.float32()))
    rewrite_table(cache, PLAN, 0, "shard-00000.parquet", lambda table: table.append_column("label_logit", label_logit))
    errors = verify(cache).errors
    assert {error.file for error in errors} == {"shard-00000.parquet"}
    assert "its columns are not those of the format" in errors[0].reason


# ---- draws against hidden states and head ----


def scored_with_states(cache_dir: Path, teacher_dir: Path, index: int = 1):
    """A sequence of a cache, its hidden states, and the head they were drawn with."""
    reader = CacheReader(cache_dir)
    states_PD = torch.from_numpy(reader.hidden_states(index).copy())
    return reader.plan, reader[index], states_PD, load_teacher(teacher_dir, reader.plan).lm_head


def test_the_right_states_and_head_draw_the_same_again(sampled_dir: Path, teacher_dir: Path) -> None:
    for index in range(len(CacheReader(sampled_dir))):
        with torch.inference_mode():
            assert fault_in_draws(*scored_with_states(sampled_dir, teacher_dir, index)) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda states, head: (states.roll(1, 0), head),
        lambda states, head: (states * 1.01, head),
        lambda states, head: (states, LMHead(head.weight_VD.roll(1, 0))),
        lambda states, head: (states, LMHead(head.weight_VD, scale=1.01)),
    ],
    ids=["rows moved", "longer states", "another head's rows", "another scale"],
)
def test_other_states_or_another_head_are_found(sampled_dir: Path, teacher_dir: Path, spoil) -> None:
    plan, scored, states_PD, head = scored_with_states(sampled_dir, teacher_dir)
    with torch.inference_mode():
        fault = fault_in_draws(plan, scored, *spoil(states_PD, head))
    assert fault is not None
    assert "its draws lie" in fault


def test_an_id_of_no_probability_is_found(sampled_dir: Path, teacher_dir: Path) -> None:
    plan, scored, states_PD, head = scored_with_states(sampled_dir, teacher_dir)
    drawn = int(scored.rows.token_ids[0, 0])
    # 200 nats below the rest: probability 0 to float32. The head alone has changed.
    bias_V = torch.zeros(head.vocab_size)
    bias_V[drawn] = -200.0
    with torch.inference_mode():
        fault = fault_in_draws(plan, scored, states_PD, LMHead(head.weight_VD, bias_V))
    assert fault == f"id {drawn} was drawn, and its probability is 0"


def test_one_draw_moved_to_another_id_is_found_by_the_command(sampled_copy: Path) -> None:
    """Of counts that pass every check of the format."""
    reader = CacheReader(sampled_copy)
    rows = reader[1].rows
    last = int((rows.counts[0] > 0).sum()) - 1
    assert rows.counts[0, last] == 1
    unused = next(token for token in range(383, -1, -1) if token not in rows.token_ids[0])
    assert unused > rows.token_ids[0, last]
    path = sampled_copy / "shard-00000.parquet"
    table = pq.read_table(path)
    moved_ids = edited(put(last, unused), row=1)(table["token_ids"])
    pq.write_table(table.set_column(5, table.schema.field("token_ids"), moved_ids), path, write_page_checksum=True)
    receipt = json.loads((sampled_copy / "shard-00000.json").read_text())
    manifest = json.loads((sampled_copy / "manifest.json").read_text())
    for owner in (receipt, manifest["receipts"][0]):
        owner["files"][0] = stored_file(sampled_copy, path.name).model_dump()
    (sampled_copy / "shard-00000.json").write_text(json.dumps(receipt))
    (sampled_copy / "manifest.json").write_text(json.dumps(manifest))
    assert verify(sampled_copy).ok
    found = pipeline("verify", sampled_copy, "--json")
    assert found.code == 1
    reason = json.loads(found.out)["errors"][0]["reason"]
    assert "does not belong to the hidden states" in reason
    assert "in sequence 1, its draws lie" in reason


def test_a_foreign_head_is_found_by_the_command(sampled_copy: Path) -> None:
    path = sampled_copy / "lm_head.safetensors"
    weight = load_file(path)["weight"]
    save_file({"weight": weight.roll(1, 0)}, path, metadata={"head": '{"scale": 1.0, "softcap": null}'})
    manifest = json.loads((sampled_copy / "manifest.json").read_text())
    manifest["files"][0] = stored_file(sampled_copy, path.name).model_dump()
    (sampled_copy / "manifest.json").write_text(json.dumps(manifest))
    assert verify(sampled_copy).ok
    found = pipeline("verify", sampled_copy, "--json")
    assert found.code == 1
    assert [error["file"] for error in json.loads(found.out)["errors"]] == ["lm_head.safetensors"]


def test_draws_beside_int8_and_half_precision_states_verify(teacher_dir: Path, tmp_path: Path) -> None:
    for name, options in {"int8": {"hidden_dtype": "int8"}, "bfloat16": {"dtype": "bfloat16"}}.items():
        sampling = Sampling(draws=50, seed=0)
        dump_tiny_cache(tmp_path / name, teacher_dir, random_sequences(), sampling=sampling, **options)
        found = pipeline("verify", tmp_path / name, "--json").json
        assert (found["ok"], found["recomputed_sequences"]) == (True, 7)
