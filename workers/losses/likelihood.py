"""Cross entropies with tokens: the labels, or ids drawn from the teacher.

Shape suffixes: N = positions, K = the student's leading ids, U = drawn ids, V = vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.losses.loss import Loss, Parameter
from workers.losses.targets import Targets


def sft(targets: Targets) -> Tensor:
    return F.cross_entropy(targets.student_row(), targets.labels(), reduction="none")


def topk_ce(targets: Targets, *, k: int) -> Tensor:
    """Cross entropy over the label and the student's k - 1 best other ids."""
    assert targets.student_label_N is not None
    own, label_N1 = targets.student_first(k), targets.student_label_N.unsqueeze(1)
    has_label_N1 = (own.ids_NK == targets.labels().unsqueeze(1)).any(1, keepdim=True)
    last_N1 = torch.where(has_label_N1, own.student_NK[:, -1:], label_N1)
    chosen_NK = torch.cat([own.student_NK[:, :-1], last_N1], dim=1)
    return chosen_NK.logsumexp(1) - label_N1.squeeze(1)


def rskd(targets: Targets) -> Tensor:
    """KL of the drawn ids' frequencies against the student's whole distribution; unbiased for KL at temperature 1."""
    assert targets.drawn is not None
    frequency_NU = targets.drawn.counts_NU / targets.drawn.counts_NU.sum(1, keepdim=True)
    log_q_NU = targets.drawn.student_NU - targets.student_row().logsumexp(1, keepdim=True)
    return (torch.xlogy(frequency_NU, frequency_NU) - frequency_NU * log_q_NU).sum(1)


LOSSES = (
    Loss(
        "sft",
        sft,
        frozenset(),
        "cross entropy with the labels",
        "the baseline that uses no teacher signal",
        student_row=True,
        reads_label=True,
    ),
    Loss(
        "topk_ce",
        topk_ce,
        frozenset(),
        "BiLD thesis's code: its SFT",
        "cross entropy among the label and the student's own best ids: what the thesis's table calls SFT",
        {
            "k": Parameter(
                1024, "ids compared: the label and the student's best others", minimum=2, at_most="vocabulary"
            )
        },
        student_led=True,
        reads_label=True,
    ),
    Loss(
        "rskd",
        rskd,
        frozenset({"samples"}),
        "Sparse Logit Sampling (Anshumann et al. 2025)",
        "full KL's gradient, on average, from about 12 ids a position; needs a cache of --sampling random",
        student_row=True,
    ),
)
