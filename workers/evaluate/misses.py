"""How often a student looks outside the teacher's top K, and how much of the teacher lies there; for several K at once.

A student-led loss asks for the teacher's logit at each of the student's leading ids. Such a pair is a miss at K where
its id is not among the teacher's first K in the order (-logit, id).

Shape suffixes: N = positions, C = positions of a chunk, S = sequences, V = vocabulary, M = the student's leading ids,
K = the teacher's leading ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache_schema.reader import CacheReader
from workers.distill.sparse_head import student_top_k
from workers.lookup.batch import TeacherPositions, collate
from workers.lookup.ladder import Ladder
from workers.lookup.opening import stored_ladder
from workers.ordering import exact_top_k
from workers.teacher.checkpoint import body_of
from workers.teacher.lm_head import chunks, head_of

TOP_KS = (8, 16, 32, 64, 128, 256)

_SEQUENCES_PER_BATCH = 4


@dataclass(frozen=True)
class Misses:
    num_pairs: int
    num_sequences: int
    pairs: dict[int, int]
    """Missing pairs at each K."""
    sequences: dict[int, int]
    """Sequences with a missing pair at each K: one is enough to need the sequence's hidden states."""

    def share_of_pairs(self, top_k: int) -> float:
        return self.pairs[top_k] / max(self.num_pairs, 1)

    def share_of_sequences(self, top_k: int) -> float:
        return self.sequences[top_k] / max(self.num_sequences, 1)


def measure_misses(
    model: Any,
    reader: CacheReader,
    indexes: Sequence[int],
    *,
    k: int,
    top_ks: Sequence[int],
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Misses:
    """Misses of a student's k leading ids at the trained positions of some sequences of a cache.

    The student is computed in its own dtype without autocast and left in eval mode. A K beyond the stored one is
    answered from hidden states, which the cache must then have.

    Args:
        top_ks: at most the vocabulary.
        progress: called with (sequences done, of sequences).
    """
    model.eval()
    head = head_of(model, reader.plan.tokenizer.vocab_size)
    widest = max(top_ks)
    ladder = stored_ladder(reader, device) if widest > reader.plan.top_k else None
    ranks, sequences = [], []
    for first in range(0, len(indexes), _SEQUENCES_PER_BATCH):
        members = indexes[first : first + _SEQUENCES_PER_BATCH]
        batch = collate(reader, members, ["response"], device)
        if ladder is not None:
            ladder.expect(members)
        positions = batch.parts["response"]
        with torch.inference_mode():
            hidden_BTD = body_of(model)(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
            student_ids_NM = student_top_k(head, hidden_BTD[positions.sequence_of_N, positions.token_of_N], k)
            ranks.append(ranks_of(student_ids_NM, _teacher_ids(positions, ladder, widest, head.vocab_size)))
        sequences.append(positions.sequence_of_N + first)
        if progress:
            progress(first + len(members), len(indexes))
    return count_misses(torch.cat(ranks), torch.cat(sequences), len(indexes), top_ks)


def ranks_of(ids_NM: Tensor, teacher_ids_NK: Tensor) -> Tensor:
    """Place of each id among the teacher's K leading ones, counted from 0; K where it is none of them. int64 [N, M]"""
    ranks_NM = torch.empty_like(ids_NM)
    num_ids, top_k = ids_NM.shape[1], teacher_ids_NK.shape[1]
    for rows in chunks(len(ids_NM), num_ids * top_k):
        same_CMK = ids_NM[rows].unsqueeze(2) == teacher_ids_NK[rows].unsqueeze(1)
        found_CM, place_CM = same_CMK.max(dim=2)
        ranks_NM[rows] = place_CM.masked_fill(~found_CM, top_k)
    return ranks_NM


def count_misses(ranks_NM: Tensor, sequence_of_N: Tensor, num_sequences: int, top_ks: Sequence[int]) -> Misses:
    """Count what ``ranks_of`` found: an id of rank r is missing at every K up to r."""
    worst_S = torch.full((num_sequences,), -1, dtype=ranks_NM.dtype, device=ranks_NM.device)
    worst_S.scatter_reduce_(0, sequence_of_N, ranks_NM.amax(dim=1), "amax")
    return Misses(
        num_pairs=ranks_NM.numel(),
        num_sequences=num_sequences,
        pairs={top_k: int((ranks_NM >= top_k).sum()) for top_k in top_ks},
        sequences={top_k: int((worst_S >= top_k).sum()) for top_k in top_ks},
    )


def tail_beyond(logits_NK: Tensor, tail_N: Tensor, top_k: int, temperature: float = 1.0) -> Tensor:
    """Log-sum-exp of logit / T over all ids but the first ``top_k``, from K >= top_k logits and the tail beyond. [N]

    Sums the left-out logits instead of subtracting from the whole, so that a small tail keeps its digits.
    """
    return torch.logaddexp(torch.logsumexp(logits_NK[:, top_k:] / temperature, dim=1), tail_N)


def mass_outside(logits_NK: Tensor, tail_N: Tensor, top_ks: Sequence[int]) -> dict[int, float]:
    """The teacher's probability outside its top K at temperature 1, mean over the positions, for each K.

    Args:
        tail_N: log-sum-exp at temperature 1 of the logits that do not stand in ``logits_NK``.
        top_ks: at most the number of logits.
    """
    whole_N = tail_beyond(logits_NK, tail_N, 0)
    outside = {top_k: tail_beyond(logits_NK, tail_N, top_k) - whole_N for top_k in top_ks}
    return {top_k: float(log_mass_N.double().exp().mean()) for top_k, log_mass_N in outside.items()}


def _teacher_ids(positions: TeacherPositions, ladder: Ladder | None, top_k: int, vocab_size: int) -> Tensor:
    """The teacher's leading ids: the stored ones, or made again from hidden states and head. int64 [N, top_k]"""
    if ladder is None:
        return positions.token_ids_NK[:, :top_k]
    parts = chunks(len(positions), 4 * vocab_size, positions.labels_N.device)
    return torch.cat([exact_top_k(ladder.rows(positions, rows), top_k)[1] for rows in parts])
