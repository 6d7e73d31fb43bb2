"""Where a cache's lookup log stands, and one process's share of writing it."""

import hashlib
import re
import secrets
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from cache_schema.lookup_files import LOOKUPS_NAME, Kind, LogRow, LookupReceipt, write_log_file
from cache_schema.reader import CacheReader
from cache_schema.storage import exclusive

_WRITER = re.compile("[0-9a-f]{16}")


def lookups_dir(reader: CacheReader, elsewhere: Path | None = None) -> Path:
    """Where a cache's log stands: beside it, or in a directory that the logs of several caches may share."""
    return elsewhere / reader.manifest_sha256[:16] if elsewhere else reader.cache_dir / LOOKUPS_NAME


def writers_in(log_dir: Path) -> list[Path]:
    """Their directories; what has another name than a writer's is not the log's."""
    return [path for path in listed(log_dir) if _WRITER.fullmatch(path.name) and not path.is_symlink()]


def listed(directory: Path) -> list[Path]:
    """What stands in it; nothing where it is gone, or is none."""
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def machine_mark() -> str:
    """Four hex digits that the directories of this machine's writers begin with."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]


def receipt_path(file: Path) -> Path:
    """Beside the file it is of."""
    return file.with_name(f"{file.name.split('.')[0]}.json")


class LookupWriter:
    """One process's share of a log: a directory of its own, locked until ``close``.

    The directory's name begins with the machine's mark: locks are seen on one machine alone.

    Raises:
        StorageError: the directory cannot be made.
    """

    def __init__(self, log_dir: Path, manifest_sha256: str, lm_head_sha256: str | None = None) -> None:
        self._manifest_sha256 = manifest_sha256
        self.lm_head_sha256 = lm_head_sha256
        """Of the head that makes logits of the hidden states to be written."""
        self.directory = log_dir / f"{machine_mark()}{secrets.token_hex(6)}"
        self._lock = ExitStack()
        self._lock.enter_context(exclusive(self.directory))
        self._num_written = 0

    def write(self, kind: Kind, rows: Iterable[LogRow]) -> LookupReceipt:
        """Publish one file; other processes see it from now on.

        Raises:
            StorageError: the disk refused; nothing was added.
        """
        receipt = write_log_file(
            self.directory,
            self._num_written,
            kind,
            rows,
            manifest_sha256=self._manifest_sha256,
            lm_head_sha256=self.lm_head_sha256,
        )
        self._num_written += 1
        return receipt

    def close(self) -> None:
        """Let go of the directory; an empty one is removed."""
        self._lock.close()
