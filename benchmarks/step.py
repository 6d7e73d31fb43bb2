"""One distillation step against one SFT step of the same student on the same sequences; steps alternate, medians."""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.material import STUDENT_LAYERS, TEACHER, make_cache
from cache_schema import CacheReader
from workers.distill.config import DistillConfig
from workers.distill.data import TrainingData
from workers.distill.train import prepare
from workers.ranks import Ranks

LOSSES = ("sft", "bild", "t_ld", "topk_kl", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each loss, after one that is not")
    options = parser.parse_args()
    cache = make_cache()
    runs = {loss: steps_of(loss, cache, options.dtype, options.steps + 1) for loss in LOSSES}
    records: dict[str, list[dict[str, Any]]] = {loss: [] for loss in LOSSES}
    for _ in range(options.steps + 1):
        for loss in LOSSES:
            records[loss].append(next(runs[loss]))
    median = {loss: statistics.median(step["seconds"] for step in records[loss][1:]) for loss in LOSSES}
    print(f"student of {len(STUDENT_LAYERS)} layers, 16 sequences a step, {options.dtype}, {options.steps} steps each")
    for loss in LOSSES:
        print(f"{loss:<8} {median[loss]:>6.2f} s a step, {median[loss] / median['sft']:.2f} of SFT")


def steps_of(loss: str, cache: Path, dtype: str, num_steps: int) -> Iterator[dict[str, Any]]:
    config = DistillConfig.model_validate(
        {
            "cache": str(cache),
            "student": str(TEACHER),
            "student_layers": STUDENT_LAYERS,
            "loss": loss,
            "dtype": dtype,
            "steps": num_steps,
            "sequences_per_step": 16,
            "micro_batch_sequences": 8,
        }
    )
    return prepare(
        config, TrainingData.of([CacheReader(cache)]), Path("no-such-run"), Ranks(torch.device("cpu"))
    ).steps()


if __name__ == "__main__":
    main()
