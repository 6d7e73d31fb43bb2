"""The pilot of ``pipeline estimate``: sequences scored by the teacher into temporary caches, and a student on them."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_schema.manifest import Receipt, read_json, receipt_name
from cache_schema.plan import Generation
from cache_schema.reader import CacheReader
from cache_schema.sequence import Positions, ScoredSequence, TokenSequence
from cache_schema.writer import ShardWriter
from pipeline.progress import dump_bar, progress_bar
from pipeline.teacher_dump import Prepared
from workers.distill.config import DistillConfig, OptimizerConfig
from workers.distill.data import TrainingData
from workers.distill.train import Training, prepare
from workers.evaluate.misses import TOP_KS, Misses, measure_misses, tail_beyond
from workers.ranks import Ranks
from workers.teacher.batches import batches
from workers.teacher.dump import dump
from workers.teacher.int8 import measure_int8
from workers.teacher.teacher import Teacher

_SEQUENCES_PER_STEP = 4  # a small pilot is gone through as often as it can: a new student needs steps more than data


@dataclass(frozen=True)
class Pilot:
    """What the teacher said of some sequences, and how long that took it."""

    trained: CacheReader
    """With hidden states: a student can be trained on it."""
    held_out: CacheReader | None
    """Sequences the student is not trained on, without hidden states; None where there is no student."""
    teacher_seconds: float
    """In the teacher's body alone."""
    dump_seconds: float
    """Body, head, top-k and writing; neither loading nor generation."""
    generation_seconds: float
    """In writing responses, where the teacher writes them."""

    @property
    def readers(self) -> list[CacheReader]:
        return [self.trained, self.held_out] if self.held_out else [self.trained]

    @property
    def scored(self) -> list[ScoredSequence]:
        return [scored for reader in self.readers for scored in reader]

    @property
    def padded_tokens(self) -> int:
        return sum(
            padded_tokens([scored.sequence for scored in reader], reader.plan.engine.tokens_per_batch)
            for reader in self.readers
        )


class TimedTeacher:
    """A teacher that notes when it was asked for what; see ``workers.teacher.teacher.Teacher``."""

    def __init__(self, teacher: Teacher) -> None:
        self.identity, self.engine, self.lm_head = teacher.identity, teacher.engine, teacher.lm_head
        self.started: list[float] = []
        self.body_seconds = self.generation_seconds = 0.0
        self._teacher = teacher

    def hidden_states(self, batch: Sequence[TokenSequence], positions: Positions) -> list[Tensor]:
        self.started.append(time.perf_counter())
        states = self._teacher.hidden_states(batch, positions)
        self.body_seconds += time.perf_counter() - self.started[-1]
        return states

    def respond(
        self, prompts: Sequence[TokenSequence], generation: Generation, seed: int
    ) -> Iterator[list[TokenSequence]]:
        self.started.append(time.perf_counter())
        responses = list(self._teacher.respond(prompts, generation, seed))
        self.generation_seconds += time.perf_counter() - self.started[-1]
        yield from responses


def score_pilot(
    prepared: Prepared, trained: Sequence[int], held_out: Sequence[int], teacher: Teacher, folder: Path
) -> Pilot:
    """Dump the chosen sequences into caches under ``folder``, as wide as any K that will be asked about.

    Raises:
        InputError: a hidden state is not finite.
        StorageError: the disk of temporary files is full.
    """
    plan = prepared.plan
    shortest = min((prepared.sequences[index] for index in trained), key=lambda sequence: sequence.num_tokens)
    teacher.hidden_states([shortest], plan.positions)  # the first forward of a process is slower than any other
    top_k = min(max(*TOP_KS, plan.top_k), plan.tokenizer.vocab_size)
    temperatures = tuple(dict.fromkeys([1.0, *plan.temperatures]))
    readers: list[CacheReader] = []
    timed: list[TimedTeacher] = []
    dump_seconds = 0.0
    with dump_bar("scoring the pilot") as progress:
        for indexes in (trained, held_out):
            if not indexes:
                continue
            sequences = [prepared.sequences[index] for index in indexes]
            update = {"top_k": top_k, "temperatures": temperatures} | _one_shard(len(indexes))
            if readers:
                update["hidden_states"] = None  # the head would be stored twice
            elif plan.hidden_states and not plan.hidden_states.is_measured:
                # Once a dump, whatever its size: no part of its pace.
                update["hidden_states"] = measure_int8(plan, sequences, teacher)
            part = folder / f"pilot-{len(readers)}"
            timed.append(TimedTeacher(teacher))
            dump(part, plan.model_copy(update=update), sequences, timed[-1], prepared.tokenizer, progress)
            # From the first call on: what comes before is the head, which a dump stores once whatever its size.
            dump_seconds += time.perf_counter() - timed[-1].started[0] - timed[-1].generation_seconds
            readers.append(CacheReader(part))
    return Pilot(
        trained=readers[0],
        held_out=readers[1] if len(readers) > 1 else None,
        teacher_seconds=sum(part.body_seconds for part in timed),
        dump_seconds=dump_seconds,
        generation_seconds=sum(part.generation_seconds for part in timed),
    )


