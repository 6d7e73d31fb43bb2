"""Which sequences of a cache are kept: every number against its definition, no column read that nobody asks about."""

import dataclasses
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from cache_schema import CacheCorruptError, CacheReader
from cache_schema.manifest import shard_name
from cache_schema.plan import Sampling
from tests.caches import flip_bit, make_plan, make_scored, rewrite_column, write_cache
from workers.distill.selection import FilterConfig, select, select_each, token_counts
from workers.errors import InputError

SIZES = {"num_sequences": 40, "sequences_per_shard": 21}  # two shards, of two row groups and three


def write(folder, seed=0, sources=("a.jsonl", "b.jsonl"), **plan):
    folder.mkdir()
    made, rng = make_plan(**{**SIZES, **plan}), np.random.default_rng(seed)
    items = [make_scored(made, rng, scale=3.0) for _ in range(made.num_sequences)]  # so flat that the tail counts
    scoreds = [
        dataclasses.replace(item, sequence=dataclasses.replace(item.sequence, source=sources[number % len(sources)]))
        for number, item in enumerate(items)
    ]
    return CacheReader(write_cache(folder, made, scoreds))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return write(tmp_path_factory.mktemp("caches") / "train")


def probabilities(reader, index):
    """Confidence and label probability by their definition, from the decoded sequence, in float64."""
    scored, rows = reader[index], reader[index].top_k_rows
    targets = scored.sequence.target_rows(reader.plan.positions)
    response = scored.sequence.loss_mask[targets + 1]
    tail = rows.tail_logsumexp[:, reader.plan.temperatures.index(1.0)].astype(np.float64)
    logsumexp = np.logaddexp(np.logaddexp.reduce(rows.logits.astype(np.float64), axis=1), tail)
    of_top, of_label = (np.exp(logits - logsumexp)[response] for logits in (rows.logits[:, 0], rows.label_logit))
    return of_top.mean(), np.minimum(of_label, 1.0).mean()


def all_numbers(reader):
    sequences = [reader[index].sequence for index in range(len(reader))]
    found = {
        "tokens": [sequence.num_tokens for sequence in sequences],
        "positions": [int(sequence.loss_mask.sum()) for sequence in sequences],
    }
    found["confidence"], found["label_probability"] = zip(
        *(probabilities(reader, index) for index in range(len(reader))), strict=True
    )
    return {name: np.array(values) for name, values in found.items()}


# ---- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"positions": "all"},
        {"logit_step": 0.0},
        {"top_k": 1},
        {"temperatures": (3.0, 1.0)},
        {"vocab_size": 97, "top_k": 97},  # no tail
        {"positions": "all", "logit_step": 0.0, "hidden_dtype": None},
    ],
)
@pytest.mark.parametrize("name", ["tokens", "positions", "confidence", "label_probability"])
def test_a_bound_keeps_the_sequences_whose_number_meets_it(tmp_path, plan, name):
    reader = write(tmp_path / "cache", **plan)
    values = all_numbers(reader)[name]
    if name in ("tokens", "positions"):
        bound = int(np.median(values))  # of a sequence: bounds are inclusive
        assert bound in values
    else:
        ordered = np.sort(values)
        widest = 10 + int(np.argmax(np.diff(ordered)[10:30]))  # so that no rounding decides
        bound = float((ordered[widest] + ordered[widest + 1]) / 2)
    below = select(reader, FilterConfig(**{f"max_{name}": bound}))
    above = select(reader, FilterConfig(**{f"min_{name}": bound}))
    assert below == np.flatnonzero(values <= bound).tolist()
    assert above == np.flatnonzero(values >= bound).tolist()
    assert 0 < len(below) < 40
    assert 0 < len(above) < 40


def test_sources_are_chosen_or_left_out_by_name(reader):
    assert select(reader, FilterConfig(sources=("a.jsonl",))) == list(range(0, 40, 2))
    assert select(reader, FilterConfig(exclude_sources=("a.jsonl",))) == list(range(1, 40, 2))
    assert select(reader, FilterConfig(sources=("a.jsonl", "b.jsonl"))) == list(range(40))


def test_a_sequence_is_kept_that_meets_all_criteria(reader):
    given = {"sources": ("b.jsonl",), "min_tokens": 8, "max_positions": 12, "min_label_probability": 0.01}
    alone = [set(select(reader, FilterConfig(**{key: value}))) for key, value in given.items()]
    kept = select(reader, FilterConfig(**given))
    assert kept == sorted(set.intersection(*alone))
    assert 0 < len(kept) < min(map(len, alone))


@pytest.mark.parametrize("chosen", [None, FilterConfig()])
def test_without_a_filter_all_are_kept_and_nothing_is_read(tmp_path, chosen):
    reader = write(tmp_path / "cache")
    for shard in range(2):
        (reader.cache_dir / shard_name(shard)).unlink()
    assert select(reader, chosen) == list(range(40))
    assert select_each([reader], chosen) == [list(range(40))]


def test_token_counts_are_the_sequences_own(reader):
    assert token_counts(reader).tolist() == [reader[index].sequence.num_tokens for index in range(40)]


def test_token_counts_are_read_once(tmp_path):
    reader = write(tmp_path / "cache")
    first = token_counts(reader)
    for shard in range(2):
        (reader.cache_dir / shard_name(shard)).unlink()
    assert token_counts(reader) is first


# ---- what is read ---------------------------------------------------------------------------------------------------


