"""DeepSpeed's configuration, from a run's own settings and, where there is one, the user's DeepSpeed JSON file.

What a run's config sets, the file may leave out, leave to "auto" or repeat; everything else in it passes through.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workers.distill.config import DistillConfig
from workers.errors import InputError

AUTO = "auto"
DEFAULT_STAGE = 2

_SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}

_OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}
"""DeepSpeed's section, our setting."""

_REFUSED = {
    "amp.enabled": "set dtype",
    "bf16.bf16_master_weights_and_grads": "master weights are float32",
    "bf16.bf16_optimizer_states": "moments are float32",
    "gradient_allreduce_op": "gradients are always added up",
    "managed_gradient_accumulation": "the run says when a step ends",
    "sparse_gradients": "gradients are dense",
    "torch_autocast.enabled": "set dtype",
    "zero_optimization.cpu_offload": "write offload_optimizer instead",
    "zero_optimization.cpu_offload_param": "write offload_param instead",
    "zero_optimization.offload_optimizer.ratio": "the optimizer is offloaded as a whole",
    "zero_optimization.offload_optimizer.super_offload": "the optimizer is AdamW's own",
    "zero_optimization.zenflow": "every weight moves at every step",
    "zero_optimization.zero_quantized_gradients": "gradients are added up as they are",
    "zero_optimization.zero_quantized_nontrainable_weights": "weights are gathered as they are",
    "zero_optimization.zero_quantized_weights": "weights are gathered as they are",
}
"""What would make the training another than the config describes, and why or what instead."""

_KNOWN = frozenset({
    "activation_checkpointing", "aio", "allreduce_always_fp32", "bf16", "comms_logger", "communication_data_type",
    "csv_monitor", "data_types", "disable_allgather", "dump_state", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_clipping", "memory_breakdown", "optimizer", "prescale_gradients",
    "scheduler", "steps_per_print", "tensorboard", "timers", "train_batch_size", "train_micro_batch_size_per_gpu",
    "wandb", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization", *(key.partition(".")[0] for key in _REFUSED),
})  # fmt: skip
"""What a file may name; much else would train another student, or fail deep inside DeepSpeed."""

_NEEDED = ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm")
"""True by default; without them a gradient that is not finite would reach the weights."""

_OBJECTS = (
    "bf16", "data_types", "fp16", "optimizer", "optimizer.params", "scheduler", "scheduler.params",
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param",
)  # fmt: skip


def deepspeed_config(config: DistillConfig, *, num_ranks: int | None, hidden_size: int) -> dict[str, Any]:
    """What ``deepspeed.initialize`` takes as ``config``.

    At stage 0 DeepSpeed cannot add up gradients of bfloat16 weights in float32: weights stay float32 there, for
    autocast to compute with. From stage 1 on bfloat16 is DeepSpeed's own: bfloat16 weights, float32 masters.

    Args:
        num_ranks: None, before it is known, leaves out what the file says of it.
        hidden_size: of the student; sizes that a file leaves to "auto" follow from it, as in transformers.

    Raises:
        InputError: the file is no JSON object, or contradicts the config; names file, key, both values and the
            setting to change. Or the config asks for what its stage does not have.
    """
    file = config.engine.deepspeed_config
    given = _read(Path(file)) if file is not None else {}
    for key, advice in _REFUSED.items():
        if _at(given, key) not in (None, AUTO, False):
            raise InputError(f"{file}: {key} = {_shown(_at(given, key))} is not supported: {advice}.")
    for key in _NEEDED:
        if _at(given, key) not in (None, AUTO, True):
            raise InputError(
                f"{file}: {key} = {_shown(_at(given, key))}: must be true or left out, so that a gradient that is not "
                f"finite stops the run."
            )
    for key, ours, setting in _ours(config, num_ranks):
        theirs = _at(given, key)
        if theirs not in (None, AUTO) and not _equal(theirs, ours):
            raise InputError(
                f"{file}: {key} = {_shown(theirs)}, but this run has {_shown(ours)}: set {setting}, or write "
                f'"auto" in the file.'
            )
    _require_scheduler(config, given)
    return _merged(config, given, num_ranks or 1, hidden_size)


