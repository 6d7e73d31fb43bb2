"""How close a student is to its teacher on a held-out cache, with no teacher in memory.

overlap@k is the share of the teacher's k highest ids that are among the student's k highest (thesis, eq. 4.1). The
micro average is over positions, the macro average over sequences of each sequence's mean.

Shape suffixes: N = positions, C = positions of a chunk, V = vocabulary, K = ids compared.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_schema.reader import CacheReader
from workers.lookup.batch import Batch, collate, nothing
from workers.lookup.ladder import Ladder
from workers.losses.divergences import kl_divergence
from workers.ordering import exact_top_k
from workers.ranks import Ranks
from workers.teacher.checkpoint import body_of
from workers.teacher.lm_head import chunks, head_of

OVERLAP_KS = (1, 8, 32)
_SEQUENCES_PER_BATCH = 4
T = TypeVar("T")


class Run(Protocol):
    """Calls what it is given with a model, in evaluation mode and without gradients."""

    def __call__(self, job: Callable[[Any], T], /) -> T: ...


def evaluate_on_cache(
    run: Run,
    reader: CacheReader,
    ladder: Ladder | None,
    ranks: Ranks,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """overlap@1/8/32, KL(teacher || student) at temperature 1, top-1 agreement and loss on the trained positions.

    Computed in the model's own dtype without autocast. An overlap beyond the cache's top-k is None, and so is
    the KL without a ladder. Every rank measures a share of the sequences, and all return the same. Collective.

    Args:
        run: calls what it is given with the model.
        ladder: gives the teacher's whole rows; see ``workers.lookup.opening.ladder_of_whole_rows``.
    """
    overlap_ks = [k for k in OVERLAP_KS if k <= reader.plan.top_k]
    starts = range(0, len(reader), _SEQUENCES_PER_BATCH)
    measured: list[tuple[Tensor, str, list[int]]] = []
    for number in range(ranks.rank, -(-len(starts) // ranks.size) * ranks.size, ranks.size):
        if number >= len(starts):
            # Ranks that have a batch left gather parameters with this one.
            run(partial(_hidden_states, batch=nothing(["response"], ranks.device)))
            continue
        indexes = range(starts[number], min(starts[number] + _SEQUENCES_PER_BATCH, len(reader)))
        batch = collate(reader, indexes, ["response"], ranks.device)
        if ladder is not None:
            ladder.expect(indexes)
        columns, dtype = run(partial(_measure, reader=reader, batch=batch, ladder=ladder, overlap_ks=overlap_ks))
        measured.append((columns, dtype, [len(member.stored_rows) for member in batch.parts["response"].members]))
        if progress:
            progress(indexes.stop, len(reader))
    by_rank = ranks.gather(measured)
    in_order = [by_rank[number % ranks.size][number // ranks.size] for number in range(len(starts))]
    sequence_lengths = [length for *_, lengths in in_order for length in lengths]
    columns = torch.cat([columns for columns, *_ in in_order])
    summary = _summarise(columns, sequence_lengths, overlap_ks, has_kl=ladder is not None)
    return summary | {"dtype": in_order[0][1]}


def _hidden_states(model: Any, batch: Batch) -> Tensor:
    """Of the batch's response positions. [N, D]"""
    positions = batch.parts["response"]
    hidden_BTD = body_of(model)(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
    hidden_ND: Tensor = hidden_BTD[positions.sequence_of_N, positions.token_of_N]
    return hidden_ND


def _measure(
    model: Any, reader: CacheReader, batch: Batch, ladder: Ladder | None, overlap_ks: Sequence[int]
) -> tuple[Tensor, str]:
    """Columns: overlap at each k, loss, KL (0 without hidden states). float64 on the CPU [N, len(overlap_ks) + 2]

    And the dtype that the model computed in.
    """
    hidden_ND, positions = _hidden_states(model, batch), batch.parts["response"]
    head = head_of(model, reader.plan.tokenizer.vocab_size)
    parts = []
    for chunk in chunks(len(hidden_ND), 4 * 2 * head.vocab_size, hidden_ND.device):
        student_CV = head.logits(hidden_ND[chunk])
        labels_C = positions.labels_N[chunk]
        loss_C = F.cross_entropy(student_CV, labels_C, reduction="none")
        kl_C = torch.zeros_like(loss_C)
        if ladder is not None:
            kl_C = kl_divergence(ladder.rows(positions, chunk).log_softmax(1), student_CV.log_softmax(1))
        student_ids_CK = exact_top_k(student_CV, max(overlap_ks))[1]
        teacher_ids_CK = positions.token_ids_NK[chunk]
        overlaps = [overlap_at(k, teacher_ids_CK, student_ids_CK) for k in overlap_ks]
        parts.append(torch.stack([*overlaps, loss_C.double(), kl_C.double()], 1))
    return torch.cat(parts).cpu(), str(hidden_ND.dtype).removeprefix("torch.")


def overlap_at(k: int, teacher_ids_NK: Tensor, student_ids_NK: Tensor) -> Tensor:
    """Share of the teacher's first k ids that are among the student's first k. float64 [N]"""
    common = teacher_ids_NK[:, :k].unsqueeze(2) == student_ids_NK[:, :k].unsqueeze(1)
    return common.sum(dim=(1, 2)).double() / k


def _summarise(
    columns: Tensor, sequence_lengths: Sequence[int], overlap_ks: Sequence[int], *, has_kl: bool
) -> dict[str, Any]:
    micro = columns.mean(0).tolist()
    lengths = [length for length in sequence_lengths if length]
    sequences = torch.split(columns, lengths)
    macro = torch.stack([part.mean(0) for part in sequences]).mean(0).tolist()
    overlap: dict[str, float | None] = {str(k): None for k in OVERLAP_KS}
    overlap_macro = dict(overlap)
    for place, k in enumerate(overlap_ks):
        overlap[str(k)], overlap_macro[str(k)] = micro[place], macro[place]
    return {
        "positions": len(columns),
        "overlap": overlap,
        "overlap_macro": overlap_macro,
        "kl": micro[-1] if has_kl else None,
        "top1_agreement": overlap["1"],
        "loss": micro[-2],
        "tasks": {},
    }
