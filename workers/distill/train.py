"""Trains a student from a cache: one loop, a generator of one record per optimizer step."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_schema.reader import CacheReader
from workers.distill.checkpoint import latest_checkpoint, load_checkpoint
from workers.distill.config import DistillConfig, LossConfig
from workers.distill.order import step_indexes, steps_per_epoch
from workers.distill.student import StudentLoss, Term, load_student
from workers.errors import InputError
from workers.lookup.batch import Batch, Part, collate
from workers.lookup.hidden import CachedHiddenStates, HiddenStateSource, LiveHiddenStates
from workers.lookup.ladder import Ladder
from workers.losses.catalogue import LOSSES
from workers.teacher.checkpoint import identity_of, require_vocabulary
from workers.teacher.transformers_teacher import TransformersTeacher
from workers.tokenizers import check_same_vocabulary, load_tokenizer


@dataclass
class Training:
    """Everything a run holds in memory; ``steps`` trains it."""

    config: DistillConfig
    reader: CacheReader
    student: StudentLoss
    ladder: Ladder
    optimizer: torch.optim.Optimizer
    scheduler: Any
    device: torch.device
    num_steps: int
    first_step: int

    def steps(self) -> Iterator[dict[str, Any]]:
        """Train from ``first_step`` to the end; yields each step's record after the weights have moved.

        Raises:
            InputError: the loss or its gradient is not finite; the weights are those before the step.
        """
        config, parts = self.config, _parts(self.config)
        for step in range(self.first_step, self.num_steps):
            started = time.perf_counter()
            indexes = step_indexes(
                step,
                num_sequences=len(self.reader),
                sequences_per_step=config.sequences_per_step,
                seed=config.seed,
            )
            # Sequences of one length share a micro-batch: the sum is the same and less of it is padding.
            indexes.sort(key=lambda index: self.reader[index].sequence.num_tokens)
            batches = [
                collate(self.reader, indexes[first : first + config.micro_batch_sequences], parts, self.device)
                for first in range(0, len(indexes), config.micro_batch_sequences)
            ]
            # Count first, then divide every micro-batch by the same number: a token weighs the same wherever it is.
            counts = {part: sum(batch.num_positions(part) for batch in batches) for part in parts}
            shares = [self._backward(batch, counts) for batch in batches]
            grad_norm, lr = self._update(step)
            loss, terms = _total(shares)  # the step's one wait for the device, with the norm and the counts
            lookups, teacher_forwards = self.ladder.take_counts()
            seconds = time.perf_counter() - started
            yield {
                "step": step + 1,
                "epoch": (step + 1) / steps_per_epoch(len(self.reader), config.sequences_per_step),
                "loss": loss,
                "terms": terms,
                "grad_norm": grad_norm,
                "lr": lr,
                "sequences": len(indexes),
                "positions": sum(counts.values()),
                "seconds": seconds,
                "positions_per_second": sum(counts.values()) / seconds,
                "lookups": lookups,
                "teacher_forwards": teacher_forwards,
            }

    def _backward(self, batch: Batch, counts: dict[Part, int]) -> Tensor:
        loss, shares = self.student(batch, counts)
        loss.backward()
        detached: Tensor = shares
        return detached

    def _update(self, step: int) -> tuple[float, float]:
        parameters = [parameter for parameter in self.student.parameters() if parameter.grad is not None]
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise InputError(
                f"step {step + 1}: the gradient norm is {grad_norm}. The weights are those before the step; lower "
                f"optimizer.lr ({self.config.optimizer.lr:g}), or look for NaN in the student's checkpoint."
            )
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, lr


def prepare(config: DistillConfig, run_dir: Path, device: torch.device) -> Training:
    """Check everything that can be checked from files alone, then load models and the latest checkpoint, if any.

    Raises:
        CacheError, InputError: the cache, the student, the teacher and the loss do not fit each other.
    """
    reader = CacheReader(config.cache)
    check_needs(config, reader)
    check_same_vocabulary(load_tokenizer(str(reader.tokenizer_dir)), load_tokenizer(config.student))
    torch.manual_seed(config.seed)
    ladder = Ladder(_hidden_state_source(config, reader, device))
    model = load_student(
        config.student, config.student_layers, gradient_checkpointing=config.gradient_checkpointing
    ).to(device)
    require_vocabulary(model, reader.plan.tokenizer.vocab_size)
    student = StudentLoss(
        model,
        ladder,
        [Term(part, LOSSES[loss.name], loss.parameters) for part, loss in _losses(config)],
        vocab_size=reader.plan.tokenizer.vocab_size,
        autocast=config.dtype == "bfloat16",
    )
    num_steps = config.steps or config.epochs * steps_per_epoch(len(reader), config.sequences_per_step)
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
    )
    scheduler = _schedule(optimizer, round(config.optimizer.warmup * num_steps), num_steps)
    checkpoint = latest_checkpoint(run_dir)
    first_step = load_checkpoint(checkpoint, student, optimizer, scheduler) if checkpoint else 0
    return Training(config, reader, student, ladder, optimizer, scheduler, device, num_steps, first_step)


def check_needs(config: DistillConfig, reader: CacheReader) -> None:
    """Refuse, before any model loads, a loss that the cache and the given teacher cannot serve.

    Raises:
        InputError: names what is missing and every way to add it.
    """
    plan = reader.plan
    if config.prompt_loss is not None and plan.positions != "all":
        raise InputError(
            f"--prompt-loss needs the teacher at the prompt's positions, {reader.cache_dir} holds those of the "
            f"response: dump with --positions all, or leave the prompt loss out."
        )
    for _, loss in _losses(config):
        needs = LOSSES[loss.name].needs
        k = loss.model_extra.get("k") if loss.model_extra else None
        if "top_k" in needs and k is not None and k > plan.top_k:
            raise InputError(
                f"loss.k={k}: {reader.cache_dir} stores the teacher's top {plan.top_k}. Lower loss.k, or dump with "
                f"--top-k {k}."
            )
        if "k" in LOSSES[loss.name].parameters and "lookups" in needs:
            k = int(loss.parameters["k"])
            if k > plan.top_k and "top_k" in needs:
                raise InputError(
                    f"loss {loss.name} compares the top {k}, {reader.cache_dir} stores {plan.top_k}: give "
                    f"--set loss.k={plan.top_k}, or dump with --top-k {k}."
                )
        missing = needs & {"lookups", "full_row"}
        if missing and not reader.has_hidden_states and config.teacher is None:
            asks = "the student's own top-k" if "lookups" in missing else "the teacher's whole rows"
            raise InputError(
                f"loss {loss.name} needs the teacher's logits at {asks}, and {reader.cache_dir} has no hidden "
                f"states. Give --teacher {plan.teacher.name}, or dump again without --no-hidden-states, or choose a "
                f"loss that the stored top-k serves (t_ld, topk_kl)."
            )


def _losses(config: DistillConfig) -> list[tuple[Part, LossConfig]]:
    losses: list[tuple[Part, LossConfig]] = [("response", config.loss)]
    return losses + ([("prompt", config.prompt_loss)] if config.prompt_loss else [])


def _parts(config: DistillConfig) -> list[Part]:
    return [part for part, _ in _losses(config)]


def _hidden_state_source(config: DistillConfig, reader: CacheReader, device: torch.device) -> HiddenStateSource | None:
    if not any(LOSSES[loss.name].needs & {"lookups", "full_row"} for _, loss in _losses(config)):
        return None
    if reader.has_hidden_states:
        return CachedHiddenStates(reader, device)
    assert config.teacher is not None
    plan = reader.plan
    identity = identity_of(config.teacher, plan.teacher.dtype)
    teacher = TransformersTeacher(
        config.teacher, identity, plan.engine, vocab_size=plan.tokenizer.vocab_size, device=device, eos_token_id=None
    )
    return LiveHiddenStates(reader, teacher)


def _schedule(optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_steps: int) -> Any:
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps, num_steps)


def _total(shares: list[Tensor]) -> tuple[float, list[float]]:
    """The step's loss and its terms, summed over micro-batches in float64."""
    terms: list[float] = torch.stack(shares).double().sum(0).tolist()
    return sum(terms), terms
