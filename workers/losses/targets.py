"""What a loss may look at, at N positions, all float32 but the ids.

Shape suffixes: N = positions, K = leading ids, U = ids drawn at a position at most, V = vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """The ids one of the models leads with, in its order (-logit, id), and both models' logits there."""

    ids_NK: Tensor
    teacher_NK: Tensor
    student_NK: Tensor

    def first(self, k: int) -> "TopK":
        return TopK(self.ids_NK[:, :k], self.teacher_NK[:, :k], self.student_NK[:, :k])


@dataclass(frozen=True)
class Drawn:
    """Ids drawn from the teacher's distribution: how often each, and the student's logits there."""

    counts_NU: Tensor
    """0 where a position has fewer ids than U."""
    student_NU: Tensor


@dataclass(frozen=True)
class Targets:
    """A loss finds here what its catalogue entry says it needs; the rest is None."""

    teacher_led: TopK | None = None
    student_led: TopK | None = None
    tails: Mapping[float, Tensor] = field(default_factory=dict)
    """By temperature: the log-sum-exp of the teacher's logit / temperature over all ids that it does not lead with;
    -inf where there are none. [N] each"""
    student_row_NV: Tensor | None = None
    teacher_row_NV: Tensor | None = None
    labels_N: Tensor | None = None
    """The token that follows each position."""
    student_label_N: Tensor | None = None
    """The student's logit of the label."""
    drawn: Drawn | None = None

    def teacher_first(self, k: int) -> TopK:
        assert self.teacher_led is not None
        return self.teacher_led.first(k)

    def student_first(self, k: int) -> TopK:
        assert self.student_led is not None
        return self.student_led.first(k)

    def rows(self) -> tuple[Tensor, Tensor]:
        """The teacher's and the student's whole rows. [N, V] each"""
        assert self.teacher_row_NV is not None
        return self.teacher_row_NV, self.student_row()

    def student_row(self) -> Tensor:
        assert self.student_row_NV is not None
        return self.student_row_NV

    def labels(self) -> Tensor:
        assert self.labels_N is not None
        return self.labels_N

    def teacher_tail(self, k: int, temperature: float) -> Tensor:
        """Log-sum-exp of the teacher's logit / temperature over all but its k leading ids. [N]"""
        assert self.teacher_led is not None
        return tail_below(self.teacher_led.teacher_NK, self.tails[temperature], k, temperature)


def tail_below(leading_NK: Tensor, tail_N: Tensor, k: int, temperature: float) -> Tensor:
    """The tail below the first k of the leading logits, given that below all of them. [N]"""
    between_NK = leading_NK[:, k:] / temperature
    return torch.logsumexp(torch.cat([between_NK, tail_N.unsqueeze(1)], dim=1), dim=1)
