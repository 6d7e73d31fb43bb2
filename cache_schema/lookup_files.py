"""What stands in a cache's lookup log: what live teachers said about its sequences, written back for every run.

    lookups/
      lm_head.safetensors        the head above the logged hidden states, where the cache itself has none
      WRITER/                    made, locked and written by one process: a run or a compaction
        000000.hidden.parquet    hidden states, one sequence a row, or
        000000.logits.parquet    answers: the teacher's logits at some ids of some positions
        000000.json              receipt, written after the file

Files never change and only a compaction deletes them, after what they hold stands in another. Every file and receipt
appears whole or not at all.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import model_validator

from cache_schema.encoding import HIDDEN_COLUMN, hidden_schema
from cache_schema.errors import CacheCorruptError
from cache_schema.manifest import StoredFile, write_json
from cache_schema.plan import FORMAT_VERSION, Stored
from cache_schema.storage import publish, refused
from cache_schema.writer import stored_file

LOOKUPS_NAME = "lookups"
Kind = Literal["hidden", "logits"]


class LookupReceipt(Stored):
    """What one file of the log holds."""

    format_version: int = FORMAT_VERSION
    kind: Kind
    manifest_sha256: str
    """Of the cache whose sequences these are."""
    lm_head_sha256: str | None
    """Of the head above the hidden states; null for logits."""
    hidden_size: int
    """D; 0 for logits."""
    indexes: tuple[int, ...]
    """Of the sequences in the cache, row by row."""
    num_positions: tuple[int, ...]
    """Stored positions of each."""
    num_pairs: int
    """Logits the file holds; 0 for hidden states."""
    file: StoredFile

    @model_validator(mode="after")
    def _consistent(self) -> "LookupReceipt":
        if not len(self.indexes) == len(self.num_positions) > 0:
            raise ValueError("indexes and num_positions must name the same sequences, one at least")
        if min(self.num_positions) < 1 or self.num_pairs < 0:
            raise ValueError("num_positions must be above 0 and num_pairs not below")
        if (self.kind == "hidden") != (self.hidden_size > 0 and self.lm_head_sha256 is not None):
            raise ValueError("hidden states, and they alone, have a hidden_size and an lm_head_sha256")
        return self


@dataclass(frozen=True, eq=False)
class LoggedLogits:
    """Exact teacher logits at some ids of one sequence's P stored positions."""

    counts: npt.NDArray[np.int32]  # [P], ids of each position
    token_ids: npt.NDArray[np.int32]  # [sum of counts], position by position
    logits: npt.NDArray[np.float32]  # [sum of counts]

    @classmethod
    def of_pairs(
        cls,
        num_positions: int,
        positions: npt.NDArray[np.integer[Any]],
        token_ids: npt.NDArray[np.integer[Any]],
        logits: npt.NDArray[np.float32],
    ) -> "LoggedLogits":
        """Pairs in any order, repeated ones too, as each (position, id) once."""
        order = np.lexsort((token_ids, positions))
        positions, token_ids, logits = positions[order], token_ids[order], logits[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (positions[1:] != positions[:-1]) | (token_ids[1:] != token_ids[:-1])
        counts = np.bincount(positions[new], minlength=num_positions).astype(np.int32)
        return cls(counts, token_ids[new].astype(np.int32), logits[new])

    @classmethod
    def merged(cls, parts: Sequence["LoggedLogits"]) -> "LoggedLogits":
        """All parts of one sequence, each (position, id) once."""
        return cls.of_pairs(
            len(parts[0].counts),
            np.concatenate([np.repeat(np.arange(len(part.counts)), part.counts) for part in parts]),
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.logits for part in parts]),
        )


LogRow = tuple[int, bytes, npt.NDArray[Any] | LoggedLogits]
"""A sequence's index in the cache, its id, and its hidden states [P, D] (bfloat16 as uint16 bits) or answers."""


def logits_schema() -> pa.Schema:
    return pa.schema(
        [
            pa.field("sequence_id", pa.binary(16), nullable=False),
            pa.field("counts", pa.list_(pa.int32()), nullable=False),
            pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("logits", pa.list_(pa.float32()), nullable=False),
        ]
    )


def schema_of(kind: Kind) -> pa.Schema:
    return hidden_schema() if kind == "hidden" else logits_schema()


