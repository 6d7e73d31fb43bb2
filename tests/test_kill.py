"""SIGKILL at any instant of a dump, then the same command: the end is as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import pipeline
from tests.conftest import write_jsonl


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough sequences, one a shard, that a dump takes a second or two."""
    rows = [{"prompt": f"Number {number}? ", "response": "one two three " * (1 + number % 7)} for number in range(150)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "many.jsonl", rows)


def kill_when(command: list[str], reached: Callable[[], bool]) -> None:
    """Run ``pipeline`` in a process of its own and SIGKILL it as soon as ``reached``; it must not have finished."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not reached():
        assert process.poll() is None, f"it ended before the moment came: {process.communicate()[0]!r}"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("num_receipts", [0, 3, 40])
def test_a_killed_dump_ends_with_the_same_bytes_and_scores_no_shard_twice(
    teacher_dir: Path, many_rows: Path, tmp_path: Path, num_receipts: int
) -> None:
    command = [
        "teacher-dump", "--teacher", str(teacher_dir), "--data", str(many_rows), "--top-k", "16",
        "--set", "cache.sequences_per_shard=1", "--out",
    ]  # fmt: skip
    killed = tmp_path / "killed"
    kill_when(
        [*command, str(killed)],
        lambda: (killed / "plan.json").exists() and len(list(killed.glob("shard-*.json"))) >= num_receipts,
    )
    assert not (killed / "manifest.json").exists()
    facts = pipeline("inspect", killed, "--json").json
    assert not facts["complete"]
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("shard-*.json")}
    assert len(finished) == facts["finished_shards"] >= num_receipts

    again = pipeline(*command, killed, "--json")
    assert again.json["scored_sequences"] == 150 - len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished

    undisturbed = tmp_path / "undisturbed"
    assert pipeline(*command, undisturbed).code == 0
    assert differences(killed, undisturbed) == []
    assert pipeline("verify", killed).code == 0


def differences(one: Path, other: Path) -> list[str]:
    """The files that are not the same in both folders, each with the place of its first differing byte.

    Model cards are not compared: they say how many seconds a run took.
    """
    both = (one, other)
    files = {path.relative_to(folder) for folder in both for path in folder.rglob("*") if path.is_file()}
    files = {path for path in files if path.name != "README.md"}
    found = []
    for name in sorted(files):
        if not (one / name).exists() or not (other / name).exists():
            found.append(f"{name} is in one alone")
        elif (one / name).read_bytes() != (other / name).read_bytes():
            pairs = zip((one / name).read_bytes(), (other / name).read_bytes(), strict=False)
            place = next((place for place, (left, right) in enumerate(pairs) if left != right), "the end of one")
            sizes = [(folder / name).stat().st_size for folder in (one, other)]
            found.append(f"{name} differs from byte {place}; sizes {sizes}")
    return found


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0
