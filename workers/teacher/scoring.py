"""What is stored of a teacher's rows: the top k and the statistics of each, [N, V] at a time never.

Shape suffixes: N = positions, C = positions of one chunk, V = vocabulary, D = hidden size, K = top-k, R = temperatures.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from workers.ordering import exact_top_k
from workers.teacher.lm_head import LMHead, chunks, matmul_operands, widened

_CACHED_BYTES = 3 * 2**20
"""Size of the rows that one pass after another reads: 2 to 4 MiB measured alike, 64 MiB takes 1.2 times as long."""


@dataclass(frozen=True)
class TopKLogits:
    """What is kept of a teacher's row at N positions; float32 but for the ids."""

    token_ids_NK: Tensor
    logits_NK: Tensor
    tail_logsumexp_NR: Tensor
    label_logit_N: Tensor
    row_mean_N: Tensor
    row_std_N: Tensor


def score(head: LMHead, hidden_ND: Tensor, labels_N: Tensor, top_k: int, temperatures: tuple[float, ...]) -> TopKLogits:
    """Reduce each position's row to its top k and its statistics; [N, V] never exists whole."""
    parts = []
    memory = _Memory(head, hidden_ND)
    # A CPU upcasts a half-precision head: once for all chunks.
    with matmul_operands(hidden_ND, head.weight_VD) as (operand_ND, weight_VD):
        operand_head = replace(head, weight_VD=weight_VD)
        for rows in chunks(len(hidden_ND), 4 * head.vocab_size, hidden_ND.device):
            operand_CD, labels_C = operand_ND[rows], labels_N[rows]
            logits_CV = operand_head.logits(operand_CD, memory.products_CV(len(operand_CD)))
            # The product wants many rows; what reads its rows again and again wants few.
            for few in memory.parts(len(logits_CV)):
                parts.append(_reduce(logits_CV[few], labels_C[few], top_k, temperatures, memory))
    return TopKLogits(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class _Memory:
    """What the rows of a batch are worked on in. Memory that is fresh for each chunk costs a CPU more than the work."""

    def __init__(self, head: LMHead, hidden_ND: Tensor) -> None:
        most = next(chunks(len(hidden_ND), 4 * head.vocab_size, hidden_ND.device)).stop
        few = most if hidden_ND.is_cuda else min(most, max(1, _CACHED_BYTES // (4 * head.vocab_size)))
        empty = partial(torch.empty, dtype=widened(hidden_ND.dtype), device=hidden_ND.device)
        self._few = max(1, few)
        # A GPU's allocator keeps what is freed.
        self._products = None if hidden_ND.is_cuda else empty(most, head.vocab_size)
        self._work = [empty(few, head.vocab_size) for _ in range(2)]

    def products_CV(self, num_rows: int) -> Tensor | None:
        return None if self._products is None else self._products[:num_rows]

    def parts(self, num_rows: int) -> Iterator[slice]:
        """Slices over the rows of a chunk, of as many as the workspaces hold; no rows make one empty slice."""
        for first in range(0, max(num_rows, 1), self._few):
            yield slice(first, min(first + self._few, num_rows))

    def work_CV(self, number: int, num_rows: int) -> Tensor:
        return self._work[number][:num_rows]


def _reduce(
    logits_CV: Tensor, labels_C: Tensor, top_k: int, temperatures: tuple[float, ...], memory: _Memory
) -> tuple[Tensor, ...]:
    """The columns of ``TopKLogits``; overwrites the rows.

    The tail's log-sum-exp leaves out the stored ids instead of subtracting them, so that a tiny tail keeps its
    digits. The deviation is the unbiased one (NormKD).
    """
    num_rows, vocab_size = logits_CV.shape
    values_CK, ids_CK = exact_top_k(logits_CV, top_k)
    label_C = logits_CV.gather(1, labels_C.unsqueeze(1)).squeeze(1)
    mean_C = logits_CV.mean(1)
    centred_CV = torch.sub(logits_CV, mean_C.unsqueeze(1), out=memory.work_CV(0, num_rows))
    std_C = torch.linalg.vector_norm(centred_CV, dim=1) / math.sqrt(vocab_size - 1)
    tails_CR = _logsumexp(logits_CV.scatter_(1, ids_CK, -torch.inf), temperatures, memory)
    return ids_CK, values_CK, tails_CR, label_C, mean_C, std_C


def _logsumexp(logits_CV: Tensor, temperatures: tuple[float, ...], memory: _Memory) -> Tensor:
    """log(sum(exp(logits / temperature))) at each temperature, [C, R]; overwrites the logits."""
    largest_C1 = logits_CV.amax(1, keepdim=True)
    # A row of -inf alone, where every id is stored, has nothing to be measured from.
    logits_CV.sub_(largest_C1.masked_fill(largest_C1 == -torch.inf, 0.0))
    hottest = max(temperatures)
    exponentials_CV, other_CV = (memory.work_CV(number, len(logits_CV)) for number in range(2))
    torch.mul(logits_CV, 1 / hottest, out=exponentials_CV).exp_()
    logs = {hottest: exponentials_CV.sum(1).log_()}
    for temperature in set(temperatures) - {hottest}:
        # exp(x) is exp(x / 3) ** 3: a sixth of the time for two more roundings.
        if (power := hottest / temperature) in (2.0, 3.0):
            torch.pow(exponentials_CV, power, out=other_CV)
        else:
            torch.mul(logits_CV, 1 / temperature, out=other_CV).exp_()
        logs[temperature] = other_CV.sum(1).log_()
    return torch.stack([logs[temperature] + largest_C1.squeeze(1) / temperature for temperature in temperatures], 1)
