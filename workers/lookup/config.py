"""How a run's lookups are answered; all of it but the tier ``bound`` gives the same student."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

OnMiss = Literal["refuse", "bound"]


class LookupConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    dir: str | None = None
    """Where the lookup log is written; None is ``lookups/`` inside the cache. For caches that cannot be written."""
    log: Literal["hidden", "logits", "none"] = "hidden"
    """What a live teacher's work leaves behind: the hidden states of its sequences, after which nobody asks for them
    again; answers at the ids the student asked for, smaller and soon short of others; or nothing."""
    fetch_ahead: int = Field(64, ge=0)
    """With ``log = "logits"``: at every position of a sequence, this many of the student's highest ids are answered at
    once."""
    tokens_per_batch: int | None = Field(None, ge=1)
    """Padded tokens a live teacher reads at once; None is as many as at the dump."""
    head_device: str = "auto"
    """Where the teacher's LM head answers; auto is the student's device, or the CPU, memory-mapped, where the head
    would take more than a quarter of its free memory."""
    teacher_device: str = "auto"
    """Where a live teacher runs; auto is the student's device, ``offload`` keeps its weights in the CPU's memory and
    brings them to the student's device layer by layer."""

    @field_validator("dir")
    @classmethod
    def _local(cls, value: str | None) -> str | None:
        return None if value is None else local_directory(value)


def local_directory(text: str) -> str:
    """What was given for a log's directory, if it can be one.

    Raises:
        ValueError: it is empty, or a URI.
    """
    if not text:
        raise ValueError("--lookups is empty: give a directory, or leave it out for the log inside the cache")
    if "://" in text:
        raise ValueError(
            f"--lookups {text} is a URI, and a log is written to a local directory: give one, or mount the store"
        )
    return text
