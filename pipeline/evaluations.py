"""What the evaluations of a run say: which step was the best so far, and whether more steps are worth it."""

import math
from collections.abc import Iterable
from typing import Any, Literal

from cache_schema.reader import CacheReader
from workers.distill.config import DistillConfig, EarlyStoppingConfig
from workers.errors import InputError

Metric = Literal["overlap@8", "kl", "loss"]
_RISES = {"overlap@8": True, "kl": False, "loss": False}


class Evaluations:
    """Those of a run in the order of its steps, by one metric."""

    def __init__(self, metric: Metric, stopping: EarlyStoppingConfig | None) -> None:
        self.metric = metric
        self.best_step: int | None = None
        self.best_value: float | None = None
        self._stopping = stopping
        self._mark: float | None = None
        """What the next is to be better than by ``min_delta``."""
        self._without_improvement = 0

    @classmethod
    def of(cls, config: DistillConfig, records: Iterable[dict[str, Any]], top_k: int) -> "Evaluations":
        """As the records of the steps done say, for a held-out cache that stores ``top_k`` ids."""
        metric: Metric = "overlap@8" if top_k >= 8 else "loss"
        evaluations = cls(config.early_stopping.metric if config.early_stopping else metric, config.early_stopping)
        for record in records:
            if "eval" in record:
                evaluations.add(record["step"], record["eval"])
        return evaluations

    @property
    def are_over(self) -> bool:
        """Whether so many, one after the other, were no improvement, that the run is to end."""
        return self._stopping is not None and self._without_improvement >= self._stopping.patience

    def add(self, step: int, evaluation: dict[str, Any]) -> bool:
        """Take note of one; returns whether it is the best so far."""
        value = value_of(evaluation, self.metric)
        if self._gain(value, self._mark) > (self._stopping.min_delta if self._stopping else 0.0):
            self._mark, self._without_improvement = value, 0
        else:
            self._without_improvement += 1
        if self._gain(value, self.best_value) <= 0.0:
            return False
        self.best_step, self.best_value = step, value
        return True

    def _gain(self, value: float, over: float | None) -> float:
        if not math.isfinite(value):
            return -math.inf
        if over is None:
            return math.inf
        return value - over if _RISES[self.metric] else over - value


def value_of(evaluation: dict[str, Any], metric: Metric) -> float:
    found: float = evaluation["overlap"]["8"] if metric == "overlap@8" else evaluation[metric]
    return found


def require_metric(stopping: EarlyStoppingConfig, eval_reader: CacheReader) -> None:
    """Refuse a metric that the held-out cache cannot give.

    Raises:
        InputError: names one that it can.
    """
    if stopping.metric == "overlap@8" and eval_reader.plan.top_k < 8:
        raise InputError(
            f"early_stopping.metric=overlap@8 compares 8 ids, {eval_reader.cache_dir} stores "
            f"{eval_reader.plan.top_k}: give --set early_stopping.metric=loss, or dump it with --top-k 8 or more."
        )
    if stopping.metric == "kl" and not eval_reader.has_hidden_states:
        raise InputError(
            f"early_stopping.metric=kl needs the teacher's whole rows, and {eval_reader.cache_dir} has no hidden "
            f"states: give --set early_stopping.metric=overlap@8, or dump it with them."
        )
