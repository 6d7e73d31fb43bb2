"""The lookup log on disk: what is written is read back by whoever looks, whatever else happens to the log meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cache_schema import compaction
from cache_schema.compaction import compact
from cache_schema.errors import CacheCorruptError, CacheMismatchError, StorageError
from cache_schema.lookup_files import LoggedLogits
from cache_schema.lookup_writer import LookupWriter, lookups_dir, machine_mark
from cache_schema.lookups import LookupLog
from cache_schema.plan import FORMAT_VERSION
from cache_schema.reader import CacheReader
from tests.caches import content, flip_bit, make_plan, make_scoreds, write_cache
from tests.log_process import HIDDEN_SIZE, ROUNDS, answers_of, pairs_in, pairs_of, row_of, states_of

HEAD_SHA256 = "f" * 64


def cache_of(folder, seed=0, num_sequences=20, dtype="float32"):
    plan = make_plan(hidden_dtype=None, num_sequences=num_sequences, sequences_per_shard=10)
    plan = plan.model_copy(update={"teacher": plan.teacher.model_copy(update={"dtype": dtype})})
    folder.mkdir()
    return CacheReader(write_cache(folder, plan, make_scoreds(plan, seed)))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return cache_of(tmp_path_factory.mktemp("caches") / "cache")


@pytest.fixture
def log_dir(tmp_path):
    return tmp_path / "lookups"


def log_hidden(reader, log_dir, *batches):
    """One file for each batch of indexes, by one writer. Returns its directory."""
    writer = LookupWriter(log_dir, reader.manifest_sha256, HEAD_SHA256)
    for indexes in batches:
        writer.write("hidden", [row_of(reader, index, states_of(reader, index)) for index in indexes])
    writer.close()
    return writer.directory


def log_answers(reader, log_dir, *batches):
    """The same of answers, each batch as (number, indexes)."""
    writer = LookupWriter(log_dir, reader.manifest_sha256)
    for number, indexes in batches:
        writer.write("logits", [row_of(reader, index, answers_of(reader, index, number)) for index in indexes])
    writer.close()
    return writer.directory


def expected_pairs(reader, index, numbers):
    pairs = {}
    for number in numbers:
        positions, token_ids, logits = pairs_of(reader, index, number)
        pairs |= dict(zip(zip(positions.tolist(), token_ids.tolist(), strict=True), logits.tolist(), strict=True))
    return pairs


def assert_holds_hidden(reader, log, indexes):
    """Hidden states of these sequences, bit for bit, and of no others."""
    for index in range(len(reader)):
        states = log.hidden_states(index)
        assert log.has_hidden_states(index) == (states is not None) == (index in indexes)
        if states is not None:
            assert states.dtype == np.float32
            np.testing.assert_array_equal(states, states_of(reader, index))
    assert log.num_with_hidden_states == len(set(indexes))


def only_file(directory, suffix="*.parquet"):
    (path,) = directory.glob(suffix)
    return path


# Writing and reading


def test_logged_hidden_states_are_read_back_bit_for_bit(reader, log_dir):
    log_hidden(reader, log_dir, [3, 1, 17], [0], [19])
    assert_holds_hidden(reader, LookupLog(reader, [log_dir]), [0, 1, 3, 17, 19])


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "uint16"), ("float16", "float16")])
def test_half_precision_is_logged_as_its_bits(tmp_path, log_dir, dtype, stored):
    reader = cache_of(tmp_path / "cache", num_sequences=3, dtype=dtype)
    bits = np.random.default_rng(0).integers(0, 2**16, (reader[2].rows.num_positions, 7), dtype=np.uint16)
    writer = LookupWriter(log_dir, reader.manifest_sha256, HEAD_SHA256)
    writer.write("hidden", [row_of(reader, 2, bits.view(stored))])
    writer.close()
    states = LookupLog(reader, [log_dir]).hidden_states(2)
    assert states.dtype == stored
    np.testing.assert_array_equal(states.view(np.uint16), bits)


def test_logged_answers_are_read_back_each_pair_once(reader, log_dir):
    log_answers(reader, log_dir, (0, [2, 5]), (1, [5]), (2, [5, 9]))
    log_answers(reader, log_dir, (0, [5]))  # another run, the same answers again
    log = LookupLog(reader, [log_dir])
    for index, numbers in ((2, [0]), (5, [0, 1, 2]), (9, [2])):
        assert len(log.logits(index).counts) == reader[index].rows.num_positions
        assert pairs_in(log.logits(index)) == expected_pairs(reader, index, numbers)
    assert log.logits(3) is None
    assert log.num_with_hidden_states == 0


def test_answers_keep_any_pairs_in_any_order():
    rng = np.random.default_rng(0)
    for num_positions, num_pairs in ((1, 0), (1, 5), (4, 3), (7, 100)):
        positions = rng.integers(0, num_positions, num_pairs)
        token_ids = rng.integers(0, 9, num_pairs)
        logits = (10 * positions + token_ids).astype(np.float32)
        logged = LoggedLogits.of_pairs(num_positions, positions, token_ids, logits)
        expected = dict(zip(zip(positions.tolist(), token_ids.tolist(), strict=True), logits.tolist(), strict=True))
        assert pairs_in(logged) == expected
        assert len(logged.counts) == num_positions
        assert pairs_in(LoggedLogits.merged([logged, logged])) == expected


def test_what_another_run_adds_is_found_after_a_refresh(reader, log_dir):
    log = LookupLog(reader, [log_dir])  # before there is any
    log_hidden(reader, log_dir, [4])
    assert log.hidden_states(4) is None
    log.refresh()
    log_hidden(reader, log_dir, [4, 6])
    assert_holds_hidden(reader, log, [4])
    log.refresh()
    assert_holds_hidden(reader, log, [4, 6])


def test_a_log_in_two_directories_answers_from_both(reader, log_dir, tmp_path):
    log_hidden(reader, log_dir, [1])
    log_hidden(reader, tmp_path / "elsewhere", [2])
    assert_holds_hidden(reader, LookupLog(reader, [tmp_path / "elsewhere", log_dir]), [1, 2])


def test_where_a_logged_file_is_deleted_another_with_its_sequences_answers(reader, log_dir):
    read = log_hidden(reader, log_dir, [1, 2])
    log = LookupLog(reader, [log_dir])
    log_hidden(reader, log_dir, [2, 3])
    log.refresh()
    for path in read.iterdir():
        path.unlink()
    log.refresh()
    assert_holds_hidden(reader, log, [2, 3])


def test_more_files_than_are_kept_open_are_all_read(reader, log_dir):
    log_answers(reader, log_dir, *((number, [number % len(reader)]) for number in range(90)))
    log = LookupLog(reader, [log_dir])
    for _ in range(2):
        for index in range(len(reader)):
            assert pairs_in(log.logits(index)) == expected_pairs(reader, index, range(index, 90, len(reader)))


def test_the_receipt_is_exactly_this_json(reader, log_dir):
    directory = log_hidden(reader, log_dir, [3, 1])
    path = directory / "000000.hidden.parquet"
    assert json.loads((directory / "000000.json").read_text()) == {
        "format_version": FORMAT_VERSION,
        "kind": "hidden",
        "manifest_sha256": reader.manifest_sha256,
        "lm_head_sha256": HEAD_SHA256,
        "hidden_size": HIDDEN_SIZE,
        "indexes": [3, 1],
        "num_positions": [reader[3].rows.num_positions, reader[1].rows.num_positions],
        "num_pairs": 0,
        "file": {
            "name": "000000.hidden.parquet",
            "num_bytes": path.stat().st_size,
            "sha256": content(directory)["000000.hidden.parquet"],
        },
    }
    answers = json.loads(only_file(log_answers(reader, log_dir, (0, [7])), "*.json").read_text())
    assert answers["lm_head_sha256"] is None
    assert (answers["kind"], answers["hidden_size"], answers["indexes"]) == ("logits", 0, [7])
    assert answers["num_pairs"] == len(expected_pairs(reader, 7, [0]))


def test_any_parquet_reader_opens_a_logged_file_one_sequence_a_row(reader, log_dir):
    hidden = pq.read_table(only_file(log_hidden(reader, log_dir, [3, 1])))
    assert hidden["sequence_id"].to_pylist() == [reader[index].sequence.sequence_id for index in (3, 1)]
    states = np.frombuffer(hidden.column(1)[1].as_py(), dtype=np.float32).reshape(-1, HIDDEN_SIZE)
    np.testing.assert_array_equal(states, states_of(reader, 1))
    (row,) = pq.read_table(only_file(log_answers(reader, log_dir, (0, [7])))).to_pylist()
    assert row["sequence_id"] == reader[7].sequence.sequence_id
    assert sum(row["counts"]) == len(row["token_ids"]) == len(row["logits"])


def test_a_write_that_fails_adds_nothing_and_the_next_one_does(reader, log_dir):
    writer = LookupWriter(log_dir, reader.manifest_sha256, HEAD_SHA256)

    def rows():
        yield row_of(reader, 1, states_of(reader, 1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write("hidden", rows())
    assert not list(writer.directory.iterdir())
    writer.write("hidden", [row_of(reader, 2, states_of(reader, 2))])
    writer.close()
    assert_holds_hidden(reader, LookupLog(reader, [log_dir]), [2])


def test_a_writer_that_wrote_nothing_leaves_no_directory(reader, log_dir):
    writer = LookupWriter(log_dir, reader.manifest_sha256)
    assert writer.directory.is_dir()
    writer.close()
    assert not list(log_dir.iterdir())


def test_the_logs_of_caches_that_share_a_directory_stay_apart(reader, tmp_path):
    other = cache_of(tmp_path / "other", seed=1)
    places = [lookups_dir(each, tmp_path / "logs") for each in (reader, other)]
    assert [place.name for place in places] == [each.manifest_sha256[:16] for each in (reader, other)]
    log_hidden(reader, places[0], [1])
    log_hidden(other, places[1], [2])
    assert_holds_hidden(reader, LookupLog(reader, places[:1]), [1])
    assert_holds_hidden(other, LookupLog(other, places[1:]), [2])


# Damage


def test_the_log_of_another_cache_is_refused(reader, log_dir, tmp_path):
    log_hidden(cache_of(tmp_path / "other", seed=1), log_dir, [1])
    with pytest.raises(CacheMismatchError, match="is of the lookup log of another cache"):
        LookupLog(reader, [log_dir])


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_no_flipped_bit_of_a_logged_file_changes_what_is_read(reader, log_dir, kind):
    """Some bits are read by nobody; every other one is an error that names the file."""
    write = log_hidden if kind == "hidden" else log_answers
    path = only_file(write(reader, log_dir, [3, 1] if kind == "hidden" else (0, [3, 1])))
    whole, caught = path.read_bytes(), 0
    num_bits = 8 * len(whole)
    for bit in np.random.default_rng(0).choice(num_bits, 150, replace=False).tolist():
        flip_bit(path, bit)
        log = LookupLog(reader, [log_dir])
        try:
            for index in (3, 1):
                if kind == "hidden":
                    np.testing.assert_array_equal(log.hidden_states(index), states_of(reader, index))
                else:
                    assert pairs_in(log.logits(index)) == expected_pairs(reader, index, [0])
        except CacheCorruptError as error:
            assert path.name in str(error)  # noqa: PT017
            caught += 1
        path.write_bytes(whole)
    assert caught > 50


DAMAGES = {
    "a file cut short": lambda file, receipt, text: file.write_bytes(file.read_bytes()[:-1]),
    "a file that is empty": lambda file, receipt, text: file.write_bytes(b""),
    "a file that is missing": lambda file, receipt, text: file.unlink(),
    "a file that is no Parquet": lambda file, receipt, text: file.write_bytes(bytes(file.stat().st_size)),
    "a receipt cut short": lambda file, receipt, text: receipt.write_text(text[:-9]),
    "a receipt that is empty": lambda file, receipt, text: receipt.write_text(""),
    "a receipt of a sequence too many": lambda file, receipt, text: receipt.write_text(
        text.replace('"indexes":[3,1]', '"indexes":[3,20]')
    ),
    "a receipt of another sequence": lambda file, receipt, text: receipt.write_text(
        text.replace('"indexes":[3,1]', '"indexes":[4,1]')
    ),
    "a receipt of another size": lambda file, receipt, text: receipt.write_text(
        text.replace('"hidden_size":5', '"hidden_size":6')
    ),
}


def read_all(reader, log_dir):
    log = LookupLog(reader, [log_dir])
    return [log.hidden_states(index) for index in range(len(reader))]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_an_error_that_names_the_file(reader, log_dir, damage):
    directory = log_hidden(reader, log_dir, [3, 1])
    receipt = only_file(directory, "*.json")
    # Without blanks, whatever the layout: what is replaced must be there.
    text = json.dumps(json.loads(receipt.read_text()), separators=(",", ":"))
    receipt.write_text(text)
    assert_holds_hidden(reader, LookupLog(reader, [log_dir]), [1, 3])
    damage(only_file(directory), receipt, text)
    with pytest.raises(
        CacheCorruptError, match=r"000000\..* is (damaged|no receipt that this release can use).*Delete"
    ):
        read_all(reader, log_dir)


def test_two_logged_files_that_changed_places_are_refused(reader, log_dir):
    # As many positions, so that the files have the same size.
    by_size = {}
    for index in range(len(reader)):
        by_size.setdefault(reader[index].rows.num_positions, []).append(index)
    first, second = next(indexes for indexes in by_size.values() if len(indexes) > 1)[:2]
    directory = log_hidden(reader, log_dir, [first], [second])
    paths = [directory / "000000.hidden.parquet", directory / "000001.hidden.parquet"]
    contents = [path.read_bytes() for path in paths]
    assert len(contents[0]) == len(contents[1])
    for path, changed in zip(paths, reversed(contents), strict=True):
        path.write_bytes(changed)
    with pytest.raises(CacheCorruptError, match="belongs to another sequence"):
        LookupLog(reader, [log_dir]).hidden_states(first)


# Compaction


def test_a_compaction_keeps_every_sequence_once_and_changes_no_answer(reader, log_dir):
    log_hidden(reader, log_dir, [3, 1], [5], [8, 9])
    log_hidden(reader, log_dir, [1, 2, 5])
    log_answers(reader, log_dir, (0, [2, 5]), (1, [5]))
    log_answers(reader, log_dir, (0, [5]), (3, [7]))
    before = LookupLog(reader, [log_dir])
    answers = {index: pairs_in(before.logits(index)) for index in (2, 5, 7)}
    num_bytes = sum(path.stat().st_size for path in log_dir.rglob("*.parquet"))

    folded = compact(reader, log_dir)

    log = LookupLog(reader, [log_dir])
    assert_holds_hidden(reader, log, [1, 2, 3, 5, 8, 9])
    assert {index: pairs_in(log.logits(index)) for index in (2, 5, 7)} == answers
    assert sorted((r.kind, r.indexes) for r in log.files().values()) == [
        ("hidden", (1, 2, 3, 5, 8, 9)), ("logits", (2, 5, 7)),
    ]  # fmt: skip
    assert {r.lm_head_sha256 for r in log.files().values() if r.kind == "hidden"} == {HEAD_SHA256}
    assert (folded.files_before, folded.files_after, folded.duplicates) == (8, 2, 2 + 2)
    assert folded.bytes_before == num_bytes
    assert folded.bytes_after == sum(path.stat().st_size for path in log_dir.rglob("*.parquet")) < num_bytes
    assert len(list(log_dir.iterdir())) == 2  # a directory a kind; the writers' own are gone


def test_a_second_compaction_changes_nothing(reader, log_dir):
    log_hidden(reader, log_dir, *([index, index + 1] for index in range(0, 18, 2)), [18, 5])
    log_answers(reader, log_dir, (0, [3]), (1, [3]))
    for sequences_per_file in (6, 6, 512):
        compact(reader, log_dir, sequences_per_file=sequences_per_file)
        before = content(log_dir)
        again = compact(reader, log_dir, sequences_per_file=sequences_per_file)
        assert content(log_dir) == before
        assert (again.files_before, again.duplicates) == (again.files_after, 0)
        assert_holds_hidden(reader, LookupLog(reader, [log_dir]), range(19))


def test_full_files_are_left_alone_unless_another_repeats_their_sequences(reader, log_dir):
    full = only_file(log_hidden(reader, log_dir, [0, 1, 2]))
    log_hidden(reader, log_dir, [3], [4], [5, 6])
    compact(reader, log_dir, sequences_per_file=3)
    assert full.exists()
    assert sorted(r.indexes for r in LookupLog(reader, [log_dir]).files().values()) == [(0, 1, 2), (3, 4, 5), (6,)]
    log_hidden(reader, log_dir, [1])
    folded = compact(reader, log_dir, sequences_per_file=3)
    assert not full.exists()
    assert folded.duplicates == 1
    assert_holds_hidden(reader, LookupLog(reader, [log_dir]), range(7))


@pytest.mark.parametrize("opened", [True, False], ids=["with its files open", "with its files closed"])
def test_a_log_that_was_opened_before_a_compaction_reads_on(reader, log_dir, opened):
    log_hidden(reader, log_dir, [3], [1], [5])
    log_answers(reader, log_dir, (0, [5]), (1, [5]))
    log = LookupLog(reader, [log_dir])
    if opened:
        assert_holds_hidden(reader, log, [1, 3, 5])
    log_hidden(reader, log_dir, [7])
    compact(reader, log_dir)
    assert pairs_in(log.logits(5)) == expected_pairs(reader, 5, [0, 1])
    log.refresh()
    assert_holds_hidden(reader, log, [1, 3, 5, 7])
    assert {path.exists() for path in log.files()} == {True}


def test_a_log_that_is_opened_during_a_compaction_misses_nothing(reader, log_dir, monkeypatch):
    """The names of the writers' directories are read before the compaction, what is in them after it."""
    log_hidden(reader, log_dir, [3], [1])
    log_answers(reader, log_dir, (0, [5]), (1, [5]))
    iterdir, raced = Path.iterdir, []

    def slow_iterdir(path):
        entries = list(iterdir(path))
        if path == log_dir and not raced:
            raced.append(path)
            compact(reader, log_dir)
        return iter(entries)

    monkeypatch.setattr(Path, "iterdir", slow_iterdir)
    log = LookupLog(reader, [log_dir])
    assert raced
    assert_holds_hidden(reader, log, [1, 3])
    assert pairs_in(log.logits(5)) == expected_pairs(reader, 5, [0, 1])


