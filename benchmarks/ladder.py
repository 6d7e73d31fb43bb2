"""What the ladder costs a training step: the step with every lookup from disk, beside the same step with the teacher's
dense logits already in memory.

Both runs train the same student on the same sequences at k = 8 from a cache of K = 64 with hidden states; steps
alternate, medians. The dense logits of a step are laid out before its time starts.
`python -m benchmarks.ladder [--data FILE.jsonl] [--rows 48] [--steps 12] [--dtype float32]`
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.material import STUDENT_LAYERS, TEACHER, add_data_options, dump
from cache_schema import CacheReader
from workers.distill.config import DistillConfig
from workers.distill.data import TrainingData
from workers.distill.train import Training, prepare
from workers.lookup.batch import TeacherPositions
from workers.lookup.ladder import TIERS, Ladder
from workers.lookup.stored import stored_head, stored_hidden_states
from workers.ranks import Ranks

CPU = torch.device("cpu")


class DenseLadder(Ladder):
    """Gathers from the teacher's whole rows, which are in memory."""

    def __init__(self, reader: CacheReader) -> None:
        super().__init__()
        self._reader = reader
        self._lm_head = stored_head(reader, CPU)
        self._dense: dict[int, Tensor] = {}
        self.laying_out = 0.0

    def expect(self, indexes: Any) -> None:
        started = time.perf_counter()
        with torch.no_grad():
            self._dense = {index: self._lm_head.logits(stored_hidden_states(self._reader, index)) for index in indexes}
        self.laying_out = time.perf_counter() - started

    def logits_at(self, positions: TeacherPositions, ids_NM: Tensor, ahead: Any = None) -> Tensor:
        rows = [self._dense[member.index][member.stored_rows] for member in positions.members]
        owner = positions.sequence_of_N
        return torch.cat([part.gather(1, ids_NM[owner == row]) for row, part in enumerate(rows)])

    def take_counts(self) -> tuple[dict[str, int], int]:
        return dict.fromkeys(TIERS, 0), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_options(parser, rows=48)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each, after one that is not")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    cache = dump("ladder", options.data, options.rows)
    runs = {"ladder": training(cache, options), "dense": training(cache, options)}
    dense = DenseLadder(runs["dense"].data.readers[0])
    runs["dense"].engine.student.ladders = (dense,)
    steps: dict[str, Iterator[dict[str, Any]]] = {name: run.steps() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    counts: dict[str, int] = dict.fromkeys(TIERS, 0)
    for _ in range(options.steps + 1):
        for name, records in steps.items():
            record = next(records)
            seconds[name].append(record["seconds"] - (dense.laying_out if name == "dense" else 0.0))
            for tier, pairs in record["lookups"].items():
                counts[tier] += pairs
    ratios = [ladder / flat for ladder, flat in zip(seconds["ladder"][1:], seconds["dense"][1:], strict=True)]
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    pairs = {tier: number for tier, number in counts.items() if number}
    print(f"{options.steps} steps of 8 sequences, {options.dtype}, k = 8, K = 64; pairs {pairs}")
    print(f"ladder {median['ladder']:.3f} s a step, dense logits in memory {median['dense']:.3f} s")
    print(f"ladder / dense, step by step: median {statistics.median(ratios):.3f}")


def training(cache: Path, options: argparse.Namespace) -> Training:
    config = DistillConfig.model_validate(
        {
            "cache": str(cache),
            "student": str(TEACHER),
            "student_layers": STUDENT_LAYERS,
            "dtype": options.dtype,
            "steps": options.steps + 1,
            "optimizer": {"lr": 3e-4},
        }
    )
    return prepare(config, TrainingData.of([CacheReader(cache)]), Path("no-such-run"), Ranks(CPU))


if __name__ == "__main__":
    main()
