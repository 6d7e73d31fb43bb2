"""Builds a run's ladders, one a cache, from what the caches hold and what the user gave."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cache_schema.errors import StorageError
from cache_schema.lookups import LookupLog, LookupWriter, lookups_dir
from cache_schema.reader import CacheReader
from workers.device import resolve_device
from workers.errors import InputError
from workers.lookup.answers import AnswerLog
from workers.lookup.config import LookupConfig, OnMiss
from workers.lookup.heads import head_device, logged_head, publish_head
from workers.lookup.ladder import Ladder
from workers.lookup.live import LiveTeacher
from workers.lookup.states import TeacherStates
from workers.lookup.stored import stored_head
from workers.teacher.checkpoint import identity_of
from workers.teacher.transformers_teacher import TransformersTeacher

Source = Literal["hidden", "logged", "live", "bound", "cached"]


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
    if log.num_with_hidden_states == len(reader) and log.lm_head_path is not None:
        return "logged"
    if asked.teacher is not None:
        return "live"
    return "bound" if asked.on_miss == "bound" else "cached"


def stored_ladder(reader: CacheReader, device: torch.device) -> Ladder:
    """A ladder over a cache with hidden states, and nothing else; ``device`` is the head's.

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
            num_bytes = reader.lm_head_path.stat().st_size
            ladders.append(stored_ladder(reader, head_device(asked.lookups.head_device, device, num_bytes)))
        elif source == "live":
            assert teacher is not None
            ladders.append(_live_ladder(reader, asked, teacher, writer, device))
        else:
            ladders.append(_logged_ladder(reader, asked, device))
    return ladders


def _logged_ladder(reader: CacheReader, asked: Asked, device: torch.device) -> Ladder:
    """Whatever the log has, then the bound if it is allowed."""
    log = open_log(reader, asked.lookups)
    head = logged_head(reader, log, asked.lookups.head_device, device)
    states = None if head is None else TeacherStates(reader, head, log=log)
    return Ladder(states, answers=AnswerLog(reader, log, None, 0), bound=asked.on_miss == "bound")


def _live_ladder(
    reader: CacheReader, asked: Asked, teacher: TransformersTeacher, writer: LookupWriter | None, device: torch.device
) -> Ladder:
    lookups, log = asked.lookups, open_log(reader, asked.lookups)
    live = LiveTeacher(reader, teacher, lookups.tokens_per_batch)
    weight_VD = teacher.lm_head.weight_VD
    head = teacher.lm_head.to(head_device(lookups.head_device, device, weight_VD.numel() * weight_VD.element_size()))
    keeps_answers = lookups.log == "logits"
    if writer is not None and not keeps_answers:
        writer.lm_head_sha256 = publish_head(reader, teacher.lm_head, writer)
    if log.lm_head_hashes:
        logged_head(reader, log, "cpu", device)  # what is in the log is this teacher's
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
