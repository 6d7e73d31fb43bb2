"""Real transformers models of a few thousand parameters, random, with logits that spread over several nats."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase


def save_tiny_llama(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    layers: int = 4,
    hidden: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Save a random Llama with tied embeddings, and its tokenizer, to ``folder``. Returns the folder.

    ``config`` adds to the model's config, or overrides it.
    """
    settings = {"hidden_size": hidden, "num_hidden_layers": layers, "tie_word_embeddings": True, **config}
    return save_tiny_model(folder, tokenizer, LlamaConfig, seed=seed, dtype=dtype, **settings)


def save_tiny_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    family: type[PreTrainedConfig],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Save a random model of any family, named by its config class, and the tokenizer to ``folder``."""
    build_tiny_model(tokenizer, family, seed=seed, dtype=dtype, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_tiny_model(
    tokenizer: PreTrainedTokenizerBase,
    family: type[PreTrainedConfig],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    """Return a random model in eval mode: 4 layers, hidden size 32, 2 heads and 1 KV head unless ``config`` says else.

    Families with other names for these (GPT-2's ``n_embd``) map them. Biases are random too, where there are any.
    """
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    if "num_key_value_heads" in family().to_dict():
        settings.setdefault("num_key_value_heads", 1)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(family(**settings), dtype=dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=settings["initializer_range"])
    finally:
        torch.set_rng_state(generator_state)
    return model
