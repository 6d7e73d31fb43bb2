"""A loss as a user writes it: what a sum and its parameters mean, and the sentence each mistake is refused with."""

import pytest
from pydantic import ValidationError

from workers.distill.loss_config import LossConfig
from workers.losses.catalogue import LOSSES


def summands(name, **params):
    return [(part.loss.name, part.weight, dict(part.given)) for part in LossConfig(name=name, **params).summands]


def refusal(**config):
    with pytest.raises(ValidationError) as caught:
        LossConfig(**config)
    (error,) = caught.value.errors()
    return error["msg"].removeprefix("Value error, ")


# ---- what it means --------------------------------------------------------------------------------------------------


def test_the_loss_is_bild_unless_another_is_named():
    (summand,) = LossConfig().summands
    assert (summand.loss.name, summand.weight, summand.given) == ("bild", 1.0, {})


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_goes_by_its_name_with_its_defaults(name):
    (summand,) = LossConfig(name=name).summands
    assert summand.loss is LOSSES[name]
    assert summand.parameters(top_k=10**6, vocab_size=10**6) == LOSSES[name].defaults()


@pytest.mark.parametrize("name", LOSSES)
def test_every_default_may_be_written_down(name):
    written = {key: value for key, value in LOSSES[name].defaults().items() if value is not None}
    config = f"{name}+2*{'kl' if name == 'sft' else 'sft'}"
    assert summands(config, **{name: written})[0] == (name, 1.0, written)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sft", [("sft", 1.0)]),
        ("bild+0.5*sft", [("bild", 1.0), ("sft", 0.5)]),
        ("0.5*sft + bild", [("sft", 0.5), ("bild", 1.0)]),
        (" 1e-3 * kl + 2 * rkl + t_ld ", [("kl", 1e-3), ("rkl", 2.0), ("t_ld", 1.0)]),
    ],
)
def test_a_sum_has_a_weight_before_each_loss_or_one(text, expected):
    assert summands(text) == [(name, weight, {}) for name, weight in expected]


def test_a_parameter_stands_beside_the_name():
    assert summands("bild", k=4, temperature=2.0) == [("bild", 1.0, {"k": 4, "temperature": 2.0})]


def test_in_a_sum_a_parameter_goes_to_the_one_loss_that_has_it():
    assert summands("bild+0.5*sft", k=4) == [("bild", 1.0, {"k": 4}), ("sft", 0.5, {})]
    assert summands("gjsd+2*rank_loss", beta=0.9, k=7) == [("gjsd", 1.0, {"beta": 0.9}), ("rank_loss", 2.0, {"k": 7})]


def test_what_several_losses_have_stands_in_tables_of_theirs():
    found = summands("kl+0.1*rkl", kl={"temperature": 2.0}, rkl={"temperature": 1.5, "T2": True})
    assert found == [("kl", 1.0, {"temperature": 2.0}), ("rkl", 0.1, {"temperature": 1.5, "T2": True})]


def test_a_table_and_a_parameter_beside_the_name_go_together():
    found = summands("bild+gjsd", beta=0.2, bild={"temperature": 2.0, "k": 9})
    assert found == [("bild", 1.0, {"temperature": 2.0, "k": 9}), ("gjsd", 1.0, {"beta": 0.2})]


def test_a_single_loss_may_have_its_table():
    assert summands("bild", bild={"k": 5}) == [("bild", 1.0, {"k": 5})]


@pytest.mark.parametrize(("name", "key"), [("kl", "temperature"), ("taid", "t"), ("hinge", "margin"), ("gjsd", "beta")])
def test_a_whole_number_serves_as_a_real_one(name, key):
    ((_, _, given),) = summands(name, **{key: 1})
    assert given == {key: 1.0}
    assert type(given[key]) is float


