"""The module that maps a batch to its share of the step's loss.

Losses on leading ids share one pass over the head for the ids any of them asks about; losses on whole rows share
another, chunk by chunk.

Shape suffixes: B = sequences, T = tokens, N = positions, C = positions of a chunk, D = hidden size, V = vocabulary,
K = leading ids, S = terms.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workers.distill.sparse_head import logits_at, row_loss, student_top_k
from workers.distill.terms import Term, groups_of
from workers.lookup.batch import Batch, TeacherPositions
from workers.lookup.ladder import Ladder
from workers.losses.ranking import overlap
from workers.losses.targets import Drawn, Targets, TopK, tail_below
from workers.teacher.checkpoint import body_of
from workers.teacher.lm_head import LMHead, head_of


class StudentLoss(nn.Module):
    """A student with its loss as one module: what DDP or DeepSpeed would wrap, so no parameter is used behind it."""

    def __init__(self, model: Any, ladders: Sequence[Ladder], *, vocab_size: int, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self._ladders = tuple(ladders)
        self._vocab_size = vocab_size
        self._autocast = autocast

    def forward(self, batch: Batch, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        """The batch's share of the step's loss: of each term, the sum of its values times its scale.

        Args:
            terms: scaled for the whole step, all its micro-batches and ranks.

        Returns:
            The differentiable loss (scalar) and the detached share of each term [S].
        """
        with torch.autocast(batch.input_ids_BT.device.type, torch.bfloat16, enabled=self._autocast):
            # No attention mask: the padding is on the right, where a causal model cannot look.
            body = body_of(self.model)
            hidden_BTD = body(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
        loss, shares_S = _zeros(hidden_BTD, len(terms))
        for part, positions in batch.parts.items():
            places = [place for place, term in enumerate(terms) if term.part == part]
            hidden_ND = hidden_BTD[positions.sequence_of_N, positions.token_of_N]
            if self._autocast:
                # Autocast leaves the final norm's output in float32; the head's matmuls are a small model's largest.
                hidden_ND = hidden_ND.to(torch.bfloat16)
            if len(positions) == 0:
                loss = loss + hidden_ND.sum() * 0.0
                continue
            share, shares = self._part(positions, hidden_ND, [terms[place] for place in places], batch.cache)
            loss = loss + share
            shares_S[places] = shares
        return loss, shares_S

    def _part(
        self, positions: TeacherPositions, hidden_ND: Tensor, terms: Sequence[Term], cache: int
    ) -> tuple[Tensor, Tensor]:
        """The terms' sum (differentiable) and their shares (detached, [S]) at one part of the positions."""
        head, ladder = head_of(self.model, self._vocab_size), self._ladders[cache]
        factor = _Factor(positions, hidden_ND, head, terms)
        sparse = [place for place, term in enumerate(terms) if not term.loss.student_row]
        whole = [place for place, term in enumerate(terms) if term.loss.student_row]
        total, shares_S = _zeros(hidden_ND, len(terms))
        if sparse:
            chosen = [terms[place] for place in sparse]
            targets = self._leading(positions, hidden_ND, head, chosen, ladder)
            values = [(factor.of(term) * term.values(targets)).sum() for term in chosen]
            total = total + torch.stack(values).sum()
            shares_S[sparse] = torch.stack(values).detach()
        if whole:
            chosen = [terms[place] for place in whole]
            of_rows, sums = row_loss(
                head, hidden_ND, _values_on_rows(positions, chosen, ladder, factor), groups_of(positions, chosen)
            )
            total = total + of_rows
            shares_S[whole] = sums
        return total, shares_S

    def _leading(
        self, positions: TeacherPositions, hidden_ND: Tensor, head: LMHead, terms: Sequence[Term], ladder: Ladder
    ) -> Targets:
        """Both models' logits at the ids that either leads with, and the labels, as far as any of the terms asks."""
        num_teacher = _largest_k(term for term in terms if "top_k" in term.loss.needs)
        num_student = _largest_k(term for term in terms if term.loss.student_led)
        num_asked = _largest_k(term for term in terms if "lookups" in term.loss.needs)
        teacher_ids_NK = positions.token_ids_NK[:, :num_teacher]
        student_ids_NK = student_top_k(head, hidden_ND, num_student) if num_student else positions.token_ids_NK[:, :0]
        columns = [teacher_ids_NK, student_ids_NK]
        if any(term.loss.reads_label for term in terms):
            columns.append(positions.labels_N.unsqueeze(1))
        chosen_NM = logits_at(head, hidden_ND, torch.cat(columns, dim=1))
        at_teacher_NK, at_student_NK, at_label_N1 = chosen_NM.tensor_split(
            [teacher_ids_NK.shape[1], teacher_ids_NK.shape[1] + student_ids_NK.shape[1]], dim=1
        )

        def ahead(num_ids: int) -> Tensor:
            return student_top_k(head, hidden_ND, min(num_ids, self._vocab_size))

        asked_NK = student_ids_NK[:, :num_asked]
        teacher_at_student_NK = ladder.logits_at(positions, asked_NK, ahead) if num_asked else asked_NK.float()
        return Targets(
            teacher_led=TopK(teacher_ids_NK, positions.logits_NK[:, :num_teacher], at_teacher_NK),
            student_led=TopK(student_ids_NK, teacher_at_student_NK, at_student_NK),
            tails=_tails(positions, terms, num_teacher),
            labels_N=positions.labels_N,
            student_label_N=at_label_N1.squeeze(1) if at_label_N1.shape[1] else None,
        )


