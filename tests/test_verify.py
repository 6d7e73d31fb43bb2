"""Damage on purpose: every kind is found, names its file, and never comes out of a reader as a number."""

import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest

from cache_schema import CacheCorruptError, CacheIncompleteError, CacheReader, verify
from cache_schema.invariants import fault_in_rows
from tests.caches import (
    flip_bit,
    make_plan,
    make_scored,
    make_scoreds,
    rewrite_column,
    rewrite_table,
    with_rows,
    write_cache,
)

PLAN = make_plan(num_sequences=40, sequences_per_shard=20)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("caches") / "cache", PLAN, make_scoreds(PLAN))


@pytest.fixture
def cache(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "cache")


def damages(cache_dir):
    return {damage.file: damage.reason for damage in verify(cache_dir).errors}


def everything(cache_dir):
    """Return all a reader gives out, as bytes."""
    reader = CacheReader(cache_dir)
    numbers = []
    for index in range(len(reader)):
        scored = reader[index]
        numbers += [scored.sequence.sequence_id, scored.sequence.source.encode(), reader.hidden_states(index).tobytes()]
        numbers += [array.tobytes() for array in vars(scored.rows).values()]
    return numbers


def swap(one, other):
    one_bytes, other_bytes = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_bytes)
    other.write_bytes(one_bytes)


def test_a_whole_cache_is_ok_and_every_byte_was_hashed(cache):
    calls = []
    report = verify(cache, lambda done, total: calls.append((done, total)))
    assert report.ok
    assert report.errors == []
    hashed = [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith(("plan", "manifest"))]
    expected = sum(path.stat().st_size for path in hashed if not path.match("shard-*.json"))
    assert report.checked_bytes == expected
    # Once for their hashes; those of the shards again, row by row, for what they hold.
    total = expected + sum(path.stat().st_size for path in cache.glob("shard-*.parquet"))
    assert {of for _, of in calls} == {total}
    assert calls == sorted(calls)
    assert [done for done, _ in calls].index(total) >= len(calls) - 2
    assert len([done for done, _ in calls if expected < done <= total]) >= PLAN.num_sequences


def test_without_a_manifest_there_is_nothing_to_verify(cache):
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheIncompleteError):
        verify(cache)


@pytest.mark.parametrize("name", ["shard-00001.parquet", "shard-00001.hidden.parquet"])
@pytest.mark.parametrize("where", ["anywhere", "in the footer"])
def test_a_flipped_bit_is_found_and_never_read_as_a_number(pristine, cache, name, where):
    whole = (pristine / name).read_bytes()
    expected = everything(pristine)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    rng = random.Random(0)
    refusals = []
    for _ in range(100):
        bit = rng.randrange(8 * (footer if where == "in the footer" else 0), 8 * len(whole))
        (cache / name).write_bytes(whole)
        flip_bit(cache / name, bit)
        try:
            # Bits that no number depends on (statistics, the name of the writing program) may go unseen here.
            assert everything(cache) == expected, f"bit {bit}"
        except CacheCorruptError as error:
            refusals.append(str(error))
        assert list(damages(cache)) == [name], f"bit {bit}"
    assert len(refusals) > 50
    assert all(refusal.startswith(f"{cache / name} is damaged: ") for refusal in refusals)


@pytest.mark.parametrize("name", ["lm_head.safetensors", "tokenizer/tokenizer.json", "plan.json", "shard-00000.json"])
def test_a_flipped_bit_in_any_other_file_is_found(cache, name):
    flip_bit(cache / name, 8 * 12)
    assert list(damages(cache)) == [name]


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_the_manifest_is_found_or_changes_nothing(pristine, cache, seed):
    path = cache / "manifest.json"
    whole = path.read_bytes()
    flip_bit(path, random.Random(seed).randrange(8 * len(whole)))
    try:
        same = json.loads(path.read_bytes()) == json.loads(whole)
    except ValueError:
        same = False
    assert verify(cache).ok == same
    try:
        assert everything(cache) == everything(pristine)
    except CacheCorruptError:
        assert not same


