"""What a distillation run can be told. The cache says the rest: tokens, teacher, vocabulary, k stored."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from workers.distill.adapters import Part, PeftConfig, require_freezable
from workers.distill.config_section import ConfigSection
from workers.distill.loss_config import LossConfig
from workers.distill.schedules import ScheduleConfig, SwitchConfig, losses_in_turn, require_sound
from workers.distill.selection import FilterConfig
from workers.lookup.config import LookupConfig, OnMiss

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class OptimizerConfig(ConfigSection):
    """AdamW on float32 weights, with warm-up and decay of the learning rate."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """adamw is torch's, fused; the others are those of bitsandbytes, for engine torch alone."""
    lr: float = Field(2e-5, gt=0, allow_inf_nan=False)
    """Highest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which the learning rate rises to ``lr``."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same in steps; wins over ``warmup``."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Share of ``lr`` that the schedule ends with."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    """AdamW's, added to the root of the second moment."""
    weight_decay: float = Field(1e-4, ge=0, allow_inf_nan=False)
    """AdamW's, on matrices; norms and biases do not decay."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Gradients are scaled down to this L2 norm."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an average of the weights, of this decay a step, and save it as a student of its own."""

    @model_validator(mode="after")
    def _a_constant_rate_ends_as_it_is(self) -> "OptimizerConfig":
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError("min_lr_ratio is where a schedule ends, and a constant one stays: leave it out")
        return self


class EngineConfig(ConfigSection):
    """What the student's weights, gradients and moments are held and updated by."""

    name: Literal["torch", "fsdp2", "deepspeed"] = "torch"
    """torch: whole on every rank (DDP where there are several); fsdp2: in shards; deepspeed: by ``zero_stage``."""
    zero_stage: int | None = Field(None, ge=0, le=3)
    """What DeepSpeed divides over the ranks, 1: moments and float32 weights; 2: gradients too; 3: weights too. None is
    that of ``deepspeed_config``, or 2."""
    offload_optimizer: str | None = None
    """DeepSpeed: keep moments and float32 weights in memory (``cpu``) or in a directory on a local NVMe."""
    offload_parameters: str | None = None
    """The same for the weights of stage 3."""
    deepspeed_config: str | None = None
    """A DeepSpeed JSON file; what it says of this run must be "auto", absent or the same."""

    @model_validator(mode="after")
    def _for_deepspeed_alone(self) -> "EngineConfig":
        for key in ("zero_stage", "offload_optimizer", "offload_parameters", "deepspeed_config"):
            if self.name != "deepspeed" and getattr(self, key) is not None:
                raise ValueError(f"engine.{key} is for DeepSpeed: give --engine deepspeed, or leave it out")
        return self


class EarlyStoppingConfig(ConfigSection):
    """End a run that the evaluations every ``eval_every`` steps no longer see improve."""

    metric: Literal["overlap@8", "kl", "loss"] = "overlap@8"
    """Of the evaluation on ``eval_cache``; overlap is to rise, the others are to fall."""
    patience: int = Field(3, ge=1)
    """Evaluations without improvement, one after the other, that end the run."""
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False)
    """What a value must be better by to be an improvement."""


class DistillConfig(ConfigSection):
    cache: tuple[str, ...] = Field(min_length=1)
    """One cache, or several that one tokenizer made."""
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None
    """Shares of several caches in an epoch, one a cache; None takes every sequence of all of them once."""
    filter: FilterConfig | None = None
    """Which sequences are trained on; None takes all."""
    student: str
    student_layers: tuple[int, ...] | None = None
    """Make the student of these layers of ``student``."""
    peft: PeftConfig | None = None
    """Train adapters of the student's linear layers, and not the layers."""
    freeze: tuple[Part, ...] = ()
    """What stays as it is where the rest of the student is trained; tied embeddings and head are one."""
    loss: LossConfig = LossConfig()
    prompt_loss: LossConfig | None = None
    """A second loss, on the prompt's positions; needs a cache of all positions."""
    schedule: tuple[ScheduleConfig, ...] = ()
    """Numbers of the losses that move over the run."""
    switch: tuple[SwitchConfig, ...] = ()
    """Other losses from some step on."""
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
    """bfloat16 is autocast over float32 weights, or with fsdp2 and deepspeed a bfloat16 copy of them."""
    device: str = "auto"
    sequences_per_step: int = Field(8, ge=1)
    """Sequences of one optimizer step, of all ranks together."""
    micro_batch_sequences: int = Field(4, ge=1)
    """Sequences the student reads at once on a rank; changes memory, not the training."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward instead of keeping them."""
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints; a killed run loses fewer than this."""
    keep_checkpoints: int | None = Field(None, ge=1)
    """The latest so many stay, also when the run is finished; None keeps one, until then."""
    eval_cache: str | None = None
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations on ``eval_cache``; None evaluates before the first step and after the last."""
    early_stopping: EarlyStoppingConfig | None = None
    """End the run before its last step where evaluations improve no more."""
    trackers: tuple[TrackerName, ...] = ()
    """Where the steps are reported beside ``metrics.jsonl``; each is an extra of its name."""
    tracker_project: str = Field("logit-cache", min_length=1)
    """The project of W&B and Trackio, the experiment of MLflow."""

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
    def _freeze_or_peft(self) -> "DistillConfig":
        require_freezable(self.freeze, self.peft)
        return self

    @model_validator(mode="after")
    def _schedules_fit_the_losses(self) -> "DistillConfig":
        require_sound(losses_in_turn(self.loss, self.prompt_loss, self.switch), self.schedule)
        return self

    @model_validator(mode="after")
    def _a_weight_a_cache(self) -> "DistillConfig":
        if self.early_stopping and not (self.eval_cache and self.eval_every):
            raise ValueError("early_stopping looks at evaluations: give eval_cache and eval_every")
        if self.eval_every and not self.eval_cache:
            raise ValueError("eval_every has nothing to evaluate on: give eval_cache, or leave it out")
        if self.weights is not None and len(self.weights) != len(self.cache):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.cache)} caches: give one a cache")
        if len(set(self.cache)) != len(self.cache):
            raise ValueError("cache names one cache twice: give it once, with a weight")
        return self
