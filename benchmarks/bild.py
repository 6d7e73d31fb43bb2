"""One half of BiLD by both of its forms against k, forward and backward: where making the pairs stops paying.

Random float32 logits, the teacher's in its order, the student's in any. Forms and ks take turns, medians of ROUNDS; on
a GPU each time ends when the device is done. Where the pairs of all positions would take more than PAIR_BYTES, fewer
positions are timed: times are per position, and the table says how many there were.
`python -m benchmarks.bild [--positions 8192] [--threads 1,2] [--device cuda]`
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from workers.losses.bild import PAIRS_UP_TO, as_bregman, over_pairs

KS = (4, 8, 12, 16, 20, 24, 32, 64, 128, 256, 512, 1024)
ROUNDS = 5
PAIR_BYTES = 2_000_000_000
PAIR_TENSORS = 9
"""[positions, pairs] tensors that the pair form holds at once, at most."""

Form = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--threads", default="1,2", help="numbers of CPU threads, separated by commas")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    threads = [int(number) for number in options.threads.split(",")] if device.type == "cpu" else [0]
    for number in threads:
        if number:
            torch.set_num_threads(number)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{number} thread{'s'[: number > 1]}"
        compare(options.positions, device, name)


def compare(num_positions: int, device: torch.device, where: str) -> None:
    """Print the table of one device, and from which k on the O(k) form is faster."""
    torch.manual_seed(0)
    material = {k: logits_of(num_positions, k, device) for k in KS}
    seconds: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for measured in range(-1, ROUNDS):
        for k, (teacher_NK, student_NK) in material.items():
            for form, rows in ((over_pairs, rows_for_pairs(num_positions, k)), (as_bregman, num_positions)):
                times = seconds_of(form, teacher_NK[:rows], student_NK[:rows])
                if measured >= 0:
                    seconds.setdefault((k, form.__name__), []).append((times[0] / rows, times[1] / rows))
    print(f"{num_positions} positions, float32, {where}, medians of {ROUNDS}; microseconds a position")
    print(f"{'':>5} {'':>10} {'pairs':^17} {'O(k)':^17} {'both ways':>9}")
    print(f"{'k':>5} {'positions':>10} {'forward':>8} {'and back':>8} {'forward':>8} {'and back':>8} {'ratio':>9}")
    ratios = {}
    for k in KS:
        pairs, bregman = (
            [1e6 * statistics.median(way) for way in zip(*seconds[k, form.__name__], strict=True)]
            for form in (over_pairs, as_bregman)
        )
        ratios[k] = pairs[1] / bregman[1]
        columns = "".join(f" {value:>8.2f}" for value in (*pairs, *bregman))
        print(f"{k:>5} {rows_for_pairs(num_positions, k):>10}{columns} {ratios[k]:>9.2f}")
    print(f"{crossover(ratios)}; the code makes pairs up to k = {PAIRS_UP_TO}", flush=True)


def logits_of(num_positions: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The teacher's, sorted, and the student's beside them."""
    teacher_NK = (3.0 * torch.randn(num_positions, k)).sort(dim=1, descending=True).values
    return teacher_NK.to(device), (3.0 * torch.randn(num_positions, k)).to(device).requires_grad_()


def rows_for_pairs(num_positions: int, k: int) -> int:
    """How many positions' pairs fit in PAIR_BYTES."""
    return min(num_positions, PAIR_BYTES // (PAIR_TENSORS * 4 * k * (k - 1) // 2))


def seconds_of(form: Form, teacher_NK: Tensor, student_NK: Tensor) -> tuple[float, float]:
    """Of the forward, and of the forward with the backward."""
    finish(student_NK.device)
    started = time.perf_counter()
    loss = form(teacher_NK, student_NK).sum()
    finish(student_NK.device)
    forward = time.perf_counter() - started
    torch.autograd.grad(loss, student_NK)
    finish(student_NK.device)
    return forward, time.perf_counter() - started


def finish(device: torch.device) -> None:
    """A GPU works behind the CPU's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def crossover(ratios: dict[int, float]) -> str:
    """Between which ks the pairs fall behind for good."""
    slower = [k for k in KS if all(ratios[larger] > 1.0 for larger in KS if larger >= k)]
    faster = [k for k in KS if not slower or k < slower[0]]
    if not slower:
        return f"pairs are faster up to k = {faster[-1]}"
    return f"pairs are faster up to k = {faster[-1]}, O(k) from {slower[0]}" if faster else "O(k) is faster for all k"


if __name__ == "__main__":
    main()