def write_log_file(
    directory: Path,
    number: int,
    kind: Kind,
    rows: Iterable[LogRow],
    *,
    manifest_sha256: str,
    lm_head_sha256: str | None,
) -> LookupReceipt:
    """Publish one file and then its receipt; memory is bounded by one row.

    Raises:
        StorageError: the disk refused.
    """
    path = directory / f"{number:06d}.{kind}.parquet"
    indexes, num_positions, num_pairs, hidden_size = [], [], 0, 0
    with ExitStack() as stack:
        temporary = stack.enter_context(publish(path))
        writer = stack.enter_context(_writer(path, temporary, kind))
        for index, sequence_id, content in rows:
            indexes.append(index)
            if isinstance(content, LoggedLogits):
                lists = [[content.counts], [content.token_ids], [content.logits]]
                num_positions.append(len(content.counts))
                num_pairs += len(content.token_ids)
            else:
                lists = [[content.tobytes()]]
                num_positions.append(len(content))
                hidden_size = content.shape[1]
            # A row group a sequence, so that a reader fetches one sequence alone.
            writer.write_table(pa.table([[sequence_id], *lists], schema=schema_of(kind)))
    receipt = LookupReceipt(
        kind=kind,
        manifest_sha256=manifest_sha256,
        lm_head_sha256=lm_head_sha256 if kind == "hidden" else None,
        hidden_size=hidden_size,
        indexes=tuple(indexes),
        num_positions=tuple(num_positions),
        num_pairs=num_pairs,
        file=stored_file(directory, path.name),
    )
    write_json(directory / f"{number:06d}.json", receipt)
    return receipt


@contextmanager
def _writer(path: Path, temporary: Path, kind: Kind) -> Iterator[pq.ParquetWriter]:
    split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("counts", "token_ids", "logits")}
    options: dict[str, Any] = {"compression": "none"}
    if kind == "logits":
        options = {"compression": "zstd", "compression_level": 1, "column_encoding": split}
    try:
        with pq.ParquetWriter(
            temporary,
            schema_of(kind),
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            **options,
        ) as writer:
            yield writer
    except OSError as error:
        raise refused(path, error) from error


def read_log_row(
    file: pq.ParquetFile,
    path: Path,
    receipt: LookupReceipt,
    row: int,
    sequence_id: bytes,
    num_positions: int,
    dtype: np.dtype[Any],
) -> npt.NDArray[Any] | LoggedLogits:
    """One sequence of an open file of the log.

    Args:
        num_positions: as the cache has it.
        dtype: of hidden states; bfloat16 as uint16.

    Raises:
        CacheCorruptError: the bytes are damaged, or another sequence's.
    """
    try:
        if receipt.num_positions[row] != num_positions:
            raise ValueError(f"its receipt gives row {row} {receipt.num_positions[row]} positions, not {num_positions}")
        table = file.read_row_group(row, use_threads=False)
        table.validate()
        if not table.schema.equals(schema_of(receipt.kind)) or table.num_rows != 1:
            raise ValueError("its columns or rows are not those of the format")
        if table["sequence_id"][0].as_py() != sequence_id:
            raise ValueError(f"row {row} belongs to another sequence than its receipt says")
        if receipt.kind == "hidden":
            raw = table[HIDDEN_COLUMN][0].as_buffer()
            states: npt.NDArray[Any] = np.frombuffer(raw, dtype=dtype).reshape(num_positions, receipt.hidden_size)
            return states
        lists = [table[name][0].values.to_numpy() for name in ("counts", "token_ids", "logits")]
        logged = LoggedLogits(*lists)
        if len(logged.counts) != num_positions or not len(logged.token_ids) == len(logged.logits) == lists[0].sum():
            raise ValueError(f"row {row} has lists of the wrong length")
        return logged
    except (OSError, ValueError, LookupError, MemoryError, OverflowError, pa.ArrowException) as error:
        raise corrupt(path, str(error)) from error


def corrupt(path: Path, reason: str) -> CacheCorruptError:
    return CacheCorruptError(
        f"{path} is damaged: {reason}. Delete it together with its receipt {path.name.split('.')[0]}.json: a run with "
        f"--teacher asks again for what it held."
    )
