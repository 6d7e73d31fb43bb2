"""Reads a cache's lookup log by sequence index, while other processes write to it and fold it.

The index is 8 bytes for each sequence of the cache, and what the receipts say; logged values stay on the disk.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schema.encoding import HIDDEN_NUMPY_DTYPES
from cache_schema.errors import CacheCorruptError, CacheMismatchError
from cache_schema.lookup_files import LoggedLogits, LookupReceipt, corrupt, read_log_row
from cache_schema.lookup_writer import listed, writers_in
from cache_schema.manifest import LM_HEAD_NAME, read_json
from cache_schema.reader import CacheReader

_FILES_KEPT = 64
_MOST_LOOKS = 100
_SETTLED_NS = 2 * 10**9


class LookupLog:
    """What is logged of a cache's sequences, in one directory or several; ``refresh`` finds what others added since.

    Raises:
        CacheCorruptError: a receipt or file is damaged; names it.
        CacheMismatchError: the log is of another cache.
    """

    def __init__(self, reader: CacheReader, directories: Iterable[Path]) -> None:
        self._reader = reader
        self.directories = tuple(directories)
        self._dtype = np.dtype(HIDDEN_NUMPY_DTYPES[reader.plan.teacher.dtype])
        # Files are numbered in the order this process saw them.
        self._receipts: dict[Path, tuple[int, LookupReceipt]] = {}
        self._files: dict[int, tuple[Path, LookupReceipt]] = {}
        # By sequence: the number of a file of hidden states, or -1, and its row there.
        self._hidden_file = np.full(len(reader), -1, dtype=np.int32)
        self._hidden_row = np.zeros(len(reader), dtype=np.int32)
        # By sequence: the files of answers, and its row in each.
        self._logits: dict[int, dict[int, int]] = {}
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._num_seen = 0
        self._listings: dict[Path, tuple[int, list[Path]]] = {}
        self._looked = False
        self.refresh()

    def files(self) -> dict[Path, LookupReceipt]:
        """Every file of the log with its receipt."""
        return dict(self._files.values())

    def has_hidden_states(self, index: int) -> bool:
        return bool(self._hidden_file[index] >= 0)

    @property
    def num_with_hidden_states(self) -> int:
        return int((self._hidden_file >= 0).sum())

    @property
    def lm_head_path(self) -> Path | None:
        """The head above the hidden states, once there is one: the cache's own, where a dump with hidden states lost
        them later, or one beside the log."""
        own = [self._reader.lm_head_path] if self._reader.plan.hidden_states else []
        beside = [directory / LM_HEAD_NAME for directory in self.directories]
        return next((path for path in [*own, *beside] if path.exists()), None)

    @property
    def lm_head_sha256(self) -> str | None:
        """Of the head that most of the logged hidden states belong to; None where there are none."""
        counts = Counter[str]()
        for _, receipt in self._receipts.values():
            if receipt.lm_head_sha256 is not None:
                counts[receipt.lm_head_sha256] += len(receipt.indexes)
        return max(counts, key=lambda sha256: (counts[sha256], sha256)) if counts else None

    def require_one_head(self) -> None:
        """Refuse hidden states of several heads.

        Raises:
            CacheCorruptError: names a receipt whose head is not that of most.
        """
        for path, (_, receipt) in self._receipts.items():
            if receipt.kind == "hidden" and receipt.lm_head_sha256 != self.lm_head_sha256:
                raise CacheCorruptError(
                    f"{path} is damaged: its hidden states belong to another LM head than most of the log's. Delete it "
                    f"together with {receipt.file.name}: a run with --teacher asks again for what it held."
                )

    def refresh(self) -> None:
        """Look at the directories again; those that have not changed since are not listed."""
        gone = self._look()
        for _ in range(_MOST_LOOKS):
            # What a compaction took away during a look may stand where the look had been already.
            if not gone and self._looked:
                return
            self._looked = True
            gone = self._look()

    def _look(self) -> bool:
        """Bring the index up to what stands in the directories. Whether something went away."""
        listed = {path for directory in self.directories for path in self._receipts_in(directory)}
        gone = self._receipts.keys() - listed
        self._forget(gone)
        vanished = False
        for path in sorted(listed - self._receipts.keys()):
            try:
                receipt = read_json(path, LookupReceipt)
            except FileNotFoundError:
                vanished = True
            except CacheCorruptError as error:
                raise _no_receipt(path, error) from error
            else:
                self._add(path, receipt)
        return bool(gone) or vanished

    def _receipts_in(self, log_dir: Path) -> list[Path]:
        """Those of every writer; a directory that goes away meanwhile, with its writer or a compaction, has none."""
        found: list[Path] = []
        for directory in writers_in(log_dir):
            changed, receipts = self._listings.get(directory, (0, []))
            try:
                now = directory.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            # A change within the clock's grain of the last would not show: what is younger is listed again.
            if now != changed or time.time_ns() - now < _SETTLED_NS:
                receipts = [path for path in listed(directory) if path.suffix == ".json"]
                self._listings[directory] = (now, receipts)
            found += receipts
        return found

    def _add(self, path: Path, receipt: LookupReceipt) -> None:
        if receipt.manifest_sha256 != self._reader.manifest_sha256:
            raise CacheMismatchError(
                f"{path} is of the lookup log of another cache than {self._reader.cache_dir}: delete it with the file "
                f"beside it, or, if all of {path.parent.parent} came from there, all of it."
            )
        if receipt.indexes and not 0 <= min(receipt.indexes) <= max(receipt.indexes) < len(self._reader):
            raise _no_receipt(path, f"it names a sequence outside the {len(self._reader)} of the cache")
        self._num_seen += 1
        self._receipts[path] = (self._num_seen, receipt)
        self._files[self._num_seen] = (path.parent / receipt.file.name, receipt)
        self._place(self._num_seen, receipt)

    def _place(self, number: int, receipt: LookupReceipt) -> None:
        if receipt.kind == "logits":
            for row, index in enumerate(receipt.indexes):
                self._logits.setdefault(index, {})[number] = row
            return
        indexes = np.array(receipt.indexes, dtype=np.int64)
        new = self._hidden_file[indexes] < 0
        self._hidden_file[indexes[new]] = number
        self._hidden_row[indexes[new]] = np.flatnonzero(new)

    def _forget(self, gone: Set[Path]) -> None:
        if not gone:
            return
        numbers = []
        for path in gone:
            number, receipt = self._receipts.pop(path)
            numbers.append(number)
            del self._files[number]
            self._open.pop(number, None)
            if receipt.kind == "logits":
                for index in receipt.indexes:
                    self._logits[index].pop(number, None)
        self._hidden_file[np.isin(self._hidden_file, numbers)] = -1
        # Where a forgotten file was not the only one with a sequence, another takes its place.
        for number, receipt in self._receipts.values():
            self._place(number, receipt)

    def hidden_states(self, index: int) -> npt.NDArray[Any] | None:
        """A sequence's final-norm hidden states at its stored positions, if they are logged. [P, D]"""
        while self._hidden_file[index] >= 0:
            number = int(self._hidden_file[index])
            found = self._read(number, int(self._hidden_row[index]), index)
            if found is not None:
                assert not isinstance(found, LoggedLogits)
                return found
        return None

    def logits(self, index: int) -> LoggedLogits | None:
        """All answers logged for a sequence, each (position, id) once."""
        while True:
            places = dict(self._logits.get(index, {}))
            parts = [self._read(number, row, index) for number, row in places.items()]
            if None not in parts:
                break
        logged = [part for part in parts if isinstance(part, LoggedLogits)]
        return LoggedLogits.merged(logged) if logged else None

    def rows(self, path: Path) -> Iterator[tuple[int, npt.NDArray[Any] | LoggedLogits]]:
        """What one file holds, sequence by sequence.

        Raises:
            CacheCorruptError: it is damaged, or gone.
        """
        number = next((number for number, (file, _) in self._files.items() if file == path), 0)
        if number == 0:
            raise corrupt(path, "a compaction took it away")
        for row, index in enumerate(self._files[number][1].indexes):
            found = self._read(number, row, index)
            if found is None:
                raise corrupt(path, "a compaction took it away")
            yield index, found

    def _read(self, number: int, row: int, index: int) -> npt.NDArray[Any] | LoggedLogits | None:
        """None where a compaction has taken the file away; the index then points at where its content went."""
        for is_last in (False, True):
            if number not in self._files:
                return None
            path, receipt = self._files[number]
            try:
                file = self._opened(number, path, receipt)
                scored = self._reader[index]
                sequence_id, num_positions = scored.sequence.sequence_id, scored.rows.num_positions
                return read_log_row(file, path, receipt, row, sequence_id, num_positions, self._dtype)
            except (FileNotFoundError, CacheCorruptError) as error:
                # Gone, or gone behind an open handle, as on a network file system; a receipt goes before its file.
                self._open.pop(number, None)
                self.refresh()
                if is_last and number in self._files:
                    raise corrupt(path, "it is missing") if isinstance(error, FileNotFoundError) else error from None
        return None

    def _opened(self, number: int, path: Path, receipt: LookupReceipt) -> pq.ParquetFile:
        if number not in self._open:
            self._open[number] = _open(path, receipt)
            if len(self._open) > _FILES_KEPT:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]


def _open(path: Path, receipt: LookupReceipt) -> pq.ParquetFile:
    if path.stat().st_size != receipt.file.num_bytes:
        raise corrupt(path, f"it has {path.stat().st_size:,} bytes, its receipt says {receipt.file.num_bytes:,}")
    try:
        file = pq.ParquetFile(path.absolute(), page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise corrupt(path, str(error)) from error
    if file.metadata.num_row_groups != len(receipt.indexes):
        raise corrupt(path, f"it has {file.metadata.num_row_groups} rows, its receipt says {len(receipt.indexes)}")
    return file


def _no_receipt(path: Path, reason: object) -> CacheCorruptError:
    return CacheCorruptError(
        f"{path} is no receipt that this release can use: {str(reason).split(': ', 1)[-1].split('. Restore', 1)[0]}. "
        f"Delete it with the file of its number beside it, if no newer release wrote it: a run with --teacher asks "
        f"again for what it held."
    )
