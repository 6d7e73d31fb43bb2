"""Final-norm hidden states of a cache's sequences, from the cheapest tier that has them.

Shape suffixes: P = stored positions of a sequence, D = hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema.lookup_writer import LookupWriter
from cache_schema.lookups import LookupLog
from cache_schema.reader import CacheReader
from workers.lookup.live import LiveTeacher
from workers.lookup.stored import stored_hidden_states
from workers.teacher.lm_head import LMHead

StateTier = Literal["hidden", "logged", "live"]


@dataclass(frozen=True, eq=False)
class Held:
    """A sequence's hidden states at its stored positions, in the teacher's compute dtype, on the CPU."""

    tier: StateTier
    states_PD: Tensor


class TeacherStates:
    """Looks for hidden states in the cache, then in the log, then asks the teacher; keeps those of one step.

    Args:
        head: makes logits of them.
        log: answers for sequences that a live teacher has seen for some run.
        live: None where no teacher was given.
        writer: where the live teacher's hidden states go; None keeps none.
        whole_steps: whether a miss in one sequence runs the teacher on all of the step's that cannot be found.
    """

    def __init__(
        self,
        reader: CacheReader,
        head: LMHead,
        *,
        log: LookupLog | None = None,
        live: LiveTeacher | None = None,
        writer: LookupWriter | None = None,
        whole_steps: bool = True,
    ) -> None:
        self.head = head
        self._reader = reader
        self._log = log
        self._live = live
        self._writer = writer
        self._whole_steps = whole_steps
        self._expected: tuple[int, ...] = ()
        self._live_ones: dict[int, Held] = {}
        self._read_ones: dict[int, Held] = {}

    @property
    def has_teacher(self) -> bool:
        return self._live is not None

    @property
    def teacher_forwards(self) -> int:
        """Sequences run through the teacher so far."""
        return self._live.forwards if self._live else 0

    def expect(self, indexes: Iterable[int]) -> None:
        """Begin a step over these sequences; what the teacher gave for the last one is let go."""
        self._expected = tuple(indexes)
        self._live_ones = {}

    def find(self, indexes: Sequence[int]) -> list[Held | None]:
        """What can be had of a batch's sequences without the teacher; what was read for another batch is let go."""
        kept = {index: held for index in indexes if (held := self._read_ones.get(index)) is not None}
        self._read_ones = kept
        return [self._find(index) for index in indexes]

    def _find(self, index: int) -> Held | None:
        if index in self._live_ones:
            return self._live_ones[index]
        if index not in self._read_ones:
            if self._reader.has_hidden_states:
                self._read_ones[index] = Held("hidden", stored_hidden_states(self._reader, index))
            elif self._log is not None:
                logged = self._log.hidden_states(index)
                if logged is not None:
                    self._read_ones[index] = Held("logged", from_bits(logged, self._reader.plan.teacher.dtype))
        return self._read_ones.get(index)

    def fetch(self, indexes: Iterable[int]) -> None:
        """Run the teacher on those that cannot be found, after another look at the log."""
        assert self._live is not None
        if self._log is not None:
            self._log.refresh()
        wanted = dict.fromkeys([*indexes, *(self._expected if self._whole_steps else ())])
        missing = [index for index in wanted if not self._is_found(index)]
        if not missing:
            return
        states = self._live.hidden_states(missing)
        if self._writer is not None:
            rows = (
                (index, self._reader[index].sequence.sequence_id, to_bits(states_PD))
                for index, states_PD in sorted(states.items())
            )
            self._writer.write("hidden", rows)
        self._live_ones |= {index: Held("live", states_PD) for index, states_PD in states.items()}

    def _is_found(self, index: int) -> bool:
        if self._reader.has_hidden_states or index in self._live_ones:
            return True
        return self._log is not None and self._log.has_hidden_states(index)


def to_bits(states_PD: Tensor) -> npt.NDArray[Any]:
    """As numpy; it has no bfloat16, whose bits travel as uint16."""
    bits = states_PD.view(torch.uint16) if states_PD.dtype == torch.bfloat16 else states_PD
    array: npt.NDArray[Any] = bits.numpy()
    return array


def from_bits(array: npt.NDArray[Any], dtype: str) -> Tensor:
    """Undo ``to_bits``."""
    bits = torch.from_numpy(np.array(array))
    return bits.view(torch.bfloat16) if dtype == "bfloat16" else bits
