"""Who is at which piece of work, for workers on many machines that share nothing but a directory.

A lease is a file ``NAME.lease-G``; of several generations G the highest counts. Its holder rewrites it again and again
while it lives. It is abandoned when its holder died on this machine, which a file lock tells at once, or when it has
not changed for as long as it says itself, by the clock of whoever looks: clocks of two machines are never compared. To
take over is to make the file of the next generation, which of several that try only one can.

Leases spare work; they decide nothing about what is written. A worker that slept past its time finds out with
``is_lost`` just before it publishes; should two publish in the instant between, they publish the same sequences, and
the same bytes where the engine gives the same bytes twice.
"""

import fcntl
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from cache_schema.lease_files import (
    LeaseRecord,
    from_bytes,
    holder_is_dead,
    lease_file_name,
    newest_generations,
    read_lease,
    this_machine,
    to_bytes,
)
from cache_schema.storage import refused

DEFAULT_SECONDS = 60.0
_BEATS_PER_LEASE = 6


class Lease:
    """Held by this process; ``release`` when the work is done or given up."""

    def __init__(self, leases: "Leases", name: str, generation: int, descriptor: int, *, is_locked: bool) -> None:
        self.name = name
        self._leases = leases
        self._generation = generation
        self._descriptor = descriptor
        self._is_locked = is_locked

    def is_lost(self) -> bool:
        """Whether another worker thought this one dead and took over, or somebody removed the lease."""
        # The list of names comes first: to look at one name is answered from a network file system's memory.
        return newest_generations(self._leases.folder).get(self.name) != self._generation or not self._is_mine()

    def release(self) -> None:
        self._leases.forget(self)
        generations = [*([self._generation] if self._is_mine() else []), *range(self._generation - 1, -1, -1)]
        for generation in generations:
            with suppress(OSError):
                (self._leases.folder / lease_file_name(self.name, generation)).unlink()
        os.close(self._descriptor)

    def write(self, record: LeaseRecord) -> None:
        """Replace what the lease says; the lock of a file that has none must not be taken for a dead holder's."""
        os.pwrite(
            self._descriptor, to_bytes(record if self._is_locked else record.model_copy(update={"machine": ""})), 0
        )

    def beat(self, record: LeaseRecord) -> None:
        # A file system that refuses now may not at the next beat; if it goes on, the lease is lost, as it should be.
        with suppress(OSError):
            self.write(record)
            os.fsync(self._descriptor)

    def _is_mine(self) -> bool:
        """Whether the file of that name is the one this process made: names come again."""
        try:
            named = (self._leases.folder / lease_file_name(self.name, self._generation)).stat()
        except OSError:
            return False
        made = os.fstat(self._descriptor)
        return (named.st_dev, named.st_ino) == (made.st_dev, made.st_ino)


class Leases:
    """One worker's leases in a directory. A context manager; leaving it lets go of all of them.

    Args:
        folder: made when the first lease is.
        worker: shown to whoever looks.
        seconds: after so long without a sign of life others take over.
    """

    def __init__(self, folder: Path, worker: str, seconds: float = DEFAULT_SECONDS) -> None:
        self.folder = folder
        self._seconds = seconds
        self._record = LeaseRecord(
            worker=worker, host=socket.gethostname()[:64], pid=os.getpid(), machine=this_machine(), seconds=seconds
        )
        self._held: list[Lease] = []
        # Two locks, for a beat waits for the disk and whoever only counts must not wait for it.
        self._record_guard, self._held_guard = threading.Lock(), threading.Lock()
        self._stopped = threading.Event()
        self._started = time.monotonic()
        self._last_beat = self._started
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._heart = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)

    def __enter__(self) -> "Leases":
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._heart.join()
        for lease in list(self._held):
            lease.release()
        with suppress(OSError):
            self.folder.rmdir()

    @property
    def poll_seconds(self) -> float:
        """How often to look whether somebody else's lease is free."""
        return min(1.0, self._seconds / 20)

    def claim(self, names: Iterable[str]) -> Lease | None:
        """A lease of the first name that nobody holds, this worker included, or None.

        What it is for may have been finished just before: look again before you begin.

        Raises:
            StorageError: the directory cannot be written.
        """
        newest = newest_generations(self.folder)
        with self._held_guard:
            mine = {lease.name for lease in self._held}
        for name in names:
            if name in mine:
                continue
            generation = newest.get(name)
            if generation is not None and not self._is_abandoned(lease_file_name(name, generation)):
                continue
            lease = self._make(name, 0 if generation is None else generation + 1)
            if lease is not None:
                return lease
        return None

    def wait_for(self, name: str) -> Lease:
        """Claim one name as soon as it is free."""
        while True:
            lease = self.claim([name])
            if lease is not None:
                return lease
            time.sleep(self.poll_seconds)

    def note(self, *, sequences: int, tokens: int) -> None:
        """Add to what the worker's leases say it has done."""
        with self._record_guard:
            done = {"sequences": self._record.sequences + sequences, "tokens": self._record.tokens + tokens}
            self._record = self._record.model_copy(update=done)

    def forget(self, lease: Lease) -> None:
        with self._held_guard, suppress(ValueError):
            self._held.remove(lease)

    def remove_folder(self) -> None:
        """When nothing is left to do: whatever stands there is of workers long dead."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _beat(self) -> None:
        while not self._stopped.wait(self._seconds / _BEATS_PER_LEASE):
            now = time.monotonic()
            if now - self._last_beat > self._seconds / 2:
                self._seen = {}
            self._last_beat = now
            record = self._current_record()
            with self._held_guard:
                for lease in self._held:
                    lease.beat(record)

    def _current_record(self) -> LeaseRecord:
        with self._record_guard:
            seconds = round(time.monotonic() - self._started, 1)
            self._record = self._record.model_copy(update={"beat": self._record.beat + 1, "working_seconds": seconds})
            return self._record

    def _make(self, name: str, generation: int) -> Lease | None:
        path = self.folder / lease_file_name(name, generation)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and not self.folder.exists():
                return None  # another has just removed the empty directory
            raise refused(self.folder, error) from error
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except (FileExistsError, FileNotFoundError):
            return None  # another was faster, or has just removed the empty directory
        except OSError as error:
            raise refused(path, error) from error
        # Locked before it says whose it is. Where a file system has no locks, the heartbeat alone tells.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except OSError:
            is_locked = False
        lease = Lease(self, name, generation, descriptor, is_locked=is_locked)
        try:
            lease.write(self._current_record())
        except OSError as error:
            lease.release()
            raise refused(path, error) from error
        with self._held_guard:
            self._held.append(lease)
        return lease

    def _is_abandoned(self, file_name: str) -> bool:
        now = time.monotonic()
        # If this process itself was stopped just now, others may have been too, and are to be given time.
        was_asleep = now - self._last_beat > self._seconds / 2
        raw = read_lease(self.folder / file_name)
        if raw is None:
            return False  # released just now; the next look shows what there is
        record = from_bytes(raw)  # None of half a beat, and of what a machine that lost power left
        if record and record.machine == self._record.machine and holder_is_dead(self.folder / file_name):
            return True
        seen, since = self._seen.get(file_name, (None, now))
        if seen != raw or was_asleep:
            self._seen[file_name] = (raw, now)
            return False
        return now - since >= (record.seconds if record else self._seconds)
