"""What a dump can be told."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cache_schema.plan import Dtype
from cache_schema.sequence import Positions


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherConfig(_Section):
    model: str
    """A folder in Hugging Face format, or a hub name."""
    dtype: Dtype | None = None
    """Compute dtype; None is the checkpoint's."""


class DataConfig(_Section):
    path: str
    """JSONL or Parquet, a saved dataset folder, or a dataset's hub name."""
    split: str | None = None
    """Which split of a dataset that has several; None is ``train``."""
    limit: int | None = Field(None, ge=1)
    """Read this many rows at most."""
    max_tokens: int | None = Field(None, ge=2)
    """Longest sequence, prompt and response together; None is 2,048, or the teacher's context if that is shorter."""


class CacheConfig(_Section):
    sampling: Literal["top-k", "random"] = "top-k"
    """What is stored of each teacher row: the highest logits, or ids drawn from its softmax (for RS-KD)."""
    top_k: int = Field(64, ge=1)
    draws: int = Field(50, ge=1, le=2**16 - 1)
    """With ``random``: draws per position; 50 give about 12 ids."""
    sample_seed: int = Field(0, ge=0, le=10**9)
    """With ``random``: of the draws."""
    positions: Positions = "response"
    hidden_states: bool = True
    hidden_dtype: Literal["int8"] | None = None
    """``int8`` stores about half the bytes of bfloat16, and logits from them are no longer exact; None is the
    teacher's compute dtype."""
    logit_step: float = Field(1 / 64, ge=0, le=1, allow_inf_nan=False)
    """Grid of the stored logits in nats, 1/4096 at least; 0 stores float32."""
    temperatures: tuple[Annotated[float, Field(ge=0.01, allow_inf_nan=False)], ...] = Field((1.0, 3.0), min_length=1)
    """Where the tail's log-sum-exp is stored."""
    sequences_per_shard: int = Field(512, ge=1)
    """A killed dump scores at most this many sequences again."""

    @field_validator("logit_step")
    @classmethod
    def _coarser_than_float32(cls, step: float) -> float:
        if 0 < step < 1 / 4096:
            raise ValueError(f"a step of {step:g} is finer than float32 keeps large logits: give 0 to store float32")
        return step

    @model_validator(mode="after")
    def _nothing_of_the_other_sampling(self) -> Self:
        random = self.sampling == "random"
        meaningless = ("top_k", "logit_step", "temperatures") if random else ("draws", "sample_seed")
        given = " and ".join(key for key in meaningless if key in self.model_fields_set)
        if given and random:
            raise ValueError(
                f"--sampling random stores draws and no logits, so {given} can mean nothing: leave out one or the other"
            )
        if given:
            raise ValueError(
                f"only --sampling random draws ids, so {given} can mean nothing: give it too, or leave {given} out"
            )
        return self

    @model_validator(mode="after")
    def _nothing_to_store_as_int8(self) -> Self:
        if self.hidden_dtype and not self.hidden_states:
            raise ValueError(
                f"hidden_dtype={self.hidden_dtype} says how to store hidden states, and they are to be left out: give "
                f"--hidden-dtype or --no-hidden-states (hidden_states=false), not both"
            )
        return self


class ResponsesConfig(_Section):
    source: Literal["dataset", "teacher"] = "dataset"
    max_new_tokens: int = Field(256, ge=1)
    """Longest response the teacher writes; one that reaches it has no EOS."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability."""
    seed: int = Field(0, ge=0)
    """Of the sampling."""