@pytest.mark.parametrize("instant", ["before anything is deleted", "after the receipts are", "before the sweep"])
def test_a_compaction_that_dies_loses_nothing_and_the_next_one_ends_it(reader, log_dir, monkeypatch, instant):
    log_hidden(reader, log_dir, [3, 1], [5], [1, 5])
    log_answers(reader, log_dir, (0, [5]), (1, [5]))

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if instant == "before anything is deleted":
            patched.setattr(compaction, "_delete", die)
        elif instant == "after the receipts are":
            patched.setattr(compaction, "flush", die)
        else:
            patched.setattr(compaction, "_sweep", die)
        with pytest.raises(KeyboardInterrupt):
            compact(reader, log_dir)
    log = LookupLog(reader, [log_dir])
    assert_holds_hidden(reader, log, [1, 3, 5])
    assert pairs_in(log.logits(5)) == expected_pairs(reader, 5, [0, 1])
    compact(reader, log_dir)
    assert_is_clean(log_dir)
    log = LookupLog(reader, [log_dir])
    assert len(log.files()) == 2
    assert_holds_hidden(reader, log, [1, 3, 5])
    assert pairs_in(log.logits(5)) == expected_pairs(reader, 5, [0, 1])


def assert_is_clean(log_dir):
    """Files with their receipts, in directories that hold some, and nothing else."""
    for directory in log_dir.iterdir():
        names = {path.name for path in directory.iterdir()}
        numbers = {name.split(".")[0] for name in names}
        assert names
        assert len(names) == 2 * len(numbers)
        assert {f"{number}.json" for number in numbers} < names
        assert len({name for name in names if name.endswith(".parquet")}) == len(numbers)


