"""The experiment trackers a run can report to, each behind one small interface. Imported by name: all are extras."""

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from workers.distill.config import TrackerName

Outcome = Literal["finished", "failed", "stopped"]
"""``stopped``: the run ends before its last step and can go on."""
_MLFLOW_PARAMS_PER_REQUEST = 100


class Tracker(Protocol):
    """One run in one tracker."""

    run: str
    """Its name or id there."""
    last_step: int | None
    """The last step the tracker itself says it has; None where it does not say."""

    def report(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


def failures_of(name: TrackerName) -> tuple[type[Exception], ...]:
    """What a tracker raises when its disk, its server or the way there fails, its settings, or its own process."""
    if name == "wandb":
        return (OSError, import_module("wandb").Error)
    if name == "trackio":
        return (OSError, ValueError, sqlite3.Error, import_module("httpx").HTTPError)
    if name == "mlflow":
        return (OSError, import_module("mlflow.exceptions").MlflowException)
    return (OSError,)


class _TensorBoard:
    run = "tensorboard"
    """Folder of the event files."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any], first_step: int, run: str | None) -> None:
        self.last_step: int | None = first_step  # the later ones are purged
        events = import_module("torch.utils.tensorboard")
        self._writer = events.SummaryWriter(run_dir / self.run, purge_step=first_step + 1)
        if run is None:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def report(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # otherwise a kill takes up to two minutes of steps with it

    def close(self, outcome: Outcome) -> None:
        self._writer.close()


class _Wandb:
    """Its own process dies with this one: a kill takes the step it holds open, and up to 15 seconds of steps offline.

    ``WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL`` shortens those. A run that was sent is told again what the server lacks.
    """

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any], first_step: int, run: str | None) -> None:
        wandb = import_module("wandb")
        self.run = run or secrets.token_hex(4)
        self._run = wandb.init(
            project=project,
            id=self.run,
            name=run_dir.absolute().name,
            dir=str(run_dir),
            config=config,
            resume="allow",
            settings=wandb.Settings(console="off"),  # our JSON and progress bars are no part of it
        )
        self.last_step: int | None = self._run.step - 1 if self._run.resumed else None

    def report(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self, outcome: Outcome) -> None:
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


class _Trackio:
    """Its own thread writes twice a second, so a kill takes half a second of steps with it."""

    last_step: int | None = None

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any], first_step: int, run: str | None) -> None:
        # A run is known by its name, and two run directories may have one.
        self.run = run or f"{run_dir.absolute().name}-{secrets.token_hex(4)}"
        self._trackio = import_module("trackio")
        self._run = self._trackio.init(project=project, name=self.run, config=config, resume="allow", embed=False)

    def report(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self, outcome: Outcome) -> None:
        self._trackio.finish()  # not the run's own method, which would be called once more at exit


class _MLflow:
    """Its client tries again for minutes before it fails; see ``MLFLOW_HTTP_REQUEST_MAX_RETRIES``."""

    last_step: int | None = None

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any], first_step: int, run: str | None) -> None:
        self._entities = import_module("mlflow.entities")
        self._client = import_module("mlflow").MlflowClient()
        if run is not None:
            self.run = run
            self._client.update_run(run, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self.run = self._client.create_run(experiment_id, run_name=run_dir.absolute().name).info.run_id
        params = [self._entities.Param(key, str(value)) for key, value in _leaves(config)]
        for first in range(0, len(params), _MLFLOW_PARAMS_PER_REQUEST):
            self._client.log_batch(self.run, params=params[first : first + _MLFLOW_PARAMS_PER_REQUEST])

    def report(self, step: int, scalars: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self.run, metrics=metrics, synchronous=True)

    def close(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[outcome]
        self._client.set_terminated(self.run, status=status)


TRACKERS: dict[TrackerName, type[_TensorBoard | _Wandb | _Trackio | _MLflow]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _MLflow,
}


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A config's values by slash names; what is None or empty is left out."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        elif value not in (None, "", [], ()):
            yield f"{prefix}{key}", value
