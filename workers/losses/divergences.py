"""Divergences of the teacher's distribution p and the student's q.

The functions named for a divergence work on log-probabilities over whatever X is: the vocabulary, a top-k, a top-k
with one bucket for the rest, pairs of ids. Those named as in the catalogue apply them to whole rows.

Shape suffixes: N = positions, X = the atoms of the distributions, V = vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from workers.losses.loss import FULL_ROW, T_SQUARED, Loss, Parameter, Params, temperature_of
from workers.losses.targets import Targets

_NEAR_ZERO = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Exponents below it are taken for 0: the general form divides by them what has cancelled."""


def kl_divergence(log_p_NX: Tensor, log_q_NX: Tensor) -> Tensor:
    """KL(p || q) per row, in nats. [N]"""
    return (log_p_NX.exp() * (log_p_NX - log_q_NX)).sum(1)


def generalized_jsd(log_p_NX: Tensor, log_q_NX: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. [N]

    At beta = 0 and 1 it is KL(p || q) and KL(q || p) by definition, not by continuity: there the formula's limit is 0.
    """
    if beta == 0.0:
        return kl_divergence(log_p_NX, log_q_NX)
    if beta == 1.0:
        return kl_divergence(log_q_NX, log_p_NX)
    log_m_NX = _mixture(log_p_NX, log_q_NX, beta)
    return beta * kl_divergence(log_p_NX, log_m_NX) + (1.0 - beta) * kl_divergence(log_q_NX, log_m_NX)


def total_variation(log_p_NX: Tensor, log_q_NX: Tensor) -> Tensor:
    """Half the sum of |p - q|. [N]"""
    return 0.5 * (log_p_NX.exp() - log_q_NX.exp()).abs().sum(1)


def ab_divergence(log_p_NX: Tensor, log_q_NX: Tensor, alpha: float, beta: float) -> Tensor:
    """Cichocki's alpha-beta divergence, with its limits where alpha, beta or their sum is 0. [N]

    (1, 0) is KL(p || q), (0, 1) is KL(q || p), (0.5, 0.5) four times the squared Hellinger distance.
    """
    log_ratio_NX = log_p_NX - log_q_NX
    total = alpha + beta
    near_zero = _NEAR_ZERO[log_ratio_NX.dtype]
    alpha, beta, total = (0.0 if abs(value) < near_zero else value for value in (alpha, beta, total))
    if alpha == 0.0 and beta == 0.0:
        return 0.5 * log_ratio_NX.square().sum(1)
    if alpha == 0.0:
        terms_NX = (beta * log_q_NX).exp() * (-beta * log_ratio_NX - 1.0) + (beta * log_p_NX).exp()
        return terms_NX.sum(1) / beta**2
    if beta == 0.0:
        terms_NX = (alpha * log_p_NX).exp() * (alpha * log_ratio_NX - 1.0) + (alpha * log_q_NX).exp()
        return terms_NX.sum(1) / alpha**2
    if total == 0.0:
        return (torch.expm1(alpha * log_ratio_NX) - alpha * log_ratio_NX).sum(1) / alpha**2
    terms_NX = (
        (alpha * log_p_NX + beta * log_q_NX).exp()
        - alpha / total * (total * log_p_NX).exp()
        - beta / total * (total * log_q_NX).exp()
    )
    return -terms_NX.sum(1) / (alpha * beta)


def _mixture(log_p_NX: Tensor, log_q_NX: Tensor, share_of_p: float) -> Tensor:
    """Log-probabilities of share p + (1 - share) q."""
    return torch.logaddexp(log_p_NX + math.log(share_of_p), log_q_NX + math.log1p(-share_of_p))


def _log_rows(targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    teacher_NV, student_NV = targets.rows()
    return (teacher_NV / temperature).log_softmax(1), (student_NV / temperature).log_softmax(1)


def t_squared(temperature: float, wanted: bool) -> float:
    return temperature**2 if wanted else 1.0


def kl(targets: Targets, *, temperature: float, T2: bool) -> Tensor:
    return t_squared(temperature, T2) * kl_divergence(*_log_rows(targets, temperature))


def rkl(targets: Targets, *, temperature: float, T2: bool) -> Tensor:
    log_p_NV, log_q_NV = _log_rows(targets, temperature)
    return t_squared(temperature, T2) * kl_divergence(log_q_NV, log_p_NV)


def gjsd(targets: Targets, *, beta: float, temperature: float, T2: bool) -> Tensor:
    return t_squared(temperature, T2) * generalized_jsd(*_log_rows(targets, temperature), beta)


def skl(targets: Targets, *, alpha: float, temperature: float) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q)"""
    log_p_NV, log_q_NV = _log_rows(targets, temperature)
    return kl_divergence(log_p_NV, _mixture(log_p_NV, log_q_NV, alpha))


def srkl(targets: Targets, *, alpha: float, temperature: float) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q), through both q"""
    log_p_NV, log_q_NV = _log_rows(targets, temperature)
    return kl_divergence(log_q_NV, _mixture(log_p_NV, log_q_NV, 1.0 - alpha))


def tvd(targets: Targets, *, temperature: float) -> Tensor:
    return total_variation(*_log_rows(targets, temperature))


def akl(targets: Targets, *, mu: float, temperature: float) -> Tensor:
    """h KL(p || q) + (1 - h) KL(q || p), h the head's share of the sum of |p - q|; no gradient through h.

    The head: the teacher's likeliest ids while their masses sum to mu at most, and the likeliest in any case.
    """
    log_p_NV, log_q_NV = _log_rows(targets, temperature)
    with torch.no_grad():
        p_NV, order_NV = log_p_NV.exp().sort(dim=1, descending=True, stable=True)
        gap_NV = (p_NV - log_q_NV.exp().gather(1, order_NV)).abs()
        in_head_NV = p_NV.cumsum(1) <= mu
        in_head_NV[:, 0] = True
        head_N = (gap_NV * in_head_NV).sum(1) / gap_NV.sum(1).clamp_min(torch.finfo(gap_NV.dtype).tiny)
    return head_N * kl_divergence(log_p_NV, log_q_NV) + (1.0 - head_N) * kl_divergence(log_q_NV, log_p_NV)


def taid(targets: Targets, *, t: float | None, form: str, temperature: float, t_start: float, t_end: float) -> Tensor:
    """The student against a target between it and the teacher: softmax of (1 - t) student + t teacher, constant."""
    teacher_NV, student_NV = targets.rows()
    share = t_start if t is None else t
    log_mix_NV = (((1.0 - share) * student_NV.detach() + share * teacher_NV) / temperature).log_softmax(1)
    log_q_NV = (student_NV / temperature).log_softmax(1)
    if form == "kl":
        return kl_divergence(log_mix_NV, log_q_NV)
    return -(log_mix_NV.exp() * log_q_NV).sum(1)


def abdiv(targets: Targets, *, alpha: float, beta: float, temperature: float) -> Tensor:
    return ab_divergence(*_log_rows(targets, temperature), alpha, beta)


def _of_rows(
    name: str,
    values: Callable[..., Tensor],
    source: str,
    reason: str,
    *,
    tail_form: tuple[str, Params] | None = None,
    moves: str = "",
    **parameters: Parameter,
) -> Loss:
    return Loss(name, values, FULL_ROW, source, reason, parameters, student_row=True, tail_form=tail_form, moves=moves)


LOSSES = (
    _of_rows(
        "kl",
        kl,
        "Hinton et al. 2015, eq. 1",
        "the classic: match the whole distribution, tail included",
        tail_form=("tail_gjsd", {"beta": 0.0}),
        temperature=temperature_of(3.0),
        T2=T_SQUARED,
    ),
    _of_rows(
        "rkl",
        rkl,
        "MiniLLM (Gu et al. 2024), eq. 2, per token",
        "mode-seeking: a student too small for the teacher's spread drops its minor modes",
        tail_form=("tail_gjsd", {"beta": 1.0}),
        temperature=temperature_of(3.0),
        T2=T_SQUARED,
    ),
    _of_rows(
        "gjsd",
        gjsd,
        "GKD (Agarwal et al. 2024), eq. 1",
        "bounded, and anywhere between forward and reverse KL",
        tail_form=("tail_gjsd", {}),
        beta=Parameter(0.5, "the teacher's share of the mixture; 0 is forward KL, 1 is reverse KL", 0.0, 1.0),
        temperature=temperature_of(1.0),
        T2=T_SQUARED,
    ),
    _of_rows(
        "skl",
        skl,
        "DistiLLM (Ko et al. 2024), eq. 3",
        "forward KL whose gradient stays bounded where the student has no mass",
        alpha=Parameter(0.1, "the teacher's share of the mixture", 1e-6, 1 - 1e-6),
        temperature=temperature_of(1.0),
    ),
    _of_rows(
        "srkl",
        srkl,
        "DistiLLM (Ko et al. 2024), section 3.1",
        "reverse KL whose gradient stays bounded where the teacher has no mass",
        alpha=Parameter(0.1, "the student's share of the mixture", 1e-6, 1 - 1e-6),
        temperature=temperature_of(1.0),
    ),
    _of_rows(
        "tvd",
        tvd,
        "f-DISTILL (Wen et al. 2023), eq. 7",
        "symmetric and bounded, so single tokens cannot dominate",
        tail_form=("tail_tvd", {}),
        temperature=temperature_of(1.0),
    ),
    _of_rows(
        "akl",
        akl,
        "Adaptive KL (Wu et al. 2025), eq. 12",
        "forward KL where the head is off, reverse KL where the tail is",
        mu=Parameter(0.5, "mass of the teacher's head", 0.0, 1.0),
        temperature=temperature_of(1.0),
    ),
    _of_rows(
        "taid",
        taid,
        "TAID (Shing et al. 2025), eqs. 3-6",
        "a target that moves from the student to the teacher: for a student far behind",
        moves="t",
        t=Parameter(
            None, "the teacher's share of the target; none lets it grow as the student learns", 0.0, 1.0,
            optional="float",
        ),
        form=Parameter("ce", "cross entropy as published, or the KL of the same gradient", choices=("ce", "kl")),
        temperature=temperature_of(1.0),
        t_start=Parameter(0.4, "where t starts to grow", 0.0, 1.0),
        t_end=Parameter(1.0, "what t never exceeds", 0.0, 1.0),
    ),
    _of_rows(
        "abdiv",
        abdiv,
        "ABKD (Wang et al. 2025), eq. 7",
        "two knobs between forward KL (1, 0), reverse KL (0, 1) and Hellinger (0.5, 0.5)",
        alpha=Parameter(0.2, "the teacher's exponent", -1.0, 2.0),
        beta=Parameter(0.7, "the student's exponent", -1.0, 2.0),
        temperature=temperature_of(1.0),
    ),
)  # fmt: skip
