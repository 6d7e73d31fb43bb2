"""The learning rate of every step, a function of the step and the number of steps."""

import math

from workers.distill.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """Linear warm-up to the peak, then its schedule; the first step already moves the weights.

    A step after the last would have ``min_lr_ratio`` of the peak.
    """
    given, ratio = optimizer.warmup_steps, optimizer.min_lr_ratio
    num_warmup = round(optimizer.warmup * num_steps) if given is None else given
    if step < num_warmup:
        return optimizer.lr * (step + 1) / num_warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    left = 1.0 - done if optimizer.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return optimizer.lr * (ratio + (1.0 - ratio) * left)
