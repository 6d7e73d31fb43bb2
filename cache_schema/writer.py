"""Writes one shard: Parquet files first, the receipt last."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache_schema.encoding import (
    HIDDEN_COLUMN,
    RESIDUAL_COLUMN,
    ROW_SCALE_COLUMN,
    hidden_schema,
    list_array,
    logit_columns,
    scalar_columns,
    shard_schema,
    to_float32,
    to_int8,
    to_ragged,
    to_steps,
)
from cache_schema.invariants import fault_in_hidden, fault_in_rows
from cache_schema.manifest import Receipt, StoredFile, hidden_name, receipt_name, shard_name, write_json
from cache_schema.plan import Plan
from cache_schema.sequence import ScoredSequence
from cache_schema.storage import flush, publish, refused, sha256_of

ROWS_PER_GROUP = 16
"""Sequences decoded together: enough for the compression, few enough for random access in training."""


class _Abandoned(Exception):
    """Tells ``publish`` to clean up; the caller's own error could be mistaken for the disk's."""


class ShardWriter:
    """``append`` scored sequences, then ``publish`` or ``abandon``; a context manager does one of these in the end.

    Rows stand in the order they were appended. Memory is bounded by one row group and one sequence's hidden states,
    which come in the teacher's compute dtype and are rounded here where the plan says int8.

    Raises:
        ValueError: a sequence breaks the format (see ``cache_schema.invariants``), or the shard has not the plan's
            number of sequences.
        StorageError: the disk refused; nothing half-written is left under a final name, and no receipt.
    """

    def __init__(self, cache_dir: Path, plan: Plan, shard: int) -> None:
        self._cache_dir = cache_dir
        self._plan = plan
        self._shard = shard
        self._publications = ExitStack()
        self._temporaries: dict[str, Path] = {}
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._pending: list[ScoredSequence] = []
        self._num_sequences = self._num_tokens = self._num_positions = 0

    def __enter__(self) -> "ShardWriter":
        grid_columns = [name for name in logit_columns(self._plan) if name != "logits"]
        numbers = [*logit_columns(self._plan), *scalar_columns(self._plan)]
        split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in numbers}
        try:
            self._open(
                shard_name(self._shard),
                shard_schema(self._plan),
                compression="zstd",
                compression_level=1,  # smaller than 3 on the drops, as small on the ids
                use_dictionary=["source"],
                column_encoding=split,
                write_statistics=["sequence_id", *(f"{name}.list.element" for name in grid_columns)],
                write_page_checksum=True,
            )
            if self._plan.hidden_states:
                self._open(
                    hidden_name(self._shard),
                    hidden_schema(self._plan.hidden_states),
                    # zstd takes 8% off int8 for half a microsecond a position; floats stay as they are read fastest.
                    compression="zstd" if self._plan.hidden_states.dtype == "int8" else "none",
                    use_dictionary=False,
                    write_statistics=False,
                    write_page_checksum=True,
                )
        except BaseException:
            self.abandon()
            raise
        return self

    def append(self, scored: ScoredSequence) -> None:
        fault = fault_in_rows(scored, self._plan) or fault_in_hidden(
            scored.hidden_states, scored.rows.num_positions, self._plan, self._plan.teacher.dtype
        )
        if fault:
            raise ValueError(f"sequence {scored.sequence.sequence_id.hex()}: {fault}")
        self._num_sequences += 1
        self._num_tokens += scored.sequence.num_tokens
        self._num_positions += scored.rows.num_positions
        if scored.hidden_states is not None:
            # A row group a sequence, so that a reader fetches the hidden states of one sequence alone.
            self._write(hidden_name(self._shard), _hidden_table(scored, self._plan))
        self._pending.append(replace(scored, hidden_states=None))
        if len(self._pending) == ROWS_PER_GROUP:
            self._write_group()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.publish()
        else:
            self.abandon()

    def publish(self, is_still_wanted: Callable[[], bool] | None = None) -> bool:
        """Give the files their names, then write the receipt; returns whether it did.

        Args:
            is_still_wanted: asked when everything slow is done, just before the first file gets its name.
        """
        try:
            expected = len(self._plan.shard_range(self._shard))
            if self._num_sequences != expected:
                raise ValueError(f"shard {self._shard} got {self._num_sequences} sequences, the plan says {expected}")
            if self._pending:
                self._write_group()
            # Both files are complete, on the disk and hashed before either gets its name.
            for name, writer in self._writers.items():
                with self._writing(name):
                    writer.close()
                    flush(self._temporaries[name])
            with self._writing(shard_name(self._shard)):
                receipt = self._receipt()
            if is_still_wanted is not None and not is_still_wanted():
                self.abandon()
                return False
            self._publications.close()
            write_json(self._cache_dir / receipt_name(self._shard), receipt)
        except BaseException:
            self.abandon()
            raise
        return True

    def abandon(self) -> None:
        """Remove what was written."""
        for writer in self._writers.values():
            with suppress(OSError):  # a full disk refuses the footer too
                writer.close()
        abandoned = _Abandoned()
        self._publications.__exit__(_Abandoned, abandoned, None)

    def _open(self, name: str, schema: pa.Schema, **options: Any) -> None:
        self._temporaries[name] = self._publications.enter_context(publish(self._cache_dir / name))
        with self._writing(name):
            self._writers[name] = pq.ParquetWriter(self._temporaries[name], schema, **options)

    def _write_group(self) -> None:
        self._write(shard_name(self._shard), _table(self._pending, self._plan))
        self._pending = []

    def _write(self, name: str, table: pa.Table) -> None:
        with self._writing(name):
            self._writers[name].write_table(table)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise refused(self._cache_dir / name, error) from error

    def _receipt(self) -> Receipt:
        sizes = _column_bytes(self._temporaries[shard_name(self._shard)])
        return Receipt(
            shard=self._shard,
            num_sequences=self._num_sequences,
            num_tokens=self._num_tokens,
            num_positions=self._num_positions,
            logits_bytes=sum(sizes[name] for name in logit_columns(self._plan)),
            scalar_bytes=sum(sizes[name] for name in scalar_columns(self._plan)),
            files=tuple(stored_file(self._cache_dir, name, path) for name, path in self._temporaries.items()),
        )


def stored_file(directory: Path, name: str, path: Path | None = None) -> StoredFile:
    """What is said of a file of a directory; ``path`` is where it stands before it has its name."""
    path = path or directory / name
    return StoredFile(name=name, num_bytes=path.stat().st_size, sha256=sha256_of(path))


def _table(group: list[ScoredSequence], plan: Plan) -> pa.Table:
    sequences = [scored.sequence for scored in group]
    columns: dict[str, pa.Array] = {
        "sequence_id": pa.array([sequence.sequence_id for sequence in sequences], pa.binary(16)),
        "source": pa.array([sequence.source for sequence in sequences], pa.string()),
        "input_ids": list_array([sequence.input_ids for sequence in sequences], pa.int32()),
        "loss_mask": list_array([sequence.loss_mask for sequence in sequences], pa.bool_()),
    }
    columns |= _draw_columns(group, plan) if plan.sampling else _top_k_columns(group, plan)
    return pa.table(columns, schema=shard_schema(plan))


def _draw_columns(group: list[ScoredSequence], plan: Plan) -> dict[str, pa.Array]:
    ragged, schema = [to_ragged(scored.sampled_rows) for scored in group], shard_schema(plan)
    return {
        name: list_array([columns[name] for columns in ragged], schema.field(name).type.value_type)
        for name in logit_columns(plan)
    }


def _top_k_columns(group: list[ScoredSequence], plan: Plan) -> dict[str, pa.Array]:
    rows = [scored.top_k_rows for scored in group]
    columns = {"token_ids": list_array([row.token_ids for row in rows], pa.int32())}
    if plan.logit_step:
        steps = [to_steps(row.logits, plan.logit_step) for row in rows]
        columns["top_logit_steps"] = list_array([top for top, _ in steps], pa.int32())
        columns["logit_drops"] = list_array([drops for _, drops in steps], pa.int32())
    else:
        columns["logits"] = list_array([row.logits for row in rows], pa.float32())
    for name in scalar_columns(plan):
        columns[name] = list_array([getattr(row, name) for row in rows], pa.float32())
    return columns


def _hidden_table(scored: ScoredSequence, plan: Plan) -> pa.Table:
    """One row: the states as they came, or rounded to the plan's int8."""
    assert scored.hidden_states is not None
    assert plan.hidden_states is not None
    columns: dict[str, Any] = {"sequence_id": [scored.sequence.sequence_id]}
    if plan.hidden_states.dtype == "int8":
        stored = to_int8(to_float32(scored.hidden_states, plan.teacher.dtype), plan.hidden_states)
        columns[HIDDEN_COLUMN] = [stored.states.tobytes()]
        columns[RESIDUAL_COLUMN] = [stored.residuals.tobytes()]
        columns[ROW_SCALE_COLUMN] = list_array([stored.row_scale], pa.float32())
    else:
        columns[HIDDEN_COLUMN] = [scored.hidden_states.tobytes()]
    return pa.table(columns, schema=hidden_schema(plan.hidden_states))


def _column_bytes(path: Path) -> dict[str, int]:
    """Compressed bytes of each top-level column, from the file's footer."""
    with pq.ParquetFile(path.absolute()) as file:
        sizes: dict[str, int] = {}
        for group in range(file.metadata.num_row_groups):
            for index in range(file.metadata.num_columns):
                column = file.metadata.row_group(group).column(index)
                name = column.path_in_schema.split(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes
