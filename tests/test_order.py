"""Which sequences a step trains on: a pure function of the seed and the step's number."""

from collections import Counter
from itertools import pairwise

import pytest

from workers.distill.order import Order, Pick, among


def steps_of(order, num_steps):
    return [[(pick.cache, pick.index) for pick in order.step(step)] for step in range(num_steps)]


def epochs_of(order, num_epochs):
    """The picks of each epoch, in order."""
    steps = steps_of(order, num_epochs * order.steps_per_epoch)
    per_epoch = order.steps_per_epoch
    firsts = range(0, len(steps), per_epoch)
    return [[pick for step in steps[first : first + per_epoch] for pick in step] for first in firsts]


def everyone(sizes):
    return {(cache, index) for cache, size in enumerate(sizes) for index in range(size)}


@pytest.mark.parametrize("sizes", [(10,), (7, 4), (1, 1, 9)])
def test_every_sequence_is_seen_once_an_epoch(sizes):
    order = Order(sizes, None, sequences_per_step=3, seed=0)
    assert order.quotas == sizes
    epochs = epochs_of(order, 3)
    for epoch in epochs:
        assert len(epoch) == sum(sizes)
        assert set(epoch) == everyone(sizes)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_caches_are_mixed_within_an_epoch():
    epoch = epochs_of(Order((50, 50), None, sequences_per_step=8, seed=0), 1)[0]
    changes = sum(first[0] != second[0] for first, second in pairwise(epoch))
    assert changes > 25  # one after the other would change once, at random 50 are expected


def test_only_the_last_step_of_an_epoch_is_short():
    order = Order((7, 4), None, sequences_per_step=4, seed=0)
    assert order.steps_per_epoch == 3
    assert [len(step) for step in steps_of(order, 6)] == [4, 4, 3, 4, 4, 3]


@pytest.mark.parametrize(
    ("sizes", "weights", "quotas"),
    [
        ((10, 10), (1, 1), (10, 10)),
        ((10, 10), (3, 1), (15, 5)),
        ((30, 10), (1, 1), (20, 20)),
        ((30, 10), (0.2, 0.2), (20, 20)),  # shares, not probabilities
        ((5, 5), (2, 1), (7, 3)),  # 6.67 and 3.33
        ((3, 3, 4), (1, 1, 1), (4, 3, 3)),  # 3.33 each: the first takes what is left over
        ((1, 100), (1, 1), (51, 50)),  # 50.5 each
        ((10, 10), (1e308, 1e308), (10, 10)),  # whose sum is no float
        ((10, 10), (5e-324, 5e-324), (10, 10)),
    ],
)
def test_weights_are_shares_of_an_epoch(sizes, weights, quotas):
    order = Order(sizes, weights, sequences_per_step=4, seed=0)
    assert order.quotas == quotas
    for epoch in epochs_of(order, 3):
        counts = Counter(cache for cache, _ in epoch)
        assert tuple(counts[cache] for cache in range(len(sizes))) == quotas
        assert set(epoch) <= everyone(sizes)


def test_the_sequences_of_a_cache_come_round_and_round_over_the_epochs():
    """After any number of epochs no sequence of a cache has been seen twice more often than another."""
    sizes, weights = (7, 11), (2, 1)
    order = Order(sizes, weights, sequences_per_step=4, seed=3)
    seen = Counter(dict.fromkeys(everyone(sizes), 0))
    for epoch in epochs_of(order, 9):
        seen.update(epoch)
        for cache, size in enumerate(sizes):
            counts = [seen[cache, index] for index in range(size)]
            assert max(counts) - min(counts) <= 1
    assert sum(seen.values()) == 9 * 18


@pytest.mark.parametrize("weights", [None, (2, 1)])
def test_a_step_is_the_same_whatever_was_asked_before_it(weights):
    def fresh():
        return Order((7, 11), weights, sequences_per_step=4, seed=3)

    in_sequence = steps_of(fresh(), 30)
    assert [fresh().step(step) for step in range(30)] == [fresh().step(step) for step in range(30)]
    assert [[(pick.cache, pick.index) for pick in fresh().step(step)] for step in range(30)] == in_sequence
    backwards = fresh()
    assert [[(pick.cache, pick.index) for pick in backwards.step(step)] for step in reversed(range(30))] == in_sequence[
        ::-1
    ]


@pytest.mark.parametrize("weights", [None, (2, 1)])
def test_the_seed_decides_the_order(weights):
    one, other = (Order((7, 11), weights, sequences_per_step=4, seed=seed) for seed in (0, 1))
    assert steps_of(one, 5) != steps_of(other, 5)


def test_an_order_over_kept_sequences_sees_each_of_them_once_an_epoch_and_no_other():
    kept = [[1, 4, 5, 9], [0, 2]]
    order = Order([len(indexes) for indexes in kept], None, sequences_per_step=4, seed=0)
    picks = [pick for step in range(order.steps_per_epoch) for pick in among(order.step(step), kept)]
    assert sorted((pick.cache, pick.index) for pick in picks) == [(0, 1), (0, 4), (0, 5), (0, 9), (1, 0), (1, 2)]


def test_keeping_everything_changes_no_pick():
    picks = Order((7, 4), None, sequences_per_step=11, seed=0).step(0)
    assert among(picks, [range(7), range(4)]) == picks
    assert among([Pick(1, 0)], [[], [3]]) == [Pick(1, 3)]
