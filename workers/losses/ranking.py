"""Losses on the order in which the models rank the ids at the top.

Shape suffixes: N = positions, K = the teacher's leading ids, U = both models' leading ids, P = pairs, V = vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from workers.losses.loss import Loss, Parameter, leading_of, stored_of
from workers.losses.targets import Targets

_CHUNK_ELEMENTS = 2**24
"""Of a [positions, U, U] temporary."""


def soft_rank(values_NU: Tensor, valid_NU: Tensor, eps: float) -> Tensor:
    """Blondel et al. 2020's differentiable ranks of the valid values, 1 for the lowest; 0 elsewhere. [N, U]

    values / eps projected on the permutahedron of (n, ..., 1), n the valid values of the row. Neighbours further apart
    than eps have hard ranks, and no gradient; values that are all close have ranks that move linearly.
    """
    scaled_NU = values_NU / eps
    order_NU = torch.where(valid_NU, scaled_NU, -torch.inf).argsort(dim=1, descending=True, stable=True)
    sorted_NU = scaled_NU.gather(1, order_NU)
    num_valid_N1 = valid_NU.sum(1, keepdim=True)
    place_U = torch.arange(values_NU.shape[1], device=values_NU.device)
    gap_NU = sorted_NU - (num_valid_N1 - place_U)
    fit_NU: Tensor = _NonIncreasingFit.apply(  # type: ignore[no-untyped-call]
        torch.where(place_U < num_valid_N1, gap_NU, -1e9)
    )
    ranks_NU = sorted_NU - fit_NU
    return torch.empty_like(ranks_NU).scatter(1, order_NU, ranks_NU).masked_fill(~valid_NU, 0.0)


class _NonIncreasingFit(torch.autograd.Function):
    """The non-increasing values nearest to given ones: runs of them pooled to their means. [N, U]

    Its derivative is the pooling itself, which is symmetric, so forward and backward are one matrix product.
    """

    @staticmethod
    def forward(ctx: Any, values_NU: Tensor) -> Tensor:
        parts = torch.split(values_NU, _chunk_size(values_NU))
        block_NU = torch.cat([_blocks(part_CU) for part_CU in parts])
        ctx.save_for_backward(block_NU)
        return _pooled(values_NU, block_NU)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NU: Tensor) -> Tensor:
        return _pooled(grad_NU, *ctx.saved_tensors)


def _blocks(values_NU: Tensor) -> Tensor:
    """Which values the best non-increasing fit pools, as ascending numbers of blocks: [N, U]

    By the min-max formula: the fit at r is the least, over the starts up to r, of the greatest mean up to an end from
    r on. All rows at once, in O(U^2), where pooling neighbours one by one would be a loop over rows.
    """
    size = values_NU.shape[1]
    sums_NU = F.pad(values_NU, (1, 0)).cumsum(1)
    place_U = torch.arange(size, device=values_NU.device)
    length_UU = place_U.unsqueeze(0) - place_U.unsqueeze(1) + 1  # [start, end]
    mean_NUU = (sums_NU[:, None, 1:] - sums_NU[:, :-1, None]) / length_UU.clamp_min(1)
    mean_NUU = mean_NUU.masked_fill(length_UU < 1, -torch.inf)
    greatest_NUU = mean_NUU.flip(2).cummax(2).values.flip(2)  # [start, r]: the greatest mean of an end from r on
    greatest_NUU = greatest_NUU.masked_fill(length_UU < 1, torch.inf)
    fit_NU = greatest_NUU.amin(1)
    return F.pad((fit_NU[:, 1:] != fit_NU[:, :-1]).long(), (1, 0)).cumsum(1)


def _pooled(values_NU: Tensor, block_NU: Tensor) -> Tensor:
    """Each value's block's mean. [N, U] By products, because scattered sums have no fixed order on CUDA."""
    parts = []
    size = _chunk_size(values_NU)
    for values_CU, block_CU in zip(torch.split(values_NU, size), torch.split(block_NU, size), strict=True):
        same_CUU = (block_CU.unsqueeze(2) == block_CU.unsqueeze(1)).to(values_CU.dtype)
        parts.append((same_CUU @ values_CU.unsqueeze(2)).squeeze(2) / same_CUU.sum(2))
    return torch.cat(parts)


def _chunk_size(values_NU: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, values_NU.shape[1] ** 2))


def rank_loss(targets: Targets, *, k: int, eps: float, **_: object) -> Tensor:
    """1 - correlation of both models' soft ranks over the union of their top-k; 0 where a model ranks all alike."""
    led, own = targets.teacher_first(k), targets.student_first(k)
    repeated_NK = (own.ids_NK.unsqueeze(2) == led.ids_NK.unsqueeze(1)).any(2)
    valid_NU = torch.cat([torch.ones_like(led.ids_NK, dtype=torch.bool), ~repeated_NK], dim=1)
    ranks = (
        soft_rank(torch.cat([led.teacher_NK, own.teacher_NK], dim=1), valid_NU, eps),
        soft_rank(torch.cat([led.student_NK, own.student_NK], dim=1), valid_NU, eps),
    )
    teacher_NU, student_NU = (_centred(rank_NU, valid_NU) for rank_NU in ranks)
    flat_N = _is_flat(ranks[0], teacher_NU) | _is_flat(ranks[1], student_NU)
    spread_N = teacher_NU.square().sum(1) * student_NU.square().sum(1)
    correlation_N = (teacher_NU * student_NU).sum(1) / torch.where(flat_N, 1.0, spread_N).sqrt()
    return torch.where(flat_N, 0.0, 1.0 - correlation_N)


