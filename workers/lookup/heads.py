"""The LM head above hidden states that a live teacher gave: where it answers, where it is kept, that it is the one."""

import numpy as np
import torch

from cache_schema.errors import CacheCorruptError
from cache_schema.lookup_writer import LookupWriter
from cache_schema.lookups import LookupLog
from cache_schema.manifest import LM_HEAD_NAME
from cache_schema.reader import CacheReader
from cache_schema.storage import flush, refused, sha256_of
from workers.device import resolve_device
from workers.lookup.live import fault_in_states
from workers.lookup.states import from_bits
from workers.teacher.lm_head import LMHead, load_head, save_head

_CHECKED_SEQUENCES = 4
_FREE_MEMORY_SHARE = 4


def head_device(choice: str, device: torch.device, num_bytes: int) -> torch.device:
    """Where a head of so many bytes answers a student on ``device``; see ``LookupConfig.head_device``."""
    if choice != "auto":
        return resolve_device(choice, "--head-device")
    if device.type == "cuda" and num_bytes > torch.cuda.mem_get_info(device)[0] // _FREE_MEMORY_SHARE:
        return torch.device("cpu")
    return device


def publish_head(reader: CacheReader, log: LookupLog, head: LMHead, writer: LookupWriter) -> str:
    """Hash of the head that ``writer``'s hidden states belong to; written beside its log unless the cache has it.

    One that is there and is not what the log was written with is written again.
    """
    if reader.plan.hidden_states and reader.lm_head_path.exists():
        return sha256_of(reader.lm_head_path)
    path = writer.directory.parent / LM_HEAD_NAME
    if path.exists() and log.lm_head_sha256 is not None and sha256_of(path) == log.lm_head_sha256:
        return log.lm_head_sha256
    # Made in the writer's own directory, where a compaction finds what a killed run leaves half-written.
    made = writer.directory / LM_HEAD_NAME
    save_head(head, made)
    try:
        made.replace(path)
        flush(path.parent)
    except OSError as error:
        raise refused(path, error) from error
    return sha256_of(path)


def logged_head(reader: CacheReader, log: LookupLog, choice: str, device: torch.device) -> LMHead | None:
    """The head above the log's hidden states; None where the log has none.

    Raises:
        CacheCorruptError: the log has hidden states but no head, or another one; names the file and the way out.
    """
    log.require_one_head()
    if log.lm_head_sha256 is None:
        return None
    path = log.lm_head_path
    if path is None:
        raise head_is_gone(log)
    if sha256_of(path) != log.lm_head_sha256:
        raise CacheCorruptError(
            f"{path} is not the head that the log was written with: its SHA-256 differs. Restore it, or delete it and "
            f"give --teacher once, which writes it again."
        )
    head = load_head(path, head_device(choice, device, path.stat().st_size))
    require_head_of_log(reader, log, head)
    return head


def head_is_gone(log: LookupLog) -> CacheCorruptError:
    return CacheCorruptError(
        f"{log.directories[0] / LM_HEAD_NAME} is gone, and the log beside it holds hidden states of "
        f"{log.num_with_hidden_states} sequences: restore it, or give --teacher once, which writes it again."
    )


def require_head_of_log(reader: CacheReader, log: LookupLog, head: LMHead) -> None:
    """Refuse a head that does not make what the cache holds of a few of the log's hidden states.

    Raises:
        CacheCorruptError: says what to delete.
    """
    logged = [index for receipt in log.files().values() if receipt.kind == "hidden" for index in receipt.indexes]
    for place in np.unique(np.linspace(0, len(logged) - 1, min(_CHECKED_SEQUENCES, len(logged)), dtype=int)).tolist():
        states = log.hidden_states(logged[place])
        if states is None:  # folded this instant into a file that was not looked at
            continue
        hidden_PD = from_bits(states, reader.plan.teacher.dtype)
        fault = fault_in_states(reader, logged[place], hidden_PD, head)
        if fault:
            raise CacheCorruptError(
                f"{log.lm_head_path} does not belong to the log beside it: in sequence {logged[place]}, {fault}. "
                f"Delete the log: runs with --teacher write it again."
            )
