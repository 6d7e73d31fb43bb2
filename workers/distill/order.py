"""Which sequences a step trains on: a pure function of (seed, step), so resuming needs no data-loader state."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ORDER_VERSION = 2
"""Raised when the same seed gives another order: a run ends with the order it was begun with."""
_SHUFFLE, _PASS = 0, 1  # kinds of random streams


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
        sizes: sequences of each cache; of one that is filtered, those it keeps (see ``among``).
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
        self._epoch, self._picks = -1, np.empty((0, 2), dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be short."""
        return -(-sum(self._sizes) // self._sequences_per_step)

    def step(self, step: int) -> list[Pick]:
        """The sequences of one step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch, self._picks = epoch, self._picks_of(epoch)
        first = step_in_epoch * self._sequences_per_step
        return [Pick(cache, index) for cache, index in self._picks[first : first + self._sequences_per_step].tolist()]

    def _picks_of(self, epoch: int) -> npt.NDArray[np.int64]:
        """Cache and index of an epoch's sequences. [sequences, 2]"""
        caches = np.repeat(np.arange(len(self.quotas)), self.quotas)
        indexes = np.concatenate([self._draws(cache, quota, epoch) for cache, quota in enumerate(self.quotas)])
        picks: npt.NDArray[np.int64] = np.stack([caches, indexes], axis=1)
        return self._random(_SHUFFLE, epoch).permutation(picks)

    def _draws(self, cache: int, quota: int, epoch: int) -> npt.NDArray[np.int64]:
        """Entries ``epoch * quota`` onward of the cache's endless row of permutations."""
        size, first = self._sizes[cache], epoch * quota
        if quota == size:
            return np.arange(size)
        passes = range(first // size, -(-(first + quota) // size))
        row = np.concatenate([self._random(_PASS, cache, number).permutation(size) for number in passes])
        return row[first - passes.start * size :][:quota]

    def _random(self, *key: int) -> np.random.Generator:
        """A stream of its own for each key; in a list of seeds, trailing zeros would not count."""
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))


def among(picks: Sequence[Pick], kept: Sequence[Sequence[int]]) -> list[Pick]:
    """The picks of an order over kept sequences, as indexes of the caches.

    Args:
        kept: of each cache the indexes of the sequences it keeps, as many as the order's size of it.
    """
    return [Pick(pick.cache, kept[pick.cache][pick.index]) for pick in picks]


def quotas_of(sizes: Sequence[int], weights: Sequence[float] | None) -> tuple[int, ...]:
    """Sequences of each cache in an epoch, by weight: shares rounded down, and up where most was cut off."""
    if weights is None:
        return tuple(sizes)
    most = np.array(weights) / max(weights)  # whose sum cannot overflow
    shares = most / most.sum() * sum(sizes)
    quotas = np.floor(shares).astype(int)
    most_cut = np.argsort(quotas - shares, kind="stable")[: sum(sizes) - int(quotas.sum())]
    quotas[most_cut] += 1
    return tuple(quotas.tolist())
