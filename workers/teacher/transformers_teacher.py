"""The reference engine: a transformers model's body on padded batches."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import GenerationConfig

from cache_schema.plan import Engine, Generation, TeacherIdentity
from cache_schema.sequence import Positions, TokenSequence
from workers.errors import InputError
from workers.teacher.batches import batches
from workers.teacher.checkpoint import (
    body_of,
    first_line,
    load_model,
    not_finite,
    require_plain_head,
    require_vocabulary,
)
from workers.teacher.lm_head import head_of

_PROBE_TOKENS = 8
_LOOK_AHEAD = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Share of the hidden states' norm that rounding may change with a later token: 6e-7 at most was seen, in mixtures of
experts. Looking ahead changed 3e-3 of it where attention was all but uniform, and a third elsewhere."""


class TransformersTeacher:
    """See ``workers.teacher.teacher.Teacher``.

    Args:
        offload: keep the weights in the CPU's memory and bring each module's to ``device`` while it runs. Such a
            teacher gives hidden states; it does not write responses.
    """

    def __init__(
        self,
        model: str,
        identity: TeacherIdentity,
        engine: Engine,
        *,
        vocab_size: int,
        device: torch.device,
        offload: bool = False,
    ) -> None:
        self.identity = identity
        self.engine = engine
        self._device = device
        self._model = load_model(model, getattr(torch, identity.dtype)).requires_grad_(False)
        require_vocabulary(self._model, vocab_size)
        if not offload:
            self._model.to(device)
        self.lm_head = head_of(self._model, vocab_size)
        # generation_config.json is no part of the teacher's identity: of it, only the ids that end a response count,
        # and those stand in the plan. Padding rows of the head are no tokens, so never the next one.
        padding = list(range(vocab_size, self._model.get_output_embeddings().weight.shape[0]))
        self._model.generation_config = GenerationConfig(suppress_tokens=padding or None)  # type: ignore[no-untyped-call]
        require_plain_head(self._model, vocab_size)
        _require_causal(self._model, vocab_size)
        self._short_context = _short_context(self._model)
        self._body = body_of(self._model)
        if engine.compiled:
            self._body = _compiled(self._body, device)
        if offload:
            cpu_offload(self._body, execution_device=device)

    def hidden_states(self, batch: Sequence[TokenSequence], positions: Positions) -> list[Tensor]:
        short = [sequence for sequence in batch if sequence.num_tokens <= self._short_context]
        long = [sequence for sequence in batch if sequence.num_tokens > self._short_context]
        if short and long:
            answers = [iter(self.hidden_states(part, positions)) for part in (short, long)]
            return [next(answers[sequence.num_tokens > self._short_context]) for sequence in batch]
        input_ids = torch.zeros(len(batch), max(s.num_tokens for s in batch), dtype=torch.long)
        for row, sequence in enumerate(batch):
            input_ids[row, : sequence.num_tokens] = torch.tensor(sequence.input_ids)
        # No attention mask: the padding is on the right, where the model was seen not to look.
        with torch.inference_mode():
            hidden_BTD = self._body(input_ids=input_ids.to(self._device), use_cache=False).last_hidden_state
        targets = [torch.from_numpy(sequence.target_rows(positions)) for sequence in batch]
        sizes = [len(rows) for rows in targets]
        owners = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(sizes))
        hidden_ND = hidden_BTD[owners.to(self._device), torch.cat(targets).to(self._device)]
        finite_N = torch.isfinite(hidden_ND).all(1)
        if not bool(finite_N.all()):  # the batch's one wait for the device
            first = batch[int(owners[int(finite_N.int().argmin())])]
            raise not_finite(self._model, f"sequence {first.sequence_id.hex()}")
        return list(torch.split(hidden_ND, sizes))

    def respond(
        self, prompts: Sequence[TokenSequence], generation: Generation, seed: int
    ) -> Iterator[list[TokenSequence]]:
        # A generated batch keeps its keys and values, so it is sized by the tokens it will have in the end.
        sized = batches(prompts, self.engine.tokens_per_batch, extra=generation.max_new_tokens)
        for number, batch in enumerate(sized):
            yield self._respond(batch, generation, (seed + number) % 2**63)

    def _respond(self, batch: Sequence[TokenSequence], generation: Generation, seed: int) -> list[TokenSequence]:
        longest = max(prompt.num_tokens for prompt in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(batch):
            input_ids[row, longest - prompt.num_tokens :] = torch.tensor(prompt.input_ids)
            attention_mask[row, longest - prompt.num_tokens :] = 1
        sampled = generation.temperature > 0
        choice: dict[str, Any] = {"do_sample": False}
        if sampled:
            choice = {"do_sample": True, "temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
        ends = generation.end_token_ids
        torch.manual_seed(seed)
        with torch.inference_mode():
            written = self._model.generate(
                input_ids=input_ids.to(self._device),
                attention_mask=attention_mask.to(self._device),
                max_new_tokens=generation.max_new_tokens,
                eos_token_id=list(ends) or None,
                pad_token_id=ends[0] if ends else None,
                **choice,
            )
        responses = written[:, longest:].cpu().numpy().astype(np.int32)
        return [_completed(prompt, response, ends) for prompt, response in zip(batch, responses, strict=True)]


def _compiled(body: nn.Module, device: torch.device) -> Any:
    """The body as ``torch.compile`` makes it, for batches of any shape.

    Raises:
        InputError: it cannot be compiled, or there is no compiler here.
    """
    compiled = torch.compile(body, dynamic=True)
    try:
        with torch.inference_mode():
            compiled(input_ids=torch.zeros(2, _PROBE_TOKENS, dtype=torch.long, device=device), use_cache=False)
    except Exception as error:  # the compiler's errors have many types, most of them private
        raise InputError(
            f"engine.compile=true: {type(body).__name__} cannot be compiled here ({first_line(error)}): install a C++ "
            f"compiler if that is missing, or leave engine.compile out."
        ) from error
    return compiled


def _require_causal(model: Any, vocab_size: int) -> None:
    """Refuse a model whose hidden states depend on later tokens, by comparing two sequences that differ in the last.

    Raises:
        InputError: they do: its attention goes both ways.
    """
    input_ids = torch.arange(min(_PROBE_TOKENS, vocab_size), device=next(model.parameters()).device)
    changed = input_ids.clone()
    changed[-1] = 0
    with torch.inference_mode():
        hidden_BTD = body_of(model)(input_ids=torch.stack([input_ids, changed]), use_cache=False).last_hidden_state
    before_TD, after_TD = hidden_BTD[:, :-1].float()
    if float((before_TD - after_TD).norm()) > _LOOK_AHEAD[hidden_BTD.dtype] * float(before_TD.norm()):
        raise InputError(
            f"{type(model).__name__}: its hidden states change with tokens that come later, so they predict nothing: "
            f"give a causal language model."
        )


def _short_context(model: Any) -> float:
    """How many tokens the first set of rotary frequencies serves; infinity for all families but Phi-3's longrope.

    Transformers chooses the frequencies by the longest sequence of a batch, so the two kinds must not share one.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf


def _completed(prompt: TokenSequence, response: npt.NDArray[np.int32], end_token_ids: Sequence[int]) -> TokenSequence:
    """The prompt and its response up to the first id that ends one, the response trained."""
    ends = np.flatnonzero(np.isin(response, end_token_ids))
    response = response[: ends[0] + 1] if len(ends) else response
    return TokenSequence(
        input_ids=np.concatenate([prompt.input_ids, response]),
        loss_mask=np.concatenate([np.zeros(prompt.num_tokens, dtype=bool), np.ones(len(response), dtype=bool)]),
        source=prompt.source,
    )
