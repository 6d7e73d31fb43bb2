"""Trains a student from a cache: one loop, a generator of one record per optimizer step."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_schema.reader import CacheReader
from workers.distill.checkpoint import latest_checkpoint, load_checkpoint
from workers.distill.checks import asked_of, needs_lookups
from workers.distill.config import DistillConfig, OptimizerConfig
from workers.distill.order import Order, Pick
from workers.distill.student import load_student
from workers.distill.student_loss import StudentLoss
from workers.distill.taid import TaidSchedule
from workers.distill.terms import ScaledTerm, Term, terms_of
from workers.errors import InputError
from workers.lookup.batch import Batch, Part, collate
from workers.lookup.ladder import TIERS, Ladder
from workers.lookup.opening import open_ladders
from workers.teacher.checkpoint import require_plain_head, require_vocabulary


@dataclass
class Training:
    """Everything a run holds in memory; ``steps`` trains it, ``close`` lets go of lookup logs."""

    config: DistillConfig
    readers: list[CacheReader]
    student: StudentLoss
    terms: list[Term]
    moving: dict[int, TaidSchedule]
    """By place among the terms: what moves their target."""
    ladders: list[Ladder]
    optimizer: torch.optim.Optimizer
    device: torch.device
    order: Order
    num_steps: int
    first_step: int
    resources: ExitStack

    def close(self) -> None:
        self.resources.close()

    def steps(self) -> Iterator[dict[str, Any]]:
        """Train from ``first_step`` to the end; yields each step's record after the weights have moved.

        Raises:
            InputError: the loss or its gradient is not finite; the weights are those before the step.
        """
        parts = list(dict.fromkeys(term.part for term in self.terms))
        for step in range(self.first_step, self.num_steps):
            started = time.perf_counter()
            picks = self.order.step(step)
            batches = self._batches(picks, parts)
            num_positions = sum(batch.num_positions(part) for part in parts for batch in batches)
            scaled = [term.for_step(batches) for term in self._terms_now()]
            shares = [self._backward(batch, scaled) for batch in batches]
            loss, terms = _total(shares)
            grad_norm, lr = self._update(step, loss)
            moved = {"taid_t": [schedule.t for schedule in self.moving.values()]} if self.moving else {}
            for place, schedule in self.moving.items():
                schedule.advance(terms[place] / self.terms[place].weight, (step + 1) / self.num_steps)
            lookups, teacher_forwards = self._take_counts()
            seconds = time.perf_counter() - started
            yield {
                "step": step + 1,
                "epoch": (step + 1) / self.order.steps_per_epoch,
                "loss": loss,
                "terms": terms,
                **moved,
                "grad_norm": grad_norm,
                "lr": lr,
                "sequences": len(picks),
                "positions": num_positions,
                "seconds": seconds,
                "positions_per_second": num_positions / seconds,
                "lookups": lookups,
                "teacher_forwards": teacher_forwards,
            }

    def _batches(self, picks: Sequence[Pick], parts: Sequence[Part]) -> list[Batch]:
        """The step's micro-batches, each of sequences of one cache, and every ladder told what it will be asked."""
        batches = []
        for cache, (reader, ladder) in enumerate(zip(self.readers, self.ladders, strict=True)):
            indexes = [pick.index for pick in picks if pick.cache == cache]
            # Sequences of one length share a micro-batch: the sum is the same and less of it is padding.
            indexes.sort(key=lambda index: reader[index].sequence.num_tokens)
            ladder.expect(indexes)
            size = self.config.micro_batch_sequences
            for first in range(0, len(indexes), size):
                batches.append(collate(reader, indexes[first : first + size], parts, self.device, cache))
        return batches

    def _take_counts(self) -> tuple[dict[str, int], int]:
        """Of all caches, since the last call: pairs by tier, teacher forwards."""
        taken = [ladder.take_counts() for ladder in self.ladders]
        return {tier: sum(counts[tier] for counts, _ in taken) for tier in TIERS}, sum(number for _, number in taken)

    def _terms_now(self) -> list[Term]:
        """The terms with what moves where it now stands."""
        return [
            replace(term, params={**term.params, term.loss.moves: self.moving[place].t})
            if place in self.moving
            else term
            for place, term in enumerate(self.terms)
        ]

    def _backward(self, batch: Batch, terms: Sequence[ScaledTerm]) -> Tensor:
        loss, shares = self.student(batch, terms)
        loss.backward()
        detached: Tensor = shares
        return detached

    def _update(self, step: int, loss: float) -> tuple[float, float]:
        parameters = [parameter for parameter in self.student.parameters() if parameter.grad is not None]
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise InputError(
                f"step {step + 1}: the gradient norm is {grad_norm}, the loss {loss:g}. The weights are those before "
                f"the step; lower optimizer.lr ({self.config.optimizer.lr:g}) or, at the first step, the weights of "
                f"{self.config.loss.name} or parameters that lie far from their defaults."
            )
        lr = learning_rate(step, self.num_steps, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, lr


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


def prepare(config: DistillConfig, readers: Sequence[CacheReader], run_dir: Path, device: torch.device) -> Training:
    """Load models, and the latest checkpoint if there is one, for a config that ``checks.check`` has passed.

    Raises:
        CacheError, InputError: a model, log or checkpoint does not load or does not fit.
    """
    torch.manual_seed(config.seed)
    vocab_size = readers[0].plan.tokenizer.vocab_size
    with ExitStack() as resources:
        ladders = [Ladder() for _ in readers]
        if needs_lookups(config):
            ladders = open_ladders(readers, asked_of(config), device, resources)
        model = load_student(
            config.student, config.student_layers, gradient_checkpointing=config.gradient_checkpointing
        ).to(device)
        require_vocabulary(model, vocab_size)
        require_plain_head(model, vocab_size)
        student = StudentLoss(model, ladders, vocab_size=vocab_size, autocast=config.dtype == "bfloat16")
        terms = terms_of(config, min(reader.plan.top_k for reader in readers), vocab_size)
        schedules = {place: TaidSchedule.of(term.loss, term.params) for place, term in enumerate(terms)}
        moving = {place: schedule for place, schedule in schedules.items() if schedule}
        optimizer = torch.optim.AdamW(
            [parameter for parameter in student.parameters() if parameter.requires_grad],
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        checkpoint = latest_checkpoint(run_dir)
        first_step = load_checkpoint(checkpoint, student, optimizer, moving) if checkpoint else 0
        order = order_of(config, readers)
        return Training(
            config, list(readers), student, terms, moving, ladders, optimizer, device, order,
            num_steps_of(config, order), first_step, resources.pop_all(),
        )  # fmt: skip


def _total(shares: list[Tensor]) -> tuple[float, list[float]]:
    """The step's loss and its terms, summed over micro-batches in float64."""
    terms: list[float] = torch.stack(shares).double().sum(0).tolist()
    return sum(terms), terms
