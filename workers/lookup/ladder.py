"""Answers the teacher's logit of any token at any cached position, by the cheapest way there is.

Tiers, in order: ``cached`` (the id is in the stored top-k), ``hidden`` (the stored hidden state times the head's row),
``logged`` (the same from a hidden state, or the answer itself, that a live teacher gave some run before), ``live`` (the
same from a teacher that is run for it, and logged), ``bound`` (an upper bound, where the run allows one).

Shape suffixes: B = sequences, N = positions, K = stored top-k, M = asked ids per position, Q = missing pairs,
V = vocabulary, C = positions of a chunk, D = hidden size, F = ids fetched ahead.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from workers.errors import InputError
from workers.lookup.answers import AnswerLog
from workers.lookup.batch import TeacherPositions
from workers.lookup.states import Held, TeacherStates
from workers.ordering import find_ids
from workers.teacher.lm_head import LMHead

TIERS = ("cached", "logged", "hidden", "live", "bound")
Ahead = Callable[[int], Tensor]
"""Gives the student's so many highest ids at the positions that are asked about. int64 [N, F]"""
Answer = tuple[Tensor, Tensor | None]
"""Logits of the pairs, float32 [Q], and which of them are answered, bool [Q]; None means all."""


class Ladder:
    """One run's way to the teacher's logits of one cache; counts every pair it answers, by tier.

    Args:
        states: where hidden states come from; None where no tier has any.
        answers: a log of answers, for sequences without hidden states.
        bound: whether what no other tier answers gets the bound.
    """

    def __init__(
        self, states: TeacherStates | None = None, *, answers: AnswerLog | None = None, bound: bool = False
    ) -> None:
        self._states = states
        self._answers = answers
        self._bound = bound
        self._tiers = (self._from_states, self._from_answers, self._from_teacher, self._bounded)
        self._counts: dict[str, Tensor | int] = dict.fromkeys(TIERS, 0)
        self._forwards_taken = 0
        self._assembled: tuple[TeacherPositions, tuple[Held | None, ...], Tensor] | None = None

    def expect(self, indexes: Iterable[int]) -> None:
        """Begin a step over these sequences: a teacher that has to be run for one is run for all it will be asked."""
        if self._answers is not None:
            self._answers.refresh()  # other runs may have logged more
        if self._states is not None:
            self._states.expect(indexes)

    def logits_at(self, positions: TeacherPositions, ids_NM: Tensor, ahead: Ahead | None = None) -> Tensor:
        """The teacher's logits of chosen ids, detached. float32 [N, M]

        Raises:
            InputError: no tier of this run can answer.
        """
        found_NM, logits_NM = find_ids(positions.token_ids_NK, positions.logits_NK, ids_NM)
        self._count("cached", found_NM.sum())
        rows_Q, columns_Q = (~found_NM).nonzero(as_tuple=True)
        open_Q = torch.arange(len(rows_Q), device=rows_Q.device)
        for tier in self._tiers:
            if len(open_Q) == 0:
                return logits_NM
            rows, columns = rows_Q[open_Q], columns_Q[open_Q]
            answered = tier(positions, rows, ids_NM[rows, columns], ahead)
            if answered is not None:
                values, which = answered
                if which is None:
                    logits_NM[rows, columns] = values.to(logits_NM.device)
                    return logits_NM
                logits_NM[rows[which], columns[which]] = values.to(logits_NM.device)[which]
                open_Q = open_Q[~which]
        if len(open_Q):
            raise InputError(
                "a lookup left the stored top-k, and the run has no hidden states, teacher or bound for it: give "
                "--teacher or --on-miss bound."
            )
        return logits_NM

    def rows(self, positions: TeacherPositions, chunk: slice) -> Tensor:
        """The teacher's whole rows at some of the positions, detached. float32 [C, V]

        Raises:
            InputError: no hidden states of a sequence, and no teacher.
        """
        everyone = range(len(positions.members))
        held = self._held(positions, everyone)
        if None in held and self._states is not None and self._states.has_teacher:
            self._states.fetch(member.index for member in positions.members)
            held = self._held(positions, everyone)
        if None in held:
            raise InputError("a loss needs the teacher's whole rows, and the run has neither hidden states nor teacher")
        with torch.no_grad():
            rows_CV = self._head.logits(self._assemble(positions, held)[chunk])
        return rows_CV.to(positions.labels_N.device)

    def take_counts(self) -> tuple[dict[str, int], int]:
        """Pairs answered per tier and teacher forwards since the last call. Synchronises the device."""
        counts = {tier: int(count) for tier, count in self._counts.items()}
        self._counts = dict.fromkeys(TIERS, 0)
        total = self._states.teacher_forwards if self._states else 0
        forwards, self._forwards_taken = total - self._forwards_taken, total
        return counts, forwards

    def _from_states(
        self, positions: TeacherPositions, rows_Q: Tensor, ids_Q: Tensor, ahead: Ahead | None
    ) -> Answer | None:
        pairs_B = _pairs_per_sequence(positions, rows_Q)
        asked = [row for row, pairs in enumerate(pairs_B) if pairs]
        held = self._held(positions, asked)
        if not any(held):
            return None
        for item, pairs in zip(held, pairs_B, strict=True):
            if item is not None:
                self._count(item.tier, pairs)
        hidden_ND = self._assemble(positions, held)
        self._keep_answers(positions, held, rows_Q, ids_Q, ahead, hidden_ND)
        with torch.no_grad():
            logits_Q = self._head.logits_of_pairs(hidden_ND, rows_Q.to(hidden_ND.device), ids_Q.to(hidden_ND.device))
        if all(held[row] for row in asked):
            return logits_Q, None
        held_B = torch.tensor([item is not None for item in held], device=rows_Q.device)
        return logits_Q, held_B[positions.sequence_of_N[rows_Q]]

    def _from_answers(
        self, positions: TeacherPositions, rows_Q: Tensor, ids_Q: Tensor, ahead: Ahead | None
    ) -> Answer | None:
        if self._answers is None:
            return None
        logits_Q, which_Q = self._answers.find(positions, rows_Q, ids_Q)
        self._count("logged", which_Q.sum())
        return logits_Q, which_Q

    def _from_teacher(
        self, positions: TeacherPositions, rows_Q: Tensor, ids_Q: Tensor, ahead: Ahead | None
    ) -> Answer | None:
        if self._states is None or not self._states.has_teacher:
            return None
        asked = [row for row, pairs in enumerate(_pairs_per_sequence(positions, rows_Q)) if pairs]
        self._states.fetch(positions.members[row].index for row in asked)
        return self._from_states(positions, rows_Q, ids_Q, ahead)

    def _keep_answers(
        self,
        positions: TeacherPositions,
        held: tuple[Held | None, ...],
        rows_Q: Tensor,
        ids_Q: Tensor,
        ahead: Ahead | None,
        hidden_ND: Tensor,
    ) -> None:
        """Where answers are logged, log what the teacher has just said."""
        live = [row for row, item in enumerate(held) if item is not None and item.tier == "live"]
        if live and self._answers is not None and self._answers.is_written:
            ahead_NF = ahead(self._answers.fetch_ahead) if ahead and self._answers.fetch_ahead else None
            self._answers.keep(positions, live, rows_Q, ids_Q, ahead_NF, hidden_ND, self._head)

    def _bounded(
        self, positions: TeacherPositions, rows_Q: Tensor, ids_Q: Tensor, ahead: Ahead | None
    ) -> Answer | None:
        if not self._bound:
            return None
        self._count("bound", len(rows_Q))
        return positions.bounds_N[rows_Q], None

    @property
    def _head(self) -> LMHead:
        assert self._states is not None
        return self._states.head

    def _held(self, positions: TeacherPositions, asked: Iterable[int]) -> tuple[Held | None, ...]:
        """By row of the batch, what can be found without the teacher; None for rows that are not asked about. [B]"""
        held: list[Held | None] = [None] * len(positions.members)
        if self._states is not None:
            rows = list(asked)
            for row, found in zip(rows, self._states.find([positions.members[row].index for row in rows]), strict=True):
                held[row] = found
        return tuple(held)

    def _assemble(self, positions: TeacherPositions, held: tuple[Held | None, ...]) -> Tensor:
        """Hidden states of the positions, zeros where nothing is held, on the head's device. [N, D]

        The last are kept: chunks of a loss on whole rows ask for the same again.
        """
        if self._assembled is not None and self._assembled[0] is positions and self._assembled[1] == held:
            return self._assembled[2]
        weight_VD = self._head.weight_VD
        dtype = next(item.states_PD.dtype for item in held if item is not None)
        parts = [
            torch.zeros(len(member.stored_rows), weight_VD.shape[1], dtype=dtype)
            if item is None
            else item.states_PD[member.stored_rows]
            for item, member in zip(held, positions.members, strict=True)
        ]
        hidden_ND = torch.cat(parts).to(weight_VD.device)
        self._assembled = (positions, held, hidden_ND)
        return hidden_ND

    def _count(self, tier: str, pairs: Tensor | int) -> None:
        self._counts[tier] = self._counts[tier] + pairs


def _pairs_per_sequence(positions: TeacherPositions, rows_Q: Tensor) -> list[int]:
    """By row of the batch. [B]"""
    sequence_Q = positions.sequence_of_N[rows_Q]
    counts: list[int] = torch.bincount(sequence_Q, minlength=len(positions.members)).tolist()
    return counts
