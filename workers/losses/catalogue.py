"""Every loss by name: what it computes, what it needs of the teacher, where it comes from, why to choose it."""

from workers.losses import (
    bild,
    decoupled,
    divergences,
    likelihood,
    ranking,
    score_matching,
    transport,
    truncated,
)
from workers.losses.loss import Loss

_FAMILIES = (bild, divergences, truncated, decoupled, score_matching, ranking, transport, likelihood)

LOSSES: dict[str, Loss] = {loss.name: loss for family in _FAMILIES for loss in family.LOSSES}
