"""Shards: what goes in comes out, what the format does not allow stays out, and a shard that fails was never there."""

import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_schema import (
    CacheReader,
    SequenceNotFoundError,
    StorageError,
    TokenSequence,
)
from cache_schema.encoding import from_steps, to_steps
from cache_schema.storage import discard_leftovers
from tests.caches import content, make_plan, make_scored, make_scoreds, with_rows, write_cache, write_shard

REPOSITORY = Path(__file__).parents[1]
ROW_FIELDS = ("token_ids", "logits", "tail_logsumexp", "label_logit", "row_mean", "row_std")


def assert_read_back(read, written, plan):
    assert read.sequence.sequence_id == written.sequence.sequence_id
    assert read.sequence.source == written.sequence.source
    assert read.sequence.input_ids.dtype == np.int32
    np.testing.assert_array_equal(read.sequence.input_ids, written.sequence.input_ids)
    np.testing.assert_array_equal(read.sequence.loss_mask, written.sequence.loss_mask)
    for name in ROW_FIELDS:
        got, expected = getattr(read.rows, name), getattr(written.rows, name)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        if name == "logits" and plan.logit_step:
            # The product of step and count rounds to float32.
            rounding = np.finfo(np.float32).eps * np.abs(expected).astype(np.float64)
            error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
            assert (error <= plan.logit_step / 2 + rounding).all()
            assert (np.diff(got, axis=1) <= 0).all()
        else:
            assert got.tobytes() == expected.tobytes(), name