def test_a_compaction_removes_what_killed_writers_left_and_nothing_of_living_ones(reader, log_dir):
    dead = log_hidden(reader, log_dir, [3], [1])
    (dead / "000001.json").unlink()  # killed before the receipt
    (dead / ".000002.hidden.parquet.0123abcd.tmp").write_bytes(b"half")
    (dead / "lm_head.safetensors").write_bytes(b"whole")  # killed before it was moved to its place
    emptied = log_dir / f"{machine_mark()}456789abcdef"
    emptied.mkdir()
    living = LookupWriter(log_dir, reader.manifest_sha256, HEAD_SHA256)
    being_written = living.directory / ".000000.hidden.parquet.4567cdef.tmp"
    being_written.write_bytes(b"half")
    without_receipt = living.directory / "000007.hidden.parquet"
    without_receipt.write_bytes(b"whole")
    compact(reader, log_dir)
    assert sorted(path.name for path in dead.iterdir()) == ["000000.hidden.parquet", "000000.json"]
    assert not emptied.exists()
    assert being_written.exists()
    assert without_receipt.exists()
    living.write("hidden", [row_of(reader, 2, states_of(reader, 2))])
    living.close()
    assert_holds_hidden(reader, LookupLog(reader, [log_dir]), [2, 3])


def test_hidden_states_of_two_heads_are_not_folded_together(reader, log_dir):
    log_hidden(reader, log_dir, [3])
    other = LookupWriter(log_dir, reader.manifest_sha256, "e" * 64)
    other.write("hidden", [row_of(reader, 2, states_of(reader, 2))])
    other.close()
    before = content(log_dir)
    with pytest.raises(CacheCorruptError, match="another LM head than most"):
        compact(reader, log_dir)
    assert content(log_dir) == before


