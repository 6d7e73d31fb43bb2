"""The teacher itself, for sequences of which neither the dump nor the log has hidden states."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cache_schema.errors import CacheMismatchError
from cache_schema.plan import TeacherIdentity
from cache_schema.reader import CacheReader
from workers.teacher.batches import batches
from workers.teacher.lm_head import LMHead
from workers.teacher.sampling import fault_in_draws
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
                self._require_what_is_stored(index_of[batch[0]], states[0])
                self._checked = True
            found |= {index_of[sequence]: part.cpu() for sequence, part in zip(batch, states, strict=True)}
        self.forwards += len(found)
        return found

    def _require_what_is_stored(self, index: int, hidden_PD: Tensor) -> None:
        fault = fault_in_states(self._reader, index, hidden_PD, self._teacher.lm_head)
        if fault:
            dumped_with = self._reader.plan.engine.versions.get("transformers", "unknown")
            raise CacheMismatchError(
                f"--teacher gives other logits than {self._reader.cache_dir} holds of it: in sequence {index}, "
                f"{fault}. Use the transformers version of the dump ({dumped_with}), or dump again."
            )


def fault_in_states(reader: CacheReader, index: int, hidden_PD: Tensor, head: LMHead) -> str | None:
    """Why what is stored of a sequence cannot be of hidden states that a teacher gave anew, or None."""
    plan, hidden_PD = reader.plan, hidden_PD.to(head.weight_VD.device)
    # Float32 sums in another order. In half precision a body rounds each layer's output, and how it adds depends on the
    # padding of the batch.
    precision = 1e-4 if plan.teacher.dtype == "float32" else 2**-4
    if plan.sampling:
        with torch.inference_mode():
            return fault_in_draws(plan, reader[index], hidden_PD, head, precision)
    rows = reader[index].top_k_rows
    ids_PK = torch.from_numpy(rows.token_ids.astype(np.int64)).to(hidden_PD.device)
    with torch.no_grad():
        logits_PK = head.logits_at(hidden_PD, ids_PK).cpu().numpy()
    difference = float(np.abs(logits_PK - rows.logits).max())
    tolerance = plan.logit_step / 2 + precision * max(1.0, float(np.abs(rows.logits).max()))
    if difference <= tolerance:
        return None
    return f"recomputed logits differ from the stored ones by {difference:.3g} (rounding explains {tolerance:.2g})"


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
