"""The losses of the catalogue on two dense logit matrices: the same functions, with the top-k cut from whole rows.

For tests, notebooks and comparisons; training never holds [N, V].
"""

import torch
from torch import Tensor

from workers.losses.catalogue import LOSSES, Value
from workers.losses.targets import Targets, TopK
from workers.ordering import exact_top_k


def dense_loss(
    name: str,
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    mask_N: Tensor,
    *,
    labels: Tensor | None = None,
    **params: Value,
) -> Tensor:
    """Masked mean of a loss over positions; 0 with a graph where the mask is empty. Scalar of float32, or float64

    Args:
        labels: the token that follows each position, int64 [N]; for losses that use it.
        params: the catalogue's parameters; ``T`` is short for ``temperature``. k larger than V means V.

    Raises:
        KeyError: no such loss.
        TypeError: a parameter the loss does not have.
    """
    loss = LOSSES[name]
    if "T" in params:
        params["temperature"] = params.pop("T")
    unknown = params.keys() - loss.parameters.keys()
    if unknown:
        raise TypeError(f"{name} has no parameter {sorted(unknown)[0]!r}: it has {sorted(loss.parameters)}")
    params = {key: parameter.default for key, parameter in loss.parameters.items()} | params
    # Masked rows are left out, not multiplied by zero: they may hold anything, and 0 * inf is NaN.
    kept_N = mask_N.bool()
    student_NV, teacher_NV = _float32(student_logits_NV[kept_N]), _float32(teacher_logits_NV[kept_N])
    k = min(int(params.get("k", 1)), student_NV.shape[1])
    targets = Targets(
        teacher_led=_led(teacher_NV, student_NV, exact_top_k(teacher_NV, k)[1]),
        student_led=_led(teacher_NV, student_NV, exact_top_k(student_NV.detach(), k)[1]),
        student_row_NV=student_NV,
        teacher_row_NV=teacher_NV,
        labels_N=None if labels is None else labels[kept_N],
    )
    return loss.values(targets, params).sum() / max(len(student_NV), 1)


def _float32(logits_NV: Tensor) -> Tensor:
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def _led(teacher_NV: Tensor, student_NV: Tensor, ids_NK: Tensor) -> TopK:
    return TopK(teacher_NV.gather(1, ids_NK), student_NV.gather(1, ids_NK))
