"""The teacher's hidden states at cached positions: from disk, or from the teacher itself."""

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from cache_schema.errors import CacheMismatchError
from cache_schema.manifest import TeacherIdentity
from cache_schema.reader import CacheReader
from workers.teacher.lm_head import LMHead
from workers.teacher.teacher import Teacher


class HiddenStateSource(Protocol):
    """Final-norm hidden states of positions, and the LM head that makes logits of them."""

    tier: Literal["hidden", "live"]
    head: LMHead
    teacher_forwards: int
    """Sequences run through the teacher so far."""

    def hidden_states(self, indexes: Sequence[int]) -> list[Tensor]:
        """Those of every stored position of each sequence, in the teacher's compute dtype. [P_i, D] each"""
        ...


class LiveHiddenStates:
    """Runs the teacher that made the cache on whole sequences.

    Raises:
        CacheMismatchError: it is another teacher.
    """

    tier: Literal["hidden", "live"] = "live"

    def __init__(self, reader: CacheReader, teacher: Teacher) -> None:
        require_same_teacher(reader, teacher.identity)
        self._reader = reader
        self._teacher = teacher
        self.head = teacher.lm_head
        self.teacher_forwards = 0

    def hidden_states(self, indexes: Sequence[int]) -> list[Tensor]:
        self.teacher_forwards += len(indexes)
        sequences = [self._reader[index].sequence for index in indexes]
        return self._teacher.hidden_states(sequences, self._reader.plan.positions)


def require_same_teacher(reader: CacheReader, given: TeacherIdentity) -> None:
    """Refuse a teacher other than the one the cache was dumped with.

    Raises:
        CacheMismatchError: names the field that differs.
    """
    stored = reader.plan.teacher
    for field in ("fingerprint", "dtype"):
        if getattr(stored, field) != getattr(given, field):
            raise CacheMismatchError(
                f"--teacher is not the teacher of {reader.cache_dir}: its {field} is {getattr(given, field)}, the "
                f"cache's ({stored.name}) is {getattr(stored, field)}. Give the teacher the cache was dumped with."
            )
