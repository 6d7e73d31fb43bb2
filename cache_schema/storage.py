"""Files that appear whole or not at all.

Everything is written under a temporary name in the same directory, flushed to the disk, and renamed. A process
that dies at any instant leaves either no file or the whole file under the final name; what it leaves under the
temporary name (``.NAME.tmp``) is overwritten by the next attempt.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_schema.errors import StorageError


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on a clean exit it becomes ``path``, on an exception it is removed.

    Raises:
        StorageError: the file system refused (full disk, no permission); names ``path``.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        _discard(temporary)
        raise refused(path, error) from error
    except BaseException:
        _discard(temporary)
        raise


@contextmanager
def publish_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory to fill; on a clean exit it becomes ``path``, which must not exist yet."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _flush(file)
        temporary.rename(path)
        _flush(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise refused(path, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock on an existing file, so that one process at a time writes beside it; a killed holder lets go.

    Raises:
        StorageError: another process holds it.
    """
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"{path.parent} is being written by another process: wait until it has ended, or give --out another "
                f"directory."
            ) from None
        yield


def publish_text(path: Path, text: str) -> None:
    with publish(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}.") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(temporary: Path) -> None:
    """Remove what a failed write left; a disk that refused the write may refuse this too."""
    with suppress(OSError):
        temporary.unlink()


def refused(path: Path, error: OSError) -> StorageError:
    """The file system's refusal to write, with the way out."""
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}. Nothing was left under that name; free space or fix "
        f"the permissions and run the same command again, finished work is kept."
    )
