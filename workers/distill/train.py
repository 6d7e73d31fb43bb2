"""Trains a student from a cache: one loop, a generator of one record per optimizer step, the same on every rank."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from cache_schema.reader import CacheReader
from workers.distill.checkpoint import latest_checkpoint, load_checkpoint
from workers.distill.checks import asked_of, needs_lookups
from workers.distill.config import DistillConfig, OptimizerConfig
from workers.distill.engines.engine import Engine, NotFiniteError
from workers.distill.engines.opening import open_engine
from workers.distill.order import Order, Pick
from workers.distill.student import load_student
from workers.distill.student_loss import StudentLoss
from workers.distill.taid import TaidSchedule
from workers.distill.terms import Term, terms_of
from workers.errors import InputError
from workers.lookup.batch import Batch, Part, collate, nothing
from workers.lookup.ladder import TIERS, Ladder
from workers.lookup.opening import open_ladders
from workers.ranks import Ranks
from workers.teacher.checkpoint import require_plain_head, require_vocabulary

_MOST_NAMED = 8  # sequences in an error
_DRAWS = 2  # a kind of random stream beside those of ``order``


@dataclass
class Training:
    """Everything a run holds in memory; ``steps`` trains it, ``close`` lets go of lookup logs."""

    config: DistillConfig
    readers: list[CacheReader]
    engine: Engine
    ranks: Ranks
    terms: list[Term]
    moving: dict[int, TaidSchedule]
    """By place among the terms: what moves their target."""
    ladders: list[Ladder]
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
            InputError: the loss or its gradient is not finite; the weights are those before the step.
        """
        for step in range(self.first_step, self.num_steps):
            started = time.perf_counter()
            torch.manual_seed(_seed_of(self.config.seed, step, self.ranks.rank))
            picks = self.order.step(step)
            terms = self._terms_now()
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
            moved = {"taid_t": [schedule.t for schedule in self.moving.values()]} if self.moving else {}
            for place, schedule in self.moving.items():
                schedule.advance(values[place] / self.terms[place].weight, (step + 1) / self.num_steps)
            seconds = time.perf_counter() - started
            yield {
                "step": step + 1,
                "epoch": (step + 1) / self.order.steps_per_epoch,
                "loss": loss,
                "terms": values,
                **moved,
                "grad_norm": grad_norm,
                "lr": lr,
                "sequences": len(picks),
                "positions": int(num_positions),
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
        for cache, reader in enumerate(self.readers):
            indexes = [pick.index for pick in picks if pick.cache == cache]
            # Sequences of one length share a micro-batch: the sum is the same and less of it is padding.
            indexes.sort(key=lambda index: reader[index].sequence.num_tokens)
            most = max(1, min(self.config.micro_batch_sequences, -(-len(indexes) // size)))
            dealt += [(cache, indexes[first : first + most]) for first in range(0, len(indexes), most)]
        own = dealt[rank::size]
        for cache, ladder in enumerate(self.ladders):
            ladder.expect([index for of_cache, indexes in own if of_cache == cache for index in indexes])
        batches = [collate(self.readers[cache], indexes, parts, self.ranks.device, cache) for cache, indexes in own]
        num_rounds = -(-len(dealt) // size)
        return batches + [nothing(parts, self.ranks.device) for _ in range(num_rounds - len(own))]

    def _take_counts(self) -> list[int]:
        """Of this rank and all caches, since the last call: pairs by tier, then teacher forwards."""
        taken = [ladder.take_counts() for ladder in self.ladders]
        return [*(sum(counts[tier] for counts, _ in taken) for tier in TIERS), sum(number for _, number in taken)]

    def _terms_now(self) -> list[Term]:
        """The terms with what moves where it now stands."""
        return [
            replace(term, params={**term.params, term.loss.moves: self.moving[place].t})
            if place in self.moving
            else term
            for place, term in enumerate(self.terms)
        ]

    def _refuse(self, step: int, what: str, batches: Sequence[Batch], is_finite: Sequence[bool]) -> NoReturn:
        """Stop all ranks, with the sequences of the micro-batches that are not finite."""
        ids = [
            f"{self.readers[batch.cache][member.index].sequence.sequence_id.hex()} of "
            f"{self.readers[batch.cache].cache_dir.name}"
            for batch, fine in zip(batches, is_finite, strict=True)
            if not fine
            for part in list(batch.parts)[:1]
            for member in batch.parts[part].members
        ]
        everyone = [name for names in self.ranks.gather(ids) for name in names]
        more = f" and {len(everyone) - _MOST_NAMED} more" if len(everyone) > _MOST_NAMED else ""
        shown = ", ".join(everyone[:_MOST_NAMED]) + more

        def refuse() -> NoReturn:
            raise InputError(
                f"step {step + 1}: {what}, at sequences {shown}. The weights are those before the step; lower "
                f"optimizer.lr ({self.config.optimizer.lr:g}) or, at the first step, the weights of "
                f"{self.config.loss.name} or parameters that lie far from their defaults."
            )

        self.ranks.together(refuse)
        raise AssertionError


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Of a step's random numbers, dropout's, so that a resumed run draws the same ones."""
    return int(np.random.SeedSequence(seed, spawn_key=(_DRAWS, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """Linear warm-up to the peak, then a cosine to zero; the first step already moves the weights."""
    num_warmup = round(optimizer.warmup * num_steps)
    if step < num_warmup:
        return optimizer.lr * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return optimizer.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def order_of(config: DistillConfig, readers: Sequence[CacheReader]) -> Order:
    sizes = [len(reader) for reader in readers]
    return Order(sizes, config.weights, sequences_per_step=config.sequences_per_step, seed=config.seed)


def num_steps_of(config: DistillConfig, order: Order) -> int:
    """As asked, or so many epochs of the caches."""
    return config.steps or config.epochs * order.steps_per_epoch


def prepare(config: DistillConfig, readers: Sequence[CacheReader], run_dir: Path, ranks: Ranks) -> Training:
    """Load models, and the latest checkpoint if there is one, for a config that ``checks.check`` has passed.

    Raises:
        CacheError, InputError: a model, log or checkpoint does not load or does not fit.
    """
    torch.manual_seed(config.seed)
    vocab_size = readers[0].plan.tokenizer.vocab_size
    with ExitStack() as resources:
        ladders = [Ladder() for _ in readers]
        if needs_lookups(config):
            ladders = open_ladders(readers, asked_of(config), ranks.device, resources)
        model = load_student(
            config.student, config.student_layers, gradient_checkpointing=config.gradient_checkpointing
        )
        require_vocabulary(model, vocab_size)
        require_plain_head(model, vocab_size)
        # FSDP2 and DeepSpeed hold bfloat16 weights themselves, beside float32 ones.
        autocast = config.dtype == "bfloat16" and config.engine.name == "torch"
        student = StudentLoss(model, ladders, vocab_size=vocab_size, autocast=autocast)
        terms = terms_of(config, min(reader.plan.top_k for reader in readers), vocab_size)
        schedules = {place: TaidSchedule.of(term.loss, term.params) for place, term in enumerate(terms)}
        moving = {place: schedule for place, schedule in schedules.items() if schedule}
        engine = open_engine(student, config, ranks)
        checkpoint = latest_checkpoint(run_dir)
        first_step = load_checkpoint(checkpoint, engine, moving) if checkpoint else 0
        order = order_of(config, readers)
        return Training(
            config, list(readers), engine, ranks, terms, moving, ladders, order, num_steps_of(config, order),
            first_step, resources.pop_all(),
        )  # fmt: skip
