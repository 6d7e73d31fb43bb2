"""Every loss of the catalogue on dense logits, against independent definitions."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from workers.losses.catalogue import LOSSES
from workers.losses.dense import dense_loss

ORACLES = json.loads((Path(__file__).parent / "oracles" / "losses.json").read_text())
"""Values and gradients from an independent pure-Python implementation."""

LEADING = ("bild", "t_ld", "s_ld")
"""Losses on the differences between leading logits."""


def case_name(case):
    params = ",".join(f"{key}={value}" for key, value in case["params"].items())
    return f"{case['loss']}-{case['dataset']}-{params}"


def value_and_gradient(name, student, teacher, mask=None, **arguments):
    student = student.clone().requires_grad_()
    mask = torch.ones(len(student)) if mask is None else mask
    value = dense_loss(name, student, teacher, mask, **arguments)
    value.backward()
    return value.detach(), student.grad


def random_logits(seed, num_positions=6, vocab_size=12, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_positions, vocab_size, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("case", ORACLES["cases"], ids=case_name)
def test_value_and_gradient_are_the_oracle_s(case):
    dataset = ORACLES["datasets"][case["dataset"]]
    student, teacher = (torch.tensor(dataset[key], dtype=torch.float64) for key in ("student", "teacher"))
    value, gradient = value_and_gradient(
        case["loss"], student, teacher, torch.tensor(dataset["mask"]), **case["params"]
    )
    expected = torch.tensor(case["expected"], dtype=torch.float64)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        gradient, torch.tensor(case["expected_grad"], dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("case", ORACLES["cases"], ids=case_name)
def test_values_come_position_by_position(case):
    dataset = ORACLES["datasets"][case["dataset"]]
    student, teacher = (torch.tensor(dataset[key], dtype=torch.float64) for key in ("student", "teacher"))
    for position, expected in enumerate(case["per_position"]):
        if dataset["mask"][position]:
            value = dense_loss(
                case["loss"],
                student[position : position + 1],
                teacher[position : position + 1],
                torch.ones(1),
                **case["params"],
            )
            assert float(value) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_bild_of_the_worked_example():
    teacher_led = dense_loss(
        "t_ld", torch.tensor([[-0.5, 0.6, 0.4]]), torch.tensor([[1.2, 0.9, -0.3]]), torch.ones(1), k=3, T=1.0
    )
    student_led = dense_loss(
        "s_ld", torch.tensor([[0.8, 0.6, -0.2]]), torch.tensor([[-0.4, 0.9, -0.6]]), torch.ones(1), k=3, T=1.0
    )
    assert float(teacher_led) == pytest.approx(0.20403659, abs=2e-7)
    assert float(student_led) == pytest.approx(0.32430398, abs=2e-7)
    assert float(teacher_led + student_led) == pytest.approx(0.52834058, abs=3e-7)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_with_k_equal_to_v_top_k_kl_and_kl_are_torch_kl_div(temperature):
    student, teacher = random_logits(0), random_logits(1)
    expected = F.kl_div(
        (student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="batchmean"
    )
    mask = torch.ones(6)
    for name, k in (("kl", {}), ("topk_kl", {"k": 12}), ("topk_kl", {"k": 1024})):
        value = dense_loss(name, student, teacher, mask, temperature=temperature, **k)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_reverse_kl_is_torch_kl_div_with_the_models_exchanged():
    student, teacher = random_logits(0), random_logits(1)
    expected = F.kl_div((teacher / 3).log_softmax(1), (student / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(dense_loss("rkl", student, teacher, torch.ones(6)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["kl", "rkl"])
def test_t2_multiplies_by_temperature_squared(name):
    student, teacher = random_logits(0), random_logits(1)
    plain = dense_loss(name, student, teacher, torch.ones(6), T=3.0)
    torch.testing.assert_close(dense_loss(name, student, teacher, torch.ones(6), T=3.0, T2=True), 9 * plain)


def test_sft_is_torch_cross_entropy_of_the_labels_that_count():
    student, labels = random_logits(0), torch.tensor([3, 0, 11, 5, 5, 7])
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    value, gradient = value_and_gradient("sft", student, random_logits(1), mask, labels=labels)
    reference = student.clone().requires_grad_()
    expected = F.cross_entropy(reference, torch.where(mask.bool(), labels, -100))
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, reference.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["bild", "t_ld", "s_ld", "kl", "rkl", "topk_kl"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name):
    logits = random_logits(0)
    value, gradient = value_and_gradient(name, logits, logits)
    assert float(value) == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["bild", "t_ld", "s_ld", "kl", "rkl", "topk_kl"])
def test_a_constant_added_to_a_row_changes_nothing(name):
    student, teacher = random_logits(0), random_logits(1)
    constants = torch.linspace(-20, 30, 6, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(
        value_and_gradient(name, student + constants, teacher - 2 * constants),
        value_and_gradient(name, student, teacher),
        rtol=1e-11,
        atol=1e-13,
    )


@pytest.mark.parametrize("name", LEADING)
@pytest.mark.parametrize("k", [1, 2])
def test_fewer_than_three_leading_logits_make_a_zero_that_backpropagates(name, k):
    value, gradient = value_and_gradient(name, random_logits(0), random_logits(1), k=k)
    assert float(value) == 0
    assert not gradient.any()


def test_the_halves_agree_where_the_models_order_their_leading_logits_alike():
    teacher = random_logits(1)
    student = teacher.sign() * teacher.abs() ** 0.7  # increasing, so the order is the teacher's
    teacher_led, student_led = (value_and_gradient(name, student, teacher, k=5) for name in ("t_ld", "s_ld"))
    assert teacher_led[0] > 1e-3
    torch.testing.assert_close(teacher_led, student_led, rtol=1e-12, atol=1e-15)


def test_bild_is_the_sum_of_its_halves():
    student, teacher = random_logits(0), random_logits(1)
    halves = [dense_loss(name, student, teacher, torch.ones(6), k=5) for name in ("t_ld", "s_ld")]
    torch.testing.assert_close(dense_loss("bild", student, teacher, torch.ones(6), k=5), sum(halves))


@pytest.mark.parametrize(("name", "most"), [("t_ld", 4), ("s_ld", 4), ("bild", 8), ("topk_kl", 4)])
def test_the_gradient_touches_the_leading_logits_alone_and_sums_to_zero(name, most):
    student, teacher = random_logits(0, 50, 40), random_logits(1, 50, 40)
    gradient = value_and_gradient(name, student, teacher, k=4)[1]
    touched = (gradient != 0).sum(1)
    assert int(touched.max()) == most
    torch.testing.assert_close(gradient.sum(1), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_no_trained_position_is_a_zero_loss_that_backpropagates(name):
    value, gradient = value_and_gradient(
        name, random_logits(0), random_logits(1), torch.zeros(6), labels=torch.zeros(6, dtype=torch.long)
    )
    assert float(value) == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_in_a_masked_row_does_not_matter(name):
    student, teacher, labels = random_logits(0), random_logits(1), torch.arange(6)
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    expected = value_and_gradient(name, student, teacher, mask, labels=labels)
    student[2], teacher[4], student[4, 0] = torch.nan, torch.inf, -torch.inf
    torch.testing.assert_close(value_and_gradient(name, student, teacher, mask, labels=labels), expected)


PLAIN = {
    "kl": lambda s, t: ((t / 3).softmax(1) * ((t / 3).log_softmax(1) - (s / 3).log_softmax(1))).sum(1).mean(),
    "rkl": lambda s, t: ((s / 3).softmax(1) * ((s / 3).log_softmax(1) - (t / 3).log_softmax(1))).sum(1).mean(),
    "t_ld": lambda s, t: plain_difference(s, t, t),
    "s_ld": lambda s, t: plain_difference(s, t, s),
    "bild": lambda s, t: plain_difference(s, t, t) + plain_difference(s, t, s),
    "topk_kl": lambda s, t: PLAIN["kl"](*(x.gather(1, t.sort(dim=1, descending=True, stable=True)[1]) for x in (s, t))),
    "sft": lambda s, t: F.cross_entropy(s, torch.arange(len(s)) % s.shape[1]),
}
"""The formulas as one writes them down, for their error at a precision."""


def plain_difference(student, teacher, leader):
    ids = leader.sort(dim=1, descending=True, stable=True)[1][:, :8]
    s, t = (x.gather(1, ids) / 3 for x in (student, teacher))
    first, second = torch.triu_indices(8, 8, 1)
    s, t = (x[:, first] - x[:, second] for x in (s, t))
    return F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_logits_are_no_worse_than_the_plain_formula_in_that_precision(name, dtype):
    student, teacher = random_logits(0, 64, 100).to(dtype), random_logits(1, 64, 100).to(dtype)

    def evaluate(loss, student, teacher):
        student = student.clone().requires_grad_()
        value = loss(student, teacher)
        value.backward()
        return value.detach().double(), student.grad.double()

    def ours(student, teacher):
        labels = torch.arange(len(student)) % student.shape[1]
        return dense_loss(name, student, teacher, torch.ones(len(student)), labels=labels)

    truth = evaluate(PLAIN[name], student.double(), teacher.double())
    error = [float((a - b).abs().max()) for a, b in zip(evaluate(ours, student, teacher), truth, strict=True)]
    plain = [float((a - b).abs().max()) for a, b in zip(evaluate(PLAIN[name], student, teacher), truth, strict=True)]
    # An error may be zero by luck: a few roundings of the value are allowed whatever the plain formula's.
    epsilon = [
        4 * torch.finfo(torch.float32).eps * float(truth[0]),
        torch.finfo(dtype).eps * float(truth[1].abs().max()),
    ]
    assert error[0] <= 2 * plain[0] + epsilon[0]
    assert error[1] <= 2 * plain[1] + epsilon[1]


def test_the_value_of_low_precision_logits_is_float32():
    logits = random_logits(0).bfloat16()
    assert dense_loss("kl", logits, logits.flip(0), torch.ones(6)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "parameter"), [("bild", "alpha"), ("sft", "temperature"), ("kl", "k"), ("topk_kl", "T2"), ("sft", "T")]
)
def test_an_unknown_parameter_is_refused(name, parameter):
    with pytest.raises(TypeError, match="has no parameter"):
        dense_loss(name, random_logits(0), random_logits(1), torch.ones(6), **{parameter: 1})


def test_an_unknown_loss_is_refused():
    with pytest.raises(KeyError):
        dense_loss("bldi", random_logits(0), random_logits(1), torch.ones(6))


def test_reverse_kl_of_a_far_off_student_is_finite():
    student, teacher = torch.tensor([[80.0, -80.0, 0.0]]), torch.tensor([[-80.0, 80.0, 0.0]])
    value, gradient = value_and_gradient("rkl", student, teacher, T=1.0)
    assert float(value) == pytest.approx(160)
    assert bool(torch.isfinite(gradient).all())
    assert math.isclose(float(gradient.sum()), 0, abs_tol=1e-6)
