"""The one order of logits: descending, ties by ascending token id, whatever torch.topk does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.ordering import exact_top_k, sort_by_logit


def lexsorted(logits, k):
    """The definition, by numpy: sort by -logit, then by id."""
    ids = np.broadcast_to(np.arange(logits.shape[1]), logits.shape)
    order = np.lexsort((ids, -logits.astype(np.float64)), axis=1)[:, :k]
    return np.take_along_axis(logits, order, axis=1), order


def assert_top_k(logits, k):
    values, ids = exact_top_k(torch.from_numpy(logits), k)
    expected_values, expected_ids = lexsorted(logits, k)
    np.testing.assert_array_equal(ids.numpy(), expected_ids)
    np.testing.assert_array_equal(values.numpy(), expected_values)


@pytest.mark.parametrize("k", [1, 2, 8, 63, 64, 199, 200])
@pytest.mark.parametrize("spread", [0.5, 3.0, 30.0])
def test_ties_go_to_the_lower_id(k, spread):
    rows = np.random.default_rng(0).normal(size=(50, 200)) * spread
    assert_top_k(rows.round().astype(np.float32), k)


@pytest.mark.parametrize("k", [1, 8, 200])
def test_logits_without_ties_are_in_descending_order(k):
    assert_top_k(np.random.default_rng(0).normal(size=(50, 200)).astype(np.float32), k)


@pytest.mark.parametrize("vocab_size", [4096, 4097, 5000])
@pytest.mark.parametrize("spread", [0.5, 3.0, 300.0])
def test_of_many_blocks_of_ids_the_same_ones_are_chosen(vocab_size, spread):
    rows = (np.random.default_rng(0).normal(size=(20, vocab_size)) * spread).round().astype(np.float32)
    rows[3, -3:] = rows.max() + 1  # ids after the last whole block, where there are any
    rows[4] = 0.0
    rows[5, 100:140] = rows.max()  # all in one block
    for k in (1, 8, 15):
        assert_top_k(rows, k)


def test_a_tie_through_the_cut_keeps_the_lowest_ids():
    row = np.full((3, 100), -1.0, dtype=np.float32)
    row[0, [90, 40, 7, 70, 30]] = 2.0  # five tied for three places
    row[1, 50] = 3.0  # and a row of one leader, the rest tied
    row[2] = 0.0
    ids = exact_top_k(torch.from_numpy(row), 3)[1]
    assert ids.tolist() == [[7, 30, 40], [50, 0, 1], [0, 1, 2]]


def test_only_some_rows_tied_at_the_cut_leave_the_others_right():
    rows = np.random.default_rng(1).normal(size=(40, 300)).astype(np.float32)
    rows[::3] = rows[::3].round()
    assert_top_k(rows, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_is_ordered_alike(dtype):
    logits = (torch.randn(30, 500, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    expected = lexsorted(logits.double().numpy(), 9)[1]
    np.testing.assert_array_equal(exact_top_k(logits, 9)[1].numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40).flatmap(lambda v: st.tuples(st.just(v), st.integers(1, v))), st.integers(0, 2**32 - 1))
def test_the_order_is_numpy_s_lexsort_for_every_k(sizes, seed):
    vocab_size, k = sizes
    logits = np.random.default_rng(seed).integers(-3, 3, size=(7, vocab_size)).astype(np.float32)
    logits[logits == 2] = np.inf
    logits[logits == -3] = -np.inf
    assert_top_k(logits, k)


def test_no_rows_have_no_top_k():
    values, ids = exact_top_k(torch.empty(0, 10), 3)
    assert values.shape == ids.shape == (0, 3)


def test_the_logits_are_left_as_they_were():
    logits = torch.randn(5, 20).round()
    before = logits.clone()
    exact_top_k(logits, 4)
    assert torch.equal(logits, before)


def test_ascending_ids_are_sorted_stably():
    ids = torch.arange(1000).mul(3).expand(4, -1)
    values = torch.randint(0, 3, (4, 1000), generator=torch.Generator().manual_seed(0)).float()
    sorted_values, sorted_ids = sort_by_logit(values, ids)
    assert bool((sorted_values.diff(dim=1) <= 0).all())
    tied = sorted_values.diff(dim=1) == 0
    assert bool((sorted_ids.diff(dim=1)[tied] > 0).all())
    assert torch.equal(sorted_values, values.gather(1, sorted_ids // 3))
