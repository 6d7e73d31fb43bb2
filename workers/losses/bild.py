"""Bi-directional logits difference: match how the leader's top logits stand to each other, not what they are.

From the thesis "BiLD: Bi-directional Logits Difference Loss for Large Language Model Distillation" (eqs. 3.4-3.10).
With i_1..i_k the leader's k highest ids in order, each model's differences are d_mn = (z[i_m] - z[i_n]) / T for
m < n, its distribution the softmax of d over the k(k-1)/2 pairs, and the loss KL(teacher || student): t-LD where
the teacher leads, s-LD where the student does. No factor T squared. Adding a constant to a row changes nothing, so
log-probabilities serve as well as logits. For k < 3 there is at most one pair and the loss is identically zero.

The pairs need not be made. With F(x) = log sum over m < n of exp(x_m - x_n), the distribution over pairs is an
exponential family in x whose log-normaliser is F, so the KL is F's Bregman divergence (a: teacher, b: student):

    KL = F(b) - F(a) - <grad F(a), b - a>,    its gradient in b: grad F(b) - grad F(a),

and two running log-sum-exps give F and its gradient in O(k).

Shape suffixes: N = positions, K = leading ids, P = pairs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workers.losses.divergences import kl_divergence
from workers.losses.loss import Loss, leading_of, temperature_of
from workers.losses.targets import Targets, TopK

DEFAULT_K = 8
PAIRS_UP_TO = 12
"""Largest k for which making the pairs is faster; see ``benchmarks/bild.py``."""


def logits_difference(led: TopK, temperature: float) -> Tensor:
    """One half of BiLD, by the form that is faster for its k. [N], differentiable in the student's logits alone"""
    num_ids = led.student_NK.shape[1]
    if num_ids < 3:
        return led.student_NK.sum(dim=1) * 0.0
    form = over_pairs if num_ids <= PAIRS_UP_TO else as_bregman
    return form(led.teacher_NK / temperature, led.student_NK / temperature)


def over_pairs(teacher_NK: Tensor, student_NK: Tensor) -> Tensor:
    """The definition, in O(k^2) time and memory, of logits already divided by the temperature. [N]"""
    num_ids = student_NK.shape[1]
    first, second = torch.triu_indices(num_ids, num_ids, 1, device=student_NK.device)
    teacher_NP = teacher_NK[:, first] - teacher_NK[:, second]
    student_NP = student_NK[:, first] - student_NK[:, second]
    return kl_divergence(teacher_NP.log_softmax(1), student_NP.log_softmax(1))


def as_bregman(teacher_NK: Tensor, student_NK: Tensor) -> Tensor:
    """The same in O(k). [N]"""
    value_N: Tensor = _Bregman.apply(teacher_NK, student_NK)  # type: ignore[no-untyped-call]
    return value_N


class _Bregman(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher_NK: Tensor, student_NK: Tensor) -> Tensor:
        dtype = student_NK.dtype
        # F grows with the logits while their differences do not: in float32 the value would lose what the pairs keep.
        teacher_NK, student_NK = teacher_NK.double(), student_NK.double()
        teacher_N, teacher_gradient_NK = _log_normaliser(teacher_NK)
        student_N, student_gradient_NK = _log_normaliser(student_NK)
        ctx.save_for_backward((student_gradient_NK - teacher_gradient_NK).to(dtype))
        value_N = student_N - teacher_N - (teacher_gradient_NK * (student_NK - teacher_NK)).sum(1)
        return value_N.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[None, Tensor]:
        (gradient_NK,) = ctx.saved_tensors
        return None, grad_N.unsqueeze(1) * gradient_NK


def _log_normaliser(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """F(x) and its gradient: the probability that an id stands first in the pair, less that it stands second.

    Running log-sum-exps, for the follower's logits come in any order: no shift by one maximum is safe for all pairs.
    """
    before_NK = x_NK.logcumsumexp(1)
    after_NK = (-x_NK).flip(1).logcumsumexp(1).flip(1)
    as_first_NK = x_NK[:, :-1] + after_NK[:, 1:]
    value_N = as_first_NK.logsumexp(1)
    gradient_NK = torch.zeros_like(x_NK)
    gradient_NK[:, :-1] = (as_first_NK - value_N.unsqueeze(1)).exp()
    gradient_NK[:, 1:] -= (before_NK[:, :-1] - x_NK[:, 1:] - value_N.unsqueeze(1)).exp()
    return value_N, gradient_NK


def t_ld(targets: Targets, *, k: int, temperature: float) -> Tensor:
    return logits_difference(targets.teacher_first(k), temperature)


def s_ld(targets: Targets, *, k: int, temperature: float) -> Tensor:
    return logits_difference(targets.student_first(k), temperature)


def bild(targets: Targets, *, k: int, temperature: float) -> Tensor:
    return t_ld(targets, k=k, temperature=temperature) + s_ld(targets, k=k, temperature=temperature)


_PARAMETERS = {
    "k": leading_of(DEFAULT_K, 3, note="; the loss is identically zero below k = 3"),
    "temperature": temperature_of(3.0),
}

LOSSES = (
    Loss(
        "bild",
        bild,
        frozenset({"top_k", "lookups"}),
        "BiLD thesis, eq. 3.10",
        "the ranking inside both models' top-k, free of the long tail; the default",
        _PARAMETERS,
        student_led=True,
    ),
    Loss(
        "t_ld",
        t_ld,
        frozenset({"top_k"}),
        "BiLD thesis, eq. 3.8",
        "the teacher-led half of BiLD; needs no lookups",
        _PARAMETERS,
    ),
    Loss(
        "s_ld",
        s_ld,
        frozenset({"lookups"}),
        "BiLD thesis, eq. 3.9",
        "the student-led half of BiLD: corrects what the student wrongly ranks high",
        _PARAMETERS,
        student_led=True,
    ),
    Loss(
        "bild_total",
        bild,
        frozenset({"top_k", "lookups", "full_row"}),
        "BiLD thesis, section 4.3, as its code trained",
        "the thesis's whole objective: BiLD on the response, KL at temperature 1 on the prompt (--positions all)",
        _PARAMETERS,
        student_led=True,
        prompt=("kl", {"temperature": 1.0}),
    ),
)
