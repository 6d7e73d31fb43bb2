"""Reads a finished cache by sequence index, in any order."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schema.encoding import HIDDEN_COLUMN, HIDDEN_NUMPY_DTYPES, from_steps, list_values
from cache_schema.errors import CacheCorruptError, SequenceNotFoundError
from cache_schema.manifest import (
    LM_HEAD_NAME,
    TOKENIZER_NAME,
    Plan,
    hidden_name,
    manifest_sha256,
    read_manifest,
    shard_name,
)
from cache_schema.sequence import ScoredSequence, TokenSequence, TopKRows

_GROUPS_KEPT = 64
_FILES_KEPT = 64


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
        group, row_in_group = self._group_of(shard_name(shard), row)
        key = (shard, group)
        if key in self._groups:
            self._groups.move_to_end(key)
        else:
            self._groups[key] = self._decode(shard_name(shard), self._read_group(shard_name(shard), group))
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        return self._groups[key][row_in_group]

    def hidden_states(self, index: int) -> npt.NDArray[np.generic]:
        """Final-norm hidden states of a sequence's stored positions; bfloat16 as uint16 bits. [P, D]

        Raises:
            CacheCorruptError: the stored bytes are not this sequence's.
        """
        assert self.plan.hidden_states is not None
        shard, row = self._locate(index)
        name = hidden_name(shard)
        group, row_in_group = self._group_of(name, row)
        table = self._read_group(name, group)
        if table["sequence_id"][row_in_group].as_py() != self[index].sequence.sequence_id:
            raise self._corrupt(name, f"row {row} belongs to another sequence than in {shard_name(shard)}")
        raw = table[HIDDEN_COLUMN].chunk(0)[row_in_group].as_buffer()
        states = np.frombuffer(raw, dtype=HIDDEN_NUMPY_DTYPES[self.plan.hidden_states.dtype])
        shape = (self[index].rows.num_positions, self.plan.hidden_states.size)
        if states.size != shape[0] * shape[1]:
            raise self._corrupt(name, f"row {row} holds {states.size} values, expected {shape[0]}x{shape[1]}")
        return states.reshape(shape)

    def index_of(self, sequence_id: bytes) -> int:
        """Index of a sequence by its 128-bit id.

        Raises:
            SequenceNotFoundError: no such sequence.
        """
        for receipt in self.manifest.receipts:
            file = self._open(shard_name(receipt.shard))
            column = file.read(columns=["sequence_id"])["sequence_id"]
            found = column.to_pylist()
            if sequence_id in found:
                return int(self._first_index[receipt.shard]) + found.index(sequence_id)
        raise SequenceNotFoundError(
            f"sequence {sequence_id.hex()} is not in {self.cache_dir} ({len(self):,} sequences): it was tokenized "
            f"differently, or never dumped. `pipeline inspect {self.cache_dir}` says what the cache was made with."
        )

    def _locate(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.cache_dir}")
        index %= len(self)
        shard = int(np.searchsorted(self._first_index, index, side="right")) - 1
        return shard, index - int(self._first_index[shard])

    def _group_of(self, name: str, row: int) -> tuple[int, int]:
        ends = self._group_ends.get(name)
        if ends is None:
            metadata = self._open(name).metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            ends = self._group_ends[name] = np.cumsum(sizes, dtype=np.int64)
        group = int(np.searchsorted(ends, row, side="right"))
        if group == len(ends):
            raise self._corrupt(name, f"it has {ends[-1] if len(ends) else 0} rows, row {row} is missing")
        return group, row - (int(ends[group - 1]) if group else 0)

    def _open(self, name: str) -> pq.ParquetFile:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        try:
            file = pq.ParquetFile(self.cache_dir / name, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise self._corrupt(name, str(error)) from error
        self._files[name] = file
        if len(self._files) > _FILES_KEPT:
            self._files.popitem(last=False)[1].close()
        return file

    def _read_group(self, name: str, group: int) -> pa.Table:
        try:
            return self._open(name).read_row_group(group)
        except (OSError, pa.ArrowException) as error:
            raise self._corrupt(name, str(error)) from error

    def _decode(self, name: str, table: pa.Table) -> list[ScoredSequence]:
        columns = {field: table[field].combine_chunks() for field in table.column_names}
        try:
            return [self._decode_row(columns, row) for row in range(table.num_rows)]
        except (ValueError, KeyError) as error:
            raise self._corrupt(name, str(error)) from error

    def _decode_row(self, columns: dict[str, Any], row: int) -> ScoredSequence:
        plan = self.plan
        sequence = TokenSequence(
            list_values(columns["input_ids"], row),
            list_values(columns["loss_mask"], row),
            columns["source"][row].as_py(),
        )
        if sequence.sequence_id != columns["sequence_id"][row].as_py():
            raise ValueError(f"row {row}: its sequence id is not the hash of its tokens")
        num_positions = len(sequence.target_rows(plan.positions))
        if plan.logit_step:
            drops = list_values(columns["logit_drops"], row).reshape(num_positions, plan.top_k - 1)
            logits = from_steps(list_values(columns["top_logit_steps"], row), drops, plan.logit_step)
        else:
            logits = list_values(columns["logits"], row).reshape(num_positions, plan.top_k)
        rows = TopKRows(
            token_ids=list_values(columns["token_ids"], row).reshape(num_positions, plan.top_k),
            logits=logits,
            tail_logsumexp=list_values(columns["tail_logsumexp"], row).reshape(num_positions, -1),
            label_logit=list_values(columns["label_logit"], row),
            row_mean=list_values(columns["row_mean"], row),
            row_std=list_values(columns["row_std"], row),
        )
        return ScoredSequence(sequence, rows, hidden_states=None)

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
