"""Experiment trackers beside ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio, MLflow.

All are told the same scalars under the same names. TensorBoard's files and W&B's local ones stand in the run directory;
where else a tracker sends what it is told is its own settings' matter (``WANDB_MODE``, ``TRACKIO_SPACE_ID``,
``MLFLOW_TRACKING_URI``).

``trackers.jsonl`` in the run directory says which run of each tracker is this one, and which steps each was told. A
line is written before its step is reported: a killed run that goes on never reports a step twice, and the tracker may
lack what it had not written down itself when the kill came. TensorBoard alone is told steps that are done again, for it
drops those of before.
"""

import contextlib
import json
import secrets
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from cache_schema.storage import publish_text, refused
from pipeline.progress import say
from workers.errors import InputError

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Outcome = Literal["finished", "failed", "stopped"]
"""``stopped``: the run ends before its last step and can go on."""
TRACKERS_NAME = "trackers.jsonl"
_MLFLOW_PARAMS_PER_REQUEST = 100


class Tracker(Protocol):
    """One run in one tracker."""

    run: str
    """Its name or id there."""
    last_step: int | None
    """The last step the tracker itself says it has; None where it does not say."""

    def report(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse trackers whose package is not installed; imports none of them.

    Raises:
        InputError: one is missing.
    """
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a mere folder of that name, as W&B leaves behind, has no origin
            raise InputError(f"{name} is not installed: `pip install 'logit-cache[{name}]'`, or leave the tracker out.")


@contextmanager
def open_trackers(
    names: Sequence[TrackerName], run_dir: Path, project: str, config: dict[str, Any], *, first_step: int
) -> Iterator["Trackers"]:
    """Begin, or go on with, this run in each tracker; on the way out it ends there as it ended here.

    For the one rank that writes the run directory; no names open nothing and write nothing.

    Args:
        project: W&B's and Trackio's project, MLflow's experiment.
        first_step: number of steps done before.

    Raises:
        InputError: a package is missing, or a tracker cannot be opened.
    """
    require_trackers(names)
    trackers = Trackers(run_dir)
    outcome: Outcome = "failed"
    try:
        trackers.open(names, project, config, first_step)
        yield trackers
        outcome = "finished" if trackers.finished else "stopped"
    finally:
        trackers.close(outcome)


class Trackers:
    """A run's trackers. One that fails while the run goes on is closed, with a line on stderr."""

    def __init__(self, run_dir: Path) -> None:
        self.finished = False
        self._run_dir = run_dir
        self._open: dict[TrackerName, Tracker] = {}
        self._last_step: dict[TrackerName, int] = {}
        self._evaluated_at = -1

    def open(self, names: Sequence[TrackerName], project: str, config: dict[str, Any], first_step: int) -> None:
        runs, reported = self._told()
        for name in dict.fromkeys(names):
            try:
                with _stdout_to_stderr():
                    tracker: Tracker = _TRACKERS[name](self._run_dir, project, config, first_step, runs.get(name))
            except failures_of(name) as error:
                raise InputError(f"the tracker {name} cannot be opened; mend it, or leave it out: {error}") from error
            self._open[name] = tracker
            known = reported.get(name, -1)
            self._last_step[name] = known if tracker.last_step is None else min(known, tracker.last_step)
            if name not in runs:
                self._write({"tracker": name, "run": tracker.run})

    def log(self, record: dict[str, Any]) -> None:
        """Report a step's record, of which a tracker is told what is a number; what it was told before is left out."""
        step, scalars = record["step"], scalars_of(record)
        if record.get("eval"):
            self._evaluated_at = step
        asked = [name for name in self._open if step > self._last_step[name]]
        if asked:
            self._write({"step": step, "trackers": asked})
        for name in asked:
            self._last_step[name] = step
            self._report(name, step, scalars)

    def finish(self, summary: dict[str, Any]) -> None:
        """Report a finished run's last evaluation, and its summary as ``summary/...``, at its last step."""
        last: dict[str, Any] = {"summary": {key: summary[key] for key in summary if key != "eval"}}
        if self._evaluated_at < summary["steps"]:  # otherwise the last step's record had it
            last["eval"] = summary.get("eval")
        for name in list(self._open):
            self._report(name, summary["steps"], scalars_of(last))
        self.finished = True

    def close(self, outcome: Outcome) -> None:
        for name in list(self._open):
            tracker = self._open.pop(name)
            try:
                with _stdout_to_stderr():
                    tracker.close(outcome)
            except failures_of(name) as error:
                say(f"warning: the tracker {name} may lack its last steps: {error}")

    def _report(self, name: TrackerName, step: int, scalars: dict[str, float]) -> None:
        try:
            with _stdout_to_stderr():
                self._open[name].report(step, scalars)
        except failures_of(name) as error:
            say(f"warning: the tracker {name} failed and is left out from step {step} on: {error}")
            failed = self._open.pop(name)
            with contextlib.suppress(*failures_of(name)), _stdout_to_stderr():
                failed.close("failed")

    def _told(self) -> tuple[dict[str, str], dict[str, int]]:
        """By tracker: its run, and the last step it was told. A last line torn by a kill is dropped."""
        runs: dict[str, str] = {}
        reported: dict[str, int] = {}
        path = self._run_dir / TRACKERS_NAME
        if not path.exists():
            return runs, reported
        try:
            whole, end, torn = path.read_text(encoding="utf-8").rpartition("\n")
            for line in map(json.loads, whole.splitlines()):
                if "run" in line:
                    runs[line["tracker"]] = line["run"]
                else:
                    reported.update(dict.fromkeys(line["trackers"], line["step"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is damaged: {error!r}. Delete it, and what the trackers are told begins anew."
            ) from None
        if torn:
            publish_text(path, whole + end)
        return runs, reported

    def _write(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            StorageError: the disk refused.
        """
        path = self._run_dir / TRACKERS_NAME
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise refused(path, error) from error


def scalars_of(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record by slash names, ``eval/overlap/8`` or ``terms/0``; its step and all else left out."""
    scalars: dict[str, float] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            scalars |= scalars_of(value, f"{name}/")
        elif isinstance(value, list):
            scalars |= scalars_of({str(place): inner for place, inner in enumerate(value)}, f"{name}/")
        elif isinstance(value, int | float) and name != "step":
            scalars[name] = value
    return scalars


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


_TRACKERS: dict[TrackerName, type[_TensorBoard | _Wandb | _Trackio | _MLflow]] = {
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


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Trackers print; stdout is for a command's result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
