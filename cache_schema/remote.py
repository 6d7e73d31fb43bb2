"""A cache in object storage, copied once to this machine and checked against its manifest's hashes.

A run reads every sequence in its first epoch, in an order of its own, so the whole cache is fetched before it starts
and every later run finds it. The lookup log inside the cache comes along; what runs add to it stays on this machine.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from cache_schema.errors import CacheCorruptError, CacheIncompleteError, StorageError
from cache_schema.lookup_files import LOOKUPS_NAME
from cache_schema.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, read_json, receipt_name
from cache_schema.storage import is_leftover, publish, sha256_of

HOME_VARIABLE = "LOGIT_CACHE_HOME"
_BLOCK_BYTES = 2**24


def local_copy(location: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """The directory of a cache: a local path as it is, the copy of what a URI (``s3://``, ``gs://``, ``hf://``) names.

    Copies stand under ``$LOGIT_CACHE_HOME`` (by default ``~/.cache/logit-cache``) by the manifest's hash; files that
    are there are not fetched again. ``progress`` is called with (bytes there, of bytes).

    Raises:
        CacheIncompleteError: there is no finished cache.
        CacheCorruptError: what was fetched is not what the manifest says.
        StorageError: the store or this machine's disk refused.
    """
    if "://" not in location:
        return Path(location)
    with _reading(location):
        store, root = pafs.FileSystem.from_uri(location)
        if store.get_file_info(f"{root}/{MANIFEST_NAME}").type == pafs.FileType.NotFound:
            raise CacheIncompleteError(f"{location} has no {MANIFEST_NAME}: no finished cache is there.")
        raw = b"".join(_blocks_of(store, f"{root}/{MANIFEST_NAME}"))
    folder = _home() / hashlib.sha256(raw).hexdigest()[:16]
    with publish(folder / MANIFEST_NAME) as temporary, _reading(location):  # the manifest last, as in a dump
        temporary.write_bytes(raw)
        manifest = read_json(temporary, Manifest)
        total, there = sum(file.num_bytes for file in manifest.all_files), 0
        for name in (PLAN_NAME, *(receipt_name(receipt.shard) for receipt in manifest.receipts)):
            _fetch(store, f"{root}/{name}", folder / name)
        for file in manifest.all_files:
            deleted = ".hidden." in file.name and not _size(store, f"{root}/{file.name}")
            if not deleted:
                _fetch(store, f"{root}/{file.name}", folder / file.name, file.num_bytes, file.sha256)
            there += file.num_bytes
            if progress:
                progress(there, total)
        _fetch_log(store, root, folder)
    return folder


def _fetch_log(store: pafs.FileSystem, root: str, folder: Path) -> None:
    """Files before receipts; those of a log never change, so those that are there stay."""
    found = store.get_file_info(pafs.FileSelector(f"{root}/{LOOKUPS_NAME}", recursive=True, allow_not_found=True))
    paths = [info.path for info in found if info.type == pafs.FileType.File and not is_leftover(Path(info.path))]
    for path in sorted(paths, key=lambda path: (path.endswith(".json"), path)):
        _fetch(store, path, folder / LOOKUPS_NAME / path.split(f"{root}/{LOOKUPS_NAME}/")[1])


def _fetch(
    store: pafs.FileSystem, source: str, target: Path, num_bytes: int | None = None, sha256: str | None = None
) -> None:
    if target.exists() and target.stat().st_size == (_size(store, source) if num_bytes is None else num_bytes):
        return
    with publish(target) as temporary:
        with temporary.open("wb") as file:
            for block in _blocks_of(store, source):
                file.write(block)
        if sha256 is not None and sha256_of(temporary) != sha256:
            raise CacheCorruptError(
                f"{source} is damaged: its SHA-256 is not the manifest's. Restore it from where the cache was dumped."
            )


def _blocks_of(store: pafs.FileSystem, source: str) -> Iterator[bytes]:
    with _reading(source), store.open_input_stream(source) as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


def _size(store: pafs.FileSystem, source: str) -> int | None:
    size: int | None = store.get_file_info(source).size
    return size


def _home() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "logit-cache"
    return Path(os.environ.get(HOME_VARIABLE, default)).expanduser()


@contextmanager
def _reading(location: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{location} cannot be read: {error}. Check the address, the credentials and the network; what was fetched "
            f"is kept."
        ) from error
