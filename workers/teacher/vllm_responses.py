"""Responses that a teacher writes on vLLM."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cache_schema.plan import Generation
from cache_schema.sequence import TokenSequence
from workers.errors import InputError
from workers.teacher.vllm_engine import VllmModel, reason_of, vllm_version

WRITES = {"skip_tokenizer_init": True, "generation_config": "vllm"}
"""Options of an engine that writes. generation_config.json is no part of the teacher's identity: of it, only the ids
that end a response count, and those stand in the plan."""


def responses(
    model: VllmModel, llm: Any, prompts: Sequence[TokenSequence], generation: Generation, seed: int, vocab_size: int
) -> list[TokenSequence]:
    """Every prompt with its response, whose tokens are the trained ones.

    Args:
        llm: of the model, opened with ``WRITES``.
        vocab_size: ids from here on are never written.

    Raises:
        InputError: vLLM refuses the sampling, or writes nothing.
    """
    params = [_sampling_params(llm, prompt, generation, seed, vocab_size) for prompt in prompts]
    # All at once: vLLM batches them as they come and go.
    asked = [{"prompt_token_ids": prompt.input_ids.tolist()} for prompt in prompts]
    with model.refusals():
        outputs = llm.generate(asked, params, use_tqdm=False)
    return [_completed(model, prompt, output, vocab_size) for prompt, output in zip(prompts, outputs, strict=True)]


def _sampling_params(llm: Any, prompt: TokenSequence, generation: Generation, seed: int, vocab_size: int) -> Any:
    from vllm import SamplingParams

    rows = llm.llm_engine.model_config.get_vocab_size()
    try:
        return SamplingParams(
            max_tokens=generation.max_new_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p if generation.temperature > 0 else 1.0,
            seed=_seed_of(prompt, seed),
            stop_token_ids=list(generation.end_token_ids),
            ignore_eos=True,  # those of the plan alone
            detokenize=False,
            # Padding rows of the head are no tokens, so never the next one.
            logit_bias=dict.fromkeys(range(vocab_size, rows), float("-inf")) or None,
        )
    except Exception as error:  # its validation errors are of a type of its own
        raise InputError(
            f"vllm {vllm_version()} refuses to write responses so: {reason_of(error)}. Change responses.temperature, "
            f"or use --engine transformers."
        ) from error


def _completed(model: VllmModel, prompt: TokenSequence, output: Any, vocab_size: int) -> TokenSequence:
    response = np.array(output.outputs[0].token_ids, dtype=np.int32)
    if len(response) == 0 or int(response.max()) >= vocab_size:
        wrote = f"token id {response.max()}" if len(response) else "nothing"
        raise InputError(
            f"{model.name} wrote {wrote} where the tokenizer has {vocab_size} ids: use another vllm release, or "
            f"--engine transformers."
        )
    return TokenSequence(
        input_ids=np.concatenate([prompt.input_ids, response]),
        loss_mask=np.concatenate([np.zeros(prompt.num_tokens, dtype=bool), np.ones(len(response), dtype=bool)]),
        source=prompt.source,
    )


def _seed_of(prompt: TokenSequence, seed: int) -> int:
    """A seed for one request: the responses of a batch do not share their random numbers."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + prompt.sequence_id, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
