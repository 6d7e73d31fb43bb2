"""The vLLM engine's second way: its own logits, for teachers whose hidden states or LM head cannot be had.

vLLM gives the leading logits of every token of a prompt and the logit of the token that follows, and nothing of the
rest of a row. Among equal logits its choice is its own, so some more are asked for than are stored, put in the order
(-logit, token id) and cut. Only where all that is asked for and lies beyond the cut is equal does its choice show.

Shape suffixes: T = tokens of a sequence (row t is of the token after t), M = ids asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache_schema.plan import Engine, Generation, TeacherIdentity
from cache_schema.sequence import Positions, TokenSequence, TopKRows
from workers.errors import InputError
from workers.teacher.checkpoint import read_config
from workers.teacher.self_check import (
    REFERENCE_TOKENS,
    is_quantised,
    reason_against_reference,
    reference_logits,
    require_raw_logits,
    require_same_logits,
    say_not_compared,
)
from workers.teacher.vllm_engine import VllmModel
from workers.teacher.vllm_responses import WRITES, responses

_SPARE = 8
"""Ids asked for beyond those that are stored."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """What vLLM says of a sequence, in the order (-logit, token id); padding rows of the head stand last, at -inf."""

    ids_TM: npt.NDArray[np.int32]
    logits_TM: npt.NDArray[np.float32]
    label_logit_T: npt.NDArray[np.float32]


class VllmScoringTeacher:
    """See ``workers.teacher.teacher.ScoringTeacher``. One engine of vLLM scores and writes.

    Args:
        device: the kind of device vLLM is to run on. It takes the first GPUs it sees, or the CPU.
        max_tokens: longest sequence, response included; one less than the model can read.
        memory_fraction: share of each GPU's memory that is vLLM's.
        self_check: hold the first batch against the reference engine, and against log-probabilities.

    Raises:
        InputError: vLLM is missing, too old or cannot load the model.
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
        memory_fraction: float = 0.8,
        self_check: bool = True,
    ) -> None:
        self.identity = identity
        self.engine = engine
        self._model = model
        self._vocab_size = vocab_size
        self._unchecked = self_check
        self._vllm = VllmModel(
            model,
            identity,
            engine,
            device=device,
            max_tokens=max_tokens + 1,  # vLLM writes a token after every prompt
            memory_fraction=memory_fraction,
        )
        # In half precision nearly every row has equal logits. vLLM cannot widen a head that is quantised.
        head_dtype = "model" if is_quantised(engine, read_config(self._vllm.directory)) else "float32"
        self._llm = self._vllm.open(
            **WRITES, logprobs_mode="raw_logits", max_logprobs=-1, hf_overrides={"head_dtype": head_dtype}
        )
        self._num_rows = int(self._llm.llm_engine.model_config.get_vocab_size())
        if self._num_rows < vocab_size:
            raise InputError(
                f"{self._vllm.name} has logits of {self._num_rows} ids, its tokenizer {vocab_size}: give the tokenizer "
                f"the model was trained with."
            )

    def close(self) -> None:
        """See ``VllmModel.close``."""
        self._vllm.close()

    def top_k_rows(self, batch: Sequence[TokenSequence], positions: Positions, top_k: int) -> list[TopKRows]:
        num_ids = min(top_k + _SPARE, self._vocab_size)
        asked = self._ask(batch, num_ids)
        # Padding rows of the head, which are no tokens, are seldom among the highest.
        short = [index for index, rows in enumerate(asked) if not np.isfinite(rows.logits_TM).all()]
        if short:
            enough = num_ids + self._num_rows - self._vocab_size
            for index, rows in zip(short, self._ask([batch[index] for index in short], enough), strict=True):
                asked[index] = rows
        for sequence, rows in zip(batch, asked, strict=True):
            self._require_finite(sequence, rows, top_k)
        if self._unchecked:
            self._check(batch, asked, top_k)
            self._unchecked = False
        return [_at(sequence.target_rows(positions), rows, top_k) for sequence, rows in zip(batch, asked, strict=True)]

    def respond(
        self, prompts: Sequence[TokenSequence], generation: Generation, seed: int
    ) -> Iterator[list[TokenSequence]]:
        yield responses(self._vllm, self._llm, prompts, generation, seed, self._vocab_size)

    def _ask(self, sequences: Sequence[TokenSequence], num_ids: int) -> list[_Rows]:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=num_ids, flat_logprobs=True
        )
        prompts = [{"prompt_token_ids": sequence.input_ids.tolist()} for sequence in sequences]
        with self._vllm.refusals():
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            self._read(sequence, output.prompt_logprobs, num_ids)
            for sequence, output in zip(sequences, outputs, strict=True)
        ]

    def _read(self, sequence: TokenSequence, flat: Any, num_ids: int) -> _Rows:
        """Nothing stands for the first token; of each further one, its logit at the row before, then the M highest."""
        shape = (sequence.num_tokens - 1, 1 + num_ids)
        ids, logits = np.array(flat.token_ids, dtype=np.int32), np.array(flat.logprobs, dtype=np.float32)
        if ids.size != shape[0] * shape[1] or not np.array_equal(ids.reshape(shape)[:, 0], sequence.input_ids[1:]):
            raise InputError(
                f"{self._vllm.name} gives other tokens' logits than those it was asked for: use another vllm release, "
                f"or engine.logits=head."
            )
        ids_TM, logits_TM = ids.reshape(shape)[:, 1:], logits.reshape(shape)[:, 1:]
        logits_TM = np.where(ids_TM < self._vocab_size, logits_TM, -np.inf)
        order_TM = np.lexsort((ids_TM, -logits_TM))
        return _Rows(
            np.take_along_axis(ids_TM, order_TM, axis=1),
            np.take_along_axis(logits_TM, order_TM, axis=1),
            logits.reshape(shape)[:, 0],
        )

    def _require_finite(self, sequence: TokenSequence, rows: _Rows, top_k: int) -> None:
        if not (np.isfinite(rows.logits_TM[:, :top_k]).all() and np.isfinite(rows.label_logit_T).all()):
            raise InputError(
                f"{self.identity.name}: its logits hold NaN or infinity at sequence {sequence.sequence_id.hex()}: a "
                f"weight is not finite, or {self.identity.dtype} overflows. Repair the checkpoint, or give another "
                f"--dtype."
            )

    def _check(self, batch: Sequence[TokenSequence], asked: Sequence[_Rows], top_k: int) -> None:
        name = self._vllm.name
        require_raw_logits(np.concatenate([rows.logits_TM[:, :top_k] for rows in asked]), self._num_rows, name)
        reason = reason_against_reference(self.identity, self.engine, read_config(self._vllm.directory))
        if reason:
            say_not_compared(name, reason)
            return
        shortest = min(range(len(batch)), key=lambda index: batch[index].num_tokens)
        try:
            expected_NV = reference_logits(self._model, self.identity, self.engine, batch[shortest], self._vocab_size)
        except InputError as error:  # a model that only vLLM knows is what this engine is for
            say_not_compared(name, str(error))
            return
        rows, num_rows = asked[shortest], min(REFERENCE_TOKENS, batch[shortest].num_tokens) - 1
        ids_NK = torch.from_numpy(rows.ids_TM[:num_rows, :top_k].astype(np.int64))
        labels_N1 = torch.from_numpy(batch[shortest].input_ids[1 : num_rows + 1, None].astype(np.int64))
        top_NK, label_N1 = rows.logits_TM[:num_rows, :top_k], rows.label_logit_T[:num_rows, None]
        given = torch.from_numpy(np.concatenate([top_NK, label_N1, top_NK], axis=1))
        # The same ids, and that none is higher.
        expected = [expected_NV.gather(1, torch.cat([ids_NK, labels_N1], 1)), expected_NV.topk(top_k).values]
        require_same_logits(given, torch.cat(expected, 1), self.identity.dtype, name)


def _at(target_rows: npt.NDArray[np.int64], rows: _Rows, top_k: int) -> TopKRows:
    return TopKRows(
        token_ids=rows.ids_TM[target_rows, :top_k],
        logits=rows.logits_TM[target_rows, :top_k],
        tail_logsumexp=np.empty((len(target_rows), 0), dtype=np.float32),
        label_logit=rows.label_logit_T[target_rows],
    )
