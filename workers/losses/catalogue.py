"""Every loss by name: what it computes, what it needs of the teacher, where it comes from, why to choose it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from workers.losses.bild import logits_difference
from workers.losses.divergences import kl_divergence
from workers.losses.targets import Targets, TopK

Need = Literal["top_k", "lookups", "full_row"]
"""top_k: the teacher's stored ids and logits. lookups: its logits at the student's ids. full_row: its whole row."""
Value = int | float | bool
Params = Mapping[str, Value]


@dataclass(frozen=True)
class Parameter:
    default: Value
    minimum: float
    meaning: str
    at_most_stored: bool = False
    """Whether the default shrinks to the ids the cache stores; what is asked for by name never does."""


@dataclass(frozen=True)
class Loss:
    name: str
    values: Callable[[Targets, Params], Tensor]
    """Per-position values, float32 [N], unreduced."""
    needs: frozenset[Need]
    student_row: bool
    """Whether it reads the student's whole row; otherwise only the logits at the leading ids."""
    source: str
    reason: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


def _teacher_led(targets: Targets, params: Params) -> TopK:
    assert targets.teacher_led is not None
    return targets.teacher_led.first(int(params["k"]))


def _student_led(targets: Targets, params: Params) -> TopK:
    assert targets.student_led is not None
    return targets.student_led.first(int(params["k"]))


def _t_ld(targets: Targets, params: Params) -> Tensor:
    return logits_difference(_teacher_led(targets, params), params["temperature"])


def _s_ld(targets: Targets, params: Params) -> Tensor:
    return logits_difference(_student_led(targets, params), params["temperature"])


def _bild(targets: Targets, params: Params) -> Tensor:
    return _t_ld(targets, params) + _s_ld(targets, params)


def _topk_kl(targets: Targets, params: Params) -> Tensor:
    led, temperature = _teacher_led(targets, params), params["temperature"]
    return kl_divergence(led.teacher_NK / temperature, led.student_NK / temperature)


def _rows(targets: Targets, params: Params) -> tuple[Tensor, Tensor, float]:
    assert targets.teacher_row_NV is not None
    assert targets.student_row_NV is not None
    temperature = params["temperature"]
    scale = float(temperature) ** 2 if params["T2"] else 1.0
    return targets.teacher_row_NV / temperature, targets.student_row_NV / temperature, scale


def _kl(targets: Targets, params: Params) -> Tensor:
    teacher_NV, student_NV, scale = _rows(targets, params)
    return scale * kl_divergence(teacher_NV, student_NV)


def _rkl(targets: Targets, params: Params) -> Tensor:
    teacher_NV, student_NV, scale = _rows(targets, params)
    return scale * kl_divergence(student_NV, teacher_NV)


def _sft(targets: Targets, params: Params) -> Tensor:
    assert targets.student_row_NV is not None
    assert targets.labels_N is not None
    return F.cross_entropy(targets.student_row_NV, targets.labels_N, reduction="none")


_TEMPERATURE_3 = Parameter(3.0, 1e-3, "divides the logits of both models")
_T2 = Parameter(False, 0, "multiply by temperature squared, to keep gradients of one size over temperatures")
_K_8 = Parameter(8, 3, "leading ids compared; the loss is identically zero below k = 3")
_K_1024 = Parameter(
    1024, 2, "leading ids compared; as many as the cache stores where it stores fewer", at_most_stored=True
)
_THESIS = "BiLD thesis"

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            "bild",
            _bild,
            frozenset({"top_k", "lookups"}),
            False,
            f"{_THESIS}, eq. 3.10",
            "the ranking inside both models' top-k, free of the long tail; the default",
            {"k": _K_8, "temperature": _TEMPERATURE_3},
        ),
        Loss(
            "t_ld",
            _t_ld,
            frozenset({"top_k"}),
            False,
            f"{_THESIS}, eq. 3.8",
            "the teacher-led half of BiLD; needs no lookups",
            {"k": _K_8, "temperature": _TEMPERATURE_3},
        ),
        Loss(
            "s_ld",
            _s_ld,
            frozenset({"lookups"}),
            False,
            f"{_THESIS}, eq. 3.9",
            "the student-led half of BiLD: corrects what the student wrongly ranks high",
            {"k": _K_8, "temperature": _TEMPERATURE_3},
        ),
        Loss(
            "kl",
            _kl,
            frozenset({"full_row"}),
            True,
            "Hinton et al. 2015, eq. 1",
            "the classic: match the whole distribution, tail included",
            {"temperature": _TEMPERATURE_3, "T2": _T2},
        ),
        Loss(
            "rkl",
            _rkl,
            frozenset({"full_row"}),
            True,
            "MiniLLM, eq. 2, per token",
            "mode-seeking: a student too small for the teacher's spread drops its minor modes",
            {"temperature": _TEMPERATURE_3, "T2": _T2},
        ),
        Loss(
            "topk_kl",
            _topk_kl,
            frozenset({"top_k"}),
            False,
            f"{_THESIS}, section 4.3",
            "KL of both models renormalised on the teacher's top-k; cheapest, blind to the tail",
            {"k": _K_1024, "temperature": _TEMPERATURE_3},
        ),
        Loss(
            "sft",
            _sft,
            frozenset(),
            True,
            "cross entropy with the labels",
            "the baseline that uses no teacher signal",
        ),
    )
}
