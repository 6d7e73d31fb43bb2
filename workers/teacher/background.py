"""Encodes and writes shards in a thread of its own, while the teacher computes the next batches."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import TracebackType

from cache_schema.errors import StorageError
from cache_schema.leases import Lease
from cache_schema.plan import Plan
from cache_schema.writer import ShardWriter
from workers.teacher.batches import RowsBatch, ScoredBatch

_MOST_WAITING = 3
"""Batches scored and not yet written: each holds its hidden states in memory."""


class BackgroundWriter:
    """A context manager; leaving it waits for what was given; a shard that was not given whole is abandoned.

    Whatever fails in the thread is raised by the next call here, and nothing more is written.
    """

    def __init__(self, cache_dir: Path, plan: Plan) -> None:
        self._cache_dir = cache_dir
        self._plan = plan
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._waiting: deque[Future[None]] = deque()
        self._failed = Event()
        self._open: ShardWriter | None = None
        """The shard at hand; None also when its lease was lost, and what is still given of it is dropped."""

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self._thread.shutdown()  # after the few batches that wait: a shard that has all of its own is kept
            self._abandon()

    @contextmanager
    def shard(self, number: int, lease: Lease) -> Iterator[Callable[[ScoredBatch | RowsBatch], None]]:
        """Yield what takes the shard's batches, in order. It is published, and its lease released, in due time.

        A shard whose lease is lost by then is left to the worker who took over.
        """
        self._submit(lambda: self._begin(number), lease)
        yield lambda batch: self._submit(lambda: self._append(batch), lease)
        self._submit(lambda: self._finish(lease), lease)

    @property
    def is_idle(self) -> bool:
        return not self._waiting

    def drain(self) -> None:
        """Wait until everything given is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def _begin(self, number: int) -> None:
        self._open = ShardWriter(self._cache_dir, self._plan, number).__enter__()

    def _append(self, batch: ScoredBatch | RowsBatch) -> None:
        if self._open is not None:
            for scored in batch.to_host():
                self._open.append(scored)

    def _finish(self, lease: Lease) -> None:
        if self._open is not None and lease.is_lost():
            self._abandon()
        elif self._open is not None:
            self._open.publish(lambda: not lease.is_lost())
            self._open = None
        lease.release()

    def _abandon(self) -> None:
        if self._open is not None:
            self._open.abandon()
        self._open = None

    def _submit(self, task: Callable[[], None], lease: Lease) -> None:
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= _MOST_WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._run, task, lease))

    def _run(self, task: Callable[[], None], lease: Lease) -> None:
        if self._failed.is_set():
            return
        try:
            task()
        except StorageError:
            # Whoever takes over a shard removes the temporary files of a worker that was paused.
            if not lease.is_lost():
                self._failed.set()
                raise
            self._abandon()
        except BaseException:
            self._failed.set()
            raise
