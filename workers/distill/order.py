"""Which sequences a step trains on: a pure function of (seed, step), so resuming needs no data-loader state."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Pick:
    """One sequence of one of the run's caches."""

    cache: int
    index: int


class Order:
    """Epochs over one cache or several.

    An epoch has as many sequences as the caches hold together. Without weights each is one of them; with weights,
    shares of the epoch go to the caches by weight, and each cache's sequences follow one another in permutation after
    permutation, wherever an epoch ends.

    Args:
        sizes: sequences of each cache.
        weights: one a cache, > 0; None is by size.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None, *, sequences_per_step: int, seed: int
    ) -> None:
        self._sizes = tuple(sizes)
        self._sequences_per_step = sequences_per_step
        self._seed = seed
        self.quotas = quotas_of(self._sizes, weights)
        """Sequences of each cache in an epoch."""
        assert all(self.quotas)
        self._epoch: tuple[int, list[Pick]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be short."""
        return -(-sum(self._sizes) // self._sequences_per_step)

    def step(self, step: int) -> list[Pick]:
        """The sequences of one step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._picks(epoch))
        first = step_in_epoch * self._sequences_per_step
        return self._epoch[1][first : first + self._sequences_per_step]

    def _picks(self, epoch: int) -> list[Pick]:
        picks = [
            Pick(cache, int(index))
            for cache, quota in enumerate(self.quotas)
            for index in self._draws(cache, quota, epoch)
        ]
        order = np.random.default_rng([self._seed, epoch]).permutation(len(picks))
        return [picks[place] for place in order.tolist()]

    def _draws(self, cache: int, quota: int, epoch: int) -> npt.NDArray[np.int64]:
        """Entries ``epoch * quota`` onward of the cache's endless row of permutations."""
        size, first = self._sizes[cache], epoch * quota
        if quota == size:
            return np.arange(size)
        passes = range(first // size, -(-(first + quota) // size))
        row = np.concatenate(
            [np.random.default_rng([self._seed, cache, number]).permutation(size) for number in passes]
        )
        return row[first - passes.start * size :][:quota]


def quotas_of(sizes: Sequence[int], weights: Sequence[float] | None) -> tuple[int, ...]:
    """Sequences of each cache in an epoch, by weight: shares rounded down, and up where most was cut off."""
    if weights is None:
        return tuple(sizes)
    shares = np.array(weights) / sum(weights) * sum(sizes)
    quotas = np.floor(shares).astype(int)
    most_cut = np.argsort(quotas - shares, kind="stable")[: sum(sizes) - int(quotas.sum())]
    quotas[most_cut] += 1
    return tuple(quotas.tolist())
