"""Losses as a user writes them: ``bild``, ``bild+0.5*sft``, and their parameters."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from workers.losses.catalogue import LOSSES
from workers.losses.loss import Loss, Params, Value

_SUMMAND = re.compile(r"\s*(?:(?P<weight>[^*]*)\*)?\s*(?P<name>[^*\s]+)\s*")
_NUMBER = re.compile(r"\s*[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?\s*|\s*[0-9]+\.\s*", re.ASCII)

_PLUS = re.compile(r"(?<!\d[eE])\+")  # but not that of 1e+3


@dataclass(frozen=True)
class Summand:
    """One loss of a sum, with what the user gave for it."""

    loss: Loss
    weight: float
    given: Params

    def default_or_given(self, key: str) -> Value:
        """None where the loss has no such parameter."""
        return {**self.loss.defaults(), **self.given}.get(key)

    def parameters(self, top_k: int, vocab_size: int) -> dict[str, Value]:
        """Defaults of the catalogue, overridden by what was given, for a cache that stores ``top_k`` ids."""
        most = {"": None, "stored": top_k, "vocabulary": vocab_size}
        defaults: dict[str, Value] = {}
        for key, parameter in self.loss.parameters.items():
            limit, default = most[parameter.at_most], parameter.default
            defaults[key] = min(default, limit) if limit and isinstance(default, int) else default
        return defaults | dict(self.given)


class LossConfig(BaseModel):
    """A loss by name, or a sum of losses, each with a weight; every other key is a parameter.

    A parameter that only one loss of the sum has stands beside the name; one that several have, in a table of its loss.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "bild"

    @property
    def summands(self) -> tuple[Summand, ...]:
        """In the order they were written."""
        given = self._given()
        return tuple(Summand(LOSSES[name], weight, given[name]) for name, weight in _parse(self.name))

    @property
    def on_prompt(self) -> "LossConfig | None":
        """The loss that one of these brings along for the prompt's positions, with the weight of the one."""
        for summand in self.summands:
            if summand.loss.prompt:
                name, params = summand.loss.prompt
                return LossConfig(name=f"{summand.weight!r}*{name}", **params)
        return None

    @field_validator("name")
    @classmethod
    def _without_spaces(cls, name: str) -> str:
        """So that a run is the same run however its sum was spaced."""
        _parse(name)
        return "".join(name.split())

    @model_validator(mode="after")
    def _known(self) -> "LossConfig":
        for summand in self.summands:
            for key, value in summand.given.items():
                fault = summand.loss.parameters[key].fault(value)
                if fault:
                    shown = repr(value) if isinstance(value, str) else str(value)
                    raise ValueError(f"{self.key_of(summand.loss.name, key)}={shown}{fault}")
            switch = summand.loss.weighs_others
            if switch and summand.given.get(switch) and len(self.summands) == 1:
                raise ValueError(
                    f"loss.{switch} weighs the other losses of a sum: write 2*rank_loss+kl, or leave it out"
                )
            start, end = (summand.default_or_given(key) for key in ("t_start", "t_end"))
            if isinstance(start, float) and isinstance(end, float) and start > end:
                raise ValueError(f"loss.t_start={start:g} lies above loss.t_end={end:g}: t only grows; lower it")
            if "t" in summand.given and {"t_start", "t_end"} & summand.given.keys():
                raise ValueError(
                    "loss.t stands still, loss.t_start and loss.t_end say how it moves: give one or the other"
                )
        return self

    def key_of(self, name: str, key: str, section: str = "loss") -> str:
        """How a user writes the parameter of one of the losses."""
        owners = [other for other, _ in _parse(self.name) if key in LOSSES[other].parameters]
        return f"{section}.{key}" if len(owners) == 1 else f"{section}.{name}.{key}"

    def _given(self) -> dict[str, dict[str, Value]]:
        """By loss of the sum, the parameters that were given for it."""
        names = [name for name, _ in _parse(self.name)]
        given: dict[str, dict[str, Value]] = {name: {} for name in names}
        tables: dict[str, Mapping[str, Any]] = {}
        for key, value in (self.model_extra or {}).items():
            if isinstance(value, Mapping):
                tables[key] = self._table(names, key, value)
                continue
            owners = [name for name in names if key in LOSSES[name].parameters]
            if not owners:
                has = ", ".join(dict.fromkeys(key for name in names for key in LOSSES[name].parameters)) or "none"
                raise ValueError(f"loss {self.name} has no parameter {key!r} (it has: {has})")
            if len(owners) > 1:
                raise ValueError(
                    f"loss.{key} is a parameter of {' and '.join(owners)}: say whose, as loss.{owners[0]}.{key}={value}"
                )
            given[owners[0]][key] = value
        for name, table in tables.items():
            twice = given[name].keys() & table.keys()
            if twice:
                key = min(twice)
                raise ValueError(f"loss.{key} is given twice, as loss.{key} and as loss.{name}.{key}: leave one out")
            given[name] |= table
        return {
            name: {key: LOSSES[name].parameters[key].read(value) for key, value in values.items()}
            for name, values in given.items()
        }

    def _table(self, names: list[str], key: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
        if key not in names:
            raise ValueError(f"loss.{key}: {self.name} has no loss of that name (it has: {', '.join(names)})")
        for inner in table:
            if inner not in LOSSES[key].parameters:
                has = ", ".join(LOSSES[key].parameters) or "none"
                raise ValueError(f"loss {key} has no parameter {inner!r} (it has: {has})")
        return table


def _parse(text: str) -> list[tuple[str, float]]:
    """``a+0.5*b`` as names and weights."""
    summands = []
    for part in _PLUS.split(text):
        match = _SUMMAND.fullmatch(part)
        if match is None:
            raise ValueError(f"{text!r} is no sum of losses: write for instance bild+0.5*sft")
        name, weight = match["name"], match["weight"]
        if name not in LOSSES:
            raise ValueError(
                f"no loss is called {name!r}: write one, or a sum as bild+0.5*sft, of {', '.join(sorted(LOSSES))}"
            )
        factor = 1.0 if weight is None else float(weight) if _NUMBER.fullmatch(weight) else math.nan
        if not 0.0 < factor < math.inf:
            raise ValueError(
                f"{part.strip()}: {weight!r} is no weight; write a number above 0 before the *, as 0.5*{name}"
            )
        summands.append((name, factor))
    names = [name for name, _ in summands]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{text} names {name} twice: give it once, with the weight of both")
    return summands
