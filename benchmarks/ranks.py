"""Every engine on two ranks against one process: the same student, seed and data, 20 steps, losses and gradient norms.

The last micro-batch of a step leaves one rank without one. One process that reads other micro-batches shows what
rounding explains: a near-tie of the student's logits that one rounding flips moves BiLD, and not t_ld+kl.
`python -m benchmarks.ranks [--data FILE.jsonl] [--rows 48] [--steps 20] [--ranks 2]`
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.material import ROOT, STUDENT_LAYERS, TEACHER, add_data_options, dump
from cache_schema import CacheReader
from workers.distill.config import DistillConfig
from workers.distill.data import TrainingData
from workers.distill.train import prepare
from workers.ranks import joined

ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {"name": "torch"},
    "FSDP2": {"name": "fsdp2"},
    **{f"ZeRO-{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
}
LOSSES = ("bild", "t_ld+kl")
DTYPES = ("float32", "bfloat16")
NEW_TOKENS, LR, SEQUENCES_PER_STEP, MICRO_BATCH = 16, 5e-4, 5, 2
FLIP = 1e-3
"""Of a gradient norm: more than rounding changes it by."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_options(parser, rows=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # a list of configs, in JSON, for a rank to train
    options = parser.parse_args()
    if options.rank_of:
        train(json.loads(options.rank_of))
        return
    cache = dump("ranks", options.data, options.rows, "--set", f"responses.max_new_tokens={NEW_TOKENS}")

    def runs(engine: dict[str, Any], dtype: str, num_ranks: int, micro_batch: int = MICRO_BATCH) -> dict[str, Any]:
        """Of each loss, what a step's record says and the most memory a rank has held since its process began."""
        configs = [
            {
                "cache": str(cache), "student": str(TEACHER), "student_layers": STUDENT_LAYERS, "loss": loss,
                "dtype": dtype, "device": "cpu", "steps": options.steps, "sequences_per_step": SEQUENCES_PER_STEP,
                "micro_batch_sequences": micro_batch, "optimizer": {"lr": LR}, "engine": engine,
            }
            for loss in LOSSES
        ]  # fmt: skip
        module = ["-m", "benchmarks.ranks", "--rank-of", json.dumps(configs)]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, *module], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        return dict(zip(LOSSES, map(json.loads, done.stdout.splitlines()), strict=True))

    one = {dtype: runs({}, dtype, 1) for dtype in DTYPES}
    print(f"{options.ranks} ranks; {options.steps} steps of {SEQUENCES_PER_STEP} sequences, {MICRO_BATCH} at once")
    print("largest difference of a step's loss and gradient norm from one process, as shares of them,")
    print(f"and the first step whose norm is apart by more than {FLIP:g}")
    print(f"{'':<26}{'':<10}" + "".join(f"{loss:^28}" for loss in LOSSES) + f"{'seconds':>9}{'GiB':>7}")
    print(f"{'':<26}{'':<10}" + f"{'loss':>11}{'norm':>11}{'step':>6}" * len(LOSSES) + f"{'a step':>9}{'a rank':>7}")
    show("one process", "float32", one["float32"], one["float32"])
    show("micro-batches of 1", "float32", runs({}, "float32", 1, micro_batch=1), one["float32"])
    show("one process", "bfloat16", one["bfloat16"], one["float32"], "float32")
    for name, engine in ENGINES.items():
        whole, half = (runs(engine, dtype, options.ranks) for dtype in DTYPES)
        show(name, "float32", whole, one["float32"])
        show(name, "bfloat16", half, one["bfloat16"])
        show(name, "bfloat16", half, whole, "float32")


def train(configs: list[dict[str, Any]]) -> None:
    """This rank's part of some runs, one after the other; the first rank prints a line of JSON for each."""
    with joined("cpu", needs_group=configs[0]["engine"] != {}) as ranks:
        for asked in configs:
            config = DistillConfig.model_validate(asked)
            data = TrainingData.of([CacheReader(Path(config.cache[0]))])
            training = prepare(config, data, Path("no-such-run"), ranks)
            steps = list(training.steps())
            training.close()
            peak = max(ranks.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)) * 1024
            if ranks.is_first:
                print(json.dumps({"steps": steps, "peak_memory_bytes": peak}), flush=True)


def show(name: str, dtype: str, run: dict[str, Any], other: dict[str, Any], other_name: str = "") -> None:
    """A line of the table; ``other`` is what the run is compared with."""
    columns = ""
    for loss in LOSSES:
        by_loss, by_norm = (apart(run[loss], other[loss], key) for key in ("loss", "grad_norm"))
        flipped = next((str(step + 1) for step, share in enumerate(by_norm) if share > FLIP), "-")
        columns += f"{max(by_loss):>11.1e}{max(by_norm):>11.1e}{flipped:>6}"
    first = run[LOSSES[0]]
    seconds = statistics.median(step["seconds"] for step in first["steps"])
    against = f", from {other_name}" if other_name else ""
    gibibytes = first["peak_memory_bytes"] / 2**30
    print(f"{name + against:<26}{dtype:<10}{columns}{seconds:>9.2f}{gibibytes:>7.2f}", flush=True)


def apart(run: dict[str, Any], other: dict[str, Any], key: str) -> list[float]:
    """Step by step."""
    return [abs(ours[key] / theirs[key] - 1) for ours, theirs in zip(run["steps"], other["steps"], strict=True)]


if __name__ == "__main__":
    main()
