"""Bi-directional logits difference: match how the leader's top logits stand to each other, not what they are.

From the thesis "BiLD: Bi-directional Logits Difference Loss for Large Language Model Distillation" (eqs. 3.4-3.10).
With i_1..i_k the leader's k highest ids in order, each model's differences are d_mn = (z[i_m] - z[i_n]) / T for
m < n, its distribution the softmax of d over the k(k-1)/2 pairs, and the loss KL(teacher || student): t-LD where
the teacher leads, s-LD where the student does. No factor T squared. Adding a constant to a row changes nothing, so
log-probabilities serve as well as logits. For k < 3 there is at most one pair and the loss is identically zero.

Shape suffixes: N = positions, K = leading ids, P = pairs.
"""

import torch
from torch import Tensor

from workers.losses.divergences import kl_divergence
from workers.losses.targets import TopK


def logits_difference(led: TopK, temperature: float) -> Tensor:
    """One half of BiLD. float32 [N], differentiable in the student's logits alone"""
    first, second = torch.triu_indices(
        led.student_NK.shape[1], led.student_NK.shape[1], 1, device=led.student_NK.device
    )
    if len(first) == 0:
        return led.student_NK.sum(dim=1) * 0.0
    teacher_NP = (led.teacher_NK[:, first] - led.teacher_NK[:, second]) / temperature
    student_NP = (led.student_NK[:, first] - led.student_NK[:, second]) / temperature
    return kl_divergence(teacher_NP, student_NP)
