"""Which sequences of a cache are trained on: by source, by length, by what the teacher thought of them.

Only the columns that a criterion asks about are read. Numbers, of one sequence each:

- tokens: prompt and response together.
- positions: trained ones, those of the response.
- confidence: the mean over its positions of the teacher's highest probability.
- label probability: the mean over its positions of the teacher's probability of the token that follows.

Probabilities are of the teacher's whole row at temperature 1, its denominator made of the stored logits and the tail's
log-sum-exp. A grid of steps s puts them within a factor of exp(s) of the truth.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from cache_schema.encoding import LABEL_COLUMN, from_steps, logit_columns
from cache_schema.plan import Plan
from cache_schema.reader import CacheReader
from workers.distill.config_section import ConfigSection
from workers.errors import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Probability = Annotated[float, Field(ge=0, le=1)]

_LENGTHS = ("tokens", "positions")
_PROBABILITIES = ("confidence", "label_probability")
_NUM_TOKENS: WeakKeyDictionary[CacheReader, Ints] = WeakKeyDictionary()


class FilterConfig(ConfigSection):
    """Train on the sequences that meet all of these; bounds are inclusive."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the data sets that the rows came from, as the cache stores them: a file's or folder's own name."""
    exclude_sources: tuple[str, ...] = ()
    """Leave these out."""
    min_tokens: int | None = Field(None, ge=1)
    """Tokens of prompt and response together, at least."""
    max_tokens: int | None = Field(None, ge=1)
    """The same, at most."""
    min_positions: int | None = Field(None, ge=1)
    """Trained positions of the response, at least."""
    max_positions: int | None = Field(None, ge=1)
    """The same, at most."""
    min_confidence: Probability | None = None
    """The teacher's highest probability at temperature 1, its mean over the response's positions, at least."""
    max_confidence: Probability | None = None
    """The same, at most."""
    min_label_probability: Probability | None = None
    """The teacher's probability of the response's own token, its mean over the positions, at least."""
    max_label_probability: Probability | None = None
    """The same, at most."""

    def bounds(self, name: str) -> dict[str, float]:
        """The least and the most that was given, by key."""
        given = {f"{side}_{name}": getattr(self, f"{side}_{name}") for side in ("min", "max")}
        return {key: bound for key, bound in given.items() if bound is not None}

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        for name in (*_LENGTHS, *_PROBABILITIES):
            (least, most) = (self.bounds(name).get(f"{side}_{name}") for side in ("min", "max"))
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{name}={least:g} lies above max_{name}={most:g}: no sequence meets both")
        both = sorted({*(self.sources or ())} & {*self.exclude_sources})
        if both:
            raise ValueError(f"sources and exclude_sources both name {both[0]}: leave it out of one")
        return self


def select_each(readers: Sequence[CacheReader], chosen: FilterConfig | None) -> list[list[int]]:
    """Of each cache, the indexes of the sequences that are kept.

    Raises:
        InputError: as ``select``; or a source that is named is in none of the caches.
    """
    named = [] if chosen is None else [*(chosen.sources or ()), *chosen.exclude_sources]
    if named:
        known = {source for reader in readers for source in _sources(reader)}
        unknown = [source for source in named if source not in known]
        if unknown:
            raise InputError(
                f"filter names the source {unknown[0]!r}, which no cache of the run holds: they hold "
                f"{', '.join(sorted(known))}."
            )
    return [select(reader, chosen) for reader in readers]


def select(reader: CacheReader, chosen: FilterConfig | None) -> list[int]:
    """Indexes of the sequences that meet all criteria, ascending; all of them, and nothing is read, without any.

    Raises:
        InputError: none is kept, or the cache does not hold what a criterion asks about.
        CacheCorruptError: a column that was read is damaged; names the file.
    """
    criteria = [] if chosen is None else _criteria(reader, chosen)
    if not criteria:
        return list(range(len(reader)))
    kept: list[int] = np.flatnonzero(np.all([criterion.met for criterion in criteria], axis=0)).tolist()
    if not kept:
        each = "; ".join(f"{item.written} alone keeps {int(item.met.sum()):,} ({item.found})" for item in criteria)
        raise InputError(f"filter keeps none of the {len(reader):,} sequences of {reader.cache_dir}: {each}. Widen it.")
    return kept


def token_counts(reader: CacheReader) -> Ints:
    """Tokens of every sequence, without reading anything else of it; read once. [sequences]"""
    counts = _NUM_TOKENS.get(reader)
    if counts is None:
        counts = _NUM_TOKENS[reader] = _lengths(reader)["tokens"]
    return counts


@dataclass(frozen=True)
class _Criterion:
    written: str
    met: npt.NDArray[np.bool_]  # [sequences]
    found: str
    """What there is, for who has to choose another."""


