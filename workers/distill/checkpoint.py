"""A run's state between two steps, in safetensors: weights, AdamW's moments, random state, targets that move.

The rest is the config's.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cache_schema.storage import publish_directory
from workers.distill.taid import TaidSchedule
from workers.errors import InputError

FOLDER = "checkpoints"
_CPU_RNG, _CUDA_RNG = "rng/cpu", "rng/cuda"


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moving: Mapping[int, TaidSchedule],
) -> None:
    """Publish the state after ``step`` steps as a whole, then delete the older ones."""
    name = f"step-{step:06d}"
    if (run_dir / FOLDER / name).exists():
        return
    with publish_directory(run_dir / FOLDER / name) as temporary:
        # Each parameter once, also where two modules share it.
        weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
        save_file(weights, temporary / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer) | _moving_tensors(moving), temporary / "optimizer.safetensors")
    for folder in (run_dir / FOLDER).iterdir():  # older ones, and what a kill left of one half-written
        if folder.name != name:
            shutil.rmtree(folder)


def latest_checkpoint(run_dir: Path) -> Path | None:
    folders = sorted((run_dir / FOLDER).glob("step-*"))
    return folders[-1] if folders else None


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, moving: Mapping[int, TaidSchedule]
) -> int:
    """Put a checkpoint back into model, optimizer, moving targets and random state. Returns the steps already done.

    Raises:
        InputError: it is damaged or of another model.
    """
    try:
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
                # A parameter that never had a gradient has no moments.
                if f"{name}/step" in tensors:
                    optimizer.state[parameter] = {
                        "step": tensors[f"{name}/step"],
                        "exp_avg": tensors[f"{name}/exp_avg"].to(parameter.device),
                        "exp_avg_sq": tensors[f"{name}/exp_avg_sq"].to(parameter.device),
                    }
        for place, schedule in moving.items():
            t, momentum, previous = tensors[f"taid/{place}"].tolist()
            schedule.restore((t, momentum, previous))
        torch.set_rng_state(tensors[_CPU_RNG])
        device = next(model.parameters()).device
        if device.type == "cuda" and _CUDA_RNG in tensors:
            torch.cuda.set_rng_state(tensors[_CUDA_RNG], device)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be resumed from: {error}. Delete it to go on from an older checkpoint or the beginning."
        ) from error
    return int(folder.name.removeprefix("step-"))


def _moving_tensors(moving: Mapping[int, TaidSchedule]) -> dict[str, Tensor]:
    return {f"taid/{place}": torch.tensor(schedule.state(), dtype=torch.float64) for place, schedule in moving.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {_CPU_RNG: torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors[_CUDA_RNG] = torch.cuda.get_rng_state(device)
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            tensors |= {f"{name}/{key}": value.contiguous() for key, value in optimizer.state[parameter].items()}
    return tensors
