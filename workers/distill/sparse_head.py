"""The student's LM head without [N, V] logits.

A loss on top-k ids needs 2k of a position's V logits, so only those are kept and differentiated: the head is
scanned in chunks for the student's top-k, the chosen rows are multiplied again in float32, and the backward adds to
those rows alone. A loss on whole rows runs chunk by chunk, forward and backward together, so that one chunk's
logits exist at a time.

Shape suffixes: N = positions, C = positions of a chunk, V = vocabulary, D = hidden size, K = top-k, M = chosen ids,
S = losses.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workers.ordering import exact_top_k, sort_by_logit
from workers.teacher.lm_head import LMHead, chunks, dense_is_cheaper, float32_matmul, widened

EXTRA_CANDIDATES = 8
"""Ids scanned beyond k, and k more where k is larger: the scan rounds to the compute dtype, the float32 order among
candidates decides. Over 50,000 random bfloat16 logits, 8 lose an id of the top 256 in one row of seven, 256 in none."""


def student_top_k(head: LMHead, hidden_ND: Tensor, k: int) -> Tensor:
    """Ids of the student's k highest logits in the order (-float32 logit, id). int64 [N, k]

    Scans in the hidden states' dtype for more candidates than k and rescores those in float32. A row where more ids
    than candidates tie with the scan's k-th is computed whole in float32.
    """
    num_candidates = min(k + max(k, EXTRA_CANDIDATES), head.vocab_size)
    with torch.no_grad():
        if dense_is_cheaper(num_candidates, head.vocab_size):
            return _whole_top_k(head, hidden_ND, k)
        weight_VD = head.weight_VD.to(hidden_ND.dtype)
        bias_V = None if head.bias_V is None else head.bias_V.to(hidden_ND.dtype)
        ids, unsure = [], []
        for rows in chunks(len(hidden_ND), hidden_ND.element_size() * head.vocab_size, hidden_ND.device):
            # The soft cap and a positive scale keep the order, so the scan leaves them out.
            scan_CV = torch.nn.functional.linear(hidden_ND[rows], weight_VD, bias_V)
            scanned_CM, candidates_CM = torch.topk(scan_CV, num_candidates, dim=1)
            candidates_CM = candidates_CM.sort(dim=1).values
            exact_CM = head.logits_at(hidden_ND[rows], candidates_CM)
            ids.append(sort_by_logit(exact_CM, candidates_CM)[1][:, :k])
            unsure.append(scanned_CM[:, min(k, num_candidates) - 1] == scanned_CM[:, -1])
        ids_NK = torch.cat(ids)
        unsure_U = torch.cat(unsure).nonzero().squeeze(1)
        ids_NK[unsure_U] = _whole_top_k(head, hidden_ND[unsure_U], k)
        return ids_NK


def _whole_top_k(head: LMHead, hidden_ND: Tensor, k: int) -> Tensor:
    """The same from whole rows in float32. int64 [N, k]"""
    wide_ND = hidden_ND.to(widened(hidden_ND.dtype))
    rows = chunks(len(wide_ND), 4 * head.vocab_size, wide_ND.device)
    return torch.cat([exact_top_k(head.logits(wide_ND[part]), k)[1] for part in rows])


def logits_at(head: LMHead, hidden_ND: Tensor, ids_NM: Tensor) -> Tensor:
    """The student's logits of chosen ids, differentiable in hidden states, weight and bias. float32 [N, M]"""
    products_NM: Tensor = _ChosenProducts.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head.weight_VD, head.bias_V, ids_NM
    )
    return head.finish(products_NM, None)


def row_loss(
    head: LMHead,
    hidden_ND: Tensor,
    values_of: Callable[[Tensor, slice], Iterable[Tensor]],
    groups: Sequence[slice] = (),
) -> tuple[Tensor, Tensor]:
    """Losses on whole rows of the student, summed over the positions.

    Gradients are computed with the values, while a chunk's logits exist: no logits are kept, none computed twice.

    Args:
        values_of: maps a chunk's float32 logits [C, V] and its slice of the positions to the values [C] of each loss,
            one after the other: what one needs for its gradient is gone before the next is computed.
        groups: runs of positions, one after the other, that no chunk may part.

    Returns:
        The sum of all (differentiable, scalar) and each loss's own (detached, [S]).
    """
    total, sums_S = _RowLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head.weight_VD, head.bias_V, head, values_of, groups
    )
    return total, sums_S


