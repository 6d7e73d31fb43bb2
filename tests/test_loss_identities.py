"""Single losses against what their papers, or a line of algebra, say of them."""

import itertools
import math

import pytest
import torch

from tests.logits import loss_of, random_logits, value_and_gradient, values_of
from tests.plain_losses import csd, p_q, sinkd, spread

TIGHT = {"rtol": 1e-10, "atol": 1e-13}
"""Rounding of float64, summed over a few dozen terms of any sign."""

STUDENT, TEACHER = random_logits(0), random_logits(1)
LABELS = torch.arange(6) * 5 % 12


def of(name, student=STUDENT, teacher=TEACHER, **params):
    return value_and_gradient(name, student, teacher, **params)


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(TIGHT | tolerance))


# ---- between forward and reverse KL ---------------------------------------------------------------------------------


def test_at_its_ends_gkd_s_jsd_is_the_kl_of_either_direction():
    same(of("gjsd", beta=0.0), of("kl", T=1.0))
    same(of("gjsd", beta=1.0), of("rkl", T=1.0))


def test_beside_its_ends_gkd_s_jsd_is_next_to_nothing_and_goes_as_the_kl_does():
    share = 1e-7
    for near, end in ((share, "kl"), (1 - share, "rkl")):
        value = loss_of("gjsd", STUDENT, TEACHER, beta=near)
        assert float(value) < 1e-5
        # The next order is the share times a chi-squared distance, here up to e**20.
        same(value / share, loss_of(end, STUDENT * 0.2, TEACHER * 0.2, T=0.2), rtol=0.05)


def test_reverse_kl_is_kl_with_the_models_exchanged():
    same(values_of("rkl", STUDENT, TEACHER), values_of("kl", TEACHER, STUDENT))


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5])
def test_gkd_s_jsd_with_the_models_exchanged_is_that_of_the_other_share(beta):
    same(values_of("gjsd", STUDENT, TEACHER, beta=beta), values_of("gjsd", TEACHER, STUDENT, beta=1 - beta))


def test_jensen_shannon_is_symmetric_and_bounded_by_log_2():
    far = torch.tensor([[900.0, 0.0], [0.0, 900.0]], dtype=torch.float64)
    value = values_of("gjsd", far, far.flip(0), beta=0.5)
    same(value, torch.full_like(value, math.log(2)))
    assert float(values_of("gjsd", STUDENT * 30, TEACHER * 30, beta=0.5).max()) <= math.log(2) + 1e-12
    same(values_of("gjsd", STUDENT, TEACHER), values_of("gjsd", TEACHER, STUDENT))


def test_the_skewed_kls_are_each_other_with_the_models_exchanged():
    same(values_of("srkl", STUDENT, TEACHER, alpha=0.2), values_of("skl", TEACHER, STUDENT, alpha=0.2))


@pytest.mark.parametrize(("name", "limit"), [("skl", "kl"), ("srkl", "rkl")])
def test_a_skewed_kl_tends_to_its_kl_and_to_nothing(name, limit):
    student, teacher = STUDENT / 3, TEACHER / 3
    same(of(name, student, teacher, alpha=1e-6), of(limit, student, teacher, T=1.0), rtol=1e-3, atol=1e-5)
    assert float(loss_of(name, student, teacher, alpha=1 - 1e-6)) < 1e-9


@pytest.mark.parametrize("name", ["skl", "srkl"])
def test_a_skewed_kl_is_bounded_by_the_log_of_its_share(name):
    far = torch.tensor([[900.0, 0.0], [0.0, 900.0]], dtype=torch.float64)
    value = values_of(name, far, far.flip(0), alpha=0.1)
    same(value, torch.full_like(value, -math.log(0.1)))


def test_total_variation_is_between_0_and_1_and_both_are_reached():
    far = torch.tensor([[900.0, 0.0], [0.0, 900.0]], dtype=torch.float64)
    same(values_of("tvd", far, far.flip(0)), torch.ones(2, dtype=torch.float64))
    assert float(loss_of("tvd", far, far)) == 0
    values = values_of("tvd", STUDENT, TEACHER)
    assert 0 < float(values.min()) <= float(values.max()) <= 1
    # Pinsker's inequality
    assert bool((values <= (values_of("kl", STUDENT, TEACHER, T=1.0) / 2).sqrt()).all())


