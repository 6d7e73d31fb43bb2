"""A run's state between two steps, in safetensors and JSON: weights, AdamW moments, schedule, random state."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cache_schema.storage import publish_directory
from workers.errors import InputError

FOLDER = "checkpoints"


def save_checkpoint(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> None:
    """Publish the state after ``step`` steps as a whole, then delete the older ones."""
    name = f"step-{step:06d}"
    if (run_dir / FOLDER / name).exists():
        return
    with publish_directory(run_dir / FOLDER / name) as temporary:
        save_file(_weights(model), temporary / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        (temporary / "schedule.json").write_text(json.dumps(scheduler.state_dict()), encoding="utf-8")
    for folder in sorted((run_dir / FOLDER).glob("step-*")):
        if folder.name < name:
            shutil.rmtree(folder)


def latest_checkpoint(run_dir: Path) -> Path | None:
    folders = sorted((run_dir / FOLDER).glob("step-*"))
    return folders[-1] if folders else None


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> int:
    """Put a checkpoint back into model, optimizer, schedule and random state. Returns the steps already done.

    Raises:
        InputError: it is damaged or of another model.
    """
    try:
        schedule = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
                optimizer.state[parameter] = {
                    key: tensors[f"{name}/{key}"].to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        scheduler.load_state_dict(schedule)
        for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be resumed from: {error}. Delete it to go on from an older checkpoint or the beginning."
        ) from error
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return int(folder.name.removeprefix("step-"))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter once, also where two modules share it."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = value.contiguous()
    return tensors
