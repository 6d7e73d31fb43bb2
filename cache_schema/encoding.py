"""How numbers stand in a shard: fixed-point logits as differences, hidden states as raw bytes or as int8.

Stored logits of a position never increase, so each is kept as the drop from the one before it, in whole steps of
the plan's grid: small integers, which Parquet's byte-stream split and zstd shrink to about 4.5 bits each. Every
logit is within half a step of the truth.

An int8 hidden state is ``q * row_scale[p] * channel_scale[d]``: a scale of the position, from its own largest value,
and a scale of the channel, from the plan. A few channels are far larger than the rest and would set every row's
scale; theirs is coarse, and a residual, a second int8, counts 254ths of their step. Every value is within half a step,
of the residual where there is one.

Draws stand without their padding: all positions' ids one after the other, their counts beside them, and how many ids
each position has.

Letters used for shapes: P positions, K stored logits, U ids drawn at most at one position, D channels, C of them with a
residual.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache_schema.plan import HiddenStates, Plan
from cache_schema.sequence import SampledRows

HIDDEN_COLUMN = "hidden_states"
ROW_SCALE_COLUMN = "row_scale"
RESIDUAL_COLUMN = "residuals"
LABEL_COLUMN = "label_logit"
SCALAR_COLUMNS = ("tail_logsumexp", LABEL_COLUMN, "row_mean", "row_std")
DRAW_COLUMNS = ("num_ids", "token_ids", "counts")
# numpy has no bfloat16: its 16 bits travel as an unsigned integer.
HIDDEN_NUMPY_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
_INT8_MAX = np.float32(127)
_RESIDUAL_STEPS = np.float32(254)
# A row below it is stored as zeros: far under what a logit can show, far above where float32 loses digits.
_SMALLEST_ROW_SCALE = np.float32(1e-19)


def logit_columns(plan: Plan) -> tuple[str, ...]:
    """Columns that hold ids and logits, on the grid or exactly (``logit_step`` 0); with sampling, ids and counts."""
    if plan.sampling:
        return DRAW_COLUMNS
    return ("token_ids", "top_logit_steps", "logit_drops") if plan.logit_step else ("token_ids", "logits")


def scalar_columns(plan: Plan) -> tuple[str, ...]:
    """Columns that hold one number a position, or one a temperature."""
    if plan.sampling:
        return ()
    return (LABEL_COLUMN,) if plan.logits_alone else SCALAR_COLUMNS


def shard_schema(plan: Plan) -> pa.Schema:
    """One row per sequence; lists of P·K values are row-major [P, K]."""
    types = {"logits": pa.float32(), "num_ids": pa.uint16(), "counts": pa.uint16()}
    fields = [
        pa.field("sequence_id", pa.binary(16), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
    ]
    for name in logit_columns(plan):
        fields.append(pa.field(name, pa.list_(types.get(name, pa.int32())), nullable=False))
    fields += [pa.field(name, pa.list_(pa.float32()), nullable=False) for name in scalar_columns(plan)]
    return pa.schema(fields)


def hidden_schema(hidden: HiddenStates | None = None) -> pa.Schema:
    """Same rows as the shard; ``hidden_states`` is the row-major [P, D] in little-endian bytes.

    Only int8 has more columns: its residuals, the row-major [P, C] in bytes, and its row scales [P].
    """
    fields = [
        pa.field("sequence_id", pa.binary(16), nullable=False),
        pa.field(HIDDEN_COLUMN, pa.large_binary(), nullable=False),
    ]
    if hidden is not None and hidden.dtype == "int8":
        fields.append(pa.field(RESIDUAL_COLUMN, pa.large_binary(), nullable=False))
        fields.append(pa.field(ROW_SCALE_COLUMN, pa.list_(pa.float32()), nullable=False))
    return pa.schema(fields)


def to_steps(logits: npt.NDArray[np.float32], step: float) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Round non-increasing logits [P, K] to the grid. First entries [P] and drops [P, K - 1], in steps.

    Raises:
        ValueError: a logit is so large that its step count does not fit 32 bits.
    """
    scaled = np.rint(logits.astype(np.float64) / step)
    if scaled.size and np.abs(scaled).max() >= 2**31 - 1:
        raise ValueError(f"a logit of {np.abs(logits).max():g} does not fit steps of {step:g}: store float32 (0)")
    steps = scaled.astype(np.int32)
    return steps[:, 0], -np.diff(steps, axis=1)


def from_steps(top: npt.NDArray[np.int32], drops: npt.NDArray[np.int32], step: float) -> npt.NDArray[np.float32]:
    """Undo ``to_steps``. [P, K]"""
    steps = np.empty((len(top), drops.shape[1] + 1), dtype=np.int32)
    steps[:, 0] = top
    np.negative(drops, out=steps[:, 1:])
    np.cumsum(steps, axis=1, out=steps)
    logits: npt.NDArray[np.float32] = np.multiply(steps, np.float32(step), dtype=np.float32)
    return logits


