"""What the catalogue says of a loss."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Need = Literal["top_k", "logsumexp", "lookups", "full_row", "samples"]
"""Of the teacher. top_k: the stored ids and logits. logsumexp: the stored log-sum-exp at the loss's temperature.
lookups: its logits at the student's ids. full_row: its whole row. samples: ids drawn from it, with counts."""
Value = int | float | bool | str | None
Params = Mapping[str, Value]


@dataclass(frozen=True)
class Parameter:
    """A setting of a loss: its default, what it means, and what it may be."""

    default: Value
    meaning: str
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    """The words it may be, where it is a word."""
    optional: Literal["", "float"] = ""
    """The type it may have beside None, where the default is None."""
    at_most: Literal["", "stored", "vocabulary"] = ""
    """What the default shrinks to: the ids the cache stores, or all there are. What is asked for by name never does."""

    def read(self, value: Any) -> Any:
        """The value as the loss takes it: a whole number may stand for a real one."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        return float(value) if self._type is float and whole else value

    def fault(self, value: Any) -> str | None:
        """Why a loss cannot take the value, to be written behind it; or None."""
        if value is None and self.optional:
            return None
        if type(value) is not self._type:
            return f" must be of type {self._type.__name__}"
        if self.choices and value not in self.choices:
            return f": give one of {', '.join(self.choices)}: {self.meaning}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not self.minimum <= value < math.inf:
                return f": give at least {self.minimum:g}: {self.meaning}"
            if value > self.maximum:
                return f": give at most {self.maximum:g}: {self.meaning}"
        return None

    @property
    def _type(self) -> type:
        return float if self.optional == "float" else type(self.default)


@dataclass(frozen=True)
class Loss:
    """An entry of the catalogue: the function, what it needs of either model, and how its mean is taken."""

    name: str
    values: Callable[..., Tensor]
    """``values(targets, **params)``: per-position values in the dtype of the targets, unreduced. [N]"""
    needs: frozenset[Need]
    source: str
    reason: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    student_row: bool = False
    """Whether it reads the student's whole row; otherwise only the logits at the leading ids."""
    student_led: bool = False
    """Whether it reads the logits at the ids the student leads with."""
    reads_label: bool = False
    weights: Callable[..., Tensor] | None = None
    """``weights(leading_NK, logsumexp_N, **params)``: what each position counts in the mean, from the teacher's leading
    logits and its log-sum-exp at temperature 1. [N] None: 1 each."""
    group_size: str = ""
    """The parameter that says how many positions of a sequence have one value together: their values add up to it, and
    the mean is over such groups."""
    weighs_others: str = ""
    """The parameter that lets the share of common leading ids multiply the other losses of a sum."""
    moves: str = ""
    """The parameter that a run moves from step to step where it is none; see ``workers.distill.taid``."""
    prompt: tuple[str, Params] | None = None
    """The loss that goes with it on the prompt's positions, and its parameters."""
    tail_form: tuple[str, Params] | None = None
    """The loss that comes nearest from a top-k cache without hidden states, and what it must be told."""

    def defaults(self) -> dict[str, Value]:
        return {key: parameter.default for key, parameter in self.parameters.items()}

    def temperature(self, params: Params) -> float:
        """Of the log-sum-exp it needs."""
        value = params.get("temperature", 1.0)
        assert isinstance(value, float)
        return value

    def divisor(self, total_weight: float, params: Params) -> float:
        """What the sum of the values is divided by, given the weights of all positions of the step.

        DistillKit adds ``eps`` to the number of pairs.
        """
        if self.weights is None:
            return max(total_weight, 1.0)
        eps = params["eps"]
        assert isinstance(eps, float)
        return total_weight + eps


def temperature_of(default: float) -> Parameter:
    return Parameter(default, "divides the logits of both models", minimum=1e-3, maximum=1e3)


def leading_of(default: int, minimum: int, maximum: float = math.inf, note: str = "") -> Parameter:
    return Parameter(default, f"leading ids compared{note}", minimum=minimum, maximum=maximum)


FULL_ROW: frozenset[Need] = frozenset({"full_row"})
T_SQUARED = Parameter(False, "multiply by temperature squared, to keep gradients of one size over temperatures")


def stored_of(default: int, maximum: float = math.inf) -> Parameter:
    meaning = "leading ids compared; as many as the cache stores where it stores fewer"
    return Parameter(default, meaning, minimum=2, maximum=maximum, at_most="stored")
