"""What stands in ``plan.json``, ``shard-NNNNN.json`` and ``manifest.json``.

The plan says what a cache is of; it is written first and every worker must bring the same. A receipt says what
one shard holds; it is written after the shard's files. The manifest is the plan and all receipts; it is written
last, so a cache is finished exactly when it exists. No clock, host, worker or output path stands in any of them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from cache_schema.errors import CacheCorruptError, CacheIncompleteError
from cache_schema.plan import FORMAT_VERSION, READ_FROM_FILE, Plan, Stored
from cache_schema.storage import publish_first, publish_text, unreadable

PLAN_NAME = "plan.json"
MANIFEST_NAME = "manifest.json"
LM_HEAD_NAME = "lm_head.safetensors"
TOKENIZER_NAME = "tokenizer"


class StoredFile(Stored):
    name: str = Field(pattern=r"^(tokenizer/([A-Za-z0-9_][A-Za-z0-9_.-]*/)*)?[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """Relative to the cache directory, which no name can leave; only the tokenizer has folders."""
    num_bytes: int
    sha256: str


class Receipt(Stored):
    shard: int
    num_sequences: int
    num_tokens: int
    num_positions: int
    logits_bytes: int
    """Compressed bytes of the id and logit columns."""
    scalar_bytes: int
    """Compressed bytes of the per-position scalars: tails, label logit, row mean and deviation."""
    files: tuple[StoredFile, ...]


class Manifest(Stored):
    plan: Plan
    receipts: tuple[Receipt, ...]
    files: tuple[StoredFile, ...]
    """The tokenizer's files and, with hidden states, the LM head."""

    @property
    def num_tokens(self) -> int:
        return sum(receipt.num_tokens for receipt in self.receipts)

    @property
    def num_positions(self) -> int:
        return sum(receipt.num_positions for receipt in self.receipts)

    @property
    def all_files(self) -> list[StoredFile]:
        return [*self.files, *(file for receipt in self.receipts for file in receipt.files)]


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


def hidden_name(shard: int) -> str:
    return f"shard-{shard:05d}.hidden.parquet"


def receipt_name(shard: int) -> str:
    return f"shard-{shard:05d}.json"


StoredModel = TypeVar("StoredModel", bound=Stored)


def write_json(path: Path, model: Stored) -> None:
    publish_text(path, _to_json(model))


def write_json_first(path: Path, model: Stored) -> None:
    """The same, unless the file is there by then."""
    publish_first(path, _to_json(model))


def _to_json(model: Stored) -> str:
    return model.model_dump_json(indent=2) + "\n"


def read_json(path: Path, model: type[StoredModel]) -> StoredModel:
    """Parse a stored document.

    Raises:
        FileNotFoundError: no such file.
        CacheCorruptError: not JSON, not this model, or of another format version.
    """
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        document: Any = json.loads(raw)
        _check_version(path, document)
        return model.model_validate(document, context=READ_FROM_FILE)
    except (ValueError, RecursionError) as error:  # pydantic, json and Unicode errors are ValueErrors
        reason = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in reason["loc"]) or "the document"
        raise CacheCorruptError(
            f"{path} is damaged: {where}: {reason['msg']}. Restore the file, or delete the directory and dump again."
        ) from None


def read_manifest(cache_dir: Path) -> Manifest:
    """Read what makes a directory a finished cache.

    Raises:
        CacheIncompleteError: no cache there, or its dump has not finished.
        CacheCorruptError: the manifest is damaged or of another format version.
    """
    path = cache_dir / MANIFEST_NAME
    try:
        return read_json(path, Manifest)
    except FileNotFoundError:
        if not cache_dir.is_dir():
            raise CacheIncompleteError(f"{cache_dir} is not a directory: give the --out of a teacher-dump.") from None
        if (cache_dir / PLAN_NAME).exists():
            raise CacheIncompleteError(
                f"{cache_dir} has no {MANIFEST_NAME}: the dump has not finished. Run `pipeline teacher-dump` again "
                f"with the same options; finished shards are kept."
            ) from None
        raise CacheIncompleteError(f"{cache_dir} holds no cache: there is neither plan nor manifest in it.") from None


def manifest_sha256(cache_dir: Path) -> str:
    """The identity a run records: hash of the manifest's bytes, and through its receipts of every byte stored."""
    return hashlib.sha256((cache_dir / MANIFEST_NAME).read_bytes()).hexdigest()


def _check_version(path: Path, document: Any) -> None:
    plan = document.get("plan", document) if isinstance(document, dict) else {}
    version = plan.get("format_version", FORMAT_VERSION) if isinstance(plan, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise CacheCorruptError(
            f"{path} is of format version {version}, this program reads version {FORMAT_VERSION}: install the "
            f"logit-cache release that wrote it, or dump again."
        )
