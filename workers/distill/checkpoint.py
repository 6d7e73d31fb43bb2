"""A run's state between two steps: weights, the optimizer's state and targets that move, by parameter name.

Every tensor is stored whole, in safetensors, whatever engine trained it on however many ranks, so that any other can go
on with it. Each rank writes a part of them. Data order, learning rate and random numbers are functions of the step.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cache_schema.storage import publish_directory
from workers.distill.engines.engine import Engine
from workers.distill.taid import TaidSchedule
from workers.errors import InputError
from workers.ranks import Ranks

FOLDER = "checkpoints"
_STATE_NAME = "state.json"


def save_checkpoint(
    run_dir: Path, step: int, engine: Engine, moving: Mapping[int, TaidSchedule], ranks: Ranks, *, keep: int
) -> None:
    """Publish the state after ``step`` steps as a whole, then delete all but the latest ``keep``. Collective."""
    folder = run_dir / FOLDER / f"step-{step:06d}"
    if ranks.from_first(folder.exists):
        return
    weights, optimizer = _own_part(engine, ranks)
    with ExitStack() as published:
        temporary = ranks.from_first(lambda: published.enter_context(publish_directory(folder)))
        ranks.together(lambda: save_file(weights, temporary / f"model-{ranks.rank:05d}.safetensors"))
        ranks.together(lambda: save_file(optimizer, temporary / f"optimizer-{ranks.rank:05d}.safetensors"))
        if ranks.is_first:
            state = {"ranks": ranks.size, "moving": {place: schedule.state() for place, schedule in moving.items()}}
            (temporary / _STATE_NAME).write_text(json.dumps(state), encoding="utf-8")
    if ranks.is_first:
        for older in sorted(folder.parent.glob("step-*"))[:-keep]:
            shutil.rmtree(older)


def latest_checkpoint(run_dir: Path) -> Path | None:
    folders = sorted((run_dir / FOLDER).glob("step-*"))
    return folders[-1] if folders else None


def load_checkpoint(folder: Path, engine: Engine, moving: Mapping[int, TaidSchedule]) -> int:
    """Put a checkpoint back into the engine and the moving targets. Returns the steps already done.

    Raises:
        InputError: it is damaged or of another model.
    """
    try:
        state = json.loads((folder / _STATE_NAME).read_text(encoding="utf-8"))
        parts = range(state["ranks"])
        with ExitStack() as files:
            weights, optimizer = (
                _Stored([folder / f"{kind}-{part:05d}.safetensors" for part in parts], files)
                for kind in ("model", "optimizer")
            )
            engine.restore(weights, optimizer)
        for place, schedule in moving.items():
            schedule.restore(state["moving"][str(place)])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be resumed from: {error}. Delete it to go on from an older checkpoint or the beginning."
        ) from error
    return int(folder.name.removeprefix("step-"))


def _own_part(engine: Engine, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights and the optimizer's state that this rank writes: those of about as many numbers as any other's."""
    weights: dict[str, Tensor] = {}
    given = [0] * ranks.size
    for name, weight in engine.weights():
        owner = given.index(min(given))
        given[owner] += weight.numel()
        if owner == ranks.rank:
            weights[name] = weight.cpu().contiguous()
    optimizer: dict[str, Tensor] = {}
    for name, state in engine.optimizer_state():
        if name in weights:
            # Cloned where they are small: several may be views of one number.
            optimizer |= {
                f"{name}/{key}": value.cpu().clone() if value.ndim == 0 else value.cpu().contiguous()
                for key, value in state.items()
            }
    return weights, optimizer


class _Stored(Mapping[str, Tensor]):
    """The tensors of some safetensors files, each read when asked for."""

    def __init__(self, files: Sequence[Path], stack: ExitStack) -> None:
        self._file_of: dict[str, Any] = {}
        for path in files:
            file = stack.enter_context(safe_open(path, "pt"))
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)