@pytest.mark.parametrize("name", ["shard-00000.parquet", "shard-00001.hidden.parquet", "lm_head.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_found(cache, name, kept):
    whole = (cache / name).read_bytes()
    (cache / name).write_bytes(whole[: int(kept * len(whole))])
    found = damages(cache)
    assert list(found) == [name]
    assert f"its receipt says {len(whole):,}" in found[name]


def test_a_reader_refuses_a_truncated_shard_before_it_reads(cache):
    path = cache / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheCorruptError, match=r"shard-00001\.parquet is damaged: it has .* its receipt says"):
        CacheReader(cache)
    path.unlink()
    with pytest.raises(CacheCorruptError, match=r"shard-00001\.parquet is damaged: it is missing"):
        CacheReader(cache)


def test_swapped_shards_are_found(cache):
    swap(cache / "shard-00000.parquet", cache / "shard-00001.parquet")
    assert list(damages(cache)) == ["shard-00000.parquet", "shard-00001.parquet"]


def test_swapped_hidden_states_are_found_and_not_read(cache):
    swap(cache / "shard-00000.hidden.parquet", cache / "shard-00001.hidden.parquet")
    assert list(damages(cache)) == ["shard-00000.hidden.parquet", "shard-00001.hidden.parquet"]
    with pytest.raises(CacheCorruptError, match=r"shard-00000\.hidden\.parquet is damaged: row 3 belongs to another"):
        CacheReader(cache).hidden_states(3)


@pytest.mark.parametrize("name", ["shard-00000.json", "shard-00001.parquet", "plan.json", "tokenizer/tokenizer.json"])
def test_a_deleted_file_is_found(cache, name):
    (cache / name).unlink()
    assert damages(cache) == {name: "it is missing"}


def test_one_deleted_hidden_file_is_an_error_and_all_of_them_are_a_choice(cache):
    (cache / "shard-00000.hidden.parquet").unlink()
    assert damages(cache) == {"shard-00000.hidden.parquet": "it is missing"}
    assert not CacheReader(cache).has_hidden_states
    (cache / "shard-00001.hidden.parquet").unlink()
    assert verify(cache).ok
    assert not CacheReader(cache).has_hidden_states


def test_an_edited_plan_is_found_and_not_read(cache):
    text = (cache / "plan.json").read_text()
    (cache / "plan.json").write_text(text.replace('"logit_step": 0.015625', '"logit_step": 0.03125'))
    assert damages(cache) == {"plan.json": "it says something else than manifest.json"}
    with pytest.raises(CacheCorruptError, match=r"plan\.json is damaged: it says something else than manifest\.json"):
        CacheReader(cache)


def test_a_manifest_with_a_receipt_too_few_is_found(cache):
    document = json.loads((cache / "manifest.json").read_text())
    document["receipts"].pop()
    (cache / "manifest.json").write_text(json.dumps(document))
    reasons = [damage.reason for damage in verify(cache).errors]
    assert "its receipts are not those of shards 0 to 1" in reasons
    assert "receipts hold 20 sequences, the plan 40" in reasons


# --- rows that every hash vouches for -------------------------------------------------------------------------------


def edited(change, *, row=5, dtype=np.int32):
    """Return an edit of a list column that changes one row's flat values."""

    def edit(column):
        rows = [np.array(values, dtype) for values in column.to_pylist()]
        rows[row] = change(rows[row])
        return pa.array(rows, column.type)

    return edit


def put(place, value):
    def change(values):
        values[place] = value
        return values

    return change


@pytest.mark.parametrize(
    ("column", "edit", "said"),
    [
        ("input_ids", edited(put(0, 1)), "have another id"),
        ("input_ids", edited(lambda values: values[:-1]), "must both be [num_tokens]"),
        ("loss_mask", edited(put(-1, False), dtype=bool), "have another id"),
        ("token_ids", edited(lambda values: values[:-1]), "cannot reshape"),
        ("token_ids", edited(lambda values: values[:-8]), "cannot reshape"),
        ("logit_drops", edited(lambda values: np.append(values, 0)), "cannot reshape"),
        ("top_logit_steps", edited(lambda values: values[:-1]), "broadcast"),
        ("label_logit", edited(lambda values: values[:-1], dtype=np.float32), "cannot reshape"),
        ("tail_logsumexp", edited(lambda values: values[:-1], dtype=np.float32), "cannot reshape"),
        ("token_ids", edited(put(1, 97)), "token_ids holds 97, outside the vocabulary of 97"),
        ("token_ids", edited(put(1, -1)), "token_ids holds -1, outside the vocabulary of 97"),
        ("token_ids", edited(lambda values: np.r_[values[0], values[0], values[2:]]), "stands twice in one position"),
        ("logit_drops", edited(put(0, -1)), "logits increase"),
        ("label_logit", edited(put(0, np.nan), dtype=np.float32), "label_logit is not finite"),
        ("label_logit", edited(put(0, 99), dtype=np.float32), "label"),
        ("row_mean", edited(put(0, np.inf), dtype=np.float32), "row_mean is not finite"),
        ("row_std", edited(put(-1, np.nan), dtype=np.float32), "row_std is not finite"),
        ("tail_logsumexp", edited(put(0, np.nan), dtype=np.float32), "tail_logsumexp is not finite"),
        ("tail_logsumexp", edited(put(0, np.inf), dtype=np.float32), "tail_logsumexp is not finite"),
        ("tail_logsumexp", edited(put(0, -np.inf), dtype=np.float32), "tail_logsumexp is not finite"),
    ],
)
def test_a_row_that_breaks_the_format_is_found_behind_right_hashes(cache, column, edit, said):
    rewrite_column(cache, PLAN, 1, "shard-00001.parquet", column, edit)
    report = verify(cache)
    assert [damage.file for damage in report.errors] == ["shard-00001.parquet"]
    assert said in report.errors[0].reason


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_a_hidden_state_that_is_no_number_is_found_behind_right_hashes(cache, bits):
    def spoil(column):
        states = [bytearray(value) for value in column.to_pylist()]
        states[5][2:4] = bits.to_bytes(2, "little")
        return pa.array([bytes(value) for value in states], column.type)

    rewrite_column(cache, PLAN, 1, "shard-00001.hidden.parquet", "hidden_states", spoil)
    report = verify(cache)
    assert [damage.file for damage in report.errors] == ["shard-00001.hidden.parquet"]
    assert "hidden_states is not finite" in report.errors[0].reason


def test_hidden_states_of_another_width_are_found_behind_right_hashes(cache):

    def narrow(column):
        return pa.array([value[:-2] for value in column.to_pylist()], column.type)

    rewrite_column(cache, PLAN, 0, "shard-00000.hidden.parquet", "hidden_states", narrow)
    report = verify(cache)
    assert {damage.file for damage in report.errors} == {"shard-00000.hidden.parquet"}
    assert "x4 uint16" in report.errors[0].reason


@pytest.mark.parametrize("name", ["shard-00000.parquet", "shard-00000.hidden.parquet"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.slice(1), "its row groups hold 19 rows"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "its row groups hold 21 rows"),
        (lambda table: table.append_column("more", pa.array([0] * 20)), "its columns are not those of the format"),
        (lambda table: table.drop_columns(["sequence_id"]), "its columns are not those of the format"),
    ],
    ids=["a row too few", "a row too many", "a column too many", "a column too few"],
)
def test_a_file_of_another_shape_is_found_behind_right_hashes(cache, name, change, said):
    rewrite_table(cache, PLAN, 0, name, change)
    report = verify(cache)
    assert {damage.file for damage in report.errors} == {name}
    assert said in report.errors[0].reason


