"""Every loss of the catalogue on the real teacher: does it run, does it fall, what does a step cost.

One cache with hidden states of all positions serves all but ``rskd``, which has a cache of draws of the same rows.

Losses and memory: each loss trains in a `pipeline distill` of its own, whose peak is that process's. A step reads 2
sequences, an epoch is 5 steps, so the first and the last epoch see the same rows and their means can be compared.

Time: in this process, one student takes a step of the same 4 sequences with every loss in turn, sft among them, at a
learning rate of zero. It is CPU time of all threads, so that other work on the machine counts less; a loss's ratio to
sft is taken within each round, and both are medians of ROUNDS.
`python -m benchmarks.losses [--losses kl,bild] [--data FILE.jsonl] [--dtype float32] [--lr 2e-5]`
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.material import OUT, STUDENT_LAYERS, TEACHER, add_data_options, dump
from cache_schema import CacheReader
from workers.distill.checks import asked_of, needs_lookups
from workers.distill.config import DistillConfig
from workers.distill.student import load_student
from workers.distill.student_loss import StudentLoss
from workers.distill.terms import terms_of
from workers.lookup.batch import collate
from workers.lookup.ladder import Ladder
from workers.lookup.opening import open_ladders
from workers.lookup.stored import stored_hidden_states
from workers.losses.catalogue import LOSSES
from workers.teacher.lm_head import load_head

STEPS, SEQUENCES_PER_STEP, ROWS = 20, 2, 10
STEPS_PER_EPOCH = ROWS // SEQUENCES_PER_STEP
ROUNDS, TIMED_SEQUENCES = 5, 4
MASS_KS = (8, 64, 256, 1024)
SUM = "2*rank_loss+kl"
PARAMETERS: dict[str, dict[str, dict[str, Any]]] = {SUM: {"rank_loss": {"dynamic": True}}}
COLUMNS = (
    f"{'loss':<18} {'needs':<18} {'first':>8} {'last':>9}  {'':<13} {'GB':>5} {'pos/s':>6} {'of sft':>6}  lookups from"
)


@dataclass(frozen=True)
class Run:
    losses: list[float]
    """Of each step."""
    peak_bytes: int
    lookups: dict[str, int]

    @property
    def first(self) -> float:
        return statistics.mean(self.losses[:STEPS_PER_EPOCH])

    @property
    def last(self) -> float:
        return statistics.mean(self.losses[-STEPS_PER_EPOCH:])

    @property
    def is_finite(self) -> bool:
        return len(self.losses) == STEPS and all(map(math.isfinite, self.losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_options(parser, rows=ROWS)
    parser.add_argument("--losses", default=",".join([*LOSSES, SUM]), help="names or sums, separated by commas")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--student-layers", default=",".join(map(str, STUDENT_LAYERS)), help="of the teacher's")
    parser.add_argument("--time-only", action="store_true", help="no training")
    options = parser.parse_args()
    names = ["sft", *(name for name in options.losses.split(",") if name != "sft")]
    top_k = dump("losses", options.data, ROWS, "--positions", "all")
    caches = dict.fromkeys(names, top_k)
    if "rskd" in names:
        caches["rskd"] = dump("losses-draws", options.data, ROWS, "--sampling", "random", "--no-hidden-states")
    say_mass_outside(CacheReader(top_k))
    positions, seconds = time_steps(caches, options)
    print(
        f"{STEPS} steps of {SEQUENCES_PER_STEP} of {ROWS} sequences, student of layers {options.student_layers}, "
        f"{options.dtype}, learning rate {options.lr:g}: mean loss of the first and the last epoch, memory above sft's"
    )
    threads = torch.get_num_threads()
    print(f"timed: CPU seconds of a step of {TIMED_SEQUENCES} sequences, {threads} thread(s), medians of {ROUNDS}")
    print(COLUMNS)
    finite, baseline = True, None
    for name in names:
        speed = positions[name] / statistics.median(seconds[name])
        ratio = statistics.median(ours / sft for ours, sft in zip(seconds[name], seconds["sft"], strict=True))
        run = None if options.time_only else distill(name, caches[name], options)
        baseline = baseline or run
        say(name, run, baseline, speed, ratio)
        finite = finite and (run is None or run.is_finite)
    sys.exit(0 if finite else 1)


def time_steps(caches: dict[str, Path], options: argparse.Namespace) -> tuple[dict[str, int], dict[str, list[float]]]:
    """By loss: the positions of a step, and the CPU seconds of one in each round."""
    steps = {}
    device = torch.device("cpu")
    with ExitStack() as resources:
        layers = tuple(map(int, options.student_layers.split(",")))
        model = load_student(str(TEACHER), layers, gradient_checkpointing=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        for name, cache in caches.items():
            config = config_of(name, cache, options.dtype)
            reader = CacheReader(cache)
            ladders = (
                open_ladders([reader], asked_of(config), device, resources) if needs_lookups(config) else [Ladder()]
            )
            vocab_size = reader.plan.tokenizer.vocab_size
            student = StudentLoss(model, ladders, vocab_size=vocab_size, autocast=options.dtype == "bfloat16")
            terms = terms_of(config, reader.plan.top_k, vocab_size)
            parts = list(dict.fromkeys(term.part for term in terms))
            steps[name] = (student, terms, reader, parts)
        positions: dict[str, int] = {}
        seconds: dict[str, list[float]] = {name: [] for name in caches}
        for measured in range(-1, ROUNDS):
            for name, (student, terms, reader, parts) in steps.items():
                started = time.process_time()
                batch = collate(reader, range(TIMED_SEQUENCES), parts, device)
                loss, _ = student.share(batch, [term.scaled(term.weight_in([batch])) for term in terms])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                positions[name] = sum(batch.num_positions(part) for part in parts)
                if measured >= 0:
                    seconds[name].append(time.process_time() - started)
    return positions, seconds


def config_of(loss: str, cache: Path, dtype: str) -> DistillConfig:
    named: dict[str, Any] = {"name": loss, **PARAMETERS.get(loss, {})}
    return DistillConfig.model_validate({"cache": str(cache), "student": str(TEACHER), "loss": named, "dtype": dtype})


def distill(loss: str, cache: Path, options: argparse.Namespace) -> Run:
    """One run; one that fails has no steps, and its message is printed."""
    out = OUT / "losses" / loss
    settings = [
        f"loss.{name}.{key}={json.dumps(value)}"
        for name, of in PARAMETERS.get(loss, {}).items()
        for key, value in of.items()
    ]
    settings += [f"sequences_per_step={SEQUENCES_PER_STEP}", f"optimizer.lr={options.lr}"]
    command: list[object] = [
        sys.executable, "-m", "pipeline", "distill", "--cache", cache, "--student", TEACHER, "--student-layers",
        options.student_layers, "--loss", loss, "--steps", STEPS, "--dtype", options.dtype, "--out", out,
        *(word for setting in settings for word in ("--set", setting)),
    ]  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        print(f"{loss}: {' '.join(map(str, command[1:]))}\n{done.stderr[-2000:]}", flush=True)
        return Run([math.nan], 0, {})
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((out / "run.json").read_text(encoding="utf-8"))["summary"]
    (out / "model" / "model.safetensors").unlink()  # 250 MB each
    lookups = {tier: sum(step["lookups"][tier] for step in steps) for tier in steps[0]["lookups"]}
    return Run([step["loss"] for step in steps], summary["peak_memory_bytes"], lookups)


def needs_of(loss: str) -> str:
    """What the loss asks of the teacher."""
    names = [summand.split("*")[-1] for summand in loss.split("+")]
    names += [prompt[0] for name in names if (prompt := LOSSES[name].prompt)]
    needs = {need for name in names for need in LOSSES[name].needs}
    short = {"top_k": "top-k", "logsumexp": "lse", "full_row": "rows", "lookups": "lookups", "samples": "draws"}
    return " ".join(word for need, word in short.items() if need in needs) or "none"


def say(name: str, run: Run | None, sft: Run | None, speed: float, ratio: float) -> None:
    trained, share = f"{'':>18}  {'':<13} {'':>5}", ""
    if run is not None and sft is not None:
        state = "NOT FINITE" if not run.is_finite else "falls" if run.last < run.first else "does not fall"
        memory = (run.peak_bytes - sft.peak_bytes) / 1e9
        trained = f"{run.first:>8.4g} {run.last:>9.4g}  {state:<13} {memory:>5.2f}"
        asked = sum(run.lookups.values())
        share = ", ".join(f"{tier} {count / asked:.0%}" for tier, count in run.lookups.items() if count)
    print(f"{name:<18} {needs_of(name):<18} {trained} {speed:>6.0f} {ratio:>6.2f}  {share}", flush=True)


def say_mass_outside(reader: CacheReader) -> None:
    """How much of the teacher's softmax lies outside its leading ids, at two temperatures."""
    head = load_head(reader.lm_head_path, torch.device("cpu"))
    rows_NV = torch.cat([head.logits(stored_hidden_states(reader, index)) for index in range(len(reader))])
    sorted_NV = rows_NV.sort(dim=1, descending=True).values
    print(f"mass outside the teacher's top k, mean of {len(rows_NV)} positions")
    print(f"{'temperature':<12}" + "".join(f"{f'k = {k}':>10}" for k in MASS_KS))
    for temperature in (1.0, 3.0):
        mass_NV = (sorted_NV / temperature).softmax(1)
        outside = [float(mass_NV[:, k:].sum(1).mean()) for k in MASS_KS]
        print(f"{temperature:<12g}" + "".join(f"{share:>10.1%}" for share in outside))


if __name__ == "__main__":
    main()
