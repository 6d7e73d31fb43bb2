"""``--launcher processes`` and ``ray``: the cache of one worker, by several that may die."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_schema.lease_files import leases_in
from pipeline.processes import environments
from pipeline.ray_workers import DumpActor
from tests.command_line import pipeline
from tests.conftest import write_jsonl
from tests.forked import forks, until
from tests.test_kill import differences
from workers.errors import InputError
from workers.teacher.config import DumpConfig

NUM_SEQUENCES = 96


@pytest.fixture(scope="module")
def command(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    rows = [{"prompt": f"Number {row}? ", "response": "one two three " * (1 + row % 7)} for row in range(NUM_SEQUENCES)]
    data = write_jsonl(tmp_path_factory.mktemp("data") / "many.jsonl", rows)
    return [
        "teacher-dump", "--teacher", teacher_dir, "--data", data, "--top-k", 16, "--json",
        "--set", "cache.sequences_per_shard=2", "--set", "engine.tokens_per_batch=64", "--out",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def by_one(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "by-one"
    assert pipeline(*command, folder).code == 0
    return folder


@pytest.fixture(autouse=True)
def _logs_among_the_test_s_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # its sockets' paths must be short


def kill_one_at_work(cache: Path) -> int:
    """SIGKILL a worker that has a shard in hand, and return its process."""

    def at_work() -> list[int]:
        return [lease.record.pid for lease in leases_in(cache / "leases") if lease.name.startswith("shard-")]

    until(at_work)
    pid = at_work()[0]
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["processes", "ray"])
def test_a_launcher_s_workers_write_what_one_would_though_one_is_killed(
    launcher: str, command: list[object], by_one: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with forks(tmp_path) as start:
        parent = start.start(*command, cache, "--launcher", launcher, "--workers", 2)
        kill_one_at_work(cache)
        result = parent.wait()
    assert result.json["complete"]
    assert result.json["workers"] == 2
    assert result.json["scored_sequences"] == NUM_SEQUENCES
    assert differences(cache, by_one) == []
    if launcher == "processes":
        assert "was killed by SIGKILL; the others take over its shards, and it is started again (1 of 3" in result.err
    again = pipeline(*command, cache, "--launcher", launcher, "--workers", 2).json
    assert again["scored_sequences"] == 0


@pytest.mark.slow
def test_torchrun_starts_its_workers_again_when_one_is_killed(
    command: list[object], by_one: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    started = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=3",
        "--max-restarts=2",
        "-m",
        "pipeline",
    ]
    with subprocess.Popen([*started, *map(str, command), str(cache)], stdout=subprocess.PIPE, text=True) as torchrun:
        kill_one_at_work(cache)
        out, _ = torchrun.communicate(timeout=200)
    assert torchrun.returncode == 0
    assert {json.loads(line)["worker"] for line in out.splitlines()} == {"0/3", "1/3", "2/3"}
    assert differences(cache, by_one) == []


@pytest.mark.slow
def test_a_launcher_that_is_ended_ends_its_workers(command: list[object], by_one: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with forks(tmp_path) as start:
        parent = start.start(*command, cache, "--launcher", "processes", "--workers", 2)
        until(lambda: list(cache.glob("shard-*.json")))
        workers = {lease.record.pid for lease in leases_in(cache / "leases")}
        parent.send(signal.SIGTERM)
        result = parent.wait()
    assert result.code == 143
    assert workers
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    assert not (cache / "leases").exists()
    assert pipeline(*command, cache).json["complete"]
    assert differences(cache, by_one) == []


@pytest.mark.slow
def test_what_all_workers_say_is_the_launcher_s_error(command: list[object], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "leases").write_text("a file where a folder should be")
    result = pipeline(*command, tmp_path / "cache", "--launcher", "processes", "--workers", 2)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith(f"error: {tmp_path}/cache/leases cannot be written: ")


def test_a_launcher_refuses_what_is_wrong_before_it_starts_anything(command: list[object], tmp_path: Path) -> None:
    both = ["--launcher", "processes", "--workers", 2]
    assert "give --worker or --launcher" in refused(command, tmp_path, 2, *both, "--worker", "0/2")
    assert "give --launcher and --workers, or neither" in refused(command, tmp_path, 1, "--workers", 2)
    assert "give --launcher and --workers, or neither" in refused(command, tmp_path, 1, "--launcher", "ray")
    assert "only --launcher ray" in refused(command, tmp_path, 1, *both, "--set", "worker.ray_gpus=1")
    assert "--top-k 100000 is more than" in refused(command, tmp_path, 1, *both, "--top-k", 100_000)
    assert not (tmp_path / "cache").exists()


def refused(command: list[object], tmp_path: Path, code: int, *options: object) -> str:
    result = pipeline(*command, tmp_path / "cache", *options)
    assert result.code == code
    return " ".join(result.err.replace("│", " ").split())


def test_a_ray_node_that_does_not_see_the_directory_says_so(tmp_path: Path) -> None:
    """Another node is played by another directory: the launcher's marker is not in it."""
    cache, marker = tmp_path / "cache", tmp_path / "elsewhere" / "marker"
    said = DumpActor().dump(
        config(2).model_dump_json(exclude_unset=True), str(cache), str(marker), "/nowhere", 0, 2, 60.0
    )
    assert said == (
        f"{cache} on {socket.gethostname()} is not the directory the launcher sees: give --out on a file system that "
        f"all nodes of the Ray cluster share."
    )
    assert not cache.exists()


# ---- shares of a machine ----


def config(count: int, **engine: Any) -> DumpConfig:
    return DumpConfig.model_validate(
        {
            "teacher": {"model": "m"},
            "data": {"path": "d"},
            "worker": {"launcher": "processes", "count": count},
            "engine": engine,
        }
    )


def gpus(count: int, visible: str, **engine: Any) -> list[str]:
    variables = environments(config(count, **engine), torch.device("cuda"), {"CUDA_VISIBLE_DEVICES": visible})
    return [each["CUDA_VISIBLE_DEVICES"] for each in variables]


def test_every_worker_has_gpus_of_its_own() -> None:
    assert gpus(3, "0,1,2,3") == ["0", "1", "2"]
    assert gpus(2, "GPU-a,GPU-b") == ["GPU-a", "GPU-b"]
    assert gpus(2, "4,5,6,7", name="vllm", tensor_parallel=2) == ["4,5", "6,7"]
    assert gpus(1, "0,1,2,3,4,5,6,7", name="vllm", tensor_parallel=4, pipeline_parallel=2) == ["0,1,2,3,4,5,6,7"]


def test_fewer_gpus_than_the_workers_need_are_refused() -> None:
    with pytest.raises(InputError, match=r"--workers 4 with 2 GPUs each need 8, and .* sees 4: give --workers 2\."):
        gpus(4, "0,1,2,3", name="vllm", tensor_parallel=2)
    with pytest.raises(InputError, match="--device cuda:1 is one device"):
        gpus(1, "0,1", device="cuda:1")


def test_the_cpu_s_threads_are_shared_out_unless_they_are_told() -> None:
    cpu, cores = torch.device("cpu"), len(os.sched_getaffinity(0))
    assert [each["OMP_NUM_THREADS"] for each in environments(config(2), cpu, {})] == [str(max(1, cores // 2))] * 2
    assert [each["OMP_NUM_THREADS"] for each in environments(config(2), cpu, {"OMP_NUM_THREADS": "7"})] == ["7"] * 2
