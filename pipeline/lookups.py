"""``pipeline compact``, and what ``inspect`` and ``verify`` say of a cache's lookup log."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_schema.compaction import compact
from cache_schema.errors import CacheError
from cache_schema.lookup_files import LookupReceipt
from cache_schema.lookups import LookupLog, lookups_dir, receipt_path
from cache_schema.manifest import LM_HEAD_NAME
from cache_schema.reader import CacheReader
from cache_schema.storage import sha256_of
from pipeline.progress import progress_bar
from workers.errors import InputError

NO_LOG: dict[str, Any] = {
    "pairs": 0, "sequences": 0, "sequences_with_hidden_states": 0, "files": 0, "bytes": 0
}  # fmt: skip


def describe_log(reader: CacheReader, elsewhere: Path | None) -> dict[str, Any]:
    """What is logged. ``pairs`` are (position, token id) pairs that the log answers: hidden states answer every id; an
    answer that stands in several files counts in each until they are folded."""
    log = LookupLog(reader, [lookups_dir(reader, elsewhere)])
    receipts = log.files().values()
    hidden = {
        index: positions
        for receipt in receipts
        if receipt.kind == "hidden"
        for index, positions in zip(receipt.indexes, receipt.num_positions, strict=True)
    }
    answered = {index for receipt in receipts if receipt.kind == "logits" for index in receipt.indexes}
    return {
        "pairs": sum(hidden.values()) * reader.plan.tokenizer.vocab_size + sum(r.num_pairs for r in receipts),
        "sequences": len(hidden.keys() | answered),
        "sequences_with_hidden_states": len(hidden),
        "files": len(receipts),
        "bytes": sum(receipt.file.num_bytes for receipt in receipts),
    }


def faults_in_log(reader: CacheReader, elsewhere: Path | None) -> Iterator[tuple[str, str]]:
    """Every damaged file of a log, with what is wrong; files that a compaction folds meanwhile are passed over."""
    log_dir = lookups_dir(reader, elsewhere)
    try:
        log = LookupLog(reader, [log_dir])
    except CacheError as error:
        yield log_dir.name, str(error)
        return
    heads, head = log.lm_head_hashes, log.lm_head_path
    if heads and head is None:
        yield f"{log_dir.name}/{LM_HEAD_NAME}", "it is missing"
    elif heads and head is not None and heads != {sha256_of(head)}:
        yield f"{head.parent.name}/{head.name}", "its SHA-256 is not that of the logged files' receipts"
    for path, receipt in log.files().items():
        reason = _fault(log, path, receipt)
        if reason and receipt_path(path).exists():
            yield path.relative_to(log_dir.parent).as_posix(), reason


def _fault(log: LookupLog, path: Path, receipt: LookupReceipt) -> str | None:
    try:
        if sha256_of(path) != receipt.file.sha256:
            return "its SHA-256 is not its receipt's"
        for _ in log.rows(path):
            pass
    except CacheError as error:
        return str(error) if path.exists() else "it is missing"
    return None


def compact_log(cache_dir: Path, elsewhere: Path | None) -> dict[str, Any]:
    """Fold the log of a finished cache.

    Raises:
        InputError: it has none.
        CacheError: see ``cache_schema.compaction.compact``.
    """
    reader = CacheReader(cache_dir)
    log_dir = lookups_dir(reader, elsewhere)
    if not log_dir.is_dir():
        raise InputError(f"{log_dir} does not exist: no run has asked a live teacher about {cache_dir} yet.")
    with progress_bar("folding") as progress:
        return {"log": str(log_dir), **asdict(compact(reader, log_dir, progress))}
