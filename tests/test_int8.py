"""Hidden states as int8: how far from the teacher's, what states it, and what is refused."""

import numpy as np
import pytest
import torch

from cache_schema import CacheReader, verify
from cache_schema.encoding import from_int8, to_float32, to_int8
from cache_schema.manifest import read_json
from cache_schema.plan import HiddenStates, Plan
from cache_schema.sequence import TokenSequence
from tests.caches import content
from tests.command_line import pipeline
from tests.conftest import dump as dump_by_command
from tests.tiny_cache import CPU, dump_tiny_cache, load_teacher, random_sequences
from workers.lookup.stored import stored_hidden_states
from workers.teacher.dump import dump
from workers.teacher.int8 import measure_int8, restored
from workers.teacher.lm_head import load_head
from workers.tokenizers import load_tokenizer

SEQUENCES = random_sequences()
DTYPES = ["float32", "bfloat16", "float16"]
SIZE = 32
HIDDEN = HiddenStates(
    dtype="int8",
    size=SIZE,
    channel_scale=tuple(np.geomspace(0.01, 100, SIZE).tolist()),
    residual_channels=(3, 31),
    mean_logit_error=0.1,
    max_logit_error=1.0,
)
# What ``tests.conftest.dump`` gives.
COMMON = ["--top-k", 16, "--set", "data.max_tokens=128", "--set", "cache.sequences_per_shard=8"]
EPSILON = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def exact(teacher_dir, tmp_path_factory):
    return dump_tiny_cache(tmp_path_factory.mktemp("caches") / "exact", teacher_dir, SEQUENCES)


@pytest.fixture(scope="module")
def rounded(teacher_dir, tmp_path_factory):
    return dump_tiny_cache(tmp_path_factory.mktemp("caches") / "int8", teacher_dir, SEQUENCES, hidden_dtype="int8")


@pytest.fixture(scope="module")
def int8_cache(teacher_dir, data_file, tmp_path_factory):
    """Of the command line; three shards."""
    return dump_by_command(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "cli", "--hidden-dtype", "int8")


def pending(reader):
    """The plan before its scales are measured."""
    return reader.plan.model_copy(update={"hidden_states": HiddenStates(dtype="int8", size=SIZE)})


# ---- the two functions ----


def test_a_state_is_within_half_a_step_and_a_residual_s_within_half_of_its_254th():
    rng = np.random.default_rng(0)
    states = (rng.standard_cauchy((200, SIZE)) * np.geomspace(1e-3, 1e3, SIZE)).astype(np.float32)
    stored = to_int8(states, HIDDEN)
    step = stored.row_scale[:, None].astype(np.float64) * np.array(HIDDEN.channel_scale)
    step[:, [3, 31]] /= 254
    difference = np.abs(from_int8(stored, HIDDEN).astype(np.float64) - states)
    # A quotient, a product of scales and a product with it: three roundings, and a residual's own.
    assert (difference <= step / 2 + 4 * EPSILON * np.abs(states)).all()
    assert difference[:, 5].max() > 0.4 * step[:, 5].min()  # it is not kept more finely than said
    assert (np.abs(stored.states).max(axis=1) == 127).all()
    assert stored.residuals.shape == (200, 2)
    assert min(stored.states.min(), stored.residuals.min()) >= -127
    assert stored.residuals.any()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-44])
def test_a_row_of_zeros_or_of_next_to_nothing_is_zeros_and_changes_no_other(size):
    states = np.random.default_rng(0).standard_normal((3, SIZE)).astype(np.float32)
    states[1] = size
    stored = to_int8(states, HIDDEN)
    found = from_int8(stored, HIDDEN)
    assert (found[1] == 0).all()
    assert (stored.row_scale > 0).all()
    others = to_int8(states[[0, 2]], HIDDEN)
    assert (found[[0, 2]] == from_int8(others, HIDDEN)).all()


def test_a_state_beyond_float32_s_reach_is_refused():
    states = np.zeros((1, SIZE), np.float32)
    states[0, 0] = 3e38  # over channel 0's scale of 0.01
    with pytest.raises(ValueError, match=r"hidden state of 3e\+38 does not fit int8: store the teacher's dtype"):
        to_int8(states, HIDDEN)


def test_bits_of_every_dtype_become_their_numbers():
    numbers = torch.randn(5, 3)
    for dtype in DTYPES:
        there = numbers.to(getattr(torch, dtype))
        bits = there.view(torch.uint16) if dtype == "bfloat16" else there
        assert to_float32(bits.numpy(), dtype).tolist() == there.float().tolist()


