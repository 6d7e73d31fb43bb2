"""Proves a cache whole: every document, every hash, every row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cache_schema.errors import CacheCorruptError, CacheError
from cache_schema.invariants import fault_in_hidden, fault_in_rows
from cache_schema.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    Manifest,
    Receipt,
    hidden_name,
    read_json,
    read_manifest,
    receipt_name,
    shard_name,
)
from cache_schema.plan import Plan
from cache_schema.reader import CacheReader
from cache_schema.storage import sha256_of


@dataclass(frozen=True)
class Damage:
    file: str
    reason: str


@dataclass
class Report:
    checked_bytes: int = 0
    errors: list[Damage] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors


def verify(cache_dir: Path, progress: Callable[[int, int], None] | None = None) -> Report:
    """Check documents against each other, files against their hashes, and rows against the format.

    Hidden-state files may be gone as long as all of them are. ``progress`` is called with (bytes checked, of bytes),
    where the shards' bytes count once for their hash and once for their rows.

    Raises:
        CacheIncompleteError: there is no finished cache to check.
    """
    report = Report()
    try:
        manifest = read_manifest(cache_dir)
    except CacheCorruptError as error:
        report.errors.append(Damage(MANIFEST_NAME, str(error)))
        return report
    report.errors += _check_documents(cache_dir, manifest)
    hidden = {hidden_name(receipt.shard) for receipt in manifest.receipts}
    if not any((cache_dir / name).exists() for name in hidden):
        hidden_deleted, files = True, [file for file in manifest.all_files if file.name not in hidden]
    else:
        hidden_deleted, files = False, manifest.all_files
    shards = {file.name for receipt in manifest.receipts for file in receipt.files}
    total = sum(file.num_bytes * (2 if file.name in shards else 1) for file in files)
    for file in files:
        reason = _check_file(cache_dir / file.name, file.num_bytes, file.sha256)
        if reason:
            report.errors.append(Damage(file.name, reason))
        report.checked_bytes += file.num_bytes
        if progress:
            progress(report.checked_bytes, total)
    damaged = {damage.file for damage in report.errors}
    if not {PLAN_NAME, MANIFEST_NAME, *(shard_name(receipt.shard) for receipt in manifest.receipts)} & damaged:
        check_hidden = not hidden_deleted and not hidden & damaged
        for checked, damages in _check_shards(CacheReader(cache_dir), check_hidden):
            report.errors += damages
            if progress:
                progress(report.checked_bytes + checked, total)
    if progress:
        progress(total, total)  # rows behind a wrong hash are not looked at
    return report


def _check_documents(cache_dir: Path, manifest: Manifest) -> Iterator[Damage]:
    """The manifest repeats plan and receipts; a changed byte in any of them shows as a difference."""
    documents: list[tuple[str, Plan | Receipt]] = [(PLAN_NAME, manifest.plan)]
    documents += [(receipt_name(receipt.shard), receipt) for receipt in manifest.receipts]
    for name, expected in documents:
        try:
            found = read_json(cache_dir / name, type(expected))
        except FileNotFoundError:
            yield Damage(name, "it is missing")
        except CacheError as error:
            yield Damage(name, str(error))
        else:
            if found != expected:
                yield Damage(name, "it says something else than manifest.json")
    if [receipt.shard for receipt in manifest.receipts] != list(range(manifest.plan.num_shards)):
        yield Damage(MANIFEST_NAME, f"its receipts are not those of shards 0 to {manifest.plan.num_shards - 1}")
    num_sequences = sum(receipt.num_sequences for receipt in manifest.receipts)
    if num_sequences != manifest.plan.num_sequences:
        yield Damage(MANIFEST_NAME, f"receipts hold {num_sequences} sequences, the plan {manifest.plan.num_sequences}")


def _check_file(path: Path, num_bytes: int, sha256: str) -> str | None:
    if not path.exists():
        return "it is missing"
    if path.stat().st_size != num_bytes:
        return f"it has {path.stat().st_size:,} bytes, its receipt says {num_bytes:,}"
    if sha256_of(path) != sha256:
        return "its SHA-256 is not its receipt's"
    return None


def _check_shards(reader: CacheReader, check_hidden: bool) -> Iterator[tuple[int, list[Damage]]]:
    """Yield after every sequence, and every shard, the bytes whose rows are checked so far and the damage in them."""
    first = checked = 0
    for receipt in reader.manifest.receipts:
        num_bytes = sum(
            file.num_bytes for file in receipt.files if check_hidden or file.name != hidden_name(receipt.shard)
        )
        num_positions = num_tokens = 0
        try:
            for done in range(1, receipt.num_sequences + 1):
                scored = reader[first + done - 1]
                num_positions += scored.rows.num_positions
                num_tokens += scored.sequence.num_tokens
                where = f"sequence {scored.sequence.sequence_id.hex()}"
                fault = fault_in_rows(scored, reader.plan)
                damages = [Damage(shard_name(receipt.shard), f"{where}: {fault}")] if fault else []
                if check_hidden:
                    damages += _check_hidden(reader, first + done - 1, receipt.shard, where)
                yield checked + num_bytes * done // receipt.num_sequences, damages
        except CacheCorruptError as error:
            yield checked, [Damage(shard_name(receipt.shard), str(error))]
        else:
            if (num_positions, num_tokens) != (receipt.num_positions, receipt.num_tokens):
                damage = Damage(receipt_name(receipt.shard), "its counts are not those of the rows")
                yield checked + num_bytes, [damage]
        first += receipt.num_sequences
        checked += num_bytes


def _check_hidden(reader: CacheReader, index: int, shard: int, where: str) -> list[Damage]:
    if reader.plan.hidden_states is None:
        return []
    try:
        states, num_positions = reader.hidden_states(index), reader[index].rows.num_positions
        fault = fault_in_hidden(states, num_positions, reader.plan, reader.hidden_dtype)
    except CacheCorruptError as error:
        return [Damage(hidden_name(shard), str(error))]
    return [Damage(hidden_name(shard), f"{where}: {fault}")] if fault else []
