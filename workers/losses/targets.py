"""What a loss may look at, at N positions, all float32 but the ids.

Shape suffixes: N = positions, K = the teacher's top-k kept for the loss, J = the student's, V = vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """Both models' logits at the ids one of them leads with, in the leader's order (-logit, id)."""

    teacher_NK: Tensor
    student_NK: Tensor

    def first(self, k: int) -> "TopK":
        return TopK(self.teacher_NK[:, :k], self.student_NK[:, :k])


@dataclass(frozen=True)
class Targets:
    """A loss finds here what its catalogue entry says it needs; the rest is None."""

    teacher_led: TopK | None = None
    student_led: TopK | None = None
    student_row_NV: Tensor | None = None
    teacher_row_NV: Tensor | None = None
    labels_N: Tensor | None = None
    """The token that follows each position."""
