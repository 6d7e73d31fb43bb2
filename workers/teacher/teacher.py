"""What the dump needs of a teacher: final-norm hidden states at target positions, and the LM head above them."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from cache_schema.manifest import Engine, Generation, TeacherIdentity
from cache_schema.sequence import Positions, TokenSequence
from workers.teacher.lm_head import LMHead


class Teacher(Protocol):
    """An engine with a loaded model. The sequences of one call of ``hidden_states`` form one batch."""

    identity: TeacherIdentity
    engine: Engine
    lm_head: LMHead

    def hidden_states(self, batch: Sequence[TokenSequence], positions: Positions) -> list[Tensor]:
        """Final-norm hidden states at each sequence's target rows, compute dtype. [P_i, D] each

        Raises:
            InputError: a hidden state is not finite.
        """
        ...

    def respond(
        self, prompts: Sequence[TokenSequence], generation: Generation, seed: int
    ) -> Iterator[list[TokenSequence]]:
        """Let the teacher finish each prompt, any number of them; the new tokens are the trained ones.

        Yields what is finished, some at a time. The same prompts and seed give the same responses.
        """
        ...
