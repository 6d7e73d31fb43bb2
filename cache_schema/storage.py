"""Files that appear whole or not at all.

Everything is written under a temporary name in the same directory, flushed to the disk, and renamed. A process
that dies at any instant leaves either no file or the whole file under the final name. The temporary name
(``.NAME.<8 hex digits>.tmp``) is new each time, so two processes never write one file; what a killed process left
under such a name stays until ``discard_leftovers``, which the holder of the directory's lock calls.
"""

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_schema.errors import StorageError


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on a clean exit it becomes ``path``, on an exception it is removed.

    Raises:
        StorageError: the file system refused (full disk, no permission); names ``path``.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except BaseException as error:
        _discard(temporary)
        if is_refusal(error):
            raise refused(path, error) from error
        raise


@contextmanager
def publish_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory to fill; on a clean exit it becomes ``path``, which must not exist yet."""
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            flush(file)
        temporary.rename(path)
        flush(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_refusal(error):
            raise refused(path, error) from error
        raise


def discard_leftovers(path: Path) -> None:
    """Remove what killed processes left of ``path``, a file or a directory, under temporary names.

    Call it with the directory's lock or the lease of what ``path`` holds: a living process may be about to rename what
    stands under such a name. One that slept through its lease then fails to, and finds out why.
    """
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    _remove(found for found in path.parent.iterdir() if leftover.fullmatch(found.name))


def discard_leftovers_in(directory: Path) -> None:
    """The same of everything that stands in a directory; there need be none."""
    _remove(found for found in (directory.iterdir() if directory.is_dir() else ()) if is_leftover(found))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise refused(path, error) from error


def is_leftover(path: Path) -> bool:
    """Whether a name is a temporary one, of whatever file."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name) is not None


@contextmanager
def exclusive(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Make a directory if need be and hold its lock, so that one process at a time writes in it.

    A killed holder lets go. A directory that is still empty in the end is removed again. The lock is this machine's:
    a network file system need not show it to others.

    Args:
        wait: for another holder to let go, instead of refusing.

    Raises:
        StorageError: another process holds the lock, or the directory cannot be made or locked.
    """
    descriptor = _lock(directory, wait)
    try:
        yield
    finally:
        with suppress(OSError):
            directory.rmdir()
        os.close(descriptor)


def _lock(directory: Path, wait: bool) -> int:
    """Descriptor of the locked directory; closing it lets go."""
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its last holder removed it just now
        except OSError as error:
            raise refused(directory, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(descriptor).st_ino == directory.stat().st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise StorageError(
                f"{directory} is being written by another process: wait until it has ended, or give another directory."
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            raise refused(directory, error) from error
        # The lock is that of a directory which its last holder has removed since.
        os.close(descriptor)


def publish_text(path: Path, text: str) -> None:
    with publish(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def publish_first(path: Path, text: str) -> None:
    """The same, unless the file is there by then: of several processes that try, one writes it and none replaces it."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if path.exists():
                return
            temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        _discard(temporary)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def _temporary(path: Path) -> Path:
    # Absolute, for pyarrow takes a relative path with a colon in it for a URI.
    return path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def flush(path: Path) -> None:
    """Put a file's bytes, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(temporary: Path) -> None:
    """Remove what a failed write left; a disk that refused the write may refuse this too."""
    with suppress(OSError):
        temporary.unlink()


def is_refusal(error: BaseException) -> bool:
    """Whether the file system refused: an OSError, or what safetensors and tokenizers make of one in Rust."""
    return isinstance(error, OSError) or "(os error " in str(error)


def refused(path: Path, error: BaseException) -> StorageError:
    """The file system's refusal to write, with the way out."""
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return StorageError(
        f"{path} cannot be written: {reason}. Nothing was left under that name; free space or fix the permissions and "
        f"run the same command again, finished work is kept."
    )


def unreadable(path: Path, error: OSError) -> StorageError:
    """The file system's refusal to read."""
    return StorageError(f"{path} cannot be read: {error.strerror or error}.")
