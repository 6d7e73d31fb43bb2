"""Lease files: their names, what they say, and whether the process that holds one still lives.

What leases are for stands in ``cache_schema.leases``.
"""

import errno
import fcntl
import hashlib
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache_schema.storage import unreadable

LEASES_NAME = "leases"
_FILE = re.compile(r"(?P<name>[A-Za-z0-9_-]+)\.lease-(?P<generation>\d+)")
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""What looking at a lease gives when it was released meanwhile, the last by another client of a network file system."""
_SIZE = 512
"""Every lease has this many bytes, so that one write replaces all of it."""


class LeaseRecord(BaseModel):
    """What a lease says: who holds it, and how far that worker has come."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker: str
    host: str = Field(max_length=64)
    pid: int
    machine: str
    """Of the running kernel: on another one its locks say nothing."""
    seconds: float
    """Unchanged for so long, the lease is abandoned."""
    beat: int = 0
    sequences: int = 0
    """Scored by this worker since it began, in all its leases."""
    tokens: int = 0
    working_seconds: float = 0.0


@dataclass(frozen=True)
class SeenLease:
    """A lease that somebody holds or has left."""

    name: str
    record: LeaseRecord
    age_seconds: float
    """Since it last changed, by the file system's clock and this machine's."""
    is_dead: bool
    """Its holder was on this machine and is gone."""


def leases_in(folder: Path) -> list[SeenLease]:
    """What the workers of a directory say of themselves, by name."""
    machine, found = this_machine(), []
    for name, generation in sorted(newest_generations(folder).items()):
        path = folder / lease_file_name(name, generation)
        record = from_bytes(read_lease(path) or b"")
        with suppress(OSError):  # released while one looks
            age = time.time() - path.stat().st_mtime
            if record is not None:
                dead = record.machine == machine and holder_is_dead(path)
                found.append(SeenLease(name, record, max(0.0, age), dead))
    return found


def newest_generations(folder: Path) -> dict[str, int]:
    """The highest generation of each name."""
    newest: dict[str, int] = {}
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        if error.errno in _GONE:
            return newest
        raise unreadable(folder, error) from error
    for match in filter(None, map(_FILE.fullmatch, names)):
        name, generation = match["name"], int(match["generation"])
        newest[name] = max(generation, newest.get(name, 0))
    return newest


def read_lease(path: Path) -> bytes | None:
    """A lease's bytes; None where it is gone."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise unreadable(path, error) from error


def holder_is_dead(path: Path) -> bool:
    """Whether the lock of a lease of this machine is free: the kernel lets go of it when its holder ends."""
    try:
        # A network file system locks what may be written alone; who may only read still sees a local one's locks.
        descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def lease_file_name(name: str, generation: int) -> str:
    return f"{name}.lease-{generation}"


def to_bytes(record: LeaseRecord) -> bytes:
    return record.model_dump_json().encode().ljust(_SIZE)


def from_bytes(raw: bytes) -> LeaseRecord | None:
    try:
        return LeaseRecord.model_validate_json(raw)
    except ValidationError:
        return None


def this_machine() -> str:
    """The running kernel, as far as it can be told; a container with a host name of its own counts as a machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = ""
    return hashlib.sha256(f"{boot} {socket.gethostname()}".encode()).hexdigest()[:16]
