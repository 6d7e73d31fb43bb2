"""What moves over a run: numbers of the losses, the losses themselves.

All are functions of the step and the number of steps, so a run that is resumed finds them where they were. In a config
steps are numbered as in ``metrics.jsonl``, from 1, or given as shares of the run; in code ``step`` is the number of
steps done before.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from workers.distill.config_section import ConfigSection
from workers.distill.loss_config import LossConfig, Summand
from workers.errors import InputError
from workers.losses.loss import Parameter

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Step = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Losses = tuple[LossConfig, LossConfig | None]
"""What ``loss`` and ``prompt_loss`` are at one time."""
Section = Literal["loss", "prompt_loss"]
WEIGHT = "weight"
"""How a loss's weight in its sum is addressed, beside its parameters."""


class ScheduleConfig(ConfigSection):
    """One number of a loss that moves from ``start`` to ``end``, and keeps to them before and after."""

    parameter: str
    """A parameter as it is given elsewhere, ``loss.temperature`` or ``loss.kl.temperature``, or the weight of a loss in
    its sum, as ``loss.s_ld.weight``."""
    start: Number
    """Its value until it moves."""
    end: Number
    """Its value when it has moved."""
    shape: Literal["linear", "cosine", "step"] = "linear"
    """``step`` jumps from ``start`` to ``end`` at ``from_step``."""
    from_step: Step | None = None
    """The last step that has ``start``, or with ``step`` the first that has ``end``; None is the first of the run."""
    to_step: Step | None = None
    """The first step that has ``end``; None is the last of the run."""
    from_share: Share | None = None
    """The same by the share of the run that is done before it."""
    to_share: Share | None = None
    """The same by the share of the run that is done with it."""

    @property
    def section(self) -> Section:
        return "loss" if self.parameter.startswith("loss.") else "prompt_loss"

    @property
    def mixes_steps_and_shares(self) -> bool:
        return None not in (self.from_step, self.to_share) or None not in (self.from_share, self.to_step)

    @model_validator(mode="after")
    def _is_written_well(self) -> Self:
        section, *names = self.parameter.split(".")
        if section not in ("loss", "prompt_loss") or len(names) not in (1, 2) or not all(names):
            raise ValueError(
                f"parameter {self.parameter!r} is none: write for instance loss.temperature, loss.s_ld.weight or "
                f"prompt_loss.temperature"
            )
        for side in ("from", "to"):
            if getattr(self, f"{side}_step") is not None and getattr(self, f"{side}_share") is not None:
                raise ValueError(f"{self.parameter} has {side}_step and {side}_share: give one")
        if self.shape == "step":
            if self.to_step is not None or self.to_share is not None:
                raise ValueError(f"{self.parameter} jumps, which takes one step: leave to_step and to_share out")
            if self.from_step in (None, 1) and not self.from_share:
                raise ValueError(f"{self.parameter} jumps at the first step: give from_step or from_share, or no start")
        for first, last in ((self.from_step, self.to_step), (self.from_share, self.to_share)):
            if first is not None and last is not None and first >= last:
                raise ValueError(f"{self.parameter} moves from {first:g} to {last:g}: the end must lie behind")
        return self

    def span(self, num_steps: int) -> tuple[int, int]:
        """The step it moves from, and the one it has moved by."""
        first, last = 1, num_steps
        if self.from_step is not None or self.from_share is not None:
            first = self.from_step or 1 + round((self.from_share or 0.0) * num_steps)
        if self.to_step is not None or self.to_share is not None:
            last = self.to_step or round((self.to_share or 0.0) * num_steps)
        return first, last

    def value(self, step: int, num_steps: int) -> float:
        """In one step of a run."""
        number, (first, last) = step + 1, self.span(num_steps)
        if self.shape == "step":
            return self.start if number < first else self.end
        if number < first:
            return self.start
        if number >= last:
            return self.end
        done = (number - first) / (last - first)
        if self.shape == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return self.start + (self.end - self.start) * done


