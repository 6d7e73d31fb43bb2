"""The teacher itself, for sequences of which neither the dump nor the log has hidden states."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cache_schema.errors import CacheMismatchError
from cache_schema.manifest import TeacherIdentity
from cache_schema.reader import CacheReader
from workers.teacher.dump import batches
from workers.teacher.lm_head import LMHead
from workers.teacher.teacher import Teacher


class LiveTeacher:
    """Runs the teacher that made a cache on whole sequences of it.

    Args:
        tokens_per_batch: padded tokens it reads at once; None is as many as at the dump.

    Raises:
        CacheMismatchError: it is another teacher, by its files or by its logits.
    """

    def __init__(self, reader: CacheReader, teacher: Teacher, tokens_per_batch: int | None = None) -> None:
        require_same_teacher(reader, teacher.identity)
        self._reader = reader
        self._teacher = teacher
        self._tokens_per_batch = tokens_per_batch or reader.plan.engine.tokens_per_batch
        self._checked = False
        self.forwards = 0
        """Sequences run so far."""

    def hidden_states(self, indexes: Sequence[int]) -> dict[int, Tensor]:
        """Final-norm hidden states at every stored position of each sequence, compute dtype, on the CPU. [P_i, D]"""
        plan = self._reader.plan
        index_of = {self._reader[index].sequence: index for index in indexes}
        found: dict[int, Tensor] = {}
        for batch in batches(list(index_of), self._tokens_per_batch):
            states = self._teacher.hidden_states(batch, plan.positions)
            if not self._checked:  # what the teacher says now is what the cache holds of it
                self._require_stored_logits(index_of[batch[0]], states[0])
                self._checked = True
            found |= {index_of[sequence]: part.cpu() for sequence, part in zip(batch, states, strict=True)}
        self.forwards += len(found)
        return found

    def _require_stored_logits(self, index: int, hidden_PD: Tensor) -> None:
        if self._reader.plan.sampling:  # draws say too little of logits: its files have to do
            return
        difference, tolerance = off_stored_logits(self._reader, index, hidden_PD, self._teacher.lm_head)
        if not difference <= tolerance:
            dumped_with = self._reader.plan.engine.versions.get("transformers", "unknown")
            raise CacheMismatchError(
                f"--teacher gives other logits than {self._reader.cache_dir} holds of it: they differ by "
                f"{difference:.3g} in sequence {index} (rounding explains {tolerance:.2g}). Use the transformers "
                f"version of the dump ({dumped_with}), or dump again."
            )


def off_stored_logits(reader: CacheReader, index: int, hidden_PD: Tensor, head: LMHead) -> tuple[float, float]:
    """How far a sequence's stored logits are from those of hidden states a teacher gave anew, and what rounding
    explains, in nats."""
    rows, plan = reader[index].top_k_rows, reader.plan
    hidden_PD = hidden_PD.to(head.weight_VD.device)
    ids_PK = torch.from_numpy(rows.token_ids.astype(np.int64)).to(hidden_PD.device)
    with torch.no_grad():
        logits_PK = head.logits_at(hidden_PD, ids_PK).cpu().numpy()
    # Half a step, and float32 sums in another order. In half precision a body rounds each layer's output, and how it
    # adds depends on the padding of the batch.
    precision = 1e-4 if plan.teacher.dtype == "float32" else 2**-4
    tolerance = plan.logit_step / 2 + precision * max(1.0, float(np.abs(rows.logits).max()))
    return float(np.abs(logits_PK - rows.logits).max()), tolerance


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
