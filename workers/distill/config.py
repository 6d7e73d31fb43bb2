"""What a distillation run can be told. The cache says the rest: tokens, teacher, vocabulary, k stored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from workers.distill.loss_config import LossConfig
from workers.lookup.config import LookupConfig, OnMiss


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerConfig(_Section):
    """AdamW with linear warm-up and cosine decay to zero."""

    lr: float = Field(2e-5, gt=0, allow_inf_nan=False)
    """Highest learning rate, reached after the warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = Field(1e-4, ge=0, allow_inf_nan=False)
    """AdamW's, on every weight."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which the learning rate rises to ``lr``."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Gradients are scaled down to this L2 norm."""


class DistillConfig(_Section):
    cache: tuple[str, ...] = Field(min_length=1)
    """One cache, or several that one tokenizer made."""
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None
    """Shares of several caches in an epoch, one a cache; None takes every sequence of all of them once."""
    student: str
    student_layers: tuple[int, ...] | None = None
    """Make the student of these layers of ``student``."""
    loss: LossConfig = LossConfig()
    prompt_loss: LossConfig | None = None
    """A second loss, on the prompt's positions; needs a cache of all positions."""
    teacher: str | None = None
    """For lookups that neither the stored top-k nor stored hidden states can answer."""
    on_miss: OnMiss = "refuse"
    """``bound`` lets an upper bound stand for what no tier answers; otherwise such a run does not start."""
    lookups: LookupConfig = LookupConfig()
    """How lookups outside the stored top-k are answered; none of it changes the student."""
    epochs: int = Field(1, ge=1)
    steps: int | None = Field(None, ge=1)
    """Wins over epochs."""
    seed: int = Field(0, ge=0, lt=2**63)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """bfloat16 is autocast over float32 weights."""
    device: str = "auto"
    sequences_per_step: int = Field(8, ge=1)
    """Sequences of one optimizer step."""
    micro_batch_sequences: int = Field(4, ge=1)
    """Sequences the student reads at once; changes memory, not the training."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward instead of keeping them."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints; a killed run loses fewer than this."""
    eval_cache: str | None = None
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations on ``eval_cache``; None evaluates before the first step and after the last."""

    @model_validator(mode="before")
    @classmethod
    def _loss_by_name(cls, values: Any) -> Any:
        """``loss = "kl"`` is short for ``loss = {name = "kl"}``, and one cache for a list of one."""
        if isinstance(values, dict):
            prompt = values.get("prompt_loss")
            if isinstance(prompt, dict) and "name" not in prompt:
                raise ValueError(
                    f"prompt_loss has {', '.join(prompt)} and no name: give --prompt-loss NAME, or leave it out"
                )
            named = {key: {"name": values[key]} for key in ("loss", "prompt_loss") if isinstance(values.get(key), str)}
            caches = {"cache": [values["cache"]]} if isinstance(values.get("cache"), str) else {}
            return {**values, **named, **caches}
        return values

    @model_validator(mode="after")
    def _losses_by_part(self) -> "DistillConfig":
        if self.prompt_loss is not None and self.prompt_loss.on_prompt is not None:
            raise ValueError(f"prompt_loss: {self.prompt_loss.name} is for the response and brings the prompt's own")
        if self.prompt_loss is not None and self.loss.on_prompt is not None:
            raise ValueError(f"loss {self.loss.name} brings the prompt's own: leave prompt_loss out, or choose bild")
        return self

    @model_validator(mode="after")
    def _a_weight_a_cache(self) -> "DistillConfig":
        if self.weights is not None and len(self.weights) != len(self.cache):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.cache)} caches: give one a cache")
        if len(set(self.cache)) != len(self.cache):
            raise ValueError("cache names one cache twice: give it once, with a weight")
        return self
