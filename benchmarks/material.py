"""The real teacher and the small real cache that the benchmarks share, made once under `demo-output/`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "demo-output" / "teacher"
CACHE = ROOT / "demo-output" / "caches" / "bench"
STUDENT_LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 25, 29)


def fetch_teacher() -> Path:
    subprocess.run([sys.executable, str(ROOT / "examples" / "fetch_teacher.py"), str(TEACHER)], check=True)
    return TEACHER


def make_cache() -> Path:
    """A cache of 96 prompts with the teacher's answers, all positions."""
    command = [
        sys.executable, "-m", "pipeline", "teacher-dump", "--teacher", str(fetch_teacher()), "--data",
        str(ROOT / "examples" / "prompts-train.jsonl"), "--limit", "96", "--responses", "teacher", "--positions", "all",
        "--top-k", "50", "--set", "responses.max_new_tokens=64", "--out", str(CACHE),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return CACHE
