"""The student: a model, or some of another's layers."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from workers.errors import InputError
from workers.teacher.checkpoint import body_of, load_model, require_finite


def load_student(model: str, layers: Sequence[int] | None, *, gradient_checkpointing: bool) -> Any:
    """A student in float32, in training mode; of some of the model's layers if ``layers`` says so.

    Raises:
        InputError: the model does not load, holds NaN, or has no such layers.
    """
    student = load_model(model, torch.float32)
    require_finite(model, student)
    if layers is not None:
        keep_layers(student, layers)
    if gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return student.train()


def require_layers(layers: Sequence[int], depth: int) -> None:
    """Refuse indexes that are not ascending, each once, within a model of ``depth`` layers.

    Raises:
        InputError: says which there are.
    """
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise InputError(
            f"--student-layers {','.join(map(str, layers))}: give ascending indexes from 0 to {depth - 1}, each once "
            f"(the model has {depth} layers)."
        )


def keep_layers(model: Any, layers: Sequence[int]) -> None:
    """Cut a model down, in place, to some of its decoder layers; embeddings, final norm and head stay.

    Layer indexes are renumbered and the config's per-layer lists cut, so that the result saves and loads as a plain
    model of fewer layers.

    Raises:
        InputError: an index is outside the model, repeated, or out of order; or the config cannot say what is left.
    """
    config = model.config.get_text_config()
    depth = config.num_hidden_layers
    require_layers(layers, depth)
    body = body_of(model)
    stacks = [(name, child) for name, child in body.named_children() if _is_stack(child, depth)]
    if len(stacks) != 1:
        raise InputError(f"{type(model).__name__}: no single stack of {depth} layers found to take layers from.")
    name, stack = stacks[0]
    kept = nn.ModuleList(stack[index] for index in layers)
    module: Any
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(body, name, kept)
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth and not key.endswith("token_id"):
            setattr(config, key, [value[index] for index in layers])
    config.num_hidden_layers = len(layers)
    _require_plain(model)


def _require_plain(model: Any) -> None:
    """Refuse a model that its own config would not build again, such as one that names layers by their index."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    shapes, wanted = ({name: tensor.shape for name, tensor in m.state_dict().items()} for m in (plain, model))
    if shapes != wanted:
        name = min(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
        raise InputError(
            f"{type(model).__name__}: with these --student-layers its config no longer describes its layers ({name} "
            f"differs). Keep other layers, or give a smaller --student."
        )


def _is_stack(module: nn.Module, depth: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == depth
