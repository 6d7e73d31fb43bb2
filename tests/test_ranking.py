"""Soft ranks against pooling adjacent violators, and the ranking losses against exact unions, row by row."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.logits import loss_of, random_logits, value_and_gradient, values_of
from workers.losses.ranking import num_pairs, overlap, soft_rank


def pooled(values):
    """The best non-increasing fit of a sequence, as blocks of places: the mean of each is its value. O(n)"""
    blocks = []
    for place, value in enumerate(values):
        blocks.append(([place], value))
        while len(blocks) > 1 and blocks[-2][1] <= blocks[-1][1]:
            (last, low), (before, high) = blocks.pop(), blocks.pop()
            mean = (low * len(last) + high * len(before)) / (len(last) + len(before))
            blocks.append((before + last, mean))
    return [places for places, _ in blocks]


def plain_soft_rank(values, eps=1.0):
    """Of one row, differentiable; and the blocks of ids whose ranks move together."""
    scaled = values / eps
    order = sorted(range(len(values)), key=lambda place: -float(scaled[place].detach()))
    gaps = [scaled[place] - (len(values) - rank) for rank, place in enumerate(order)]
    blocks = pooled([float(gap.detach()) for gap in gaps])
    ranks = [None] * len(values)
    for block in blocks:
        fit = torch.stack([gaps[rank] for rank in block]).mean()
        for rank in block:
            ranks[order[rank]] = scaled[order[rank]] - fit
    return torch.stack(ranks), [[order[rank] for rank in block] for block in blocks]


def union(student, teacher, k):
    """The ids among the k highest of either model, of one row."""

    def first(row):
        return sorted(range(len(row)), key=lambda token: (-float(row[token]), token))[:k]

    return sorted({*first(student.detach()), *first(teacher)})


def correlation(one, other):
    one, other = one - one.mean(), other - other.mean()
    return (one * other).sum() / (one.square().sum() * other.square().sum()).sqrt()


def plain_rank_loss(student, teacher, k, eps=1.0):
    """Row by row, over the exact union of both models' leading ids."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        ids = union(s, t, k)
        values.append(1 - correlation(plain_soft_rank(s[ids], eps)[0], plain_soft_rank(t[ids], eps)[0]))
    return torch.stack(values)


def of_one_row(values, eps=1.0):
    values = values.unsqueeze(0)
    return soft_rank(values, torch.ones_like(values, dtype=torch.bool), eps)[0]


ROW = st.lists(st.floats(-8, 8), min_size=1, max_size=12).map(lambda row: torch.tensor(row, dtype=torch.float64))


# ---- soft ranks -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(row=ROW, eps=st.floats(0.05, 20.0))
def test_soft_ranks_are_what_pooling_adjacent_violators_makes_of_them(row, eps):
    scale = max(1.0, float(row.abs().max()) / eps)
    torch.testing.assert_close(of_one_row(row, eps), plain_soft_rank(row, eps)[0], rtol=1e-12, atol=1e-13 * scale)


@settings(deadline=None)
@given(row=ROW, eps=st.floats(0.05, 20.0))
def test_soft_ranks_lie_on_the_permutahedron(row, eps):
    ranks = of_one_row(row, eps).sort().values
    hard = torch.arange(1, len(row) + 1, dtype=torch.float64)
    assert float(ranks.sum()) == pytest.approx(float(hard.sum()), rel=1e-11)
    assert bool((ranks.cumsum(0) >= hard.cumsum(0) - 1e-9).all())


@pytest.mark.parametrize("eps", [0.25, 1.0])
def test_values_further_apart_than_eps_have_hard_ranks_and_no_gradient(eps):
    row = (torch.tensor([3.0, 0.0, 7.0, 1.0, 2.0, -6.0], dtype=torch.float64) * 1.01 * eps).requires_grad_()
    ranks = of_one_row(row, eps)
    torch.testing.assert_close(ranks.detach(), torch.tensor([5, 2, 6, 3, 4, 1]).double(), rtol=1e-14, atol=0)
    uneven = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0, -1.0], dtype=torch.float64)
    assert not torch.autograd.grad((ranks * uneven).sum(), row)[0].any()


def test_values_that_are_all_close_have_ranks_that_are_the_values_about_the_mean_rank():
    row = random_logits(0, 1, 7, 0.05)[0]
    torch.testing.assert_close(of_one_row(row), row - row.mean() + 4, rtol=1e-12, atol=0)


