"""A run's directory: what was asked (`config.toml`), what it is made of (`run.json`), every step (`metrics.jsonl`).

``run.json`` is written before the first step and again, with the summary, after the last: a run is finished when
its summary is there. Metrics are flushed step by step; resuming drops those after the checkpoint it goes on from.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import tomli_w

from cache_schema.storage import discard_leftovers, discard_leftovers_in, publish, publish_text, refused
from workers.distill.checkpoint import FOLDER
from workers.errors import InputError
from workers.lookup.ladder import TIERS
from workers.ranks import Ranks

RUN_NAME = "run.json"
CONFIG_NAME = "config.toml"
METRICS_NAME = "metrics.jsonl"
MODEL_NAME = "model"
EMA_NAME = "ema"
ADAPTER_NAME = "adapter"
BASE_NAME = "base"
_MARK_NAME = "ranks"
BEST_NAME = "best"
# Paths, which the fingerprints beside them say better, and what changes nothing of the training.
_NOT_COMPARED = {
    "cache", "eval_cache", "student", "teacher", "lookups", "device", "versions", "checkpoint_every", "eval_every",
    "keep_checkpoints", "micro_batch_sequences", "gradient_checkpointing", "engine",
    "trackers", "tracker_project",
}  # fmt: skip


class RunRecord:
    """Reads and writes the documents of one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    @property
    def model_dir(self) -> Path:
        return self.run_dir / MODEL_NAME

    @property
    def ema_dir(self) -> Path:
        return self.run_dir / EMA_NAME

    @property
    def adapter_dir(self) -> Path:
        return self.run_dir / ADAPTER_NAME

    @property
    def base_dir(self) -> Path:
        return self.run_dir / BASE_NAME

    @property
    def config_path(self) -> Path:
        return self.run_dir / CONFIG_NAME

    def discard_leftovers(self) -> None:
        """Remove what a killed run left half-written; the caller holds the directory's lock."""
        names = [RUN_NAME, CONFIG_NAME, METRICS_NAME, MODEL_NAME, EMA_NAME, ADAPTER_NAME, BASE_NAME, _MARK_NAME]
        for path in [self.run_dir / name for name in names]:
            discard_leftovers(path)
        for folder in (self.run_dir / FOLDER, self.best_dir):
            discard_leftovers_in(folder)

    def require_shared(self, ranks: Ranks) -> None:
        """Refuse a directory that a rank does not see as the first one does, before a checkpoint finds out. Collective.

        Raises:
            InputError: names the rank.
        """
        mark = ranks.from_first(lambda: _made(self.run_dir / f".{_MARK_NAME}.{secrets.token_hex(4)}.tmp"))

        def look() -> None:
            if not mark.exists():
                raise InputError(
                    f"--out {self.run_dir} is another directory for rank {ranks.rank} than for the first: give one "
                    f"that all machines of the run share."
                )

        ranks.together(look)
        ranks.from_first(mark.unlink)

    def find(self, config: dict[str, Any], made_of: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
        """Look at the directory before anything is loaded; the summary, if this very run is finished in it.

        Raises:
            InputError: the directory is another run's, or a run's that ``resume`` was not given for.
        """
        path = self.run_dir / RUN_NAME
        if not path.exists():
            if self.run_dir.exists() and (not self.run_dir.is_dir() or any(_foreign(self.run_dir))):
                raise InputError(f"{self.run_dir} exists and holds no run: give --out a new directory.")
            return None
        if not resume:
            raise InputError(
                f"{self.run_dir} already holds a run: give --resume to go on with it, or --out another directory."
            )
        stored = _read(path)
        self._require_same(stored, config, made_of)
        summary: dict[str, Any] | None = stored["summary"]
        if summary is not None and not self.model_dir.exists():
            raise InputError(
                f"{self.run_dir} is finished, but its {MODEL_NAME}/ is gone: restore it, or give another --out."
            )
        return summary

    def begin(self, config: dict[str, Any], made_of: dict[str, Any], eval_before: dict[str, Any] | None) -> None:
        """Write what the run is, before its first step; a run that goes on keeps what it has."""
        if not (self.run_dir / RUN_NAME).exists():
            self._write(
                {"config": config, **made_of, "eval_before": eval_before, "dropped_forwards": {}, "summary": None}
            )
        if not self.config_path.exists():
            publish_text(self.config_path, tomli_w.dumps(_without_none(config)))

    def eval_before(self) -> dict[str, Any] | None:
        """The evaluation before the first step, if there was one."""
        found: dict[str, Any] | None = _read(self.run_dir / RUN_NAME)["eval_before"]
        return found

    def open_metrics(self, first_step: int) -> IO[str]:
        """Metrics file to append to, holding the records of the first ``first_step`` steps alone."""
        path = self.run_dir / METRICS_NAME
        records, kept = self.metrics(), self.metrics(first_step)
        if len(kept) != first_step:
            raise InputError(
                f"{path} holds {len(kept)} of the {first_step} steps before the checkpoint: restore it, or delete "
                f"{self.run_dir / FOLDER} to begin again."
            )
        self._count_dropped([record for record in records if record["step"] > first_step])
        with publish(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        return path.open("a", encoding="utf-8")

    def _count_dropped(self, dropped: list[dict[str, Any]]) -> None:
        """Steps that are done again drop their records, but what the teacher did for them it has done."""
        forwards = sum(record["teacher_forwards"] for record in dropped)
        if forwards:
            # Under the records' own hash: killed before they are dropped, they are found and counted again.
            key = hashlib.sha256(json.dumps(dropped).encode()).hexdigest()[:16]
            document = _read(self.run_dir / RUN_NAME)
            self._write({**document, "dropped_forwards": {**document["dropped_forwards"], key: forwards}})

    def append(self, metrics: IO[str], step: dict[str, Any]) -> None:
        """Write a step's record through to the file.

        Raises:
            StorageError: the disk refused.
        """
        try:
            metrics.write(json.dumps(step) + "\n")
            metrics.flush()
        except OSError as error:
            raise refused(self.run_dir / METRICS_NAME, error) from error

    def keeps_checkpoints(self) -> bool:
        """Whether the run was told to when it began."""
        return _read(self.run_dir / RUN_NAME)["config"].get("keep_checkpoints") is not None

    def secure(self, metrics: IO[str]) -> None:
        """Bring the records to the disk, before a checkpoint that a power cut may leave and them not.

        Raises:
            StorageError: the disk refused.
        """
        try:
            os.fsync(metrics.fileno())
        except OSError as error:
            raise refused(self.run_dir / METRICS_NAME, error) from error

    def metrics(self, num_steps: int | None = None) -> list[dict[str, Any]]:
        """Records of the steps done, or of the first ``num_steps``; a last line torn by a kill is left out."""
        path = self.run_dir / METRICS_NAME
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        try:
            records = [json.loads(line) for line in lines[:-1]]
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}. Restore it, or train again in another --out.") from None

        return [record for record in records if num_steps is None or record["step"] <= num_steps]

    @property
    def best_dir(self) -> Path:
        return self.run_dir / BEST_NAME

    def best_model_dir(self, step: int) -> Path:
        return self.best_dir / f"step-{step:06d}"

    def keep_best(self, step: int | None) -> None:
        """Remove every best student but that of the step."""
        for folder in self.best_dir.iterdir() if self.best_dir.exists() else ():
            if step is None or folder != self.best_model_dir(step):
                shutil.rmtree(folder)
        if step is None:
            shutil.rmtree(self.best_dir, ignore_errors=True)

    def finish(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Add up the metrics into the summary and write it into ``run.json``."""
        records = self.metrics()
        lookups: Counter[str] = Counter(dict.fromkeys(TIERS, 0))
        for record in records:
            lookups.update(record["lookups"])
        seconds = sum(record["seconds"] for record in records)
        positions = sum(record["positions"] for record in records)
        summary = {
            "run": str(self.run_dir),
            "steps": len(records),
            "epochs": records[-1]["epoch"],
            "sequences": sum(record["sequences"] for record in records),
            "positions": positions,
            "loss": records[-1]["loss"],
            "first_loss": records[0]["loss"],
            "seconds": seconds,
            "positions_per_second": positions / seconds,
            "lookups": dict(lookups),
            "bound_share": lookups["bound"] / max(1, lookups.total()),
            "engines": _engines(records),
            "teacher_forwards": sum(record["teacher_forwards"] for record in records)
            + sum(_read(self.run_dir / RUN_NAME)["dropped_forwards"].values()),
            "model": str(self.model_dir),
            **extra,
        }
        self._write({**_read(self.run_dir / RUN_NAME), "summary": summary})
        return summary

    def _write(self, document: dict[str, Any]) -> None:
        publish_text(self.run_dir / RUN_NAME, json.dumps(document, indent=2) + "\n")

    def _require_same(self, stored: dict[str, Any], config: dict[str, Any], made_of: dict[str, Any]) -> None:
        if stored.get("order_version") != made_of.get("order_version"):
            release = "an older release" if stored.get("order_version") is None else "another release"
            raise InputError(
                f"{self.run_dir} was begun by {release}, which takes the sequences in another order for the same seed: "
                f"finish it with that release, or begin again in another --out."
            )
        wanted = json.loads(json.dumps({**config, **made_of}))
        there = {**stored["config"], **{key: stored.get(key) for key in made_of}}
        for key in wanted:
            if key not in _NOT_COMPARED and there.get(key) != wanted[key]:
                raise InputError(
                    f"{self.run_dir} belongs to another run: its {key} is {there.get(key)}, this command's is "
                    f"{wanted[key]}. Resume with the options it was started with, or give --out another directory."
                )


def _engines(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What trained the run, in turn: it may go on with another engine, on another number of ranks."""
    turns: list[dict[str, Any]] = []
    for record in records:
        turn = {"engine": record["engine"], "ranks": record["ranks"]}
        if not turns or any(turns[-1][key] != turn[key] for key in turn):
            turns.append({**turn, "first_step": record["step"]})
    return turns


def _made(file: Path) -> Path:
    file.touch()
    return file


def _foreign(run_dir: Path) -> Iterator[Path]:
    """What does not look like the leftovers of a run killed before it was written down."""
    return (path for path in run_dir.iterdir() if not (path.name.startswith(".") and path.name.endswith(".tmp")))


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"config", "summary", "eval_before"} <= document.keys():
            raise ValueError("it is no run's record")
        document.setdefault("dropped_forwards", {})
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read: {error}. Start the run anew in another --out.") from None
    return document


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is None is left out."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value
