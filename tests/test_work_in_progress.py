"""``pipeline inspect`` of a cache that is being written: who is at what, and when all will be done."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache_schema.leases import Leases
from tests.command_line import pipeline


@pytest.fixture
def unfinished(cache_dir: Path, tmp_path: Path) -> Path:
    """A cache without its manifest and its last shard."""
    folder = shutil.copytree(cache_dir, tmp_path / "cache")
    (folder / "manifest.json").unlink()
    for path in folder.glob("shard-00002*"):
        path.unlink()
    return folder


def test_a_finished_cache_says_nothing_of_workers(cache_dir: Path) -> None:
    assert "workers" not in pipeline("inspect", cache_dir, "--json").json


def test_without_workers_the_view_says_how_to_go_on(unfinished: Path) -> None:
    facts = pipeline("inspect", unfinished, "--json").json
    assert (facts["workers"], facts["tokens_per_second"], facts["seconds_left"]) == ([], 0, None)
    assert "none: the same teacher-dump command goes on with it" in pipeline("inspect", unfinished).out


def test_the_living_are_shown_with_their_pace_and_the_time_left(unfinished: Path) -> None:
    with Leases(unfinished / "leases", "0/2", seconds=1.0) as one, Leases(unfinished / "leases", "1/2") as other:
        assert one.claim(["shard-00002"])
        assert one.claim(["shard-00003"])
        assert other.claim(["shard-00004"])
        one.note(sequences=4, tokens=800)
        time.sleep(0.5)  # three beats
        facts = pipeline("inspect", unfinished, "--json").json
        words = pipeline("inspect", unfinished).out
    first, second = facts["workers"]
    assert (first["worker"], first["at"], first["sequences"], first["tokens"]) == (
        "0/2",
        ["shard-00002", "shard-00003"],
        4,
        800,
    )
    assert (second["worker"], second["at"], second["sequences"]) == ("1/2", ["shard-00004"], 0)
    assert first["alive"]
    assert second["alive"]
    assert facts["tokens_per_second"] == pytest.approx(800 / first["seconds"], rel=0.01)
    left = 24 - facts["num_sequences"]
    assert facts["seconds_left"] == round(left * first["seconds"] / 4)
    assert "worker 0/2" in words
    assert "shard-00002, shard-00003, 4 sequences" in words
    assert f"about {facts['seconds_left']} s left" in words


def test_the_dead_are_named_and_not_counted(unfinished: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom cache_schema.leases import Leases\n"
        "leases = Leases(Path(sys.argv[1]), '3/4').__enter__()\n"
        "leases.note(sequences=5, tokens=50)\nassert leases.claim(['shard-00002'])\nos.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(unfinished / "leases")], check=False)
    assert died.returncode == -9
    result = pipeline("inspect", unfinished)
    assert "worker 3/4" in result.out
    assert "GONE: others take over" in result.out
    facts = json.loads(pipeline("inspect", unfinished, "--json").out)
    assert [worker["alive"] for worker in facts["workers"]] == [False]
    assert facts["seconds_left"] is None
