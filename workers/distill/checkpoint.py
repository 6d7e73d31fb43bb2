"""A run's state between two steps: weights, the optimizer's state and targets that move, by parameter name.

Every tensor is stored whole, in safetensors, whatever engine trained it on however many ranks, so that any other can go
on with it. Each rank writes a part of them. Data order, learning rate and random numbers are functions of the step.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cache_schema.errors import CacheError
from cache_schema.storage import flush, publish_directory, refused, sha256_of
from workers.distill.engines.engine import Engine, T
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
        parts = [(_name("model", ranks.rank), weights), (_name("optimizer", ranks.rank), optimizer)]
        digests = ranks.gather(ranks.together(lambda: {name: _save(part, temporary / name) for name, part in parts}))
        if ranks.is_first:
            state = {
                "ranks": ranks.size,
                "sha256": {name: digest for own in digests for name, digest in own.items()},
                "moving": {place: schedule.state() for place, schedule in moving.items()},
            }
            (temporary / _STATE_NAME).write_text(json.dumps(state), encoding="utf-8")
    if ranks.is_first:
        for older in _checkpoints(run_dir)[:-keep]:
            shutil.rmtree(older)


def latest_checkpoint(run_dir: Path) -> Path | None:
    folders = _checkpoints(run_dir)
    return folders[-1] if folders else None


def _checkpoints(run_dir: Path) -> list[Path]:
    """In the order of their steps."""
    return sorted((run_dir / FOLDER).glob("step-[0-9]*[0-9]"), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def load_checkpoint(folder: Path, engine: Engine, moving: Mapping[int, TaidSchedule], ranks: Ranks) -> int:
    """Put a checkpoint back into the engine and the moving targets. Returns the steps already done. Collective.

    Raises:
        InputError: it is damaged or of another model.
    """

    def load(work: Callable[[], T]) -> T:
        try:
            return work()
        except (CacheError, OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise InputError(
                f"{folder} cannot be resumed from: {why}. Delete it to go on from an older checkpoint or the beginning."
            ) from error

    def restore() -> None:
        with ExitStack() as files:
            weights, optimizer = (
                _Stored([folder / _name(kind, part) for part in range(state["ranks"])], files)
                for kind in ("model", "optimizer")
            )
            trained = {name for name, weight in engine.student.named_parameters() if weight.requires_grad}
            if foreign := sorted(set(weights) - trained):
                raise ValueError(f"it is of another model, with {foreign[0]}")
            engine.restore(weights, optimizer)
        for place, schedule in moving.items():
            schedule.restore(state["moving"][str(place)])

    state = ranks.together(lambda: load(lambda: _read_state(folder, ranks)))
    ranks.together(lambda: load(restore))
    return _step_of(folder)


def _read_state(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The checkpoint's own word, when what it says of this rank's share of the parts is so."""
    state: dict[str, Any] = json.loads((folder / _STATE_NAME).read_text(encoding="utf-8"))
    names = [_name(kind, part) for kind in ("model", "optimizer") for part in range(state["ranks"])]
    for name in names[ranks.rank :: ranks.size]:
        if sha256_of(folder / name) != state["sha256"][name]:
            raise ValueError(f"{name} is damaged")
    return state


def _name(kind: str, part: int) -> str:
    return f"{kind}-{part:05d}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> str:
    """Returns the file's SHA-256.

    Raises:
        StorageError: the disk refused.
    """
    try:
        save_file(tensors, path)
        flush(path)  # by who wrote it: another machine cannot
    except (OSError, SafetensorError) as error:
        raise refused(path, error) from error
    return sha256_of(path)


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
            # Cloned where they are small: several may be views of one number, or one table of 8-bit values.
            optimizer |= {
                f"{name}/{key}": value.cpu().clone() if value.ndim < 2 else value.cpu().contiguous()
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