def test_counts_in_a_receipt_that_are_not_those_of_the_rows_are_found(cache):
    for name in ("shard-00000.json", "manifest.json"):
        document = json.loads((cache / name).read_text())
        receipt = document["receipts"][0] if name == "manifest.json" else document
        receipt["num_positions"] += 1
        (cache / name).write_text(json.dumps(document))
    assert damages(cache) == {"shard-00000.json": "its counts are not those of the rows"}


def test_a_label_must_have_one_logit_in_the_top_k_and_beside_it():
    plan = make_plan(vocab_size=8, top_k=8, logit_step=0.0)
    scored = make_scored(plan, np.random.default_rng(0), 12)
    assert fault_in_rows(scored, plan) is None
    wrong = with_rows(scored, label_logit=scored.rows.label_logit + np.float32(0.01))
    assert fault_in_rows(wrong, plan) == "a label's logit differs from the same id's in the top k"
    # Half a step is what the grid may take away, and no more.
    coarse = make_plan(vocab_size=8, top_k=8, logit_step=0.03)
    assert fault_in_rows(wrong, coarse) is None


def test_a_label_outside_the_top_k_cannot_be_above_it():
    plan = make_plan(top_k=1, logit_step=0.0)
    scored = make_scored(plan, np.random.default_rng(0), 12)
    assert fault_in_rows(scored, plan) is None
    above = with_rows(scored, label_logit=scored.rows.logits[:, 0] + np.float32(0.5))
    assert fault_in_rows(above, plan) in (
        "a label outside the top k has a logit above it",
        "a label's logit differs from the same id's in the top k",
    )
