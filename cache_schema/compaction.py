"""Folds a lookup log: many small files of many writers into few large ones, every sequence once.

Runs may read and write the log meanwhile. What was folded is published before its sources are deleted, so a kill at
any instant loses nothing and leaves at worst a sequence twice, for the next compaction.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cache_schema.errors import StorageError
from cache_schema.lookup_files import Kind, LogRow
from cache_schema.lookup_writer import LookupWriter, machine_mark, receipt_path, writers_in
from cache_schema.lookups import LookupLog
from cache_schema.manifest import LM_HEAD_NAME
from cache_schema.reader import CacheReader
from cache_schema.storage import exclusive, flush, is_leftover, refused

SEQUENCES_PER_FILE = 512
"""A file with as many is full, and left alone unless another repeats one of its sequences."""
_A_DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Compaction:
    """What the log was and is."""

    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    duplicates: int
    """How often a folded file repeated a sequence of another."""


def compact(
    reader: CacheReader,
    log_dir: Path,
    progress: Callable[[int, int], None] | None = None,
    sequences_per_file: int = SEQUENCES_PER_FILE,
) -> Compaction:
    """Fold the log that a cache has in one directory.

    Raises:
        StorageError: another compaction is at work, or the disk refused.
        CacheCorruptError: a logged file is damaged; nothing was deleted.
    """
    with exclusive(log_dir):
        log = LookupLog(reader, [log_dir])
        before = log.files()
        kinds: tuple[Kind, ...] = ("hidden", "logits")
        sources = {kind: _sources(log, kind, sequences_per_file) for kind in kinds}
        indexes = {kind: sorted({i for path in paths for i in before[path].indexes}) for kind, paths in sources.items()}
        total = sum(map(len, indexes.values()))
        done = 0
        log.require_one_head()
        for kind, paths in sources.items():
            if not paths:
                continue
            writer = LookupWriter(log_dir, reader.manifest_sha256, before[paths[0]].lm_head_sha256)
            try:
                for first in range(0, len(indexes[kind]), sequences_per_file):
                    part = indexes[kind][first : first + sequences_per_file]
                    writer.write(kind, _rows(reader, log, kind, part))
                    done += len(part)
                    if progress:
                        progress(done, total)
            finally:
                writer.close()
        for paths in sources.values():  # after both were read whole
            _delete(paths)
        _sweep(log_dir)
        log.refresh()
        return Compaction(
            files_before=len(before),
            files_after=len(log.files()),
            bytes_before=sum(receipt.file.num_bytes for receipt in before.values()),
            bytes_after=sum(receipt.file.num_bytes for receipt in log.files().values()),
            duplicates=sum(len(before[path].indexes) for paths in sources.values() for path in paths) - total,
        )


def _sources(log: LookupLog, kind: Kind, sequences_per_file: int) -> list[Path]:
    """The files worth folding: those that are not full, and full ones that repeat a sequence of another."""
    chosen: list[Path] = []
    seen: set[int] = set()
    for path, receipt in sorted(log.files().items(), key=lambda item: (len(item[1].indexes), item[0])):
        if receipt.kind != kind:
            continue
        if len(receipt.indexes) < sequences_per_file or not seen.isdisjoint(receipt.indexes):
            chosen.append(path)
        seen |= set(receipt.indexes)
    return chosen if len(chosen) > 1 else []


def _rows(reader: CacheReader, log: LookupLog, kind: Kind, indexes: Sequence[int]) -> Iterator[LogRow]:
    for index in indexes:
        content = log.hidden_states(index) if kind == "hidden" else log.logits(index)
        assert content is not None
        yield index, reader[index].sequence.sequence_id, content


def _delete(paths: Sequence[Path]) -> None:
    """Receipts first, and for good: a file whose receipt stands must be there."""
    for path in paths:
        with _refusals_of(path):
            receipt_path(path).unlink(missing_ok=True)
    for directory in {path.parent for path in paths}:
        with _refusals_of(directory), suppress(FileNotFoundError):
            flush(directory)
    for path in paths:
        with _refusals_of(path):
            path.unlink(missing_ok=True)


def _sweep(log_dir: Path) -> None:
    """Remove what killed writers left: temporary files, files without a receipt, misplaced heads, empty directories.

    A living writer's directory is locked; one of another machine, whose lock need not show here, is left for a day.
    """
    for directory in writers_in(log_dir):
        if not directory.name.startswith(machine_mark()) and time.time() - directory.stat().st_mtime < _A_DAY:
            continue
        with suppress(StorageError), exclusive(directory):
            for path in list(directory.iterdir()):
                unfinished = path.suffix == ".parquet" and not receipt_path(path).exists()
                if is_leftover(path) or unfinished or path.name == LM_HEAD_NAME:
                    path.unlink(missing_ok=True)


@contextmanager
def _refusals_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error
