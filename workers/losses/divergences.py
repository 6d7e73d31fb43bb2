"""Divergences of two softmax distributions given by their logits.

Shape suffixes: N = positions, X = whatever the distribution is over: the vocabulary, a top-k, pairs of ids.
"""

import torch.nn.functional as F
from torch import Tensor


def kl_divergence(left_NX: Tensor, right_NX: Tensor) -> Tensor:
    """KL(softmax(left) || softmax(right)) per row, in nats. [N]"""
    left_NX = F.log_softmax(left_NX, dim=1)
    right_NX = F.log_softmax(right_NX, dim=1)
    return (left_NX.exp() * (left_NX - right_NX)).sum(dim=1)
