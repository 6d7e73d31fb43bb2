"""Who is dumping into an unfinished cache, and when they will be done: one view of all workers, from their leases."""

from pathlib import Path
from typing import Any

from cache_schema.lease_files import LEASES_NAME, SeenLease, leases_in


def describe_workers(cache_dir: Path, num_sequences: int, finished_sequences: int) -> dict[str, Any]:
    """The workers that hold a lease, and the rate of those that live.

    Args:
        finished_sequences: in shards that are finished.
    """
    by_worker: dict[tuple[str, str, int], list[SeenLease]] = {}
    for lease in leases_in(cache_dir / LEASES_NAME):
        by_worker.setdefault((lease.record.worker, lease.record.host, lease.record.pid), []).append(lease)
    workers = [_worker(leases) for _, leases in sorted(by_worker.items())]
    living = [worker for worker in workers if worker["alive"]]
    rate = sum(worker["sequences"] / worker["seconds"] for worker in living if worker["seconds"])
    left = num_sequences - finished_sequences
    return {
        "workers": workers,
        "tokens_per_second": round(sum(worker["tokens_per_second"] for worker in living), 1),
        # What is scored of an unfinished shard is not counted: the worker may die with it.
        "seconds_left": round(left / rate) if rate else None,
    }


def _worker(leases: list[SeenLease]) -> dict[str, Any]:
    latest = min(leases, key=lambda lease: lease.age_seconds)
    record = latest.record
    return {
        "worker": record.worker,
        "host": record.host,
        "pid": record.pid,
        "at": [lease.name for lease in leases],
        "sequences": record.sequences,
        "tokens": record.tokens,
        "seconds": record.working_seconds,
        "tokens_per_second": round(record.tokens / record.working_seconds, 1) if record.working_seconds else 0.0,
        "last_sign_seconds": round(latest.age_seconds, 1),
        "alive": not latest.is_dead and latest.age_seconds < record.seconds,
    }


def workers_in_words(facts: dict[str, Any]) -> list[str]:
    """A line a worker, and one for all of them."""
    if not facts["workers"]:
        return ["  workers     none: the same teacher-dump command goes on with it"]
    lines = [
        f"  worker {worker['worker']:<5}{worker['host']} ({worker['pid']}): {', '.join(worker['at'])}, "
        f"{worker['sequences']:,} sequences, {worker['tokens_per_second']:,.0f} tokens/s, "
        + (f"last sign {worker['last_sign_seconds']:.0f} s ago" if worker["alive"] else "GONE: others take over")
        for worker in facts["workers"]
    ]
    left = "" if facts["seconds_left"] is None else f", about {_duration(facts['seconds_left'])} left"
    return [*lines, f"  together    {facts['tokens_per_second']:,.0f} tokens/s{left}"]


def _duration(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
