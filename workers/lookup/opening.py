"""Builds a run's ladders, one a cache, from what the caches hold and what the user gave."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cache_schema.errors import CacheCorruptError, StorageError
from cache_schema.lookups import LookupLog, LookupWriter, lookups_dir
from cache_schema.manifest import LM_HEAD_NAME
from cache_schema.reader import CacheReader
from cache_schema.storage import flush, sha256_of
from workers.device import resolve_device
from workers.errors import InputError
from workers.lookup.answers import AnswerLog
from workers.lookup.config import LookupConfig, OnMiss
from workers.lookup.ladder import Ladder
from workers.lookup.live import LiveTeacher, off_stored_logits
from workers.lookup.states import TeacherStates, from_bits
from workers.lookup.stored import stored_head
from workers.teacher.checkpoint import identity_of
from workers.teacher.lm_head import LMHead, load_head, save_head
from workers.teacher.transformers_teacher import TransformersTeacher

Source = Literal["hidden", "logged", "live", "bound", "cached"]
_CHECKED_SEQUENCES = 4
_FREE_MEMORY_SHARE = 4


@dataclass(frozen=True)
class Asked:
    """What a user gave for lookups that leave the stored top-k."""

    teacher: str | None
    on_miss: OnMiss
    lookups: LookupConfig


def open_log(reader: CacheReader, lookups: LookupConfig) -> LookupLog:
    """The log beside the cache, and the one in ``lookups.dir``.

    Raises:
        CacheCorruptError, CacheMismatchError: a receipt is damaged, or another cache's.
    """
    own = lookups_dir(reader)
    elsewhere = lookups_dir(reader, Path(lookups.dir)) if lookups.dir else own
    return LookupLog(reader, dict.fromkeys([elsewhere, own]))


def source_of_misses(reader: CacheReader, asked: Asked) -> Source:
    """The last tier a miss may come to, from files alone; ``cached`` means that nothing answers it."""
    if reader.has_hidden_states:
        return "hidden"
    log = open_log(reader, asked.lookups)
    if log.num_with_hidden_states == len(reader) and head_path(reader, log) is not None:
        return "logged"
    if asked.teacher is not None:
        return "live"
    return "bound" if asked.on_miss == "bound" else "cached"


def stored_ladder(reader: CacheReader, device: torch.device) -> Ladder:
    """A ladder over a cache with hidden states, and nothing else.

    Raises:
        CacheCorruptError: see ``stored_head``.
    """
    return Ladder(TeacherStates(reader, stored_head(reader, device)))


def ladder_of_whole_rows(reader: CacheReader, device: torch.device) -> Ladder | None:
    """A ladder that gives every row without a teacher: the cache or its log has all hidden states. None if neither."""
    asked = Asked(None, "refuse", LookupConfig())
    source = source_of_misses(reader, asked)
    if source == "hidden":
        return stored_ladder(reader, device)
    return _logged_ladder(reader, asked, device) if source == "logged" else None


def open_ladders(
    readers: Sequence[CacheReader], asked: Asked, device: torch.device, resources: ExitStack
) -> list[Ladder]:
    """A ladder for each cache; the teacher is loaded once, if any of them may need it.

    Args:
        device: the student's.
        resources: closed at the end of the run; lets go of the logs.

    Raises:
        CacheError, InputError: a head, log or teacher is damaged or does not fit; a log cannot be written.
    """
    sources = [source_of_misses(reader, asked) for reader in readers]
    # Before a model is loaded: what cannot be written shows at once.
    writers = [
        _writer(reader, asked.lookups, resources) if source == "live" else None
        for reader, source in zip(readers, sources, strict=True)
    ]
    teacher = _load_teacher(readers[sources.index("live")], asked, device) if "live" in sources else None
    ladders = []
    for reader, source, writer in zip(readers, sources, writers, strict=True):
        if source == "hidden":
            ladders.append(Ladder(TeacherStates(reader, stored_head(reader, _head_device(reader, asked, device)))))
        elif source == "live":
            assert teacher is not None
            ladders.append(_live_ladder(reader, asked, teacher, writer, device))
        else:
            ladders.append(_logged_ladder(reader, asked, device))
    return ladders


def _logged_ladder(reader: CacheReader, asked: Asked, device: torch.device) -> Ladder:
    """Whatever the log has, then the bound if it is allowed."""
    log = open_log(reader, asked.lookups)
    states, path = None, head_path(reader, log)
    if path is not None:
        head = load_head(path, _head_device(reader, asked, device))
        _require_head_of_log(reader, log, head, path)
        states = TeacherStates(reader, head, log=log)
    return Ladder(states, answers=AnswerLog(reader, log, None, 0), bound=asked.on_miss == "bound")


def _live_ladder(
    reader: CacheReader, asked: Asked, teacher: TransformersTeacher, writer: LookupWriter | None, device: torch.device
) -> Ladder:
    lookups, live = asked.lookups, LiveTeacher(reader, teacher)
    log = open_log(reader, lookups)
    keeps_answers = lookups.log == "logits"
    if writer is not None and not keeps_answers:
        writer.lm_head_sha256 = _published_head(reader, log, teacher.lm_head, writer)
    head = teacher.lm_head.to(_head_device(reader, asked, device))
    path = head_path(reader, log)
    if path is not None:
        _require_head_of_log(reader, log, head, path)
    states = TeacherStates(
        reader, head, log=log, live=live, writer=None if keeps_answers else writer, whole_steps=not keeps_answers
    )
    answers = AnswerLog(reader, log, writer if keeps_answers else None, lookups.fetch_ahead)
    return Ladder(states, answers=answers, bound=asked.on_miss == "bound")


def _writer(reader: CacheReader, lookups: LookupConfig, resources: ExitStack) -> LookupWriter | None:
    if lookups.log == "none":
        return None
    directory = lookups_dir(reader, Path(lookups.dir) if lookups.dir else None)
    try:
        writer = LookupWriter(directory, reader.manifest_sha256)
    except StorageError as error:
        raise InputError(
            f"{error} The live teacher's work is kept there: give --lookups DIR for another place, or --log none to "
            f"keep nothing."
        ) from error
    resources.callback(writer.close)
    return writer


def _load_teacher(reader: CacheReader, asked: Asked, device: torch.device) -> TransformersTeacher:
    assert asked.teacher is not None
    choice, plan = asked.lookups.teacher_device, reader.plan
    return TransformersTeacher(
        asked.teacher,
        identity_of(asked.teacher, plan.teacher.dtype),
        plan.engine,
        vocab_size=plan.tokenizer.vocab_size,
        device=device if choice in ("auto", "offload") else resolve_device(choice),
        offload=choice == "offload",
    )


def _head_device(reader: CacheReader, asked: Asked, device: torch.device) -> torch.device:
    choice = asked.lookups.head_device
    if choice != "auto":
        return resolve_device(choice)
    if device.type == "cuda" and reader.lm_head_path.exists():
        free, _ = torch.cuda.mem_get_info(device)
        if reader.lm_head_path.stat().st_size > free // _FREE_MEMORY_SHARE:
            return torch.device("cpu")
    return device


def head_path(reader: CacheReader, log: LookupLog) -> Path | None:
    """The head above a log's hidden states: the cache's own, where a dump with hidden states lost them later."""
    return reader.lm_head_path if reader.plan.hidden_states and reader.lm_head_path.exists() else log.lm_head_path


def _published_head(reader: CacheReader, log: LookupLog, head: LMHead, writer: LookupWriter) -> str:
    """Hash of the head beside the log, which is written if there is none."""
    path = head_path(reader, log)
    if path is None:
        # Made in the writer's own directory, where a compaction finds what a killed run leaves half-written.
        path, made = writer.directory.parent / LM_HEAD_NAME, writer.directory / LM_HEAD_NAME
        save_head(head, made)
        made.replace(path)
        flush(path.parent)
    return sha256_of(path)


def _require_head_of_log(reader: CacheReader, log: LookupLog, head: LMHead, path: Path) -> None:
    """Refuse a head that is not the one the log was written with, by its hash and by what it makes of a few states."""
    hidden = [receipt for receipt in log.files().values() if receipt.kind == "hidden"]
    if any(receipt.lm_head_sha256 != sha256_of(path) for receipt in hidden[:1]):
        raise CacheCorruptError(
            f"{path} is not the head that the log was written with: delete it, and a run with --teacher writes it "
            f"again; or delete the log."
        )
    logged = [index for receipt in hidden for index in receipt.indexes]
    for place in np.unique(np.linspace(0, len(logged) - 1, min(_CHECKED_SEQUENCES, len(logged)), dtype=int)).tolist():
        states = log.hidden_states(logged[place])
        if states is not None:
            hidden_PD = from_bits(states, reader.plan.teacher.dtype)
            difference, tolerance = off_stored_logits(reader, logged[place], hidden_PD, head)
            if not difference <= tolerance:
                raise CacheCorruptError(
                    f"{path} does not belong to the log beside it: recomputed logits of sequence {logged[place]} "
                    f"differ from the stored ones by {difference:.3g} (rounding explains {tolerance:.2g}). Delete the "
                    f"log; a run with --teacher writes it again."
                )