def _criteria(reader: CacheReader, chosen: FilterConfig) -> list[_Criterion]:
    criteria = []
    if chosen.sources is not None or chosen.exclude_sources:
        sources = _sources(reader)
        counts = ", ".join(f"{source} {number:,}" for source, number in sorted(Counter(sources).items()))
        for key, names in (("sources", chosen.sources), ("exclude_sources", chosen.exclude_sources)):
            if names:
                met = np.array([(source in names) == (key == "sources") for source in sources])
                criteria.append(_Criterion(f"filter.{key}={list(names)}", met, f"it holds {counts}"))
    for family, measure in ((_LENGTHS, _lengths), (_PROBABILITIES, _probabilities)):
        bounds = {name: chosen.bounds(name) for name in family if chosen.bounds(name)}
        if not bounds:
            continue
        if family == _PROBABILITIES:
            _require_probabilities(reader, next(iter(next(iter(bounds.values())))))
        measured = measure(reader)
        for name, given in bounds.items():
            values, shown = measured[name], name.replace("_", " ")
            there = values[~np.isnan(values)]
            found = f"{shown} lies between {there.min():.4g} and {there.max():.4g}" if len(there) else f"no {shown}"
            for key, bound in given.items():
                met = values >= bound if key.startswith("min") else values <= bound
                criteria.append(_Criterion(f"filter.{key}={bound:g}", met, found))
    return criteria


def _require_probabilities(reader: CacheReader, key: str) -> None:
    plan = reader.plan
    if 1.0 in plan.temperatures:
        return
    if plan.sampling:
        holds, way = "stores draws in its place", "--sampling top-k (the default)"
    elif plan.logits_alone:
        holds, way = "holds the engine's own logits without it", "the default engine.logits"
    else:
        stored = sorted({1.0, *plan.temperatures})
        holds = f"holds it at {', '.join(f'{value:g}' for value in plan.temperatures) or 'none'}"
        way = f"--set cache.temperatures=[{','.join(f'{value:g}' for value in stored)}]"
    raise InputError(
        f"filter.{key} needs the teacher's log-sum-exp at temperature 1, and {reader.cache_dir} {holds}: filter by "
        f"source or length, or dump with {way}."
    )


# ---- columns ----


def _sources(reader: CacheReader) -> list[str]:
    """Of every sequence."""
    groups = reader.read_columns(["source"], lambda table: table["source"].to_pylist())
    return [source for group in groups for source in group]


def _lengths(reader: CacheReader) -> dict[str, Ints]:
    """Tokens and trained positions of every sequence, both read off the loss mask, which has a bit a token."""

    def lengths(table: pa.Table) -> Ints:
        counts, mask = _lists(table, "loss_mask")
        if (counts < 2).any():
            raise ValueError("loss_mask has a sequence of fewer than two tokens")
        return np.stack([counts, _sums(mask, counts).astype(np.int64)])

    tokens, positions = np.concatenate(reader.read_columns(["loss_mask"], lengths), axis=1)
    return {"tokens": tokens, "positions": positions}


def _probabilities(reader: CacheReader) -> dict[str, Floats]:
    """Confidence and label probability of every sequence; NaN of one without a trained position."""
    plan = reader.plan
    columns = ["loss_mask", *logit_columns(plan), "tail_logsumexp", LABEL_COLUMN]
    columns.remove("token_ids")
    groups = reader.read_columns(columns, lambda table: _means(table, plan))
    return dict(zip(_PROBABILITIES, np.concatenate(groups, axis=1), strict=True))


def _means(table: pa.Table, plan: Plan) -> Floats:
    """Of a row group. [2, sequences]"""
    tokens, mask = _lists(table, "loss_mask")
    is_target = np.ones(len(mask), dtype=bool)
    is_target[np.cumsum(tokens) - tokens] = False  # nothing predicts a first token
    if plan.positions == "response":
        is_target &= mask
    stored, labels = _lists(table, LABEL_COLUMN)
    if not np.array_equal(stored, _sums(is_target, tokens)):
        raise ValueError(f"{LABEL_COLUMN} and loss_mask belong to different positions")
    logits = _stored_logits(table, plan, len(labels))
    tails = _lists(table, "tail_logsumexp")[1].reshape(len(labels), len(plan.temperatures))
    top = logits[:, 0].copy()
    logits -= top[:, None]
    denominators = np.exp(logits, out=logits).sum(axis=1, dtype=np.float64)
    denominators += np.exp(tails[:, plan.temperatures.index(1.0)] - top, dtype=np.float64)
    of_labels = np.minimum(np.exp(labels - top, dtype=np.float64) / denominators, 1.0)  # the grid may round top down
    is_response = mask[is_target]
    counts = _sums(is_response, stored)
    sums = np.stack([_sums(values * is_response, stored) for values in (1.0 / denominators, of_labels)])
    means: Floats = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return means


def _stored_logits(table: pa.Table, plan: Plan, num_positions: int) -> npt.NDArray[np.float32]:
    """[P, K]"""
    if not plan.logit_step:
        return _lists(table, "logits")[1].reshape(num_positions, plan.top_k).copy()
    drops = _lists(table, "logit_drops")[1].reshape(num_positions, plan.top_k - 1)
    return from_steps(_lists(table, "top_logit_steps")[1], drops, plan.logit_step)


def _lists(table: pa.Table, column: str) -> tuple[Ints, npt.NDArray[Any]]:
    """How many values each list holds [sequences], and all of them one after the other."""
    lists = table[column].combine_chunks()
    return np.diff(lists.offsets.to_numpy()).astype(np.int64), lists.values.to_numpy(zero_copy_only=False)


def _sums(values: npt.NDArray[Any], counts: Ints) -> Floats:
    """Of each sequence's share of the values. [sequences]"""
    sequence_of = np.repeat(np.arange(len(counts)), counts)
    return np.bincount(sequence_of, weights=values, minlength=len(counts)).astype(np.float64, copy=False)
