"""The plan of a cache: what it is of, and how it was made. Every worker must bring the same."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from cache_schema.errors import CacheMismatchError
from cache_schema.sequence import Positions

FORMAT_VERSION = 1
Dtype = Literal["float32", "bfloat16", "float16"]
READ_FROM_FILE = "stored"
"""Validation context of what is read from a file, where nothing may be left to measure."""


class Stored(BaseModel):
    """A document of the format, or a part of one."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TeacherIdentity(Stored):
    name: str
    """Hub name, or the last part of a local path. For people; the fingerprint is the identity."""
    fingerprint: str
    """SHA-256 over the model's config and the bytes of its weight files."""
    architecture: str
    num_parameters: int
    dtype: Dtype
    """Compute dtype of body and LM head."""


class TokenizerIdentity(Stored):
    fingerprint: str
    vocab_size: int
    """Highest token id, added tokens included, plus one: the V of every softmax, log-sum-exp and top-k."""
    chat_template: str | None
    """SHA-256 of the chat template, if there is one."""


class DatasetIdentity(Stored):
    name: str
    sha256: str
    """Over the rows that were read, in order."""
    sequences_sha256: str
    """Over the ids of the sequences, in order: the tokens and masks made of those rows. A chat template that prints
    today's date, say, makes other tokens of the same rows tomorrow."""
    num_rows: int
    num_duplicates: int
    """Rows whose ids and mask another row already had; stored once."""
    num_truncated: int
    max_tokens: int


class Generation(Stored):
    """How the teacher wrote the responses, where it did."""

    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    seed: int
    end_token_ids: tuple[int, ...]
    """What ends a response, ascending: the tokenizer's EOS and those of the model's generation config."""


class Engine(Stored):
    name: Literal["transformers", "vllm"]
    device: str
    """``cpu`` or the accelerator's name."""
    num_threads: int
    """CPU threads; they decide the order of float32 sums. 0 on an accelerator."""
    tokens_per_batch: int
    compiled: bool = False
    """Whether torch.compile made the body, which adds in another order."""
    tensor_parallel: int = 1
    """Devices each layer is split over; they decide the order of sums, as the next."""
    pipeline_parallel: int = 1
    """Devices the layers are dealt out to."""
    quantization: str | None = None
    """vLLM's name of what it made of the weights while loading; None: nothing, they are the checkpoint's."""
    logits: Literal["head", "engine"] = "head"
    """``head``: made of hidden states with the checkpoint's LM head. ``engine``: vLLM's own, of the leading ids and the
    label alone."""
    versions: dict[str, str]


class HiddenStates(Stored):
    dtype: Dtype | Literal["int8"]
    """The teacher's compute dtype, or int8; see ``cache_schema.encoding`` for what int8 stores."""
    size: int
    """d, the width of the final-norm output."""
    channel_scale: tuple[float, ...] | None = None
    """int8 alone, as what follows: each channel's share of a step. None there: not measured yet, so not stored yet."""
    residual_channels: tuple[int, ...] | None = None
    """Channels that have a second int8 below the first, ascending."""
    mean_logit_error: float | None = None
    """Mean of |logit from int8 - logit| over whole rows, in nats, at positions that did not set the scales."""
    max_logit_error: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether nothing is missing to store or read them: int8 needs its scales."""
        return self.dtype != "int8" or self.channel_scale is not None

    @model_validator(mode="after")
    def _scales_are_int8_s(self, info: ValidationInfo) -> Self:
        scales, channels = self.channel_scale, self.residual_channels
        errors = (self.mean_logit_error, self.max_logit_error)
        if scales is None or channels is None or None in errors:
            if (scales, channels, *errors) != (None,) * 4:
                raise ValueError("int8 scales and logit errors stand together or not at all")
            if info.context == READ_FROM_FILE and not self.is_measured:
                raise ValueError("int8 hidden states without their scales")
            return self
        if self.dtype != "int8":
            raise ValueError(f"{self.dtype} hidden states have no int8 scales")
        if len(scales) != self.size or not all(math.isfinite(scale) and scale > 0 for scale in scales):
            raise ValueError(f"channel_scale must be {self.size} finite numbers above 0")
        if not all(first < second for first, second in pairwise((-1, *channels, self.size))):
            raise ValueError(f"residual_channels must ascend from 0 to {self.size - 1} at most")
        if not all(error is not None and math.isfinite(error) and error >= 0 for error in errors):
            raise ValueError("logit errors must be finite and at least 0")
        return self


class Sampling(Stored):
    """How ids were drawn from the teacher's rows, where a cache stores draws and not a top-k."""

    draws: int = Field(ge=1, le=2**16 - 1)
    """Draws a position, with replacement, at temperature 1 over the whole vocabulary."""
    seed: int = Field(ge=0, lt=2**63)


