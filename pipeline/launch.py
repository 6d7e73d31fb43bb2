"""Starts the workers of one dump and watches them; who scores what, their leases settle.

Each worker is ``pipeline teacher-dump --worker I/N`` in a process, or the same in a Ray actor.
"""

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from cache_schema.lease_files import LEASES_NAME, leases_in
from cache_schema.manifest import PLAN_NAME, Receipt, read_json, receipt_name
from cache_schema.plan import Plan
from pipeline.describe import describe
from pipeline.processes import ProcessWorkers
from pipeline.progress import dump_bar
from pipeline.teacher_dump import Prepared
from workers.teacher.config import DumpConfig
from workers.teacher.directory import finished_manifest, remaining_shards, shards_with_receipt, tidy
from workers.teacher.dump import Progress

_POLL_SECONDS = 0.5


class Workers(Protocol):
    """Leaving the context ends those that were started."""

    # Entering starts none: where a signal ends it, nothing would be left.
    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def start(self) -> None:
        """Start all of them.

        Raises:
            InputError: there is no place for them.
        """

    def num_living(self) -> int:
        """How many are at work, after saying what has become of the others.

        Raises:
            InputError: all have failed; with what the first one said.
        """


def launch(prepared: Prepared, config: DumpConfig, cache_dir: Path) -> dict[str, Any]:
    """Dump with as many workers as the config says, and return what one alone would.

    ``scored_sequences`` and ``scored_tokens`` count what was finished meanwhile, also by workers that another launcher
    started.

    Raises:
        InputError: there are too few GPUs, or every worker failed.
        CacheError: the directory is another dump's.
    """
    plan, started = prepared.plan, time.perf_counter()
    _require_same_dump(config, cache_dir, plan)
    before = _scored(cache_dir)
    if finished_manifest(cache_dir) is not None:
        tidy(cache_dir)
    else:
        # Ray prints what becomes of its actors to stdout, where the result is to stand alone.
        with (
            redirect_stdout(sys.stderr),
            _workers(prepared, config, cache_dir) as workers,
            dump_bar("scoring, by all workers") as show,
        ):
            workers.start()
            tokens: dict[tuple[str, int], int] = {}
            while workers.num_living() and finished_manifest(cache_dir) is None:
                show(_progress(cache_dir, plan, tokens))
                time.sleep(_POLL_SECONDS)
    after = _scored(cache_dir)
    return describe(cache_dir) | {
        "cache": str(cache_dir),
        "workers": config.worker.count,
        "scored_sequences": after[0] - before[0],
        "scored_tokens": after[1] - before[1],
        "seconds": time.perf_counter() - started,
    }


def _workers(prepared: Prepared, config: DumpConfig, cache_dir: Path) -> Workers:
    if config.worker.launcher == "ray":
        from pipeline.ray_workers import RayWorkers

        return RayWorkers(config, cache_dir)
    return ProcessWorkers(config, cache_dir, prepared.device)


def _require_same_dump(config: DumpConfig, cache_dir: Path, plan: Plan) -> None:
    """Refuse another dump's directory before anything is started."""
    if config.worker.launcher == "ray" and (cache_dir / PLAN_NAME).exists():
        # The nodes may have GPUs where this one has none; each worker holds its own engine against the plan.
        plan = plan.model_copy(update={"engine": read_json(cache_dir / PLAN_NAME, Plan).engine})
    remaining_shards(cache_dir, plan)


def _finished_shards(cache_dir: Path) -> set[int]:
    return shards_with_receipt(cache_dir) if (cache_dir / PLAN_NAME).exists() else set()


def _scored(cache_dir: Path) -> tuple[int, int]:
    """Sequences and tokens of the finished shards."""
    receipts = [read_json(cache_dir / receipt_name(shard), Receipt) for shard in _finished_shards(cache_dir)]
    return sum(receipt.num_sequences for receipt in receipts), sum(receipt.num_tokens for receipt in receipts)


def _progress(cache_dir: Path, plan: Plan, tokens: dict[tuple[str, int], int]) -> Progress:
    """What the directory says: finished shards by their receipts, tokens by the workers' leases.

    Args:
        tokens: by host and process, of those seen so far; brought up to date.
    """
    for lease in leases_in(cache_dir / LEASES_NAME):
        worker = lease.record.host, lease.record.pid
        tokens[worker] = max(tokens.get(worker, 0), lease.record.tokens)
    shards = _finished_shards(cache_dir)
    return Progress(
        done=sum(len(plan.shard_range(shard)) for shard in shards),
        total=plan.num_sequences,
        shards=len(shards),
        num_shards=plan.num_shards,
        tokens=sum(tokens.values()),
    )
