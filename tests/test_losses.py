"""Every loss of the catalogue on dense logits, against independent definitions."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.logits import loss_of, random_logits, value_and_gradient
from tests.plain_losses import PLAIN, PLAIN_AT_K_4
from workers.losses.catalogue import LOSSES
from workers.losses.dense import dense_loss

ORACLES = json.loads((Path(__file__).parent / "oracles" / "losses.json").read_text())
"""Values and gradients in float64 from an independent pure-Python implementation."""

CASES = [case for case in ORACLES["cases"] if case["loss"] in LOSSES]
SURROGATES = [case for case in ORACLES["cases"] if case["loss"] == "csd_surrogate"]

ORACLE_ELSEWHERE = {
    "sft": "torch's cross entropy",
    "csd_mode_seeking": "csd with the weights S and S",
    "csd_mode_covering": "csd with the weights T and S",
}

EPSILON = torch.finfo(torch.float32).eps


def case_name(case):
    params = ",".join(f"{key}={value}" for key, value in case["params"].items())
    return f"{case['loss']}-{case['dataset']}-{params}"


def problem_of(case):
    """The case's student, teacher and mask, and what else a loss may ask for."""
    dataset = ORACLES["datasets"][case["dataset"]]
    student, teacher = (torch.tensor(dataset[key], dtype=torch.float64) for key in ("student", "teacher"))
    labels, counts, prompt = (
        torch.tensor([extra[key] for extra in dataset["extras"]]) for key in ("label", "counts", "prompt")
    )
    return student, teacher, torch.tensor(dataset["mask"]), {"labels": labels, "counts": counts, "prompt_mask": prompt}


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_every_loss_has_an_oracle():
    covered = {case["loss"] for case in ORACLES["cases"]} - {"csd_surrogate"}
    assert covered | ORACLE_ELSEWHERE.keys() == LOSSES.keys()
    assert not covered & ORACLE_ELSEWHERE.keys()
    assert len(CASES) + len(SURROGATES) == len(ORACLES["cases"])


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_value_and_gradient_are_the_oracle_s(case):
    student, teacher, mask, extras = problem_of(case)
    value, gradient = value_and_gradient(case["loss"], student, teacher, mask, **extras, **case["params"])
    close(value, case["expected"])
    close(gradient, case["expected_grad"])


@pytest.mark.parametrize("case", [case for case in CASES if "per_position" in case], ids=case_name)
def test_values_come_position_by_position(case):
    assert not LOSSES[case["loss"]].group_size
    assert LOSSES[case["loss"]].weights is None
    student, teacher, mask, extras = problem_of(case)
    for position in mask.nonzero().flatten().tolist():
        row = slice(position, position + 1)
        value = dense_loss(
            case["loss"],
            student[row],
            teacher[row],
            mask[row],
            **{key: extra[row] for key, extra in extras.items()},
            **case["params"],
        )
        close(value, case["per_position"][position])


@pytest.mark.parametrize("case", SURROGATES, ids=case_name)
def test_the_gradient_of_the_authors_surrogate_of_csd_is_half_of_csd_s(case):
    student, teacher, mask, extras = problem_of(case)
    gradient = value_and_gradient("csd", student, teacher, mask, **extras, **case["params"])[1]
    close(gradient / 2, case["expected_grad"])


@pytest.mark.parametrize(("name", "weights"), [("csd_mode_seeking", "SS"), ("csd_mode_covering", "TS")])
def test_the_modes_of_csd_are_csd_with_their_weights(name, weights):
    student, teacher = random_logits(0), random_logits(1)
    expected = value_and_gradient("csd", student, teacher, w1=weights[0], w2=weights[1])
    torch.testing.assert_close(value_and_gradient(name, student, teacher), expected, rtol=0, atol=0)


def test_sft_is_torch_cross_entropy_of_the_labels_that_count():
    student, labels = random_logits(0), torch.tensor([3, 0, 11, 5, 5, 7])
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    reference = student.clone().requires_grad_()
    expected = F.cross_entropy(reference, torch.where(mask.bool(), labels, -100))
    expected.backward()
    found = value_and_gradient("sft", student, random_logits(1), mask, labels=labels)
    torch.testing.assert_close(found, [expected.detach(), reference.grad], rtol=1e-12, atol=1e-15)


def test_the_total_of_bild_is_the_mean_of_each_part_added_up():
    student, teacher = random_logits(0, 9), random_logits(1, 9)
    response, prompt = torch.arange(9) > 5, torch.arange(9) < 4
    total = value_and_gradient("bild_total", student, teacher, response, prompt_mask=prompt, k=5)
    parts = (
        value_and_gradient("bild", student, teacher, response, k=5),
        value_and_gradient("kl", student, teacher, prompt, T=1.0),
    )
    torch.testing.assert_close(total, [sum(part) for part in zip(*parts, strict=True)], rtol=1e-12, atol=1e-15)


PLAIN_CASES = [pytest.param(name, {}, plain, id=name) for name, plain in PLAIN.items()] + [
    pytest.param(name, {"k": 4}, plain, id=f"{name}-k=4") for name, plain in PLAIN_AT_K_4.items()
]


def on_paper(plain, student, teacher, labels, precision):
    """Value and gradient of the plain formula, computed in a precision."""
    leaf = student.clone().requires_grad_()
    value = plain(leaf.to(precision), teacher.to(precision), labels).mean()
    return [value.detach(), *torch.autograd.grad(value, leaf)]


