"""The reference engine: a transformers model's body on padded batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from cache_schema.manifest import Engine, Generation, TeacherIdentity
from cache_schema.sequence import Positions, TokenSequence
from workers.errors import InputError
from workers.teacher.checkpoint import body_of, check_head, first_nonfinite_weight, load_model, require_vocabulary
from workers.teacher.lm_head import head_of


class TransformersTeacher:
    """See ``workers.teacher.teacher.Teacher``."""

    def __init__(
        self,
        model: str,
        identity: TeacherIdentity,
        engine: Engine,
        *,
        vocab_size: int,
        device: torch.device,
        eos_token_id: int | None,
    ) -> None:
        self.identity = identity
        self.engine = engine
        self._name = model
        self._device = device
        self._eos_token_id = eos_token_id
        self._model = load_model(model, getattr(torch, identity.dtype)).to(device).requires_grad_(False)
        require_vocabulary(self._model, vocab_size)
        self.lm_head = head_of(self._model, vocab_size)
        # generation_config.json is no part of the teacher's identity, so nothing in it may decide a response.
        self._model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        probe = torch.arange(min(8, vocab_size), device=device)[None]
        hidden_ND = self._body(probe)[0]
        if not bool(torch.isfinite(hidden_ND).all()):
            raise self._not_finite("its own probe")
        check_head(self._model, self.lm_head.logits(hidden_ND), probe)

    def hidden_states(self, batch: Sequence[TokenSequence], positions: Positions) -> list[Tensor]:
        input_ids = torch.zeros(len(batch), max(s.num_tokens for s in batch), dtype=torch.long)
        for row, sequence in enumerate(batch):
            input_ids[row, : sequence.num_tokens] = torch.tensor(sequence.input_ids)
        # No attention mask: the padding is on the right, where a causal model cannot look.
        hidden_BTD = self._body(input_ids.to(self._device))
        states = []
        for hidden_TD, sequence in zip(hidden_BTD, batch, strict=True):
            rows = torch.from_numpy(sequence.target_rows(positions)).to(self._device)
            states.append(hidden_TD[rows])
            if not bool(torch.isfinite(states[-1]).all()):
                raise self._not_finite(f"sequence {sequence.sequence_id.hex()}")
        return states

    def respond(self, batch: Sequence[TokenSequence], generation: Generation, seed: int) -> list[TokenSequence]:
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
        torch.manual_seed(seed)
        with torch.inference_mode():
            written = self._model.generate(
                input_ids=input_ids.to(self._device),
                attention_mask=attention_mask.to(self._device),
                max_new_tokens=generation.max_new_tokens,
                eos_token_id=self._eos_token_id,
                pad_token_id=self._eos_token_id,
                **choice,
            )
        responses = written[:, longest:].cpu().numpy().astype(np.int32)
        return [self._completed(prompt, response) for prompt, response in zip(batch, responses, strict=True)]

    def _completed(self, prompt: TokenSequence, response: np.ndarray[Any, np.dtype[np.int32]]) -> TokenSequence:
        ends = np.flatnonzero(response == self._eos_token_id)
        response = response[: ends[0] + 1] if len(ends) else response
        return TokenSequence(
            input_ids=np.concatenate([prompt.input_ids, response]),
            loss_mask=np.concatenate([np.zeros(prompt.num_tokens, dtype=bool), np.ones(len(response), dtype=bool)]),
            source=prompt.source,
        )

    def _body(self, input_ids_BT: Tensor) -> Tensor:
        with torch.inference_mode():
            hidden_BTD: Tensor = body_of(self._model)(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD

    def _not_finite(self, where: str) -> InputError:
        weight = first_nonfinite_weight(self._model)
        cause = f"its weight {weight} is not finite" if weight else f"{self.identity.dtype} overflows"
        return InputError(
            f"{self._name}: the teacher's hidden states hold NaN or infinity at {where}: {cause}. "
            f"Repair the checkpoint, or give another --dtype."
        )