def to_ragged(rows: SampledRows) -> dict[str, npt.NDArray[np.int32]]:
    """``DRAW_COLUMNS`` of one sequence: how many ids each position has [P], and their ids and counts, one list each."""
    drawn = rows.counts > 0
    num_ids = drawn.sum(axis=1, dtype=np.int32)
    return {"num_ids": num_ids, "token_ids": rows.token_ids[drawn], "counts": rows.counts[drawn]}


def from_ragged(
    num_ids: npt.NDArray[Any], token_ids: npt.NDArray[np.int32], counts: npt.NDArray[Any], num_positions: int
) -> SampledRows:
    """Undo ``to_ragged``.

    Raises:
        ValueError: the three do not belong together, or an id was drawn no time.
    """
    if len(num_ids) != num_positions or not (num_ids > 0).all():
        raise ValueError(f"num_ids is not {num_positions} numbers above 0")
    num_stored = int(num_ids.sum(dtype=np.int64))
    if (len(token_ids), len(counts)) != (num_stored, num_stored):
        raise ValueError(f"{len(token_ids)} token_ids and {len(counts)} counts are stored, num_ids says {num_stored}")
    if not (counts > 0).all():
        raise ValueError("counts holds a 0")
    is_id = np.arange(num_ids.max(initial=0)) < num_ids[:, None]
    padded = [np.zeros(is_id.shape, np.int32) for _ in range(2)]
    for rows, stored in zip(padded, (token_ids, counts), strict=True):
        rows[is_id] = stored
    return SampledRows(*padded)


@dataclass(frozen=True, eq=False)
class Int8States:
    """Hidden states as they stand in a shard."""

    states: npt.NDArray[np.int8]  # [P, D], -127 to 127
    residuals: npt.NDArray[np.int8]  # [P, C], -127 to 127
    row_scale: npt.NDArray[np.float32]  # [P], above 0


def to_int8(states: npt.NDArray[np.float32], hidden: HiddenStates) -> Int8States:
    """Round finite hidden states [P, D] to the steps that their largest values and the plan's channel scales make.

    Raises:
        ValueError: a value is so large that its row's scale is no float32.
    """
    channel_scale = np.array(hidden.channel_scale, dtype=np.float32)
    with np.errstate(over="ignore"):
        row_scale = np.abs(states / channel_scale).max(axis=1) / _INT8_MAX
    if not np.isfinite(row_scale).all():
        raise ValueError(f"a hidden state of {np.abs(states).max():g} does not fit int8: store the teacher's dtype")
    row_scale = np.maximum(row_scale, _SMALLEST_ROW_SCALE)
    in_steps = states / (row_scale[:, None] * channel_scale)
    whole = np.rint(in_steps)
    channels = list(hidden.residual_channels or ())
    residuals = np.rint((in_steps[:, channels] - whole[:, channels]) * _RESIDUAL_STEPS)
    return Int8States(whole.astype(np.int8), residuals.astype(np.int8), row_scale)


def from_int8(stored: Int8States, hidden: HiddenStates) -> npt.NDArray[np.float32]:
    """Undo ``to_int8``. [P, D]"""
    channel_scale = np.array(hidden.channel_scale, dtype=np.float32)
    states: npt.NDArray[np.float32] = stored.states.astype(np.float32)
    states[:, list(hidden.residual_channels or ())] += stored.residuals / _RESIDUAL_STEPS
    states *= stored.row_scale[:, None] * channel_scale
    return states


def to_float32(states: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Hidden states of one of ``HIDDEN_NUMPY_DTYPES`` as numbers, exactly."""
    if dtype == "bfloat16":
        return (states.astype(np.uint32) << 16).view(np.float32)
    return states.astype(np.float32)


def list_array(rows: list[npt.NDArray[Any]], value_type: pa.DataType) -> pa.ListArray:
    """One list per array, its values flattened in row-major order."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([row.size for row in rows], out=offsets[1:])
    values = np.concatenate([row.ravel() for row in rows])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=value_type))


def split_lists(column: pa.ListArray) -> list[npt.NDArray[Any]]:
    """Undo ``list_array``: one flat array per row, views of Arrow's memory where Arrow allows."""
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in pairwise(offsets)]


def all_finite(states: npt.NDArray[np.generic], dtype: str) -> bool:
    """Whether hidden states of one of ``HIDDEN_NUMPY_DTYPES`` hold neither NaN nor infinity."""
    if dtype == "bfloat16":
        # An exponent of all ones is an infinity or a NaN.
        bits = states.view(np.uint16)
        return not bool(((bits & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(states.view(HIDDEN_NUMPY_DTYPES[dtype])).all())
