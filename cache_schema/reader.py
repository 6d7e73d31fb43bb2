"""Reads a finished cache by sequence index, in any order."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schema.encoding import (
    HIDDEN_COLUMN,
    HIDDEN_NUMPY_DTYPES,
    RESIDUAL_COLUMN,
    ROW_SCALE_COLUMN,
    Int8States,
    from_int8,
    from_ragged,
    from_steps,
    hidden_schema,
    scalar_columns,
    shard_schema,
    split_lists,
)
from cache_schema.errors import CacheCorruptError, SequenceNotFoundError
from cache_schema.manifest import (
    LM_HEAD_NAME,
    PLAN_NAME,
    TOKENIZER_NAME,
    hidden_name,
    manifest_sha256,
    read_json,
    read_manifest,
    shard_name,
)
from cache_schema.plan import Dtype, Plan
from cache_schema.sequence import SEQUENCE_ID_BYTES, ScoredSequence, TokenSequence, TopKRows

_GROUPS_KEPT = 64
_FILES_KEPT = 64
_NO_TAILS = np.empty(0, dtype=np.float32)
T = TypeVar("T")


class CacheReader(Sequence[ScoredSequence]):
    """A finished cache as a sequence of scored sequences, without hidden states (ask ``hidden_states`` for those).

    Indexes count through the shards in order. Page checksums are verified on every read.

    Raises:
        CacheIncompleteError: the directory has no manifest.
        CacheCorruptError: a file is missing, of another size, or fails its checksum; names the file.
    """

    def __init__(self, cache_dir: Path | str) -> None:
        self.cache_dir = Path(cache_dir)
        self.manifest = read_manifest(self.cache_dir)
        self.manifest_sha256 = manifest_sha256(self.cache_dir)
        self._check_plan()
        self._first_index = np.cumsum([0, *(receipt.num_sequences for receipt in self.manifest.receipts)])
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], list[ScoredSequence]] = OrderedDict()
        self._group_ends: dict[str, npt.NDArray[np.int64]] = {}
        for receipt in self.manifest.receipts:
            for file in receipt.files:
                if file.name == shard_name(receipt.shard):
                    self._check_size(file.name, file.num_bytes)

    @property
    def plan(self) -> Plan:
        return self.manifest.plan

    @property
    def tokenizer_dir(self) -> Path:
        return self.cache_dir / TOKENIZER_NAME

    @property
    def lm_head_path(self) -> Path:
        return self.cache_dir / LM_HEAD_NAME

    @cached_property
    def has_hidden_states(self) -> bool:
        """Whether they were kept and are still all there: they may be deleted to free the disk."""
        if self.plan.hidden_states is None or not self.lm_head_path.exists():
            return False
        return all((self.cache_dir / hidden_name(receipt.shard)).exists() for receipt in self.manifest.receipts)

    def __len__(self) -> int:
        return int(self._first_index[-1])

    @overload
    def __getitem__(self, index: int) -> ScoredSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[ScoredSequence]: ...
    def __getitem__(self, index: int | slice) -> ScoredSequence | list[ScoredSequence]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shard, row = self._locate(index)
        name = shard_name(shard)
        group, row_in_group = self._group_of(name, shard, row)
        key = (shard, group)
        if key in self._groups:
            self._groups.move_to_end(key)
        else:
            self._groups[key] = self._decode(name, self._read_group(name, group, shard_schema(self.plan)))
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        return self._groups[key][row_in_group]

    @property
    def hidden_dtype(self) -> Dtype:
        """Dtype of what ``hidden_states`` returns: as stored, and float32 for int8."""
        hidden = self.plan.hidden_states
        assert hidden is not None
        return "float32" if hidden.dtype == "int8" else hidden.dtype

    def hidden_states(self, index: int) -> npt.NDArray[np.generic]:
        """Final-norm hidden states of a sequence's stored positions in ``hidden_dtype``; bf16 as uint16 bits. [P, D]

        Raises:
            CacheCorruptError: the stored bytes are not this sequence's.
        """
        hidden = self.plan.hidden_states
        assert hidden is not None
        shard, row = self._locate(index)
        name = hidden_name(shard)
        group, row_in_group = self._group_of(name, shard, row)
        table = self._read_group(name, group, hidden_schema(hidden))
        if table["sequence_id"][row_in_group].as_py() != self[index].sequence.sequence_id:
            raise self._corrupt(name, f"row {row} belongs to another sequence than in {shard_name(shard)}")

        def matrix(column: str, num_columns: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
            raw, shape = table[column][row_in_group].as_buffer(), (num_positions, num_columns)
            if raw.size != shape[0] * shape[1] * dtype.itemsize:
                raise self._corrupt(
                    name, f"{column} of row {row} holds {raw.size} bytes, expected {shape[0]}x{shape[1]} {dtype}"
                )
            return np.frombuffer(raw, dtype=dtype).reshape(shape)

        num_positions = self[index].rows.num_positions
        if hidden.dtype != "int8":
            return matrix(HIDDEN_COLUMN, hidden.size, np.dtype(HIDDEN_NUMPY_DTYPES[hidden.dtype]))
        row_scale = table[ROW_SCALE_COLUMN][row_in_group].values.to_numpy(zero_copy_only=False)
        if len(row_scale) != num_positions or not ((row_scale > 0) & (row_scale < np.inf)).all():
            raise self._corrupt(name, f"{ROW_SCALE_COLUMN} of row {row} is not {num_positions} finite numbers above 0")
        states = matrix(HIDDEN_COLUMN, hidden.size, np.dtype(np.int8))
        residuals = matrix(RESIDUAL_COLUMN, len(hidden.residual_channels or ()), np.dtype(np.int8))
        return from_int8(Int8States(states, residuals, row_scale), hidden)

    def index_of(self, sequence_id: bytes) -> int:
        """Index of a sequence by its 128-bit id. The first call reads the ids of all shards: 24 bytes a sequence.

        Raises:
            SequenceNotFoundError: no such sequence.
        """
        sorted_ids, order = self._index_by_id
        wanted = np.array([sequence_id], dtype=sorted_ids.dtype)
        place = int(np.searchsorted(sorted_ids, wanted)[0])
        if place < len(self) and sorted_ids[place].tobytes() == sequence_id:
            return int(order[place])
        raise SequenceNotFoundError(
            f"sequence {sequence_id.hex()} is not in {self.cache_dir} ({len(self):,} sequences): it was tokenized "
            f"differently, or never dumped. `pipeline inspect {self.cache_dir}` says what the cache was made with."
        )

    def read_columns(self, columns: Sequence[str], read: Callable[[pa.Table], T]) -> list[T]:
        """What ``read`` makes of these columns of each row group, in the order of the indexes; no other is touched.

        Raises:
            CacheCorruptError: a page fails its checksum, or ``read`` raised a ValueError; names the file.
        """
        schema = pa.schema([field for field in shard_schema(self.plan) if field.name in columns])
        made = []
        for shard in range(len(self.manifest.receipts)):
            name = shard_name(shard)
            self._group_of(name, shard, 0)  # refuses row counts that are not the receipt's
            for group in range(len(self._group_ends[name])):
                table = self._read_group(name, group, schema, schema.names)
                with self._reading(name):
                    made.append(read(table))
        return made

    @cached_property
    def _index_by_id(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """All ids in ascending order, and the index of each."""
        ids = []
        for shard, receipt in enumerate(self.manifest.receipts):
            name = shard_name(shard)
            file = self._open(name)
            with self._reading(name):
                column = b"".join(file.read(columns=["sequence_id"])["sequence_id"].to_pylist())
            if len(column) != receipt.num_sequences * SEQUENCE_ID_BYTES:
                raise self._corrupt(name, f"it does not hold {receipt.num_sequences} sequence ids")
            ids.append(column)
        flat = np.frombuffer(b"".join(ids), dtype=f"V{SEQUENCE_ID_BYTES}")
        order = np.argsort(flat, kind="stable")
        return flat[order], order

    def _locate(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.cache_dir}")
        index %= len(self)
        shard = int(np.searchsorted(self._first_index, index, side="right")) - 1
        return shard, index - int(self._first_index[shard])

    def _group_of(self, name: str, shard: int, row: int) -> tuple[int, int]:
        ends = self._group_ends.get(name)
        if ends is None:
            metadata = self._open(name).metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            # No checksum covers a Parquet footer: a wrong count in it would shift every later row.
            if min(sizes, default=0) < 0 or sum(sizes) != self.manifest.receipts[shard].num_sequences:
                raise self._corrupt(name, f"its row groups hold {sum(sizes)} rows, its receipt says otherwise")
            ends = self._group_ends[name] = np.cumsum(sizes, dtype=np.int64)
        group = int(np.searchsorted(ends, row, side="right"))
        return group, row - (int(ends[group - 1]) if group else 0)

    def _open(self, name: str) -> pq.ParquetFile:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        with self._reading(name):
            file = pq.ParquetFile((self.cache_dir / name).absolute(), page_checksum_verification=True)
        self._files[name] = file
        if len(self._files) > _FILES_KEPT:
            self._files.popitem(last=False)[1].close()
        return file

    def _read_group(self, name: str, group: int, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
        file = self._open(name)
        with self._reading(name):
            # Threads would cost more than they save on row groups of this size.
            table = file.read_row_group(group, columns, use_threads=False)
            table.validate()
            if not table.schema.equals(schema):
                raise ValueError("its columns are not those of the format")
            if table.num_rows != file.metadata.row_group(group).num_rows:
                raise ValueError(f"row group {group} has {table.num_rows} rows, its footer says otherwise")
        return table

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Name the file in whatever pyarrow raises over damaged bytes."""
        try:
            yield
        except (OSError, ValueError, LookupError, MemoryError, OverflowError, pa.ArrowException) as error:
            raise self._corrupt(name, str(error)) from error

    def _decode(self, name: str, table: pa.Table) -> list[ScoredSequence]:
        with self._reading(name):
            columns = {field: table[field].combine_chunks() for field in table.column_names}
            lists = {field: split_lists(column) for field, column in columns.items() if pa.types.is_list(column.type)}
            ids, sources = columns["sequence_id"].to_pylist(), columns["source"].to_pylist()
            return [
                self._decode_row({field: rows[row] for field, rows in lists.items()}, ids[row], sources[row])
                for row in range(table.num_rows)
            ]

    def _decode_row(self, values: dict[str, npt.NDArray[Any]], sequence_id: bytes, source: str) -> ScoredSequence:
        plan = self.plan
        sequence = TokenSequence(values["input_ids"], values["loss_mask"], source)
        if sequence.sequence_id != sequence_id:
            raise ValueError(f"the tokens of sequence {sequence_id.hex()} have another id")
        num_positions = len(sequence.target_rows(plan.positions))
        if plan.sampling:
            drawn = from_ragged(values["num_ids"], values["token_ids"], values["counts"], num_positions)
            return ScoredSequence(sequence, drawn, hidden_states=None)
        if plan.logit_step:
            drops = values["logit_drops"].reshape(num_positions, plan.top_k - 1)
            logits = from_steps(values["top_logit_steps"], drops, plan.logit_step)
        else:
            logits = values["logits"].reshape(num_positions, plan.top_k)
        scalars = {
            name: values[name].reshape(num_positions) for name in scalar_columns(plan) if name != "tail_logsumexp"
        }
        rows = TopKRows(
            token_ids=values["token_ids"].reshape(num_positions, plan.top_k),
            logits=logits,
            tail_logsumexp=values.get("tail_logsumexp", _NO_TAILS).reshape(num_positions, len(plan.temperatures)),
            **scalars,
        )
        return ScoredSequence(sequence, rows, hidden_states=None)

    def _check_plan(self) -> None:
        """Hashes vouch for the shards but not for the manifest; that its plan stands twice does."""
        try:
            stored = read_json(self.cache_dir / PLAN_NAME, Plan)
        except FileNotFoundError:
            raise self._corrupt(PLAN_NAME, "it is missing") from None
        if stored != self.plan:
            raise self._corrupt(PLAN_NAME, "it says something else than manifest.json")

    def _check_size(self, name: str, expected: int) -> None:
        path = self.cache_dir / name
        if not path.exists():
            raise self._corrupt(name, "it is missing")
        if path.stat().st_size != expected:
            raise self._corrupt(name, f"it has {path.stat().st_size:,} bytes, its receipt says {expected:,}")

    def _corrupt(self, name: str, reason: str) -> CacheCorruptError:
        return CacheCorruptError(
            f"{self.cache_dir / name} is damaged: {reason}. `pipeline verify {self.cache_dir}` lists every damaged "
            f"file; restore them, or delete them with their receipt and {self.cache_dir / 'manifest.json'} and run "
            f"the dump again, which scores those shards anew."
        )
