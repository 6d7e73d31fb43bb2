"""Experiment trackers: every step once, also over a resume, and never in the way of training.

TensorBoard is of the dev extra. The others are tested where their extras are installed.
"""

import contextlib
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.trackers import TRACKERS_NAME, TrackerName, open_trackers, require_trackers, scalars_of
from workers.errors import InputError

CONFIG = {"student": "gpt2", "steps": None, "loss": {"name": "bild"}, "cache": ["caches/train"], "epochs": 2}
SUMMARY = {"run": "runs/one", "steps": 7, "loss": 0.5, "eval": {"overlap": {"1": 0.5, "8": None}}, "eval_before": None}
PARTS = ((0, 4, "kill"), (2, 5, "stop"), (5, 7, "finish"))
"""Steps done before, last step, end: the second goes on from a checkpoint, so steps 3 and 4 are done again."""
Curve = list[tuple[int, float]]


def test_scalars_have_slash_names_and_what_is_no_number_is_left_out() -> None:
    record = {
        "step": 3, "loss": 2.0, "terms": [1.5, 0.5], "lookups": {"hidden": 7}, "teacher_forwards": 0, "run": "x",
        "eval": {"overlap": {"8": 0.25, "32": None}, "kl": None, "tasks": {}},
    }  # fmt: skip
    assert scalars_of(record) == {
        "loss": 2.0, "terms/0": 1.5, "terms/1": 0.5, "lookups/hidden": 7, "teacher_forwards": 0, "eval/overlap/8": 0.25
    }  # fmt: skip


def test_a_missing_package_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Only a folder of that name, as W&B leaves where it ran, is in the way of the import.
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(InputError, match=r"mlflow is not installed: `pip install 'logit-cache\[mlflow\]'`"):
        require_trackers(["mlflow"])


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    with open_trackers([], tmp_path, "project", CONFIG, first_step=0) as trackers:
        trackers.log(_record(1))
        trackers.finish(SUMMARY)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _in_a_process("tensorboard", tmp_path, *PARTS[0])
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which begin with the second
    for part in PARTS[1:]:
        _part("tensorboard", tmp_path, *part)
    assert capfd.readouterr().out == ""
    curves = _tensorboard_curves(tmp_path)
    assert curves["loss"] == _every_step_once()
    assert curves["eval/overlap/1"] == [(0, 0.25), (7, 0.5)]
    assert curves["summary/loss"] == [(7, 0.5)]