@pytest.mark.parametrize("name", ["topk_kl", "tail_gjsd", "tail_tvd", "logistic_ranking", "hinge"])
def test_a_default_shrinks_to_what_the_cache_stores_and_a_given_number_does_not(name):
    (summand,) = LossConfig(name=name).summands
    assert summand.parameters(top_k=16, vocab_size=100)["k"] == 16
    (summand,) = LossConfig(name=name, k=50).summands
    assert summand.parameters(top_k=16, vocab_size=100)["k"] == 50


def test_a_default_that_needs_no_cache_shrinks_to_the_vocabulary_alone():
    (summand,) = LossConfig(name="topk_ce").summands
    assert summand.parameters(top_k=16, vocab_size=100)["k"] == 100
    assert summand.parameters(top_k=16, vocab_size=10**5)["k"] == 1024


@pytest.mark.parametrize("name", ["bild", "t_ld", "s_ld", "rank_loss"])
def test_the_few_leading_ids_of_other_losses_never_shrink(name):
    (summand,) = LossConfig(name=name).summands
    assert summand.parameters(top_k=2, vocab_size=100)["k"] == LOSSES[name].parameters["k"].default


def test_the_thesis_s_total_brings_a_loss_for_the_prompt_wherever_it_stands_in_a_sum():
    for name in ("bild_total", "sft+bild_total"):
        assert LossConfig(name=name).on_prompt == LossConfig(name="1.0*kl", temperature=1.0)
    assert LossConfig(name="bild+kl").on_prompt is None


def test_a_dynamic_rank_loss_goes_with_others():
    assert summands("2*rank_loss+kl", dynamic=True)[0] == ("rank_loss", 2.0, {"dynamic": True})
    assert summands("rank_loss", dynamic=False) == [("rank_loss", 1.0, {"dynamic": False})]


# ---- what is refused ------------------------------------------------------------------------------------------------


