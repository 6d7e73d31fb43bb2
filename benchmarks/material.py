"""The real teacher and the small real caches that the benchmarks share, made once under `demo-output/`."""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "demo-output"
TEACHER = OUT / "teacher"
STUDENT_LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 25, 29)
PROMPTS = ROOT / "examples" / "prompts-train.jsonl"


def fetch_teacher() -> Path:
    subprocess.run([sys.executable, str(ROOT / "examples" / "fetch_teacher.py"), str(TEACHER)], check=True)
    return TEACHER


def make_cache() -> Path:
    """A cache of 96 prompts with the teacher's answers, all positions, top 50."""
    return dump("bench", PROMPTS, 96, "--positions", "all", "--top-k", "50")


def add_data_options(parser: argparse.ArgumentParser, rows: int) -> None:
    parser.add_argument("--data", type=Path, default=PROMPTS, help="JSONL; by default the demo's prompts")
    parser.add_argument("--rows", type=int, default=rows)


def dump(name: str, data: Path, rows: int, *options: str) -> Path:
    """A float32 cache of the first rows of a file; the teacher answers where the rows have no response."""
    cache = OUT / "caches" / name
    answers = ["--responses", "teacher", "--set", "responses.max_new_tokens=64"] if data == PROMPTS else []
    pipeline(
        "teacher-dump", "--teacher", fetch_teacher(), "--data", data, "--limit", rows, "--out", cache,
        *answers, *options,
    )  # fmt: skip
    return cache


def pipeline(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pipeline", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
