"""What must be true of a sequence's rows: the writer refuses to store anything else, ``verify`` looks for it again."""

from typing import Any

import numpy as np
import numpy.typing as npt

from cache_schema.encoding import HIDDEN_COLUMN, HIDDEN_NUMPY_DTYPES, all_finite
from cache_schema.manifest import Plan
from cache_schema.sequence import ScoredSequence


def fault_in_rows(scored: ScoredSequence, plan: Plan) -> str | None:
    """What a reader could not trust in ids, logits, tails and scalars, or None. Hidden states: ``fault_in_hidden``."""
    sequence, rows = scored.sequence, scored.rows
    targets = sequence.target_rows(plan.positions)
    if len(targets) == 0:
        return "it has no target position"
    expected = (len(targets), plan.top_k)
    shapes: dict[str, tuple[int, ...]] = {"token_ids": expected, "logits": expected}
    shapes["tail_logsumexp"] = (expected[0], len(plan.temperatures))
    shapes |= dict.fromkeys(("label_logit", "row_mean", "row_std"), expected[:1])
    for name, shape in shapes.items():
        if getattr(rows, name).shape != shape:
            return f"{name} is {getattr(rows, name).shape}, the plan and the mask say {shape}"
    vocab_size = plan.tokenizer.vocab_size
    for name, ids in (("input_ids", sequence.input_ids), ("token_ids", rows.token_ids)):
        if ids.min() < 0 or ids.max() >= vocab_size:
            outside = ids.min() if ids.min() < 0 else ids.max()
            return f"{name} holds {outside}, outside the vocabulary of {vocab_size}"
    ordered = np.sort(rows.token_ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return "a token id stands twice in one position"
    for name in ("logits", "label_logit", "row_mean", "row_std"):
        if not np.isfinite(getattr(rows, name)).all():
            return f"{name} is not finite"
    # With K = V the tail is empty and its log-sum-exp is -inf; anything else must be a number.
    empty_tail = (rows.tail_logsumexp == -np.inf) & (plan.top_k == vocab_size)
    if not (np.isfinite(rows.tail_logsumexp) | empty_tail).all():
        return "tail_logsumexp is not finite"
    if (rows.logits[:, 1:] > rows.logits[:, :-1]).any():
        return "logits increase"
    return _fault_in_labels(scored, sequence.input_ids[targets + 1], plan)


def _fault_in_labels(scored: ScoredSequence, labels: npt.NDArray[np.int32], plan: Plan) -> str | None:
    rows = scored.rows
    # A stored logit is within half a step of the truth, the label's own is exact: they must agree where both stand.
    slack = plan.logit_step / 2 + 1e-5 * max(1.0, float(np.abs(rows.logits).max()))
    is_label = rows.token_ids == labels[:, None]
    inside = is_label.any(axis=1)
    stored = rows.logits[is_label]  # one a position that has its label inside, in their order
    if (np.abs(stored - rows.label_logit[inside]) > slack).any():
        return "a label's logit differs from the same id's in the top k"
    if (rows.label_logit[~inside] > rows.logits[~inside, -1] + slack).any():
        return "a label outside the top k has a logit above it"
    return None


def fault_in_hidden(states: npt.NDArray[Any] | None, num_positions: int, plan: Plan, dtype: str) -> str | None:
    """What a reader could not trust in a sequence's hidden states, or None.

    Args:
        dtype: of ``states``: the teacher's as they are written, ``CacheReader.hidden_dtype`` as they are read.
    """
    hidden = plan.hidden_states
    if hidden is None:
        return None if states is None else "it has hidden states, the plan keeps none"
    wanted = (num_positions, hidden.size)
    if states is None or states.shape != wanted or states.dtype != np.dtype(HIDDEN_NUMPY_DTYPES[dtype]):
        return f"{HIDDEN_COLUMN} must be {wanted} in {dtype}"
    if not all_finite(states, dtype):
        return f"{HIDDEN_COLUMN} is not finite"
    return None
