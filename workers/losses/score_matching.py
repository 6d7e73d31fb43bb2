"""Losses on logits themselves, without a softmax between the models.

Shape suffixes: N = positions, V = vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.losses.loss import FULL_ROW, Loss, Parameter
from workers.losses.targets import Targets


def weighting(by: str, targets: Targets, temperature: float) -> Tensor:
    """Weights over the vocabulary that sum to 1, constant: the Student's or Teacher's softmax, or Uniform. [N, V]"""
    teacher_NV, student_NV = targets.rows()
    if by == "U":
        return torch.full_like(teacher_NV, 1.0 / teacher_NV.shape[1])
    return ((student_NV.detach() if by == "S" else teacher_NV) / temperature).softmax(1)


def csd(targets: Targets, *, w1: str, w2: str, temperature: float) -> Tensor:
    """Half the sum over pairs (x, y) of w1(y) w2(x) (d_x - d_y)^2 with d = student - teacher, in O(V).

    The value is this objective. The authors' code has a surrogate whose value means nothing and whose gradient is half
    of this one's.
    """
    teacher_NV, student_NV = targets.rows()
    first_NV, second_NV = weighting(w1, targets, temperature), weighting(w2, targets, temperature)
    gap_NV = student_NV - teacher_NV
    # The pairs do not see a constant; without it the squares do not cancel.
    gap_NV = gap_NV - (first_NV * gap_NV).sum(1, keepdim=True).detach()
    squares_N = ((first_NV + second_NV) * gap_NV.square()).sum(1)
    return 0.5 * squares_N - (first_NV * gap_NV).sum(1) * (second_NV * gap_NV).sum(1)


def dld(targets: Targets, *, w: str, normalize: str, temperature: float) -> Tensor:
    teacher_NV, student_NV = targets.rows()
    gap_NV = _normalised(student_NV, normalize) - _normalised(teacher_NV, normalize)
    return 0.25 * (weighting(w, targets, temperature) * gap_NV.square()).sum(1)


def _normalised(row_NV: Tensor, how: str) -> Tensor:
    if how == "mean":
        return row_NV - row_NV.mean(1, keepdim=True)
    if how == "min":
        return row_NV - row_NV.amin(1, keepdim=True)
    if how == "max":
        return row_NV - row_NV.amax(1, keepdim=True)
    if how == "std":
        return (row_NV - row_NV.mean(1, keepdim=True)) / (row_NV.std(1, keepdim=True) + _TINY)
    if how == "range":
        low_N1, high_N1 = row_NV.amin(1, keepdim=True), row_NV.amax(1, keepdim=True)
        return 2.0 * (row_NV - low_N1) / (high_N1 - low_N1 + _TINY) - 1.0
    return row_NV


_TINY = 1e-9
_IN_WEIGHTS = Parameter(1.0, "divides the logits in the weights", minimum=1e-3, maximum=1e3)
_BY = "S the student's softmax, T the teacher's, U uniform"
_CSD = "Concrete Score Distillation (Kim et al. 2025), eq. 6"


def _weights(w1: str, w2: str) -> Mapping[str, Parameter]:
    return {
        "w1": Parameter(w1, f"weights of one id of a pair: {_BY}", choices=("S", "T", "U")),
        "w2": Parameter(w2, f"weights of the other: {_BY}", choices=("S", "T", "U")),
        "temperature": _IN_WEIGHTS,
    }


LOSSES = (
    Loss(
        "csd",
        csd,
        FULL_ROW,
        _CSD,
        "matches logit differences over all pairs of ids, free of softmax and of a row's constant",
        _weights("S", "S"),
        student_row=True,
    ),
    Loss(
        "csd_mode_seeking",
        csd,
        FULL_ROW,
        f"{_CSD}, weights (S, S)",
        "csd that corrects what the student believes in: instruction following",
        _weights("S", "S"),
        student_row=True,
    ),
    Loss(
        "csd_mode_covering",
        csd,
        FULL_ROW,
        f"{_CSD}, weights (T, S)",
        "csd that also covers what the teacher believes in: single tasks",
        _weights("T", "S"),
        student_row=True,
    ),
    Loss(
        "dld",
        dld,
        FULL_ROW,
        "Concrete Score Distillation (Kim et al. 2025), table 5",
        "squared error of logits, the constant of a row included: what csd is compared with",
        {
            "w": Parameter("S", f"weights of the ids: {_BY}", choices=("S", "T", "U")),
            "normalize": Parameter(
                "no", "how each model's row is normalised first", choices=("no", "mean", "min", "max", "std", "range")
            ),
            "temperature": _IN_WEIGHTS,
        },
        student_row=True,
    ),
)
