"""Trains a student from a cache: one loop, a generator of one record per optimizer step, the same on every rank."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from workers.distill.adapters import add_adapters, freeze_parts
from workers.distill.checkpoint import latest_checkpoint, load_checkpoint
from workers.distill.checks import asked_of, needs_lookups
from workers.distill.config import DistillConfig
from workers.distill.curriculum import Curriculum, curriculum_of
from workers.distill.data import TrainingData
from workers.distill.engines.engine import Engine, NotFiniteError
from workers.distill.engines.opening import open_engine
from workers.distill.learning_rate import learning_rate
from workers.distill.order import Order, Pick, among
from workers.distill.selection import token_counts
from workers.distill.student import load_student
from workers.distill.student_loss import StudentLoss
from workers.errors import InputError
from workers.lookup.batch import Batch, Part, collate, nothing
from workers.lookup.ladder import TIERS, Ladder
from workers.lookup.opening import open_ladders
from workers.ranks import Ranks
from workers.teacher.checkpoint import require_plain_head, require_vocabulary

_MOST_NAMED = 8  # sequences in an error
_DRAWS = 2  # a kind of random stream beside those of ``order``


class NotFiniteStepError(InputError):
    """A step's loss or gradient holds NaN or infinity; the message names the sequences."""


@dataclass
class Training:
    """Everything a run holds in memory; ``steps`` trains it, ``close`` lets go of lookup logs."""

    config: DistillConfig
    data: TrainingData
    engine: Engine
    ranks: Ranks
    curriculum: Curriculum
    order: Order
    num_steps: int
    first_step: int
    resources: ExitStack

    def close(self) -> None:
        self.resources.close()

    def steps(self, is_asked_to_stop: Callable[[], bool] = lambda: False) -> Iterator[dict[str, Any]]:
        """Train from ``first_step`` to the end; yields each step's record after the weights have moved. Collective.

        Ends early, between two steps, where a rank is asked to stop.

        Raises:
            NotFiniteStepError: on all ranks; the weights are those before the step.
        """
        for step in range(self.first_step, self.num_steps):
            started = time.perf_counter()
            torch.manual_seed(_seed_of(self.config.seed, step, self.ranks.rank))
            picks = among(self.order.step(step), self.data.kept)
            terms = self.curriculum.terms(step)
            parts = list(dict.fromkeys(term.part for term in terms))
            batches = self._own_batches(picks, parts)
            own_positions = sum(batch.num_positions(part) for part in parts for batch in batches)
            stopping, num_positions, *weights = self.ranks.sums(
                [is_asked_to_stop(), own_positions, *(term.weight_in(batches) for term in terms)]
            )
            if stopping:
                return
            scaled = [term.scaled(weight) for term, weight in zip(terms, weights, strict=True)]
            shares = torch.stack(
                [self.engine.backward(batch, scaled, last=batch is batches[-1]) for batch in batches]
            ).double()
            sums = self.ranks.sums([*shares.sum(0).tolist(), *self._take_counts()])
            values, (*lookups, teacher_forwards) = sums[: len(terms)], sums[len(terms) :]
            loss = sum(values)
            if not math.isfinite(loss):
                self._refuse(step, f"the loss is {loss}", batches, shares.isfinite().all(1).tolist())
            lr = learning_rate(step, self.num_steps, self.config.optimizer)
            try:
                grad_norm = self.engine.step(lr)
            except NotFiniteError as error:
                self._refuse(step, f"{error}, the loss {loss:g}", batches, [False] * len(batches))
            logged = self.curriculum.logged(step)
            self.curriculum.advance(step, values)
            seconds = time.perf_counter() - started
            yield {
                "step": step + 1,
                "epoch": (step + 1) / self.order.steps_per_epoch,
                "loss": loss,
                "terms": values,
                **logged,
                "grad_norm": grad_norm,
                "lr": lr,
                "sequences": len(picks),
                "positions": int(num_positions),
                "engine": self.config.engine.name,
                "ranks": self.ranks.size,
                "seconds": seconds,
                "positions_per_second": num_positions / seconds,
                "lookups": dict(zip(TIERS, map(int, lookups), strict=True)),
                "teacher_forwards": int(teacher_forwards),
            }

    def _own_batches(self, picks: Sequence[Pick], parts: Sequence[Part]) -> list[Batch]:
        """This rank's micro-batches of the step, each of sequences of one cache; as many as any other rank has.

        Every ladder is told what it will be asked.
        """
        rank, size = self.ranks.rank, self.ranks.size
        dealt: list[tuple[int, list[int]]] = []
        for cache, reader in enumerate(self.data.readers):
            indexes = [pick.index for pick in picks if pick.cache == cache]
            # Sequences of one length share a micro-batch: the sum is the same and less of it is padding.
            indexes.sort(key=token_counts(reader).__getitem__)
            most = max(1, min(self.config.micro_batch_sequences, -(-len(indexes) // size)))
            dealt += [(cache, indexes[first : first + most]) for first in range(0, len(indexes), most)]
        own = dealt[rank::size]
        for cache, ladder in enumerate(self.engine.student.ladders):
            ladder.expect([index for of_cache, indexes in own if of_cache == cache for index in indexes])
        batches = [
            collate(self.data.readers[cache], indexes, parts, self.ranks.device, cache) for cache, indexes in own
        ]
        num_rounds = -(-len(dealt) // size)
        return batches + [nothing(parts, self.ranks.device) for _ in range(num_rounds - len(own))]

    def _take_counts(self) -> list[int]:
        """Of this rank and all caches, since the last call: pairs by tier, then teacher forwards."""
        taken = [ladder.take_counts() for ladder in self.engine.student.ladders]
        return [*(sum(counts[tier] for counts, _ in taken) for tier in TIERS), sum(number for _, number in taken)]

    def _refuse(self, step: int, what: str, batches: Sequence[Batch], is_finite: Sequence[bool]) -> NoReturn:
        """With the sequences of the micro-batches, of all ranks, that are not finite."""
        ids = [
            f"{self.data.readers[batch.cache][member.index].sequence.sequence_id.hex()} of "
            f"{self.data.readers[batch.cache].cache_dir.name}"
            for batch, fine in zip(batches, is_finite, strict=True)
            if not fine
            for part in list(batch.parts)[:1]
            for member in batch.parts[part].members
        ]
        everyone = [name for names in self.ranks.gather(ids) for name in names]
        more = f" and {len(everyone) - _MOST_NAMED} more" if len(everyone) > _MOST_NAMED else ""
        raise NotFiniteStepError(
            f"step {step + 1}: {what}, at sequences {', '.join(everyone[:_MOST_NAMED])}{more}. The weights are those "
            f"before the step; lower optimizer.lr ({self.config.optimizer.lr:g}) or, at the first step, the weights of "
            f"{self.curriculum.phase(step).losses[0].name} or parameters that lie far from their defaults."
        )


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Of a step's random numbers, dropout's, so that a resumed run draws the same ones."""
    return int(np.random.SeedSequence(seed, spawn_key=(_DRAWS, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def prepare(config: DistillConfig, data: TrainingData, run_dir: Path, ranks: Ranks) -> Training:
    """Load models, and the latest checkpoint if there is one, for a config that ``check`` passed. Collective.

    Raises:
        CacheError, InputError: a model, log or checkpoint does not load or does not fit.
    """
    torch.manual_seed(config.seed)
    order, num_steps = data.order(config), data.num_steps(config)
    curriculum = curriculum_of(
        config, config.schedule, config.switch, num_steps=num_steps, top_k=data.top_k, vocab_size=data.vocab_size
    )
    with ExitStack() as resources:

        def load() -> StudentLoss:
            ladders = [Ladder() for _ in data.readers]
            if needs_lookups(config):
                ladders = open_ladders(data.readers, asked_of(config), ranks.device, resources)
            return StudentLoss(
                _load_model(config, data.vocab_size), ladders,
                vocab_size=data.vocab_size, autocast=config.dtype == "bfloat16",
            )  # fmt: skip

        student = ranks.together(load)
        try:
            engine = open_engine(student, config, ranks)
        except InputError as error:  # of the config, the same on every rank
            ranks.refuse(error)
        # One rank's answer: another's view of a shared directory may be older.
        checkpoint = ranks.from_first(lambda: latest_checkpoint(run_dir))
        first_step = load_checkpoint(checkpoint, engine, curriculum.moving, ranks) if checkpoint else 0
        return Training(config, data, engine, ranks, curriculum, order, num_steps, first_step, resources.pop_all())


def _load_model(config: DistillConfig, vocab_size: int) -> Any:
    """The student as it begins, with what is trained of it requiring gradients."""
    model = load_student(config.student, config.student_layers, gradient_checkpointing=config.gradient_checkpointing)
    require_vocabulary(model, vocab_size)
    require_plain_head(model, vocab_size)
    if config.peft is not None:
        add_adapters(model, config.peft, config.seed)
    freeze_parts(model, config.freeze)
    return model
