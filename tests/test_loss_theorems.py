"""What holds for every loss of the catalogue, by its mathematics: a new loss is held to it, or listed as an exception.

And how the losses on a part of the teacher stand to those on its whole row.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.logits import (
    VARIANTS,
    loss_of,
    random_logits,
    value_and_gradient,
    values_of,
    variant_name,
)
from workers.losses.catalogue import LOSSES
from workers.losses.targets import Targets, TopK

every_variant = pytest.mark.parametrize(("name", "params"), VARIANTS, ids=variant_name)

TIGHT = {"rtol": 1e-10, "atol": 1e-13}
"""Rounding of float64, summed over a few dozen terms of any sign."""

EXPONENTIAL = st.floats(0.1, 10.0)


def params_of(name, params):
    return LOSSES[name].defaults() | params


# ---- every loss -----------------------------------------------------------------------------------------------------

HAS_LOSS_AT_THE_TEACHER = {
    "sft": "its aim is the label",
    "topk_ce": "its aim is the label",
    "rskd": "its aim is what was drawn",
    "nkd": "a cross entropy: the teacher's entropy remains",
    "nkd_bild": "a cross entropy: the teacher's entropy remains",
    "taid-form=ce": "a cross entropy: the target's entropy remains",
    "topk_kl_zero-k=4": "its aim has no tail",
    "logistic_ranking": "no distance is enough",
    "hinge-margin=0.3": "the teacher's own distances may be less than the margin",
    "sinkd": "every row is also compared with other rows",
}
"""Losses that a student equal to its teacher does not bring to zero, and why; with the parameter that makes it so."""

HAS_GRADIENT_AT_THE_TEACHER = HAS_LOSS_AT_THE_TEACHER.keys() - {"taid-form=ce"} | {"topk_kl_raw-k=4"}
"""The target of taid follows the student. The truncated KL is zero at the teacher, and below zero beside it."""

KINKED_AT_THE_TEACHER = {"hinge", "tail_tvd-k=4"}
"""Zero at the teacher, with a corner there: rounding decides which side's gradient it is."""


def is_among(names, name, params):
    full = params_of(name, params)
    return any(wanted == name or wanted in {f"{name}-{key}={value}" for key, value in full.items()} for wanted in names)


@every_variant
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name, params):
    logits = random_logits(0, 8, 12)
    value, gradient = value_and_gradient(name, logits, logits, **params)
    if is_among(HAS_LOSS_AT_THE_TEACHER, name, params):
        assert float(value) > 1e-8
    else:
        assert float(value) == pytest.approx(0, abs=1e-13)
    if is_among(HAS_GRADIENT_AT_THE_TEACHER, name, params):
        assert float(gradient.abs().max()) > 1e-8
    elif not is_among(KINKED_AT_THE_TEACHER, name, params):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)


SEES_A_CONSTANT = "dld-normalize=no"
"""The one loss to which log-probabilities are not as good as logits."""


