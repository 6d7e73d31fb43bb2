"""The thread that writes: what stops it stops the dump, with its error and without half a file."""

import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache_schema.errors import StorageError
from cache_schema.leases import Leases
from cache_schema.manifest import Receipt, StoredFile, read_json
from cache_schema.sequence import ScoredSequence
from cache_schema.writer import ShardWriter, stored_file
from tests.caches import make_plan, make_scoreds, with_rows
from workers.teacher.background import BackgroundWriter

PLAN = make_plan(num_sequences=8, sequences_per_shard=4, hidden_size=4096)
SCOREDS = make_scoreds(PLAN)


class Batch:
    """Of sequences that are scored already; counts how many were taken, and waits for ``may_go``."""

    def __init__(self, scoreds: list[ScoredSequence], may_go: threading.Event | None = None) -> None:
        self.scoreds, self.may_go, self.is_taken = scoreds, may_go, False

    def to_host(self) -> list[ScoredSequence]:
        if self.may_go:
            assert self.may_go.wait(60)
        self.is_taken = True
        return self.scoreds


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[Leases]:
    with Leases(tmp_path / "leases", "0/1", 60) as opened:
        yield opened


def write(cache: Path, leases: Leases, shards: dict[int, list[Batch]]) -> None:
    with BackgroundWriter(cache, PLAN) as writer:
        for shard, batches in shards.items():
            lease = leases.claim([f"shard-{shard}"])
            assert lease
            with writer.shard(shard, lease) as put:
                for batch in batches:
                    put(batch)  # type: ignore[arg-type]


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != "leases")


def of_shard(*shards: int) -> list[str]:
    return sorted(f"shard-{shard:05d}{end}" for shard in shards for end in (".json", ".parquet", ".hidden.parquet"))


def test_what_is_given_is_written_and_its_leases_are_released(tmp_path: Path, leases: Leases) -> None:
    write(tmp_path, leases, {0: [Batch(SCOREDS[:3]), Batch(SCOREDS[3:4])], 1: [Batch(SCOREDS[4:])]})
    assert names(tmp_path) == of_shard(0, 1)
    assert list((tmp_path / "leases").iterdir()) == []


