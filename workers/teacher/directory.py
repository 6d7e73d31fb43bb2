"""A cache directory on its way to being finished: which plan it follows, which shards it has."""

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cache_schema.errors import CacheCorruptError, CacheMismatchError, StorageError
from cache_schema.lease_files import LEASES_NAME, leases_in
from cache_schema.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, Receipt, read_json, read_manifest, receipt_name
from cache_schema.plan import Plan, require_same_plan
from cache_schema.storage import discard_leftovers_in, is_leftover

_RECEIPT = re.compile(r"shard-(\d{5,})\.json")


def stored_plan(cache_dir: Path, plan: Plan) -> Plan | None:
    """The plan the directory was begun with, if it was; the given one may differ in what the first worker settled.

    That is the teacher's name, the scales of int8 hidden states and the CPU threads.

    Raises:
        CacheMismatchError: the directory belongs to another dump, or holds something else.
    """
    try:
        stored = read_json(cache_dir / PLAN_NAME, Plan)
    except (FileNotFoundError, NotADirectoryError):
        if cache_dir.exists() and (not cache_dir.is_dir() or any(_foreign(cache_dir))):
            if (cache_dir / PLAN_NAME).exists():  # another worker has begun the dump meanwhile
                return stored_plan(cache_dir, plan)
            raise CacheMismatchError(f"{cache_dir} exists and holds no cache: give --out a new directory.") from None
        return None
    require_same_plan(cache_dir, stored, _settled_as(stored, plan))
    return stored


def _settled_as(stored: Plan, plan: Plan) -> Plan:
    update: dict[str, object] = {}
    hidden, threads = plan.hidden_states, stored.engine.num_threads
    if hidden and not hidden.is_measured and stored.hidden_states and stored.hidden_states.dtype == "int8":
        update["hidden_states"] = stored.hidden_states
    if threads and plan.engine.num_threads:
        update["engine"] = plan.engine.model_copy(update={"num_threads": threads})
    return plan.model_copy(update=update)


def _foreign(cache_dir: Path) -> Iterator[Path]:
    """What does not look like the leftovers of a dump killed before its plan was written."""
    return (path for path in cache_dir.iterdir() if not is_leftover(path) and path.name != LEASES_NAME)


def finished_manifest(cache_dir: Path) -> Manifest | None:
    """The manifest, if the dump has already been committed."""
    return read_manifest(cache_dir) if (cache_dir / MANIFEST_NAME).exists() else None


def remaining_shards(cache_dir: Path, plan: Plan) -> list[int]:
    """The shards that still have to be scored; all of them where nothing was begun. Writes nothing.

    Raises:
        CacheMismatchError: see ``stored_plan``.
        CacheCorruptError: a file is gone whose receipt or manifest says it was written.
    """
    if stored_plan(cache_dir, plan) is None:
        return list(range(plan.num_shards))
    if (cache_dir / MANIFEST_NAME).exists():
        _require_files(cache_dir)
        return []
    return [shard for shard in range(plan.num_shards) if not _is_finished(cache_dir, shard)]


def shards_with_receipt(cache_dir: Path) -> set[int]:
    """The shards that some worker has finished, by a look at the directory alone.

    Raises:
        CacheCorruptError: the plan is gone, and perhaps the whole directory.
    """
    try:
        names = {path.name for path in cache_dir.iterdir()}
    except FileNotFoundError:
        names = set()
    if PLAN_NAME not in names:
        raise gone(cache_dir / PLAN_NAME)
    return {int(match[1]) for match in map(_RECEIPT.fullmatch, names) if match}


def gone(path: Path) -> CacheCorruptError:
    """A file that this dump wrote or saw, and that is not there any more."""
    return CacheCorruptError(
        f"{path} is gone: the directory was changed while it was dumped into. Restore it, or give another --out."
    )


def tidy(cache_dir: Path) -> None:
    """Remove what workers killed late left in a finished cache; one that cannot be written stays as it is."""
    with suppress(StorageError):
        discard_leftovers_in(cache_dir)
        if all(lease.is_dead for lease in leases_in(cache_dir / LEASES_NAME)):
            shutil.rmtree(cache_dir / LEASES_NAME, ignore_errors=True)


def _require_files(cache_dir: Path) -> None:
    """Refuse to call a cache finished whose files are not there; its hidden states may have been deleted."""
    for file in read_manifest(cache_dir).all_files:
        path = cache_dir / file.name
        if ".hidden." not in file.name and (not path.exists() or path.stat().st_size != file.num_bytes):
            raise CacheCorruptError(
                f"{path} is missing or short, but {MANIFEST_NAME} says the dump was finished: restore it, or delete "
                f"{cache_dir / MANIFEST_NAME} and the shard's receipt and run the dump again, which makes it anew."
            )


def _is_finished(cache_dir: Path, shard: int) -> bool:
    """A receipt says so, provided its files are there: a receipt without them is an error, not a reason to rescore."""
    try:
        receipt = read_json(cache_dir / receipt_name(shard), Receipt)
    except FileNotFoundError:
        return False
    for file in receipt.files:
        path = cache_dir / file.name
        if not path.exists() or path.stat().st_size != file.num_bytes:
            raise CacheCorruptError(
                f"{path} is missing or short, but {receipt_name(shard)} says it was finished: delete "
                f"{cache_dir / receipt_name(shard)} and run the dump again to score that shard anew."
            )
    return True
