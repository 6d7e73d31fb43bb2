"""Opens the engine that a plan names."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cache_schema.plan import Plan
from workers.teacher.config import EngineConfig
from workers.teacher.teacher import ScoringTeacher, Teacher
from workers.teacher.transformers_teacher import TransformersTeacher
from workers.teacher.vllm_scoring import VllmScoringTeacher
from workers.teacher.vllm_teacher import VllmTeacher


@contextmanager
def open_teacher(
    model: str, plan: Plan, settings: EngineConfig, device: torch.device
) -> Iterator[Teacher | ScoringTeacher]:
    """The teacher of a plan, loaded; its memory is free again at the end. One that scores where ``logits_alone``.

    Args:
        settings: what of the engine changes no number, and so stands in no plan.

    Raises:
        InputError: the model does not load, or its engine is not here.
    """
    vocab_size = plan.tokenizer.vocab_size
    if plan.engine.name == "transformers":
        yield TransformersTeacher(model, plan.teacher, plan.engine, vocab_size=vocab_size, device=device)
        return
    max_tokens = plan.dataset.max_tokens
    memory_fraction, self_check = settings.memory_fraction, settings.self_check
    teacher: VllmTeacher | VllmScoringTeacher
    if plan.logits_alone:
        teacher = VllmScoringTeacher(
            model,
            plan.teacher,
            plan.engine,
            vocab_size=vocab_size,
            device=device,
            max_tokens=max_tokens,
            memory_fraction=memory_fraction,
            self_check=self_check,
        )
    else:
        teacher = VllmTeacher(
            model,
            plan.teacher,
            plan.engine,
            vocab_size=vocab_size,
            device=device,
            max_tokens=max_tokens,
            responds=plan.responses is not None,
            memory_fraction=memory_fraction,
            self_check=self_check,
        )
    try:
        yield teacher
    finally:
        teacher.close()
