"""Ids drawn from the teacher's rows, for students of random-sampling KD (Anshumann et al. 2025, Sparse Logit Sampling).

How often each id was drawn, over the number of draws, is an estimate of the teacher's softmax without bias, which a
renormalised top-k is not. A draw follows from the row's logits, the plan's seed, the sequence's id and the target row
alone: shard, worker and a resumed dump change none, and another batch only where it rounds the logits otherwise, about
one draw in some ten thousand.

Shape suffixes: N = positions, C = positions of one chunk, P = positions of one sequence, V = vocabulary,
D = hidden size, S = draws per position.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema.plan import Plan
from cache_schema.sequence import SampledRows, ScoredSequence, TokenSequence
from workers.errors import InputError
from workers.teacher.lm_head import LMHead, chunks, matmul_operands

_BYTES_PER_ID = 16
"""Logit, weight and cumulative sum of one id at one position."""

BEYOND_THE_PILOT = 4
"""How much worse int8 may be in one sequence than on the dump's pilot: on SmolLM2, 2.6 times for a single position."""


def uniforms(sequence: TokenSequence, plan: Plan) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) that decide the draws of a plan with ``sampling`` at a sequence's stored positions. [P, S]

    Philox with the sequence's id as the key and the seed in the counter, S numbers for each target row from 0, stored
    or not: a cache of all positions has the draws of one of responses among its own. They are made of the raw stream,
    which NumPy keeps the same for good.
    """
    assert plan.sampling is not None
    draws = plan.sampling.draws
    key = int.from_bytes(sequence.sequence_id, "little")
    stream = np.random.Philox(key=key, counter=plan.sampling.seed << 192)
    raw = stream.random_raw((sequence.num_tokens - 1) * draws).reshape(-1, draws)
    highest_bits = raw[sequence.target_rows(plan.positions)] >> np.uint64(11)
    return highest_bits.astype(np.float64) * 2.0**-53


def draw(head: LMHead, hidden_ND: Tensor, uniforms_NS: Tensor) -> Tensor:
    """The ids at which the softmax's cumulative sum passes each number in [0, 1). int32 [N, S], [N, V] is never whole

    No id has probability 0.
    """
    parts = []
    # A CPU upcasts a half-precision head: once for all chunks.
    with matmul_operands(hidden_ND, head.weight_VD) as (operand_ND, weight_VD):
        operand_head = replace(head, weight_VD=weight_VD)
        for rows in chunks(len(hidden_ND), _BYTES_PER_ID * head.vocab_size, hidden_ND.device):
            parts.append(inverse_cdf(operand_head.logits(operand_ND[rows]), uniforms_NS[rows]))
    return torch.cat(parts)


def inverse_cdf(logits_CV: Tensor, uniforms_CS: Tensor) -> Tensor:
    """``draw`` from logits. int32 [C, S]"""
    weights_CV, sums_CV = _cumulative(logits_CV)
    if not bool(torch.isfinite(sums_CV[:, -1]).all()):
        raise InputError("the teacher's logits are not finite: nothing can be drawn from them. Check its weights.")
    last = logits_CV.shape[1] - 1
    ids_CS = torch.searchsorted(sums_CV, uniforms_CS * sums_CV[:, -1:], right=True).clamp_(max=last)
    has_mass_CS = weights_CV.gather(1, ids_CS) > 0
    if not bool(has_mass_CS.all()):
        # Just below 1 the product can round to the whole sum, and a parallel scan can rise by a rounding where it adds
        # nothing: at 1e-16 a draw, and the likeliest id then is as good as any.
        ids_CS = torch.where(has_mass_CS, ids_CS, logits_CV.argmax(1, keepdim=True))
    return ids_CS.int()


def counted(drawn_PS: npt.NDArray[np.int32]) -> SampledRows:
    """The ids of each position in the order (-count, id), and their counts."""
    ids_PS = np.sort(drawn_PS, axis=1)
    is_first_PS = np.ones(ids_PS.shape, dtype=bool)
    is_first_PS[:, 1:] = ids_PS[:, 1:] != ids_PS[:, :-1]
    place_PS = is_first_PS.cumsum(axis=1) - 1
    num_positions, most = len(ids_PS), int(place_PS.max()) + 1
    flat_PS = place_PS + most * np.arange(num_positions)[:, None]
    counts = np.bincount(flat_PS.ravel(), minlength=num_positions * most).reshape(num_positions, most)
    token_ids = np.zeros(counts.shape, dtype=np.int32)
    token_ids.flat[flat_PS[is_first_PS]] = ids_PS[is_first_PS]
    # Ids ascend, so a stable sort leaves ties by id; padding, of count 0, goes last.
    order = np.argsort(-counts, axis=1, kind="stable")
    return SampledRows(
        np.take_along_axis(token_ids, order, axis=1), np.take_along_axis(counts, order, axis=1).astype(np.int32)
    )


def fault_in_draws(
    plan: Plan, scored: ScoredSequence, hidden_PD: Tensor, head: LMHead, precision: float = 1e-4
) -> str | None:
    """Why stored draws cannot be of these hidden states and this head, or None.

    Every stored draw has its number in [0, 1): sorted, they belong to the ids in ascending order. Each number must lie
    where the cumulative sum passes its id, up to what rounding the logits moves that sum: half a logit's error at most.

    Args:
        hidden_PD: final-norm hidden states of the sequence's stored positions, as stored or made anew.
        precision: how far their logits may be off, as a share of the largest.
    """
    rows = scored.sampled_rows
    numbers_PS = torch.from_numpy(np.sort(uniforms(scored.sequence, plan), axis=1)).to(hidden_PD.device)
    by_id_PU = np.argsort(rows.token_ids, axis=1, kind="stable")
    ids = np.take_along_axis(rows.token_ids, by_id_PU, axis=1)
    counts = np.take_along_axis(rows.counts, by_id_PU, axis=1)
    ids_PS = torch.from_numpy(np.repeat(ids.ravel(), counts.ravel()).reshape(numbers_PS.shape)).to(hidden_PD.device)
    largest_logit, off = 1.0, []
    for part in chunks(len(hidden_PD), _BYTES_PER_ID * head.vocab_size, hidden_PD.device):
        logits_CV = head.logits(hidden_PD[part])
        largest_logit = max(largest_logit, float(logits_CV.abs().max()))
        weights_CV, sums_CV = _cumulative(logits_CV)
        ids_CS = ids_PS[part].long()
        mass_CS, passed_CS = weights_CV.gather(1, ids_CS), sums_CV.gather(1, ids_CS)
        if bool((mass_CS == 0).any()):
            return f"id {int(ids_CS[mass_CS == 0][0])} was drawn, and its probability is 0"
        wanted_CS = numbers_PS[part] * sums_CV[:, -1:]
        off_CS = torch.maximum(passed_CS - mass_CS - wanted_CS, wanted_CS - passed_CS).clamp_min(0)
        off.append(off_CS / sums_CV[:, -1:])
    off_PS = torch.cat(off)
    hidden = plan.hidden_states
    errors = (hidden.max_logit_error, hidden.mean_logit_error) if hidden else (None, None)
    for name, error, difference in (
        ("", errors[0], float(off_PS.max())),
        (" on average", errors[1], float(off_PS.mean())),
    ):
        # Float32 sums in another order, and int8.
        tolerance = (precision * largest_logit + BEYOND_THE_PILOT * (error or 0.0)) / 2
        if not difference <= tolerance:
            return (
                f"its draws lie {difference:.3g} of the cumulative probability off{name} (rounding explains "
                f"{tolerance:.2g})"
            )
    return None


def _cumulative(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax before it is divided by its sum: weights, float32, and their cumulative sums, float64. [C, V] each

    Float32 sums would move the borders between ids by 1e-7, and with them one draw in some millions with the order of
    the sum, which differs between machines and batches.
    """
    weights_CV = (logits_CV - logits_CV.amax(1, keepdim=True)).exp_()
    return weights_CV, weights_CV.double().cumsum_(1)
