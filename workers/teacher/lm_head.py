"""From hidden states to logits, in one place for every engine, every tier and the student's full rows.

The teacher's logit is the dot product, accumulated in float32, of the final-norm hidden state and the LM-head row,
both in the compute dtype, plus bias, times the architecture's logit scale, through its soft cap. Order is
(-logit, token id) throughout.

Shape suffixes: N = positions, C = positions of one chunk, V = vocabulary, D = hidden size, M = looked-up ids per
position.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cache_schema.errors import CacheCorruptError
from cache_schema.storage import publish

CHUNK_BYTES = 64 * 2**20
"""Size of the largest temporary of a chunked computation; small enough for a CPU's cache hierarchy to matter little."""

CUDA_CHUNK_BYTES = 512 * 2**20
"""The same where a GPU scores: its matmul and top-k want more rows at once."""

_DENSE_PRODUCTS_PER_GATHER = 32
"""A matmul makes so many dot products in the time of one whose row is gathered: 60 were measured on two CPU cores."""

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, Inkling
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


@dataclass(frozen=True)
class LMHead:
    """The last linear map of a language model, cut to the tokenizer's vocabulary."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight_VD.shape[0]

    def logits(self, hidden_ND: Tensor, out_NV: Tensor | None = None) -> Tensor:
        """Every logit of some positions. float32 [N, V]

        Args:
            out_NV: where the products may be written, to spare the fresh memory.
        """
        return self.finish(float32_matmul(hidden_ND, self.weight_VD, out_NV), self.bias_V)

    def logits_at(self, hidden_ND: Tensor, ids_NM: Tensor) -> Tensor:
        """The logits of chosen ids, chunked over positions. float32 [N, M]

        2·D FLOPs each; where so many are chosen that every row's product costs less than gathering theirs, 2·V·D.
        """
        logits_NM = torch.empty(ids_NM.shape, dtype=widened(hidden_ND.dtype), device=hidden_ND.device)
        if dense_is_cheaper(ids_NM.shape[1], self.vocab_size):
            exact_ND = hidden_ND.to(torch.promote_types(hidden_ND.dtype, self.weight_VD.dtype))
            for rows in chunks(len(ids_NM), 4 * self.vocab_size, hidden_ND.device):
                logits_NM[rows] = self.logits(exact_ND[rows]).gather(1, ids_NM[rows])
            return logits_NM
        for rows in chunks(len(ids_NM), 4 * ids_NM.shape[1] * hidden_ND.shape[1]):
            ids_CM = ids_NM[rows]
            bias_CM = None if self.bias_V is None else self.bias_V[ids_CM]
            chosen_CMD = self.weight_VD[ids_CM].to(logits_NM.dtype)
            products_CM1 = torch.bmm(chosen_CMD, hidden_ND[rows].to(logits_NM.dtype).unsqueeze(2))
            logits_NM[rows] = self.finish(products_CM1.squeeze(2), bias_CM)
        return logits_NM

    def logits_of_pairs(self, hidden_ND: Tensor, rows_Q: Tensor, ids_Q: Tensor) -> Tensor:
        """The logits of single (position, id) pairs. float32 [Q]

        Gathers one row of the weight a pair; on a CPU, where few ids are asked at many positions, one row an id.
        """
        if hidden_ND.device.type == "cpu":
            unique_U, place_Q = torch.unique(ids_Q, return_inverse=True)
            if len(unique_U) * len(hidden_ND) <= _DENSE_PRODUCTS_PER_GATHER * len(ids_Q):
                products_NU = float32_matmul(hidden_ND, self.weight_VD[unique_U])
                return self.finish(products_NU[rows_Q, place_Q], None if self.bias_V is None else self.bias_V[ids_Q])
        parts = []
        for pairs in chunks(len(ids_Q), 8 * hidden_ND.shape[1]):
            parts.append(self.logits_at(hidden_ND[rows_Q[pairs]], ids_Q[pairs].unsqueeze(1)).squeeze(1))
        return torch.cat(parts)

    def finish(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Bias, scale and soft cap on float32 dot products; increasing, so it keeps the order."""
        if bias is not None:
            products = products + bias.to(products.dtype)
        if self.scale != 1.0:
            products = products * self.scale
        if self.softcap is not None:
            products = self.softcap * torch.tanh(products / self.softcap)
        return products

    def to(self, device: torch.device) -> "LMHead":
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return LMHead(self.weight_VD.to(device), bias_V, self.scale, self.softcap)


