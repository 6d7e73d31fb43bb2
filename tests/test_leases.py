"""Leases: one holder at a time, whoever else wants the work and however its holder ends."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from cache_schema import leases as module
from cache_schema.errors import StorageError
from cache_schema.lease_files import LeaseRecord, leases_in
from cache_schema.leases import Lease, Leases

NAMES = ["n-0", "n-1", "n-2"]
A_LONG_TIME = 1000.0


def worker(folder: Path, seconds: float = A_LONG_TIME) -> Leases:
    return Leases(folder, "0/1", seconds)


def start(folder: Path, seconds: float = A_LONG_TIME, first: int = 0, end: int = 1) -> subprocess.Popen[str]:
    """A process that claims when it is told to, and is ready to be told."""
    command = [sys.executable, "-m", "tests.lease_process", str(folder), str(seconds), str(first), str(end)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert said(process) == ["ready"]
    return process


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("claim\n")
    process.stdin.flush()


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout
    return process.stdout.readline().split()


def claimed(process: subprocess.Popen[str]) -> list[str]:
    tell(process)
    return said(process)


def end(process: subprocess.Popen[str], number: signal.Signals | None = None) -> list[str]:
    """End a process by a signal, or by the end of its stdin, and return the last thing it said."""
    if number is not None:
        process.send_signal(number)
    assert process.stdin
    process.stdin.close()
    last = said(process)
    assert process.wait(60) == (0 if number is None else -number)
    assert process.stdout
    process.stdout.close()
    return last


def written_elsewhere(folder: Path, name: str, seconds: float, beat: int = 0) -> None:
    """What a worker on another machine would have written."""
    folder.mkdir(exist_ok=True)
    record = LeaseRecord(worker="9/9", host="other", pid=1, machine="another", seconds=seconds, beat=beat)
    (folder / f"{name}.lease-0").write_text(record.model_dump_json().ljust(512))


def claimed_within(leases: Leases, name: str, seconds: float) -> tuple[Lease | None, float]:
    """The lease, if it came within so many seconds, and after how many."""
    started = time.monotonic()
    while (lease := leases.claim([name])) is None and time.monotonic() - started < seconds:
        time.sleep(leases.poll_seconds)
    return lease, time.monotonic() - started


# ---- one holder ----


def test_a_name_has_one_holder_and_is_free_when_released(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    with worker(folder) as one, worker(folder) as other:
        first = one.claim(NAMES)
        second = other.claim(NAMES)
        assert first is not None
        assert second is not None
        assert [first.name, second.name] == NAMES[:2]
        assert one.claim(NAMES[:2]) is None
        first.release()
        again = other.claim(NAMES)
        assert again is not None
        assert again.name == NAMES[0]
        assert not again.is_lost()


def test_leaving_releases_everything_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with worker(tmp_path / "leases") as leases:
        for name in NAMES:
            assert leases.claim([name])
        assert len(list((tmp_path / "leases").iterdir())) == 3
    assert list(tmp_path.iterdir()) == []


def test_of_eight_workers_that_want_the_same_names_one_gets_each(tmp_path: Path) -> None:
    assert owners_of_a_race(tmp_path / "leases") == dict.fromkeys((f"n-{number}" for number in range(60)), 1)


def test_of_eight_workers_that_see_a_dead_one_one_takes_over_each_name(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    dead = start(folder, end=60)
    assert len(claimed(dead)) == 60
    end(dead, signal.SIGKILL)
    assert owners_of_a_race(folder) == dict.fromkeys((f"n-{number}" for number in range(60)), 1)
    assert not folder.exists()


def owners_of_a_race(folder: Path) -> dict[str, int]:
    """How many of eight processes got each of 60 names."""
    processes = [start(folder, end=60) for _ in range(8)]
    for process in processes:
        tell(process)
    got = Counter(name for process in processes for name in said(process))
    for process in processes:
        end(process)
    return dict(got)


# ---- a holder that ends or falls silent ----


def test_a_killed_holder_is_noticed_at_once(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert claimed(process) == ["n-0"]
    with worker(tmp_path) as leases:
        assert leases.claim(["n-0"]) is None
        assert [lease.is_dead for lease in leases_in(tmp_path)] == [False]
        end(process, signal.SIGKILL)
        assert [lease.is_dead for lease in leases_in(tmp_path)] == [True]
        assert leases.claim(["n-0"]) is not None
        assert [(lease.record.pid, lease.is_dead) for lease in leases_in(tmp_path)] == [(os.getpid(), False)]
    assert list(tmp_path.glob("*")) == []


def test_a_silent_holder_elsewhere_is_taken_over_after_its_own_time_and_not_before(tmp_path: Path) -> None:
    written_elsewhere(tmp_path, "n-0", seconds=0.5)
    with worker(tmp_path, seconds=4) as leases:
        lease, seconds = claimed_within(leases, "n-0", 3)
        assert lease is not None
        assert seconds >= 0.5
        assert (tmp_path / "n-0.lease-1").exists()


def test_the_age_of_its_file_is_no_sign_for_clocks_differ(tmp_path: Path) -> None:
    written_elsewhere(tmp_path, "n-0", seconds=60)
    os.utime(tmp_path / "n-0.lease-0", (0, 0))
    with worker(tmp_path) as leases:
        assert leases.claim(["n-0"]) is None


def test_every_sign_of_life_counts_anew(tmp_path: Path) -> None:
    with worker(tmp_path, seconds=4) as leases:
        for beat in range(4):
            written_elsewhere(tmp_path, "n-0", seconds=0.6, beat=beat)
            assert claimed_within(leases, "n-0", 0.4)[0] is None


def test_a_living_holder_elsewhere_is_never_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(tmp_path, seconds=1)
    assert claimed(process) == ["n-0"]
    monkeypatch.setattr(module, "this_machine", lambda: "another")
    with worker(tmp_path) as leases:
        assert claimed_within(leases, "n-0", 3)[0] is None
    assert end(process) == ["False"]


def test_a_paused_holder_finds_out_that_it_lost_and_spoils_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, seconds=1)
    assert claimed(process) == ["n-0"]
    with worker(tmp_path, seconds=4) as leases:
        process.send_signal(signal.SIGSTOP)
        lease, seconds = claimed_within(leases, "n-0", 5)
        assert lease is not None
        assert seconds > 0.9 - 1 / 6  # its last beat may be a sixth of its time old, which nobody has seen
        process.send_signal(signal.SIGCONT)
        assert end(process) == ["True"]
        assert not lease.is_lost()
        assert [path.name for path in tmp_path.iterdir()] == ["n-0.lease-1"]


def test_workers_that_were_paused_together_take_nothing_from_one_another(tmp_path: Path) -> None:
    """As a suspended job is: each wakes to leases that have not changed for longer than they say."""
    processes = [start(tmp_path, seconds=1), start(tmp_path, seconds=1)]
    assert claimed(processes[0]) == ["n-0"]
    assert claimed(processes[1]) == []
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    tell(processes[1])
    processes[1].send_signal(signal.SIGCONT)
    assert said(processes[1]) == []
    processes[0].send_signal(signal.SIGCONT)
    assert end(processes[0]) == ["False"]
    end(processes[1])


def test_a_paused_holder_does_not_take_over_from_itself(tmp_path: Path) -> None:
    with Leases(tmp_path, "0/1", 0.3) as leases:
        assert leases.claim(["n-0"])
        written_elsewhere(tmp_path, "n-0", seconds=0.0)
        assert [leases.claim(["n-0"]) for _ in range(3)] == [None] * 3


# ---- what the file system does ----


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b'{"worker": "0/1", "ho', b"\xff" * 512])
def test_an_unreadable_lease_is_taken_over_when_it_stays_so(tmp_path: Path, content: bytes) -> None:
    """Half a beat is seen for an instant; a machine that lost power may leave an empty file for ever."""
    (tmp_path / "n-0.lease-0").write_bytes(content)
    assert leases_in(tmp_path) == []
    with worker(tmp_path, seconds=1) as leases:
        assert leases.claim(["n-0"]) is None
        assert claimed_within(leases, "n-0", 5)[0] is not None


def test_other_files_are_no_leases(tmp_path: Path) -> None:
    for name in ("n-0.lease-x", "n-0.lease", ".n-0.lease-0.tmp", "notes.txt"):
        (tmp_path / name).touch()
    with worker(tmp_path) as leases:
        assert leases.claim(["n-0"]) is not None


def test_a_folder_that_somebody_removes_is_made_again(tmp_path: Path) -> None:
    with worker(tmp_path / "leases") as leases:
        lease = leases.claim(["n-0"])
        assert lease is not None
        shutil.rmtree(tmp_path / "leases")
        assert lease.is_lost()
        lease.release()
        assert leases.claim(["n-0"]) is not None


def test_a_file_system_without_locks_goes_by_the_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    dead = start(tmp_path, seconds=1)
    assert claimed(dead) == ["n-0"]
    end(dead, signal.SIGKILL)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with worker(tmp_path, seconds=4) as leases:
        assert leases.claim(["n-0"]) is None
        lease, seconds = claimed_within(leases, "n-0", 5)
        assert lease is not None
        assert seconds > 0.9


def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (Path("/sys/leases"), tmp_path / "file", tmp_path / "file" / "leases"):
        with worker(folder) as leases, pytest.raises(StorageError, match=f"{folder} cannot be written: "):
            leases.wait_for("n-0")


# ---- names that come again, locks and files that do not answer ----


def test_a_lease_of_the_same_name_made_by_another_is_not_one_s_own(tmp_path: Path) -> None:
    with worker(tmp_path) as sleeper, worker(tmp_path) as second, worker(tmp_path) as third:
        lease = sleeper.claim(["n-0"])
        assert lease is not None
        (tmp_path / "n-0.lease-0").unlink()  # as its successor does when it is done or gives up
        assert lease.is_lost()
        anew = second.claim(["n-0"])
        assert anew is not None
        assert lease.is_lost()
        assert not anew.is_lost()
        lease.release()
        assert not anew.is_lost()
        assert third.claim(["n-0"]) is None


def test_a_holder_whose_file_system_gave_it_no_lock_lives_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with worker(tmp_path) as holder, worker(tmp_path) as other:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", no_locks)
            lease = holder.claim(["n-0"])
        assert lease is not None
        lease.beat(leases_in(tmp_path)[0].record)
        assert [seen.is_dead for seen in leases_in(tmp_path)] == [False]
        assert other.claim(["n-0"]) is None
        assert not lease.is_lost()


def test_a_lease_that_another_client_of_the_file_system_just_removed_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    written_elsewhere(tmp_path, "n-0", seconds=60)
    with worker(tmp_path) as leases, monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        assert leases.claim(["n-0"]) is None
        assert leases_in(tmp_path) == []
