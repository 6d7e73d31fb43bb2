"""Many workers on one directory: every shard scored once, whoever dies or sleeps, and the bytes of a single worker."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cache_schema.errors import CacheError
from cache_schema.lease_files import SeenLease, leases_in
from cache_schema.plan import Plan
from tests.command_line import pipeline
from tests.conftest import write_jsonl
from tests.forked import Forked, Forks, forks, until
from tests.test_bad_input import snapshot
from tests.test_kill import differences
from tests.tiny_cache import dump_tiny_cache, load_teacher, random_sequences
from workers.teacher import dump as dump_module
from workers.teacher.dump import Progress, dump
from workers.tokenizers import load_tokenizer

NUM_SEQUENCES, NUM_SHARDS = 96, 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"Number {row}? ", "response": "one two three " * (1 + row % 7)} for row in range(NUM_SEQUENCES)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "many.jsonl", rows)


@pytest.fixture(scope="module")
def command(teacher_dir: Path, data: Path) -> list[object]:
    """A dump that takes a second or two, in shards of several batches."""
    return [
        "teacher-dump", "--teacher", teacher_dir, "--data", data, "--top-k", 16, "--json",
        "--set", "cache.sequences_per_shard=4", "--set", "engine.tokens_per_batch=64", "--out",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def by_one(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a dump by one worker."""
    folder = tmp_path_factory.mktemp("caches") / "by-one"
    assert pipeline(*command, folder).json["worker"] == "0/1"
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


def under_torchrun(start: Forks, number: int, command: list[object]) -> list[Forked]:
    """So many workers at once, as torchrun would start them."""
    return [start.start(*command, RANK=str(rank), WORLD_SIZE=str(number)) for rank in range(number)]


def leases_of(process: Forked, cache: Path) -> list[SeenLease]:
    """Shards that this process is at."""
    found = leases_in(cache / "leases")
    return [lease for lease in found if lease.record.pid == process.pid and lease.name.startswith("shard-")]


def finished_shards(cache: Path) -> set[int]:
    return {int(path.stem.removeprefix("shard-")) for path in cache.glob("shard-*.json")}


def test_workers_share_the_shards_and_write_what_one_would(
    command: list[object], by_one: Path, start: Forks, tmp_path: Path
) -> None:
    facts = [process.wait().json for process in under_torchrun(start, 4, [*command, tmp_path / "cache"])]
    assert sorted(each["worker"] for each in facts) == ["0/4", "1/4", "2/4", "3/4"]
    assert sum(each["scored_sequences"] for each in facts) == NUM_SEQUENCES
    assert differences(tmp_path / "cache", by_one) == []


