"""The engine for large teachers: vLLM runs the body, through its public pooling interface."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cache_schema.plan import Engine, Generation, TeacherIdentity
from cache_schema.sequence import Positions, TokenSequence
from workers.errors import InputError
from workers.teacher.checkpoint import read_config
from workers.teacher.head_files import read_head_files
from workers.teacher.self_check import (
    reason_against_reference,
    require_final_norm,
    require_not_unit_length,
    require_reference,
    say_not_compared,
)
from workers.teacher.vllm_engine import VllmModel
from workers.teacher.vllm_responses import WRITES, responses

_PROBE = [0, 1]
"""Token ids that every vocabulary has."""

HIDDEN_STATES = {
    "runner": "pooling",
    "pooler_config": {"task": "token_embed", "use_activation": False},
    # By default a pooling model's output is upcast to float32.
    "hf_overrides": {"head_dtype": "model"},
}
"""Options of an engine that gives final-norm hidden states."""


class VllmTeacher:
    """See ``workers.teacher.teacher.Teacher``.

    Args:
        device: of the LM head and of the hidden states it gives. vLLM takes the first GPUs it sees, or the CPU.
        max_tokens: longest sequence, response included.
        responds: it is to write responses, too. Scoring and writing are two engines of vLLM, each with the weights: a
            shard is scored right after its responses, and loading takes minutes.
        memory_fraction: share of each GPU's memory that is vLLM's, of both its engines where there are two.
        self_check: hold the first batch against final norm and reference.

    Raises:
        InputError: vLLM is missing, too old or cannot load the model; its LM head cannot be read.
    """

    def __init__(
        self,
        model: str,
        identity: TeacherIdentity,
        engine: Engine,
        *,
        vocab_size: int,
        device: torch.device,
        max_tokens: int,
        responds: bool = False,
        memory_fraction: float = 0.8,
        self_check: bool = True,
    ) -> None:
        self.identity = identity
        self.engine = engine
        self._model = model
        self._device = device
        self._dtype: torch.dtype = getattr(torch, identity.dtype)
        self._unchecked = self_check
        self._vllm = VllmModel(
            model,
            identity,
            engine,
            device=device,
            max_tokens=max_tokens,
            memory_fraction=memory_fraction / 2 if responds else memory_fraction,
        )
        # Before the body, which takes minutes to load: what of the checkpoint cannot be used shows in seconds.
        files = read_head_files(model, self._dtype, vocab_size)
        self.lm_head, self._final_norm = files.lm_head.to(device), files.final_norm
        self._scoring = self._vllm.open(**HIDDEN_STATES)
        self._writing: Any = None
        # Some models load and cannot run: that shows here, before a plan is written that no other engine may follow.
        try:
            self._encode([_PROBE])
        except InputError:
            self.close()
            raise

    def close(self) -> None:
        """See ``VllmModel.close``."""
        self._vllm.close()

    def hidden_states(self, batch: Sequence[TokenSequence], positions: Positions) -> list[Tensor]:
        states = self._encode([sequence.input_ids.tolist() for sequence in batch])
        for sequence, hidden_TD in zip(batch, states, strict=True):
            self._require_states(sequence, hidden_TD)
        if self._unchecked:
            self._check(batch, states)
            self._unchecked = False
        targets = [torch.from_numpy(sequence.target_rows(positions)) for sequence in batch]
        hidden_ND = torch.cat([hidden_TD[rows] for hidden_TD, rows in zip(states, targets, strict=True)])
        return list(torch.split(hidden_ND.to(self._device), [len(rows) for rows in targets]))

    def respond(
        self, prompts: Sequence[TokenSequence], generation: Generation, seed: int
    ) -> Iterator[list[TokenSequence]]:
        if self._writing is None:
            self._writing = self._vllm.open(**WRITES)
        yield responses(self._vllm, self._writing, prompts, generation, seed, self.lm_head.vocab_size)

    def _encode(self, prompts: list[list[int]]) -> list[Tensor]:
        """Final-norm hidden states of every token. [T, D] each"""
        with self._vllm.refusals():
            outputs = self._scoring.encode(
                [{"prompt_token_ids": ids} for ids in prompts], pooling_task="token_embed", use_tqdm=False
            )
        return [output.outputs.data for output in outputs]

    def _require_states(self, sequence: TokenSequence, hidden_TD: Tensor) -> None:
        shape = (sequence.num_tokens, self.lm_head.weight_VD.shape[1])
        if tuple(hidden_TD.shape) != shape or hidden_TD.dtype != self._dtype:
            raise InputError(
                f"{self._vllm.name} gives {hidden_TD.dtype} {list(hidden_TD.shape)} where {self._dtype} {list(shape)} "
                f"is expected: use another vllm release, or --engine transformers."
            )
        if not bool(torch.isfinite(hidden_TD).all()):
            raise InputError(
                f"{self.identity.name}: its hidden states hold NaN or infinity at sequence "
                f"{sequence.sequence_id.hex()}: a weight is not finite, or {self.identity.dtype} overflows. Repair the "
                f"checkpoint, or give another --dtype."
            )
        require_not_unit_length(hidden_TD, self._vllm.name)

    def _check(self, batch: Sequence[TokenSequence], states: Sequence[Tensor]) -> None:
        if self._final_norm is not None:
            require_final_norm(torch.cat(list(states)), self._final_norm, self._vllm.name)
        reason = reason_against_reference(self.identity, self.engine, read_config(self._vllm.directory))
        if reason:
            say_not_compared(self._vllm.name, reason)
            return
        shortest = min(range(len(batch)), key=lambda index: batch[index].num_tokens)
        require_reference(
            self._model, self.identity, self.engine, batch[shortest], states[shortest], self.lm_head, self._vllm.name
        )
