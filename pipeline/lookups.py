"""``pipeline compact``, and what ``inspect`` and ``verify`` say of a cache's lookup log."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_schema.compaction import compact
from cache_schema.errors import CacheError
from cache_schema.lookup_files import LookupReceipt
from cache_schema.lookup_writer import lookups_dir, receipt_path, writers_in
from cache_schema.lookups import LookupLog
from cache_schema.manifest import LM_HEAD_NAME, read_json
from cache_schema.reader import CacheReader
from cache_schema.storage import sha256_of
from pipeline.progress import progress_bar
from workers.errors import InputError
from workers.lookup.opening import stands_in_the_way

NO_LOG: dict[str, Any] = {
    "pairs": 0, "answered_pairs": 0, "sequences": 0, "sequences_with_hidden_states": 0, "files": 0, "bytes": 0,
    "error": None,
}  # fmt: skip


def describe_log(reader: CacheReader, elsewhere: Path | None) -> dict[str, Any]:
    """What is logged. ``pairs`` are (position, token id) pairs that the log answers: hidden states answer every id; an
    answer that stands in several files counts in each until they are folded. A log that cannot be read is an ``error``,
    and the cache is none the worse for it."""
    log_dir = lookups_dir(reader, elsewhere)
    try:
        _require_way(log_dir)
        log = LookupLog(reader, [log_dir])
    except (CacheError, InputError, OSError) as error:
        return {**NO_LOG, "error": str(error)}
    receipts = log.files().values()
    hidden = {
        index: positions
        for receipt in receipts
        if receipt.kind == "hidden"
        for index, positions in zip(receipt.indexes, receipt.num_positions, strict=True)
    }
    answered = {index for receipt in receipts if receipt.kind == "logits" for index in receipt.indexes}
    answered_pairs = sum(receipt.num_pairs for receipt in receipts)
    return {
        "pairs": sum(hidden.values()) * reader.plan.tokenizer.vocab_size + answered_pairs,
        "answered_pairs": answered_pairs,
        "sequences": len(hidden.keys() | answered),
        "sequences_with_hidden_states": len(hidden),
        "files": len(receipts),
        "bytes": sum(receipt.file.num_bytes for receipt in receipts),
        "error": None,
    }


def num_files_in_log(reader: CacheReader, elsewhere: Path | None) -> int:
    """By their receipts, whatever these are worth."""
    return len(_receipts(lookups_dir(reader, elsewhere)))


def faults_in_log(reader: CacheReader, elsewhere: Path | None) -> Iterator[tuple[str, str]]:
    """Every damaged file of a log, with what is wrong; files that a compaction folds meanwhile are passed over."""
    log_dir = lookups_dir(reader, elsewhere)
    try:
        _require_way(log_dir)
        log = LookupLog(reader, [log_dir])
    except InputError as error:
        yield log_dir.name, str(error)
        return
    except (CacheError, OSError) as error:
        yield from list(_faults_one_by_one(reader, log_dir)) or [(log_dir.name, str(error))]
        return
    yield from _fault_of_head(log, log_dir)
    for path, receipt in log.files().items():
        reason = _fault(log, path, receipt)
        if reason and receipt_path(path).exists():
            yield path.relative_to(log_dir.parent).as_posix(), reason


def _faults_one_by_one(reader: CacheReader, log_dir: Path) -> Iterator[tuple[str, str]]:
    """Of a log that a damaged or foreign receipt keeps from being opened: each receipt, and the hash of its file."""
    for path in _receipts(log_dir):
        name = path.relative_to(log_dir.parent)
        try:
            receipt = read_json(path, LookupReceipt)
            file = path.parent / receipt.file.name
            if receipt.manifest_sha256 != reader.manifest_sha256:
                yield name.as_posix(), f"it is of another cache's log than that of {reader.cache_dir}: delete it"
            elif sha256_of(file) != receipt.file.sha256:
                yield name.with_name(file.name).as_posix(), "its SHA-256 is not its receipt's"
        except (CacheError, OSError) as error:
            yield name.as_posix(), str(error)


def _receipts(log_dir: Path) -> list[Path]:
    return sorted(path for directory in writers_in(log_dir) for path in directory.glob("*.json"))


def _fault_of_head(log: LookupLog, log_dir: Path) -> Iterator[tuple[str, str]]:
    head = log.lm_head_path
    if log.lm_head_sha256 is None:
        return
    if head is None:
        yield f"{log_dir.name}/{LM_HEAD_NAME}", "it is missing"
    else:
        name = f"{head.parent.name}/{head.name}"
        try:
            if sha256_of(head) != log.lm_head_sha256:
                yield name, "its SHA-256 is not that of the logged files' receipts"
        except CacheError as error:
            yield name, str(error)


def _require_way(log_dir: Path) -> None:
    """Refuse what is no directory where the log should be."""
    place = stands_in_the_way(log_dir)
    if place is not None:
        what = "a link that leads nowhere" if place.is_symlink() else "a file"
        raise InputError(
            f"{place} is {what}, not the directory of a lookup log: move it away, or give --lookups DIR for another "
            f"place."
        )


def _fault(log: LookupLog, path: Path, receipt: LookupReceipt) -> str | None:
    try:
        if sha256_of(path) != receipt.file.sha256:
            return "its SHA-256 is not its receipt's"
        if receipt.lm_head_sha256 is not None and receipt.lm_head_sha256 != log.lm_head_sha256:
            return "its hidden states belong to another LM head than most of the log's"
        for _ in log.rows(path):
            pass
    except (CacheError, OSError) as error:
        return str(error) if path.exists() else "it is missing"
    return None


def compact_log(cache_dir: Path, elsewhere: Path | None) -> dict[str, Any]:
    """Fold the log of a finished cache.

    Raises:
        InputError: it has none, or something stands in its place.
        CacheError: see ``cache_schema.compaction.compact``.
    """
    reader = CacheReader(cache_dir)
    log_dir = lookups_dir(reader, elsewhere)
    _require_way(log_dir)
    if not log_dir.is_dir():
        raise InputError(f"{log_dir} does not exist: no run has asked a live teacher about {cache_dir} yet.")
    with progress_bar("folding") as progress:
        return {"log": str(log_dir), **asdict(compact(reader, log_dir, progress))}
