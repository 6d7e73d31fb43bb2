"""What the dump needs of a teacher: final-norm hidden states at target positions, and the LM head above them.

Where these cannot be had, the rows that the engine makes itself.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from cache_schema.plan import Engine, Generation, TeacherIdentity
from cache_schema.sequence import Positions, TokenSequence, TopKRows
from workers.teacher.lm_head import LMHead


class RespondingTeacher(Protocol):
    """An engine with a loaded model."""

    identity: TeacherIdentity
    engine: Engine

    def respond(
        self, prompts: Sequence[TokenSequence], generation: Generation, seed: int
    ) -> Iterator[list[TokenSequence]]:
        """Let the teacher finish each prompt, any number of them; the new tokens are the trained ones.

        Yields what is finished, some at a time. The same prompts and seed give the same responses.
        """
        ...


class Teacher(RespondingTeacher, Protocol):
    """An engine that runs the body. The sequences of one call of ``hidden_states`` form one batch."""

    lm_head: LMHead

    def hidden_states(self, batch: Sequence[TokenSequence], positions: Positions) -> list[Tensor]:
        """Final-norm hidden states at each sequence's target rows, compute dtype. [P_i, D] each

        Raises:
            InputError: a hidden state is not finite.
        """
        ...


@runtime_checkable
class ScoringTeacher(RespondingTeacher, Protocol):
    """An engine that keeps hidden states and head to itself. The sequences of one call form one batch."""

    def top_k_rows(self, batch: Sequence[TokenSequence], positions: Positions, top_k: int) -> list[TopKRows]:
        """The engine's own logits at each sequence's target rows: the leading ones and the label's, no tails.

        Raises:
            InputError: a logit is not finite, or they are not what they should be.
        """
        ...