class EngineConfig(_Section):
    name: Literal["transformers", "vllm"] = "transformers"
    """What runs the teacher's body. The keys below ``compile`` are for ``vllm`` alone."""
    device: str = "auto"
    """With ``vllm``, of the LM head; vLLM takes the first GPUs it sees, or the CPU."""
    tokens_per_batch: int = Field(4096, ge=1)
    """Padded tokens the teacher reads at once."""
    compile: bool = False
    """With ``transformers``: compile the body, which takes minutes and a C++ compiler; for long dumps."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs that share each layer."""
    pipeline_parallel: int = Field(1, ge=1)
    """Groups of such GPUs, each with a part of the layers."""
    quantization: str | None = None
    """What vLLM is to make of the weights while it loads them, by its name, ``fp8`` for instance; None leaves them as
    they are in the checkpoint, quantised or not."""
    memory_fraction: float = Field(0.8, gt=0, lt=1)
    """Share of each GPU's memory that vLLM takes; the rest is for the LM head and its logits."""
    logits: Literal["head", "engine"] = "head"
    """``head`` makes them of hidden states and the checkpoint's LM head; ``engine`` takes vLLM's own, of a model whose
    hidden states vLLM does not give, or whose head cannot be read. There are no tails then, and no hidden states."""
    self_check: bool = True
    """Before the first batch is stored, hold vLLM against the final norm's weights and the transformers engine."""

    @model_validator(mode="after")
    def _nothing_of_vllm_elsewhere(self) -> Self:
        of_vllm = ("tensor_parallel", "pipeline_parallel", "quantization", "memory_fraction", "logits", "self_check")
        given = " and ".join(key for key in of_vllm if key in self.model_fields_set)
        if given and self.name != "vllm":
            raise ValueError(f"only --engine vllm (engine.name=vllm) reads {given}: give it too, or leave {given} out")
        if self.compile and self.name == "vllm":
            raise ValueError("compile is for the transformers engine; vllm compiles by itself: leave it out")
        return self


_OTHER_KEYS_OF_RAY = {
    "CPU": "give worker.ray_cpus",
    "GPU": "give worker.ray_gpus",
    "memory": "leave it out",
    "object_store_memory": "leave it out",
}
"""What may not stand among ``ray_resources``, and what to do instead."""


class WorkerConfig(_Section):
    lease_seconds: float = Field(60, ge=1, le=86_400, allow_inf_nan=False)
    """After so long without a sign of life of a worker on another machine, others take over its shards."""
    launcher: Literal["processes", "ray"] | None = None
    """What starts the workers: ``processes`` of this machine, or actors of a ``ray`` cluster; None is this process
    alone, or something outside."""
    count: int | None = Field(None, ge=1)
    """With a launcher: how many workers it starts."""
    ray_address: str | None = None
    """Of the cluster; None is what RAY_ADDRESS says, else a cluster on this machine for as long as the dump takes."""
    ray_cpus: float = Field(1, ge=0, allow_inf_nan=False)
    """CPUs that Ray sets aside for each worker."""
    ray_gpus: float | None = Field(None, ge=0, allow_inf_nan=False)
    """GPUs for each worker; None is as many as its engine uses, and none where the cluster has none."""
    ray_resources: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Other resources of the cluster that each worker takes, by name."""

    @field_validator("ray_resources")
    @classmethod
    def _resources_of_other_names(cls, resources: dict[str, float] | None) -> dict[str, float] | None:
        for name in resources or {}:
            if name in _OTHER_KEYS_OF_RAY:
                raise ValueError(f"{name} is no resource of the user's own: {_OTHER_KEYS_OF_RAY[name]}")
        return resources

    @model_validator(mode="after")
    def _launcher_and_count(self) -> Self:
        if (self.launcher is None) != (self.count is None):
            raise ValueError("launcher and count belong together: give --launcher and --workers, or neither")
        given = " and ".join(sorted(key for key in self.model_fields_set if key.startswith("ray_")))
        if given and self.launcher != "ray":
            raise ValueError(
                f"only --launcher ray (worker.launcher=ray) reads {given}: give it too, or leave {given} out"
            )
        return self


class DumpConfig(_Section):
    teacher: TeacherConfig
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    responses: ResponsesConfig = ResponsesConfig()
    engine: EngineConfig = EngineConfig()
    worker: WorkerConfig = WorkerConfig()

    @model_validator(mode="after")
    def _nothing_the_engine_does_not_give(self) -> Self:
        if self.engine.logits == "head":
            return self
        if self.cache.sampling != "top-k":
            raise ValueError(
                "engine.logits=engine gives the leading logits alone, and --sampling random draws from whole rows: "
                "leave one of them out"
            )
        if self.cache.hidden_states:
            raise ValueError(
                "engine.logits=engine gives no hidden states: give --no-hidden-states (cache.hidden_states=false) too"
            )
        if "temperatures" in self.cache.model_fields_set:
            raise ValueError(
                "engine.logits=engine gives the leading logits alone, and no tail at any temperature: leave "
                "cache.temperatures out"
            )
        return self
