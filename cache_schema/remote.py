"""A cache in object storage, copied once to this machine and checked against its manifest's hashes.

A run reads every sequence in its first epoch, in an order of its own, so the whole cache is fetched before it starts
and every later run finds it. The lookup log inside the cache comes along; what runs add to it stays on this machine.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from cache_schema.errors import CacheCorruptError, CacheIncompleteError, StorageError
from cache_schema.lookup_files import LOOKUPS_NAME
from cache_schema.manifest import MANIFEST_NAME, PLAN_NAME, TOKENIZER_NAME, Manifest, read_json, receipt_name
from cache_schema.storage import discard_leftovers_in, exclusive, publish, sha256_of

HOME_VARIABLE = "LOGIT_CACHE_HOME"
_BLOCK_BYTES = 2**24
_LOG_NAME = re.compile(
    rf"{LOOKUPS_NAME}/(lm_head\.safetensors|[0-9a-f]{{16}}/[0-9]{{6}}\.(json|(hidden|logits)\.parquet))"
)


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
    with exclusive(folder, wait=True):
        for path in [folder, folder / TOKENIZER_NAME]:
            discard_leftovers_in(path)
        with publish(folder / MANIFEST_NAME) as temporary:  # last, as in a dump
            temporary.write_bytes(raw)
            _fetch_all(store, root, read_json(temporary, Manifest), folder, progress)
    return folder


def _fetch_all(
    store: pafs.FileSystem,
    root: str,
    manifest: Manifest,
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    sizes = _sizes_below(store, root)
    for name in (PLAN_NAME, *(receipt_name(receipt.shard) for receipt in manifest.receipts)):
        _fetch(store, f"{root}/{name}", folder / name, sizes.get(name))
    total, there = sum(file.num_bytes for file in manifest.all_files), 0
    for file in manifest.all_files:
        deleted = ".hidden." in file.name and file.name not in sizes
        if not deleted:
            _fetch(store, f"{root}/{file.name}", folder / file.name, file.num_bytes, file.sha256)
        there += file.num_bytes
        if progress:
            progress(there, total)
    # Of a log, the files before the receipts that vouch for them. They never change, so those that are there stay.
    logged = [name for name in sizes if _LOG_NAME.fullmatch(name)]
    for name in sorted(logged, key=lambda name: (name.endswith(".json"), name)):
        _fetch(store, f"{root}/{name}", folder / name, sizes[name])


def _sizes_below(store: pafs.FileSystem, root: str) -> dict[str, int]:
    """Bytes of every object, by its name relative to the cache."""
    with _reading(root):
        found = store.get_file_info(pafs.FileSelector(root, recursive=True))
    return {info.path.removeprefix(f"{root}/"): info.size for info in found if info.type == pafs.FileType.File}


def _fetch(store: pafs.FileSystem, source: str, target: Path, num_bytes: int | None, sha256: str | None = None) -> None:
    if target.exists() and target.stat().st_size == num_bytes:
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
