"""Runs the teacher once over a data set, shard by shard, in one worker or in many that share the directory.

Any worker may take any shard and any may commit. The batches of a shard depend on the shard alone, and a shard's
receipt is written after its files: however many workers there are and whenever they die, the bytes are the same.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from cache_schema.errors import StorageError
from cache_schema.lease_files import LEASES_NAME
from cache_schema.leases import DEFAULT_SECONDS, Lease, Leases
from cache_schema.manifest import (
    LM_HEAD_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    TOKENIZER_NAME,
    Manifest,
    Receipt,
    StoredFile,
    hidden_name,
    read_json,
    read_manifest,
    receipt_name,
    shard_name,
    write_json_first,
)
from cache_schema.plan import Generation, Plan
from cache_schema.sequence import TokenSequence
from cache_schema.storage import discard_leftovers, discard_leftovers_in, publish_directory
from cache_schema.writer import stored_file
from workers.teacher.background import BackgroundWriter
from workers.teacher.batches import RowsBatch, ScoredBatch, batches, score_batch
from workers.teacher.directory import (
    finished_manifest,
    gone,
    remaining_shards,
    shards_with_receipt,
    stored_plan,
    tidy,
)
from workers.teacher.int8 import measure_int8
from workers.teacher.lm_head import save_head
from workers.teacher.teacher import ScoringTeacher, Teacher


@dataclass(frozen=True)
class Worker:
    """One of several processes that dump into one directory; each prefers shards of its own and takes any."""

    index: int = 0
    count: int = 1
    lease_seconds: float = DEFAULT_SECONDS
    """After so long without a sign of life, others take over its shards."""


@dataclass(frozen=True)
class Progress:
    """How far a dump is, by all its workers together."""

    done: int = 0
    """Sequences scored; where the teacher responds, every sequence counts twice: once answered, once scored."""
    total: int = 0
    shards: int = 0
    num_shards: int = 0
    sequences: int = 0
    """Scored by this worker."""
    tokens: int = 0
    """Those of them."""


Report = Callable[[Progress], None]
Result = TypeVar("Result")


def dump(
    cache_dir: Path,
    plan: Plan,
    sequences: Sequence[TokenSequence],
    teacher: Teacher | ScoringTeacher,
    tokenizer: Any,
    report: Report | None = None,
    worker: Worker | None = None,
) -> Manifest:
    """Write the plan, tokenizer and LM head, score every shard nobody else is at, and return when all are committed.

    A directory that another dump began keeps its plan, see ``stored_plan``. A plan of int8 hidden states may come
    without their scales, which are measured before it is written.

    Args:
        sequences: in data set order; prompts alone where the plan lets the teacher respond.
        teacher: one that scores where the plan has ``logits_alone``.
        report: called after every batch; finished shards count as done.

    Raises:
        CacheError: the directory is another dump's or is damaged, or cannot be written.
        InputError: a hidden state is not finite.
    """
    worker = worker or Worker()
    remaining_shards(cache_dir, plan)  # refuses what cannot be gone on with
    finished = finished_manifest(cache_dir)
    if finished is not None:
        tidy(cache_dir)
        return finished
    with Leases(cache_dir / LEASES_NAME, f"{worker.index}/{worker.count}", worker.lease_seconds) as leases:
        plan = _in_turn(leases, "plan", lambda: _begin(cache_dir, plan, sequences, teacher, tokenizer))
        with _threads(plan.engine.num_threads), BackgroundWriter(cache_dir, plan) as writer:
            _Scoring(cache_dir, plan, sequences, teacher, leases, writer, report).run(worker)
        # A worker that wakes when all is done makes no lease anew.
        return finished_manifest(cache_dir) or _in_turn(
            leases, "manifest", lambda: finished_manifest(cache_dir) or _commit(cache_dir, leases)
        )


def _in_turn(leases: Leases, name: str, work: Callable[[], Result]) -> Result:
    """What one worker does at a time; one that was paused and taken over meanwhile takes another turn."""
    while True:
        lease = leases.wait_for(name)
        try:
            return work()
        except StorageError:
            if not lease.is_lost():
                raise
        finally:
            lease.release()


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """The plan's CPU threads, which decide the order of float32 sums; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(
    cache_dir: Path,
    plan: Plan,
    sequences: Sequence[TokenSequence],
    teacher: Teacher | ScoringTeacher,
    tokenizer: Any,
) -> Plan:
    """Write what comes before the shards, unless it is there: what cannot be stored shows now, not in the end."""
    for name in (PLAN_NAME, LM_HEAD_NAME, TOKENIZER_NAME):
        discard_leftovers(cache_dir / name)
    stored = stored_plan(cache_dir, plan)
    if stored is None:
        if plan.hidden_states and not plan.hidden_states.is_measured:
            assert not isinstance(teacher, ScoringTeacher)
            plan = plan.model_copy(update={"hidden_states": measure_int8(plan, sequences, teacher)})
        # A worker that was paused meanwhile finds another one's, and follows it.
        write_json_first(cache_dir / PLAN_NAME, plan)
        stored = stored_plan(cache_dir, plan)
        assert stored is not None
    if plan.hidden_states and not (cache_dir / LM_HEAD_NAME).exists():
        assert not isinstance(teacher, ScoringTeacher)
        save_head(teacher.lm_head, cache_dir / LM_HEAD_NAME)
    if not (cache_dir / TOKENIZER_NAME).exists():
        with publish_directory(cache_dir / TOKENIZER_NAME) as temporary:
            tokenizer.save_pretrained(temporary)
    return stored