class Plan(Stored):
    format_version: int = FORMAT_VERSION
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    dataset: DatasetIdentity
    responses: Generation | None
    """None: the data set's own responses."""
    engine: Engine
    positions: Positions
    sampling: Sampling | None = None
    """None: the top-k and its logits are stored."""
    top_k: int = Field(ge=0)
    """0 with ``sampling``, which stores no logits; ``logit_step`` is 0 then, and there are no temperatures."""
    logit_step: float = Field(ge=0)
    """Grid of the stored logits in nats: each is within half a step of the truth. 0 stores float32."""
    temperatures: tuple[float, ...]
    """Where ``tail_logsumexp`` is stored; nowhere where ``logits_alone``."""
    hidden_states: HiddenStates | None
    num_sequences: int = Field(ge=1)
    sequences_per_shard: int = Field(ge=1)

    @property
    def logits_alone(self) -> bool:
        """Whether the engine gave no more of a row than leading logits and the label's: no tails, no moments."""
        return self.engine.logits == "engine"

    @property
    def num_shards(self) -> int:
        return -(-self.num_sequences // self.sequences_per_shard)

    def shard_range(self, shard: int) -> range:
        """Indexes, in data set order, of the sequences that ``shard`` holds."""
        first = shard * self.sequences_per_shard
        return range(first, min(first + self.sequences_per_shard, self.num_sequences))

    @model_validator(mode="after")
    def _top_k_or_draws(self) -> Self:
        if self.sampling is None and self.top_k == 0:
            raise ValueError("top_k is 0 in a cache without sampling: at least one logit of a position is stored")
        if self.sampling is not None and (self.top_k, self.logit_step, self.temperatures) != (0, 0, ()):
            raise ValueError("sampling stores no logits: top_k and logit_step must be 0, and temperatures empty")
        return self

    @model_validator(mode="after")
    def _nothing_that_takes_a_whole_row(self) -> Self:
        if self.logits_alone and (self.engine.name, self.sampling, self.temperatures, self.hidden_states) != (
            "vllm", None, (), None,
        ):  # fmt: skip
            raise ValueError(
                "logits of the engine's own are vllm's, and come without sampling, temperatures and hidden states"
            )
        return self


def require_same_plan(cache_dir: Path, stored: Plan, wanted: Plan) -> None:
    """Refuse to go on in a directory of another plan, naming the first field that differs.

    The teacher's name is for people: a renamed folder is the same teacher.

    Raises:
        CacheMismatchError: always, unless the plans are equal but for that name.
    """
    there, here = stored.model_dump(mode="json"), wanted.model_dump(mode="json")
    here["teacher"]["name"] = there["teacher"]["name"]
    difference = _first_difference("", there, here)
    if difference:
        field, its, ours = difference
        raise CacheMismatchError(
            f"{cache_dir} belongs to another dump: its {field} is {its}, this command's is {ours}. Give --out "
            f"another directory, or repeat the options that dump was started with."
        )


def _first_difference(field: str, there: Any, here: Any) -> tuple[str, Any, Any] | None:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            found = _first_difference(f"{field}.{key}".lstrip("."), there.get(key), here.get(key))
            if found:
                return found
        return None
    return None if there == here else (field, there, here)
