"""Losses from vision that treat one class apart, or temper each row by its own spread.

Shape suffixes: N = positions, V = vocabulary.
"""

import torch
from torch import Tensor

from workers.losses.divergences import kl_divergence
from workers.losses.loss import FULL_ROW, Loss, Parameter, temperature_of
from workers.losses.targets import Targets

_OUT_OF_THE_WAY = -1e9
"""A logit without probability. Finite, so that what it is multiplied with 0 stays a number."""


def without(row_NV: Tensor, ids_N: Tensor) -> Tensor:
    """The rows in which one id each has no probability. [N, V]"""
    return row_NV.scatter(1, ids_N.unsqueeze(1), _OUT_OF_THE_WAY)


def _decoupled(teacher_NV: Tensor, student_NV: Tensor, ids_N: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha KL of {the id, the others} + beta KL among the others, of logits already tempered. [N]"""
    others = without(teacher_NV, ids_N), without(student_NV, ids_N)

    def target_or_not(row_NV: Tensor, others_NV: Tensor) -> Tensor:
        return torch.cat([row_NV.gather(1, ids_N.unsqueeze(1)), others_NV.logsumexp(1, keepdim=True)], 1).log_softmax(1)

    of_target_N = kl_divergence(target_or_not(teacher_NV, others[0]), target_or_not(student_NV, others[1]))
    of_others_N = kl_divergence(*(others_NV.log_softmax(1) for others_NV in others))
    return alpha * of_target_N + beta * of_others_N


def _spread(row_NV: Tensor, t_norm: float) -> Tensor:
    """A row's own temperature: its unbiased standard deviation times t_norm; above 0 for logits all alike. [N, 1]"""
    return t_norm * row_NV.var(1, keepdim=True).clamp_min(torch.finfo(row_NV.dtype).tiny).sqrt()


def dkd(targets: Targets, *, alpha: float, beta: float, temperature: float) -> Tensor:
    teacher_NV, student_NV = targets.rows()
    values_N = _decoupled(teacher_NV / temperature, student_NV / temperature, targets.labels(), alpha, beta)
    return temperature**2 * values_N


def dkd_norm(targets: Targets, *, alpha: float, beta: float, t_norm: float) -> Tensor:
    teacher_NV, student_NV = targets.rows()
    teacher_N1, student_N1 = _spread(teacher_NV, t_norm), _spread(student_NV, t_norm)
    values_N = _decoupled(teacher_NV / teacher_N1, student_NV / student_N1, targets.labels(), alpha, beta)
    return teacher_N1.squeeze(1).square() * values_N


def _normalised(targets: Targets, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """-p_y log q_y of an id, and the cross entropy of the others at a temperature. [N] each"""
    teacher_NV, student_NV = targets.rows()
    ids_N1 = ids_N.unsqueeze(1)
    p_N1, log_q_N1 = teacher_NV.softmax(1).gather(1, ids_N1), student_NV.log_softmax(1).gather(1, ids_N1)
    p_NV = without(teacher_NV / temperature, ids_N).softmax(1)
    log_q_NV = without(student_NV / temperature, ids_N).log_softmax(1)
    return -(p_N1 * log_q_N1).squeeze(1), -(p_NV * log_q_NV).sum(1)


def nkd(targets: Targets, *, gamma: float, temperature: float) -> Tensor:
    of_target_N, of_others_N = _normalised(targets, targets.labels(), temperature)
    return of_target_N + gamma * temperature**2 * of_others_N


def nkd_bild(targets: Targets, *, gamma: float, temperature: float) -> Tensor:
    """Around the teacher's likeliest id (of several, the lowest), and without temperature squared."""
    likeliest_N = targets.rows()[0].argmax(1)
    of_target_N, of_others_N = _normalised(targets, likeliest_N, temperature)
    return of_target_N + gamma * of_others_N


def normkd(targets: Targets, *, t_norm: float) -> Tensor:
    teacher_NV, student_NV = targets.rows()
    teacher_N1, student_N1 = _spread(teacher_NV, t_norm), _spread(student_NV, t_norm)
    values_N = kl_divergence((teacher_NV / teacher_N1).log_softmax(1), (student_NV / student_N1).log_softmax(1))
    return teacher_N1.squeeze(1).square() * values_N


def _t_norm(default: float) -> Parameter:
    return Parameter(default, "temperature of a row per standard deviation of its logits", minimum=1e-3)


def _weight(default: float, of: str) -> Parameter:
    return Parameter(default, f"weight of {of}", minimum=0.0)


LOSSES = (
    Loss(
        "dkd",
        dkd,
        FULL_ROW,
        "DKD (Zhao et al. 2022), eq. 7",
        "weighs the label against the others, and the others among themselves, apart",
        {
            "alpha": _weight(1.0, "the label against the others"),
            "beta": _weight(8.0, "the others among themselves"),
            "temperature": temperature_of(4.0),
        },
        student_row=True,
        reads_label=True,
    ),
    Loss(
        "dkd_norm",
        dkd_norm,
        FULL_ROW,
        "BiLD thesis's code: DKD with NormKD's temperatures",
        "what the thesis's table calls DKD",
        {
            "alpha": _weight(0.5, "the label against the others"),
            "beta": _weight(0.5, "the others among themselves"),
            "t_norm": _t_norm(3.0),
        },
        student_row=True,
        reads_label=True,
    ),
    Loss(
        "nkd",
        nkd,
        FULL_ROW,
        "NKD (Yang et al. 2023), eq. 6",
        "the label by the teacher's confidence, the others renormalised",
        {"gamma": _weight(1.5, "the others"), "temperature": temperature_of(1.0)},
        student_row=True,
        reads_label=True,
    ),
    Loss(
        "nkd_bild",
        nkd_bild,
        FULL_ROW,
        "BiLD thesis's code: NKD around the teacher's likeliest id",
        "what the thesis's table calls NKD",
        {"gamma": _weight(0.25, "the others"), "temperature": temperature_of(3.0)},
        student_row=True,
    ),
    Loss(
        "normkd",
        normkd,
        FULL_ROW,
        "NormKD (Chi et al. 2023), eq. 6",
        "one softness for all positions: each row is tempered by its own spread",
        {"t_norm": _t_norm(2.0)},
        student_row=True,
    ),
)
