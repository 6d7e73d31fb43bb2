"""``pipeline losses``: the catalogue in words and numbers."""

import json
import math
import textwrap
from collections.abc import Iterable
from typing import Any

from workers.errors import InputError
from workers.losses.catalogue import LOSSES
from workers.losses.loss import FULL_ROW, Loss, Need, Parameter

_WIDTH = 110
_ASKS: dict[frozenset[Need], str] = {
    frozenset({"top_k"}): "From any top-k cache",
    frozenset({"top_k", "logsumexp"}): "From any top-k cache that holds the log-sum-exp at the loss's temperature",
    frozenset({"top_k", "lookups"}): "With the teacher's logits at the student's ids (hidden states, or --teacher)",
    FULL_ROW: "With the teacher's whole rows (hidden states, or --teacher)",
    frozenset({"samples"}): "From a cache of draws (--sampling random)",
    frozenset(): "From any cache, without the teacher",
}


def facts_of_losses(name: str | None) -> list[dict[str, Any]]:
    """Of every loss, or of one.

    Raises:
        InputError: no loss has that name.
    """
    if name is not None and name not in LOSSES:
        raise InputError(f"no loss is called {name!r}: choose one of {', '.join(sorted(LOSSES))}.")
    return [_facts(loss) for loss in LOSSES.values() if name in (None, loss.name)]


def losses_in_words(facts: list[dict[str, Any]]) -> str:
    """One in full; many as a list by what they ask of a cache."""
    if len(facts) == 1:
        return "\n".join(_in_full(facts[0]))
    lines: list[str] = []
    for needs, asks in _ASKS.items():
        group = [loss for loss in facts if _group(loss["needs"]) == needs]
        if group:
            lines += [asks, *(line for loss in group for line in _in_short(loss)), ""]
    return "\n".join([*lines, "`pipeline losses NAME` tells a loss's parameters; a sum is written bild+0.5*sft."])


def _group(needs: Iterable[Need]) -> frozenset[Need]:
    if "full_row" in needs:
        return FULL_ROW
    return frozenset({"top_k", "lookups"}) if "lookups" in needs else frozenset(needs)


def _facts(loss: Loss) -> dict[str, Any]:
    return {
        "name": loss.name,
        "needs": sorted(loss.needs),
        "source": loss.source,
        "reason": loss.reason,
        "parameters": {key: _facts_of_parameter(parameter) for key, parameter in loss.parameters.items()},
    }


def _facts_of_parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "default": parameter.default,
        "minimum": parameter.minimum if math.isfinite(parameter.minimum) else None,
        "maximum": parameter.maximum if math.isfinite(parameter.maximum) else None,
        "choices": list(parameter.choices) or None,
        "meaning": parameter.meaning,
    }


def _in_short(loss: dict[str, Any]) -> list[str]:
    head = f"  {loss['name']:<18}"
    return textwrap.wrap(f"{head}{loss['reason']}", _WIDTH, subsequent_indent=" " * len(head))


def _in_full(loss: dict[str, Any]) -> list[str]:
    lines = [
        f"{loss['name']}: {loss['reason']}",
        f"  source  {loss['source']}",
        f"  needs   {', '.join(loss['needs']) or 'nothing of the teacher'}",
    ]
    for key, parameter in loss["parameters"].items():
        given = "…" if parameter["default"] is None else json.dumps(parameter["default"]).strip('"')
        lines.append(f"  --set loss.{key}={given}")
        lines += textwrap.wrap(
            f"{parameter['meaning']}{range_in_words(parameter)}", _WIDTH, initial_indent=" " * 6,
            subsequent_indent=" " * 6,
        )  # fmt: skip
    return lines


def range_in_words(parameter: dict[str, Any]) -> str:
    """``; from 0 to 1``, or nothing."""
    if parameter["choices"]:
        return f"; one of {', '.join(parameter['choices'])}"
    least, most = parameter["minimum"], parameter["maximum"]
    if least is None or isinstance(parameter["default"], bool):
        return ""
    return f"; {least:g} or more" if most is None else f"; from {least:g} to {most:g}"
