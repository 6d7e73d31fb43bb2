"""The hidden states a dump kept, and the LM head that makes logits of them."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cache_schema.errors import CacheCorruptError
from cache_schema.manifest import LM_HEAD_NAME
from cache_schema.reader import CacheReader
from cache_schema.storage import sha256_of
from workers.teacher.lm_head import LMHead, load_head, score

_CHECKED_SEQUENCES = 4


class CachedHiddenStates:
    """Reads what the dump kept.

    Raises:
        CacheCorruptError: the head is damaged, or does not reproduce stored logits from stored hidden states.
    """

    tier: Literal["hidden", "live"] = "hidden"
    teacher_forwards = 0

    def __init__(self, reader: CacheReader, device: torch.device) -> None:
        self._reader = reader
        _require_stored_hash(reader)
        self.head = load_head(reader.lm_head_path, device)
        require_head_of_cache(reader, self.head)

    def hidden_states(self, indexes: Sequence[int]) -> list[Tensor]:
        return [stored_hidden_states(self._reader, index) for index in indexes]


def stored_hidden_states(reader: CacheReader, index: int) -> Tensor:
    """One sequence's stored hidden states in their own dtype, on the CPU. [P, D]"""
    assert reader.plan.hidden_states is not None
    bits = torch.from_numpy(np.array(reader.hidden_states(index)))
    return bits.view(torch.bfloat16) if reader.plan.hidden_states.dtype == "bfloat16" else bits


def require_head_of_cache(reader: CacheReader, head: LMHead, num_sequences: int = _CHECKED_SEQUENCES) -> None:
    """Recompute stored logits, by their ids and as a top-k, from hidden states and head, in sequences over the cache.

    Raises:
        CacheCorruptError: they are not the stored ones: the head or the hidden states are another teacher's.
    """
    plan = reader.plan
    if head.vocab_size != plan.tokenizer.vocab_size:
        raise CacheCorruptError(
            f"{reader.lm_head_path} has {head.vocab_size} rows, the plan {plan.tokenizer.vocab_size}"
        )
    spread = np.unique(np.linspace(0, len(reader) - 1, min(num_sequences, len(reader)), dtype=int))
    for index in spread.tolist():
        hidden_PD = stored_hidden_states(reader, index).to(head.weight_VD.device)
        rows = reader[index].rows
        ids_PK = torch.from_numpy(rows.token_ids.astype(np.int64)).to(hidden_PD.device)
        with torch.inference_mode():
            # The top-k alone would not see rows that have changed places, the stored ids not a row that is now larger.
            top_PK = score(head, hidden_PD, ids_PK[:, 0], plan.top_k, (1.0,)).logits_NK
            found_2PK = torch.stack([top_PK, head.logits_at(hidden_PD, ids_PK)]).cpu().numpy()
        # Half a step of rounding, and float32 sums in another order.
        tolerance = plan.logit_step / 2 + 1e-4 * max(1.0, float(np.abs(rows.logits).max()))
        difference = float(np.abs(found_2PK - rows.logits).max())
        if not difference <= tolerance:
            raise CacheCorruptError(
                f"{reader.lm_head_path} does not belong to the hidden states of {reader.cache_dir}: recomputed top-k "
                f"logits of sequence {index} differ from the stored ones by {difference:.3g} (rounding explains "
                f"{tolerance:.2g}). Restore both from the same dump, or dump again."
            )


def _require_stored_hash(reader: CacheReader) -> None:
    """The head answers every lookup, so all of its bytes are checked, once a run."""
    stored = {file.name: file.sha256 for file in reader.manifest.files}
    if sha256_of(reader.lm_head_path) != stored.get(LM_HEAD_NAME):
        raise CacheCorruptError(
            f"{reader.lm_head_path} is damaged: its SHA-256 is not the manifest's. Restore it, or dump again."
        )
