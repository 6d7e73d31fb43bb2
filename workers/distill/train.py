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
from workers.distill.config import DistillConfig, LossConfig, OptimizerConfig
from workers.distill.order import step_indexes, steps_per_epoch
from workers.distill.student import StudentLoss, Term, load_student, require_layers
from workers.errors import InputError
from workers.lookup.batch import Batch, Part, collate
from workers.lookup.ladder import Ladder
from workers.lookup.live import HiddenStateSource, LiveHiddenStates, require_same_teacher
from workers.lookup.stored import CachedHiddenStates
from workers.losses.catalogue import LOSSES
from workers.teacher.checkpoint import (
    context_length,
    identity_of,
    model_directory,
    read_text_config,
    require_plain_head,
    require_vocabulary,
)
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
            loss, terms = _total(shares)
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


def check(config: DistillConfig) -> CacheReader:
    """Open the cache and refuse, from files alone, what cannot be trained from it.

    Raises:
        CacheError, InputError: cache, student, teacher and loss do not fit each other.
    """
    reader = CacheReader(config.cache)
    check_needs(config, reader)
    check_same_vocabulary(load_tokenizer(str(reader.tokenizer_dir)), load_tokenizer(config.student))
    context = context_length(model_directory(config.student))
    if context is not None and context < reader.plan.dataset.max_tokens:
        longest = max(reader[index].sequence.num_tokens for index in range(len(reader)))
        if context < longest:
            raise InputError(
                f"{config.student} reads {context:,} tokens, {reader.cache_dir} holds a sequence of {longest:,}: give "
                f"a student with a longer context, or dump with --set data.max_tokens={context}."
            )
    if config.student_layers is not None:
        require_layers(config.student_layers, read_text_config(model_directory(config.student)).num_hidden_layers)
    if config.teacher is not None:
        require_same_teacher(reader, identity_of(config.teacher, reader.plan.teacher.dtype))
    return reader


def num_steps_of(config: DistillConfig, reader: CacheReader) -> int:
    """As asked, or so many epochs of the cache."""
    return config.steps or config.epochs * steps_per_epoch(len(reader), config.sequences_per_step)


def prepare(config: DistillConfig, reader: CacheReader, run_dir: Path, device: torch.device) -> Training:
    """Load models, and the latest checkpoint if there is one, for a config that ``check`` has passed.

    Raises:
        CacheError, InputError: a model or checkpoint does not load or does not fit.
    """
    torch.manual_seed(config.seed)
    ladder = Ladder(_hidden_state_source(config, reader, device))
    model = load_student(
        config.student, config.student_layers, gradient_checkpointing=config.gradient_checkpointing
    ).to(device)
    require_vocabulary(model, reader.plan.tokenizer.vocab_size)
    require_plain_head(model, reader.plan.tokenizer.vocab_size)
    student = StudentLoss(
        model,
        ladder,
        [Term(part, LOSSES[loss.name], loss.parameters(reader.plan.top_k)) for part, loss in _losses(config)],
        vocab_size=reader.plan.tokenizer.vocab_size,
        autocast=config.dtype == "bfloat16",
    )
    num_steps = num_steps_of(config, reader)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in student.parameters() if parameter.requires_grad],
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
    )
    checkpoint = latest_checkpoint(run_dir)
    first_step = load_checkpoint(checkpoint, student, optimizer) if checkpoint else 0
    return Training(config, reader, student, ladder, optimizer, device, num_steps, first_step)


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
    for part, loss in _losses(config):
        key = "loss" if part == "response" else "prompt_loss"
        needs = LOSSES[loss.name].needs
        k = loss.parameters(plan.top_k).get("k", 0)
        least = int(LOSSES[loss.name].parameters["k"].minimum) if k else 0
        if least > plan.top_k:
            raise InputError(
                f"{key} {loss.name} compares {least} ids at least, {reader.cache_dir} stores {plan.top_k}: dump with a "
                f"larger --top-k."
            )
        if "top_k" in needs and k > plan.top_k:
            raise InputError(
                f"{key}.k={k} is more than the top {plan.top_k} that {reader.cache_dir} stores: give "
                f"--set {key}.k={plan.top_k} or less, or dump with --top-k {k}."
            )
        if k > plan.tokenizer.vocab_size:
            raise InputError(f"{key}.k={k} is more than the vocabulary of {plan.tokenizer.vocab_size}: lower it.")
        missing = needs & {"lookups", "full_row"}
        if missing and not reader.has_hidden_states and config.teacher is None:
            asks = "the student's own top-k" if "lookups" in missing else "the teacher's whole rows"
            raise InputError(
                f"{key} {loss.name} needs the teacher's logits at {asks}, and {reader.cache_dir} has no hidden "
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
        config.teacher, identity, plan.engine, vocab_size=plan.tokenizer.vocab_size, device=device
    )
    return LiveHiddenStates(reader, teacher)


def _total(shares: list[Tensor]) -> tuple[float, list[float]]:
    """The step's loss and its terms, summed over micro-batches in float64."""
    terms: list[float] = torch.stack(shares).double().sum(0).tolist()
    return sum(terms), terms