def jacobian_of(blocks, eps):
    size = sum(len(block) for block in blocks)
    jacobian = torch.eye(size, dtype=torch.float64)
    for block in blocks:
        for one, other in itertools.product(block, repeat=2):
            jacobian[one, other] -= 1 / len(block)
    return jacobian / eps


@pytest.mark.parametrize("grid", [0.0, 0.25])
@pytest.mark.parametrize("eps", [0.5, 1.0, 2.0])
def test_the_gradient_is_the_identity_less_the_means_of_the_blocks(eps, grid):
    """On a grid, as half-precision logits are, many neighbours are exactly eps apart: they share a block."""
    sizes = set()
    for row in random_logits(0, 12, 9, 4.0):
        row = (row / grid).round() * grid if grid else row
        blocks = plain_soft_rank(row, eps)[1]
        found = torch.autograd.functional.jacobian(lambda leaf: of_one_row(leaf, eps), row)
        torch.testing.assert_close(found, jacobian_of(blocks, eps), rtol=1e-12, atol=1e-14)
        sizes |= {len(block) for block in blocks}
    assert 1 in sizes
    assert len(sizes) > 2


@pytest.mark.parametrize("elsewhere", [0.0, 1e4, -1e4])
def test_rows_of_one_batch_have_as_many_valid_values_as_they_like_in_any_place(elsewhere):
    generator = torch.Generator().manual_seed(0)
    values = random_logits(0, 40, 10, 1.5)
    valid = torch.rand(40, 10, generator=generator) < torch.linspace(0.15, 1.0, 40).unsqueeze(1)
    valid[:, 3] = True
    assert len(set(valid.sum(1).tolist())) > 5
    values[~valid] = elsewhere
    leaf = values.clone().requires_grad_()
    ranks = soft_rank(leaf, valid, 1.0)
    uneven = random_logits(1, 40, 10)
    gradient = torch.autograd.grad((ranks * uneven)[valid].sum(), leaf)[0]
    for row in range(40):
        single = values[row, valid[row]].requires_grad_()
        expected = plain_soft_rank(single)[0]
        torch.testing.assert_close(ranks[row, valid[row]].detach(), expected.detach(), rtol=1e-12, atol=1e-12)
        expected_gradient = torch.autograd.grad((expected * uneven[row, valid[row]]).sum(), single)[0]
        torch.testing.assert_close(gradient[row, valid[row]], expected_gradient, rtol=1e-12, atol=1e-13)
    assert not gradient[~valid].any()


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("k", [2, 5, 15])
def test_an_id_that_both_models_lead_with_counts_once(k, eps):
    student = random_logits(0, 64, 20).requires_grad_()
    teacher = 0.7 * student.detach() + random_logits(1, 64, 20)
    shared = [2 * k - len(union(s, t, k)) for s, t in zip(student, teacher, strict=True)]
    assert len(set(shared)) >= 3
    expected = plain_rank_loss(student, teacher, k, eps).mean()
    gradient = torch.autograd.grad(expected, student)[0]
    found = value_and_gradient("rank_loss", student.detach(), teacher, k=k, eps=eps)
    torch.testing.assert_close(found, [expected.detach(), gradient], rtol=1e-10, atol=1e-13)


