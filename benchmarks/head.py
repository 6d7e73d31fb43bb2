"""LM head + BiLD, forward and backward, against dense logits and against the bare matmul with top-k.

Each variant runs in a process of its own, so that peak memory is its own; variants alternate, medians of ROUNDS.
`python -m benchmarks.head [--positions 2048] [--vocab 151936] [--hidden 896] [--dtype bfloat16]`
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.distill.sparse_head import logits_at, student_top_k
from workers.losses.catalogue import LOSSES
from workers.losses.targets import Targets, TopK
from workers.ordering import exact_top_k
from workers.teacher.lm_head import LMHead

ROUNDS = 3
K, TEMPERATURE = 8, 3.0


def dense(hidden: Tensor, weight: Tensor, teacher_ids: Tensor, teacher_logits: Tensor, at_student: Tensor) -> None:
    """What a trainer without this project does: all logits, top-k and gather of them, autograd through it all."""
    logits = F.linear(hidden, weight).float()
    student_ids = logits.topk(K, dim=1).indices
    loss = bild(teacher_logits, logits.gather(1, teacher_ids), at_student, logits.gather(1, student_ids))
    loss.backward()


def ours(hidden: Tensor, weight: Tensor, teacher_ids: Tensor, teacher_logits: Tensor, at_student: Tensor) -> None:
    head = LMHead(weight)
    student_ids = student_top_k(head, hidden, K)
    chosen = logits_at(head, hidden, torch.cat([teacher_ids, student_ids], 1))
    bild(teacher_logits, chosen[:, :K], at_student, chosen[:, K:]).backward()


def bare(hidden: Tensor, weight: Tensor, teacher_ids: Tensor, teacher_logits: Tensor, at_student: Tensor) -> None:
    """The least anyone can do to know the student's top-k: forward alone."""
    with torch.no_grad():
        F.linear(hidden, weight).topk(K, dim=1)


def bild(teacher_t: Tensor, student_t: Tensor, teacher_s: Tensor, student_s: Tensor) -> Tensor:
    ids = torch.empty(0, K)  # the loss itself never looks at them
    targets = Targets(TopK(ids, teacher_t, student_t), TopK(ids, teacher_s, student_s))
    return LOSSES["bild"].values(targets, k=K, temperature=TEMPERATURE).mean()


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]] = {
    "dense": dense,
    "ours": ours,
    "bare": bare,
}


def measure(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one call after a warm-up, and the memory it adds on top of its inputs and the weight's gradient."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    weight = (torch.randn(options.vocab, options.hidden) * 0.05).to(dtype).requires_grad_()
    hidden = torch.randn(options.positions, options.hidden).to(dtype).requires_grad_()
    with torch.no_grad():
        sample = F.linear(hidden[:64], weight).float() + 0.5 * torch.randn(64, options.vocab)
        teacher_logits, teacher_ids = exact_top_k(sample, K)
    repeat = -(-options.positions // 64)
    teacher_logits = teacher_logits.repeat(repeat, 1)[: options.positions]
    teacher_ids = teacher_ids.repeat(repeat, 1)[: options.positions]
    at_student = torch.randn(options.positions, K).sort(dim=1, descending=True).values
    weight.grad = torch.zeros_like(weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    VARIANTS[variant](hidden, weight, teacher_ids, teacher_logits, at_student)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    VARIANTS[variant](hidden, weight, teacher_ids, teacher_logits, at_student)
    return {"seconds": time.perf_counter() - started, "extra_gb": (peak - before) * 1024 / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--variant", choices=VARIANTS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(ROUNDS):
        for name in VARIANTS:
            command = [sys.executable, "-m", "benchmarks.head", *sys.argv[1:], "--variant", name]
            results[name].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    median = {name: statistics.median(r["seconds"] for r in rounds) for name, rounds in results.items()}
    extra = {name: statistics.median(r["extra_gb"] for r in rounds) for name, rounds in results.items()}
    shape = f"{options.positions} positions, V = {options.vocab}, d = {options.hidden}, {options.dtype}"
    print(f"{shape}, medians of {ROUNDS}")
    for name in VARIANTS:
        print(f"{name:<6} {median[name]:>7.2f} s  {extra[name]:>6.2f} GB extra")
    print(f"ours / bare {median['ours'] / median['bare']:.2f}, dense / ours {median['dense'] / median['ours']:.2f}")


if __name__ == "__main__":
    main()