class _Scoring:
    """One worker's way through the shards."""

    def __init__(
        self,
        cache_dir: Path,
        plan: Plan,
        sequences: Sequence[TokenSequence],
        teacher: Teacher | ScoringTeacher,
        leases: Leases,
        writer: BackgroundWriter,
        report: Report | None,
    ) -> None:
        self._cache_dir = cache_dir
        self._plan = plan
        self._sequences = sequences
        self._teacher = teacher
        self._leases = leases
        self._writer = writer
        self._report = report
        self._steps = 2 if plan.responses else 1
        self._shown = Progress(total=self._steps * plan.num_sequences, num_shards=plan.num_shards)
        self._mine: dict[int, int] = {}
        """Steps done of each shard scored here: its receipt is written a little later."""

    def run(self, worker: Worker) -> None:
        order = sorted(range(self._plan.num_shards), key=lambda shard: ((shard - worker.index) % worker.count, shard))
        while True:
            finished = self._look()
            left = [shard for shard in order if shard not in finished]
            if not left:
                return
            lease = self._leases.claim(map(_lease_name, left))
            if lease is not None:
                self._score_unless_finished(int(lease.name.removeprefix("shard-")), lease)
            elif self._writer.is_idle:
                time.sleep(self._leases.poll_seconds)  # others are at the rest, and may die
            else:
                self._writer.drain()

    def _score_unless_finished(self, shard: int, lease: Lease) -> None:
        if (self._cache_dir / receipt_name(shard)).exists():
            lease.release()
            return
        for name in (shard_name(shard), hidden_name(shard), receipt_name(shard)):
            discard_leftovers(self._cache_dir / name)
        self._mine[shard] = 0
        with self._writer.shard(shard, lease) as put:
            for batch in self._score(shard, lease):
                put(batch)
                num_tokens = sum(sequence.num_tokens for sequence in batch.sequences)
                self._leases.note(sequences=len(batch.sequences), tokens=num_tokens)
                self._advance(shard, len(batch.sequences), scored_tokens=num_tokens)

    def _score(self, shard: int, lease: Lease) -> Iterator[ScoredBatch | RowsBatch]:
        """Score a shard batch by batch, and stop where its lease is lost: then it is another worker's."""
        plan, teacher = self._plan, self._teacher
        members = [self._sequences[index] for index in plan.shard_range(shard)]
        if plan.responses is not None:
            members = self._respond(plan.responses, shard, members, lease)
        for batch in batches(members, plan.engine.tokens_per_batch):
            if lease.is_lost():
                return
            if isinstance(teacher, ScoringTeacher):
                yield RowsBatch(batch, teacher.top_k_rows(batch, plan.positions, plan.top_k))
            else:
                yield score_batch(plan, batch, teacher.hidden_states(batch, plan.positions), teacher.lm_head)

    def _respond(
        self, generation: Generation, shard: int, prompts: list[TokenSequence], lease: Lease
    ) -> list[TokenSequence]:
        responses: list[TokenSequence] = []
        # A seed of the shard's own: the same numbers whichever shards this process scores.
        seed = (generation.seed * 1_000_003 + shard * 1_009) % 2**63
        for some in self._teacher.respond(prompts, generation, seed):
            responses += some
            self._advance(shard, len(some))
            if lease.is_lost():
                break
        return responses

    def _look(self) -> set[int]:
        """The finished shards, whoever finished them."""
        finished = shards_with_receipt(self._cache_dir)
        known = {shard: self._steps * len(self._plan.shard_range(shard)) for shard in finished}
        self._show(replace(self._shown, done=sum((known | self._mine).values()), shards=len(finished)))
        return finished

    def _advance(self, shard: int, num_sequences: int, *, scored_tokens: int | None = None) -> None:
        self._mine[shard] += num_sequences
        shown = replace(self._shown, done=self._shown.done + num_sequences)
        if scored_tokens is not None:
            shown = replace(shown, sequences=shown.sequences + num_sequences, tokens=shown.tokens + scored_tokens)
        self._show(shown)

    def _show(self, progress: Progress) -> None:
        if self._report and progress != self._shown:
            self._report(progress)
        self._shown = progress


def _lease_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def _commit(cache_dir: Path, leases: Leases) -> Manifest:
    """Write the manifest, after which nothing of the cache changes."""
    try:
        plan = read_json(cache_dir / PLAN_NAME, Plan)
        manifest = Manifest(
            plan=plan,
            receipts=tuple(read_json(cache_dir / receipt_name(shard), Receipt) for shard in range(plan.num_shards)),
            files=_head_and_tokenizer(cache_dir, plan),
        )
    except FileNotFoundError as error:
        raise gone(Path(error.filename)) from None
    write_json_first(cache_dir / MANIFEST_NAME, manifest)
    leases.remove_folder()
    # Of the last shards' workers too, which were killed after others had taken over.
    discard_leftovers_in(cache_dir)
    return read_manifest(cache_dir)


def _head_and_tokenizer(cache_dir: Path, plan: Plan) -> tuple[StoredFile, ...]:
    names = [LM_HEAD_NAME] if plan.hidden_states else []
    # Several chat templates stand in a folder of their own.
    folder = cache_dir / TOKENIZER_NAME
    names += [path.relative_to(cache_dir).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return tuple(stored_file(cache_dir, name) for name in names)
