"""Proves a cache whole: every document, every hash, every row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cache_schema.encoding import all_finite
from cache_schema.errors import CacheCorruptError, CacheError
from cache_schema.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    Manifest,
    Plan,
    Receipt,
    hidden_name,
    read_json,
    read_manifest,
    receipt_name,
    shard_name,
)
from cache_schema.reader import CacheReader
from cache_schema.sequence import ScoredSequence
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

    Hidden-state files may be gone as long as all of them are. ``progress`` is called with (bytes hashed, of bytes).

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
    total = sum(file.num_bytes for file in files)
    for file in files:
        reason = _check_file(cache_dir / file.name, file.num_bytes, file.sha256)
        if reason:
            report.errors.append(Damage(file.name, reason))
        report.checked_bytes += file.num_bytes
        if progress:
            progress(report.checked_bytes, total)
    damaged = {damage.file for damage in report.errors}
    if not {PLAN_NAME, MANIFEST_NAME, *(shard_name(receipt.shard) for receipt in manifest.receipts)} & damaged:
        report.errors += _check_shards(CacheReader(cache_dir), check_hidden=not hidden_deleted and not hidden & damaged)
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


def _check_shards(reader: CacheReader, check_hidden: bool) -> Iterator[Damage]:
    first = 0
    for receipt in reader.manifest.receipts:
        num_positions = num_tokens = 0
        try:
            for index in range(first, first + receipt.num_sequences):
                scored = reader[index]
                num_positions += scored.rows.num_positions
                num_tokens += scored.sequence.num_tokens
                reason = check_rows(scored, reader.plan)
                if reason:
                    yield Damage(shard_name(receipt.shard), f"sequence {scored.sequence.sequence_id.hex()}: {reason}")
                if check_hidden:
                    yield from _check_hidden(reader, index, receipt.shard)
        except CacheCorruptError as error:
            yield Damage(shard_name(receipt.shard), str(error))
        else:
            if (num_positions, num_tokens) != (receipt.num_positions, receipt.num_tokens):
                yield Damage(receipt_name(receipt.shard), "its counts are not those of the rows")
        first += receipt.num_sequences


def _check_hidden(reader: CacheReader, index: int, shard: int) -> Iterator[Damage]:
    hidden = reader.plan.hidden_states
    try:
        if hidden and not all_finite(reader.hidden_states(index), hidden.dtype):
            sequence_id = reader[index].sequence.sequence_id.hex()
            yield Damage(hidden_name(shard), f"sequence {sequence_id}: a hidden state is not finite")
    except CacheCorruptError as error:
        yield Damage(hidden_name(shard), str(error))


def check_rows(scored: ScoredSequence, plan: Plan) -> str | None:
    """What is wrong with a sequence's rows, or None."""
    rows = scored.rows
    if rows.num_positions == 0:
        return "it has no target position"
    ids = np.sort(rows.token_ids, axis=1)
    if ids.min() < 0 or ids.max() >= plan.tokenizer.vocab_size:
        return f"token id outside the vocabulary of {plan.tokenizer.vocab_size}"
    if (ids[:, 1:] == ids[:, :-1]).any():
        return "a token id stands twice in one position"
    for name in ("logits", "label_logit", "row_mean", "row_std"):
        if not np.isfinite(getattr(rows, name)).all():
            return f"{name} is not finite"
    if (np.diff(rows.logits, axis=1) > 0).any():
        return "logits increase"
    if np.isnan(rows.tail_logsumexp).any() or (rows.tail_logsumexp == np.inf).any():
        return "tail_logsumexp is not a number"
    sequence = scored.sequence
    labels = sequence.input_ids[sequence.target_rows(plan.positions) + 1]
    # A stored logit is within half a step of the truth, the label's own is exact: they must agree where both stand.
    slack = plan.logit_step / 2 + 1e-5 * max(1.0, float(np.abs(rows.logits).max()))
    is_label = rows.token_ids == labels[:, None]
    stored = np.where(is_label, rows.logits, -np.inf).max(axis=1)
    inside = is_label.any(axis=1)
    if (np.abs(stored - rows.label_logit)[inside] > slack).any():
        return "a label's logit differs from the same id's in the top k"
    if (rows.label_logit[~inside] > rows.logits[~inside, -1] + slack).any():
        return "a label outside the top k has a logit above it"
    return None