def _read(file: Path) -> dict[str, Any]:
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}. Give a DeepSpeed JSON file.") from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}.") from None
    if not isinstance(given, dict):
        raise InputError(f"{file} holds no JSON object: give a DeepSpeed configuration.")
    given = _without(given, None)
    unknown = sorted(given.keys() - _KNOWN)
    if unknown:
        raise InputError(
            f"{file}: {unknown[0]} is not supported, or is no key of DeepSpeed's: leave it out. Supported are "
            f"{', '.join(sorted(_KNOWN))}."
        )
    for key in _OBJECTS:
        if not isinstance(_at(given, key), dict | None) and _at(given, key) != AUTO:
            raise InputError(f"{file}: {key} = {_shown(_at(given, key))}: must be an object.")
    if _at(given, "fp16.enabled") not in (None, AUTO, False):
        raise InputError(f"{file}: fp16.enabled = true: float16 is not supported; remove it and set dtype = bfloat16.")
    stage = _at(given, "zero_optimization.stage")
    if stage not in (None, AUTO, 0, 1, 2, 3) or isinstance(stage, bool):
        raise InputError(f"{file}: zero_optimization.stage = {_shown(stage)}: ZeRO has the stages 0, 1, 2 and 3.")
    return given


def _ours(config: DistillConfig, num_ranks: int | None) -> Iterator[tuple[str, Any, str]]:
    """Every key of the file that the run sets: DeepSpeed's key, our value, our setting."""
    optimizer, engine = config.optimizer, config.engine
    yield "train_batch_size", config.sequences_per_step, "sequences_per_step"
    yield "train_micro_batch_size_per_gpu", config.micro_batch_sequences, "micro_batch_sequences"
    if num_ranks is not None:
        at_once = config.micro_batch_sequences * num_ranks
        yield (
            "gradient_accumulation_steps",
            _plain(config.sequences_per_step / at_once),
            f"sequences_per_step (micro_batch_sequences times {num_ranks} ranks, {at_once}, are read at once)",
        )
    yield "gradient_clipping", optimizer.max_grad_norm, "optimizer.max_grad_norm"
    yield "optimizer.type", "AdamW", "it to AdamW, DeepSpeed's only optimizer here"
    yield "optimizer.params.lr", optimizer.lr, "optimizer.lr"
    yield "optimizer.params.betas", list(optimizer.betas), "optimizer.betas"
    yield "optimizer.params.eps", optimizer.eps, "optimizer.eps"
    yield "optimizer.params.weight_decay", optimizer.weight_decay, "optimizer.weight_decay"
    yield "optimizer.params.adam_w_mode", True, "it to true"
    yield "bf16.enabled", config.dtype == "bfloat16", "dtype (bfloat16 or float32)"
    if engine.zero_stage is not None:
        yield "zero_optimization.stage", engine.zero_stage, "engine.zero_stage"
    for key, place in _offloads(config).items():
        yield f"zero_optimization.{key}.device", place["device"], f"engine.{_OFFLOADS[key]}"
        if "nvme_path" in place:
            yield f"zero_optimization.{key}.nvme_path", place["nvme_path"], f"engine.{_OFFLOADS[key]}"


def _require_scheduler(config: DistillConfig, given: dict[str, Any]) -> None:
    """The file may name the run's own schedule, and its peak; it counts warm-up and steps in ways of its own."""
    file, scheduler = config.engine.deepspeed_config, given.get("scheduler", AUTO)
    if scheduler == AUTO:
        return
    kind = scheduler.get("type", AUTO)
    if kind != AUTO and _SCHEDULERS.get(str(kind)) != config.optimizer.schedule:
        raise InputError(
            f"{file}: scheduler.type = {_shown(kind)}, but this run has {_shown(config.optimizer.schedule)}: set "
            f"optimizer.schedule, or remove scheduler from the file."
        )
    params = _at(scheduler, "params")
    for key, theirs in params.items() if isinstance(params, dict) else ():
        if theirs == AUTO or (key == "warmup_max_lr" and _equal(theirs, config.optimizer.lr)):
            continue
        raise InputError(
            f"{file}: scheduler.params.{key} = {_shown(theirs)}: set optimizer.lr, optimizer.warmup_steps and steps "
            f'instead, and write "auto" in the file.'
        )