def test_wandb_has_every_step_once_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.5")
    _killed_and_resumed("wandb", tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 3
    names = {path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}
    assert len(names) == 1, "three parts of one run"
    curves = _wandb_curves(tmp_path)
    # W&B holds a step open until the next comes: the kill took the fourth.
    assert curves["loss"] == [point for point in _every_step_once() if point[0] != 4]
    assert curves["eval/overlap/1"] == [(0, 0.25), (7, 0.5)]


def test_trackio_has_every_step_once_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _need("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    _killed_and_resumed("trackio", tmp_path)
    script = (
        "import json, sys, trackio; from trackio.sqlite_storage import SQLiteStorage as S;"
        "runs = list(trackio.Api().runs('project')); assert len(runs) == 1, runs;"
        "rows = S.get_logs('project', runs[0].name);"
        "print(json.dumps([{k: row[k] for k in row if k != 'timestamp'} for row in rows]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == _every_step_once()
    assert [row["eval/overlap/1"] for row in rows if "eval/overlap/1" in row] == [0.25, 0.5]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:sqlalchemy", "ignore::DeprecationWarning:mlflow")
def test_mlflow_has_every_step_once_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _need("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    _killed_and_resumed("mlflow", tmp_path)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == _every_step_once()
    assert run.data.metrics["summary/loss"] == 0.5
    assert run.data.params == {
        "student": "gpt2", "loss/name": "bild", "cache": "['caches/train']", "epochs": "2"
    }  # fmt: skip
    assert run.info.status == "FINISHED"


def test_a_last_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    _run(["tensorboard"], tmp_path, range(1, 3))
    with (tmp_path / TRACKERS_NAME).open("a") as file:
        file.write('{"step": 3, "track')
    _run(["tensorboard"], tmp_path, range(3, 5))
    lines = [json.loads(line) for line in (tmp_path / TRACKERS_NAME).read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4]


def test_a_damaged_record_of_trackers_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / TRACKERS_NAME).write_text("[1]\nno json\n")
    with pytest.raises(InputError, match=f"{TRACKERS_NAME} is damaged"):
        _run(["tensorboard"], tmp_path, range(1, 2))


def test_a_tracker_that_cannot_be_opened_stops_the_run_before_it_trains(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the events should go")
    with pytest.raises(InputError, match="the tracker tensorboard cannot be opened"):
        _run(["tensorboard"], tmp_path, range(1, 2))


def test_an_evaluation_that_the_last_step_had_is_not_reported_again(tmp_path: Path) -> None:
    with open_trackers(["tensorboard"], tmp_path, "project", CONFIG, first_step=0) as trackers:
        trackers.log({**_record(7), "eval": SUMMARY["eval"]})
        trackers.finish(SUMMARY)
    assert _tensorboard_curves(tmp_path)["eval/overlap/1"] == [(7, 0.5)]


# TensorBoard's own thread dies of the full disk too, which is its way to tell its writer.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tracker_that_fails_on_the_way_is_left_out_with_one_line(tmp_path: Path) -> None:
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        open_trackers(["tensorboard"], tmp_path, "project", CONFIG, first_step=0) as trackers,
    ):
        trackers.log(_record(1))
        with _files_no_longer_than(4096):
            for step in range(2, 200):
                trackers.log(_record(step))
            for thread in threading.enumerate():
                if type(thread).__name__ == "_AsyncWriterThread":
                    thread.join()
        trackers.finish(SUMMARY)
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("warning")]
    assert "the tracker tensorboard failed and is left out from step" in line
    assert "File too large" in line
    assert 1 < len(_tensorboard_curves(tmp_path)["loss"]) < 199


def test_wandb_whose_process_dies_is_left_out_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _need("wandb")
    script = (
        "import psutil, sys, time; from pathlib import Path; from pipeline.trackers import open_trackers\n"
        "with open_trackers(['wandb'], Path(sys.argv[1]), 'p', {}, first_step=0) as trackers:\n"
        "    trackers.log({'step': 1, 'loss': 1.0})\n"
        "    [child.kill() for child in psutil.Process().children(recursive=True)]; time.sleep(1)\n"
        "    for step in range(2, 6): trackers.log({'step': step, 'loss': 1.0})\n"
        "print('went on')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "WANDB_MODE": "offline"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "went on\n"
    assert done.stderr.count("warning: the tracker wandb failed and is left out from step") == 1


def _killed_and_resumed(name: TrackerName, run_dir: Path) -> None:
    for part in PARTS:
        _in_a_process(name, run_dir, *part)


def _in_a_process(name: TrackerName, run_dir: Path, first_step: int, last_step: int, end: str) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.test_trackers", name, run_dir, str(first_step), str(last_step), end],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == (-signal.SIGKILL if end == "kill" else 0), process.stderr
    assert process.stdout == "", "stdout is for the command's result"


def _part(name: TrackerName, run_dir: Path, first_step: int, last_step: int, end: str) -> None:
    with open_trackers([name], run_dir, "project", CONFIG, first_step=first_step) as trackers:
        if first_step == 0:
            trackers.log({"step": 0, "eval": {"overlap": {"1": 0.25}}})
        for step in range(first_step + 1, last_step + 1):
            trackers.log(_record(step))
        if end == "kill":
            if name in ("wandb", "trackio"):
                time.sleep(2)  # they write now and then: here, twice a second
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "finish":
            trackers.finish(SUMMARY)


def _every_step_once() -> Curve:
    return [(step, 1 / step) for step in range(1, 8)]


def _record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "terms": [1 / step], "lookups": {"hidden": step}}


def _run(names: Sequence[TrackerName], run_dir: Path, steps: range) -> None:
    with open_trackers(names, run_dir, "project", CONFIG, first_step=steps[0] - 1) as trackers:
        for step in steps:
            trackers.log(_record(step))


def _need(name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'logit-cache[{name}]'")


def _tensorboard_curves(run_dir: Path) -> dict[str, Curve]:
    """As TensorBoard itself reads the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert "config/text_summary" in events.Tags()["tensors"]
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def _wandb_curves(run_dir: Path) -> dict[str, Curve]:
    """As the offline files have them, in the order they would be synced."""
    from wandb.proto import wandb_internal_pb2

    curves: dict[str, Curve] = {}
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in _leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            for key, value in values.items():
                curves.setdefault(key, []).append((values["_step"], value))
    return curves


def _leveldb_records(log: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log after W&B's 7 bytes of header: per fragment a checksum, a length and its kind."""
    at, record = 7, b""
    while at + 7 <= len(log):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15  # no fragment begins in the last 6 bytes of a block
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield record
            record = b""


@contextlib.contextmanager
def _files_no_longer_than(num_bytes: int) -> Iterator[None]:
    """What a full disk does to a growing file; a write beyond is refused with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler: Callable[..., Any] | int | None = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


if __name__ == "__main__":
    _part(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])  # type: ignore[arg-type]
