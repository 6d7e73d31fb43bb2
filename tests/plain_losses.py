"""The losses as one writes them on paper: a formula each, sharing nothing with the catalogue.

``f(s, t, y)``: the student's and the teacher's logits [N, V] and the labels [N] to values per position [N], or to one
value for all positions together.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def p_q(s: Tensor, t: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Both models' probabilities, the teacher's first."""
    return (t / temperature).softmax(1), (s / temperature).softmax(1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1)


def order(logits: Tensor, k: int) -> Tensor:
    """The ids with the k highest logits, of equal ones the lowest id first. [N, k]"""
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]


def at(ids: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
    return tuple(row.gather(1, ids) for row in logits)


def difference(s: Tensor, t: Tensor, leader: Tensor, k: int, temperature: float) -> Tensor:
    s, t = at(order(leader, k), s / temperature, t / temperature)
    m, n = torch.triu_indices(k, k, 1)
    return kl(*p_q(s[:, m] - s[:, n], t[:, m] - t[:, n]))


def bucketed(s: Tensor, t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    p, q = at(order(t, k), *p_q(s, t))
    return tuple(torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (p, q))


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def akl(s: Tensor, t: Tensor, mu: float) -> Tensor:
    p, q = p_q(s, t)
    ids = order(t, t.shape[1])
    head = at(ids, p)[0].cumsum(1) <= mu
    head[:, 0] = True
    gap = at(ids, (p - q).abs().detach())[0]
    share = (gap * head).sum(1) / gap.sum(1)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def ab(s: Tensor, t: Tensor, a: float, b: float) -> Tensor:
    p, q = p_q(s, t)
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(1) / (a * b)


def others(x: Tensor, y: Tensor) -> Tensor:
    """Each row without its y. [N, V - 1]"""
    return torch.stack([torch.cat([row[:i], row[i + 1 :]]) for row, i in zip(x, y.tolist(), strict=True)])


def decoupled(s: Tensor, t: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
    p, q = (at(y[:, None], x)[0] for x in p_q(s, t))
    binary = kl(torch.cat([p, 1 - p], 1), torch.cat([q, 1 - q], 1))
    return alpha * binary + beta * kl(*p_q(others(s, y), others(t, y)))


def normalised(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    p, q = (at(y[:, None], x)[0].squeeze(1) for x in p_q(s, t))
    p_others, q_others = p_q(others(s, y), others(t, y), temperature)
    return -p * q.log() - gamma * (p_others * q_others.log()).sum(1)


def spread(x: Tensor, norm: float) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return norm * (centred.square().sum(1, keepdim=True) / (x.shape[1] - 1)).sqrt()


def csd(s: Tensor, t: Tensor, w1: str, w2: str, temperature: float = 1.0) -> Tensor:
    p, q = p_q(s.detach(), t, temperature)
    weights = {"S": q, "T": p, "U": torch.full_like(p, 1 / p.shape[1])}
    d = s - t
    pairs = weights[w1].unsqueeze(2) * weights[w2].unsqueeze(1) * (d.unsqueeze(2) - d.unsqueeze(1)).square()
    return 0.5 * pairs.sum((1, 2))


def pairs_apart(t: Tensor, k: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = order(t, k)
    p = at(ids, t.softmax(1))[0]
    m, n = torch.triu_indices(ids.shape[1], ids.shape[1], 1)
    return ids[:, m], ids[:, n], p[:, m] - p[:, n], (p[:, m] > p[:, n] + eps) & (p[:, n] > eps)


def logistic_ranking(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    above, below, _, counts = pairs_apart(t, 64, 1e-9)
    return F.softplus(-(at(above, s)[0] - at(below, s)[0]))[counts].mean()


def hinge(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    above, below, lead, counts = pairs_apart(t, 64, 1e-8)
    q = s.softmax(1)
    return (lead - (at(above, q)[0] - at(below, q)[0]))[counts].relu().mean()


def sinkd(s: Tensor, t: Tensor, eps: float) -> Tensor:
    p, q = p_q(s, t, 2.0)
    cost = (q.unsqueeze(1) - p.unsqueeze(0)).abs().sum(2)
    log_plan = -cost / eps
    for _ in range(20):
        log_plan = log_plan.log_softmax(1).log_softmax(0)
    return 0.001 * (log_plan.exp() * cost).sum()


def topk_ce(s: Tensor, y: Tensor, k: int) -> Tensor:
    best = at(order(others(s, y), k - 1), others(s, y))[0]
    return F.cross_entropy(torch.cat([at(y[:, None], s)[0], best], 1), torch.zeros_like(y), reduction="none")


PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "bild": lambda s, t, y: difference(s, t, t, 8, 3.0) + difference(s, t, s, 8, 3.0),
    "t_ld": lambda s, t, y: difference(s, t, t, 8, 3.0),
    "s_ld": lambda s, t, y: difference(s, t, s, 8, 3.0),
    "kl": lambda s, t, y: kl(*p_q(s, t, 3.0)),
    "rkl": lambda s, t, y: kl(*p_q(t, s, 3.0)),
    "gjsd": lambda s, t, y: jsd(*p_q(s, t), 0.5),
    "skl": lambda s, t, y: kl(t.softmax(1), 0.1 * t.softmax(1) + 0.9 * s.softmax(1)),
    "srkl": lambda s, t, y: kl(s.softmax(1), 0.9 * t.softmax(1) + 0.1 * s.softmax(1)),
    "tvd": lambda s, t, y: (t.softmax(1) - s.softmax(1)).abs().sum(1) / 2,
    "akl": lambda s, t, y: akl(s, t, 0.5),
    "taid": lambda s, t, y: -((0.6 * s.detach() + 0.4 * t).softmax(1) * s.softmax(1).log()).sum(1),
    "abdiv": lambda s, t, y: ab(s, t, 0.2, 0.7),
    "topk_kl": lambda s, t, y: kl(*p_q(*at(order(t, 1024), s, t), 3.0)),
    "topk_kl_zero": lambda s, t, y: kl(at(order(t, 1024), t)[0].softmax(1), at(order(t, 1024), s.softmax(1))[0]),
    "topk_kl_raw": lambda s, t, y: kl(*at(order(t, 1024), *p_q(s, t))),
    "tail_gjsd": lambda s, t, y: kl(*p_q(s, t)),
    "tail_tvd": lambda s, t, y: PLAIN["tvd"](s, t, y),
    "dkd": lambda s, t, y: 16 * decoupled(s / 4, t / 4, y, 1.0, 8.0),
    "dkd_norm": lambda s, t, y: (
        spread(t, 3.0).squeeze(1) ** 2 * decoupled(s / spread(s, 3.0), t / spread(t, 3.0), y, 0.5, 0.5)
    ),
    "nkd": lambda s, t, y: normalised(s, t, y, 1.5, 1.0),
    "nkd_bild": lambda s, t, y: normalised(s, t, order(t, 1).squeeze(1), 0.25, 3.0),
    "normkd": lambda s, t, y: spread(t, 2.0).squeeze(1) ** 2 * kl(*p_q(s / spread(s, 2.0), t / spread(t, 2.0))),
    "csd": lambda s, t, y: csd(s, t, "S", "S"),
    "csd_mode_seeking": lambda s, t, y: csd(s, t, "S", "S"),
    "csd_mode_covering": lambda s, t, y: csd(s, t, "T", "S"),
    "dld": lambda s, t, y: (s.detach().softmax(1) * (s - t).square()).sum(1) / 4,
    "logistic_ranking": logistic_ranking,
    "hinge": hinge,
    "sinkd": lambda s, t, y: sinkd(s, t, 0.1),
    "sft": lambda s, t, y: F.cross_entropy(s, y, reduction="none"),
    "topk_ce": lambda s, t, y: topk_ce(s, y, min(1024, s.shape[1])),
}
"""By the catalogue's names, at its defaults. Missing: ``rank_loss`` (``test_ranking``), ``rskd`` and ``bild_total``,
which are sums of others."""

PLAIN_AT_K_4: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "bild": lambda s, t, y: difference(s, t, t, 4, 3.0) + difference(s, t, s, 4, 3.0),
    "topk_kl": lambda s, t, y: kl(*p_q(*at(order(t, 4), s, t), 3.0)),
    "topk_kl_zero": lambda s, t, y: kl(at(order(t, 4), t)[0].softmax(1), at(order(t, 4), s.softmax(1))[0]),
    "topk_kl_raw": lambda s, t, y: kl(*at(order(t, 4), *p_q(s, t))),
    "tail_gjsd": lambda s, t, y: kl(*bucketed(s, t, 4)),
    "tail_tvd": lambda s, t, y: (bucketed(s, t, 4)[0] - bucketed(s, t, 4)[1]).abs().sum(1) / 2,
    "topk_ce": lambda s, t, y: topk_ce(s, y, 4),
}
"""The same where 4 ids are compared, and the rest is cut off or in a bucket."""
