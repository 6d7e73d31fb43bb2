"""Batches of sequences, and what the plan stores of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema.plan import Plan
from cache_schema.sequence import SampledRows, ScoredSequence, TokenSequence, TopKRows
from workers.teacher.lm_head import LMHead
from workers.teacher.sampling import counted, draw, uniforms
from workers.teacher.scoring import score


def batches(sequences: Sequence[TokenSequence], tokens_per_batch: int, extra: int = 0) -> Iterator[list[TokenSequence]]:
    """Longest first, so that memory is tight at once or never; as many as fit ``tokens_per_batch`` when padded.

    Args:
        extra: tokens that each sequence will grow by.
    """
    batch: list[TokenSequence] = []
    for sequence in sorted(sequences, key=lambda s: (-s.num_tokens, s.sequence_id)):
        if batch and (len(batch) + 1) * (batch[0].num_tokens + extra) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


@dataclass(frozen=True)
class ScoredBatch:
    """What is stored of a batch's target rows, one sequence after the other, still where the teacher computed it.

    N = target rows of the batch.
    """

    sequences: Sequence[TokenSequence]
    plan: Plan
    columns: dict[str, Tensor]
    """Those of ``TopKRows``, [N, ...]; with sampling the drawn ids alone, [N, S]."""
    hidden_ND: Tensor | None

    def to_host(self) -> list[ScoredSequence]:
        """Wait for the device, copy, and split by sequence. Any thread may; torch's own work goes on meanwhile."""
        ends = np.cumsum([len(sequence.target_rows(self.plan.positions)) for sequence in self.sequences])
        split = {name: np.split(column.cpu().numpy(), ends[:-1]) for name, column in self.columns.items()}
        rows: Sequence[TopKRows | SampledRows]
        if self.plan.sampling:
            rows = [counted(drawn_PS) for drawn_PS in split["drawn_ids"]]
        else:
            rows = [TopKRows(**dict(zip(split, parts, strict=True))) for parts in zip(*split.values(), strict=True)]
        hidden: Sequence[npt.NDArray[np.generic] | None] = [None] * len(self.sequences)
        if self.hidden_ND is not None:
            # numpy has no bfloat16; its bits travel as uint16.
            is_bfloat16 = self.hidden_ND.dtype == torch.bfloat16
            bits = self.hidden_ND.view(torch.uint16) if is_bfloat16 else self.hidden_ND
            hidden = np.split(bits.cpu().numpy(), ends[:-1])
        return [ScoredSequence(*parts) for parts in zip(self.sequences, rows, hidden, strict=True)]


@dataclass(frozen=True)
class RowsBatch:
    """The same where the engine made the rows itself: they are on the host already."""

    sequences: Sequence[TokenSequence]
    rows: Sequence[TopKRows]

    def to_host(self) -> list[ScoredSequence]:
        return [ScoredSequence(*pair, hidden_states=None) for pair in zip(self.sequences, self.rows, strict=True)]


def score_batch(plan: Plan, batch: Sequence[TokenSequence], states: Sequence[Tensor], head: LMHead) -> ScoredBatch:
    """Score the target rows of a batch in one call.

    Args:
        states: hidden states at each sequence's target rows. [P_i, D] each
    """
    hidden_ND = torch.cat(list(states))
    with torch.inference_mode():
        columns = _drawn(plan, batch, hidden_ND, head) if plan.sampling else _top_k(plan, batch, hidden_ND, head)
    return ScoredBatch(batch, plan, columns, hidden_ND if plan.hidden_states else None)


def _drawn(plan: Plan, batch: Sequence[TokenSequence], hidden_ND: Tensor, head: LMHead) -> dict[str, Tensor]:
    uniforms_NS = torch.from_numpy(np.concatenate([uniforms(sequence, plan) for sequence in batch]))
    return {"drawn_ids": draw(head, hidden_ND, uniforms_NS.to(hidden_ND.device))}


def _top_k(plan: Plan, batch: Sequence[TokenSequence], hidden_ND: Tensor, head: LMHead) -> dict[str, Tensor]:
    labels = np.concatenate([sequence.input_ids[sequence.target_rows(plan.positions) + 1] for sequence in batch])
    labels_N = torch.from_numpy(labels).long().to(hidden_ND.device)
    top = score(head, hidden_ND, labels_N, plan.top_k, plan.temperatures)
    return {
        "token_ids": top.token_ids_NK.int(),
        "logits": top.logits_NK,
        "tail_logsumexp": top.tail_logsumexp_NR,
        "label_logit": top.label_logit_N,
        "row_mean": top.row_mean_N,
        "row_std": top.row_std_N,
    }
