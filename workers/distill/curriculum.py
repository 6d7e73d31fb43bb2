"""The terms of every step of a run whose losses move or change: a function of the step, but for TAID's own target."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from workers.distill.config import DistillConfig
from workers.distill.schedules import (
    WEIGHT,
    Losses,
    ScheduleConfig,
    Section,
    SwitchConfig,
    losses_in_turn,
    moved,
    require_in_time,
)
from workers.distill.taid import TaidSchedule
from workers.distill.terms import Term, terms_of
from workers.losses.loss import Value


@dataclass(frozen=True)
class Phase:
    """Steps that are trained with the same losses."""

    first: int
    """Steps done before it."""
    end: int
    """Steps done after it."""
    losses: Losses
    terms: tuple[Term, ...]
    """With the numbers that do not move."""
    schedules: tuple[dict[str, ScheduleConfig], ...]
    """Of each term, what moves it, by parameter; its weight by ``weight``."""
    first_place: int
    """Terms of the phases before it."""


@dataclass(frozen=True)
class Curriculum:
    """All phases of a run."""

    phases: tuple[Phase, ...]
    num_steps: int
    moving: dict[int, TaidSchedule]
    """By place among the terms of all phases, one after the other: what moves their target. The only state; each begins
    with its phase, whose share that is done it follows."""

    def phase(self, step: int) -> Phase:
        """The one that ``step``, the number of steps done before, is in."""
        return next(phase for phase in reversed(self.phases) if step >= phase.first)

    def terms(self, step: int) -> list[Term]:
        """With what moves where it now stands."""
        phase = self.phase(step)
        return [self._term(phase, place, step) for place in range(len(phase.terms))]

    def logged(self, step: int) -> dict[str, Any]:
        """For the step's record, before ``advance``: every scheduled number by its name, the losses where they switch,
        TAID's t."""
        phase = self.phase(step)
        found: dict[str, Any] = {}
        if len(self.phases) > 1:
            loss, prompt_loss = phase.losses
            found["loss_name"] = loss.name
            found |= {"prompt_loss_name": prompt_loss.name} if prompt_loss else {}
        used = {schedule.parameter: schedule for schedules in phase.schedules for schedule in schedules.values()}
        if used:
            found["scheduled"] = {name: schedule.value(step, self.num_steps) for name, schedule in used.items()}
        moving = [schedule.t for _, schedule in self._moving_in(phase)]
        return found | ({"taid_t": moving} if moving else {})

    def advance(self, step: int, shares: Sequence[float]) -> None:
        """Move TAID's targets after a step.

        Args:
            shares: of each of the step's terms, its share of the loss: over all micro-batches and ranks, with its
                weight.
        """
        phase = self.phase(step)
        done = (step + 1 - phase.first) / (phase.end - phase.first)
        for place, schedule in self._moving_in(phase):
            weight = self._term(phase, place, step).weight
            if weight:
                schedule.advance(shares[place] / weight, done)

    def _moving_in(self, phase: Phase) -> list[tuple[int, TaidSchedule]]:
        """By place in the phase."""
        places = range(len(phase.terms))
        keys = {place: phase.first_place + place for place in places}
        return [(place, self.moving[keys[place]]) for place in places if keys[place] in self.moving]

    def _term(self, phase: Phase, place: int, step: int) -> Term:
        term = phase.terms[place]
        values = {key: schedule.value(step, self.num_steps) for key, schedule in phase.schedules[place].items()}
        weight = values.pop(WEIGHT, term.weight)
        params: dict[str, Value] = {**term.params, **values}
        taid = self.moving.get(phase.first_place + place)
        if taid:
            params[term.loss.moves] = taid.t
        return replace(term, params=params, weight=weight)


def configs_in_turn(config: DistillConfig, switches: Sequence[SwitchConfig]) -> list[DistillConfig]:
    """The config with the losses of each phase: what is asked of caches and teacher must hold for all of them."""
    return [
        config.model_copy(update={"loss": loss, "prompt_loss": prompt_loss})
        for loss, prompt_loss in losses_in_turn(config.loss, config.prompt_loss, switches)
    ]


def curriculum_of(
    config: DistillConfig,
    schedules: Sequence[ScheduleConfig],
    switches: Sequence[SwitchConfig],
    *,
    num_steps: int,
    top_k: int,
    vocab_size: int,
) -> Curriculum:
    """Of a run on caches that store ``top_k`` ids, or more, of ``vocab_size``.

    Raises:
        InputError: the run is too short for a switch or a schedule.
    """
    require_in_time(schedules, switches, num_steps)
    firsts = [0, *(switch.first(num_steps) for switch in switches)]
    phases: list[Phase] = []
    moving: dict[int, TaidSchedule] = {}
    for asked, first, end in zip(configs_in_turn(config, switches), firsts, [*firsts[1:], num_steps], strict=True):
        losses = asked.loss, asked.prompt_loss
        terms = terms_of(asked, top_k, vocab_size)
        movers = [_movers(term, losses, schedules) for term in terms]
        first_place = phases[-1].first_place + len(phases[-1].terms) if phases else 0
        phases.append(Phase(first, end, losses, tuple(terms), tuple(movers), first_place))
        for place, (term, its) in enumerate(zip(terms, movers, strict=True), first_place):
            taid = None if term.loss.moves in its else TaidSchedule.of(term.loss, term.params)
            if taid:
                moving[place] = taid
    return Curriculum(tuple(phases), num_steps, moving)


def _movers(term: Term, losses: Losses, schedules: Sequence[ScheduleConfig]) -> dict[str, ScheduleConfig]:
    """By parameter of the term."""
    section: Section = "loss" if term.part == "response" else "prompt_loss"
    found = {moved(schedule, losses, section, term.loss.name): schedule for schedule in schedules}
    return {key: schedule for key, schedule in found.items() if key is not None}
