"""What a dump can be told."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cache_schema.manifest import Dtype
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
    name: Literal["transformers"] = "transformers"
    """What runs the teacher's body."""
    device: str = "auto"
    tokens_per_batch: int = Field(4096, ge=1)
    """Padded tokens the teacher reads at once."""


class DumpConfig(_Section):
    teacher: TeacherConfig
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    responses: ResponsesConfig = ResponsesConfig()
    engine: EngineConfig = EngineConfig()
