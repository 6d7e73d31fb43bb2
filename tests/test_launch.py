"""``--launcher processes`` and ``ray``: the cache of one worker, by several that may die."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_schema.lease_files import leases_in
from pipeline import processes
from pipeline.processes import Failures, environments
from pipeline.ray_workers import DumpActor
from pipeline.stopping import signals_held, sigterm_handler_kept, tidy_on_signals
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


def one_at_work(cache: Path) -> int:
    """The process of a worker that has a shard in hand, once there is one."""

    def at_work() -> list[int]:
        return [lease.record.pid for lease in leases_in(cache / "leases") if lease.name.startswith("shard-")]

    until(at_work)
    return at_work()[0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["processes", "ray"])
def test_a_launcher_s_workers_write_what_one_would_though_one_is_killed(
    launcher: str, command: list[object], by_one: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with forks(tmp_path) as start:
        parent = start.start(*command, cache, "--launcher", launcher, "--workers", 2)
        os.kill(one_at_work(cache), signal.SIGKILL)
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
        os.kill(one_at_work(cache), signal.SIGKILL)
        out, _ = torchrun.communicate(timeout=200)
    assert torchrun.returncode == 0
    assert {json.loads(line)["worker"] for line in out.splitlines()} == {"0/3", "1/3", "2/3"}
    assert differences(cache, by_one) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "code"),
    [("processes", signal.SIGTERM, 143), ("processes", signal.SIGHUP, 129), ("ray", signal.SIGTERM, 143)],
)
def test_a_launcher_that_is_ended_ends_its_workers(
    launcher: str, number: signal.Signals, code: int, command: list[object], by_one: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with forks(tmp_path) as start:
        parent = start.start(*command, cache, "--launcher", launcher, "--workers", 2)
        until(lambda: list(cache.glob("shard-*.json")))
        workers = {lease.record.pid for lease in leases_in(cache / "leases")}
        parent.send(number)
        result = parent.wait()
    assert result.code == code
    assert result.err.splitlines()[-1].startswith("interrupted; finished work is kept")
    assert workers
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    if launcher == "processes":
        assert not (cache / "leases").exists()
    assert pipeline(*command, cache).json["complete"]
    assert differences(cache, by_one) == []


@pytest.mark.slow
def test_a_launcher_that_is_ended_while_it_starts_its_workers_leaves_nothing(
    command: list[object], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with forks(tmp_path) as start:
        for delay_ms in range(0, 21, 2):
            parent = start.start(*command, cache, "--launcher", "processes", "--workers", 3)
            until(lambda: list(tmp_path.glob("teacher-dump-*")))
            time.sleep(delay_ms / 1000)
            parent.send(signal.SIGTERM)
            assert parent.wait().code == 143
            assert list(tmp_path.glob("teacher-dump-*")) == []
            assert commands_with(str(cache)) == []


def commands_with(word: str) -> list[str]:
    """Command lines of this machine's processes that have the word in them; one that has ended has none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode()
            found += [line] if word in line else []
    return found


