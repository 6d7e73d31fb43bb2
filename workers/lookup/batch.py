"""Cached sequences as tensors: what the student reads, and what the teacher said at its target rows.

Shape suffixes: B = sequences, T = tokens (padded on the right), N = positions of all sequences, one after the
other, K = stored top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema.manifest import Plan
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


def _positions(
    reader: CacheReader, indexes: Sequence[int], scored: Sequence[ScoredSequence], part: Part, device: torch.device
) -> TeacherPositions:
    members, columns = [], []
    for batch_row, (index, item) in enumerate(zip(indexes, scored, strict=True)):
        sequence = item.sequence
        target_rows = sequence.target_rows(reader.plan.positions)
        kept = np.flatnonzero(sequence.loss_mask[target_rows + 1] == (part == "response"))
        tokens = target_rows[kept]
        members.append(Member(index, torch.from_numpy(kept)))
        columns.append(
            (
                np.full(len(kept), batch_row),
                tokens,
                item.rows.token_ids[kept].astype(np.int64),
                item.rows.logits[kept],
                sequence.input_ids[tokens + 1].astype(np.int64),
                _bounds(reader.plan, item.rows)[kept],
            )
        )
    stacked: list[np.ndarray[Any, Any]] = [np.concatenate(column) for column in zip(*columns, strict=True)]
    return TeacherPositions(tuple(members), *(torch.from_numpy(column).to(device) for column in stacked))


def _bounds(plan: Plan, rows: TopKRows) -> npt.NDArray[np.float32]:
    """The lower of the last stored logit, which no other exceeds, and the log-sum-exp of all others, which none
    exceeds alone. [P]"""
    last = rows.logits[:, -1]
    if 1.0 not in plan.temperatures:
        return last
    tail: npt.NDArray[np.float32] = rows.tail_logsumexp[:, plan.temperatures.index(1.0)]
    return np.minimum(last, tail)