@every_variant
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_constant_added_to_a_row_changes_nothing(name, params, whose):
    student, teacher = random_logits(0), random_logits(1)
    constants = torch.linspace(-20, 30, 6, dtype=torch.float64).unsqueeze(1)
    expected = value_and_gradient(name, student, teacher, **params)
    moved = (student + constants, teacher) if whose == "student" else (student, teacher + constants)
    found = value_and_gradient(name, *moved, **params)
    if is_among({SEES_A_CONSTANT}, name, params):
        assert float(found[0]) > 2 * float(expected[0])
        return
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1].sum(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


@every_variant
def test_what_an_id_is_called_does_not_matter(name, params):
    student, teacher = random_logits(0), random_logits(1)
    labels, counts = torch.arange(6), random_logits(2).abs().ceil()
    value, gradient = value_and_gradient(name, student, teacher, labels=labels, counts=counts, **params)
    renamed = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    found = value_and_gradient(
        name,
        student[:, renamed],
        teacher[:, renamed],
        labels=renamed.argsort()[labels],
        counts=counts[:, renamed],
        **params,
    )
    torch.testing.assert_close(found, [value, gradient[:, renamed]], **TIGHT)


@every_variant
def test_the_loss_is_the_mean_of_its_positions_unless_they_have_one_value_or_weights(name, params):
    student, teacher = random_logits(0), random_logits(1)
    extras = {"labels": torch.arange(6), "counts": random_logits(2).abs().ceil()}
    alone = [
        loss_of(name, student[[row]], teacher[[row]], **{key: value[[row]] for key, value in extras.items()}, **params)
        for row in range(6)
    ]
    together = loss_of(name, student, teacher, **extras, **params)
    mean = torch.stack(alone).mean()
    if LOSSES[name].group_size:
        assert abs(float(together - mean)) > 1e-3 * float(mean)
    elif LOSSES[name].weights is None:
        torch.testing.assert_close(together, mean, **TIGHT)


@every_variant
def test_the_order_of_positions_does_not_matter(name, params):
    student, teacher = random_logits(0), random_logits(1)
    extras = {"labels": torch.arange(6), "counts": random_logits(2).abs().ceil()}
    value, gradient = value_and_gradient(name, student, teacher, **extras, **params)
    backwards = {key: extra.flip(0) for key, extra in extras.items()}
    found = value_and_gradient(name, student.flip(0), teacher.flip(0), **backwards, **params)
    torch.testing.assert_close(found, [value, gradient.flip(0)], **TIGHT)


def scale_of_temperature(name, temperature):
    return temperature**2 if name == "dkd" else 1.0


TEMPERATURE_ELSEWHERE = {
    "bild_total": "its prompt has temperature 1",
    "nkd": "the label's part has temperature 1, the others' its square as a factor",
    "nkd_bild": "the likeliest id's part has temperature 1",
    "csd": "only the weights have a temperature",
    "csd_mode_seeking": "only the weights have a temperature",
    "csd_mode_covering": "only the weights have a temperature",
    "dld": "only the weights have a temperature",
}


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "temperature" in loss.parameters])
def test_a_temperature_divides_the_logits_of_both_models(name):
    student, teacher = random_logits(0), random_logits(1)
    found = loss_of(name, student, teacher, T=2.5) / scale_of_temperature(name, 2.5)
    expected = loss_of(name, student / 2.5, teacher / 2.5, T=1.0)
    if name in TEMPERATURE_ELSEWHERE:
        assert abs(float(found - expected)) > 1e-3
    else:
        torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "T2" in loss.parameters])
def test_t2_multiplies_by_temperature_squared(name):
    student, teacher = random_logits(0), random_logits(1)
    torch.testing.assert_close(
        value_and_gradient(name, student, teacher, T=3.0, T2=True),
        [9 * part for part in value_and_gradient(name, student, teacher, T=3.0)],
        **TIGHT,
    )


MAY_BE_NEGATIVE = {"topk_kl_raw": "a part of a sum that is not negative"}


@every_variant
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), scale=EXPONENTIAL)
def test_no_loss_is_negative(name, params, seed, scale):
    value = values_of(name, random_logits(seed, 3, scale=scale), random_logits(seed + 1, 3, scale=scale), **params)
    if name not in MAY_BE_NEGATIVE:
        assert float(value.min()) >= -1e-12


def test_the_truncated_kl_is_negative_where_the_student_is_surer_of_the_head():
    teacher = random_logits(0)
    head = teacher.topk(4).indices
    student = teacher.scatter_add(1, head, torch.ones_like(teacher))
    assert float(values_of("topk_kl_raw", student, teacher, k=4).max()) < -1e-4


# ---- a part of the teacher, and its whole ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [12, 1024])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("part", "whole", "params"),
    [("tail_gjsd", "gjsd", {"beta": beta}) for beta in (0.0, 0.1, 0.5, 1.0)]
    + [("tail_tvd", "tvd", {})]
    + [(name, "kl", {}) for name in ("topk_kl", "topk_kl_zero", "topk_kl_raw")],
    ids=str,
)
def test_with_k_equal_to_v_a_part_of_the_teacher_is_the_whole(part, whole, params, temperature, k):
    student, teacher = random_logits(0), random_logits(1)
    torch.testing.assert_close(
        value_and_gradient(part, student, teacher, k=k, T=temperature, **params),
        value_and_gradient(whole, student, teacher, T=temperature, **params),
        **TIGHT,
    )


BUCKETED = [
    *(("tail_gjsd", "gjsd", {"beta": beta}) for beta in (0.0, 0.2, 0.5, 0.9, 1.0)),
    ("tail_tvd", "tvd", {}),
]


@pytest.mark.parametrize(("part", "whole", "params"), BUCKETED, ids=str)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=EXPONENTIAL)
def test_keeping_more_of_the_teacher_never_lowers_a_bucketed_loss(part, whole, params, seed, temperature):
    student, teacher = random_logits(seed, 4, 9), random_logits(seed + 1, 4, 9)
    bounds = [values_of(part, student, teacher, k=k, T=temperature, **params) for k in range(2, 10)]
    bounds.append(values_of(whole, student, teacher, T=temperature, **params))
    for less, more in itertools.pairwise(bounds):
        assert bool((less <= more + 1e-12).all())


