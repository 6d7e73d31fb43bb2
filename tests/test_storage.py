"""A file appears whole under its name or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache_schema import StorageError
from cache_schema.storage import discard_leftovers, is_leftover, publish, publish_directory, publish_text, sha256_of
from tests.caches import make_plan, make_scoreds, write_shard

USER_WITHOUT_RIGHTS = 65534


@pytest.fixture
def read_only_directory(tmp_path, monkeypatch):
    """The current directory, which this process may read and not write, whoever started it."""
    directory = tmp_path / "read-only"
    directory.mkdir()
    directory.chmod(0o555)
    monkeypatch.chdir(directory)  # a relative path needs no rights on the directories above
    if os.geteuid() == 0:
        os.seteuid(USER_WITHOUT_RIGHTS)
    yield
    os.seteuid(os.getuid())
    directory.chmod(0o755)


def run_python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def write_and_raise(publication, error, name=""):
    with publication as temporary:
        (temporary / name).write_text("new")
        raise error


def test_a_published_file_appears_whole_and_leaves_no_temporary_one(tmp_path):
    with publish(tmp_path / "new" / "file") as temporary:
        temporary.write_bytes(b"one")
        assert not (tmp_path / "new" / "file").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert (tmp_path / "new" / "file").read_bytes() == b"one"


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_as_it_was(tmp_path, interruption):
    publish_text(tmp_path / "file", "old")
    with pytest.raises(interruption):
        write_and_raise(publish(tmp_path / "file"), interruption)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_a_directory_is_published_whole_and_not_over_another(tmp_path):
    with publish_directory(tmp_path / "tokenizer") as temporary:
        (temporary / "a").write_text("a")
        assert not (tmp_path / "tokenizer").exists()
    with (
        pytest.raises(StorageError, match="tokenizer cannot be written"),
        publish_directory(tmp_path / "tokenizer") as temporary,
    ):
        (temporary / "b").write_text("b")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["tokenizer", "tokenizer/a"]


def test_two_writers_of_one_name_have_a_temporary_file_each_and_the_last_one_wins(tmp_path):
    with publish(tmp_path / "file") as one, publish(tmp_path / "file") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "one"}


def test_what_killed_writers_left_of_a_name_is_discarded_and_nothing_else(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from cache_schema.storage import publish, publish_directory
folder = Path(sys.argv[1])
with publish(folder / "file") as one, publish(folder / "file.json") as two, publish_directory(folder / "model") as new:
    one.write_text("half"), two.write_text("half"), (new / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        assert run_python(code, tmp_path).returncode == -9
    kept = [tmp_path / ".file.tmp", tmp_path / ".file.json", tmp_path / "file", tmp_path / "xfile.01234567.tmp"]
    for path in kept:
        path.touch()
    assert sum(is_leftover(path) for path in tmp_path.iterdir()) == 6
    discard_leftovers(tmp_path / "file")
    assert sum(is_leftover(path) for path in tmp_path.iterdir()) == 4
    discard_leftovers(tmp_path / "file.json")
    discard_leftovers(tmp_path / "model")
    discard_leftovers(tmp_path / "nothing")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_directory_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(publish_directory(tmp_path / "tokenizer"), KeyboardInterrupt, "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("read_only_directory")
def test_a_read_only_directory_is_a_storage_error_that_names_the_file():
    path = Path("file")
    with pytest.raises(StorageError, match=r"file cannot be written: Permission denied.*run the same command again"):
        publish_text(path, "text")
    with (
        pytest.raises(StorageError, match=r"folder cannot be written: Permission denied"),
        publish_directory(path.with_name("folder")),
    ):
        pass


@pytest.mark.usefixtures("read_only_directory")
def test_a_shard_in_a_read_only_directory_is_a_storage_error_that_names_it():
    plan = make_plan()
    path = Path()
    with pytest.raises(StorageError, match=r"shard-00000\.parquet cannot be written: .*Permission denied"):
        write_shard(path, plan, 0, make_scoreds(plan)[:4])
    assert list(path.iterdir()) == []


def test_a_file_where_the_directory_should_be_is_a_storage_error(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match=r"plan\.json cannot be written"):
        publish_text(tmp_path / "cache" / "plan.json", "{}")


def test_a_full_disk_is_a_storage_error_that_leaves_nothing(tmp_path):
    code = """
import resource, signal, sys
from pathlib import Path
from cache_schema import StorageError
from cache_schema.storage import publish
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with publish(Path(sys.argv[1])) as temporary:
        temporary.write_bytes(bytes(2000))
except StorageError as error:
    print(error)
"""
    done = run_python(code, tmp_path / "file")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'file'} cannot be written: File too large" in done.stdout
    assert "free space" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_hashed_is_named(tmp_path):
    with pytest.raises(StorageError, match="gone cannot be read"):
        sha256_of(tmp_path / "gone")
