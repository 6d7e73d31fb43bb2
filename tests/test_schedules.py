"""What moves over a run: the numbers of a schedule, the losses of a switch, and what is refused."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from workers.distill.config import DistillConfig, OptimizerConfig
from workers.distill.curriculum import configs_in_turn, curriculum_of
from workers.distill.learning_rate import learning_rate
from workers.distill.loss_config import LossConfig
from workers.distill.schedules import (
    WEIGHT,
    ScheduleConfig,
    SwitchConfig,
    addresses,
    losses_in_turn,
    require_sound,
)
from workers.distill.terms import terms_of
from workers.errors import InputError
from workers.losses.catalogue import LOSSES

STEPS = st.integers(1, 300)


# ---- learning rate --------------------------------------------------------------------------------------------------


def rates(num_steps, **settings):
    return [learning_rate(step, num_steps, OptimizerConfig(**settings)) for step in range(num_steps)]


@given(num_steps=STEPS, lr=st.floats(1e-8, 10.0), warmup=st.floats(0.0, 1.0))
def test_a_cosine_to_zero_is_bit_for_bit_what_it_was(num_steps, lr, warmup):
    num_warmup = round(warmup * num_steps)
    expected = [
        lr * (step + 1) / num_warmup
        if step < num_warmup
        else lr * 0.5 * (1.0 + math.cos(math.pi * ((step - num_warmup) / max(1, num_steps - num_warmup))))
        for step in range(num_steps)
    ]
    assert rates(num_steps, lr=lr, warmup=warmup) == expected


@given(num_steps=STEPS, warmup=st.floats(0.0, 0.9), ratio=st.floats(0.0, 1.0))
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_rises_to_the_peak_and_falls_to_its_share_of_it(schedule, num_steps, warmup, ratio):
    found = rates(num_steps, lr=2.0, schedule=schedule, warmup=warmup, min_lr_ratio=ratio)
    num_warmup = round(warmup * num_steps)
    assert found[:num_warmup] == sorted(found[:num_warmup])
    assert found[num_warmup:] == sorted(found[num_warmup:], reverse=True)
    assert max(found) == pytest.approx(2.0)
    after = OptimizerConfig(lr=2.0, schedule=schedule, warmup=warmup, min_lr_ratio=ratio)
    if num_warmup < num_steps:
        assert learning_rate(num_steps, num_steps, after) == pytest.approx(2.0 * ratio)
        assert found[-1] >= 2.0 * ratio * (1 - 1e-12)


def test_a_linear_and_a_constant_rate_on_paper():
    assert rates(6, lr=1.0, schedule="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(6, lr=1.0, schedule="linear", warmup_steps=2, min_lr_ratio=0.5)[2:] == [1.0, 0.875, 0.75, 0.625]
    assert rates(6, lr=1.0, schedule="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_steps_of_warm_up_win_over_a_share_and_none_is_none():
    assert rates(10, warmup=0.5, warmup_steps=2) == rates(10, warmup=0.2)
    assert rates(10, warmup=0.5, warmup_steps=0) == rates(10, warmup=0.0)
    assert rates(3, lr=1.0, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])  # a run cut short in its warm-up


# ---- one schedule ---------------------------------------------------------------------------------------------------


def schedule(parameter="loss.temperature", start=1.0, end=3.0, **more):
    return ScheduleConfig(parameter=parameter, start=start, end=end, **more)


def values(num_steps, **more):
    its = schedule(**more)
    return [its.value(step, num_steps) for step in range(num_steps)]


@given(
    num_steps=st.integers(2, 300), start=st.floats(0.0, 1e6), end=st.floats(0.0, 1e6),
    shape=st.sampled_from(["linear", "cosine"]),
)  # fmt: skip
def test_over_a_whole_run_the_first_step_has_the_start_and_the_last_the_end(num_steps, start, end, shape):
    found = values(num_steps, start=start, end=end, shape=shape)
    assert (found[0], found[-1]) == (start, end)
    slack = 1e-9 * (1 + abs(end - start))
    steps = [(second - first) * math.copysign(1, end - start) for first, second in pairwise(found)]
    assert all(step >= -slack for step in steps)
    assert all(min(start, end) <= value <= max(start, end) for value in found)


@given(num_steps=STEPS, first=st.integers(1, 300), length=st.integers(1, 300))
def test_it_keeps_to_start_and_end_outside_its_steps(num_steps, first, length):
    found = values(num_steps, from_step=first, to_step=first + length)
    assert all(value == 1.0 for value in found[:first])
    assert all(value == 3.0 for value in found[first + length - 1 :])
    assert all(1.0 < value < 3.0 for value in found[first : first + length - 1])


def test_steps_are_counted_as_in_the_metrics():
    assert values(7, from_step=2, to_step=6) == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert values(5, shape="cosine") == pytest.approx([1.0, 2 - 0.5**0.5, 2.0, 2 + 0.5**0.5, 3.0])
    assert values(5, shape="step", from_step=3) == [1.0, 1.0, 3.0, 3.0, 3.0]


def test_a_share_is_of_the_steps_done():
    assert values(10, shape="step", from_share=0.5) == [1.0] * 5 + [3.0] * 5
    assert values(10, from_share=0.2, to_share=0.7) == values(10, from_step=3, to_step=7)
    assert values(10, from_share=0.0, to_share=1.0) == values(10)
    assert values(2, from_share=0.4, to_share=0.6) == [1.0, 3.0]  # a run too short to move in
    assert values(1) == [3.0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"parameter": "temperature"}, "parameter 'temperature' is none: write for instance loss.temperature"),
        ({"parameter": "optimizer.lr"}, "parameter 'optimizer.lr' is none"),
        ({"parameter": "loss"}, "parameter 'loss' is none"),
        ({"parameter": "loss."}, "parameter 'loss.' is none"),
        ({"parameter": "loss.kl.temperature.x"}, "parameter 'loss.kl.temperature.x' is none"),
        ({"from_step": 2, "from_share": 0.5}, "has from_step and from_share: give one"),
        ({"to_step": 2, "to_share": 0.5}, "has to_step and to_share: give one"),
        ({"from_step": 5, "to_step": 5}, "moves from 5 to 5: the end must lie behind"),
        ({"from_share": 0.5, "to_share": 0.25}, "moves from 0.5 to 0.25: the end must lie behind"),
        ({"shape": "step", "from_step": 3, "to_step": 4}, "jumps, which takes one step: leave to_step"),
        ({"shape": "step"}, "jumps at the first step: give from_step or from_share"),
        ({"shape": "step", "from_step": 1}, "jumps at the first step"),
        ({"from_step": 0}, "from_step"),
        ({"start": True}, "start"),
        ({"end": float("inf")}, "end"),
        ({"shape": "exponential"}, "shape"),
        ({"from": 3}, "from"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(given, sentence):
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        schedule(**given)


# ---- what may be scheduled ------------------------------------------------------------------------------------------

FLOATS = [
    (name, key)
    for name, loss in LOSSES.items()
    for key, parameter in loss.parameters.items()
    if parameter.optional == "float" or type(parameter.default) is float
]
FIXED = {
    *((name, "temperature") for name in ("topk_kl_raw", "tail_gjsd", "tail_tvd")),
    ("taid", "t_start"),
    ("taid", "t_end"),
}


def two_values(name, key):
    """Two that the parameter may have, other than its default."""
    parameter = LOSSES[name].parameters[key]
    low, high = max(parameter.minimum, 0.25), min(parameter.maximum, 0.75)
    assert low < high
    return low, high


def run(loss, schedules=(), switches=(), num_steps=10, prompt_loss=None, top_k=64):
    """A curriculum, after the checks of its config."""
    config = DistillConfig(cache="c", student="s", loss=loss, prompt_loss=prompt_loss)
    require_sound(losses_in_turn(config.loss, config.prompt_loss, switches), schedules)
    return curriculum_of(config, schedules, switches, num_steps=num_steps, top_k=top_k, vocab_size=1000)


@pytest.mark.parametrize(("name", "key"), FLOATS)
def test_every_number_of_every_loss_can_be_scheduled_or_says_why_not(name, key):
    start, end = two_values(name, key)
    for parameter in (f"loss.{key}", f"loss.{name}.{key}"):
        its = schedule(parameter, start, end)
        if (name, key) in FIXED:
            with pytest.raises(ValueError, match=re.escape(f"{parameter} of {name} cannot move: it ")):
                run(name, [its])
            continue
        curriculum = run(name, [its])
        found = [curriculum.terms(step)[0].params[key] for step in range(10)]
        assert found == [its.value(step, 10) for step in range(10)]
        assert (found[0], found[-1]) == (start, end)
        assert [curriculum.logged(step)["scheduled"] for step in range(10)] == [{parameter: value} for value in found]


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_listed_can_be_scheduled_and_nothing_else_of_a_term_moves(name):
    config = LossConfig(name=name)
    unmoved = run(name).terms(0)
    for parameter in addresses((config, None)):
        key = parameter.rpartition(".")[2]
        section = parameter.partition(".")[0]
        part = "response" if section == "loss" else "prompt"
        owner = next(term for term in unmoved if term.part == part)
        start, end = (0.5, 2.0) if key == WEIGHT else two_values(owner.loss.name, key)
        curriculum = run(name, [schedule(parameter, start, end)])
        for before, now in zip(unmoved, curriculum.terms(9), strict=True):
            moved = before.part == part
            assert now.weight == (end if moved and key == WEIGHT else before.weight)
            expected = {**before.params, **({key: end} if moved and key != WEIGHT else {})}
            assert now.params == expected
            assert (now.loss, now.part) == (before.loss, before.part)


def test_no_loss_has_a_parameter_that_its_weight_would_hide():
    assert all(WEIGHT not in loss.parameters for loss in LOSSES.values())


def test_the_weight_of_s_ld_grows_beside_t_ld():
    curriculum = run("t_ld+s_ld", [schedule("loss.s_ld.weight", 0.0, 1.0)], num_steps=5)
    assert [[term.weight for term in curriculum.terms(step)] for step in range(5)] == [
        [1.0, 0.0], [1.0, 0.25], [1.0, 0.5], [1.0, 0.75], [1.0, 1.0],
    ]  # fmt: skip


def test_a_prompt_loss_moves_apart_from_the_response_s():
    moving = [schedule("prompt_loss.temperature", 1.0, 2.0), schedule("loss.temperature", 4.0, 3.0)]
    for curriculum in (run("bild", moving, prompt_loss="kl"), run("bild_total", moving)):
        assert [(term.part, term.params["temperature"]) for term in curriculum.terms(9)] == [
            ("response", 3.0), ("prompt", 2.0),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "parameter", "more", "sentence"),
    [
        ("bild", "loss.k", {}, "loss.k of bild cannot move: it is of type int, only those of type float do"),
        ("kl", "loss.T2", {}, "loss.T2 of kl cannot move: it is of type bool"),
        ("csd", "loss.w1", {}, "loss.w1 of csd cannot move: it is of type str"),
        ("bild", "loss.beta", {}, "loss.beta is none of this run's: it has loss.temperature, loss.weight"),
        ("bild", "loss.kl.temperature", {}, "loss.kl.temperature is none of this run's"),
        ("bild", "prompt_loss.temperature", {}, "prompt_loss.temperature is none of this run's"),
        ("kl+rkl", "loss.temperature", {}, "is of kl and rkl: say whose, as loss.kl.temperature"),
        ("kl+rkl", "loss.weight", {}, "is of kl and rkl: say whose, as loss.kl.weight"),
        ("kl+0.5*rkl", "loss.rkl.weight", {}, "rkl has the weight 0.5 and a schedule of it: leave one out"),
        ("kl", "loss.weight", {"start": -1.0}, "schedule of loss.weight: a weight is 0 at least"),
        ("bild_total", "loss.weight", {}, "the weight of bild_total is also its prompt loss's. Give bild and"),
        ("kl", "loss.temperature", {"start": 0.0}, "schedule of loss.temperature: start=0: give at least 0.001"),
        ("gjsd", "loss.beta", {"end": 1.5}, "schedule of loss.beta: end=1.5: give at most 1"),
        (
            "tail_gjsd", "loss.temperature", {},
            "loss.temperature of tail_gjsd cannot move: it takes the teacher's log-sum-exp, which a cache holds at "
            "single temperatures. Choose topk_kl or t_ld",
        ),
        ("taid", "loss.t_start", {}, "loss.t_start of taid cannot move: it says how t moves of itself. Schedule t"),
    ],
)  # fmt: skip
def test_what_cannot_move_is_refused(loss, parameter, more, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run(loss, [schedule(parameter, **{"start": 0.5, "end": 1.0, **more})])


def test_a_number_that_is_given_and_scheduled_is_refused():
    with pytest.raises(ValueError, match="kl is given temperature and a schedule of temperature: leave one out"):
        run({"name": "kl", "temperature": 2.0}, [schedule()])
    with pytest.raises(ValueError, match="taid is given t_start and a schedule of t: leave one out"):
        run({"name": "taid", "t_start": 0.5}, [schedule("loss.t", 0.0, 1.0)])


def test_one_number_has_one_schedule():
    with pytest.raises(ValueError, match=r"moves loss\.temperature twice, also as loss\.kl\.temperature"):
        run("kl", [schedule(), schedule("loss.kl.temperature")])
    with pytest.raises(ValueError, match=r"moves loss\.temperature twice, also as loss\.temperature"):
        run("kl", [schedule(), schedule()])


# ---- switches -------------------------------------------------------------------------------------------------------


def switch(loss, **more):
    return SwitchConfig(loss=loss, **more)


def names(curriculum):
    return ["+".join(term.loss.name for term in curriculum.terms(step)) for step in range(curriculum.num_steps)]


def test_without_schedules_and_switches_every_step_has_the_terms_of_the_config():
    curriculum = run("bild+0.5*sft", prompt_loss="kl")
    config = DistillConfig(cache="c", student="s", loss="bild+0.5*sft", prompt_loss="kl")
    assert all(curriculum.terms(step) == terms_of(config, 64, 1000) for step in range(10))
    assert curriculum.logged(3) == {}


def test_a_switch_is_there_from_its_step_on_and_logged():
    curriculum = run("t_ld", switches=[switch("bild+sft", step=4), switch("kl", share=0.8)])
    assert names(curriculum) == ["t_ld"] * 3 + ["bild+sft"] * 5 + ["kl"] * 2
    logged = [curriculum.logged(step) for step in range(10)]
    assert logged == [{"loss_name": name} for name in names(curriculum)]


def test_a_prompt_loss_stays_through_a_switch_that_names_none():
    kept, other = switch("kl", step=3), switch("kl", step=5, prompt_loss="rkl")
    curriculum = run("bild", switches=[kept, other], prompt_loss="sft")
    parts = [[(term.part, term.loss.name) for term in curriculum.terms(step)][1] for step in range(10)]
    assert parts == [("prompt", "sft")] * 4 + [("prompt", "rkl")] * 6
    assert curriculum.logged(9) == {"loss_name": "kl", "prompt_loss_name": "rkl"}


def test_a_schedule_goes_on_through_a_switch_in_every_loss_that_has_its_parameter():
    its = schedule()
    curriculum = run("kl", [its], [switch("sft", step=4), switch("rkl", step=7)])
    found = [curriculum.terms(step)[0].params.get("temperature") for step in range(10)]
    assert found == [None if 3 <= step < 6 else its.value(step, 10) for step in range(10)]
    assert ["scheduled" in curriculum.logged(step) for step in range(10)] == [value is not None for value in found]


def test_a_schedule_of_a_loss_by_name_leaves_the_same_parameter_of_others_alone():
    curriculum = run("kl", [schedule("loss.kl.temperature")], [switch({"name": "rkl", "temperature": 5.0}, step=6)])
    assert [curriculum.terms(step)[0].params["temperature"] for step in (4, 5, 9)] == [1.0 + 2 * 4 / 9, 5.0, 5.0]


def test_a_schedule_may_wait_for_the_loss_of_a_switch():
    curriculum = run("sft", [schedule("loss.beta", 0.0, 1.0, from_step=5)], [switch("gjsd", step=5)])
    assert [curriculum.terms(step)[0].params["beta"] for step in (4, 9)] == [0.0, 1.0]


def test_the_configs_in_turn_are_those_of_all_losses_of_the_run():
    config = DistillConfig(cache="c", student="s", loss="t_ld", seed=5)
    found = configs_in_turn(config, [switch("kl", step=4), switch({"name": "bild", "k": 9}, step=6)])
    assert [item.loss for item in found] == [
        LossConfig(name="t_ld"),
        LossConfig(name="kl"),
        LossConfig(name="bild", k=9),
    ]
    assert found[0] == config
    assert [item.model_copy(update={"loss": config.loss}) for item in found] == [config] * 3


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"loss": "kl"}, "switch to kl: give step or share, and only one"),
        ({"loss": "kl", "step": 3, "share": 0.5}, "switch to kl: give step or share, and only one"),
        ({"loss": "kl", "step": 1}, "step"),
        ({"loss": "kl", "share": 1.0}, "share"),
        ({"loss": "nll", "step": 3}, "no loss is called 'nll'"),
        ({"loss": {"k": 3}, "step": 3}, "loss has k and no name: add it"),
        ({"loss": "kl", "prompt_loss": {"temperature": 3.0}, "step": 3}, "prompt_loss has temperature and no name"),
        ({"step": 3}, "loss"),
    ],
)
def test_a_switch_that_makes_no_sense_is_refused(given, sentence):
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        SwitchConfig(**given)


def test_a_switch_gives_the_prompt_one_loss():
    for switches in ([switch("bild_total", step=3)], [switch("bild", step=3, prompt_loss="bild_total")]):
        with pytest.raises(ValueError, match=r"gives the prompt two losses, .*: choose bild in place of bild_total"):
            run("bild", switches=switches, prompt_loss="kl")


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ([{"step": 11}], "switch to kl at step 11 is never reached: the run has 10 steps"),
        ([{"share": 0.01}], "switch to kl at step 1 leaves the loss before it no step"),
        ([{"step": 5}, {"step": 5}], "switch to kl at step 5 leaves the loss before it no step"),
        ([{"step": 8}, {"share": 0.3}], "switch to kl at step 4 leaves the loss before it no step"),
    ],
)
def test_switches_follow_one_another_within_the_run(switches, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        run("bild", switches=[switch("kl", **each) for each in switches])


def test_a_schedule_that_would_never_begin_is_refused():
    with pytest.raises(InputError, match="from_step=11 is never reached, the run has 10 steps"):
        run("kl", [schedule(from_step=11)])


# ---- resuming -------------------------------------------------------------------------------------------------------


def follow(curriculum, first, last):
    """Terms and records of some steps, whose losses TAID is told."""
    trace = []
    for step in range(first, last):
        trace.append((curriculum.terms(step), curriculum.logged(step)))
        curriculum.advance(step, [5.0 / (step + 1 + place) for place in range(len(curriculum.terms(step)))])
    return trace


def rich_run():
    """TAID before and after a switch, with schedules beside it."""
    return run(
        "taid+sft",
        [schedule("loss.sft.weight", 0.0, 1.0), schedule("loss.taid.temperature", 1.0, 2.0, shape="cosine")],
        [switch("0.5*kl+2*taid", step=6)],
        num_steps=12,
        prompt_loss="taid",
    )


@pytest.mark.parametrize("stop", range(13))
def test_a_run_resumed_at_any_step_sees_what_an_unbroken_run_sees(stop):
    whole, before, after = rich_run(), rich_run(), rich_run()
    trace = follow(whole, 0, 12)
    assert follow(before, 0, stop) == trace[:stop]
    assert after.moving.keys() == before.moving.keys()
    for place, taid in after.moving.items():
        taid.restore(before.moving[place].state())
    assert follow(after, stop, 12) == trace[stop:]
    assert {place: taid.state() for place, taid in after.moving.items()} == {
        place: taid.state() for place, taid in whole.moving.items()
    }


def test_a_run_without_taid_has_no_state():
    steps = [schedule("loss.temperature", 1.0, 2.0), schedule("loss.weight", 0.0, 1.0)]
    curriculum = run("kl", steps, [switch("sft", step=5)])
    assert curriculum.moving == {}
    forwards = [curriculum.terms(step) for step in range(10)]
    assert [curriculum.terms(step) for step in reversed(range(10))] == forwards[::-1]


def test_the_targets_of_taid_are_told_apart_by_their_place_in_the_run():
    curriculum = rich_run()
    assert list(curriculum.moving) == [0, 2, 4, 5]  # taid, sft, taid of the prompt; kl, taid, taid of the prompt
    assert [len(curriculum.logged(step)["taid_t"]) for step in range(12)] == [2] * 12
    follow(curriculum, 0, 5)
    assert curriculum.moving[0].t > curriculum.moving[4].t == 0.4


def test_taid_ends_with_its_phase_and_begins_with_it():
    curriculum = run("taid", switches=[switch("taid", step=6)])
    moved = [record["taid_t"][0] for _, record in follow(curriculum, 0, 10)]
    assert moved[0] == moved[5] == 0.4
    assert moved[:5] == sorted(moved[:5])
    assert curriculum.moving[0].t == 1.0
    assert curriculum.moving[1].t == 1.0


def test_taid_is_told_its_loss_without_the_weight_and_nothing_of_a_step_without_any():
    plain, weighed = run("taid"), run("taid", [schedule("loss.weight", 0.0, 4.5)])
    for step in range(10):
        weight = weighed.terms(step)[0].weight
        assert weight == step / 2
        weighed.advance(step, [weight * 2.0**-step])
        if weight:
            plain.advance(step, [2.0**-step])
        assert weighed.moving[0].state() == pytest.approx(plain.moving[0].state())


def test_a_scheduled_t_takes_the_place_of_taid_s_own():
    curriculum = run("taid", [schedule("loss.t", 0.0, 1.0)])
    assert curriculum.moving == {}
    assert [curriculum.terms(step)[0].params["t"] for step in (0, 9)] == [0.0, 1.0]
