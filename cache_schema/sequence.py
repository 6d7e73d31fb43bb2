"""The unit everything is keyed by: one sequence of tokens with its loss mask.

Alignment, here and everywhere: target row t is the teacher's distribution over ``input_ids[t + 1]`` given
``input_ids[: t + 1]``. ``loss_mask[t]`` says that token t is trained, which is target row t - 1. A sequence of
T tokens therefore has at most T - 1 targets, and ``loss_mask[0]`` can never be set.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from cache_schema.errors import CacheMismatchError

Positions = Literal["response", "all"]
"""Which target rows a cache stores: those whose next token is trained, or every one."""

SEQUENCE_ID_BYTES = 16


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens in the order the teacher reads them."""

    input_ids: npt.NDArray[np.int32]  # [T]
    loss_mask: npt.NDArray[np.bool_]  # [T]
    source: str
    """Name of the data set the row came from; for reports only, no part of the identity."""

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or self.input_ids.shape != self.loss_mask.shape:
            raise ValueError(
                f"input_ids {self.input_ids.shape} and loss_mask {self.loss_mask.shape} must both be [num_tokens]"
            )
        if len(self.input_ids) < 2:
            raise ValueError(f"a sequence of {len(self.input_ids)} tokens has no target: it needs two at least")
        if self.loss_mask[0]:
            raise ValueError("loss_mask[0] is set, but nothing predicts the first token")

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @cached_property
    def sequence_id(self) -> bytes:
        """128-bit BLAKE2 hash of the token ids and the loss mask: equal content, equal id, on any machine."""
        digest = hashlib.blake2b(digest_size=SEQUENCE_ID_BYTES)
        digest.update(self.input_ids.astype("<i4").tobytes())
        digest.update(np.packbits(self.loss_mask).tobytes())
        return digest.digest()

    def target_rows(self, positions: Positions) -> npt.NDArray[np.int64]:
        """Rows t whose distribution is stored, ascending. [P]"""
        if positions == "all":
            return np.arange(self.num_tokens - 1)
        rows: npt.NDArray[np.int64] = np.flatnonzero(self.loss_mask[1:])
        return rows


@dataclass(frozen=True, eq=False)
class TopKRows:
    """What a cache stores of the teacher's row at P positions, K ids each, tails at R temperatures.

    R is 0 and the moments are None where the engine gave logits alone.
    """

    token_ids: npt.NDArray[np.int32]  # [P, K], in the order (-logit, id) of the unrounded logits
    logits: npt.NDArray[np.float32]  # [P, K], raw, at temperature 1
    tail_logsumexp: npt.NDArray[np.float32]  # [P, R], log-sum-exp of logit/T over the ids not stored
    label_logit: npt.NDArray[np.float32]  # [P], of the token that follows
    row_mean: npt.NDArray[np.float32] | None = None  # [P], over the vocabulary
    row_std: npt.NDArray[np.float32] | None = None  # [P], unbiased

    @property
    def num_positions(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class SampledRows:
    """What a cache stores of the teacher's row at P positions where ids are drawn from it: at most U of them differ."""

    token_ids: npt.NDArray[np.int32]  # [P, U], the ids drawn, in the order (-count, id), then padded with 0
    counts: npt.NDArray[np.int32]  # [P, U], how often each was drawn, 0 in the padding; a row sums to the plan's draws

    @property
    def num_positions(self) -> int:
        return len(self.token_ids)


Rows = TypeVar("Rows", TopKRows, SampledRows)


@dataclass(frozen=True, eq=False)
class ScoredSequence:
    """A sequence with what the teacher said at its target rows."""

    sequence: TokenSequence
    rows: TopKRows | SampledRows
    hidden_states: npt.NDArray[np.generic] | None  # [P, D]; bfloat16 as the uint16 of its bits

    @property
    def top_k_rows(self) -> TopKRows:
        """The rows of a cache that stores a top-k.

        Raises:
            CacheMismatchError: this one stores draws.
        """
        return self._rows_of(TopKRows, "draws and no logits", "--sampling top-k (the default)")

    @property
    def sampled_rows(self) -> SampledRows:
        """The rows of a cache that stores draws.

        Raises:
            CacheMismatchError: this one stores a top-k.
        """
        return self._rows_of(SampledRows, "a top-k and no draws", "--sampling random")

    def _rows_of(self, kind: type[Rows], stored: str, wanted: str) -> Rows:
        if isinstance(self.rows, kind):
            return self.rows
        raise CacheMismatchError(
            f"sequence {self.sequence.sequence_id.hex()} is of a cache that stores {stored}: dump one with "
            f"`pipeline teacher-dump {wanted}`."
        )
