"""A model's files: where they are, what they hash to, and loading them with errors that name the fix."""

import hashlib
import json
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from cache_schema.manifest import Dtype, TeacherIdentity
from cache_schema.storage import sha256_of
from workers.errors import InputError

_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt"]
# Keys of config.json that say nothing about what the model computes.
_INCIDENTAL_KEYS = {"_name_or_path", "transformers_version", "use_cache"}


def model_directory(model: str) -> Path:
    """The local folder of a model: the path itself, or a hub model's snapshot (downloaded if need be).

    Raises:
        InputError: neither a folder nor a reachable hub model, or a folder without config or safetensors.
    """
    directory = Path(model)
    if not directory.is_dir():
        directory = _hub_snapshot(model)
    if not (directory / "config.json").exists():
        raise InputError(f"{directory} has no config.json: give the folder of a Hugging Face model.")
    if not list(directory.glob("*.safetensors")):
        raise InputError(
            f"{directory} has no *.safetensors: pickled weights are not read. Load the model in transformers and "
            f"save_pretrained it."
        )
    return directory


def identity_of(model: str, dtype: str | None) -> TeacherIdentity:
    """Who a teacher is, from its files alone; ``dtype`` None is the checkpoint's.

    Raises:
        InputError: see ``model_directory``; or a dtype that is no compute dtype.
    """
    directory = model_directory(model)
    config = read_config(directory)
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in get_args(Dtype):
        raise InputError(f"teacher.dtype={dtype}: choose one of {', '.join(get_args(Dtype))}.")
    digest = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in _INCIDENTAL_KEYS}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    num_parameters = 0
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(f"{file.name}:{sha256_of(file)}\n".encode())
        num_parameters += _num_parameters(file)
    return TeacherIdentity(
        name=directory.resolve().name if Path(model).is_dir() else model,
        fingerprint=digest.hexdigest(),
        architecture=(config.get("architectures") or ["unknown"])[0],
        num_parameters=num_parameters,
        dtype=cast(Dtype, dtype),
    )


def load_model(model: str, dtype: torch.dtype, **config_changes: Any) -> Any:
    """A causal language model in eval mode on the CPU, from safetensors only, no code from the model's folder.

    Raises:
        InputError: the files do not make such a model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    directory = model_directory(model)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, **config_changes
        )
    except Exception as error:  # transformers and safetensors raise a dozen types for a bad folder
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{model} does not load as a causal language model: {reason}") from error
    return loaded.eval()  # type: ignore[no-untyped-call]


def require_vocabulary(model: Any, vocab_size: int) -> None:
    """Refuse a model whose embeddings or LM head have fewer rows than the tokenizer has ids.

    Raises:
        InputError: says how many there are.
    """
    embeddings = {"input embeddings": model.get_input_embeddings(), "LM head": model.get_output_embeddings()}
    for what, module in embeddings.items():
        rows = 0 if module is None else module.weight.shape[0]
        if rows < vocab_size:
            raise InputError(
                f"{type(model).__name__}: its {what} has {rows:,} rows, the tokenizer {vocab_size:,} ids: give a "
                f"causal language model with this tokenizer's vocabulary."
            )


def require_finite(name: str, module: nn.Module) -> None:
    """Refuse a model with a NaN or an infinity among its weights.

    Raises:
        InputError: names the first such weight.
    """
    weight = first_nonfinite_weight(module)
    if weight is not None:
        raise InputError(f"{name}: its weight {weight} is not finite. Repair the checkpoint, or give another.")


def first_nonfinite_weight(module: nn.Module) -> str | None:
    """Name of the first parameter that holds a NaN or an infinity."""
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return name
    return None


def body_of(model: Any) -> Any:
    """The model without its LM head: input ids to final-norm hidden states (`last_hidden_state`)."""
    return model.base_model


def check_head(model: Any, logits_NV: Tensor, input_ids: Tensor) -> None:
    """Refuse an architecture whose logits are not head(final-norm hidden state), by comparing on a few tokens.

    Args:
        logits_NV: ours, float32, at every position of ``input_ids`` [1, N].

    Raises:
        InputError: they differ by more than the model's own rounding.
    """
    with torch.no_grad():
        theirs_NV = model(input_ids=input_ids, use_cache=False).logits[0, :, : logits_NV.shape[1]].float()
    # The model rounds each logit to its dtype; float32 sums differ by their order alone.
    precision = {torch.bfloat16: 2**-6, torch.float16: 2**-9}.get(next(model.parameters()).dtype, 1e-4)
    tolerance = precision * max(1.0, float(theirs_NV.abs().max()))
    difference = float((theirs_NV - logits_NV).abs().max())
    if not difference <= tolerance:
        raise InputError(
            f"{type(model).__name__}: its logits are not its LM head on its last hidden state (they differ by "
            f"{difference:.3g}, rounding explains {tolerance:.2g}). This architecture is not supported; dump with "
            f"an engine that returns logits."
        )


def read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}. Restore the model's folder.") from error
    return config


def _hub_snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise InputError(
            f"{model} is neither a folder nor a model the hub gives: check the path, or the name and the network."
        ) from None


def _num_parameters(file: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged: {error}. Restore the model's folder.") from error
    return sum(int(torch.Size(shape).numel()) for shape in shapes)