def padded_tokens(sequences: Sequence[TokenSequence], tokens_per_batch: int) -> int:
    """Tokens the teacher reads in one shard of these sequences, padding included."""
    return sum(len(batch) * batch[0].num_tokens for batch in batches(sequences, tokens_per_batch))


def written_at(prepared: Prepared, pilot: Pilot, top_k: int, folder: Path) -> Receipt:
    """Write the pilot as a shard of the plan, but of ``top_k`` ids and without hidden states."""
    scored = pilot.scored
    update = {"top_k": top_k, "hidden_states": None} | _one_shard(len(scored))
    plan = prepared.plan.model_copy(update=update)
    with ShardWriter(folder, plan, 0) as writer:
        for item in scored:
            writer.append(narrowed(item, top_k, plan.temperatures, pilot.trained.plan.temperatures))
    return read_json(folder / receipt_name(0), Receipt)


def _one_shard(num_sequences: int) -> dict[str, Any]:
    return {"num_sequences": num_sequences, "sequences_per_shard": num_sequences}


def narrowed(
    scored: ScoredSequence, top_k: int, temperatures: Sequence[float], stored_temperatures: Sequence[float]
) -> ScoredSequence:
    """The same rows as a dump of fewer ids, and of some of the temperatures, would have stored them."""
    rows = scored.top_k_rows
    logits_PK = torch.tensor(rows.logits)
    tails = []
    for temperature in temperatures:
        tail_P = torch.tensor(rows.tail_logsumexp[:, stored_temperatures.index(temperature)])
        tails.append(tail_beyond(logits_PK, tail_P, top_k, temperature))
    narrow = replace(
        rows,
        token_ids=rows.token_ids[:, :top_k],
        logits=rows.logits[:, :top_k],
        tail_logsumexp=torch.stack(tails, dim=1).numpy(),
    )
    return ScoredSequence(scored.sequence, narrow, hidden_states=None)


def student_misses(
    pilot: Pilot,
    student: str,
    student_layers: tuple[int, ...] | None,
    *,
    k: int,
    top_ks: Sequence[int],
    steps: int,
    lr: float,
    device: torch.device,
    folder: Path,
) -> dict[str, Misses]:
    """What the student misses on the held-out part, ``before`` and ``after`` steps of BiLD on the other.

    Raises:
        InputError: the student does not load or does not fit, or its loss is not finite.
    """
    assert pilot.held_out is not None
    config = DistillConfig(
        cache=(str(pilot.trained.cache_dir),),
        student=student,
        student_layers=student_layers,
        steps=steps,
        sequences_per_step=_SEQUENCES_PER_STEP,
        optimizer=OptimizerConfig(lr=lr),
    )
    training = prepare(config, TrainingData.of([pilot.trained]), folder / "run", Ranks(device))
    with closing(training):
        misses = {"before": _count(training, pilot.held_out, k, top_ks)}
        training.engine.student.train()
        with progress_bar("training on the pilot") as progress:
            for step in training.steps():
                progress(step["step"], training.num_steps)
        return misses | {"after": _count(training, pilot.held_out, k, top_ks)}


def _count(training: Training, reader: CacheReader, k: int, top_ks: Sequence[int]) -> Misses:
    model, indexes = training.engine.student.model, range(len(reader))
    return measure_misses(model, reader, indexes, k=k, top_ks=top_ks, device=training.ranks.device)
