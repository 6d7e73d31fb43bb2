"""What the dump needs of a teacher: final-norm hidden states at target positions, and the LM head above them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cache_schema.manifest import Engine, Generation, TeacherIdentity
from cache_schema.sequence import Positions, TokenSequence
from workers.teacher.lm_head import LMHead


class Teacher(Protocol):
    """An engine with a loaded model. Sequences of one call form one batch, so the caller decides its composition."""

    identity: TeacherIdentity
    engine: Engine
    lm_head: LMHead

    def hidden_states(self, batch: Sequence[TokenSequence], positions: Positions) -> list[Tensor]:
        """Final-norm hidden states at each sequence's target rows, compute dtype. [P_i, D] each

        Raises:
            InputError: a hidden state is not finite.
        """
        ...

    def respond(self, batch: Sequence[TokenSequence], generation: Generation, seed: int) -> list[TokenSequence]:
        """Let the teacher finish each prompt; the new tokens are the trained ones."""
        ...
