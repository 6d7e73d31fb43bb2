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
    """Masked mean of a loss over positions; 0 with a graph where the mask is empty. Scalar

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
    k = min(int(params.get("k", 1)), student_logits_NV.shape[1])
    teacher_ids_NK = exact_top_k(teacher_logits_NV, k)[1]
    student_ids_NK = exact_top_k(student_logits_NV.detach(), k)[1]
    targets = Targets(
        teacher_led=_led(teacher_logits_NV, student_logits_NV, teacher_ids_NK),
        student_led=_led(teacher_logits_NV, student_logits_NV, student_ids_NK),
        student_row_NV=student_logits_NV,
        teacher_row_NV=teacher_logits_NV,
        labels_N=labels,
    )
    # where, not a product: a masked row may hold anything, and 0 * inf is NaN.
    values_N = torch.where(mask_N.bool(), loss.values(targets, params), 0.0)
    return values_N.sum() / mask_N.bool().sum().clamp(min=1)


def _led(teacher_NV: Tensor, student_NV: Tensor, ids_NK: Tensor) -> TopK:
    return TopK(teacher_NV.gather(1, ids_NK), student_NV.gather(1, ids_NK))
