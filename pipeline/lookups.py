"""``pipeline compact``, and what ``inspect`` and ``verify`` say of a cache's lookup log."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_schema.compaction import compact
from cache_schema.errors import CacheError
from cache_schema.lookups import LookupLog, lookups_dir
from cache_schema.manifest import LM_HEAD_NAME
from cache_schema.reader import CacheReader
from cache_schema.storage import sha256_of
from pipeline.progress import progress_bar
from workers.errors import InputError
from workers.lookup.opening import head_path

NO_LOG: dict[str, Any] = {"pairs": 0, "sequences": 0, "files": 0, "bytes": 0}


def describe_log(reader: CacheReader, elsewhere: Path | None) -> dict[str, Any]:
    """``pairs``: (position, token id) pairs that the log answers; hidden states answer every id."""
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
        "files": len(receipts),
        "bytes": sum(receipt.file.num_bytes for receipt in receipts),
    }


def faults_in_log(reader: CacheReader) -> Iterator[tuple[str, str]]:
    """Every damaged file of the log inside the cache, with what is wrong."""
    try:
        log = LookupLog(reader, [lookups_dir(reader)])
    except CacheError as error:
        yield lookups_dir(reader).name, str(error)
        return
    heads, head = {receipt.lm_head_sha256 for receipt in log.files().values()} - {None}, head_path(reader, log)
    if heads and head is None:
        yield f"{lookups_dir(reader).name}/{LM_HEAD_NAME}", "it is missing"
    elif heads and head is not None and heads != {sha256_of(head)}:
        yield head.relative_to(reader.cache_dir).as_posix(), "its SHA-256 is not that of the logged files' receipts"
    for path, receipt in log.files().items():
        name = path.relative_to(reader.cache_dir).as_posix()
        if not path.exists():
            yield name, "it is missing"
        elif sha256_of(path) != receipt.file.sha256:
            yield name, "its SHA-256 is not its receipt's"
        else:
            try:
                for index in receipt.indexes:
                    _ = log.hidden_states(index) if receipt.kind == "hidden" else log.logits(index)
            except CacheError as error:
                yield name, str(error)


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
