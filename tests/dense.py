"""Misses and masses by their definition: whole rows of a model, Python sets, one position after another."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cache_schema.sequence import TokenSequence


def dense_rows(model_dir: Path, sequences: Iterable[TokenSequence]) -> list[Tensor]:
    """A model's logits at the trained positions of each sequence, one sequence at a time. [P_i, V] each"""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    rows = []
    for sequence in sequences:
        trained = torch.tensor(sequence.loss_mask[1:]).nonzero().squeeze(1)
        with torch.no_grad():
            rows.append(model(torch.tensor(sequence.input_ids).long()[None]).logits[0, trained])
    return rows


def missing_by_sequence(student_rows: list[Tensor], teacher_rows: list[Tensor], k: int, top_k: int) -> list[int]:
    """How many of the student's first k ids are not among the teacher's first ``top_k``, summed over a sequence."""

    def first(row: Tensor, number: int) -> set[int]:
        logits = row.tolist()
        return set(sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:number])

    return [
        sum(len(first(student, k) - first(teacher, top_k)) for student, teacher in zip(*pair, strict=True))
        for pair in zip(student_rows, teacher_rows, strict=True)
    ]


def dense_mass_outside(teacher_rows: list[Tensor], top_ks: Sequence[int]) -> dict[str, float]:
    probabilities = torch.cat(teacher_rows).double().softmax(1).sort(1, descending=True).values
    return {str(top_k): probabilities[:, top_k:].sum(1).mean().item() for top_k in top_ks}
