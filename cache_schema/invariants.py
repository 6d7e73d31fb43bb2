"""What must be true of a sequence's rows: the writer refuses to store anything else, ``verify`` looks for it again."""

from typing import Any

import numpy as np
import numpy.typing as npt

from cache_schema.encoding import HIDDEN_COLUMN, HIDDEN_NUMPY_DTYPES, all_finite
from cache_schema.plan import Plan
from cache_schema.sequence import SampledRows, ScoredSequence, TopKRows


def fault_in_rows(scored: ScoredSequence, plan: Plan) -> str | None:
    """What a reader could not trust in ids and in what stands beside them, or None. Hidden states: see below."""
    sequence, rows = scored.sequence, scored.rows
    targets = sequence.target_rows(plan.positions)
    if len(targets) == 0:
        return "it has no target position"
    fault = _fault_in_ids("input_ids", sequence.input_ids, plan)
    if fault:
        return fault
    labels = sequence.input_ids[targets + 1]
    if plan.sampling is not None and isinstance(rows, SampledRows):
        return _fault_in_draws(rows, len(targets), plan.sampling.draws, plan)
    if plan.sampling is None and isinstance(rows, TopKRows):
        return _fault_in_top_k(rows, labels, plan)
    return f"its rows are {type(rows).__name__}, the plan's are {'draws' if plan.sampling else 'a top-k'}"


def _fault_in_draws(rows: SampledRows, num_positions: int, draws: int, plan: Plan) -> str | None:
    for name in ("token_ids", "counts"):
        array: npt.NDArray[np.int32] = getattr(rows, name)
        if array.ndim != 2 or array.shape != rows.token_ids.shape or len(array) != num_positions or not array.size:
            return f"{name} is {array.shape}, the mask says {num_positions} positions"
    ids, counts = rows.token_ids, rows.counts
    fault = _fault_in_ids("token_ids", ids, plan)
    if fault:
        return fault
    # Before the sum, which could hide a negative count behind a large one.
    if counts.min() < 0 or not (counts.sum(axis=1, dtype=np.int64) == draws).all():
        return f"counts of a position do not sum to the plan's {draws} draws"
    drawn = counts > 0
    if ids[~drawn].any() or not drawn[:, -1].any():
        return "the padding is not id 0 to the longest position's number of ids"
    less = counts[:, 1:] < counts[:, :-1]
    tied = (counts[:, 1:] == counts[:, :-1]) & (ids[:, 1:] > ids[:, :-1])
    if not (less | tied | ~drawn[:, 1:]).all():
        return "ids are not in the order of their counts, ties by id"
    ordered = np.sort(np.where(drawn, ids, -1), axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        return "a token id stands twice in one position"
    return None


def _fault_in_ids(name: str, ids: npt.NDArray[np.int32], plan: Plan) -> str | None:
    vocab_size = plan.tokenizer.vocab_size
    if ids.min() >= 0 and ids.max() < vocab_size:
        return None
    outside = ids.min() if ids.min() < 0 else ids.max()
    return f"{name} holds {outside}, outside the vocabulary of {vocab_size}"


def _fault_in_top_k(rows: TopKRows, labels: npt.NDArray[np.int32], plan: Plan) -> str | None:
    expected = (len(labels), plan.top_k)
    shapes: dict[str, tuple[int, ...]] = {"token_ids": expected, "logits": expected}
    shapes["tail_logsumexp"] = (expected[0], len(plan.temperatures))
    moments = [name for name in ("row_mean", "row_std") if getattr(rows, name) is not None]
    if bool(moments) == plan.logits_alone or len(moments) == 1:
        return f"row_mean and row_std are {'there' if moments else 'missing'}, the plan says otherwise"
    numbers = ["label_logit", *moments]
    shapes |= dict.fromkeys(numbers, expected[:1])
    for name, shape in shapes.items():
        if getattr(rows, name).shape != shape:
            return f"{name} is {getattr(rows, name).shape}, the plan and the mask say {shape}"
    fault = _fault_in_ids("token_ids", rows.token_ids, plan)
    if fault:
        return fault
    ordered = np.sort(rows.token_ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return "a token id stands twice in one position"
    for name in ("logits", *numbers):
        if not np.isfinite(getattr(rows, name)).all():
            return f"{name} is not finite"
    # With K = V the tail is empty and its log-sum-exp is -inf; anything else must be a number.
    empty_tail = (rows.tail_logsumexp == -np.inf) & (plan.top_k == plan.tokenizer.vocab_size)
    if not (np.isfinite(rows.tail_logsumexp) | empty_tail).all():
        return "tail_logsumexp is not finite"
    if (rows.logits[:, 1:] > rows.logits[:, :-1]).any():
        return "logits increase"
    return _fault_in_labels(rows, labels, plan)


def _fault_in_labels(rows: TopKRows, labels: npt.NDArray[np.int32], plan: Plan) -> str | None:
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