@pytest.mark.parametrize(("name", "params", "plain"), PLAIN_CASES)
def test_a_loss_is_what_its_plain_formula_says(name, params, plain):
    student, teacher, labels = random_logits(0, 8, 30), random_logits(1, 8, 30), torch.arange(8) * 7 % 30
    expected = on_paper(plain, student, teacher, labels, torch.float64)
    found = value_and_gradient(name, student, teacher, labels=labels, **params)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "params", "plain"), PLAIN_CASES)
def test_low_precision_logits_are_no_worse_than_the_plain_formula_in_float32(name, params, plain, dtype):
    student, teacher = random_logits(0, 64, 100).to(dtype), random_logits(1, 64, 100).to(dtype)
    labels = torch.arange(64) * 7 % 100
    truth = on_paper(plain, student.double(), teacher, labels, torch.float64)
    found = value_and_gradient(name, student, teacher, labels=labels, **params)
    reference = on_paper(plain, student, teacher, labels, torch.float32)
    assert found[0].dtype == torch.float32
    for ours, plains, exact in zip(found, reference, truth, strict=True):
        error, allowed = (float((result.double() - exact).abs().max()) for result in (ours, plains))
        # An error may be zero by luck: a few roundings are allowed whatever the plain formula's.
        assert error <= 4 * allowed + 4 * EPSILON * float(exact.abs().max())


@pytest.mark.parametrize("name", LOSSES)
def test_no_trained_position_is_a_zero_loss_that_backpropagates(name):
    student, teacher = random_logits(0), random_logits(1)
    value, gradient = value_and_gradient(name, student, teacher, torch.zeros(6))
    assert float(value) == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_in_a_masked_row_does_not_matter(name):
    student, teacher = random_logits(0), random_logits(1)
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    expected = value_and_gradient(name, student, teacher, mask)
    student[2], teacher[4], student[4, 0] = torch.nan, torch.inf, -torch.inf
    found = value_and_gradient(name, student, teacher, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert bool((found[1][mask == 1] != 0).any())
    assert not found[1][mask == 0].any()


@pytest.mark.parametrize("name", LOSSES)
def test_logits_far_apart_have_finite_values_and_gradients(name):
    student, teacher = (torch.tensor([[500.0, -500.0, 0.0, 3.0, -7.0], [1.0, 2.0, 3.0, 4.0, -5e3]]) for _ in "st")
    value, gradient = value_and_gradient(name, student, teacher.flip(1))
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())


def test_reverse_kl_of_a_far_off_student_is_the_distance_of_the_logits():
    student, teacher = torch.tensor([[80.0, -80.0, 0.0]]), torch.tensor([[-80.0, 80.0, 0.0]])
    value, gradient = value_and_gradient("rkl", student, teacher, T=1.0)
    assert float(value) == pytest.approx(160)
    assert float(gradient.abs().max()) < 1e-30


def test_an_unknown_loss_is_refused():
    with pytest.raises(KeyError, match="bldi"):
        dense_loss("bldi", random_logits(0), random_logits(1), torch.ones(6))


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_parameter_is_refused(name):
    with pytest.raises(TypeError, match=rf"{name} has no parameter 'sigma': it has \["):
        loss_of(name, random_logits(0), random_logits(1), sigma=1.0)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "temperature" not in loss.parameters])
def test_a_temperature_is_refused_where_there_is_none(name):
    with pytest.raises(TypeError, match="has no parameter 'temperature'"):
        loss_of(name, random_logits(0), random_logits(1), T=1.0)


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("labels", {"sft", "topk_ce", "dkd", "dkd_norm", "nkd"}),
        ("prompt_mask", {"bild_total"}),
        ("counts", {"rskd"}),
    ],
)
def test_what_a_loss_needs_beside_the_logits_is_asked_for(argument, names):
    student, teacher = random_logits(0), random_logits(1)
    for name in names:
        with pytest.raises(TypeError, match=f"^{name} needs {argument}$"):
            loss_of(name, student, teacher, **{argument: None})
    for name in LOSSES.keys() - names:
        assert bool(torch.isfinite(loss_of(name, student, teacher, **{argument: None})))


def test_a_temperature_may_be_a_whole_number():
    student, teacher = random_logits(0), random_logits(1)
    assert float(loss_of("kl", student, teacher, T=2)) == float(loss_of("kl", student, teacher, T=2.0))


@pytest.mark.parametrize("name", ["normkd", "dkd_norm", "dld"])
def test_a_student_that_tells_no_ids_apart_has_a_number(name):
    params = {"normalize": "std"} if name == "dld" else {}
    student = torch.full((2, 9), 0.5, requires_grad=True)
    teacher = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    value = dense_loss(name, student, teacher, torch.ones(2), labels=torch.tensor([1, 2]), **params)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_a_mask_of_shares_is_refused():
    with pytest.raises(ValueError, match="a mask is of 0 and 1"):
        dense_loss("kl", random_logits(0), random_logits(1), torch.full((6,), 0.5))


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("kl", {"T": 0.0}, "at least 0.001"),
        ("kl", {"T": "3"}, "of type float"),
        ("csd", {"w1": "x"}, "one of S, T, U"),
        ("gjsd", {"beta": 2.0}, "at most 1"),
        ("bild", {"k": 2.5}, "1 or more ids"),
        ("bild", {"k": -3}, "1 or more ids"),
    ],
)
def test_a_parameter_out_of_its_range_is_refused(name, params, says):
    with pytest.raises(ValueError, match=says):
        dense_loss(name, random_logits(0), random_logits(1), torch.ones(6), **params)


def test_a_temperature_given_twice_is_refused():
    with pytest.raises(TypeError, match="give one of them"):
        dense_loss("kl", random_logits(0), random_logits(1), torch.ones(6), T=1.0, temperature=2.0)