class _Factor:
    """RLKD's dynamic factor: what multiplies the other losses of a sum with ``rank_loss``, position by position."""

    def __init__(self, positions: TeacherPositions, hidden_ND: Tensor, head: LMHead, terms: Sequence[Term]) -> None:
        self._owner = next((term for term in terms if term.params.get("dynamic")), None)
        if self._owner is not None:
            k = self._owner.k
            self._share_N = overlap(positions.token_ids_NK[:, :k], student_top_k(head, hidden_ND, k))

    def of(self, term: Term, rows: slice = slice(None)) -> Tensor | float:
        return 1.0 if self._owner is None or term is self._owner else self._share_N[rows]


def _values_on_rows(
    positions: TeacherPositions, terms: Sequence[Term], ladder: Ladder, factor: _Factor
) -> Callable[[Tensor, slice], Tensor]:
    """Maps the student's rows of a chunk to the terms' values there."""
    asks_top_k = any("top_k" in term.loss.needs for term in terms)
    asks_rows = any("full_row" in term.loss.needs for term in terms)
    drawn = positions.drawn if any("samples" in term.loss.needs for term in terms) else None
    tails = _tails(positions, terms, positions.token_ids_NK.shape[1])

    def values_of(student_CV: Tensor, chunk: slice) -> Tensor:
        ids_CK = positions.token_ids_NK[chunk]
        targets = Targets(
            teacher_led=TopK(ids_CK, positions.logits_NK[chunk], student_CV.gather(1, ids_CK)) if asks_top_k else None,
            tails={temperature: tail_N[chunk] for temperature, tail_N in tails.items()},
            student_row_NV=student_CV,
            teacher_row_NV=ladder.rows(positions, chunk) if asks_rows else None,
            labels_N=positions.labels_N[chunk],
            drawn=None
            if drawn is None
            else Drawn(drawn.counts_NU[chunk], student_CV.gather(1, drawn.token_ids_NU[chunk])),
        )
        return torch.stack([factor.of(term, chunk) * term.values(targets) for term in terms])

    return values_of


def _tails(positions: TeacherPositions, terms: Sequence[Term], num_leading: int) -> dict[float, Tensor]:
    """At the temperatures the terms ask for: what is left of the teacher below so many leading ids. [N] each"""
    wanted = {term.loss.temperature(term.params) for term in terms if "logsumexp" in term.loss.needs}
    return {
        temperature: tail_below(positions.logits_NK, positions.tails[temperature], num_leading, temperature)
        for temperature in wanted
    }


def _zeros(like: Tensor, num_terms: int) -> tuple[Tensor, Tensor]:
    return like.new_zeros((), dtype=torch.float32), like.new_zeros(num_terms, dtype=torch.float32)


def _largest_k(terms: Iterable[Term]) -> int:
    return max((term.k for term in terms), default=0)
