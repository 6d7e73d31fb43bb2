"""The terms of a run's loss: which losses, on which positions, and how much a position counts in each.

Every mean is over the whole step. So each term's weights are added up first, over all micro-batches and ranks, and then
every micro-batch is scaled by the same number: a token weighs the same wherever it lands.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.distill.config import DistillConfig
from workers.distill.loss_config import LossConfig
from workers.lookup.batch import Batch, Part, TeacherPositions
from workers.losses.loss import Loss, Params
from workers.losses.targets import Targets


@dataclass(frozen=True)
class Term:
    """One loss on one part of the positions."""

    part: Part
    loss: Loss
    params: Params
    weight: float = 1.0
    """In the sum."""

    @property
    def k(self) -> int:
        k = self.params["k"]
        assert isinstance(k, int)
        return k

    def weight_in(self, batches: Iterable[Batch]) -> float:
        """What the positions of some micro-batches count together in the term's mean."""
        return float(sum(_weight_of(self, batch.parts[self.part]) for batch in batches if self.part in batch.parts))

    def scaled(self, total_weight: float) -> "ScaledTerm":
        """The same term in a step whose positions, of all micro-batches and ranks, count so much."""
        return ScaledTerm(self, self.weight / self.loss.divisor(total_weight, self.params))


@dataclass(frozen=True)
class ScaledTerm:
    """A term in one step."""

    term: Term
    scale: float
    """What its values are multiplied with: the weight over what all positions of the step count together."""

    def values(self, targets: Targets) -> Tensor:
        """Scaled. [N]"""
        return self.term.loss.values(targets, **self.term.params) * self.scale


def losses_of(config: DistillConfig) -> dict[Part, LossConfig]:
    """The parts of the positions that are trained, each with its losses."""
    prompt = config.prompt_loss or config.loss.on_prompt
    losses: dict[Part, LossConfig] = {"response": config.loss}
    return losses | ({"prompt": prompt} if prompt else {})


def terms_of(config: DistillConfig, top_k: int, vocab_size: int) -> list[Term]:
    """The terms of a run on caches that store ``top_k`` ids, or more, of ``vocab_size``."""
    return [
        Term(part, summand.loss, summand.parameters(top_k, vocab_size), summand.weight)
        for part, losses in losses_of(config).items()
        for summand in losses.summands
    ]


def groups_of(positions: TeacherPositions, term: Term) -> list[slice]:
    """The runs of positions of one sequence that have one value together."""
    size = term.params[term.loss.group_size]
    assert isinstance(size, int)
    groups, start = [], 0
    for member in positions.members:
        end = start + len(member.stored_rows)
        groups += [slice(first, min(first + size, end)) for first in range(start, end, size)]
        start = end
    return groups


def _weight_of(term: Term, positions: TeacherPositions) -> Tensor | int:
    """What the positions count in the term's mean; on the device where it takes computing."""
    if term.loss.group_size:
        return len(groups_of(positions, term))
    if term.loss.weights is None or len(positions) == 0:
        return len(positions)
    logsumexp_N = torch.logaddexp(positions.logits_NK.logsumexp(1), positions.tails[1.0])
    return term.loss.weights(positions.logits_NK, logsumexp_N, **term.params).sum()
