"""Answers the teacher's logit of any token at any cached position, by the cheapest exact way there is.

Tiers, in order: ``cached`` (the id is in the stored top-k), then ``hidden`` (one dot product of the stored hidden
state and the head's row) or ``live`` (the same, from a teacher that is run for it).

Shape suffixes: N = positions, K = stored top-k, M = asked ids per position, Q = missing pairs, V = vocabulary,
C = positions of a chunk, D = hidden size.
"""

import torch
from torch import Tensor

from workers.errors import InputError
from workers.lookup.batch import TeacherPositions
from workers.lookup.live import HiddenStateSource

TIERS = ("cached", "logged", "hidden", "live", "bound")


class Ladder:
    """One run's way to the teacher's logits; counts every pair it answers, by tier.

    Args:
        source: where hidden states come from; None leaves the ``cached`` tier alone.
    """

    def __init__(self, source: HiddenStateSource | None) -> None:
        self._source = source
        self._counts: dict[str, Tensor | int] = dict.fromkeys(TIERS, 0)
        self._forwards_taken = 0
        self._held_sequences: tuple[tuple[int, ...], list[Tensor]] = ((), [])
        self._held_positions: tuple[TeacherPositions, Tensor] | None = None

    def logits_at(self, positions: TeacherPositions, ids_NM: Tensor) -> Tensor:
        """The teacher's logits of chosen ids, detached. float32 [N, M]

        Raises:
            InputError: an id is outside the stored top-k and no other tier was given.
        """
        # [N, M, K] bools: a compare, cheaper than a hash for the few hundred K there are.
        matches_NMK = ids_NM.unsqueeze(2) == positions.token_ids_NK.unsqueeze(1)
        found_NM, place_NM = matches_NMK.max(dim=2)
        logits_NM = positions.logits_NK.gather(1, place_NM)
        num_found = found_NM.sum()
        self._count("cached", num_found)
        missing_Q2 = (~found_NM).nonzero()
        if len(missing_Q2) == 0:
            return logits_NM
        if self._source is None:
            raise InputError("a lookup left the stored top-k, but the run has neither hidden states nor a teacher")
        self._count(self._source.tier, len(missing_Q2))
        rows_Q, columns_Q = missing_Q2.unbind(1)
        logits_NM[rows_Q, columns_Q] = self._pairs(positions, rows_Q, ids_NM[rows_Q, columns_Q]).to(logits_NM.device)
        return logits_NM

    def rows(self, positions: TeacherPositions, chunk: slice) -> Tensor:
        """The teacher's whole rows at some of the positions, detached. float32 [C, V]"""
        assert self._source is not None
        with torch.no_grad():
            return self._source.head.logits(self._hidden_states(positions)[chunk])

    def take_counts(self) -> tuple[dict[str, int], int]:
        """Pairs answered per tier and teacher forwards since the last call. Synchronises the device."""
        counts = {tier: int(count) for tier, count in self._counts.items()}
        self._counts = dict.fromkeys(TIERS, 0)
        total = self._source.teacher_forwards if self._source else 0
        forwards, self._forwards_taken = total - self._forwards_taken, total
        return counts, forwards

    def _pairs(self, positions: TeacherPositions, rows_Q: Tensor, ids_Q: Tensor) -> Tensor:
        assert self._source is not None
        hidden_ND = self._hidden_states(positions)
        device = hidden_ND.device
        with torch.no_grad():
            hidden_QD = hidden_ND[rows_Q.to(device)]
            return self._source.head.logits_at(hidden_QD, ids_Q.to(device).unsqueeze(1)).squeeze(1)

    def _hidden_states(self, positions: TeacherPositions) -> Tensor:
        """[N, D] on the head's device. What was asked last is kept: chunks ask for the same positions, response and
        prompt for the same sequences."""
        assert self._source is not None
        if self._held_positions is not None and self._held_positions[0] is positions:
            return self._held_positions[1]
        indexes = tuple(member.index for member in positions.members)
        if self._held_sequences[0] != indexes:
            self._held_sequences = (indexes, self._source.hidden_states(indexes))
        states = [
            states_PD[member.stored_rows.to(states_PD.device)]
            for states_PD, member in zip(self._held_sequences[1], positions.members, strict=True)
        ]
        hidden_ND = torch.cat(states).to(self._source.head.weight_VD.device)
        self._held_positions = (positions, hidden_ND)
        return hidden_ND

    def _count(self, tier: str, pairs: Tensor | int) -> None:
        self._counts[tier] = self._counts[tier] + pairs