def _centred(ranks_NU: Tensor, valid_NU: Tensor) -> Tensor:
    """The valid ranks less their mean, 0 elsewhere. [N, U]"""
    mean_N1 = (ranks_NU * valid_NU).sum(1, keepdim=True) / valid_NU.sum(1, keepdim=True)
    return torch.where(valid_NU, ranks_NU - mean_N1, 0.0)


def _is_flat(ranks_NU: Tensor, centred_NU: Tensor) -> Tensor:
    """Whether the ranks differ by no more than their rounding. [N]"""
    rounding_N = 2 * torch.finfo(ranks_NU.dtype).eps * ranks_NU.detach().abs().amax(1)
    return centred_NU.detach().abs().amax(1) <= rounding_N


def overlap(teacher_ids_NK: Tensor, student_ids_NK: Tensor) -> Tensor:
    """The share of k ids that both models lead with, as RLKD's dynamic factor. float32 [N]"""
    return (student_ids_NK.unsqueeze(2) == teacher_ids_NK.unsqueeze(1)).any(2).float().mean(1)


def _pairs(leading_NK: Tensor, logsumexp_N: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs a < b of the teacher's order: columns of a and b [P], p_a - p_b [N, P], and which count [N, P]."""
    first_P, second_P = torch.triu_indices(leading_NK.shape[1], leading_NK.shape[1], 1, device=leading_NK.device)
    p_NK = (leading_NK - logsumexp_N.unsqueeze(1)).exp()
    lead_NP = p_NK[:, first_P] - p_NK[:, second_P]
    return first_P, second_P, lead_NP, (lead_NP > eps) & (p_NK[:, second_P] > eps)


def num_pairs(leading_NK: Tensor, logsumexp_N: Tensor, *, k: int, eps: float, **_: object) -> Tensor:
    """How many pairs of the teacher's top-k it tells apart. [N]"""
    return _pairs(leading_NK[:, :k], logsumexp_N, eps)[3].sum(1)


def _logsumexp(targets: Targets) -> Tensor:
    assert targets.teacher_led is not None
    return torch.logaddexp(targets.teacher_led.teacher_NK.logsumexp(1), targets.tails[1.0])


def logistic_ranking(targets: Targets, *, k: int, eps: float) -> Tensor:
    led = targets.teacher_first(k)
    first_P, second_P, _, counts_NP = _pairs(led.teacher_NK, _logsumexp(targets), eps)
    lead_NP = led.student_NK[:, first_P] - led.student_NK[:, second_P]
    return (F.softplus(-lead_NP) * counts_NP).sum(1)


def hinge(targets: Targets, *, k: int, margin: float | None, eps: float) -> Tensor:
    led = targets.teacher_first(k)
    first_P, second_P, lead_NP, counts_NP = _pairs(led.teacher_NK, _logsumexp(targets), eps)
    q_NK = (led.student_NK - targets.student_row().logsumexp(1, keepdim=True)).exp()
    wanted_NP = lead_NP if margin is None else margin
    return (F.relu(wanted_NP - (q_NK[:, first_P] - q_NK[:, second_P])) * counts_NP).sum(1)


def _tells_apart(default: float) -> Parameter:
    return Parameter(
        default, "least probability, and least difference of two, that counts as the teacher's", 1e-12, 1.0
    )


LOSSES = (
    Loss(
        "rank_loss",
        rank_loss,
        frozenset({"top_k", "lookups"}),
        "RLKD (Peng et al. 2025), eq. 1",
        "the order of both models' peaks; beside a logit loss, as 2*rank_loss+kl",
        {
            "k": leading_of(5, 2, 64, " of each model; RLKD takes 15 where it stands alone"),
            "eps": Parameter(1.0, "logit distance from which two ranks are hard", 1e-3, 1e3),
            "dynamic": Parameter(
                False, "multiply the other losses of the sum by the share of the top-k that both models lead with"
            ),
        },
        student_led=True,
        weighs_others="dynamic",
    ),
    Loss(
        "logistic_ranking",
        logistic_ranking,
        frozenset({"top_k", "logsumexp"}),
        "DistillKit, logistic ranking",
        "the order of the teacher's top-k pair by pair, whatever the distances",
        {"k": stored_of(64, 128), "eps": _tells_apart(1e-9)},
        weights=num_pairs,
    ),
    Loss(
        "hinge",
        hinge,
        frozenset({"top_k", "logsumexp"}),
        "DistillKit, hinge ranking",
        "the same with a margin in probability, so that pairs far enough apart rest",
        {
            "k": stored_of(64, 128),
            "margin": Parameter(
                None, "distance in probability that is enough; none asks for the teacher's", 0.0, 1.0, optional="float"
            ),
            "eps": _tells_apart(1e-8),
        },
        student_row=True,
        weights=num_pairs,
    ),
)