class _ChosenProducts(torch.autograd.Function):
    """W[ids] . h + bias[ids] in float32; the backward touches only the chosen rows of W."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_NM: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NM)
        ctx.bias_shape = None if bias_V is None else bias_V.shape
        plain = LMHead(weight_VD, bias_V)
        return plain.logits_at(hidden_ND, ids_NM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        hidden_ND, weight_VD, ids_NM = ctx.saved_tensors
        # float32, or float64 where the caller computes in it.
        grad_weight_VD = None
        if ctx.needs_input_grad[1]:
            grad_weight_VD = torch.zeros(weight_VD.shape, dtype=grad_NM.dtype, device=weight_VD.device)
        grad_hidden_ND = torch.empty(hidden_ND.shape, dtype=grad_NM.dtype, device=hidden_ND.device)
        size = hidden_ND.shape[1]
        dense = dense_is_cheaper(ids_NM.shape[1], len(weight_VD))
        wide_VD = weight_VD.to(grad_NM.dtype) if dense else weight_VD
        row_size = len(weight_VD) if dense else ids_NM.shape[1] * size
        for rows in chunks(len(ids_NM), grad_NM.element_size() * row_size):
            grad_CM, ids_CM = grad_NM[rows], ids_NM[rows]
            if dense:
                grad_CV = grad_CM.new_zeros(len(grad_CM), len(weight_VD)).scatter_add_(1, ids_CM, grad_CM)
                grad_hidden_ND[rows] = grad_CV @ wide_VD
                if grad_weight_VD is not None:
                    grad_weight_VD.addmm_(grad_CV.T, hidden_ND[rows].to(grad_NM.dtype))
                continue
            chosen_CMD = weight_VD[ids_CM].to(grad_NM.dtype)
            grad_hidden_ND[rows] = torch.bmm(grad_CM.unsqueeze(1), chosen_CMD).squeeze(1)
            if grad_weight_VD is not None:
                outer_CMD = grad_CM.unsqueeze(2) * hidden_ND[rows].to(grad_NM.dtype).unsqueeze(1)
                _add_rows(grad_weight_VD, ids_CM.flatten(), outer_CMD.view(-1, size))
        grad_bias_V = None
        if ctx.bias_shape is not None:
            grad_bias_V = grad_NM.new_zeros(ctx.bias_shape)
            _add_rows(grad_bias_V, ids_NM.flatten(), grad_NM.flatten())
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND.to(hidden_ND.dtype), grad_weight_VD, grad_bias_V, None


def _add_rows(target: Tensor, ids: Tensor, rows: Tensor) -> None:
    """target[ids] += rows, repeated ids included, in an order that is the same every time.

    On a CPU `index_add_` adds in order and `index_put_` does not; on CUDA `index_add_` uses atomics, and `index_put_`
    sorts first.
    """
    if target.is_cuda:
        target.index_put_((ids,), rows, accumulate=True)
    else:
        target.index_add_(0, ids, rows)


def _whole_groups(groups: Sequence[slice], most: int) -> Iterator[slice]:
    """Chunks of whole groups, of ``most`` positions where the groups allow it."""
    start = groups[0].start
    for group in groups:
        if group.stop - start > most and group.start > start:
            yield slice(start, group.start)
            start = group.start
    yield slice(start, groups[-1].stop)


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: LMHead,
        values_of: Callable[[Tensor, slice], Iterable[Tensor]],
        groups: Sequence[slice],
    ) -> tuple[Tensor, Tensor]:
        compute_VD = weight_VD.to(hidden_ND.dtype)
        wants_gradient = any(ctx.needs_input_grad[:3])
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        wide = widened(hidden_ND.dtype)
        grad_weight_VD = None
        if ctx.needs_input_grad[1]:
            grad_weight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
        sums = []
        # A loss of one chunk holds four (sft) to eleven (akl) tensors of its size; see ``benchmarks/losses.py``.
        slices = list(chunks(len(hidden_ND), 4 * 2 * head.vocab_size, hidden_ND.device))
        for rows in _whole_groups(groups, slices[0].stop) if groups else slices:
            products_CV = float32_matmul(hidden_ND[rows], compute_VD)
            if bias_V is not None:
                products_CV += bias_V.to(wide)
            with torch.set_grad_enabled(wants_gradient):
                products_CV.requires_grad_(wants_gradient)
                finished_CV = head.finish(products_CV, None)
                # Cut off, for each loss goes back to here on its own.
                logits_CV = finished_CV.detach().requires_grad_(wants_gradient)
                grad_CV = torch.zeros_like(logits_CV) if wants_gradient else None
                values = []
                for values_C in values_of(logits_CV, rows):
                    values.append(values_C.detach().sum())
                    if grad_CV is not None:
                        grad_CV += torch.autograd.grad(values_C.sum(), logits_CV)[0]
            sums.append(torch.stack(values))
            if grad_CV is not None:
                if finished_CV is not products_CV:
                    (grad_CV,) = torch.autograd.grad(finished_CV, products_CV, grad_CV)
                narrow_CV = grad_CV.to(hidden_ND.dtype)
                grad_hidden_ND[rows] = narrow_CV @ compute_VD
                if grad_weight_VD is not None:
                    # addmm_ adds in place: no second [V, D], and no rounding of a chunk's sum to the compute dtype.
                    grad_weight_VD.addmm_(narrow_CV.T.to(wide), hidden_ND[rows].to(wide))
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(0).to(grad_bias_V.dtype)
        ctx.weight_dtype = weight_VD.dtype
        ctx.gradients = (grad_hidden_ND, grad_weight_VD, grad_bias_V)
        sums_S = torch.stack(sums).sum(0)
        ctx.mark_non_differentiable(sums_S)
        return sums_S.sum(), sums_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("row_loss keeps its gradients for one backward only")
        grad_hidden_ND, grad_weight_VD, grad_bias_V = ctx.gradients
        # Scaled in place, for the weight's gradient is as large as the weight.
        ctx.gradients = None
        grad_hidden_ND.mul_(grad.to(grad_hidden_ND.dtype))
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.mul_(grad.to(grad_weight_VD.dtype)).to(ctx.weight_dtype)
        if grad_bias_V is not None:
            grad_bias_V.mul_(grad.to(grad_bias_V.dtype))
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, None, None, None
