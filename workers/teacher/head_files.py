"""The last two parts of a language model, read from its checkpoint without the rest: final norm and LM head.

An engine that keeps the weights to itself gives final-norm hidden states; logits are made of them outside it. The
model is built on the meta device, which costs no memory, for its names, shapes and settings.

Shape suffixes: V = vocabulary, D = hidden size.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from workers.errors import InputError
from workers.teacher.checkpoint import body_of, meta_model, model_directory, require_vocabulary
from workers.teacher.lm_head import LMHead, head_of

_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
"""What safetensors calls weights that are numbers as they stand; others are codes of a quantisation."""


@dataclass(frozen=True)
class FinalNorm:
    """The affine map that ends a body: hidden state = normalised state * gain + bias. float32 [D] each"""

    gain_D: Tensor
    bias_D: Tensor

    def normalised(self, hidden_ND: Tensor) -> Tensor:
        """What the norm had before gain and bias. float32 [N, D]"""
        return (hidden_ND.cpu().float() - self.bias_D) / self.gain_D


@dataclass(frozen=True)
class HeadFiles:
    """What stands above a body, in the compute dtype, on the CPU."""

    lm_head: LMHead
    final_norm: FinalNorm | None
    """None where the body ends in no norm of a known form."""


def read_head_files(model: str, dtype: torch.dtype, vocab_size: int) -> HeadFiles:
    """Read final norm and LM head of a causal language model, tied or not.

    Raises:
        InputError: no such model; its LM head is not in the checkpoint, is quantised, has another shape than the config
            says, fewer rows than ``vocab_size``, or a NaN or infinity.
    """
    directory = model_directory(model)
    skeleton = meta_model(directory, dtype)
    require_vocabulary(skeleton, vocab_size)
    weights = _Weights(directory, skeleton)
    linear = skeleton.get_output_embeddings()
    name = next(name for name, module in skeleton.named_modules() if module is linear)
    # A checkpoint with a head of its own is not tied, whatever its config says: transformers loads it so, too.
    tied_to = skeleton.all_tied_weights_keys.get(f"{name}.weight")
    wanted = [f"{name}.weight", *([tied_to] if tied_to else [])]
    found = next((stored for stored in map(weights.stored_name, wanted) if stored), None)
    if found is None:
        raise _no_head(directory, name, weights)
    linear.weight = _parameter(weights.read(found, tuple(linear.weight.shape)), dtype)
    if getattr(linear, "bias", None) is not None:
        stored = weights.stored_name(f"{name}.bias")
        if stored is None:
            raise InputError(
                f"{directory} has no {name}.bias, which its config.json asks for: give the whole checkpoint."
            )
        linear.bias = _parameter(weights.read(stored, tuple(linear.bias.shape)), dtype)
    head = head_of(skeleton, vocab_size)
    if not all(bool(torch.isfinite(part).all()) for part in (head.weight_VD, head.bias_V) if part is not None):
        raise InputError(f"{directory}: its {found} is not finite in {dtype}. Repair the checkpoint, or give another.")
    return HeadFiles(head, _final_norm(skeleton, weights))


class _Weights:
    """Names of the tensors in a folder's safetensors, and reading one."""

    def __init__(self, directory: Path, skeleton: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self._directory = directory
        self._file_of: dict[str, Path] = {}
        for file in sorted(directory.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as tensors:
                    self._file_of |= dict.fromkeys(tensors.keys(), file)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} is damaged: {error}. Restore the model's folder.") from error
        # Files keep the names a family had when they were written (GPT-NeoX's head is `embed_out`).
        renamings = [rule for rule in get_model_conversion_mapping(skeleton) if isinstance(rule, WeightRenaming)]
        self._stored_as: dict[str, str] = {}
        for stored in self._file_of:
            name = stored
            for rule in renamings:
                name, _ = rule.rename_source_key(name)
            self._stored_as[name] = stored

    def stored_name(self, name: str) -> str | None:
        """The name in the files of a parameter: its own, or the only one that ends in its last two parts.

        Checkpoints leave out or add a prefix (``wte.weight`` for ``transformer.wte.weight``).
        """
        if name in self._stored_as:
            return self._stored_as[name]
        ending = ".".join(name.split(".")[-2:])
        similar = [known for known in self._stored_as if known == ending or known.endswith(f".{ending}")]
        return self._stored_as[similar[0]] if len(similar) == 1 else None

    def beside(self, module: str) -> list[str]:
        """What the files hold of a module, by its last name."""
        last = module.rsplit(".", 1)[-1]
        return sorted(name for name in self._file_of if last in name.split(".")[:-1])

    def read(self, stored: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as it is stored.

        Raises:
            InputError: it is quantised, or of another shape.
        """
        file = self._file_of[stored]
        with safe_open(file, "pt") as tensors:
            part = tensors.get_slice(stored)
            if part.get_dtype() not in _WEIGHT_DTYPES:
                raise _quantised(self._directory, stored, part.get_dtype())
            if tuple(part.get_shape()) != shape:
                raise InputError(
                    f"{file}: {stored} has shape {part.get_shape()}, config.json asks for {list(shape)}: correct the "
                    f"config, or give the whole checkpoint."
                )
            tensor: Tensor = tensors.get_tensor(stored)
        return tensor


def _parameter(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.to(dtype), requires_grad=False)


def _no_head(directory: Path, name: str, weights: _Weights) -> InputError:
    beside = weights.beside(name)
    if beside:
        return _quantised(directory, beside[0], json.dumps(beside))
    return InputError(
        f"{directory} holds no {name}.weight, the LM head: give the whole checkpoint of a causal language model, or "
        f"--engine transformers if that loads it."
    )


def _quantised(directory: Path, name: str, what: str) -> InputError:
    return InputError(
        f"{directory}: its LM head is quantised ({name}: {what}), and logits are made of head weights as they are. "
        f"Give a checkpoint that leaves the head out of the quantisation, or --engine transformers if that loads it."
    )


def _final_norm(skeleton: Any, weights: _Weights) -> FinalNorm | None:
    """The norm at the end of a body, if the last module directly in it with weights is one."""
    children = [module for module in body_of(skeleton).children() if list(module.parameters())]
    norm = children[-1] if children else nn.Identity()
    if not type(norm).__name__.endswith("Norm"):
        return None
    prefix = next(name for name, module in skeleton.named_modules() if module is norm)
    for key, parameter in list(norm.named_parameters()):
        stored = weights.stored_name(f"{prefix}.{key}")
        if stored is None:
            return None
        setattr(norm, key, _parameter(weights.read(stored, tuple(parameter.shape)), torch.float32))
    return _measured(norm)


def _measured(norm: nn.Module) -> FinalNorm | None:
    """Gain and bias by what the norm makes of +1, -1, +1, ..., which is normalised already, and of its negative.

    So it does not matter whether the class multiplies with its weight or, as Gemma's, with 1 + weight.
    """
    size = next(norm.parameters()).numel()
    signs_D = torch.ones(size)
    signs_D[1::2] = -1
    with torch.no_grad():
        up_D, down_D = norm(signs_D), norm(-signs_D)
    gain_D, bias_D = (up_D - down_D) / 2 * signs_D, (up_D + down_D) / 2
    # A channel with gain 0 says nothing of what was normalised; of an odd number of signs the mean is not 0.
    return FinalNorm(gain_D, bias_D) if size % 2 == 0 and bool((gain_D != 0).all()) else None
