"""Rows of a data set, one after another, from wherever the user keeps them.

JSON Lines and Parquet are read here, straight from the file as it is now; ``datasets`` reads what only it knows: its
own saved folders and the names on the hub.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from workers.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

KNOWN_COLUMNS = ("messages", "prompt", "response", "text")
"""The only columns read, unless a data set has none of them."""

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz")
FILE_SUFFIXES = (*JSON_SUFFIXES, ".parquet")

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_ROWS_PER_READ = 1000


@dataclass(frozen=True)
class Row:
    """One row and where the user finds it."""

    where: str
    """For errors: ``row 3 of train.jsonl``, counted from 1; in JSON Lines the line number."""
    values: dict[str, Any]


@dataclass(frozen=True)
class RowSource:
    """The rows of a data set, to be read once."""

    name: str
    """The file's or folder's own name, or the name on the hub; never a path."""
    num_rows: int
    rows: Iterator[Row]


def open_rows(data: str, split: str | None) -> RowSource:
    """Open a JSONL or Parquet file, a folder or glob of those, a ``save_to_disk`` folder or a data set on the hub.

    ``split`` chooses among the splits of the last two, ``train`` if None. Raises InputError, then or while the rows
    are read, with the file and line of what cannot be read.
    """
    path = Path(data)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved_rows(path, split)
    if not path.exists() and not _is_glob(data):
        if _HUB_NAME.fullmatch(data) and not data.endswith(FILE_SUFFIXES):
            return _hub_rows(data, split)
        raise InputError(f"no file, saved data set folder or data set called {data}: check the path")
    if split is not None:
        raise InputError(f"{data} is read as files, which have no splits: leave out split={split}")
    files = _data_files(path)
    return RowSource(
        name=path.name,
        num_rows=sum(_count_rows(file) for file in files),
        rows=(row for file in files for row in _file_rows(file)),
    )


def _is_glob(data: str) -> bool:
    return any(character in data for character in "*?[")


def _data_files(path: Path) -> list[Path]:
    """Return the files meant, sorted by path, so that their order never depends on the file system."""
    if path.is_file():
        if not path.name.endswith(FILE_SUFFIXES):
            raise InputError(f"{path} is not a data file: its name must end in {', '.join(FILE_SUFFIXES)}")
        return [path]
    candidates = path.iterdir() if path.is_dir() else Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    files = sorted(file for file in candidates if file.is_file() and file.name.endswith(FILE_SUFFIXES))
    if not files:
        raise InputError(f"{path} has no data file: none ends in {', '.join(FILE_SUFFIXES)}")
    return files


def _count_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        with _parquet_file(path) as file:
            return cast(int, file.metadata.num_rows)
    with _json_file(path) as stream:
        if _is_array(stream):
            return len(_array(path, stream))
        return sum(1 for line in stream if line.strip())


def _file_rows(path: Path) -> Iterator[Row]:
    rows = _parquet_values(path) if path.suffix == ".parquet" else _json_values(path)
    for number, values in rows:
        if not isinstance(values, dict):
            raise InputError(f"row {number} of {path} is not a JSON object: write one object with named columns a line")
        yield Row(f"row {number} of {path.name}", values)


# ---- JSON ----


@contextmanager
def _json_file(path: Path) -> Iterator[BinaryIO]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield cast(BinaryIO, stream)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}): compress it again") from error


def _is_array(stream: BinaryIO) -> bool:
    """Say whether the whole file is one JSON array rather than an object a line; the stream stays at its start."""
    start = stream.readline()
    while start and not start.strip():
        start = stream.readline()
    stream.seek(0)
    return start.lstrip().startswith(b"[")


def _array(path: Path, stream: BinaryIO) -> list[Any]:
    return cast(list[Any], _parsed(stream.read(), path, first_line=1))


def _json_values(path: Path) -> Iterator[tuple[int, Any]]:
    with _json_file(path) as stream:
        if _is_array(stream):
            yield from enumerate(_array(path, stream), start=1)
            return
        # Bytes are split at "\n" alone; text would also be split at U+2028, which JSON allows inside a string.
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, _parsed(line.rstrip(), path, first_line=number)


def _parsed(content: bytes, path: Path, *, first_line: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}, line {line} is not JSON ({error.msg}): correct or remove the line") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {first_line} is not UTF-8 ({error.reason}): save the file as UTF-8") from None


# ---- Parquet ----


@contextmanager
def _parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a readable Parquet file ({error}): write it again") from error


def _parquet_values(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    with _parquet_file(path) as file:
        columns = _columns_to_read(file.schema_arrow.names)
        for batch in file.iter_batches(_ROWS_PER_READ, columns=columns):
            for values in batch.to_pylist():
                number += 1
                yield number, values


def _columns_to_read(columns: list[str]) -> list[str]:
    """Return the known ones of ``columns``; without a single one, all of them, so that an error can list them."""
    return [column for column in columns if column in KNOWN_COLUMNS] or columns


# ---- datasets ----


def _saved_rows(path: Path, split: str | None) -> RowSource:
    from datasets import DatasetDict, load_from_disk

    try:
        with _quiet_datasets():
            saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the data set saved in {path} cannot be read ({error}): save it again") from error
    if isinstance(saved, DatasetDict):
        chosen = split or "train"
        if chosen not in saved:
            raise InputError(f"{path} has no split {chosen}: choose one of {', '.join(saved)}")
        return _dataset_rows(saved[chosen], path.name)
    if split is not None:
        raise InputError(f"{path} holds one data set without splits: leave out split={split}")
    return _dataset_rows(saved, path.name)


def _hub_rows(name: str, split: str | None) -> RowSource:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with _quiet_datasets():
            dataset = load_dataset(name, split=split or "train")
    except OSError as error:
        raise InputError(
            f"no file, saved data set folder or data set called {name} ({error}): check the path, or the connection "
            "if it is a name on the hub"
        ) from error
    except (ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(f"the data set {name} cannot be loaded: {error}") from error
    return _dataset_rows(dataset, name)


def _dataset_rows(dataset: "Dataset", name: str) -> RowSource:
    plain = dataset.with_format(None).select_columns(_columns_to_read(dataset.column_names))
    rows = (Row(f"row {number} of {name}", values) for number, values in enumerate(plain, start=1))
    return RowSource(name, len(plain), rows)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep the progress bars of ``datasets`` off standard error meanwhile: that is where ours is drawn."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