@st.composite
def plans(draw):
    vocab_size = draw(st.integers(2, 40))
    return make_plan(
        vocab_size=vocab_size,
        top_k=draw(st.sampled_from([1, vocab_size, draw(st.integers(1, vocab_size))])),
        logit_step=draw(st.sampled_from([0.0, 1 / 64, 0.01, 0.5])),
        temperatures=tuple(draw(st.lists(st.floats(1, 3), min_size=1, max_size=3))),
        hidden_dtype=draw(st.sampled_from(["float32", "float16", "bfloat16", None])),
        hidden_size=draw(st.integers(1, 5)),
        positions=draw(st.sampled_from(["response", "all"])),
        num_sequences=draw(st.integers(1, 40)),
        sequences_per_shard=draw(st.integers(1, 40)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    plan=plans(),
    lengths=st.lists(st.sampled_from([2, 2, 3, 9, 70]), min_size=1, max_size=40),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read_back_in_any_order(tmp_path_factory, plan, lengths, seed):
    rng = np.random.default_rng(seed)
    written = [make_scored(plan, rng, lengths[index % len(lengths)]) for index in range(plan.num_sequences)]
    reader = CacheReader(write_cache(tmp_path_factory.mktemp("caches") / "cache", plan, written))
    assert len(reader) == len(written)
    for index in rng.permutation(len(written)).tolist():
        assert_read_back(reader[index], written[index], plan)
        assert reader.index_of(written[index].sequence.sequence_id) in range(len(written))
        if plan.hidden_states:
            states = reader.hidden_states(index)
            assert states.dtype == written[index].hidden_states.dtype
            assert states.shape == written[index].hidden_states.shape
            assert states.tobytes() == written[index].hidden_states.tobytes()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    plan = make_plan(num_sequences=50, sequences_per_shard=20)
    written = make_scoreds(plan)
    return write_cache(tmp_path_factory.mktemp("caches") / "cache", plan, written), plan, written


def with_odd_logits(scored, odd):
    """Return the sequence with these logits at every position; a label outside the top k has the last."""
    labels = scored.sequence.input_ids[scored.sequence.target_rows("response") + 1]
    places = scored.rows.token_ids == labels[:, None]
    label_logit = np.where(places.any(axis=1), odd[places.argmax(axis=1)], odd[-1])
    return with_rows(scored, logits=np.tile(odd, (len(labels), 1)), label_logit=label_logit)


def test_what_is_written_is_read_back_bit_for_bit_where_the_plan_has_no_step(tmp_path):
    plan = make_plan(logit_step=0.0)
    # Any float32 that is finite, denormal numbers and both zeros among them.
    odd = np.array([3.4e38, 1.5, 1e-45, 0.0, -0.0, -1e-45, -1 / 3, -3.4e38], np.float32)
    written = [with_odd_logits(scored, odd) for scored in make_scoreds(plan)]
    reader = CacheReader(write_cache(tmp_path / "cache", plan, written))
    for read, scored in zip(reader, written, strict=True):
        assert read.rows.logits.tobytes() == scored.rows.logits.tobytes()


def test_an_empty_tail_is_minus_infinity_and_stays_so(tmp_path):
    plan = make_plan(vocab_size=6, top_k=6)
    reader = CacheReader(write_cache(tmp_path / "cache", plan, make_scoreds(plan)))
    assert (reader[0].rows.tail_logsumexp == -np.inf).all()


def test_negative_indexes_and_slices_are_those_of_a_list(cache):
    directory, plan, written = cache
    reader = CacheReader(directory)
    assert_read_back(reader[-1], written[-1], plan)
    assert_read_back(reader[-50], written[0], plan)
    for part in (slice(None), slice(18, 23), slice(None, None, -7), slice(-3, 99), slice(5, 5)):
        assert len(reader[part]) == len(written[part])
        for read, scored in zip(reader[part], written[part], strict=True):
            assert_read_back(read, scored, plan)


@pytest.mark.parametrize("index", [50, -51, 10**12])
def test_an_index_outside_the_cache_is_an_index_error(cache, index):
    with pytest.raises(IndexError, match=f"sequence {index} of 50"):
        CacheReader(cache[0])[index]


def test_a_sequence_is_found_by_its_id_whatever_shard_it_is_in(cache):
    directory, _, written = cache
    reader = CacheReader(directory)
    found = [reader.index_of(scored.sequence.sequence_id) for scored in written]
    assert found == list(range(50))


@pytest.mark.parametrize("sequence_id", [b"\0" * 16, b"\xff" * 16, b"", b"short"])
def test_an_unknown_sequence_names_the_likely_cause(cache, sequence_id):
    with pytest.raises(SequenceNotFoundError, match=r"\(50 sequences\): it was tokenized differently, or never dumped"):
        CacheReader(cache[0]).index_of(sequence_id)


def test_equal_tokens_with_another_mask_are_another_sequence():
    ids = np.arange(9, dtype=np.int32)
    masks = [np.arange(9) == last for last in range(1, 9)]
    assert len({TokenSequence(ids, mask, "rows").sequence_id for mask in masks}) == 8
    assert TokenSequence(ids, masks[0], "a").sequence_id == TokenSequence(ids, masks[0], "b").sequence_id


def test_the_id_of_a_sequence_is_the_same_on_every_machine():
    sequence = TokenSequence(np.array([1, 2, 3], np.int32), np.array([False, False, True]), "rows")
    # blake2b(01000000 02000000 03000000 20, 16 bytes): little-endian ids, then the mask from the highest bit down
    assert sequence.sequence_id.hex() == "56d4cd99dce6c4e8ef5f08bb38d70460"


def test_steps_round_to_the_nearest_and_come_back():
    logits = np.array([[1.0, 0.76, 0.74, -0.26], [0.1, 0.1, 0.1, 0.1]], np.float32)
    top, drops = to_steps(logits, 0.5)
    assert top.tolist() == [2, 0]
    assert drops.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert from_steps(top, drops, 0.5).tolist() == [[1.0, 1.0, 0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]


def test_hidden_states_may_be_deleted_later(tmp_path):
    plan = make_plan()
    directory = write_cache(tmp_path / "cache", plan, make_scoreds(plan))
    assert CacheReader(directory).has_hidden_states
    (directory / "shard-00001.hidden.parquet").unlink()
    reader = CacheReader(directory)
    assert not reader.has_hidden_states
    assert len(list(reader)) == 7


# --- the same bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit_step", [0.0, 1 / 64])
def test_the_same_sequences_give_the_same_bytes(tmp_path, logit_step):
    plan = make_plan(num_sequences=40, sequences_per_shard=40, logit_step=logit_step)
    for name in ("one", "two"):
        write_shard(tmp_path / name, plan, 0, make_scoreds(plan))
    assert sorted(content(tmp_path / "one")) == [
        "shard-00000.hidden.parquet",
        "shard-00000.json",
        "shard-00000.parquet",
    ]
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_shard_says_nothing_of_where_or_when_it_was_written(tmp_path):
    plan = make_plan()
    write_shard(tmp_path / "a-telling-name", plan, 0, make_scoreds(plan)[:4])
    for path in (tmp_path / "a-telling-name").iterdir():
        assert b"telling" not in path.read_bytes()


# --- what the writer refuses --------------------------------------------------------------------------------------


def first(array, value):
    changed = array.copy()
    changed.flat[0] = value
    return changed


def last(array, value):
    changed = array.copy()
    changed.flat[-1] = value
    return changed


def without_targets(scored):
    sequence = scored.sequence
    return dataclasses.replace(
        scored, sequence=TokenSequence(sequence.input_ids, np.zeros_like(sequence.loss_mask), sequence.source)
    )


def with_more_targets(scored):
    sequence = scored.sequence
    mask = np.ones_like(sequence.loss_mask)
    mask[0] = False
    return dataclasses.replace(scored, sequence=TokenSequence(sequence.input_ids, mask, sequence.source))


def with_hidden(scored, change):
    return dataclasses.replace(scored, hidden_states=change(scored.hidden_states))


def with_input_id(scored, value):
    sequence = scored.sequence
    return dataclasses.replace(
        scored, sequence=TokenSequence(first(sequence.input_ids, value), sequence.loss_mask, sequence.source)
    )


REFUSED = {
    "too few targets": (with_more_targets, "the plan and the mask say"),
    "too many targets": (
        lambda s: with_rows(s, **{name: np.concatenate([getattr(s.rows, name)] * 2) for name in ROW_FIELDS}),
        "the plan and the mask say",
    ),
    "no targets": (without_targets, "has no target position"),
    "another k": (lambda s: with_rows(s, logits=s.rows.logits[:, :-1]), "logits is .* the plan and the mask say"),
    "another number of temperatures": (
        lambda s: with_rows(s, tail_logsumexp=s.rows.tail_logsumexp[:, :1]),
        "tail_logsumexp is .* the plan and the mask say",
    ),
    "increasing logits": (lambda s: with_rows(s, logits=s.rows.logits[:, ::-1]), "logits increase"),
    "a last logit above": (lambda s: with_rows(s, logits=last(s.rows.logits, 99.0)), "logits increase"),
    "id = V": (lambda s: with_rows(s, token_ids=first(s.rows.token_ids, 97)), "token_ids holds 97, outside"),
    "negative id": (lambda s: with_rows(s, token_ids=first(s.rows.token_ids, -1)), "token_ids holds -1, outside"),
    "an id twice": (lambda s: with_rows(s, token_ids=first(s.rows.token_ids, s.rows.token_ids[0, 1])), "stands twice"),
    "a label's own logit": (
        lambda s: with_rows(s, label_logit=first(s.rows.label_logit, 99.0)),
        "a label's logit differs|a label outside the top k has a logit above it",
    ),
    "input id = V": (lambda s: with_input_id(s, 97), "input_ids holds 97, outside the vocabulary of 97"),
    "negative input id": (lambda s: with_input_id(s, -1), "input_ids holds -1, outside"),
    "too large for the steps": (lambda s: with_rows(s, logits=first(s.rows.logits, 1e9)), "store float32"),
    "no hidden states": (lambda s: with_hidden(s, lambda _: None), r"hidden_states must be \(.*, 4\) in bfloat16"),
    "hidden width": (lambda s: with_hidden(s, lambda h: h[:, :-1]), "hidden_states must be"),
    "hidden rows": (lambda s: with_hidden(s, lambda h: h[:-1]), "hidden_states must be"),
    "hidden dtype": (lambda s: with_hidden(s, lambda h: h.astype(np.float32)), "hidden_states must be"),
    "hidden NaN": (lambda s: with_hidden(s, lambda h: first(h, 0x7FC0)), "hidden_states is not finite"),
    "hidden infinity": (lambda s: with_hidden(s, lambda h: first(h, 0xFF80)), "hidden_states is not finite"),
}
for field in ("logits", "tail_logsumexp", "label_logit", "row_mean", "row_std"):
    for value in (np.nan, np.inf, -np.inf):
        REFUSED[f"{field} {value}"] = (
            lambda s, field=field, value=value: with_rows(s, **{field: last(getattr(s.rows, field), value)}),
            f"{field} is not finite",
        )


@pytest.mark.parametrize("kind", REFUSED)
def test_the_writer_refuses_what_a_reader_could_not_trust(tmp_path, kind):
    spoil, said = REFUSED[kind]
    plan = make_plan(num_sequences=2, sequences_per_shard=2)
    good, bad = make_scored(plan, np.random.default_rng(0), 12), make_scored(plan, np.random.default_rng(1), 12)
    with pytest.raises(ValueError, match=said):
        write_shard(tmp_path, plan, 0, [good, spoil(bad)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_empty_tail_is_minus_infinity_or_refused(tmp_path, value):
    plan = make_plan(vocab_size=6, top_k=6, num_sequences=1)
    scored = make_scored(plan, np.random.default_rng(0))
    with pytest.raises(ValueError, match="tail_logsumexp is not finite"):
        write_shard(tmp_path, plan, 0, [with_rows(scored, tail_logsumexp=last(scored.rows.tail_logsumexp, value))])


def test_hidden_states_the_plan_does_not_keep_are_refused(tmp_path):
    plan = make_plan(hidden_dtype=None)
    scored = make_scored(make_plan(), np.random.default_rng(0))
    with pytest.raises(ValueError, match="has hidden states, the plan keeps none"):
        write_shard(tmp_path, plan, 0, [scored])


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_shard_holds_the_plans_number_of_sequences(tmp_path, count):
    plan = make_plan()
    with pytest.raises(ValueError, match=f"shard 0 got {count} sequences, the plan says 4"):
        write_shard(tmp_path, plan, 0, make_scoreds(plan)[:count])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        ([1], [False], "needs two at least"),
        ([], [], "needs two at least"),
        ([1, 2], [True, True], "nothing predicts the first token"),
        ([1, 2], [False], r"must both be \[num_tokens\]"),
        ([[1, 2]], [[False, True]], r"must both be \[num_tokens\]"),
    ],
)
def test_a_sequence_without_a_possible_target_is_refused(ids, mask, said):
    with pytest.raises(ValueError, match=said):
        TokenSequence(np.array(ids, np.int32), np.array(mask, bool), "rows")


# --- a failed shard -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [RuntimeError("CUDA out of memory"), KeyboardInterrupt(), OSError(5, "teacher gone")]
)
def test_a_failed_shard_leaves_nothing_behind(tmp_path, failure):
    plan = make_plan(num_sequences=40, sequences_per_shard=40)

    def teach():
        yield from make_scoreds(plan)[:20]
        raise failure

    with pytest.raises(type(failure)) as caught:
        write_shard(tmp_path, plan, 0, teach())
    assert caught.value is failure
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["shard-00000.parquet", "shard-00000.hidden.parquet", "shard-00000.json"])
def test_a_shard_whose_files_cannot_all_be_published_has_no_receipt(tmp_path, name):
    plan = make_plan()
    (tmp_path / name / "in-the-way").mkdir(parents=True)  # no file can be renamed onto a directory
    with pytest.raises(StorageError, match=f"{name} cannot be written"):
        write_shard(tmp_path, plan, 0, make_scoreds(plan)[:4])
    assert not (tmp_path / "shard-00000.json").is_file()
    assert list(tmp_path.glob(".*")) == []
    for published in tmp_path.glob("*.parquet"):
        if published.is_file():
            assert pq.read_table(published).num_rows == 4


WRITE_SHARD = """
import sys, time
from pathlib import Path
from cache_schema import ShardWriter, StorageError
from tests.caches import make_plan, make_scoreds
plan = make_plan(num_sequences=40, sequences_per_shard=40, hidden_size=int(sys.argv[2]))
"""

FULL_DISK = (
    WRITE_SHARD
    + """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
scoreds = make_scoreds(plan)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    with ShardWriter(Path(sys.argv[1]), plan, 0) as writer:
        for scored in scoreds:
            writer.append(scored)
except StorageError as error:
    print(error)
"""
)

PAUSED = (
    WRITE_SHARD
    + """
with ShardWriter(Path(sys.argv[1]), plan, 0) as writer:
    for scored in make_scoreds(plan)[:35]:
        writer.append(scored)
    print("writing", flush=True)
    time.sleep(600)
"""
)


@pytest.mark.parametrize(("name", "hidden_size"), [("shard-00000.parquet", 1), ("shard-00000.hidden.parquet", 256)])
@pytest.mark.parametrize("cut", ["in the first row group", "in the middle", "in the footer"])
def test_a_full_disk_is_a_storage_error_that_names_the_file_and_leaves_nothing(tmp_path, name, hidden_size, cut):
    plan = make_plan(num_sequences=40, sequences_per_shard=40, hidden_size=hidden_size)
    write_shard(tmp_path / "whole", plan, 0, make_scoreds(plan))
    size = (tmp_path / "whole" / name).stat().st_size
    assert size == max(path.stat().st_size for path in (tmp_path / "whole").iterdir())  # the first to meet the limit
    limit = {"in the first row group": 100, "in the middle": size // 2, "in the footer": size - 1}[cut]
    if cut == "in the first row group":
        name = "shard-"  # whichever is flushed first
    full = tmp_path / "full"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(full), str(hidden_size), str(limit)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"{full / name}" in done.stdout
    assert "cannot be written: " in done.stdout
    assert "File too large" in done.stdout
    assert "free space or fix the permissions and run the same command again" in done.stdout
    assert list(full.iterdir()) == []


def test_a_killed_writer_leaves_no_shard_and_the_next_one_writes_the_same_bytes(tmp_path):
    plan = make_plan(num_sequences=40, sequences_per_shard=40)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [sys.executable, "-c", PAUSED, str(killed), "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = sorted(content(killed))
    assert [re.sub(r"[0-9a-f]{8}", "HEX", name) for name in left] == [
        ".shard-00000.hidden.parquet.HEX.tmp",
        ".shard-00000.parquet.HEX.tmp",
    ]
    for name in ("shard-00000.parquet", "shard-00000.hidden.parquet"):
        discard_leftovers(killed / name)
    for directory in (killed, undisturbed):
        write_shard(directory, plan, 0, make_scoreds(plan))
    assert content(killed) == content(undisturbed)