@pytest.mark.slow
def test_a_paused_worker_does_not_hold_up_the_end(command: list[object], by_one: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with forks(tmp_path) as start:
        parent = start.start(
            *command, cache, "--launcher", "processes", "--workers", 2, "--set", "worker.lease_seconds=2"
        )
        paused = one_at_work(cache)
        os.kill(paused, signal.SIGSTOP)
        until((cache / "manifest.json").exists)
        finished = time.monotonic()
        result = parent.wait()
    assert time.monotonic() - finished < 12
    assert result.json["complete"]
    assert not Path(f"/proc/{paused}").exists()
    assert not (cache / "leases").exists()
    assert differences(cache, by_one) == []


@pytest.mark.parametrize(("ignored", "code"), [(False, 129), (True, 0)])
def test_sighup_ends_what_was_not_started_by_nohup(ignored: bool, code: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with tidy_on_signals():
            signal.raise_signal(signal.SIGHUP)
        left_with = 0
    except SystemExit as stop:
        left_with = int(stop.code or 0)
    finally:
        after = signal.signal(signal.SIGHUP, before)
    assert left_with == code
    assert after == (signal.SIG_IGN if ignored else signal.SIG_DFL)


def test_a_signal_that_comes_while_it_is_held_ends_the_command_right_after() -> None:
    done = []

    @tidy_on_signals()
    def command() -> None:
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            done.append("inside")
        done.append("after")

    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 143
    assert done == ["inside"]


def test_a_library_s_sigterm_handler_is_replaced_again() -> None:
    def theirs(number: int, frame: object) -> None:
        sys.exit(number)

    @sigterm_handler_kept()
    def start(*, ended_meanwhile: bool) -> None:
        signal.signal(signal.SIGTERM, theirs)
        if ended_meanwhile:
            signal.raise_signal(signal.SIGTERM)

    with tidy_on_signals():
        ours = signal.getsignal(signal.SIGTERM)
        start(ended_meanwhile=False)
        assert signal.getsignal(signal.SIGTERM) == ours
        with pytest.raises(SystemExit) as stop:
            start(ended_meanwhile=True)
        assert signal.getsignal(signal.SIGTERM) == ours
    assert stop.value.code == 143


@pytest.mark.slow
def test_what_all_workers_say_is_the_launcher_s_error(command: list[object], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "leases").write_text("a file where a folder should be")
    result = pipeline(*command, tmp_path / "cache", "--launcher", "processes", "--workers", 2)
    assert result.code == 1
    said = f"{tmp_path}/cache/leases cannot be written: "
    assert result.err.splitlines()[-1].startswith(f"error: {said}")
    assert result.err.count(said) == 1


def test_a_worker_s_failure_is_said_when_others_do_not_fail_alike(capsys: pytest.CaptureFixture[str]) -> None:
    failures = Failures(3)
    failures.add(1, "no room.")
    failures.say()
    assert capsys.readouterr().err == ""
    failures.say(after_seconds=0)
    assert "worker 1/3 stopped, the others go on: no room." in " ".join(capsys.readouterr().err.split())
    failures.add(0, "no light.")
    failures.add(2, "no room.")
    with pytest.raises(InputError, match=r"^no room\.$"):
        failures.say()
    assert "worker 0/3 stopped: no light." in " ".join(capsys.readouterr().err.split())


def test_a_launcher_refuses_what_is_wrong_before_it_starts_anything(command: list[object], tmp_path: Path) -> None:
    both = ["--launcher", "processes", "--workers", 2]
    assert "give --worker or --launcher" in refused(command, tmp_path, 2, *both, "--worker", "0/2")
    assert "give --launcher and --workers, or neither" in refused(command, tmp_path, 1, "--workers", 2)
    assert "give --launcher and --workers, or neither" in refused(command, tmp_path, 1, "--launcher", "ray")
    assert "only --launcher ray" in refused(command, tmp_path, 1, *both, "--set", "worker.ray_gpus=1")
    assert "--top-k 100000 is more than" in refused(command, tmp_path, 1, *both, "--top-k", 100_000)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("worker.lease_seconds=86401", "worker.lease_seconds: Input should be less than or equal to 86400"),
        ("worker.ray_resources={CPU=1}", "CPU is no resource of the user's own: give worker.ray_cpus"),
        ("worker.ray_resources={object_store_memory=1}", "object_store_memory is no resource of the user's own"),
        ("worker.ray_resources={disk=-1}", "worker.ray_resources.disk: Input should be greater than 0"),
        ("worker.ray_resources={disk=inf}", "worker.ray_resources.disk: Input should be a finite number"),
    ],
)
def test_a_demand_that_means_nothing_is_refused(setting: str, said: str, command: list[object], tmp_path: Path) -> None:
    assert said in refused(command, tmp_path, 1, "--launcher", "ray", "--workers", 2, "--set", setting)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("ray_gpus=99", "2 workers take 198 GPU of the Ray cluster, which is this machine alone and has"),
        ("ray_resources={big=1}", "2 workers take 2 big of the Ray cluster, which is this machine alone and has 0"),
        ("ray_cpus=0.000001", "Ray refuses what each worker is to take"),
    ],
)
def test_what_ray_can_never_give_is_an_error(setting: str, said: str, command: list[object], tmp_path: Path) -> None:
    with forks(tmp_path) as start:
        result = start.start(
            *command, tmp_path / "cache", "--launcher", "ray", "--workers", 2, "--set", f"worker.{setting}"
        ).wait()
    assert result.code == 1
    assert said in result.err.splitlines()[-1]
    assert not (tmp_path / "cache").exists()


def test_a_ray_address_where_nothing_listens_is_an_error_at_once(command: list[object], tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        both = ["--launcher", "ray", "--workers", 2]
        for given in (address, f"ray://{address}"):
            said = refused(command, tmp_path, 1, *both, "--set", f"worker.ray_address={given}")
            assert f"error: no Ray cluster at {given} ([Errno" in said
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


def test_workers_import_what_the_launcher_imported() -> None:
    root = str(Path(processes.__file__).parent.parent)
    cpu = torch.device("cpu")
    assert environments(config(1), cpu, {})[0]["PYTHONPATH"] == root
    assert environments(config(1), cpu, {"PYTHONPATH": "/other"})[0]["PYTHONPATH"] == f"{root}{os.pathsep}/other"


def test_the_cpu_s_threads_are_shared_out_unless_they_are_told() -> None:
    cpu, cores = torch.device("cpu"), len(os.sched_getaffinity(0))
    assert [each["OMP_NUM_THREADS"] for each in environments(config(2), cpu, {})] == [str(max(1, cores // 2))] * 2
    assert [each["OMP_NUM_THREADS"] for each in environments(config(2), cpu, {"OMP_NUM_THREADS": "7"})] == ["7"] * 2