class SwitchConfig(ConfigSection):
    """Another loss from one step on."""

    step: Annotated[int, Field(strict=True, ge=2)] | None = None
    """The first step with it."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The same by the share of the run that is done before it."""
    loss: LossConfig
    """The loss from then on."""
    prompt_loss: LossConfig | None = None
    """None keeps the one there was."""

    @model_validator(mode="before")
    @classmethod
    def _loss_by_name(cls, values: Any) -> Any:
        if isinstance(values, dict):
            named = {key: {"name": values[key]} for key in ("loss", "prompt_loss") if isinstance(values.get(key), str)}
            for key in ("loss", "prompt_loss"):
                if isinstance(values.get(key), dict) and "name" not in values[key]:
                    raise ValueError(f"{key} has {', '.join(values[key]) or 'nothing'} and no name: add it")
            return {**values, **named}
        return values

    @model_validator(mode="after")
    def _at_one_step(self) -> Self:
        if (self.step is None) == (self.share is None):
            raise ValueError(f"switch to {self.loss.name}: give step or share, and only one")
        return self

    def first(self, num_steps: int) -> int:
        """Steps done before it."""
        return self.step - 1 if self.step is not None else round((self.share or 0.0) * num_steps)


# ---- what a config may say -----------------------------------------------------------------------------------------


def losses_in_turn(loss: LossConfig, prompt_loss: LossConfig | None, switches: Sequence[SwitchConfig]) -> list[Losses]:
    """The losses a run begins with, then those of each switch."""
    turns: list[Losses] = [(loss, prompt_loss)]
    for switch in switches:
        turns.append((switch.loss, switch.prompt_loss or turns[-1][1]))
    return turns


def require_sound(turns: Sequence[Losses], schedules: Sequence[ScheduleConfig]) -> None:
    """Refuse what no cache and no number of steps could mend.

    Raises:
        ValueError: a schedule addresses nothing, or what may not move, or two address one thing; or a switch gives the
            prompt two losses.
    """
    for loss, prompt_loss in turns[1:]:
        if prompt_loss is not None and (loss.on_prompt is not None or prompt_loss.on_prompt is not None):
            both = f"{loss.name} with the prompt loss {prompt_loss.name}"
            raise ValueError(f"a switch gives the prompt two losses, {both}: choose bild in place of bild_total")
    for turn in turns:
        by_address: dict[tuple[str, str, str], ScheduleConfig] = {}
        for schedule in schedules:
            for address in _addressed(schedule, turn):
                other = by_address.setdefault(address, schedule)
                if other is not schedule:
                    raise ValueError(
                        f"schedule moves {other.parameter} twice, also as {schedule.parameter}: give it once"
                    )
    for schedule in schedules:
        if not any(_addressed(schedule, turn) for turn in turns):
            there = ", ".join(dict.fromkeys(name for turn in turns for name in addresses(turn)))
            raise ValueError(f"schedule.parameter={schedule.parameter} is none of this run's: it has {there}")


def require_in_time(schedules: Sequence[ScheduleConfig], switches: Sequence[SwitchConfig], num_steps: int) -> None:
    """Refuse what a run of so many steps would never come to.

    Raises:
        InputError: names the step.
    """
    for schedule in schedules:
        if schedule.from_step is not None and schedule.from_step > num_steps:
            raise InputError(
                f"schedule of {schedule.parameter}: from_step={schedule.from_step} is never reached, the run has "
                f"{num_steps} steps. Lower it, or give from_share."
            )
        if schedule.to_step is not None and schedule.to_step > num_steps:
            raise InputError(
                f"schedule of {schedule.parameter}: to_step={schedule.to_step} lies behind the run's {num_steps} "
                f"steps, so {schedule.end:g} is never reached. Lower it, or give to_share."
            )
        first, last = schedule.span(num_steps)
        if schedule.mixes_steps_and_shares and first >= last:
            raise InputError(
                f"schedule of {schedule.parameter} moves from step {first} to step {last} of {num_steps}: the end must "
                f"lie behind. Give both in steps, or both as shares."
            )
    before = 0
    for switch in switches:
        first = switch.first(num_steps)
        if not before < first < num_steps:
            reason = "is never reached" if first >= num_steps else "leaves the loss before it no step"
            raise InputError(
                f"switch to {switch.loss.name} at step {first + 1} {reason}: the run has {num_steps} steps. Give the "
                f"switches in order, within the run; share in place of step fits any length."
            )
        before = first