def _merged(config: DistillConfig, given: dict[str, Any], num_ranks: int, hidden_size: int) -> dict[str, Any]:
    stage, passed = _stage(config, given), copy.deepcopy(given)
    for section in ("optimizer", "scheduler", "fp16"):
        passed.pop(section, None)
    zero = _section(passed, "zero_optimization")
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero = _without_auto({key: sizes[key] if key in sizes and value == AUTO else value for key, value in zero.items()})
    for key, place in _offloads(config).items():
        zero[key] = {**zero.get(key, {}), **place}
    _require_offload(zero, stage)
    return {
        # Gradients of many ranks are added up in float32, as those of micro-batches are.
        "communication_data_type": "fp32",
        **passed,
        "data_types": {"grad_accum_dtype": "fp32", **_section(passed, "data_types")},
        "train_micro_batch_size_per_gpu": config.micro_batch_sequences,
        "train_batch_size": config.micro_batch_sequences * num_ranks,
        # The engine says which micro-batch is a step's last: their number varies.
        "gradient_accumulation_steps": 1,
        # At stage 0 DeepSpeed clips and does not say the norm: the engine does it.
        "gradient_clipping": config.optimizer.max_grad_norm if stage > 0 else 0.0,
        "bf16": {
            **_without_auto(_section(passed, "bf16")),
            "enabled": config.dtype == "bfloat16" and stage > 0,
        },
        "zero_optimization": {**zero, "stage": stage},
        "zero_force_ds_cpu_optimizer": False,
    }


def _stage(config: DistillConfig, given: dict[str, Any]) -> int:
    """As the run asks, or else the file."""
    in_file = _at(given, "zero_optimization.stage")
    if config.engine.zero_stage is not None:
        return config.engine.zero_stage
    return in_file if isinstance(in_file, int) else DEFAULT_STAGE


def _offloads(config: DistillConfig) -> dict[str, dict[str, str]]:
    """DeepSpeed's sections for what the run offloads."""
    places = {key: getattr(config.engine, setting) for key, setting in _OFFLOADS.items()}
    return {
        key: {"device": "cpu"} if place == "cpu" else {"device": "nvme", "nvme_path": place}
        for key, place in places.items()
        if place is not None
    }


def _require_offload(zero: dict[str, Any], stage: int) -> None:
    """Refuse an offload that the stage does not have: DeepSpeed would leave it out, or fail deep inside."""
    for key, setting in _OFFLOADS.items():
        device = zero.get(key, {}).get("device", "none")
        lowest = 3 if device == "nvme" or key == "offload_param" else 1
        if device != "none" and stage < lowest:
            raise InputError(
                f"engine.{setting}: {device} needs ZeRO stage {lowest}{'' if lowest == 3 else ' or higher'}: set "
                f"engine.zero_stage, now {stage}, or leave the offload out."
            )


def _section(given: dict[str, Any], key: str) -> dict[str, Any]:
    section = given.get(key, AUTO)
    return {} if section == AUTO else dict(section)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """What is left to "auto" is left to DeepSpeed's defaults."""
    return _without(section, AUTO)


def _without(section: dict[str, Any], absent: Any) -> dict[str, Any]:
    return {
        key: _without(value, absent) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != absent
    }


def _at(given: Any, key: str) -> Any:
    """The value under a dotted key; None where there is none, "auto" where a section above it is."""
    for part in key.split("."):
        if given == AUTO:
            return AUTO
        if not isinstance(given, dict):
            return None
        given = given.get(part)
    return given


def _equal(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, str):
        return str(theirs).lower() == ours.lower()
    if isinstance(theirs, bool) or isinstance(ours, bool):
        return theirs is ours
    return bool(theirs == ours)


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _shown(value: Any) -> str:
    return json.dumps(value)
