"""Divergences that a top-k cache serves without the teacher's whole row.

The teacher's top-k is renormalised (``topk_kl``, ``topk_kl_zero``), taken as it is (``topk_kl_raw``), or joined by one
bucket that holds the rest of both models' mass (``tail_*``). A bucket makes a lower bound of the full divergence: data
processing loses information. The teacher's bucket comes from the stored log-sum-exp at the same temperature; no other
temperature's can stand for it.

Shape suffixes: N = positions, K = the teacher's leading ids, B = K and the bucket, V = vocabulary.
"""

import torch
from torch import Tensor

from workers.losses.divergences import generalized_jsd, kl_divergence, t_squared, total_variation
from workers.losses.loss import T_SQUARED, Loss, Parameter, stored_of, temperature_of
from workers.losses.targets import Targets


def with_bucket(targets: Targets, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both models over the teacher's k leading ids and the rest. [N, B] each

    Without the bucket where nothing is left for it.
    """
    led, student_NV = targets.teacher_first(k), targets.student_row()
    teacher_NB, student_NB = led.teacher_NK / temperature, led.student_NK / temperature
    if led.ids_NK.shape[1] < student_NV.shape[1]:
        others_NV = (student_NV / temperature).scatter(1, led.ids_NK, -torch.inf)
        teacher_NB = torch.cat([teacher_NB, targets.teacher_tail(k, temperature).unsqueeze(1)], dim=1)
        student_NB = torch.cat([student_NB, others_NV.logsumexp(1, keepdim=True)], dim=1)
    return teacher_NB.log_softmax(1), student_NB.log_softmax(1)


def topk_kl(targets: Targets, *, k: int, temperature: float) -> Tensor:
    led = targets.teacher_first(k)
    return kl_divergence((led.teacher_NK / temperature).log_softmax(1), (led.student_NK / temperature).log_softmax(1))


def topk_kl_zero(targets: Targets, *, k: int, temperature: float, T2: bool) -> Tensor:
    """The renormalised top-k against the student's whole distribution, as if the teacher's tail were zero."""
    led, scale = targets.teacher_first(k), t_squared(temperature, T2)
    log_q_NK = led.student_NK / temperature - (targets.student_row() / temperature).logsumexp(1, keepdim=True)
    return scale * kl_divergence((led.teacher_NK / temperature).log_softmax(1), log_q_NK)


def topk_kl_raw(targets: Targets, *, k: int, temperature: float) -> Tensor:
    """The top-k's own terms of the full KL, nothing renormalised."""
    led = targets.teacher_first(k)
    teacher_NK = led.teacher_NK / temperature
    teacher_N = torch.logaddexp(teacher_NK.logsumexp(1), targets.teacher_tail(k, temperature))
    log_q_NK = led.student_NK / temperature - (targets.student_row() / temperature).logsumexp(1, keepdim=True)
    return kl_divergence(teacher_NK - teacher_N.unsqueeze(1), log_q_NK)


def tail_gjsd(targets: Targets, *, k: int, beta: float, temperature: float) -> Tensor:
    return generalized_jsd(*with_bucket(targets, k, temperature), beta)


def tail_tvd(targets: Targets, *, k: int, temperature: float) -> Tensor:
    return total_variation(*with_bucket(targets, k, temperature))


LOSSES = (
    Loss(
        "topk_kl",
        topk_kl,
        frozenset({"top_k"}),
        "BiLD thesis, section 4.3",
        "KL of both models renormalised on the teacher's top-k; cheapest, blind to the tail",
        {"k": stored_of(1024), "temperature": temperature_of(3.0)},
    ),
    Loss(
        "topk_kl_zero",
        topk_kl_zero,
        frozenset({"top_k"}),
        "DistillKit, sparse KL, missing probability 'zero'",
        "for caches of others that keep no tail mass; biased: drives the student's tail to zero",
        {"k": stored_of(1024), "temperature": temperature_of(1.0), "T2": T_SQUARED},
        student_row=True,
    ),
    Loss(
        "topk_kl_raw",
        topk_kl_raw,
        frozenset({"top_k", "logsumexp"}),
        "Sparse Logit Sampling (Anshumann et al. 2025)",
        "the top-k's share of the full KL; its minimum is not the teacher, which RS-KD's analysis is about",
        {"k": stored_of(1024), "temperature": temperature_of(1.0)},
        student_row=True,
    ),
    Loss(
        "tail_gjsd",
        tail_gjsd,
        frozenset({"top_k", "logsumexp"}),
        "TRL, tail bucket of its off-policy trainer; DistillKit",
        "KL, reverse KL or JSD with the right tail mass, from a top-k cache alone",
        {
            "k": stored_of(1024),
            "beta": Parameter(0.0, "the teacher's share of the mixture; 0 is forward KL, 1 is reverse KL", 0.0, 1.0),
            "temperature": temperature_of(1.0),
        },
        student_row=True,
    ),
    Loss(
        "tail_tvd",
        tail_tvd,
        frozenset({"top_k", "logsumexp"}),
        "DistillKit, sparse TVD, missing probability 'symmetric uniform'",
        "total variation with the right tail mass, from a top-k cache alone",
        {"k": stored_of(1024), "temperature": temperature_of(1.0)},
        student_row=True,
    ),
)
