"""The losses of the catalogue on two dense logit matrices: the same functions, with the top-k cut from whole rows.

For tests, notebooks and comparisons; training never holds [N, V].

Shape suffixes: N = positions, V = vocabulary, K = leading ids.
"""

from dataclasses import replace

import torch
from torch import Tensor

from workers.losses.catalogue import LOSSES
from workers.losses.loss import Loss, Value
from workers.losses.targets import Drawn, Targets, TopK
from workers.ordering import exact_top_k


def dense_loss(
    name: str,
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    mask_N: Tensor,
    *,
    labels: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    counts: Tensor | None = None,
    **params: Value,
) -> Tensor:
    """Masked mean of a loss over positions; 0 with a graph where the mask is empty. Scalar of float32, or float64

    Args:
        labels: the token that follows each position, int64 [N]; for losses that use it.
        prompt_mask: the positions of the prompt [N]; for ``bild_total``.
        counts: how often each id was drawn from the teacher's distribution [N, V]; for ``rskd``.
        params: the catalogue's parameters; ``T`` is short for ``temperature``. k larger than V means V.

    Raises:
        KeyError: no such loss.
        TypeError: a parameter the loss does not have, or an argument it needs is missing.
        ValueError: a parameter is out of its range, or the mask holds something else than 0 and 1.
    """
    loss = LOSSES[name]
    if "T" in params:
        if "temperature" in params:
            raise TypeError("T is short for temperature: give one of them")
        params["temperature"] = params.pop("T")
    unknown = params.keys() - loss.parameters.keys()
    if unknown:
        raise TypeError(f"{name} has no parameter {sorted(unknown)[0]!r}: it has {sorted(loss.parameters)}")
    if params.get(loss.weighs_others):
        raise TypeError(f"{name} has no other losses here for {loss.weighs_others} to weigh")
    for argument, given, wanted in (
        ("labels", labels, loss.reads_label),
        ("prompt_mask", prompt_mask, loss.prompt is not None),
        ("counts", counts, "samples" in loss.needs),
    ):
        if wanted and given is None:
            raise TypeError(f"{name} needs {argument}")
    params = loss.defaults() | {key: _checked(loss, key, value) for key, value in params.items()}
    if not bool(((mask_N == 0) | (mask_N == 1)).all()):
        raise ValueError("a mask is of 0 and 1: a position counts or does not")
    value = _masked_mean(loss, params, student_logits_NV, teacher_logits_NV, mask_N, labels, counts)
    if loss.prompt is not None and prompt_mask is not None:
        prompt, prompt_params = loss.prompt
        params = LOSSES[prompt].defaults() | dict(prompt_params)
        value = value + _masked_mean(
            LOSSES[prompt], params, student_logits_NV, teacher_logits_NV, prompt_mask, None, None
        )
    return value


def _masked_mean(
    loss: Loss,
    params: dict[str, Value],
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    mask_N: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    # Masked rows are left out, not multiplied by zero: they may hold anything, and 0 * inf is NaN.
    kept_N = mask_N.bool()
    student_NV, teacher_NV = _float32(student_logits_NV[kept_N]), _float32(teacher_logits_NV[kept_N])
    if len(student_NV) == 0:
        return student_NV.sum() * 0.0
    vocab_size = student_NV.shape[1]
    asked = params.get("k", 1)
    assert isinstance(asked, int)
    k, temperature = min(asked, vocab_size), loss.temperature(params)
    teacher_ids_NV = exact_top_k(teacher_NV, vocab_size)[1]
    others_NV = teacher_NV.gather(1, teacher_ids_NV)[:, k:] / temperature
    targets = Targets(
        teacher_led=_led(teacher_NV, student_NV, teacher_ids_NV[:, :k]),
        student_led=_led(teacher_NV, student_NV, exact_top_k(student_NV.detach(), k)[1]),
        tails={temperature: others_NV.logsumexp(1)},
        student_row_NV=student_NV,
        teacher_row_NV=teacher_NV,
    )
    if labels is not None:
        labels_N = labels[kept_N]
        student_label_N = student_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1)
        targets = replace(targets, labels_N=labels_N, student_label_N=student_label_N)
    if counts is not None:
        targets = replace(targets, drawn=Drawn(counts[kept_N].to(student_NV.dtype), student_NV))
    weight = float(len(student_NV))
    if loss.group_size:
        weight = 1.0
    elif loss.weights is not None:
        weight = float(
            loss.weights(teacher_NV.gather(1, teacher_ids_NV[:, :k]), teacher_NV.logsumexp(1), **params).sum()
        )
    return loss.values(targets, **params).sum() / loss.divisor(weight, params)


def _checked(loss: Loss, key: str, value: Value) -> Value:
    given: Value = loss.parameters[key].read(value)
    if key == "k":  # clamped to V above, and may be too small for BiLD below
        counts = isinstance(given, int) and not isinstance(given, bool) and given >= 1
        fault = None if counts else ": give 1 or more ids"
    else:
        fault = loss.parameters[key].fault(given)
    if fault:
        raise ValueError(f"{loss.name}: {key}={given!r}{fault}")
    return given


def _float32(logits_NV: Tensor) -> Tensor:
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def _led(teacher_NV: Tensor, student_NV: Tensor, ids_NK: Tensor) -> TopK:
    return TopK(ids_NK, teacher_NV.gather(1, ids_NK), student_NV.gather(1, ids_NK))
