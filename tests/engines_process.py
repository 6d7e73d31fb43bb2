"""One rank of several that train: ``torchrun --nproc-per-node N -m tests.engines_process JOBS FOLDER``.

JOBS is a JSON file of jobs, done one after the other. A job has a run's ``config``; what the first rank writes of it is
FOLDER/NAME, and its ``kind`` says what that is:

run: the directory of the trained run.
steps: the records of its steps, in JSON.
gradients: of micro-batches of one step, before it; whole, in safetensors.
gathers: of each step, how many numbers each all-gather brought together; in JSON.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cache_schema.reader import CacheReader
from pipeline import distill
from workers.distill.config import DistillConfig
from workers.distill.data import TrainingData
from workers.distill.terms import ScaledTerm, terms_of
from workers.distill.train import Training, prepare
from workers.lookup.batch import Batch, collate, nothing
from workers.ranks import Ranks, joined

MICRO_BATCHES = ((0, 1), (2,), (3, 4, 5), (6, 7), (8,))
"""Sequences of a step: too few micro-batches for the last round of 2 ranks."""


def main() -> None:
    jobs, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    # One group for all: DeepSpeed keeps the first that it sees.
    with joined("cpu", needs_group=True) as ranks:
        for job in jobs:
            do(job["kind"], DistillConfig.model_validate(job["config"]), folder / job["name"], ranks)


def do(kind: str, config: DistillConfig, out: Path, ranks: Ranks) -> None:
    if kind == "run":
        distill._run(config, out, ranks, resume=False)
        return
    training = prepare(config, TrainingData.of([CacheReader(Path(config.cache[0]))]), out, ranks)
    made = {"steps": steps, "gradients": gradients, "gathers": gathers}[kind](training)
    training.close()
    if ranks.is_first:
        if kind == "gradients":
            save_file(made, out)
        else:
            out.write_text(json.dumps(made), encoding="utf-8")


def steps(training: Training) -> list[dict[str, Any]]:
    return list(training.steps())


def gradients(training: Training) -> dict[str, Tensor]:
    """Of every trained parameter, by its name within the student."""
    ranks = training.ranks
    batches, scaled = step_of(training)
    own = batches[ranks.rank :: ranks.size]
    own += [nothing(["response"], ranks.device)] * (-(-len(batches) // ranks.size) - len(own))
    for number, batch in enumerate(own):
        training.engine.backward(batch, scaled, last=number == len(own) - 1)
    found = {}
    for name, parameter in training.engine.student.named_parameters():
        gradient: Any = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    return found


def step_of(training: Training) -> tuple[list[Batch], list[ScaledTerm]]:
    """Every micro-batch of one step, and the terms scaled for all of them."""
    (reader,), terms = training.data.readers, terms_of(training.config, training.data.top_k, training.data.vocab_size)
    batches = [collate(reader, indexes, ["response"], training.ranks.device) for indexes in MICRO_BATCHES]
    return batches, [term.scaled(term.weight_in(batches)) for term in terms]


def gathers(training: Training) -> list[list[int]]:
    sizes, steps = [], training.steps()
    for _ in range(training.num_steps):
        with _Gathers() as seen:
            next(steps)
        sizes.append(seen.sizes)
    return sizes


class _Gathers(TorchDispatchMode):
    """Notes how many numbers, of all ranks, each all-gather into one tensor brings together."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "c10d::_allgather_base_":
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as the command line leaves