def test_a_full_disk_stops_the_dump_and_leaves_no_half_file(tmp_path: Path, leases: Leases) -> None:
    """RLIMIT_FSIZE makes every write beyond it fail as a full disk does."""
    write(tmp_path, leases, {0: [Batch(SCOREDS[:4])]})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"shard-00001\.hidden\.parquet cannot be written: .*too large"):
            write(tmp_path, leases, {1: [Batch(SCOREDS[4:])]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == of_shard(0)


def test_a_row_that_breaks_the_format_stops_the_dump_where_it_stands(tmp_path: Path, leases: Leases) -> None:
    broken = with_rows(SCOREDS[5], logits=np.full_like(SCOREDS[5].top_k_rows.logits, np.nan))
    batches = [Batch([scored]) for scored in (SCOREDS[4], broken, *SCOREDS[6:])]
    with pytest.raises(ValueError, match=f"sequence {broken.sequence.sequence_id.hex()}: "):
        write(tmp_path, leases, {0: [Batch(SCOREDS[:4])], 1: batches})
    assert names(tmp_path) == of_shard(0)
    assert [batch.is_taken for batch in batches] == [True, True, False, False], "nothing after it is written"


def test_an_error_of_the_teacher_keeps_the_shards_that_were_complete(tmp_path: Path, leases: Leases) -> None:
    may_go = threading.Event()

    def fail_later() -> None:
        with BackgroundWriter(tmp_path, PLAN) as writer:
            for shard in (0, 1):
                lease = leases.claim([f"shard-{shard}"])
                assert lease
                with writer.shard(shard, lease) as put:
                    put(Batch(SCOREDS[4 * shard : 4 * shard + 2], may_go if shard == 0 else None))  # type: ignore[arg-type]
                    if shard == 1:
                        raise RuntimeError("the teacher is gone")
                    put(Batch(SCOREDS[2:4]))  # type: ignore[arg-type]
                    may_go.set()

    with pytest.raises(RuntimeError, match="the teacher is gone"):
        fail_later()
    assert names(tmp_path) == of_shard(0)


def test_a_shard_whose_lease_was_lost_is_left_to_whoever_took_over(tmp_path: Path, leases: Leases) -> None:
    with BackgroundWriter(tmp_path, PLAN) as writer:
        lease = leases.claim(["shard-0"])
        assert lease
        with writer.shard(0, lease) as put:
            put(Batch(SCOREDS[:4]))  # type: ignore[arg-type]
            (tmp_path / "leases" / "shard-0.lease-1").touch()
    assert names(tmp_path) == []
    assert [path.name for path in (tmp_path / "leases").iterdir()] == ["shard-0.lease-1"]


def test_no_more_than_a_few_batches_wait_for_the_disk(tmp_path: Path, leases: Leases) -> None:
    may_go, given = threading.Event(), threading.Semaphore(0)
    plan = make_plan(num_sequences=8, sequences_per_shard=8, hidden_size=4096)

    def give() -> None:
        with BackgroundWriter(tmp_path, plan) as writer:
            lease = leases.claim(["shard-0"])
            assert lease
            with writer.shard(0, lease) as put:
                for scored in SCOREDS:
                    put(Batch([scored], may_go))  # type: ignore[arg-type]
                    given.release()

    teacher = threading.Thread(target=give)
    teacher.start()
    num_given = 0
    while given.acquire(timeout=1):
        num_given += 1
    may_go.set()
    teacher.join(60)
    assert 1 <= num_given <= 4, "three that wait, and the one being written"
    assert names(tmp_path) == of_shard(0)


# ---- paused, and taken over ----


def taken_over(folder: Path, name: str) -> None:
    """What a worker leaves that thought the holder dead, and has finished since."""
    for path in folder.glob(f"{name}.lease-*"):
        path.unlink()


def test_a_worker_paused_while_its_files_are_hashed_changes_nothing_when_it_wakes(
    tmp_path: Path, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker's files of the shard may hold other last bits: its receipt must stay theirs."""
    others = with_rows(SCOREDS[0], logits=SCOREDS[0].top_k_rows.logits - 1)

    def paused(directory: Path, name: str, path: Path | None = None) -> StoredFile:
        if not (tmp_path / "leases" / "over").exists():
            (tmp_path / "leases" / "over").touch()
            taken_over(tmp_path / "leases", "shard-0")
            for leftover in tmp_path.glob(".shard-00000*"):
                leftover.unlink()
            with ShardWriter(tmp_path, PLAN, 0) as other:
                for scored in (others, *SCOREDS[1:4]):
                    other.append(scored)
        return stored_file(directory, name, path)

    monkeypatch.setattr("cache_schema.writer.stored_file", paused)
    write(tmp_path, leases, {0: [Batch(SCOREDS[:4])]})
    receipt = read_json(tmp_path / "shard-00000.json", Receipt)
    assert [stored_file(tmp_path, file.name) for file in receipt.files] == list(receipt.files)
    assert names(tmp_path) == of_shard(0)


def test_what_is_given_of_a_shard_whose_lease_is_lost_is_dropped(tmp_path: Path, leases: Leases) -> None:
    class Refused(Batch):
        """Its temporary file went with the lease."""

        def to_host(self) -> list[ScoredSequence]:
            taken_over(tmp_path / "leases", "shard-0")
            raise StorageError("Stale file handle")

    write(tmp_path, leases, {0: [Batch(SCOREDS[:1]), Refused([]), Batch(SCOREDS[1:4])], 1: [Batch(SCOREDS[4:])]})
    assert names(tmp_path) == of_shard(1)
