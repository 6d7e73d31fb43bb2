"""How numbers stand in a shard: fixed-point logits as differences, hidden states as raw bytes.

Stored logits of a position never increase, so each is kept as the drop from the one before it, in whole steps of
the plan's grid: small integers, which Parquet's byte-stream split and zstd shrink to about 4.5 bits each. Every
logit is within half a step of the truth.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache_schema.manifest import Plan

HIDDEN_COLUMN = "hidden_states"
SCALAR_COLUMNS = ("tail_logsumexp", "label_logit", "row_mean", "row_std")
# numpy has no bfloat16: its 16 bits travel as an unsigned integer.
HIDDEN_NUMPY_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


def logit_columns(plan: Plan) -> tuple[str, ...]:
    """Columns that hold ids and logits: on the grid, or exactly (``logit_step`` 0)."""
    return ("token_ids", "top_logit_steps", "logit_drops") if plan.logit_step else ("token_ids", "logits")


def shard_schema(plan: Plan) -> pa.Schema:
    """One row per sequence; lists of P·K values are row-major [P, K]."""
    fields = [
        pa.field("sequence_id", pa.binary(16), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
    ]
    for name in logit_columns(plan):
        fields.append(pa.field(name, pa.list_(pa.float32() if name == "logits" else pa.int32()), nullable=False))
    fields += [pa.field(name, pa.list_(pa.float32()), nullable=False) for name in SCALAR_COLUMNS]
    return pa.schema(fields)


def hidden_schema() -> pa.Schema:
    """Same rows as the shard; ``hidden_states`` is the row-major [P, D] in little-endian bytes."""
    return pa.schema(
        [
            pa.field("sequence_id", pa.binary(16), nullable=False),
            pa.field(HIDDEN_COLUMN, pa.large_binary(), nullable=False),
        ]
    )


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
