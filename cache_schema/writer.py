"""Writes one shard: Parquet files first, the receipt last."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schema.encoding import (
    HIDDEN_COLUMN,
    HIDDEN_NUMPY_DTYPES,
    SCALAR_COLUMNS,
    hidden_schema,
    list_array,
    logit_columns,
    shard_schema,
    to_steps,
)
from cache_schema.errors import StorageError
from cache_schema.manifest import Plan, Receipt, StoredFile, hidden_name, receipt_name, shard_name, write_json
from cache_schema.sequence import ScoredSequence
from cache_schema.storage import publish, sha256_of

ROWS_PER_GROUP = 16
"""Sequences decoded together: enough for the compression, few enough for random access in training."""


class ShardWriter:
    """A context manager: ``append`` scored sequences; leaving it without an exception publishes the shard.

    Rows stand in the order they were appended. Memory is bounded by one row group and one sequence's hidden states.

    Raises:
        ValueError: a sequence breaks the format (too many targets, NaN, an id outside the vocabulary, wrong order).
        StorageError: the disk refused; nothing is left under a final name.
    """

    def __init__(self, cache_dir: Path, plan: Plan, shard: int) -> None:
        self._cache_dir = cache_dir
        self._plan = plan
        self._shard = shard
        self._stack = ExitStack()
        self._pending: list[ScoredSequence] = []
        self._num_sequences = self._num_tokens = self._num_positions = 0

    def __enter__(self) -> "ShardWriter":
        grid_columns = [name for name in logit_columns(self._plan) if name != "logits"]
        split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in [*logit_columns(self._plan), *SCALAR_COLUMNS]}
        try:
            self._rows = self._open(
                shard_name(self._shard),
                shard_schema(self._plan),
                compression="zstd",
                compression_level=1,  # smaller than 3 on the drops, as small on the ids
                use_dictionary=["source"],
                column_encoding=split,
                write_statistics=["sequence_id", *(f"{name}.list.element" for name in grid_columns)],
                write_page_checksum=True,
            )
            self._hidden = None
            if self._plan.hidden_states:
                self._hidden = self._open(
                    hidden_name(self._shard),
                    hidden_schema(),
                    compression="none",  # float noise: zstd saves little and costs the reader more
                    use_dictionary=False,
                    write_statistics=False,
                    write_page_checksum=True,
                )
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def append(self, scored: ScoredSequence) -> None:
        _check(scored, self._plan)
        self._num_sequences += 1
        self._num_tokens += scored.sequence.num_tokens
        self._num_positions += scored.rows.num_positions
        self._pending.append(scored)
        if self._hidden is not None:
            assert scored.hidden_states is not None
            row = [[scored.sequence.sequence_id], [scored.hidden_states.tobytes()]]
            # A row group a sequence, so that a reader fetches the hidden states of one sequence alone.
            self._write(self._hidden, pa.table(row, schema=hidden_schema()))
        if len(self._pending) == ROWS_PER_GROUP:
            self._write_group()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._pending:
            try:
                self._write_group()
            except BaseException as failure:
                self._stack.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._stack.__exit__(kind, error, traceback)
        if kind is None:
            write_json(self._cache_dir / receipt_name(self._shard), self._receipt())

    def _open(self, name: str, schema: pa.Schema, **options: Any) -> pq.ParquetWriter:
        temporary = self._stack.enter_context(publish(self._cache_dir / name))
        return self._stack.enter_context(pq.ParquetWriter(temporary, schema, **options))

    def _write_group(self) -> None:
        self._write(self._rows, _table(self._pending, self._plan))
        self._pending = []

    def _write(self, writer: pq.ParquetWriter, table: pa.Table) -> None:
        try:
            writer.write_table(table)
        except OSError as error:
            raise StorageError(
                f"{self._cache_dir / shard_name(self._shard)} cannot be written: {error.strerror or error}. Free "
                f"space or fix the permissions and run the same command again, finished shards are kept."
            ) from error

    def _receipt(self) -> Receipt:
        names = [shard_name(self._shard), *([hidden_name(self._shard)] if self._plan.hidden_states else [])]
        sizes = _column_bytes(self._cache_dir / names[0])
        return Receipt(
            shard=self._shard,
            num_sequences=self._num_sequences,
            num_tokens=self._num_tokens,
            num_positions=self._num_positions,
            logits_bytes=sum(sizes[name] for name in logit_columns(self._plan)),
            scalar_bytes=sum(sizes[name] for name in SCALAR_COLUMNS),
            files=tuple(stored_file(self._cache_dir, name) for name in names),
        )


def stored_file(cache_dir: Path, name: str) -> StoredFile:
    path = cache_dir / name
    return StoredFile(name=name, num_bytes=path.stat().st_size, sha256=sha256_of(path))


def _table(group: list[ScoredSequence], plan: Plan) -> pa.Table:
    sequences = [scored.sequence for scored in group]
    rows = [scored.rows for scored in group]
    columns = {
        "sequence_id": pa.array([sequence.sequence_id for sequence in sequences], pa.binary(16)),
        "source": pa.array([sequence.source for sequence in sequences], pa.string()),
        "input_ids": list_array([sequence.input_ids for sequence in sequences], pa.int32()),
        "loss_mask": list_array([sequence.loss_mask for sequence in sequences], pa.bool_()),
        "token_ids": list_array([row.token_ids for row in rows], pa.int32()),
    }
    if plan.logit_step:
        steps = [to_steps(row.logits, plan.logit_step) for row in rows]
        columns["top_logit_steps"] = list_array([top for top, _ in steps], pa.int32())
        columns["logit_drops"] = list_array([drops for _, drops in steps], pa.int32())
    else:
        columns["logits"] = list_array([row.logits for row in rows], pa.float32())
    for name in SCALAR_COLUMNS:
        columns[name] = list_array([getattr(row, name) for row in rows], pa.float32())
    return pa.table(columns, schema=shard_schema(plan))


def _check(scored: ScoredSequence, plan: Plan) -> None:
    """Refuse what a reader could not trust."""
    sequence, rows = scored.sequence, scored.rows
    expected = (len(sequence.target_rows(plan.positions)), plan.top_k)
    where = f"sequence {sequence.sequence_id.hex()}"
    if expected[0] == 0:
        raise ValueError(f"{where} has no target position")
    shapes = {"token_ids": expected, "logits": expected, "tail_logsumexp": (expected[0], len(plan.temperatures))}
    shapes |= {name: expected[:1] for name in ("label_logit", "row_mean", "row_std")}
    for name, shape in shapes.items():
        if getattr(rows, name).shape != shape:
            raise ValueError(f"{where}: {name} is {getattr(rows, name).shape}, the plan and the mask say {shape}")
    vocab_size = plan.tokenizer.vocab_size
    for name, ids in (("input_ids", sequence.input_ids), ("token_ids", rows.token_ids)):
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"{where}: {name} holds {ids.max()}, outside the vocabulary of {vocab_size}")
    for name in ("logits", "label_logit", "row_mean", "row_std"):
        if not np.isfinite(getattr(rows, name)).all():
            raise ValueError(f"{where}: {name} is not finite")
    # With K = V the tail is empty and its log-sum-exp is -inf; anything else must be a number.
    if not (np.isfinite(rows.tail_logsumexp).all() or (plan.top_k == vocab_size and not np.isnan(rows.tail_logsumexp).any())):
        raise ValueError(f"{where}: tail_logsumexp is not finite")
    if (np.diff(rows.logits, axis=1) > 0).any():
        raise ValueError(f"{where}: logits increase")
    hidden, states = plan.hidden_states, scored.hidden_states
    if hidden is None:
        if states is not None:
            raise ValueError(f"{where} has hidden states, the plan keeps none")
        return
    wanted = (expected[0], hidden.size)
    if states is None or states.shape != wanted or states.dtype != np.dtype(HIDDEN_NUMPY_DTYPES[hidden.dtype]):
        raise ValueError(f"{where}: {HIDDEN_COLUMN} must be {wanted} in {hidden.dtype}")


def _column_bytes(path: Path) -> dict[str, int]:
    """Compressed bytes of each top-level column, from the file's footer."""
    with pq.ParquetFile(path) as file:
        sizes: dict[str, int] = {}
        for group in range(file.metadata.num_row_groups):
            for index in range(file.metadata.num_columns):
                column = file.metadata.row_group(group).column(index)
                name = column.path_in_schema.split(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes
