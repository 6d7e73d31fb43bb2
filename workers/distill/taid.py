"""TAID's moving target: how far from the student to the teacher it stands, step by step.

From "TAID: Temporally Adaptive Interpolated Distillation" (Shing et al. 2025), algorithm 1.
"""

import math
from dataclasses import dataclass

from workers.losses.loss import Params

_RATE = 5e-4
_MOMENTUM = 0.99


@dataclass
class TaidSchedule:
    """t grows with the share of the run that is done, and ahead of it while the loss falls."""

    start: float
    end: float
    t: float
    momentum: float = 0.0
    previous: float = math.inf
    """Loss of the step before."""

    @classmethod
    def of(cls, params: Params) -> "TaidSchedule | None":
        """For a loss that has a t and was given none."""
        start, end = params.get("t_start"), params.get("t_end")
        if not isinstance(start, float) or not isinstance(end, float) or params["t"] is not None:
            return None
        return cls(start, end, start)

    def advance(self, loss: float, done: float) -> None:
        """After a step: its loss, and the share of the run that is done, from 0 to 1."""
        if math.isfinite(self.previous):
            change = (self.previous - loss) / (self.previous + 1e-15)
            self.momentum = _MOMENTUM * self.momentum + (1.0 - _MOMENTUM) * change
            sigmoid = 0.5 * (1.0 + math.tanh(0.5 * self.momentum))
            ahead = self.t + _RATE * (1.0 - self.t) * sigmoid
            self.t = min(self.end, max(self.start + (self.end - self.start) * done, ahead))
        self.previous = loss

    def state(self) -> tuple[float, float, float]:
        return self.t, self.momentum, self.previous

    def restore(self, state: tuple[float, float, float]) -> None:
        self.t, self.momentum, self.previous = state
