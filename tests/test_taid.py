"""TAID's schedule, step by step, against its authors' formula."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.distill.taid import TaidSchedule
from workers.losses.catalogue import LOSSES

LOSS = st.floats(0.01, 100.0)
RUNS = st.lists(LOSS, min_size=1, max_size=40)


def on_paper(losses, start=0.4, end=1.0, beta=0.99, alpha=5e-4):
    """t after each step."""
    t, momentum, previous, trace = start, 0.0, None, []
    for step, loss in enumerate(losses, 1):
        if previous is not None:
            change = (previous - loss) / (previous + 1e-15)
            momentum = beta * momentum + (1 - beta) * change
            # The logistic function, by the form that cannot overflow.
            sigmoid = 0.5 * (1 + math.tanh(momentum / 2))
            linear = start + (end - start) * step / len(losses)
            t = min(end, max(linear, t + alpha * sigmoid * (1 - t)))
        previous = loss
        trace.append(t)
    return trace


def follow(schedule, losses, first=0):
    trace = []
    for step, loss in enumerate(losses[first:], first + 1):
        schedule.advance(loss, step / len(losses))
        trace.append(schedule.t)
    return trace


def schedule_of(**given_params):
    return TaidSchedule.of(LOSSES["taid"], LOSSES["taid"].defaults() | given_params)


@given(losses=RUNS, start=st.floats(0.0, 0.6), end=st.floats(0.6, 1.0))
def test_t_moves_as_on_paper(losses, start, end):
    found = follow(schedule_of(t_start=start, t_end=end), losses)
    assert found == pytest.approx(on_paper(losses, start, end), rel=1e-12)


def test_t_starts_at_its_start_and_only_the_second_step_moves_it():
    schedule = schedule_of()
    assert schedule.t == 0.4
    schedule.advance(3.0, 0.5)
    assert schedule.t == 0.4
    schedule.advance(2.0, 0.6)
    assert schedule.t == pytest.approx(0.4 + 0.6 * 0.6)


def test_t_runs_ahead_of_the_run_while_the_loss_falls_and_faster_the_faster_it_falls():
    ends = []
    for scale in (0.5, 1.0, 1.5):
        schedule = schedule_of()
        for step in range(200):
            schedule.advance(scale**step, 0.0)
        ends.append(schedule.t)
    assert ends[0] > ends[1] > ends[2] > 0.4


@given(losses=RUNS, start=st.floats(0.0, 0.5), end=st.floats(0.5, 1.0))
def test_t_never_falls_and_never_passes_its_end(losses, start, end):
    trace = [start, *follow(schedule_of(t_start=start, t_end=end), losses)]
    assert trace == sorted(trace)
    assert trace[-1] <= end


def test_a_finished_run_stands_at_the_end():
    assert follow(schedule_of(t_end=0.9), [3.0, 2.0, 1.5])[-1] == 0.9


@given(losses=st.lists(LOSS, min_size=2, max_size=20), data=st.data())
def test_a_restored_schedule_goes_on_as_if_it_had_never_stopped(losses, data):
    stop = data.draw(st.integers(0, len(losses)))
    unbroken = schedule_of()
    trace = follow(unbroken, losses)
    first = schedule_of()
    for step, loss in enumerate(losses[:stop], 1):
        first.advance(loss, step / len(losses))
    second = schedule_of()
    second.restore(first.state())
    assert follow(second, losses, stop) == trace[stop:]
    assert second.state() == unbroken.state()


@pytest.mark.parametrize("before", [1e-9, 1e-5])
def test_a_loss_that_jumps_up_from_next_to_nothing_is_taken(before):
    """With t_start = 0 the first target is the student itself."""
    losses = [before, 1.0, 1.0]
    assert follow(schedule_of(t_start=0.0), losses) == pytest.approx(on_paper(losses, start=0.0))


def test_a_loss_of_nothing_moves_nothing():
    schedule = schedule_of()
    schedule.advance(2.0, 0.1)
    before = schedule.state()
    schedule.advance(0.0, 0.5)
    assert schedule.state() == before


def test_a_t_that_was_given_stays():
    assert schedule_of(t=0.4) is None


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"taid"}))
def test_other_losses_have_no_schedule(name):
    assert TaidSchedule.of(LOSSES[name], LOSSES[name].defaults()) is None
