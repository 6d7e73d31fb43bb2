"""Training a part of the student: low-rank adapters, and whether embeddings and head take part.

The adapters are PEFT's. They stand inside the transformers model, in place of its linear layers, so the body, the head
and every name but theirs are where they were. Embeddings are the token embeddings; tied to the head, both are one
weight, and what is said of either goes for it.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from workers.distill.config_section import ConfigSection
from workers.errors import InputError
from workers.teacher.checkpoint import first_line

Part = Literal["embeddings", "head"]

_ADAPTER = "default"
# How the names of a model's weights begin in an adapter's file.
_FILE_PREFIX = "base_model.model."


class PeftConfig(ConfigSection):
    method: Literal["lora", "dora"] = "lora"
    """``dora`` learns the norm of each of the weight's rows beside the low-rank change."""
    r: int = Field(16, ge=1)
    """Rank of the change."""
    alpha: int = Field(32, ge=1)
    """The change is multiplied by alpha / r."""
    rslora: bool = False
    """Multiply by alpha / sqrt(r) instead."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that a step leaves out."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter, by the ends of their names; the LM head cannot be one."""
    train_embeddings: bool = False
    """Train the token embeddings whole; where they are tied to the head, that too."""
    train_head: bool = False
    """Train the LM head whole; where it is tied to the embeddings, these too."""


def require_freezable(freeze: Sequence[Part], peft: PeftConfig | None) -> None:
    """Refuse to freeze what adapters freeze anyway, or were told to train.

    Raises:
        ValueError: both are given.
    """
    if freeze and peft is not None:
        raise ValueError(
            f"freeze={','.join(freeze)} is for training without [peft], which trains neither embeddings nor head "
            f"unless peft.train_embeddings or peft.train_head says so: leave freeze out"
        )


def require_peft() -> None:
    """Refuse to go on without the library.

    Raises:
        InputError: gives the command that installs it.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError("peft is not installed: `pip install 'logit-cache[peft]'`.") from None


def freeze_parts(model: Any, parts: Sequence[Part]) -> None:
    """Leave embeddings or head as they are in training; tied ones are frozen together."""
    for part in parts:
        _module(model, part).requires_grad_(False)


def add_adapters(model: Any, config: PeftConfig, seed: int) -> None:
    """Put adapters into a model, in place, and freeze all else but the embeddings or head the config names.

    The model computes what it did, up to DoRA's rounding. The adapters are the same for the same seed, on every rank.

    Args:
        model: on the CPU, of float32 weights.

    Raises:
        InputError: PEFT is not installed, or ``target_modules`` names what is no linear layer, or the head.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    linear = _linear_layers(model)
    if config.target_modules != "all-linear":
        _require_linear(model, config.target_modules, linear)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.method == "dora",
        target_modules=config.target_modules if config.target_modules == "all-linear" else list(config.target_modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    # PEFT draws from the CPU's generator; the run's own draws stay what they are without adapters.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            inject_adapter_in_model(lora, model, adapter_name=_ADAPTER)
        except ValueError as error:
            raise InputError(f"[peft] does not fit {type(model).__name__}: {first_line(error)}") from error
    _require_plain_layers(model)
    wanted: dict[Part, bool] = {"embeddings": config.train_embeddings, "head": config.train_head}
    for part, trained in wanted.items():
        if trained:
            _module(model, part).requires_grad_(True)


def load_trained(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy trained weights into a student made as the trained one was: of the same layers, adapters and frozen parts.

    Args:
        weights: whole, by the names of the model's trained parameters.

    Raises:
        ValueError: they are not all of these, or of other shapes.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in sorted(parameters.keys() ^ weights.keys()):
        raise ValueError(f"{name} is {'not among the weights' if name in parameters else 'no trained parameter'}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(f"{name} has the shape {list(parameter.shape)}, not {list(weights[name].shape)}")
            parameter.copy_(weights[name])


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the adapters, and embeddings or head if they were trained, as PEFT reads them.

    Args:
        model: whole weights; unchanged.
        base: path or hub name of the model without them, as whoever loads the adapter should find it.
    """
    from peft import get_peft_model_state_dict

    config = copy.deepcopy(model.peft_config[_ADAPTER])
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set, in another order in every process
    adapters = [layer for _, layer in _adapted_layers(model)]
    inside = {id(parameter) for layer in adapters for parameter in layer.parameters()}
    tensors = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    # Not PEFT's `modules_to_save`, which loads tied weights wrong. A tied weight stands there under both names, because
    # `low_cpu_mem_usage` assigns each on its own.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and id(parameter) not in inside:
            tensors[name] = parameter
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    save_file(
        {_FILE_PREFIX + name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    path.chmod(0o644)  # safetensors keeps files to their owner


def merged_state(model: Any) -> dict[str, Tensor]:
    """The state dict of the plain model with adapters merged in float32; of a model without adapters, its own.

    The model is left as it is, and may train on: each adapted layer is copied to be merged. The others' tensors are the
    model's own. ``model.save_pretrained(folder, state_dict=merged_state(model))`` writes a plain checkpoint.

    Args:
        model: whole weights.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, layer in _adapted_layers(model):
        for key in layer.state_dict():
            del state[f"{name}.{key}"]
        merged = copy.deepcopy(layer)
        merged.merge(safe_merge=True)
        state |= {f"{name}.{key}": tensor for key, tensor in merged.get_base_layer().state_dict().items()}
    return state


def _adapted_layers(model: Any) -> list[tuple[str, Any]]:
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _module(model: Any, part: Part) -> nn.Module:
    module: nn.Module = model.get_input_embeddings() if part == "embeddings" else model.get_output_embeddings()
    return module


def _linear_layers(model: Any) -> dict[str, nn.Module]:
    """All but the LM head, whose weight the loss reads itself."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def _require_linear(model: Any, names: Sequence[str], linear: Mapping[str, nn.Module]) -> None:
    """Refuse a name that, as PEFT reads it, stands for no linear layer or for something else beside."""
    for name in names:
        meant = [full for full, _ in model.named_modules() if full == name or full.endswith(f".{name}")]
        if not meant or not linear.keys() >= set(meant):
            ends = sorted({full.rpartition(".")[2] for full in linear})
            raise InputError(
                f"peft.target_modules: {name or 'an empty name'} names no linear layer that an adapter can go on: give "
                f"all-linear or some of {', '.join(ends)}. Embeddings and head are trained whole, by "
                f"peft.train_embeddings and peft.train_head."
            )


def _require_plain_layers(model: Any) -> None:
    """Refuse adapters of a kind that merges otherwise than layer by layer, such as on experts' fused weights."""
    from peft.tuners.lora import Linear

    other = next((name for name, layer in _adapted_layers(model) if not isinstance(layer, Linear)), None)
    if other is not None:
        raise InputError(
            f"peft.target_modules: {other} of {type(model).__name__} is no plain linear layer. Name the linear layers "
            f"to adapt, such as q_proj,v_proj."
        )