@pytest.mark.parametrize(("part", "whole", "params"), BUCKETED, ids=str)
def test_a_bucket_loses_something_wherever_the_models_differ_inside_it(part, whole, params):
    student, teacher = random_logits(0), random_logits(1)
    bound, full = (
        values_of(name, student, teacher, **extra, **params) for name, extra in ((part, {"k": 3}), (whole, {}))
    )
    # Total variation is lost only where p - q changes its sign inside the bucket.
    assert int((bound < 0.999 * full).sum()) >= (4 if part == "tail_tvd" else 6)


def test_the_renormalised_top_k_is_no_bound():
    student, teacher = random_logits(0, 40), random_logits(1, 40)
    at_3, at_4, full = (values_of("topk_kl", student, teacher, k=k, T=1.0) for k in (3, 4, 12))
    assert bool((at_3 > at_4 + 0.1).any())
    assert bool((at_3 > full + 0.1).any())
    assert bool((at_3 < full - 0.1).any())


def test_a_bucket_s_gradient_of_forward_kl_is_the_full_one_on_the_head():
    student, teacher = random_logits(0), random_logits(1)
    part = value_and_gradient("tail_gjsd", student, teacher, k=4, beta=0.0)[1]
    whole = value_and_gradient("gjsd", student, teacher, beta=0.0)[1]
    head = teacher.topk(4).indices
    torch.testing.assert_close(part.gather(1, head), whole.gather(1, head), **TIGHT)
    assert float((part - whole).abs().max()) > 1e-3


def test_the_tail_beyond_the_top_k_of_zero_only_pushes_down():
    student, teacher = random_logits(0), random_logits(1)
    gradient = value_and_gradient("topk_kl_zero", student, teacher, k=4)[1]
    tail = teacher.argsort(dim=1)[:, :8]
    expected = student.softmax(1) / 6
    torch.testing.assert_close(gradient.gather(1, tail), expected.gather(1, tail), **TIGHT)


@pytest.mark.parametrize("times", [1, 5])
def test_counts_in_the_teacher_s_proportions_make_kl(times):
    counts = torch.tensor([[1, 2, 3, 4, 6], [8, 4, 2, 1, 1], [1, 1, 1, 1, 12]])
    student, teacher = random_logits(0, 3, 5), (counts / 16).double().log()
    torch.testing.assert_close(
        value_and_gradient("rskd", student, teacher, counts=times * counts),
        value_and_gradient("kl", student, teacher, T=1.0),
        **TIGHT,
    )


def test_drawn_ids_pull_like_the_teacher_on_average():
    generator = torch.Generator().manual_seed(0)
    student, teacher = random_logits(0, 1, 6, 1.0), random_logits(1, 1, 6, 1.0)
    draws, at_once = 4000, 20
    ids = torch.multinomial(teacher.softmax(1).expand(draws, 6), at_once, replacement=True, generator=generator)
    counts = torch.zeros(draws, 6).scatter_add(1, ids, torch.ones(draws, at_once))
    found = value_and_gradient("rskd", student.expand(draws, 6), teacher.expand(draws, 6), counts=counts)[1].sum(0)
    expected = value_and_gradient("kl", student, teacher, T=1.0)[1][0]
    # Five standard errors of a mean of draws * at_once indicators.
    assert float((found - expected).abs().max()) < 5 * math.sqrt(0.25 / (draws * at_once))
    assert float(expected.abs().max()) > 0.05


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "k" in loss.parameters])
def test_a_cache_may_store_more_ids_than_a_loss_compares(name, temperature):
    """Then the tail below those compared is made of the stored ids between and the stored tail."""
    student, teacher, labels = random_logits(0), random_logits(1), torch.arange(6)
    asked = {"k": 4, "temperature": temperature}
    params = LOSSES[name].defaults() | {key: asked[key] for key in asked.keys() & LOSSES[name].parameters.keys()}
    used = LOSSES[name].temperature(params)

    def values(stored):
        def led(leader):
            order = leader.argsort(dim=1, descending=True)[:, :stored]
            return TopK(order, teacher.gather(1, order), student.gather(1, order))

        beyond = teacher.sort(descending=True).values[:, stored:]
        targets = Targets(
            teacher_led=led(teacher),
            student_led=led(student),
            tails={used: (beyond / used).logsumexp(1)},
            student_row_NV=student,
            labels_N=labels,
            student_label_N=student.gather(1, labels.unsqueeze(1)).squeeze(1),
        )
        return LOSSES[name].values(targets, **params)

    exact = values(4)
    assert bool((exact != 0).any())
    for stored in (5, 8, 12):
        torch.testing.assert_close(values(stored), exact, **TIGHT)