def test_what_another_machine_s_writer_left_is_removed_after_a_day(reader, log_dir):
    """Its lock need not show on this machine, so that it may be alive."""
    log_hidden(reader, log_dir, [3])
    elsewhere = log_dir / f"{int(machine_mark(), 16) ^ 1:04x}456789abcdef"
    elsewhere.mkdir()
    (elsewhere / "000000.hidden.parquet").write_bytes(b"whole")
    compact(reader, log_dir)
    assert (elsewhere / "000000.hidden.parquet").exists()
    yesterday = time.time() - 25 * 60 * 60
    os.utime(elsewhere, (yesterday, yesterday))
    compact(reader, log_dir)
    assert not elsewhere.exists()


def test_a_compaction_folds_the_files_of_a_writer_that_writes_on(reader, log_dir):
    writer = LookupWriter(log_dir, reader.manifest_sha256, HEAD_SHA256)
    for index in range(4):
        writer.write("hidden", [row_of(reader, index, states_of(reader, index))])
        compact(reader, log_dir)
        assert_holds_hidden(reader, LookupLog(reader, [log_dir]), range(index + 1))
    writer.close()
    assert len(LookupLog(reader, [log_dir]).files()) == 1
    assert_is_clean(log_dir)


def test_two_compactions_do_not_work_at_once(reader, log_dir):
    log_hidden(reader, log_dir, [3], [1])
    with pytest.raises(StorageError, match="being written by another process"):
        compact(reader, log_dir, progress=lambda done, total: compact(reader, log_dir) and None)
    assert_holds_hidden(reader, LookupLog(reader, [log_dir]), [1, 3])


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_a_compaction_of_a_damaged_log_deletes_nothing(reader, log_dir, kind):
    hidden, answers = log_hidden(reader, log_dir, [3], [1]), log_answers(reader, log_dir, (0, [3]), (1, [3]))
    whole = set(content(log_dir))
    damaged = (hidden if kind == "hidden" else answers) / f"000001.{kind}.parquet"
    flip_bit(damaged, 8 * 100 + 3)
    with pytest.raises(CacheCorruptError, match=f"000001.{kind}.parquet is damaged"):
        compact(reader, log_dir)
    kept = set(content(log_dir))
    if kind == "hidden":
        assert whole <= kept
    assert {name for name in whole if f".{kind}." in name} <= kept