def test_the_others_take_over_what_a_killed_worker_was_at(
    command: list[object], by_one: Path, start: Forks, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    processes = under_torchrun(start, 4, [*command, cache])
    at_work: list[int] = []

    def some_is_at_work() -> bool:
        at_work[:] = [rank for rank in range(4) if finished_shards(cache) and leases_of(processes[rank], cache)]
        return bool(at_work)

    until(some_is_at_work)
    victim = at_work[0]
    processes[victim].send(signal.SIGKILL)
    assert processes[victim].wait().code == -signal.SIGKILL
    finished = finished_shards(cache)
    assert len(finished) < NUM_SHARDS

    rest = [process.wait().json for rank, process in enumerate(processes) if rank != victim]
    scored = sum(each["scored_sequences"] for each in rest)
    # What had a receipt is not scored again, whoever wrote it.
    assert NUM_SEQUENCES - 4 * len(finished) <= scored <= NUM_SEQUENCES
    assert differences(cache, by_one) == []


def test_a_worker_that_sleeps_past_its_lease_harms_nothing_when_it_wakes(
    command: list[object], by_one: Path, start: Forks, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    sleeper, other = under_torchrun(start, 2, ["teacher-dump", "--set", "worker.lease_seconds=1", *command[1:], cache])
    until(lambda: leases_of(sleeper, cache))
    sleeper.send(signal.SIGSTOP)
    assert other.wait().json["complete"]
    before = snapshot(cache)
    sleeper.send(signal.SIGCONT)
    assert sleeper.wait().json["complete"]
    assert snapshot(cache) == before
    assert differences(cache, by_one) == []
    assert pipeline("verify", cache).code == 0


def test_workers_may_come_late_or_after_the_end(
    command: list[object], by_one: Path, start: Forks, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = start.start(*command, cache)
    until(lambda: len(finished_shards(cache)) >= 3)
    late = start.start(*command, cache, "--worker", "1/2")
    scored = [process.wait().json["scored_sequences"] for process in (first, late)]
    assert sum(scored) == NUM_SEQUENCES
    assert differences(cache, by_one) == []
    before = snapshot(cache)
    assert pipeline(*command, cache, "--worker", "7/8").json["scored_sequences"] == 0
    assert snapshot(cache) == before


def test_another_plan_is_refused_while_a_dump_is_at_work(
    command: list[object], by_one: Path, start: Forks, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = start.start(*command, cache)
    until(lambda: finished_shards(cache))
    refused = pipeline(*command, cache, "--top-k", 8)
    assert refused.code == 1
    assert "belongs to another dump: its top_k is 16, this command's is 8" in refused.err
    assert first.wait().json["scored_sequences"] == NUM_SEQUENCES
    assert differences(cache, by_one) == []


def test_of_two_plans_that_begin_together_one_is_refused(command: list[object], start: Forks, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    results = [process.wait() for process in [start.start(*command, cache, "--top-k", k) for k in (8, 16)]]
    assert sorted(result.code for result in results) == [0, 1]
    assert [result.err.count("belongs to another dump") for result in results] == [result.code for result in results]
    assert pipeline("verify", cache).code == 0


def test_what_the_teacher_writes_and_what_is_measured_once_is_the_same_by_three_workers(
    command: list[object], start: Forks, tmp_path: Path
) -> None:
    written = [
        *command[:-1], "--limit", 24, "--hidden-dtype", "int8", "--responses", "teacher",
        "--set", "responses.max_new_tokens=6", "--set", "responses.temperature=1.0", "--out",
    ]  # fmt: skip
    assert pipeline(*written, tmp_path / "one").code == 0
    results = [process.wait() for process in under_torchrun(start, 3, [*written, tmp_path / "three"])]
    assert sum(result.json["scored_sequences"] for result in results) == 24
    assert differences(tmp_path / "three", tmp_path / "one") == []


def test_a_worker_with_other_threads_takes_those_of_the_plan(
    command: list[object], by_one: Path, start: Forks, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = start.start(*command, cache)
    until(lambda: finished_shards(cache))
    first.send(signal.SIGKILL)
    first.wait()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert pipeline(*command, cache).json["complete"]
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert differences(cache, by_one) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_dump_tidily(
    command: list[object], by_one: Path, start: Forks, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    cache = tmp_path / "cache"
    process = start.start(*command, cache)
    until(lambda: finished_shards(cache) and leases_of(process, cache))
    process.send(number)
    result = process.wait()
    assert result.code == code
    assert result.out == ""
    assert result.err.splitlines()[-1] == (
        "interrupted; finished work is kept: run it again to go on (distill: with --resume)"
    )
    assert "Traceback" not in result.err
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []
    assert not (cache / "leases").exists()

    kept = finished_shards(cache)
    assert pipeline(*command, cache).json["scored_sequences"] == NUM_SEQUENCES - 4 * len(kept)
    assert differences(cache, by_one) == []


def test_a_worker_that_sleeps_before_it_writes_the_plan_follows_the_one_it_finds(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asleep between looking for a plan and writing its own, while another worker does the whole dump."""
    sequences, folder = random_sequences(), tmp_path / "cache"
    finished = dump_tiny_cache(tmp_path / "other", teacher_dir, sequences)
    real, woken = dump_module.write_json_first, []

    def asleep(path: Path, plan: Plan) -> None:
        if not woken:
            woken.append(path.name)
            shutil.copytree(finished.cache_dir, folder, dirs_exist_ok=True)
        real(path, plan)

    monkeypatch.setattr(dump_module, "write_json_first", asleep)
    teacher, tokenizer = load_teacher(teacher_dir, finished.plan), load_tokenizer(str(teacher_dir))
    other_threads = finished.plan.engine.model_copy(update={"num_threads": finished.plan.engine.num_threads + 1})
    plan = finished.plan.model_copy(update={"engine": other_threads})
    assert dump(folder, plan, sequences, teacher, tokenizer) == finished.manifest
    assert woken == ["plan.json"]
    assert differences(folder, finished.cache_dir) == []


def test_a_finished_cache_is_rid_of_what_a_late_worker_left(
    command: list[object], by_one: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(by_one, tmp_path / "cache"))
    (cache / ".shard-00003.parquet.0123abcd.tmp").write_text("half")
    (cache / "leases").mkdir()
    (cache / "leases" / "manifest.lease-0").write_text("of a dead worker")
    assert pipeline(*command, cache).json["scored_sequences"] == 0
    assert differences(cache, by_one) == []
    assert not (cache / "leases").exists()


@pytest.mark.parametrize("what", ["plan.json", "lm_head.safetensors", "everything"])
def test_a_directory_that_changes_under_a_worker_is_one_error(teacher_dir: Path, tmp_path: Path, what: str) -> None:
    sequences, folder = random_sequences(), tmp_path / "cache"
    plan = dump_tiny_cache(tmp_path / "other", teacher_dir, sequences).plan
    teacher, tokenizer = load_teacher(teacher_dir, plan), load_tokenizer(str(teacher_dir))

    def remove(progress: Progress) -> None:
        if progress.shards == 1 and folder.exists():
            if what == "everything":
                shutil.rmtree(folder, ignore_errors=True)  # in which the writer may make and move a file meanwhile
            else:
                (folder / what).unlink(missing_ok=True)

    gone = "plan.json" if what == "everything" else what
    says = rf"{gone} is gone: the directory was changed while .*give another"
    if what == "everything":
        says += "|shard-.* cannot be written: No such file"  # where it went in the midst of a shard
    with pytest.raises(CacheError, match=says):
        dump(folder, plan, sequences, teacher, tokenizer, remove)
    assert not (folder / "manifest.json").exists()
