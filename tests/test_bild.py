"""BiLD: its two halves, its linear-time form, and how little of the logits it touches."""

import pytest
import torch

from tests.logits import loss_of, random_logits, value_and_gradient, values_of
from workers.losses import bild
from workers.losses.bild import as_bregman, over_pairs

HALVES = ("t_ld", "s_ld")
LEADING = ("bild", *HALVES)
EPSILON = torch.finfo(torch.float32).eps


def both_forms(teacher, student):
    """Values [N] and gradients [N, K] over pairs, and in linear time; in what both were given."""
    results = []
    for form in (over_pairs, as_bregman):
        leaf = student.clone().requires_grad_()
        value = form(teacher, leaf)
        results.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    return results


# ---- the two halves -------------------------------------------------------------------------------------------------


def test_bild_of_the_worked_example():
    teacher_led = loss_of("t_ld", torch.tensor([[-0.5, 0.6, 0.4]]), torch.tensor([[1.2, 0.9, -0.3]]), k=3, T=1.0)
    student_led = loss_of("s_ld", torch.tensor([[0.8, 0.6, -0.2]]), torch.tensor([[-0.4, 0.9, -0.6]]), k=3, T=1.0)
    assert float(teacher_led) == pytest.approx(0.20403659, abs=2e-7)
    assert float(student_led) == pytest.approx(0.32430398, abs=2e-7)


@pytest.mark.parametrize("k", [5, 30])
def test_bild_is_the_sum_of_its_halves(k):
    student, teacher = random_logits(0, 6, 40), random_logits(1, 6, 40)
    halves = [value_and_gradient(name, student, teacher, k=k) for name in HALVES]
    expected = [sum(parts) for parts in zip(*halves, strict=True)]
    torch.testing.assert_close(value_and_gradient("bild", student, teacher, k=k), expected, rtol=1e-12, atol=1e-15)
    assert abs(float(halves[0][0] - halves[1][0])) > 1e-3


def test_the_halves_agree_where_the_models_order_their_leading_logits_alike():
    teacher = random_logits(1)
    student = teacher.sign() * teacher.abs() ** 0.7  # increasing, so the order is the teacher's
    teacher_led, student_led = (value_and_gradient(name, student, teacher, k=5) for name in HALVES)
    assert teacher_led[0] > 1e-3
    torch.testing.assert_close(teacher_led, student_led, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LEADING)
@pytest.mark.parametrize("k", [1, 2])
def test_fewer_than_three_leading_logits_make_a_zero_that_backpropagates(name, k):
    value, gradient = value_and_gradient(name, random_logits(0), random_logits(1), k=k)
    assert float(value) == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", LEADING)
def test_a_vocabulary_of_two_makes_a_zero_that_backpropagates(name):
    value, gradient = value_and_gradient(name, random_logits(0, 3, 2), random_logits(1, 3, 2))
    assert float(value) == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", HALVES)
def test_a_half_is_zero_only_where_the_leading_logits_are_alike_but_for_a_constant(name):
    student, teacher = random_logits(0, 50, 3), random_logits(1, 50, 3)
    assert float(values_of(name, student, teacher, k=3).min()) > 0
    alike = teacher + 7.0
    assert float(loss_of(name, alike, teacher, k=3).abs()) < 1e-14


def test_tied_logits_lead_in_the_order_of_their_ids():
    teacher = torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[0.0, 1.0, -2.0, 3.0, 0.0]], dtype=torch.float64)
    broken = teacher - torch.tensor([0.0, 0.0, 1e-9, 2e-9, 0.0])
    exact, near = (float(loss_of("t_ld", student, logits, k=3)) for logits in (teacher, broken))
    otherwise = float(loss_of("t_ld", student, teacher + torch.tensor([0.0, 0.0, 1e-9, 2e-9, 0.0]), k=3))
    assert exact == pytest.approx(near, abs=1e-8)
    assert abs(exact - otherwise) > 0.01


# ---- in linear time -------------------------------------------------------------------------------------------------

