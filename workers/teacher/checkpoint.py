"""A model's files: where they are, what they hash to, and loading them with errors that name the fix."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn

from cache_schema.plan import Dtype, TeacherIdentity
from cache_schema.storage import sha256_of
from workers.errors import InputError
from workers.teacher.lm_head import head_of

_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt"]
# Keys of config.json that say nothing about what the model computes.
_INCIDENTAL_KEYS = {"_name_or_path", "transformers_version", "use_cache"}
_PROBE_TOKENS = 8


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
        stat = file.stat()
        digest.update(f"{file.name}:{_sha256_once(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
        num_parameters += _num_parameters(file)
    return TeacherIdentity(
        name=directory.resolve().name if Path(model).is_dir() else model,
        fingerprint=digest.hexdigest(),
        architecture=(config.get("architectures") or ["unknown"])[0],
        num_parameters=num_parameters,
        dtype=cast(Dtype, dtype),
    )


@functools.lru_cache(maxsize=1024)
def _sha256_once(file: Path, num_bytes: int, mtime_ns: int) -> str:
    """Weights are hashed once in a process, however often it asks who the model is."""
    return sha256_of(file)


def read_text_config(model_dir: Path) -> Any:
    """The transformers config of the language model, which in a multimodal one is a part of the whole's.

    Its ``hidden_size`` and the like are found under these names whatever the family calls them in its config.json.

    Raises:
        InputError: config.json is not one of a model that transformers knows.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=False).get_text_config()
    except Exception as error:  # transformers raises a dozen types for a bad config
        raise InputError(
            f"{model_dir / 'config.json'} is no config of a language model: {first_line(error)}. Give the folder of "
            f"a causal language model that this transformers version knows."
        ) from error


def hidden_width(model_dir: Path) -> int:
    """Numbers in a hidden state as the LM head reads it; small OPT models project theirs before the head.

    Raises:
        InputError: see ``read_text_config``.
    """
    config = read_text_config(model_dir)
    width: int = getattr(config, "word_embed_proj_dim", config.hidden_size)
    return width


def context_length(model_dir: Path) -> int | None:
    """How many positions a model's config says it can read; None where it says nothing (no learned positions).

    Raises:
        InputError: see ``read_text_config``.
    """
    length: int | None = getattr(read_text_config(model_dir), "max_position_embeddings", None)
    return length


def end_token_ids(model_dir: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response, ascending: the tokenizer's EOS and those of the model's generation_config.json.

    Raises:
        InputError: generation_config.json cannot be read, or its eos_token_id is neither an id nor a list of ids.
    """
    path = model_dir / "generation_config.json"
    named = _read_json_object(path).get("eos_token_id") if path.exists() else None
    ids = named if isinstance(named, list) else [named]
    ids = [token_id for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise InputError(f"{path} has eos_token_id={json.dumps(named)}: write a token id or a list of them.")
    return tuple(sorted(set(ids)))


def load_model(model: str, dtype: torch.dtype) -> Any:
    """A causal language model in eval mode on the CPU, from safetensors only, no code from the model's folder.

    Raises:
        InputError: the files do not make such a model, or leave a weight of it out, which would then be random.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    directory = model_directory(model)
    try:
        loading: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise a dozen types for a bad folder
        raise InputError(f"{model} does not load as a causal language model: {first_line(error)}") from error
    loaded, report = loading
    # A mismatched key stands with both shapes. Tied weights are stored once and reported in neither set.
    absent = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if absent:
        raise InputError(
            f"{model} has no weight {absent[0]} of the shape its config.json asks for ({len(absent)} such weights), "
            f"so it would be random: give the whole checkpoint of a causal language model, or correct its config.json."
        )
    return loaded.eval()


def meta_model(model_dir: Path, dtype: torch.dtype) -> Any:
    """A causal language model without weights, for its modules' names, shapes and settings; costs no memory.

    Raises:
        InputError: config.json is not one of a model that transformers knows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)  # type: ignore[no-untyped-call]
            return skeleton.eval()
    except Exception as error:  # transformers raises a dozen types for a bad config
        raise InputError(
            f"{model_dir / 'config.json'} is no config of a causal language model: {first_line(error)}. Give one that "
            f"this transformers version knows."
        ) from error


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
    body = model.base_model
    # Llama 4 names its body otherwise than its class says, and base_model is then the model itself.
    return getattr(model, "model", model) if body is model else body


def require_plain_head(model: Any, vocab_size: int) -> None:
    """Refuse an architecture whose logits are not head(final-norm hidden state), by comparing on a few tokens.

    Leaves the mode of every module, train or eval, as it was.

    Raises:
        InputError: they differ by more than the model's own rounding, or its hidden states are not finite.
    """
    parameter = next(model.parameters())
    input_ids = torch.arange(min(_PROBE_TOKENS, vocab_size), device=parameter.device)[None]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            hidden_ND = body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state[0]
            ours_NV = head_of(model, vocab_size).logits(hidden_ND)
            theirs_NV = model(input_ids=input_ids, use_cache=False).logits[0, :, :vocab_size].float()
    finally:
        for module, training in modes:
            module.training = training
    if not bool(torch.isfinite(hidden_ND).all()):
        raise not_finite(model, "its own probe")
    # The model rounds each logit to its dtype; float32 sums differ by their order alone.
    precision = {torch.bfloat16: 2**-6, torch.float16: 2**-9}.get(parameter.dtype, 1e-4)
    tolerance = precision * max(1.0, float(theirs_NV.abs().max()))
    difference = float((theirs_NV - ours_NV).abs().max())
    if not difference <= tolerance:
        raise InputError(
            f"{type(model).__name__}: its logits are not its LM head on its last hidden state (they differ by "
            f"{difference:.3g}, rounding explains {tolerance:.2g}). This architecture is not supported: give a model "
            f"of another one."
        )


def not_finite(model: Any, where: str) -> InputError:
    """The error that a model's hidden states hold NaN or infinity ``where``, with what it comes from."""
    weight = first_nonfinite_weight(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    cause = f"its weight {weight} is not finite" if weight else f"{dtype} overflows"
    return InputError(
        f"{model.name_or_path or type(model).__name__}: its hidden states hold NaN or infinity at {where}: {cause}. "
        f"Repair the checkpoint, or give another --dtype."
    )


def read_config(directory: Path) -> dict[str, Any]:
    return _read_json_object(directory / "config.json")


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}. Restore the model's folder.") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} holds no JSON object. Restore the model's folder.")
    return document


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


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
