"""The terms of a run's loss: which losses, on which positions, and how much a position counts in each.

Every mean is over the whole step. So each term's weights are added up first, over all micro-batches and ranks, and then
every micro-batch is scaled by the same number: a token weighs the same wherever it lands.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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
    scale: float = 1.0
    """What its values are multiplied with: the weight over what all positions of the step count together."""

    @property
    def k(self) -> int:
        k = self.params["k"]
        assert isinstance(k, int)
        return k

    def values(self, targets: Targets) -> Tensor:
        """Its values, scaled. [N]"""
        return self.loss.values(targets, **self.params) * self.scale

    def for_step(self, batches: Iterable[Batch]) -> "Term":
        """The same term, scaled for a step of these micro-batches."""
        total = sum(_weight_of(self, batch.parts[self.part]) for batch in batches if self.part in batch.parts)
        return replace(self, scale=self.weight / self.loss.divisor(total, self.params))


def losses_of(config: DistillConfig) -> list[tuple[Part, LossConfig]]:
    """The parts of the positions that are trained, each with its losses."""
    losses: list[tuple[Part, LossConfig]] = [("response", config.loss)]
    if config.prompt_loss is not None:
        losses.append(("prompt", config.prompt_loss))
    elif config.loss.on_prompt is not None:
        name, params = config.loss.on_prompt
        losses.append(("prompt", LossConfig(name=name, **params)))
    return losses


def terms_of(config: DistillConfig, top_k: int, vocab_size: int) -> list[Term]:
    """The terms of a run on caches that store ``top_k`` ids, or more, of ``vocab_size``."""
    return [
        Term(part, summand.loss, summand.parameters(top_k, vocab_size), summand.weight)
        for part, losses in losses_of(config)
        for summand in losses.summands
    ]


def groups_of(positions: TeacherPositions, terms: Sequence[Term]) -> list[slice] | None:
    """Where a term's positions have one value together: runs of so many positions of a sequence; None elsewhere."""
    joint = [term for term in terms if term.loss.joint]
    if not joint:
        return None
    size = joint[0].params["rows"]
    assert isinstance(size, int)
    groups, start = [], 0
    for member in positions.members:
        end = start + len(member.stored_rows)
        groups += [slice(first, min(first + size, end)) for first in range(start, end, size)]
        start = end
    return groups


def _weight_of(term: Term, positions: TeacherPositions) -> float:
    """What the positions count in the term's mean."""
    if term.loss.joint:
        return float(len(groups_of(positions, [term]) or ()))
    if term.loss.weights is None or len(positions) == 0:
        return float(len(positions))
    logsumexp_N = torch.logaddexp(positions.logits_NK.logsumexp(1), positions.tails[1.0])
    return float(term.loss.weights(positions.logits_NK, logsumexp_N, **term.params).sum())