def damage_column(reader, column, shard=1):
    """Flip a bit in the last bytes of the column's last page."""
    path = reader.cache_dir / shard_name(shard)
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(file.metadata.num_row_groups - 1)
        (chunk,) = (
            group.column(index)
            for index in range(group.num_columns)
            if group.column(index).path_in_schema.split(".")[0] == column
        )
        first = chunk.dictionary_page_offset or chunk.data_page_offset
        flip_bit(path, 8 * (first + chunk.total_compressed_size - 2))
    return CacheReader(reader.cache_dir)


@pytest.mark.parametrize("column", ["input_ids", "token_ids", "logit_drops", "tail_logsumexp", "sequence_id"])
def test_lengths_and_sources_read_no_logits(tmp_path, column):
    reader = damage_column(write(tmp_path / "cache"), column)
    assert len(select(reader, FilterConfig(min_tokens=10, max_positions=20, sources=("a.jsonl",)))) > 0
    assert len(token_counts(reader)) == 40


@pytest.mark.parametrize(
    ("column", "chosen"),
    [
        ("loss_mask", {"min_tokens": 10}),
        ("loss_mask", {"min_positions": 10}),
        ("source", {"sources": ("a.jsonl",)}),
        ("logit_drops", {"min_confidence": 0.1}),
        ("top_logit_steps", {"max_confidence": 0.9}),
        ("tail_logsumexp", {"max_confidence": 0.9}),
        ("label_logit", {"min_label_probability": 0.1}),
    ],
)
def test_a_damaged_page_is_named_and_nothing_is_kept_from_it(tmp_path, column, chosen):
    reader = damage_column(write(tmp_path / "cache"), column)
    with pytest.raises(CacheCorruptError, match=re.escape(str(reader.cache_dir / shard_name(1)))):
        select(reader, FilterConfig(**chosen))


def test_a_mask_that_is_not_that_of_the_logits_is_damage(tmp_path):
    """Bytes that receipts vouch for, and that do not belong together."""
    reader = write(tmp_path / "cache")

    def with_one_more(column):
        masks = column.to_pylist()
        place = masks[3].index(False, 1)
        masks[3][place] = True
        return pa.chunked_array([pa.array(masks, type=column.type)])

    rewrite_column(reader.cache_dir, reader.plan, 0, shard_name(0), "loss_mask", with_one_more)
    with pytest.raises(CacheCorruptError, match=r"shard-00000\.parquet is damaged: label_logit and loss_mask"):
        select(CacheReader(reader.cache_dir), FilterConfig(min_confidence=0.1))


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_an_empty_selection_says_what_each_criterion_keeps_and_what_there_is(reader):
    numbers = all_numbers(reader)
    tokens, confidence = numbers["tokens"], numbers["confidence"]
    chosen = FilterConfig(sources=("a.jsonl",), max_tokens=tokens.max(), min_confidence=0.9999999)
    with pytest.raises(InputError) as caught:
        select(reader, chosen)
    assert str(caught.value) == (
        f"filter keeps none of the 40 sequences of {reader.cache_dir}: filter.sources=['a.jsonl'] alone keeps 20 (it "
        f"holds a.jsonl 20, b.jsonl 20); filter.max_tokens={tokens.max()} alone keeps 40 (tokens lies between "
        f"{tokens.min()} and {tokens.max()}); filter.min_confidence=1 alone keeps 0 (confidence lies between "
        f"{confidence.min():.4g} and {confidence.max():.4g}). Widen it."
    )


def test_a_source_that_no_cache_holds_is_refused_and_one_that_another_holds_is_not(tmp_path):
    readers = [write(tmp_path / "one"), write(tmp_path / "two", seed=1, sources=("b.jsonl", "c.jsonl"))]
    kept = select_each(readers, FilterConfig(exclude_sources=("c.jsonl",)))
    assert kept == [list(range(40)), list(range(0, 40, 2))]
    for key in ("sources", "exclude_sources"):
        with pytest.raises(InputError, match=r"'d\.jsonl', which no cache .* hold a\.jsonl, b\.jsonl, c\.jsonl"):
            select_each(readers, FilterConfig(**{key: ("b.jsonl", "d.jsonl")}))


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"temperatures": (3.0,)}, r"holds it at 3: .* cache\.temperatures=\[1,3\]\."),
        ({"sampling": Sampling(draws=5, seed=0)}, r"stores draws .* --sampling top-k"),
        ({"logits": "engine"}, r"engine's own logits without it"),
    ],
)
@pytest.mark.parametrize("key", ["max_confidence", "min_label_probability"])
def test_a_probability_needs_the_tail_at_temperature_1(tmp_path, plan, sentence, key):
    reader = write(tmp_path / "cache", **plan)
    with pytest.raises(InputError, match=rf"filter\.{key} needs .*{sentence}"):
        select(reader, FilterConfig(**{key: 0.5}))
    assert len(select(reader, FilterConfig(min_tokens=10))) > 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 lies above max_tokens=4: no sequence meets both"),
        ({"min_confidence": 0.5, "max_confidence": 0.25}, "min_confidence=0.5 lies above max_confidence=0.25"),
        ({"sources": ("a", "b"), "exclude_sources": ("b",)}, "both name b"),
        ({"sources": ()}, "sources"),
        ({"min_confidence": 1.5}, "min_confidence"),
        ({"max_confidence": float("nan")}, "max_confidence"),
        ({"min_length": 3}, "min_length"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(given, sentence):
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        FilterConfig(**given)
