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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cache_schema.storage import publish_text, refused
from pipeline.progress import say
from pipeline.tracker_kinds import TRACKERS, Outcome, Tracker, failures_of
from workers.distill.config import TrackerName
from workers.errors import InputError
from workers.standard_output import stdout_to_stderr

TRACKERS_NAME = "trackers.jsonl"


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
        if not names:
            return
        runs, reported = self._told()
        for name in dict.fromkeys(names):
            try:
                with stdout_to_stderr():
                    tracker: Tracker = TRACKERS[name](self._run_dir, project, config, first_step, runs.get(name))
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
                with stdout_to_stderr():
                    tracker.close(outcome)
            except Exception as error:  # no fault of a tracker's, of whatever kind, is worth the training
                say(f"warning: the tracker {name} may lack its last steps: {error}")

    def _report(self, name: TrackerName, step: int, scalars: dict[str, float]) -> None:
        try:
            with stdout_to_stderr():
                self._open[name].report(step, scalars)
        except Exception as error:  # as above
            say(f"warning: the tracker {name} failed and is left out from step {step} on: {error}")
            failed = self._open.pop(name)
            with contextlib.suppress(Exception), stdout_to_stderr():
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