# Many processes


def test_many_processes_write_read_and_compact_one_log_and_lose_nothing(tmp_path):
    """Writers publish and read, compactions fold, and now and then one of either is killed without warning."""
    reader = cache_of(tmp_path / "cache", num_sequences=40)
    log_dir, stop = tmp_path / "lookups", tmp_path / "stop"
    roles = ["writer", "writer too", "compactor"]
    living = {role: start(role, reader, log_dir, stop, seed) for seed, role in enumerate(roles)}
    try:
        for seed in range(3, 8):
            role = roles[seed % len(roles)]
            process, output = living[role]
            while output.read_text().count("\n") < 7 * seed:
                assert process.poll() is None, output.with_suffix(".err").read_text()
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            living[role] = start(role, reader, log_dir, stop, seed)
        stop.touch()
        for process, output in living.values():
            assert process.wait() == 0, output.with_suffix(".err").read_text()
    finally:
        for process, _ in living.values():
            process.kill()
            process.wait()

    # A killed one's last line may be half.
    said = [line.split() for output in tmp_path.glob("*.out") for line in output.read_text().split("\n")[:-1]]
    published = [(kind, *map(int, numbers)) for kind, *numbers in said if kind != "compacted"]
    assert {kind for kind, *_ in published} == {"hidden", "logits"}
    for _ in range(2):
        log = LookupLog(reader, [log_dir])
        for index in {index for kind, *indexes in published if kind == "hidden" for index in indexes}:
            np.testing.assert_array_equal(log.hidden_states(index), states_of(reader, index))
        for index in range(len(reader)):
            numbers = {number for kind, number, *indexes in published if kind == "logits" and index in indexes}
            answered = pairs_in(log.logits(index)) if log.logits(index) else {}
            assert expected_pairs(reader, index, numbers).items() <= answered.items()
            assert answered.items() <= expected_pairs(reader, index, range(ROUNDS)).items()
        compact(reader, log_dir)
        assert_is_clean(log_dir)
    assert len(LookupLog(reader, [log_dir]).files()) == 2


