"""Optimal transport between the positions of a group.

Shape suffixes: N = positions of the group, V = vocabulary.
"""

import torch
from torch import Tensor

from workers.losses.loss import FULL_ROW, Loss, Parameter, temperature_of
from workers.losses.targets import Targets


def sinkd(targets: Targets, *, temperature: float, eps: float, iters: int, coef: float, **_: object) -> Tensor:
    """Each position's part of coef times the transport cost between the students' and the teacher's rows. [N]

    The cost of a pair is the L1 distance of the two distributions, the plan Sinkhorn's with entropy eps. The values of
    a group belong together: each depends on all rows.
    """
    teacher_NV, student_NV = targets.rows()
    cost_NN = torch.cdist((student_NV / temperature).softmax(1), (teacher_NV / temperature).softmax(1), p=1.0)
    log_plan_NN = -cost_NN / eps  # logarithms, for a small eps leaves whole rows below the smallest float
    for _iteration in range(iters):
        log_plan_NN = log_plan_NN.log_softmax(1).log_softmax(0)
    return coef * (log_plan_NN.exp() * cost_NN).sum(1)


LOSSES = (
    Loss(
        "sinkd",
        sinkd,
        FULL_ROW,
        "SinKD (Cui et al. 2024), eq. 12",
        "transport between the rows of a batch, where both softmaxes have little in common; costs rows^2 V",
        {
            "temperature": temperature_of(2.0),
            "eps": Parameter(0.1, "entropy of the transport plan", minimum=1e-3),
            "iters": Parameter(20, "Sinkhorn iterations", minimum=1),
            "coef": Parameter(0.001, "multiplies the cost of a group", minimum=0.0),
            "rows": Parameter(32, "positions of a sequence that are compared with each other", 1, 128),
        },
        student_row=True,
        group_size="rows",
    ),
)