def meaning(name, key):
    return LOSSES[name].parameters[key].meaning


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"name": ""}, "'' is no sum of losses: write for instance bild+0.5*sft"),
        ({"name": "bild+"}, "'bild+' is no sum of losses: write for instance bild+0.5*sft"),
        ({"name": "0.5*"}, "'0.5*' is no sum of losses: write for instance bild+0.5*sft"),
        ({"name": "2*3*kl"}, "'2*3*kl' is no sum of losses: write for instance bild+0.5*sft"),
        ({"name": "-1*sft+kl"}, "-1*sft: '-1' is no weight; write a number above 0 before the *, as 0.5*sft"),
        ({"name": "0*sft"}, "0*sft: '0' is no weight; write a number above 0 before the *, as 0.5*sft"),
        ({"name": "half*sft"}, "half*sft: 'half' is no weight; write a number above 0 before the *, as 0.5*sft"),
        ({"name": "inf*sft"}, "inf*sft: 'inf' is no weight; write a number above 0 before the *, as 0.5*sft"),
        ({"name": "nan*sft"}, "nan*sft: 'nan' is no weight; write a number above 0 before the *, as 0.5*sft"),
        ({"name": "kl+0.5*kl"}, "kl+0.5*kl names kl twice: give it once, with the weight of both"),
        ({"name": "bild", "alpha": 1}, "loss bild has no parameter 'alpha' (it has: k, temperature)"),
        ({"name": "sft", "k": 4}, "loss sft has no parameter 'k' (it has: none)"),
        ({"name": "sft", "sft": {"k": 4}}, "loss sft has no parameter 'k' (it has: none)"),
        ({"name": "kl+tvd", "k": 4}, "loss kl+tvd has no parameter 'k' (it has: temperature, T2)"),
        ({"name": "kl+tvd", "kl": {"k": 4}}, "loss kl has no parameter 'k' (it has: temperature, T2)"),
        ({"name": "kl+tvd", "rkl": {"T2": True}}, "loss.rkl: kl+tvd has no loss of that name (it has: kl, tvd)"),
        (
            {"name": "kl+tvd", "temperature": 2.0},
            "loss.temperature is a parameter of kl and tvd: say whose, as loss.kl.temperature=2.0",
        ),
        ({"name": "bild", "k": 8.0}, "loss.k=8.0 must be of type int"),
        ({"name": "bild", "k": True}, "loss.k=True must be of type int"),
        ({"name": "bild", "k": "8"}, "loss.k='8' must be of type int"),
        ({"name": "bild", "temperature": "hot"}, "loss.temperature='hot' must be of type float"),
        ({"name": "bild", "temperature": True}, "loss.temperature=True must be of type float"),
        ({"name": "bild", "bild": {"k": {"k": 4}}}, "loss.k={'k': 4} must be of type int"),
        ({"name": "kl", "T2": 1}, "loss.T2=1 must be of type bool"),
        ({"name": "taid", "t": "half"}, "loss.t='half' must be of type float"),
        ({"name": "csd", "w1": 1}, "loss.w1=1 must be of type str"),
        ({"name": "csd", "w1": "X"}, f"loss.w1='X': give one of S, T, U: {meaning('csd', 'w1')}"),
        ({"name": "bild", "k": 2}, f"loss.k=2: give at least 3: {meaning('bild', 'k')}"),
        (
            {"name": "kl", "temperature": 0},
            f"loss.temperature=0.0: give at least 0.001: {meaning('kl', 'temperature')}",
        ),
        ({"name": "gjsd", "beta": 1.5}, f"loss.beta=1.5: give at most 1: {meaning('gjsd', 'beta')}"),
        (
            {"name": "logistic_ranking", "k": 129},
            f"loss.k=129: give at most 128: {meaning('logistic_ranking', 'k')}",
        ),
        ({"name": "taid", "t": 1.5}, f"loss.t=1.5: give at most 1: {meaning('taid', 't')}"),
        (
            {"name": "rank_loss", "dynamic": True},
            "loss.dynamic weighs the other losses of a sum: write 2*rank_loss+kl, or leave it out",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_refused_with_what_to_write(config, sentence):
    assert refusal(**config) == sentence


def test_an_unknown_loss_is_refused_with_those_there_are():
    expected = f"no loss is called 'bidl': write one, or a sum as bild+0.5*sft, of {', '.join(sorted(LOSSES))}"
    assert refusal(name="bidl") == expected
    assert refusal(name="kl+0.5*bidl") == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_parameter_is_finite(value):
    assert refusal(name="kl", temperature=value).startswith(f"loss.temperature={value}: give at ")


@pytest.mark.parametrize("name", LOSSES)
def test_every_bound_is_held_and_a_value_on_it_is_taken(name):
    for key, parameter in LOSSES[name].parameters.items():
        step = 1 if isinstance(parameter.default, int) else 1e-9
        for bound, beyond in ((parameter.minimum, -step), (parameter.maximum, step)):
            if abs(bound) != float("inf"):
                on_it = type(parameter.default)(bound) if parameter.default is not None else float(bound)
                beside = {"t_start": 0.0} if key == "t_end" else {}  # which may not lie above it
                assert summands(name, **beside, **{key: on_it}) == [(name, 1.0, {**beside, key: on_it})]
                assert f"loss.{key}={on_it + beyond}: give at " in refusal(name=name, **{key: on_it + beyond})


def test_a_parameter_given_twice_is_refused():
    assert "loss.k" in refusal(name="bild", k=4, bild={"k": 9})


def test_a_start_of_taid_beyond_its_end_is_refused():
    sentence = refusal(name="taid", t_start=0.9, t_end=0.5)
    assert "t_start" in sentence
    assert "t_end" in sentence


def test_a_sum_is_the_same_however_it_is_spaced():
    assert LossConfig(name=" bild + 0.5 * sft ") == LossConfig(name="bild+0.5*sft")


def test_a_config_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        LossConfig().name = "kl"