def test_models_that_lead_with_the_same_ids_are_compared_on_those_alone():
    student, teacher = random_logits(0, 6, 9, 0.1), random_logits(1, 6, 9, 0.1)
    found = values_of("rank_loss", student, teacher, k=9)
    expected = [1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(student, teacher, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=0)


def test_logits_that_are_all_close_are_correlated_as_they_are():
    student, teacher = random_logits(0, 6, 20, 0.03), random_logits(1, 6, 20, 0.03)
    for s, t in zip(student, teacher, strict=True):
        ids = union(s, t, 5)
        expected = 1 - torch.corrcoef(torch.stack([s[ids], t[ids]]))[0, 1]
        found = loss_of("rank_loss", s.unsqueeze(0), t.unsqueeze(0), k=5)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_logits_far_apart_are_correlated_by_rank_and_have_no_gradient_even_in_the_wrong_order():
    teacher = torch.tensor([[9.0, 6.0, 4.0, 2.0, 0.0, -3.0]], dtype=torch.float64)
    student = torch.tensor([[0.0, 2.0, 9.0, 4.0, 6.0, -3.0]], dtype=torch.float64)
    value, gradient = value_and_gradient("rank_loss", student, teacher, k=6)
    ranks = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [2.0, 3.0, 6.0, 4.0, 5.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(value, 1 - torch.corrcoef(ranks)[0, 1], rtol=1e-12, atol=0)
    assert float(value) > 0.5
    assert float(gradient.abs().max()) < 1e-15


@pytest.mark.parametrize("k", [2, 5])
def test_models_in_opposite_order_have_the_greatest_loss(k):
    teacher = random_logits(0, 6, k)
    torch.testing.assert_close(
        values_of("rank_loss", -teacher, teacher, k=k, eps=100.0), torch.full((6,), 2.0).double()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, 300.0])
@pytest.mark.parametrize("flat", ["student", "teacher", "both"])
def test_a_model_that_ranks_all_ids_alike_has_no_loss_and_no_gradient(flat, constant, dtype):
    student, teacher = random_logits(0).to(dtype), random_logits(1).to(dtype)
    if flat in ("student", "both"):
        student = torch.full_like(student, constant)
    if flat in ("teacher", "both"):
        teacher = torch.full_like(teacher, constant)
    value, gradient = value_and_gradient("rank_loss", student, teacher)
    assert float(value) == 0
    assert not gradient.any()


def test_one_flat_row_leaves_the_gradients_of_the_others_alone():
    student, teacher = random_logits(0), random_logits(1)
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    expected = value_and_gradient("rank_loss", student, teacher, mask)
    student[2] = 0.0
    found = value_and_gradient("rank_loss", student, teacher)
    torch.testing.assert_close([6 / 5 * part for part in found], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("eps", [30.0, 300.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_eps_exceeds_every_distance_it_does_not_matter(eps, dtype):
    student, teacher = random_logits(0).to(dtype), random_logits(1).to(dtype)
    expected = plain_rank_loss(student.double(), teacher.double(), 5, 30.0).mean()
    value = loss_of("rank_loss", student, teacher, eps=eps)
    # A rank is a small number beside the mean rank, and rounded like it.
    allowed = 50 * torch.finfo(dtype).eps * eps
    assert float(value) == pytest.approx(float(expected), abs=allowed)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_only_pairs_that_the_teacher_tells_apart_count():
    teacher = torch.tensor([[0.4, 0.3, 0.3, 1e-12], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64).log()
    lse = teacher.logsumexp(1)
    assert num_pairs(teacher, lse, k=4, eps=1e-9).tolist() == [2, 3]
    assert num_pairs(teacher, lse, k=2, eps=1e-9).tolist() == [1, 1]
    assert num_pairs(teacher, lse, k=4, eps=0.2).tolist() == [0, 0]
    assert num_pairs(teacher, lse, k=4, eps=0.05).tolist() == [2, 0]


@pytest.mark.parametrize("name", ["logistic_ranking", "hinge"])
def test_a_teacher_that_tells_no_pair_apart_has_no_loss(name):
    value, gradient = value_and_gradient(name, random_logits(0), torch.zeros(6, 12, dtype=torch.float64))
    assert float(value) == 0
    assert not gradient.any()


def test_the_pairs_of_all_positions_have_one_mean():
    student = random_logits(0, 2, 3)
    teacher = torch.tensor([[2.0, 1.0, 0.0], [5.0, 5.0, 0.0]], dtype=torch.float64)
    pairs = [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    losses = [torch.log1p(torch.exp(student[row, low] - student[row, high])) for row, high, low in pairs]
    torch.testing.assert_close(loss_of("logistic_ranking", student, teacher), sum(losses) / 5, rtol=1e-8, atol=0)


def test_a_hinge_rests_where_the_student_keeps_the_distance():
    teacher = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    assert float(loss_of("hinge", 10 * teacher, teacher, margin=0.0)) == 0
    value, gradient = value_and_gradient("hinge", -teacher, teacher, margin=0.5)
    q = (-teacher[0]).softmax(0)
    expected = sum(0.5 - (q[high] - q[low]) for high, low in ((0, 1), (0, 2), (1, 2))) / 3
    assert float(value) == pytest.approx(float(expected), rel=1e-7)
    assert bool(gradient.any())


# ---- overlap --------------------------------------------------------------------------------------------------------


def test_overlap_is_the_share_of_ids_in_both_sets_whatever_their_order():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.stack([torch.randperm(8, generator=generator)[:5] for _ in range(30)]) for _ in "ts")
    expected = [len({*t} & {*s}) / 5 for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    assert overlap(teacher, student).tolist() == pytest.approx(expected)
    assert len(set(expected)) > 2
    assert overlap(teacher, teacher.flip(1)).tolist() == [1.0] * 30
    assert overlap(teacher, teacher + 8).tolist() == [0.0] * 30
