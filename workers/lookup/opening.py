"""Builds a run's ladders, one a cache, from what the caches hold and what the user gave."""

import errno
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cache_schema.errors import StorageError
from cache_schema.lookup_files import Kind, LogRow, LookupReceipt
from cache_schema.lookup_writer import LookupWriter, lookups_dir, machine_mark
from cache_schema.lookups import LookupLog
from cache_schema.reader import CacheReader
from cache_schema.storage import refused
from workers.device import resolve_device
from workers.errors import InputError
from workers.lookup.answers import AnswerLog
from workers.lookup.config import LookupConfig, OnMiss
from workers.lookup.heads import head_device, head_is_gone, logged_head, publish_head, require_head_of_log
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
    if log.num_with_hidden_states == len(reader):
        if log.lm_head_path is not None:
            return "logged"
        if asked.teacher is None:
            raise head_is_gone(log)
    if asked.teacher is not None:
        return "live"
    return "bound" if asked.on_miss == "bound" else "cached"


def require_ways(readers: Sequence[CacheReader], asked: Asked) -> None:
    """Refuse, before a model is loaded, devices that are not here and a log that could not be written.

    Raises:
        InputError: names the option, and what to give.
    """
    lookups = asked.lookups
    if lookups.head_device != "auto":
        resolve_device(lookups.head_device, "--head-device")
    if lookups.teacher_device not in ("auto", "offload"):
        resolve_device(lookups.teacher_device, "--teacher-device")
    for reader in readers:
        if lookups.log != "none" and source_of_misses(reader, asked) == "live":
            _require_writable(_written_dir(reader, lookups))


def stands_in_the_way(log_dir: Path) -> Path | None:
    """What is no directory where the log, or one it lies in, should be: a file or a dangling link."""
    place = _lowest_that_stands(log_dir)
    return None if place.is_dir() else place


def stored_ladder(reader: CacheReader, device: torch.device) -> Ladder:
    """A ladder over a cache with hidden states, and nothing else; ``device`` is the head's.

    Raises:
        CacheCorruptError: see ``stored_head``.
    """
    return Ladder(TeacherStates(reader, stored_head(reader, device)))


def ladder_of_whole_rows(reader: CacheReader, device: torch.device, lookups_dir: str | None = None) -> Ladder | None:
    """A ladder that gives every row without a teacher: the cache or its log has all hidden states. None if neither.

    Args:
        lookups_dir: as ``LookupConfig.dir``; a log inside the cache is read too.

    Raises:
        CacheError: the head is damaged or, where the cache has no hidden states, the log is.
    """
    asked = Asked(None, "refuse", LookupConfig(dir=lookups_dir))
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
        with _ways_out():
            writer.lm_head_sha256 = publish_head(reader, log, teacher.lm_head, writer)
    log.require_one_head()
    require_head_of_log(reader, log, head)
    states = TeacherStates(
        reader, head, log=log, live=live, writer=None if keeps_answers else writer, whole_steps=not keeps_answers
    )
    answers = AnswerLog(reader, log, writer if keeps_answers else None, lookups.fetch_ahead)
    return Ladder(states, answers=answers, bound=asked.on_miss == "bound")


def _writer(reader: CacheReader, lookups: LookupConfig, resources: ExitStack) -> LookupWriter | None:
    if lookups.log == "none":
        return None
    try:
        writer = _RunsWriter(_written_dir(reader, lookups), reader.manifest_sha256)
    except StorageError as error:
        raise _no_log(error) from error
    resources.callback(writer.close)
    return writer


class _RunsWriter(LookupWriter):
    """Says, where the disk refuses amid a run, how that run can go on."""

    def write(self, kind: Kind, rows: Iterable[LogRow]) -> LookupReceipt:
        with _ways_out():
            return super().write(kind, rows)


@contextmanager
def _ways_out() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise StorageError(
            f"{error} It is the lookup log: the run also goes on with --resume and --lookups DIR, which keeps the live "
            f"teacher's work in another place, or with --resume and --log none, which keeps no more of it."
        ) from error


def _written_dir(reader: CacheReader, lookups: LookupConfig) -> Path:
    return lookups_dir(reader, Path(lookups.dir) if lookups.dir else None)


def _require_writable(log_dir: Path) -> None:
    """Make a directory where a writer's would be, or the first that would hold it, and remove it."""
    place = _lowest_that_stands(log_dir)
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        probe = place / f"{machine_mark()}{secrets.token_hex(6)}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise _no_log(refused(log_dir, error)) from error


def _lowest_that_stands(path: Path) -> Path:
    """The path, or the first of those above it that there is."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place) or place == place.parent)


def _no_log(error: StorageError) -> InputError:
    return InputError(
        f"{error} The live teacher's work is kept there: give --lookups DIR for another place, or --log none to keep "
        f"nothing."
    )


def _load_teacher(reader: CacheReader, asked: Asked, device: torch.device) -> TransformersTeacher:
    assert asked.teacher is not None
    choice, plan = asked.lookups.teacher_device, reader.plan
    if plan.engine.quantization:
        raise InputError(
            f"{reader.cache_dir} was dumped from weights that vLLM made {plan.engine.quantization} of while it loaded "
            f"them, and no live teacher here does that: dump with hidden states, or give --on-miss bound."
        )
    return TransformersTeacher(
        asked.teacher,
        identity_of(asked.teacher, plan.teacher.dtype),
        plan.engine,
        vocab_size=plan.tokenizer.vocab_size,
        device=device if choice in ("auto", "offload") else resolve_device(choice, "--teacher-device"),
        offload=choice == "offload",
    )
