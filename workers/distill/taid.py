"""TAID's moving target: how far from the student to the teacher it stands, step by step.

From "TAID: Temporally Adaptive Interpolated Distillation" (Shing et al. 2025), algorithm 1.
"""

import math
from dataclasses import dataclass

from workers.losses.loss import Loss, Params

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
    def of(cls, loss: Loss, params: Params) -> "TaidSchedule | None":
        """For a loss whose target moves, unless it was told where to stand."""
        if not loss.moves or params[loss.moves] is not None:
            return None
        start, end = params["t_start"], params["t_end"]
        assert isinstance(start, float)
        assert isinstance(end, float)
        return cls(start, end, start)

    def advance(self, loss: float, done: float) -> None:
        """After a step: its loss, and the share of the run that is done, from 0 to 1.

        A loss of 0 says nothing, be it that the step had no position or that the target is the student itself.
        """
        if loss == 0.0:
            return
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
