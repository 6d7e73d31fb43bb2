"""Two models' logits, and a loss of the catalogue on them with its gradient."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from workers.losses.catalogue import LOSSES
from workers.losses.dense import dense_loss


def random_logits(seed: int, num_positions: int = 6, vocab_size: int = 12, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_positions, vocab_size, generator=generator, dtype=torch.float64) * scale


def loss_of(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None = None, **arguments: Any) -> Tensor:
    """``dense_loss`` with labels, drawn ids and a prompt (the positions of the mask) for whichever loss asks."""
    num_positions, vocab_size = student.shape
    ids, rows = torch.arange(vocab_size), torch.arange(num_positions)
    mask = torch.ones(num_positions) if mask is None else mask
    extras = {
        "labels": rows * 5 % vocab_size,
        "counts": (ids * 7 + rows.unsqueeze(1) * 3) % 5,
        "prompt_mask": mask,
    }
    return dense_loss(name, student, teacher, mask, **(extras | arguments))


def value_and_gradient(name: str, student: Tensor, teacher: Tensor, *args: Any, **arguments: Any) -> list[Tensor]:
    """The mean over positions, and its gradient in the student's logits [N, V]."""
    student = student.clone().requires_grad_()
    value = loss_of(name, student, teacher, *args, **arguments)
    return [value.detach(), *torch.autograd.grad(value, student)]


def values_of(name: str, student: Tensor, teacher: Tensor, **arguments: Any) -> Tensor:
    """Of each position alone. [N]"""
    pairs = zip(student.split(1), teacher.split(1), strict=True)
    return torch.stack([loss_of(name, *pair, **arguments) for pair in pairs])


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every loss with its defaults, and with each parameter that changes its form set to something else."""
    for name, loss in LOSSES.items():
        yield name, {}
        for key, parameter in loss.parameters.items():
            if key == "k":
                yield name, {"k": 4}
            elif key == "temperature":
                yield name, {"temperature": 2.0}
            elif parameter.default is False and key != loss.weighs_others:
                yield name, {key: True}
            elif parameter.optional:
                yield name, {key: 0.3}
            elif key != loss.weighs_others:  # which needs another loss beside it
                yield from ((name, {key: choice}) for choice in parameter.choices if choice != parameter.default)


VARIANTS = list(variants())


def variant_name(variant: Any) -> str:
    """Of a loss, or of its parameters."""
    if isinstance(variant, str):
        return variant
    return ",".join(f"{key}={value}" for key, value in variant.items()) or "defaults"
