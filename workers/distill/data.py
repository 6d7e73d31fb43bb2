"""What a run trains on: the caches, and which of their sequences it keeps."""

from collections.abc import Sequence
from dataclasses import dataclass

from cache_schema.reader import CacheReader
from workers.distill.config import DistillConfig
from workers.distill.order import Order, quotas_of
from workers.distill.selection import FilterConfig, select_each
from workers.errors import InputError


@dataclass(frozen=True)
class TrainingData:
    """One cache, or several of one tokenizer."""

    readers: tuple[CacheReader, ...]
    kept: tuple[Sequence[int], ...]
    """Of each cache, the indexes of the sequences that are trained on."""

    @classmethod
    def of(cls, readers: Sequence[CacheReader], chosen: FilterConfig | None = None) -> "TrainingData":
        """What the filter keeps; everything without one.

        Raises:
            InputError: nothing is left of a cache, or it does not hold what the filter asks about.
        """
        return cls(tuple(readers), tuple(select_each(readers, chosen)))

    @property
    def top_k(self) -> int:
        """Ids that every cache stores at a position."""
        return min(reader.plan.top_k for reader in self.readers)

    @property
    def vocab_size(self) -> int:
        return self.readers[0].plan.tokenizer.vocab_size

    @property
    def sizes(self) -> list[int]:
        return [len(indexes) for indexes in self.kept]

    def order(self, config: DistillConfig) -> Order:
        return Order(self.sizes, config.weights, sequences_per_step=config.sequences_per_step, seed=config.seed)

    def num_steps(self, config: DistillConfig) -> int:
        """As asked, or so many epochs."""
        return config.steps or config.epochs * self.order(config).steps_per_epoch

    def require_shares(self, weights: Sequence[float] | None) -> None:
        """Refuse weights that leave a cache nothing.

        Raises:
            InputError: names the cache.
        """
        for reader, quota in zip(self.readers, quotas_of(self.sizes, weights), strict=True):
            if quota == 0:
                raise InputError(
                    f"--weights leaves {reader.cache_dir} without a single sequence in an epoch: give it a larger "
                    f"share, or leave it out."
                )
