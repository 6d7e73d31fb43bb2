"""Cached sequences as tensors: what the student reads, and what the teacher said at its target rows.

Shape suffixes: B = sequences, T = tokens (padded on the right), N = positions of all sequences, one after the
other, K = stored top-k, U = ids drawn at a position at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema.plan import Plan
from cache_schema.reader import CacheReader
from cache_schema.sequence import ScoredSequence, TopKRows

Part = Literal["response", "prompt"]
"""Which positions: those whose next token is trained, or (in a cache of ``all`` positions) the others."""


@dataclass(frozen=True)
class Member:
    """One sequence's share of the positions."""

    index: int
    """In the cache."""
    stored_rows: Tensor
    """Which of the sequence's stored rows these are. int64 on the CPU"""


@dataclass(frozen=True)
class DrawnIds:
    """Ids drawn from the teacher's distribution."""

    token_ids_NU: Tensor
    """0 in the padding"""
    counts_NU: Tensor
    """How often each was drawn, 0 in the padding. float32"""


@dataclass(frozen=True)
class TeacherPositions:
    """N target positions and the cache's words on them."""

    members: tuple[Member, ...]
    sequence_of_N: Tensor
    """Row of the batch, int64"""
    token_of_N: Tensor
    """Column of the batch, int64"""
    token_ids_NK: Tensor
    logits_NK: Tensor
    labels_N: Tensor
    bounds_N: Tensor
    """No id outside the stored top-k has a higher logit, but for the rounding of the last stored one. float32"""
    tails: dict[float, Tensor]
    """By stored temperature: the log-sum-exp of logit / temperature over the ids outside the stored top-k. [N] each"""
    drawn: DrawnIds | None = None
    """What a cache of sampled ids holds in place of a top-k: there K is 0."""

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class Batch:
    cache: int
    """Which of the run's caches its sequences are from."""
    input_ids_BT: Tensor
    parts: dict[Part, TeacherPositions]

    def num_positions(self, part: Part) -> int:
        return len(self.parts[part]) if part in self.parts else 0


def collate(
    reader: CacheReader, indexes: Sequence[int], parts: Sequence[Part], device: torch.device, cache: int = 0
) -> Batch:
    """Read sequences of a cache into one batch; padding is token 0, on the right, and no position points at it."""
    scored = [reader[index] for index in indexes]
    input_ids = np.zeros((len(scored), max(s.sequence.num_tokens for s in scored)), dtype=np.int64)
    for row, item in enumerate(scored):
        input_ids[row, : item.sequence.num_tokens] = item.sequence.input_ids
    return Batch(
        cache=cache,
        input_ids_BT=torch.from_numpy(input_ids).to(device),
        parts={part: _positions(reader, indexes, scored, part, device) for part in parts},
    )


def nothing(parts: Sequence[Part], device: torch.device) -> Batch:
    """One token of padding and no position: what a rank reads that has no sequence left."""
    none, ids_NK = torch.empty(0, device=device), torch.empty(0, 0, device=device)
    no_positions = TeacherPositions((), none.long(), none.long(), ids_NK.long(), ids_NK, none.long(), none, {})
    return Batch(0, torch.zeros(1, 1, dtype=torch.int64, device=device), dict.fromkeys(parts, no_positions))


def _positions(
    reader: CacheReader, indexes: Sequence[int], scored: Sequence[ScoredSequence], part: Part, device: torch.device
) -> TeacherPositions:
    members, places, stored = [], [], []
    for batch_row, (index, item) in enumerate(zip(indexes, scored, strict=True)):
        sequence = item.sequence
        target_rows = sequence.target_rows(reader.plan.positions)
        kept = np.flatnonzero(sequence.loss_mask[target_rows + 1] == (part == "response"))
        tokens = target_rows[kept]
        members.append(Member(index, torch.from_numpy(kept)))
        places.append((np.full(len(kept), batch_row), tokens, sequence.input_ids[tokens + 1].astype(np.int64)))
        stored.append(_drawn(item, kept) if reader.plan.sampling else _top_k(reader.plan, item.top_k_rows, kept))
    sequence_of_N, token_of_N, labels_N = _stacked(places, device)
    if reader.plan.sampling:
        ids_NU, counts_NU = _stacked(stored, device)
        nothing_NK = torch.empty(len(labels_N), 0, device=device)
        ids_NK, logits_NK = nothing_NK.long(), nothing_NK
        bounds_N = torch.full((len(labels_N),), torch.inf, device=device)
        return TeacherPositions(
            tuple(members), sequence_of_N, token_of_N, ids_NK, logits_NK, labels_N, bounds_N, {},
            DrawnIds(ids_NU, counts_NU.float()),
        )  # fmt: skip
    ids_NK, logits_NK, bounds_N, tails_NR = _stacked(stored, device)
    tails = dict(zip(reader.plan.temperatures, tails_NR.unbind(1), strict=True))
    return TeacherPositions(tuple(members), sequence_of_N, token_of_N, ids_NK, logits_NK, labels_N, bounds_N, tails)


def _stacked(columns: Sequence[tuple[npt.NDArray[Any], ...]], device: torch.device) -> list[Tensor]:
    """Each sequence's arrays one after the other; those of fewer ids than the widest are padded with 0 on the right."""
    stacked = []
    for arrays in zip(*columns, strict=True):
        if arrays[0].ndim == 2:
            width = max(array.shape[1] for array in arrays)
            arrays = tuple(np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays)
        stacked.append(torch.from_numpy(np.concatenate(arrays)).to(device))
    return stacked


def _drawn(item: ScoredSequence, kept: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
    rows = item.sampled_rows
    return rows.token_ids[kept].astype(np.int64), rows.counts[kept]


def _top_k(plan: Plan, rows: TopKRows, kept: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
    return (
        rows.token_ids[kept].astype(np.int64),
        rows.logits[kept],
        _bounds(plan, rows)[kept],
        rows.tail_logsumexp[kept],
    )


def _bounds(plan: Plan, rows: TopKRows) -> npt.NDArray[np.float32]:
    """The lower of the last stored logit, which no other exceeds, and the log-sum-exp of all others, which none
    exceeds alone. [P]"""
    last = rows.logits[:, -1]
    if 1.0 not in plan.temperatures:
        return last
    tail: npt.NDArray[np.float32] = rows.tail_logsumexp[:, plan.temperatures.index(1.0)]
    return np.minimum(last, tail)