def test_adaptive_kl_is_reverse_kl_where_all_that_differs_is_the_tail():
    teacher = torch.tensor([[4.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    mass = teacher[:, 1:].exp().sum()
    student = torch.tensor([[4.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    student[:, 1:] += (mass / 3).log()
    same(of("akl", student, teacher), of("rkl", student, teacher, T=1.0))
    assert abs(float(loss_of("kl", student, teacher, T=1.0) - loss_of("rkl", student, teacher, T=1.0))) > 1e-3


def test_adaptive_kl_of_two_ids_is_the_mean_of_both_directions_whatever_the_head():
    student, teacher = random_logits(0, 6, 2, 1.0), random_logits(1, 6, 2, 1.0)
    both = (of(name, student, teacher, T=1.0) for name in ("kl", "rkl"))
    same(of("akl", student, teacher, mu=0.0), [(one + other) / 2 for one, other in zip(*both, strict=True)])


@pytest.mark.parametrize("form", ["ce", "kl"])
def test_taid_goes_from_the_student_to_the_teacher(form):
    entropy = -(p_q(STUDENT, TEACHER)[1] * STUDENT.log_softmax(1)).sum(1).mean() if form == "ce" else 0.0
    value, gradient = of("taid", t=0.0, form=form)
    assert float(value) == pytest.approx(float(entropy), abs=1e-13)
    assert float(gradient.abs().max()) < 1e-15
    at_the_end = of("taid", t=1.0, form=form)
    same(at_the_end[1], of("kl", T=1.0)[1])
    if form == "kl":
        same(at_the_end, of("kl", T=1.0))


def test_both_forms_of_taid_have_one_gradient_that_sees_the_target_as_constant():
    forms = [of("taid", t=0.3, form=form)[1] for form in ("ce", "kl")]
    same(*forms)
    target = (0.7 * STUDENT + 0.3 * TEACHER).softmax(1)
    same(forms[0], (STUDENT.softmax(1) - target) / 6)


def test_without_a_t_taid_stands_at_its_start():
    same(of("taid", t_start=0.6), of("taid", t=0.6))


# ---- alpha and beta -------------------------------------------------------------------------------------------------


def test_the_alpha_beta_divergence_has_kl_of_both_directions_and_hellinger_and_others():
    p, q = p_q(STUDENT, TEACHER)
    same(of("abdiv", alpha=1.0, beta=0.0), of("kl", T=1.0))
    same(of("abdiv", alpha=0.0, beta=1.0), of("rkl", T=1.0))
    squared_hellinger = (p.sqrt() - q.sqrt()).square().sum(1) / 2
    same(values_of("abdiv", STUDENT, TEACHER, alpha=0.5, beta=0.5), 4 * squared_hellinger)
    same(values_of("abdiv", STUDENT, TEACHER, alpha=1.0, beta=1.0), (p - q).square().sum(1) / 2)
    same(values_of("abdiv", STUDENT, TEACHER, alpha=2.0, beta=-1.0), ((p - q).square() / q).sum(1) / 2)
    same(values_of("abdiv", STUDENT, TEACHER, alpha=0.0, beta=0.0), (p.log() - q.log()).square().sum(1) / 2)


@pytest.mark.parametrize(
    ("limit", "near"),
    [
        ((0.0, 1.0), (1e-5, 1.0)),
        ((0.0, 0.6), (1e-5, 0.6)),
        ((0.0, -0.4), (-1e-5, -0.4)),
        ((1.0, 0.0), (1.0, 1e-5)),
        ((0.6, 0.0), (0.6, -1e-5)),
        ((0.5, -0.5), (0.5, -0.5 + 1e-5)),
        ((-0.3, 0.3), (-0.3, 0.3 + 1e-5)),
        ((0.0, 0.0), (1e-4, 2e-4)),
        ((0.0, 0.0), (1e-4, -1e-4)),
        ((0.0, 0.0), (0.0, 1e-4)),
        ((0.0, 0.0), (1e-4, 0.0)),
    ],
)
def test_the_special_cases_of_the_alpha_beta_divergence_are_its_limits(limit, near):
    pair = STUDENT / 3, TEACHER / 3
    limit, near = (of("abdiv", *pair, alpha=alpha, beta=beta) for alpha, beta in (limit, near))
    same(near, limit, rtol=1e-2, atol=1e-3 * float(limit[1].abs().max()))


# ---- decoupled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_parts_weighed_by_the_teacher_are_kl(temperature):
    """Zhao et al.'s eq. 5: KL = TCKD + (1 - p_y) NCKD."""
    for row in range(6):
        pair, label = (STUDENT[[row]], TEACHER[[row]]), LABELS[[row]]
        not_y = 1 - float(p_q(*pair, temperature)[0][0, label])
        found = of("dkd", *pair, labels=label, alpha=1.0, beta=not_y, T=temperature)
        same(found, of("kl", *pair, T=temperature, T2=True))


def test_decoupled_parts_at_a_row_s_own_temperature_are_normkd():
    for row in range(6):
        pair, label = (STUDENT[[row]], TEACHER[[row]]), LABELS[[row]]
        not_y = 1 - float((pair[1] / spread(pair[1], 2.0)).softmax(1)[0, label])
        found = of("dkd_norm", *pair, labels=label, alpha=1.0, beta=not_y, t_norm=2.0)
        same(found, of("normkd", *pair, t_norm=2.0))


def test_of_two_ids_only_the_label_against_the_other_remains():
    pair, labels = (random_logits(0, 6, 2), random_logits(1, 6, 2)), torch.tensor([0, 1, 1, 0, 1, 0])
    same(of("dkd", *pair, labels=labels, beta=123.0), of("kl", *pair, T=4.0, T2=True))
    same(of("dkd", *pair, labels=labels, alpha=0.0), [torch.zeros((), dtype=torch.float64), torch.zeros_like(pair[0])])
    p, log_q = pair[1].softmax(1), pair[0].log_softmax(1)
    expected = -(p * log_q).gather(1, labels.unsqueeze(1)).squeeze(1)
    for row in range(6):
        value = loss_of("nkd", pair[0][[row]], pair[1][[row]], labels=labels[[row]], gamma=7.0)
        same(value, expected[row])


def test_normalised_parts_weighed_by_the_teacher_are_cross_entropy_but_for_the_others_mass():
    p, q = p_q(STUDENT, TEACHER)
    for row, label in enumerate(LABELS.tolist()):
        not_y = float(1 - p[row, label])
        value = loss_of("nkd", STUDENT[[row]], TEACHER[[row]], labels=LABELS[[row]], gamma=not_y, T=1.0)
        cross_entropy = -(p[row] * q[row].log()).sum()
        same(value, cross_entropy + not_y * (1 - q[row, label]).log())


def test_the_thesis_s_nkd_is_nkd_around_the_teacher_s_likeliest_id_without_temperature_squared():
    likeliest = TEACHER.argmax(1)
    found = of("nkd_bild", gamma=9 * 0.25, T=3.0)
    same(found, of("nkd", labels=likeliest, gamma=0.25, T=3.0))


def test_of_equally_likely_ids_the_thesis_s_nkd_takes_the_lowest():
    teacher = TEACHER.clone()
    teacher[:, [3, 7, 9]] = 20.0
    found = of("nkd_bild", teacher=teacher, gamma=1.0, T=1.0)
    same(found, of("nkd", teacher=teacher, labels=torch.full((6,), 3), gamma=1.0, T=1.0))


def test_normkd_tempers_each_row_by_its_own_spread():
    rows = [slice(row, row + 1) for row in range(6)]
    student = STUDENT / STUDENT.std(1, keepdim=True) * TEACHER.std(1, keepdim=True)
    for row in rows:
        value = loss_of("normkd", student[row], TEACHER[row], t_norm=2.0)
        temperature = 2.0 * float(TEACHER[row].std())
        same(value, loss_of("kl", student[row], TEACHER[row], T=temperature, T2=True))


def test_normkd_does_not_see_the_scale_of_the_student():
    same(of("normkd", 5 * STUDENT)[0], of("normkd")[0])
    radial = (of("normkd")[1] * (STUDENT - STUDENT.mean(1, keepdim=True))).sum(1)
    same(radial, torch.zeros_like(radial))


# ---- score matching -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weights", [w1 + w2 for w1, w2 in itertools.product("STU", repeat=2)])
def test_csd_is_its_sum_over_pairs_of_ids(weights, temperature):
    student = STUDENT.clone().requires_grad_()
    expected = csd(student, TEACHER, weights[0], weights[1], temperature).mean()
    expected.backward()
    found = of("csd", w1=weights[0], w2=weights[1], T=temperature)
    same(found, [expected.detach(), student.grad])
    assert float(found[0]) > 0.1


def test_csd_does_not_care_which_weight_comes_first():
    same(of("csd", w1="T", w2="S"), of("csd", w1="S", w2="T"))


def test_with_one_weight_csd_is_a_variance_and_its_gradient_the_deviation():
    q, gap = STUDENT.softmax(1), STUDENT - TEACHER
    deviation = gap - (q * gap).sum(1, keepdim=True)
    expected = [(q * deviation.square()).sum(1).mean(), 2 * q * deviation / 6]
    same(of("csd", w1="S", w2="S"), expected)


def test_csd_keeps_its_digits_whatever_constant_lies_between_the_models():
    single = STUDENT.float(), TEACHER.float()
    far = single[0] + 4096.0, single[1] - 4096.0
    expected = of("csd", *(logits.double() for logits in far))[0].float()
    # The difference of logits 8192 apart is itself rounded to 2**-11; squares of it would be rounded to 4.
    same(of("csd", *far)[0], expected, rtol=2**-11)


def test_dld_of_logits_about_their_mean_is_a_quarter_of_csd_with_uniform_weights():
    quarter = [part / 4 for part in of("csd", w1="U", w2="U")]
    same(of("dld", w="U", normalize="mean"), quarter)


def standard(x):
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


NORMALISED = {
    "no": lambda x: x,
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "min": lambda x: x - x.min(1, keepdim=True).values,
    "max": lambda x: x - x.max(1, keepdim=True).values,
    "std": standard,
    "range": lambda x: 2 * (x - x.aminmax(dim=1, keepdim=True)[0]) / (x.amax(1) - x.amin(1)).unsqueeze(1) - 1,
}


@pytest.mark.parametrize("w", "STU")
@pytest.mark.parametrize("how", NORMALISED)
def test_dld_is_a_quarter_of_the_weighted_square_between_normalised_rows(how, w):
    p, q = p_q(STUDENT, TEACHER)
    weights = {"S": q, "T": p, "U": 1 / 12}[w]
    student = STUDENT.clone().requires_grad_()
    gap = NORMALISED[how](student) - NORMALISED[how](TEACHER)
    expected = (weights * gap.square()).sum(1).mean() / 4
    expected.backward()
    # The rows' spread is kept from zero by 1e-9.
    same(of("dld", w=w, normalize=how), [expected.detach(), student.grad], rtol=1e-8, atol=1e-10)


def test_dld_takes_a_row_that_is_all_alike():
    flat = torch.zeros_like(STUDENT)
    for how in NORMALISED:
        value, gradient = of("dld", flat, normalize=how)
        assert bool(torch.isfinite(value))
        assert bool(torch.isfinite(gradient).all())


# ---- transport ------------------------------------------------------------------------------------------------------


def test_a_position_alone_is_transported_to_its_teacher():
    for row in range(6):
        value, gradient = of("sinkd", STUDENT[[row]], TEACHER[[row]], coef=0.5)
        same([value, gradient], of("tvd", STUDENT[[row]], TEACHER[[row]], T=2.0))


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_each_teacher_row_receives_mass_one(iters):
    # Where a cost depends on the teacher's row alone, the plan has only its columns' sums to say.
    student, teacher = STUDENT[[0]].expand(6, 12), TEACHER
    q, p = student[0].div(2).softmax(0), teacher.div(2).softmax(1)
    expected = (q - p).abs().sum()
    same(loss_of("sinkd", student, teacher, iters=iters, coef=1.0), expected)


def test_many_iterations_also_send_mass_one_from_each_student_row():
    student, teacher = STUDENT, TEACHER[[0]].expand(6, 12)
    expected = (student.div(2).softmax(1) - teacher.div(2).softmax(1)).abs().sum()
    same(loss_of("sinkd", student, teacher, iters=100, coef=1.0), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.1, 0.01, 0.001])
def test_a_plan_of_little_entropy_is_as_finite_as_any(eps, dtype):
    student, teacher = (5 * STUDENT).to(dtype), (5 * TEACHER).to(dtype)
    value, gradient = of("sinkd", student, teacher, eps=eps)
    assert bool(torch.isfinite(gradient).all())
    # An error of the cost is divided by eps.
    same(value, sinkd(student, teacher, eps=eps), rtol=20 * torch.finfo(dtype).eps / eps)