def start(role, reader, log_dir, stop, seed):
    """A process, and the file it speaks to."""
    output = stop.with_name(f"{seed}.out")
    arguments = [sys.executable, "-m", "tests.log_process", role.split()[0], reader.cache_dir, log_dir, stop, seed]
    with output.open("w") as out, output.with_suffix(".err").open("w") as err:
        process = subprocess.Popen([*map(str, arguments)], cwd=Path(__file__).parents[1], stdout=out, stderr=err)
    return process, output


def test_receipts_whose_numbers_cannot_be_are_refused(reader, log_dir):
    directory = log_hidden(reader, log_dir, [3, 1])
    receipt = only_file(directory, "*.json")
    whole = json.loads(receipt.read_text())
    for key, value in (
        ("num_positions", whole["num_positions"][:1]),
        ("indexes", whole["indexes"][:1]),
        ("num_positions", [0, 1]),
        ("hidden_size", -1),
        ("num_pairs", -5),
        ("lm_head_sha256", None),
        ("format_version", 2),
    ):
        receipt.write_text(json.dumps({**whole, key: value}))
        with pytest.raises(CacheCorruptError, match="is no receipt that this release can use"):
            LookupLog(reader, [log_dir])
    receipt.write_text(json.dumps({**whole, "num_positions": [number + 1 for number in whole["num_positions"]]}))
    with pytest.raises(CacheCorruptError, match="positions, not"):
        read_all(reader, log_dir)


def test_what_is_no_writer_s_directory_is_left_alone(reader, log_dir):
    log_hidden(reader, log_dir, [3], [1])
    (log_dir / "backup").mkdir()
    for name in ("mine.parquet", "mine.json"):
        (log_dir / "backup" / name).write_text("not yours")
    compact(reader, log_dir)
    assert sorted(path.name for path in (log_dir / "backup").iterdir()) == ["mine.json", "mine.parquet"]
    assert_holds_hidden(reader, LookupLog(reader, [log_dir]), [1, 3])


def test_a_directory_with_a_colon_in_its_name_is_written_and_read(reader, tmp_path, monkeypatch):
    """pyarrow takes such a relative path for a URI."""
    monkeypatch.chdir(tmp_path)
    log_dir = Path("run:1")
    log_hidden(reader, log_dir, [3], [1])
    compact(reader, log_dir)
    assert_holds_hidden(reader, LookupLog(reader, [log_dir]), [1, 3])
