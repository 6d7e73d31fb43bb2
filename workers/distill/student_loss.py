"""The module that maps a batch to its share of the step's loss.

Losses on leading ids share one pass over the head for the ids any of them asks about; losses on whole rows share
another, chunk by chunk.

Shape suffixes: B = sequences, T = tokens, N = positions, C = positions of a chunk, D = hidden size, V = vocabulary,
K = leading ids, S = terms.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from workers.distill.sparse_head import logits_at, row_loss, student_top_k
from workers.distill.terms import ScaledTerm, Term, groups_of
from workers.lookup.batch import Batch, TeacherPositions
from workers.lookup.ladder import Ladder
from workers.losses.loss import Need
from workers.losses.ranking import overlap
from workers.losses.targets import Drawn, Targets, TopK, tail_below
from workers.teacher.checkpoint import body_of
from workers.teacher.lm_head import LMHead, head_of

R = TypeVar("R")


class StudentLoss(nn.Module):
    """A student with its loss as one module, which DDP, FSDP2 or DeepSpeed wrap.

    They see parameters used while the module is called: so whatever reads the student is given to it as a job.
    """

    def __init__(self, model: Any, ladders: Sequence[Ladder], *, vocab_size: int, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self.ladders = tuple(ladders)
        """Of each cache, by its number."""
        self._vocab_size = vocab_size
        self._autocast = autocast

    def forward(self, job: Callable[["StudentLoss"], R]) -> R:
        return job(self)

    def share(self, batch: Batch, terms: Sequence[ScaledTerm]) -> tuple[Tensor, Tensor]:
        """The batch's share of the step's loss: of each term, the sum of its values times its scale.

        Under autocast, losses on leading ids read logits of the weights as the engine holds them (float32 under DDP,
        bfloat16 under FSDP2 and ZeRO-1 to 3), losses on whole rows of bfloat16 ones.

        Args:
            terms: scaled for the whole step, all its micro-batches and ranks.

        Returns:
            The differentiable loss (scalar) and the detached share of each term [S].
        """
        with torch.autocast(batch.input_ids_BT.device.type, torch.bfloat16, enabled=self._autocast):
            # No attention mask: the padding is on the right, where a causal model cannot look.
            body = body_of(self.model)
            hidden_BTD = body(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
        loss = hidden_BTD.new_zeros((), dtype=torch.float32)
        shares = [loss.detach()] * len(terms)
        for part, positions in batch.parts.items():
            hidden_ND = hidden_BTD[positions.sequence_of_N, positions.token_of_N]
            if self._autocast:
                # Autocast leaves the final norm's output in float32; the head's matmuls are a small model's largest.
                hidden_ND = hidden_ND.to(torch.bfloat16)
            if len(positions) == 0:
                # Zeros, of every parameter: ranks that have a position wait for this one's gradients.
                no_ids_N1 = positions.labels_N.unsqueeze(1)
                head = head_of(self.model, self._vocab_size)
                loss = loss + hidden_ND.sum() * 0.0 + logits_at(head, hidden_ND, no_ids_N1).sum()
                continue
            here = [place for place, scaled in enumerate(terms) if scaled.term.part == part]
            sparse = [place for place in here if not terms[place].term.loss.student_row]
            whole = [place for place in here if terms[place].term.loss.student_row]
            pass_over = _Pass(positions, hidden_ND, head_of(self.model, self._vocab_size), self.ladders[batch.cache])
            student_ids_NK = pass_over.student_ids([terms[place].term for place in here])
            factors = pass_over.factors([terms[place].term for place in here], student_ids_NK)
            on_leading_ids = partial(pass_over.on_leading_ids, student_ids_NK)
            for places, run in ((sparse, on_leading_ids), (whole, pass_over.on_rows)):
                if places:
                    factor_of = [factors[here.index(place)] for place in places]
                    share, values = run([terms[place] for place in places], factor_of)
                    loss = loss + share
                    for place, value in zip(places, values, strict=True):
                        shares[place] = value
        return loss, torch.stack(shares).float()


@dataclass(frozen=True)
class _Pass:
    """One part of a batch's positions, and what its losses are made from."""

    positions: TeacherPositions
    hidden_ND: Tensor
    head: LMHead
    ladder: Ladder

    def student_ids(self, terms: Sequence[Term]) -> Tensor:
        """As many of the student's leading ids as any of the terms asks for, none if none does. [N, K]"""
        most = _largest_k(term for term in terms if term.loss.student_led)
        return student_top_k(self.head, self.hidden_ND, most) if most else self.positions.token_ids_NK[:, :0]

    def factors(self, terms: Sequence[Term], student_ids_NK: Tensor) -> list[Tensor | None]:
        """What multiplies each term's values, position by position: RLKD's dynamic factor, for all but its own term."""
        owner = next((t for t in terms if t.loss.weighs_others and t.params[t.loss.weighs_others]), None)
        if owner is None:
            return [None] * len(terms)
        share_N = overlap(self.positions.token_ids_NK[:, : owner.k], student_ids_NK[:, : owner.k])
        return [None if term is owner else share_N for term in terms]

    def on_leading_ids(
        self, student_ids_NK: Tensor, terms: Sequence[ScaledTerm], factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """The terms' sum (differentiable) and each one's (detached)."""
        targets = self._leading([scaled.term for scaled in terms], student_ids_NK)
        sums = [_times(factor, scaled.values(targets)).sum() for scaled, factor in zip(terms, factors, strict=True)]
        return torch.stack(sums).sum(), [value.detach() for value in sums]

    def on_rows(self, terms: Sequence[ScaledTerm], factors: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """The same of losses that read the student's whole rows; the leading ids are cut from those."""
        positions, needs = self.positions, frozenset[Need]().union(*(scaled.term.loss.needs for scaled in terms))
        tails = _tails(positions, [scaled.term for scaled in terms], positions.token_ids_NK.shape[1])

        def values_of(student_CV: Tensor, chunk: slice) -> Iterator[Tensor]:
            ids_CK, drawn = positions.token_ids_NK[chunk], positions.drawn
            targets = Targets(
                teacher_led=TopK(ids_CK, positions.logits_NK[chunk], student_CV.gather(1, ids_CK)),
                tails={temperature: tail_N[chunk] for temperature, tail_N in tails.items()},
                student_row_NV=student_CV,
                teacher_row_NV=self.ladder.rows(positions, chunk) if "full_row" in needs else None,
                labels_N=positions.labels_N[chunk],
                drawn=None
                if drawn is None
                else Drawn(drawn.counts_NU[chunk], student_CV.gather(1, drawn.token_ids_NU[chunk])),
            )
            for scaled, factor in zip(terms, factors, strict=True):
                if scaled.term.loss.group_size:
                    values_C = _by_group(scaled, targets, groups, chunk)
                else:
                    values_C = scaled.values(targets)
                yield _times(None if factor is None else factor[chunk], values_C)

        grouped = [scaled.term for scaled in terms if scaled.term.loss.group_size]
        groups = groups_of(positions, grouped[0]) if grouped else []
        total, sums_S = row_loss(self.head, self.hidden_ND, values_of, groups)
        return total, list(sums_S)

    def _leading(self, terms: Sequence[Term], student_ids_NK: Tensor) -> Targets:
        """Both models' logits at the ids that either leads with, and the labels, as far as any of the terms asks."""
        positions, head, hidden_ND = self.positions, self.head, self.hidden_ND
        num_teacher = _largest_k(term for term in terms if "top_k" in term.loss.needs)
        num_student = _largest_k(term for term in terms if term.loss.student_led)
        num_asked = _largest_k(term for term in terms if "lookups" in term.loss.needs)
        columns = [positions.token_ids_NK[:, :num_teacher], student_ids_NK[:, :num_student]]
        if any(term.loss.reads_label for term in terms):
            columns.append(positions.labels_N.unsqueeze(1))
        chosen_NM = logits_at(head, hidden_ND, torch.cat(columns, dim=1))
        borders = [columns[0].shape[1], columns[0].shape[1] + columns[1].shape[1]]
        at_teacher_NK, at_student_NK, at_label_N1 = chosen_NM.tensor_split(borders, dim=1)

        def ahead(num_ids: int) -> Tensor:
            return student_top_k(head, hidden_ND, min(num_ids, head.vocab_size))

        asked_NK = student_ids_NK[:, :num_asked]
        teacher_at_student_NK = self.ladder.logits_at(positions, asked_NK, ahead) if num_asked else asked_NK.float()
        return Targets(
            teacher_led=TopK(columns[0], positions.logits_NK[:, :num_teacher], at_teacher_NK),
            student_led=TopK(columns[1], teacher_at_student_NK, at_student_NK),
            tails=_tails(positions, terms, num_teacher),
            labels_N=positions.labels_N,
            student_label_N=at_label_N1.squeeze(1) if at_label_N1.shape[1] else None,
        )


def _by_group(scaled: ScaledTerm, targets: Targets, groups: Sequence[slice], chunk: slice) -> Tensor:
    """The values of a chunk of whole groups, each group seen alone. [C]"""
    teacher_CV, student_CV = targets.rows()
    inside = [
        slice(group.start - chunk.start, group.stop - chunk.start)
        for group in groups
        if chunk.start <= group.start < chunk.stop
    ]
    alone = [Targets(student_row_NV=student_CV[group], teacher_row_NV=teacher_CV[group]) for group in inside]
    return torch.cat([scaled.values(group) for group in alone])


def _times(factor_N: Tensor | None, values_N: Tensor) -> Tensor:
    return values_N if factor_N is None else factor_N * values_N


def _tails(positions: TeacherPositions, terms: Sequence[Term], num_leading: int) -> dict[float, Tensor]:
    """At the temperatures the terms ask for: what is left of the teacher below so many leading ids. [N] each"""
    wanted = {term.loss.temperature(term.params) for term in terms if "logsumexp" in term.loss.needs}
    return {
        temperature: tail_below(positions.logits_NK, positions.tails[temperature], num_leading, temperature)
        for temperature in wanted
    }


def _largest_k(terms: Iterable[Term]) -> int:
    return max((term.k for term in terms), default=0)
