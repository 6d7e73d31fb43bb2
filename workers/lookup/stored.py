"""The hidden states a dump kept, and the LM head that makes logits of them."""

import numpy as np
import torch
from torch import Tensor

from cache_schema.errors import CacheCorruptError
from cache_schema.manifest import LM_HEAD_NAME
from cache_schema.plan import Plan
from cache_schema.reader import CacheReader
from cache_schema.sequence import TopKRows
from cache_schema.storage import sha256_of
from workers.teacher.lm_head import LMHead, load_head
from workers.teacher.sampling import BEYOND_THE_PILOT, fault_in_draws
from workers.teacher.scoring import score

_CHECKED_SEQUENCES = 4


def stored_head(reader: CacheReader, device: torch.device) -> LMHead:
    """The LM head that the dump kept; on the CPU its file is mapped, not read.

    Raises:
        CacheCorruptError: it is damaged, or does not reproduce stored logits from stored hidden states.
    """
    _require_stored_hash(reader)
    head = load_head(reader.lm_head_path, device)
    require_head_of_cache(reader, head)
    return head


def stored_hidden_states(reader: CacheReader, index: int) -> Tensor:
    """One sequence's stored hidden states in the teacher's compute dtype, on the CPU. [P, D]"""
    states = torch.from_numpy(np.require(reader.hidden_states(index), requirements="W"))
    if reader.hidden_dtype == "bfloat16":
        return states.view(torch.bfloat16)
    # int8 is read as float32; the others have the teacher's dtype already.
    dtype: torch.dtype = getattr(torch, reader.plan.teacher.dtype)
    return states.to(dtype)


def require_head_of_cache(reader: CacheReader, head: LMHead, num_sequences: int = _CHECKED_SEQUENCES) -> None:
    """Recompute what is stored from hidden states and head, in sequences over the cache: logits, by their ids and as a
    top-k, or draws.

    Where int8 moves single logits further than a wrong head might, their mean shows the head: int8 errors are small on
    average.

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
        with torch.inference_mode():
            if plan.sampling:
                fault = fault_in_draws(plan, reader[index], hidden_PD, head)
            else:
                fault = _fault_in_logits(plan, reader[index].top_k_rows, hidden_PD, head)
        if fault:
            raise CacheCorruptError(
                f"{reader.lm_head_path} does not belong to the hidden states of {reader.cache_dir}: in sequence "
                f"{index}, {fault}. Restore both from the same dump, or dump again."
            )


def _fault_in_logits(plan: Plan, rows: TopKRows, hidden_PD: Tensor, head: LMHead) -> str | None:
    """Why stored logits cannot be of these hidden states and this head, or None."""
    assert plan.hidden_states is not None
    ids_PK = torch.from_numpy(rows.token_ids.astype(np.int64)).to(hidden_PD.device)
    # The top-k alone would not see rows that have changed places, the stored ids not a row that is now larger.
    top_PK = score(head, hidden_PD, ids_PK[:, 0], plan.top_k, (1.0,)).logits_NK
    found_2PK = torch.stack([top_PK, head.logits_at(hidden_PD, ids_PK)]).cpu().numpy()
    # Half a step of rounding, and float32 sums in another order.
    rounding = plan.logit_step / 2 + 1e-4 * max(1.0, float(np.abs(rows.logits).max()))
    difference_2PK = np.abs(found_2PK - rows.logits)
    for name, error, difference in (
        ("", plan.hidden_states.max_logit_error, float(difference_2PK.max())),
        (" on average", plan.hidden_states.mean_logit_error, float(difference_2PK.mean())),
    ):
        tolerance = rounding + BEYOND_THE_PILOT * (error or 0.0)
        if not difference <= tolerance:
            return (
                f"recomputed top-k logits differ from the stored ones by {difference:.3g}{name} (rounding explains "
                f"{tolerance:.2g})"
            )
    return None


def _require_stored_hash(reader: CacheReader) -> None:
    """The head answers every lookup, so all of its bytes are checked, once a run."""
    stored = {file.name: file.sha256 for file in reader.manifest.files}
    if sha256_of(reader.lm_head_path) != stored.get(LM_HEAD_NAME):
        raise CacheCorruptError(
            f"{reader.lm_head_path} is damaged: its SHA-256 is not the manifest's. Restore it, or dump again."
        )
