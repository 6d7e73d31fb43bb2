"""What the teacher costs three students of three epochs each that share one cache, counted sequence by sequence.

Two of the students train at the same time, the third after them. Once with hidden states in the cache, once without and
with a live teacher whose hidden states are logged, and with a log of answers at several fetch-aheads.
`python -m benchmarks.passes [--data FILE.jsonl] [--rows 32] [--settings hidden live logits:64 …]`
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.material import OUT, STUDENT_LAYERS, TEACHER, add_data_options, dump

EPOCHS = 3
STUDENTS = {
    "A": (STUDENT_LAYERS, 0),
    "B": ((0, 1, 4, 7, 10, 13, 17, 21, 25, 29), 1),
    "C": ((0, 2, 5, 8, 11, 14, 19, 23, 27, 29), 2),
}
SETTINGS = ("hidden", "live", "logits:0", "logits:8", "logits:64", "logits:256")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_options(parser, rows=32)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    options = parser.parse_args()
    stored = dump("passes-hidden", options.data, options.rows)
    bare = dump("passes-bare", options.data, options.rows, "--no-hidden-states")
    print(f"{options.rows} sequences, {EPOCHS} epochs, students A and B at once, then C; teacher forwards by epoch")
    print(f"{'setting':<12} {'student':<8} {'1':>5} {'2':>5} {'3':>5}   pairs by tier")
    for setting in options.settings:
        kind, _, ahead = setting.partition(":")
        lookups = OUT / "passes" / setting.replace(":", "-")
        shutil.rmtree(lookups, ignore_errors=True)
        flags = ["--cache", str(stored if kind == "hidden" else bare), "--lookups", str(lookups / "log")]
        if kind != "hidden":
            flags += ["--teacher", str(TEACHER), "--log", "hidden" if kind == "live" else "logits"]
        if ahead:
            flags += ["--set", f"lookups.fetch_ahead={ahead}"]
        report(setting, {name: lookups / name for name in STUDENTS}, flags, options.rows)
        size = sum(path.stat().st_size for path in lookups.glob("log/*/*/*.parquet"))
        print(f"{'':<12} log {size / 1e6:.1f} MB")


def report(setting: str, runs: dict[str, Path], flags: list[str], num_sequences: int) -> None:
    pair = [start(name, runs[name], flags) for name in ("A", "B")]
    if any(process.wait() for process in pair) or start("C", runs["C"], flags).wait():
        sys.exit("passes: a run failed")
    total = 0
    for name, run in runs.items():
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        forwards, tiers = [0] * EPOCHS, dict.fromkeys(records[0]["lookups"], 0)
        for record in records:
            forwards[math.ceil(record["epoch"]) - 1] += record["teacher_forwards"]
            for tier, count in record["lookups"].items():
                tiers[tier] += count
        total += sum(forwards)
        counts = ", ".join(f"{tier} {count:,}" for tier, count in tiers.items() if count)
        print(f"{setting:<12} {name:<8} {' '.join(f'{number:>5}' for number in forwards)}   {counts}")
    print(f"{setting:<12} passes: 1 of the dump + {total / num_sequences:.2f} of live lookups")


def start(name: str, run: Path, flags: list[str]) -> subprocess.Popen[bytes]:
    """Train a student in a process of its own, on one thread."""
    layers, seed = STUDENTS[name]
    command = [
        sys.executable, "-m", "pipeline", "distill", "--student", str(TEACHER), "--out", str(run), "--student-layers",
        ",".join(map(str, layers)), "--seed", str(seed), "--epochs", str(EPOCHS), "--dtype", "float32",
        "--set", "optimizer.lr=3e-4", *flags,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
