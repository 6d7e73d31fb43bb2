"""What a dump can be told."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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
    limit: int | None = Field(None, ge=1)
    """Read this many rows at most."""
    max_tokens: int | None = Field(None, ge=2)
    """Longest sequence, prompt and response together; None is 2,048, or the teacher's context if that is shorter."""


class CacheConfig(_Section):
    top_k: int = Field(64, ge=1)
    positions: Positions = "response"
    hidden_states: bool = True
    logit_step: float = Field(1 / 64, ge=0)
    """Grid of the stored logits in nats; 0 stores float32."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 3.0)
    """Where the tail's log-sum-exp is stored."""
    sequences_per_shard: int = Field(512, ge=1)


class ResponsesConfig(_Section):
    source: Literal["dataset", "teacher"] = "dataset"
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0)


class EngineConfig(_Section):
    name: Literal["transformers"] = "transformers"
    device: str = "auto"
    tokens_per_batch: int = Field(4096, ge=1)
    """Padded tokens the teacher reads at once."""


class DumpConfig(_Section):
    teacher: TeacherConfig
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    responses: ResponsesConfig = ResponsesConfig()
    engine: EngineConfig = EngineConfig()