PATTERNS = {
    "random": lambda k: (random_logits(0, 4, k).sort(descending=True).values, random_logits(1, 4, k)),
    "far apart": lambda k: (
        random_logits(0, 4, k).sign().sort(descending=True).values * 500,
        random_logits(1, 4, k) * 200,
    ),
    "all alike": lambda k: (torch.zeros(4, k).double(), torch.zeros(4, k).double()),
    "a flat leader": lambda k: (torch.zeros(4, k).double(), random_logits(1, 4, k) * 100),
    "a flat follower": lambda k: (
        random_logits(0, 4, k).sort(descending=True).values * 100,
        torch.zeros(4, k).double(),
    ),
    "an ascending follower": lambda k: (
        torch.linspace(500, -500, k).double().expand(4, k),
        torch.linspace(-500, 500, k).double().expand(4, k),
    ),
    "one above the rest": lambda k: (-500.0 * (torch.arange(k) > 0).double().expand(4, k), random_logits(1, 4, k)),
}


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("k", [3, 4, 5, 8, 16, 17, 33, 64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_linear_form_is_the_definition_over_pairs(pattern, k, temperature):
    teacher, student = (logits / temperature for logits in PATTERNS[pattern](k))
    (value, gradient), (linear_value, linear_gradient) = both_forms(teacher, student)
    assert bool(torch.isfinite(linear_value).all())
    # Probabilities are exponentials of terms of the logits' size, and in the value multiplied by such terms.
    rounding = torch.finfo(torch.float64).eps * max(1.0, float(teacher.abs().max()), float(student.abs().max()))
    most = max(1.0, float((student - teacher).abs().max()))
    torch.testing.assert_close(linear_value, value, rtol=1e-12, atol=4 * rounding * most)
    torch.testing.assert_close(linear_gradient, gradient, rtol=1e-12, atol=4 * rounding)


def test_the_linear_form_passes_gradcheck():
    teacher, student = random_logits(0, 5, 7), random_logits(1, 5, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda leaf: as_bregman(teacher, leaf), (student,))
    uneven = torch.linspace(-1, 2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda leaf: (as_bregman(teacher, leaf * 1.0) * uneven).sum(), (student,))


def test_a_gradient_of_the_linear_form_s_gradient_is_an_error():
    student = random_logits(1, 5, 7).requires_grad_()
    value = as_bregman(random_logits(0, 5, 7), student).square().sum()
    gradient = torch.autograd.grad(value, student, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("k", [8, 17, 64])
def test_in_float32_the_linear_form_is_a_few_times_as_far_off_as_the_pairs(k):
    teacher = random_logits(0, 1000, k).sort(descending=True).values.float() / 3
    student = random_logits(1, 1000, k).float() / 3
    truth = both_forms(teacher.double(), student.double())[0]
    over_all_pairs, linear = both_forms(teacher, student)
    for pairs, ours, exact in zip(over_all_pairs, linear, truth, strict=True):
        error, allowed = (float((found.double() - exact).abs().max()) for found in (ours, pairs))
        assert error <= 5 * allowed
        assert error < 50 * EPSILON


@pytest.mark.parametrize("name", LEADING)
@pytest.mark.parametrize("k", [3, 8, 16, 17, 40])
def test_which_form_computes_a_loss_does_not_show(monkeypatch, name, k):
    student, teacher = random_logits(0, 6, 50), random_logits(1, 6, 50)
    results = []
    for largest in (0, 1000):
        monkeypatch.setattr(bild, "PAIRS_UP_TO", largest)
        results.append(value_and_gradient(name, student, teacher, k=k))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_leading_logits_are_finite_and_backpropagate(dtype):
    student, teacher = random_logits(0, 2, 1100).to(dtype), random_logits(1, 2, 1100).to(dtype)
    value, gradient = value_and_gradient("bild", student, teacher, k=1024)
    assert bool(torch.isfinite(value))
    assert float(value) > 0
    assert bool(torch.isfinite(gradient).all())
    assert bool(gradient.any())


def test_no_tensor_of_pairs_is_made_for_many_leading_logits(monkeypatch):
    def refuse(*_args):
        raise AssertionError("pairs")

    monkeypatch.setattr(bild, "over_pairs", refuse)
    loss_of("bild", random_logits(0, 2, 40), random_logits(1, 2, 40), k=bild.PAIRS_UP_TO + 1)
    with pytest.raises(AssertionError, match="pairs"):
        loss_of("bild", random_logits(0, 2, 40), random_logits(1, 2, 40), k=bild.PAIRS_UP_TO)


# ---- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "most"), [("t_ld", 4), ("s_ld", 4), ("bild", 8), ("topk_kl", 4)])
def test_the_gradient_touches_the_leading_logits_alone_and_sums_to_zero(name, most):
    student, teacher = random_logits(0, 50, 40), random_logits(1, 50, 40)
    gradient = value_and_gradient(name, student, teacher, k=4)[1]
    assert int((gradient != 0).sum(1).max()) == most
    torch.testing.assert_close(gradient.sum(1), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("k", [3, 16, 30])
@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_the_gradient_of_a_half_is_at_most_four_over_t(name, k, temperature):
    student, teacher = (random_logits(seed, 50, 40, scale=20.0) for seed in range(2))
    gradient = value_and_gradient(name, student, teacher, k=k, T=temperature)[1] * 50
    assert float(gradient.abs().sum(1).max()) <= 4 / temperature * (1 + 1e-12)


def test_the_bound_is_reached_where_the_models_are_sure_of_pairs_of_their_own():
    teacher = torch.tensor([[100.0, 1.0, 0.0, -100.0]], dtype=torch.float64)  # the first and the last
    student = torch.tensor([[-50.0, 100.0, -100.0, 50.0]], dtype=torch.float64)  # the second and the third
    gradient = value_and_gradient("t_ld", student, teacher, k=4, T=2.0)[1]
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.5, -0.5, 0.5]]).double(), rtol=1e-9, atol=0)


def test_the_teacher_gets_no_gradient():
    student, teacher = random_logits(0, 4, 40).requires_grad_(), random_logits(1, 4, 40)
    value = as_bregman(teacher.requires_grad_(), student).sum()
    assert torch.autograd.grad(value, (student, teacher), allow_unused=True)[1] is None