def addresses(turn: Losses) -> Iterator[str]:
    """Every number that may be scheduled while these are the losses, as a user writes it."""
    for section, losses in _sections(turn):
        for summand in losses.summands:
            for key, parameter in summand.loss.parameters.items():
                if _is_float(parameter) and _why_fixed(summand, key) is None:
                    yield losses.key_of(summand.loss.name, key, section)
            if summand.loss.prompt is None:
                yield f"{section}.{WEIGHT}" if len(losses.summands) == 1 else f"{section}.{summand.loss.name}.{WEIGHT}"


def moved(schedule: ScheduleConfig, turn: Losses, section: Section, name: str) -> str | None:
    """Which parameter of one of the losses the schedule moves: its key, ``weight``, or None."""
    for its_section, its_name, key in _addressed(schedule, turn):
        if (its_section, its_name) == (section, name):
            return key
    return None


def _sections(turn: Losses) -> Iterator[tuple[Section, LossConfig]]:
    loss, prompt_loss = turn
    yield "loss", loss
    prompt = prompt_loss or loss.on_prompt
    if prompt is not None:
        yield "prompt_loss", prompt


def _addressed(schedule: ScheduleConfig, turn: Losses) -> list[tuple[str, str, str]]:
    """What the schedule moves of these losses, one thing at most: section, loss, key.

    Raises:
        ValueError: several have it; or it may not move, or not so far.
    """
    section, *names, key = schedule.parameter.split(".")
    found = []
    for its_section, losses in _sections(turn):
        if its_section != section:
            continue
        for summand in losses.summands:
            if names in ([], [summand.loss.name]) and (key == WEIGHT or key in summand.loss.parameters):
                found.append((summand, losses))
    if len(found) > 1:
        owners = [summand.loss.name for summand, _ in found]
        raise ValueError(
            f"schedule.parameter={schedule.parameter} is of {' and '.join(owners)}: say whose, as "
            f"{section}.{owners[0]}.{key}"
        )
    for summand, losses in found:
        by_user = turn[0 if section == "loss" else 1] is losses
        _require_movable(schedule, summand, key, by_user=by_user)
    return [(section, summand.loss.name, key) for summand, _ in found]


def _require_movable(schedule: ScheduleConfig, summand: Summand, key: str, *, by_user: bool) -> None:
    written, name = schedule.parameter, summand.loss.name
    if key == WEIGHT:
        if summand.loss.prompt is not None:
            raise ValueError(f"{written}: the weight of {name} is also its prompt loss's. Give bild and a prompt_loss")
        if summand.weight != 1.0 and by_user:
            raise ValueError(f"{name} has the weight {summand.weight:g} and a schedule of it: leave one out")
        if min(schedule.start, schedule.end) < 0:
            raise ValueError(f"schedule of {written}: a weight is 0 at least, this one moves below")
        return
    parameter = summand.loss.parameters[key]
    if not _is_float(parameter):
        kind = type(parameter.default).__name__
        raise ValueError(f"{written} of {name} cannot move: it is of type {kind}, only those of type float do")
    fixed = _why_fixed(summand, key)
    if fixed:
        raise ValueError(f"{written} of {name} cannot move: {fixed}")
    at_odds = {key, "t_start", "t_end"} if key == summand.loss.moves else {key}
    if by_user and at_odds & summand.given.keys():
        raise ValueError(
            f"{name} is given {min(at_odds & summand.given.keys())} and a schedule of {key}: leave one out"
        )
    for side, value in (("start", schedule.start), ("end", schedule.end)):
        fault = parameter.fault(float(value))
        if fault:
            raise ValueError(f"schedule of {written}: {side}={value:g}{fault}")


def _is_float(parameter: Parameter) -> bool:
    return parameter.optional == "float" or type(parameter.default) is float


def _why_fixed(summand: Summand, key: str) -> str | None:
    """Why one of a loss's numbers stays where it is, if it must."""
    if key == "temperature" and "logsumexp" in summand.loss.needs:
        return (
            "it takes the teacher's log-sum-exp, which a cache holds at single temperatures. Choose topk_kl or t_ld, "
            "which the stored top-k serves at any; or kl; or switch to it again at another stored temperature"
        )
    if summand.loss.moves and key in ("t_start", "t_end"):
        return f"it says how {summand.loss.moves} moves of itself. Schedule {summand.loss.moves} in its place"
    return None