# ---- a cache ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_states_the_errors_its_files_have(teacher_dir, tmp_path, dtype):
    exact = dump_tiny_cache(tmp_path / "exact", teacher_dir, SEQUENCES, dtype=dtype)
    rounded = dump_tiny_cache(tmp_path / "int8", teacher_dir, SEQUENCES, dtype=dtype, hidden_dtype="int8")
    assert verify(rounded.cache_dir).ok
    head = load_head(rounded.lm_head_path, CPU)
    # The pilot is all seven sequences; the second, fourth and sixth did not set the scales.
    measured = [exact.index_of(SEQUENCES[number].sequence_id) for number in (1, 3, 5)]
    differences = []
    for index in range(len(exact)):
        there, here = stored_hidden_states(exact, index), stored_hidden_states(rounded, index)
        assert there.dtype == here.dtype == getattr(torch, dtype)
        assert torch.equal(here, restored(there, rounded.plan.hidden_states))
        if index in measured:
            weight = head.weight_VD.double()
            differences.append((here.double() @ weight.T - there.double() @ weight.T).abs())
    found = torch.cat(differences)
    # In a batch of other shape the teacher rounds some states to their neighbour: float32 hardly, bfloat16 by 1/256.
    tolerance = {"float32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}[dtype]
    assert float(found.mean()) == pytest.approx(rounded.plan.hidden_states.mean_logit_error, rel=tolerance)
    assert float(found.max()) == pytest.approx(rounded.plan.hidden_states.max_logit_error, rel=3 * tolerance)
    assert 0 < rounded.plan.hidden_states.mean_logit_error < 0.05


def test_only_the_hidden_states_differ_from_the_exact_cache_s(exact, rounded):
    there, here = content(exact.cache_dir), content(rounded.cache_dir)
    differing = {name for name in there if there[name] != here[name]}
    assert all(".hidden." in name or name.endswith(".json") for name in differing)
    assert here["lm_head.safetensors"] == there["lm_head.safetensors"]
    assert here["shard-00000.parquet"] == there["shard-00000.parquet"]


def test_the_pilot_is_a_function_of_the_data_alone(teacher_dir, rounded, tmp_path):
    other = dump_tiny_cache(
        tmp_path / "cache", teacher_dir, SEQUENCES, hidden_dtype="int8", sequences_per_shard=1, top_k=3
    )
    assert other.plan.hidden_states == rounded.plan.hidden_states


@pytest.mark.parametrize("num_tokens", [2, 3, 9])
def test_a_data_set_of_one_sequence_is_its_own_pilot(teacher_dir, tmp_path, num_tokens):
    sequence = TokenSequence(np.arange(5, 5 + num_tokens, dtype=np.int32), np.arange(num_tokens) > 0, "rows")
    reader = dump_tiny_cache(tmp_path / "cache", teacher_dir, [sequence], hidden_dtype="int8")
    assert reader.plan.hidden_states.mean_logit_error < 0.1
    assert verify(reader.cache_dir).ok


def test_a_channel_the_pilot_never_saw_can_be_used_later(teacher_dir, rounded):
    """A dead channel gets the step of a small one; with its largest value as scale it would set every row's."""

    class DeadChannel:
        lm_head = load_teacher(teacher_dir, rounded.plan).lm_head

        def hidden_states(self, batch, positions):
            states = torch.randn(len(batch[0].target_rows(positions)), SIZE, generator=torch.manual_seed(0))
            return [states.index_fill(1, torch.tensor([7]), 0.0)]

    hidden = measure_int8(pending(rounded), SEQUENCES, DeadChannel())
    alive = torch.randn(50, SIZE, generator=torch.manual_seed(1))
    step = alive.abs().amax() / 127
    assert float((restored(alive, hidden) - alive).abs().max()) < 8 * step


def test_where_the_teacher_responds_the_pilot_is_the_prompts(teacher_dir, data_file, tmp_path):
    options = ["--responses", "teacher", "--set", "responses.max_new_tokens=6", "--hidden-dtype", "int8"]
    reader = CacheReader(dump_by_command(teacher_dir, data_file, tmp_path / "cache", *options))
    assert 0 < reader.plan.hidden_states.mean_logit_error < 0.05
    assert pipeline("verify", tmp_path / "cache", "--json").json["ok"]


# ---- stopped and resumed ----


class CountingTeacher:
    """The teacher, until it has been asked ``num_calls`` times."""

    def __init__(self, teacher, num_calls=10**9):
        self.identity, self.engine, self.lm_head = teacher.identity, teacher.engine, teacher.lm_head
        self._teacher, self._num_calls, self.calls = teacher, num_calls, 0

    def hidden_states(self, batch, positions):
        if self.calls == self._num_calls:
            raise RuntimeError("stopped")
        self.calls += 1
        return self._teacher.hidden_states(batch, positions)


# The pilot is 7 calls, the shards are 2, 2 and 1: what has no plan or no receipt yet is asked for again.
@pytest.mark.parametrize(("num_calls", "num_left"), [(0, 12), (5, 12), (7, 5), (8, 5), (9, 3), (11, 1)])
def test_a_stopped_dump_goes_on_with_its_scales_and_ends_with_the_same_bytes(
    teacher_dir, rounded, tmp_path, num_calls, num_left
):
    folder, plan, tokenizer = tmp_path / "cache", pending(rounded), load_tokenizer(str(teacher_dir))
    teacher = load_teacher(teacher_dir, plan)
    with pytest.raises(RuntimeError, match="stopped"):
        dump(folder, plan, SEQUENCES, CountingTeacher(teacher, num_calls), tokenizer)
    assert (folder / "plan.json").exists() == (num_calls >= 7)
    again = CountingTeacher(teacher)
    dump(folder, plan, SEQUENCES, again, tokenizer)
    assert content(folder) == content(rounded.cache_dir)
    assert again.calls == num_left


def test_another_storage_dtype_is_another_dump(teacher_dir, data_file, int8_cache, cache_dir):
    for folder, options, message in (
        (int8_cache, [], "its hidden_states.dtype is int8, this command's is float32"),
        (cache_dir, ["--hidden-dtype", "int8"], "its hidden_states.dtype is float32, this command's is int8"),
    ):
        command = ["teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--out", folder, *COMMON]
        result = pipeline(*command, *options)
        assert result.code == 1
        assert message in result.err


# ---- the command line ----


def test_a_dump_can_be_inspected_verified_and_distilled_from(int8_cache, cache_dir, teacher_dir, tmp_path):
    facts, exact = (pipeline("inspect", folder, "--json").json for folder in (int8_cache, cache_dir))
    stored = read_json(int8_cache / "plan.json", Plan).hidden_states
    assert facts["hidden_dtype"] == "int8"
    assert facts["hidden_logit_error"] == {"mean": stored.mean_logit_error, "max": stored.max_logit_error}
    assert 0 < facts["hidden_logit_error"]["mean"] < facts["hidden_logit_error"]["max"] < 1
    assert (exact["hidden_dtype"], exact["hidden_logit_error"]) == ("float32", None)
    assert facts["hidden_bytes_per_position"] < exact["hidden_bytes_per_position"]
    assert f"int8: logits from them within {stored.mean_logit_error:.2g} nat" in pipeline("inspect", int8_cache).out
    verified = pipeline("verify", int8_cache, "--json").json
    assert (verified["ok"], verified["recomputed_sequences"]) == (True, 16)
    for loss in ("bild", "kl"):
        summary = pipeline("distill", "--cache", int8_cache, "--student", teacher_dir, "--student-layers", "0,2",
            "--steps", 2, "--loss", loss, "--out", tmp_path / loss, "--json").json  # fmt: skip
        assert summary["teacher_forwards"] == 0
        assert np.isfinite(summary["loss"])


def test_a_dump_again_of_a_finished_cache_is_no_work(int8_cache, teacher_dir, data_file):
    before = content(int8_cache)
    dump_by_command(teacher_dir, data_file, int8_cache, "--hidden-dtype", "int8")
    assert content(int8_cache) == before


def test_a_dry_run_says_the_bytes_without_a_teacher(
    teacher_dir, data_file, tmp_path, cache_dir, int8_cache, monkeypatch
):
    monkeypatch.setattr("pipeline.teacher_dump.open_teacher", None)
    positions = CacheReader(cache_dir).manifest.num_positions
    for folder in (tmp_path / "new", int8_cache):
        sizes = {}
        for hidden_dtype in ("int8", None):
            out = folder if hidden_dtype else tmp_path / "new"
            options = ["--hidden-dtype", hidden_dtype] if hidden_dtype else []
            command = ["teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--out", out, *COMMON, *options]
            sizes[hidden_dtype] = pipeline(*command, "--dry-run", "--json").json
            words = pipeline(*command, "--dry-run").out
            assert (" as int8; without" in words) == (hidden_dtype == "int8")
        # A byte a channel, one residual and a float32 scale.
        assert sizes["int8"]["hidden_bytes"] == positions * (SIZE + 1 + 4)
        assert sizes[None]["hidden_bytes"] == positions * SIZE * 4
        assert (sizes["int8"]["hidden_dtype"], sizes[None]["hidden_dtype"]) == ("int8", "float32")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden-dtype", "int8", "--no-hidden-states"], "give --hidden-dtype or --no-hidden-states"),
        (["--hidden-dtype", "int4"], "cache.hidden_dtype: Input should be 'int8', not 'int4'"),
        (["--dtype", "int8"], "teacher.dtype: Input should be 'float32', 'bfloat16' or 'float16', not 'int8'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(teacher_dir, data_file, tmp_path, options, message):
    result = pipeline("teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "c", *options)
    assert result.code == 1
    assert message in result.err
    assert not (tmp_path / "c").exists()