def dense_is_cheaper(num_ids: int, vocab_size: int) -> bool:
    """Whether multiplying with every row of the head takes less time than gathering so many rows a position."""
    return num_ids * _DENSE_PRODUCTS_PER_GATHER >= vocab_size


def float32_matmul(left_ND: Tensor, right_VD: Tensor, out_NV: Tensor | None = None) -> Tensor:
    """left @ right.T accumulated and returned in float32, whatever the operands' dtype. [N, V]

    Products of two bf16 or fp16 numbers are exact in float32. On CUDA the GEMM writes its float32 accumulator. On a
    CPU such a GEMM rounds its result to the input dtype (0.016 at a logit of 4), so the operands are upcast, at
    matmul precision "medium", which multiplies bf16 numbers and adds in float32: exact for operands that were bf16,
    at 1.9 times a bf16 GEMM where a float32 one costs 3.
    """
    with matmul_operands(left_ND, right_VD) as (left, right):
        if left.dtype == widened(left.dtype):
            return torch.mm(left, right.T, out=out_NV)
        return torch.mm(left, right.T, out_dtype=torch.float32)


@contextmanager
def matmul_operands(left_ND: Tensor, right_VD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both operands of ``float32_matmul`` as it multiplies them, and the precision set for as long as they are used."""
    right_VD = right_VD.to(left_ND.dtype)
    if left_ND.is_cuda or left_ND.dtype == widened(left_ND.dtype):
        yield left_ND, right_VD
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if left_ND.dtype == torch.bfloat16 else "highest")
    try:
        yield left_ND.float(), right_VD.float()
    finally:
        torch.set_float32_matmul_precision(precision)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums of products are kept in: float32, and float64 for tests that compute in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(num_rows: int, bytes_per_row: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices over rows such that a temporary of ``bytes_per_row`` a row stays within CHUNK_BYTES.

    On a CUDA ``device`` the limit is CUDA_CHUNK_BYTES. No rows make one empty slice, so that what is collected from
    the chunks has its shape.
    """
    limit = CUDA_CHUNK_BYTES if device is not None and device.type == "cuda" else CHUNK_BYTES
    size = max(1, limit // max(bytes_per_row, 1))
    for first in range(0, max(num_rows, 1), size):
        yield slice(first, min(first + size, num_rows))


def head_of(model: Any, vocab_size: int) -> LMHead:
    """The LM head of a transformers causal language model, of ``vocab_size`` rows; the weight stays its parameter."""
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    bias = getattr(linear, "bias", None)
    whole = linear.weight.shape[0] == vocab_size
    return LMHead(
        weight_VD=linear.weight if whole else linear.weight[:vocab_size],
        bias_V=bias if bias is None or whole else bias[:vocab_size],
        scale=_setting(config, _MULTIPLIERS) or 1.0 / (_setting(config, _DIVISORS) or 1.0),
        softcap=_setting(config, _SOFTCAPS),
    )


def _setting(config: Any, keys: tuple[str, ...]) -> float | None:
    """The first of some keys that the config has; the families name the same thing differently."""
    return next((value for key in keys if (value := getattr(config, key, None))), None)


def save_head(head: LMHead, path: Path) -> None:
    """Write the head as safetensors: ``weight``, ``bias`` if there is one, scale and soft cap as JSON metadata."""
    tensors = {"weight": head.weight_VD.detach().contiguous().cpu()}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V.detach().contiguous().cpu()
    # One entry: safetensors writes several in an order of its own, and the same head must be the same bytes.
    metadata = {"head": json.dumps({"scale": head.scale, "softcap": head.softcap})}
    with publish(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(0o644)  # safetensors keeps files to their owner; a cache is shared


def load_head(path: Path, device: torch.device) -> LMHead:
    """Read what ``save_head`` wrote.

    Raises:
        CacheCorruptError: missing or damaged.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            settings = json.loads(file.metadata()["head"])
            bias_V = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118, not a mapping
            return LMHead(file.get_tensor("weight"), bias_V, settings["scale"], settings["softcap"])
    except Exception as error:  # safetensors raises its own type, KeyError or OSError by what is damaged
        raise CacheCorruptError(f"{path} cannot be read: {error}. Restore it, or dump again.") from error
