"""The teacher's logit of any token at any cached position, without the teacher, against the teacher itself."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cache_schema.errors import CacheCorruptError, CacheMismatchError
from tests.tiny import tiny_tokenizer
from tests.tiny_cache import CPU, dump_tiny_cache, load_teacher, random_sequences
from tests.tiny_models import save_tiny_llama
from workers.errors import InputError
from workers.lookup.batch import collate
from workers.lookup.ladder import Ladder
from workers.lookup.live import LiveTeacher
from workers.lookup.opening import stored_ladder
from workers.lookup.states import TeacherStates
from workers.lookup.stored import require_head_of_cache, stored_head, stored_hidden_states
from workers.ordering import exact_top_k
from workers.teacher.checkpoint import identity_of
from workers.teacher.lm_head import load_head, save_head

VOCAB_SIZE, TOP_K, STEP = 384, 8, 1 / 64


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("teacher"), tiny_tokenizer(), layers=2)


@pytest.fixture(scope="module")
def model(teacher_dir):
    return AutoModelForCausalLM.from_pretrained(teacher_dir).eval()


@pytest.fixture(scope="module")
def sequences():
    return random_sequences()


@pytest.fixture(scope="module")
def reader(teacher_dir, sequences, tmp_path_factory):
    return dump_tiny_cache(tmp_path_factory.mktemp("caches") / "response", teacher_dir, sequences)


@pytest.fixture(scope="module")
def reader_of_all(teacher_dir, sequences, tmp_path_factory):
    return dump_tiny_cache(tmp_path_factory.mktemp("caches") / "all", teacher_dir, sequences, positions="all")


@pytest.fixture(scope="module")
def bare_reader(teacher_dir, sequences, tmp_path_factory):
    """Of a cache without hidden states."""
    return dump_tiny_cache(tmp_path_factory.mktemp("caches") / "bare", teacher_dir, sequences, hidden_states=False)


def live_ladder(reader, teacher_dir):
    teacher = load_teacher(teacher_dir, reader.plan)
    return Ladder(TeacherStates(reader, teacher.lm_head, live=LiveTeacher(reader, teacher)))


def positions_of(reader, part="response", indexes=None):
    return collate(reader, range(len(reader)) if indexes is None else indexes, [part], CPU).parts[part]


def dense_logits(model, reader, indexes=None):
    """What the teacher itself says at every trained token: each sequence alone, one token after the other."""
    rows = []
    for index in range(len(reader)) if indexes is None else indexes:
        sequence = reader[index].sequence
        with torch.no_grad():
            logits = model(torch.tensor(sequence.input_ids).long()[None]).logits[0]
        rows += [logits[token - 1] for token in range(1, sequence.num_tokens) if sequence.loss_mask[token]]
    return torch.stack(rows)


def every_id(positions):
    return torch.arange(VOCAB_SIZE).expand(len(positions), -1)


def is_stored(positions):
    return torch.zeros(len(positions), VOCAB_SIZE, dtype=torch.bool).scatter_(1, positions.token_ids_NK, True)


def assert_answers_are_the_teacher_s(answers, expected, stored, step):
    float32 = 1e-5 * float(expected.abs().max())
    assert float((answers - expected)[stored].abs().max()) <= step / 2 + float32
    assert float((answers - expected)[~stored].abs().max()) <= float32


@pytest.mark.parametrize("source_of", ["hidden", "live"])
def test_every_logit_is_the_teacher_s_and_every_pair_is_counted_once(
    reader, bare_reader, model, teacher_dir, source_of
):
    reader = reader if source_of == "hidden" else bare_reader
    ladder = stored_ladder(reader, CPU) if source_of == "hidden" else live_ladder(reader, teacher_dir)
    positions = positions_of(reader)
    answers = ladder.logits_at(positions, every_id(positions))
    assert_answers_are_the_teacher_s(answers, dense_logits(model, reader), is_stored(positions), STEP)
    assert not answers.requires_grad
    pairs = {"cached": len(positions) * TOP_K, source_of: len(positions) * (VOCAB_SIZE - TOP_K)}
    assert ladder.take_counts() == (
        dict.fromkeys(("cached", "logged", "hidden", "live", "bound"), 0) | pairs,
        0 if source_of == "hidden" else len(reader),
    )
    assert ladder.take_counts() == (dict.fromkeys(("cached", "logged", "hidden", "live", "bound"), 0), 0)


def test_float32_logits_are_stored_exactly(teacher_dir, sequences, model, tmp_path):
    reader = dump_tiny_cache(tmp_path / "cache", teacher_dir, sequences, logit_step=0)
    positions = positions_of(reader)
    answers = stored_ladder(reader, CPU).logits_at(positions, every_id(positions))
    assert_answers_are_the_teacher_s(answers, dense_logits(model, reader), is_stored(positions), 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_hidden_states_give_the_half_precision_teacher_s_logits(teacher_dir, sequences, tmp_path, dtype):
    reader = dump_tiny_cache(tmp_path / "cache", teacher_dir, sequences, dtype=dtype)
    assert stored_hidden_states(reader, 0).dtype == getattr(torch, dtype)
    positions = positions_of(reader)
    # In half precision a body's rounding depends on the padding of the batch, so the dump's own states are the truth.
    hidden = torch.cat([stored_hidden_states(reader, index) for index in range(len(reader))])
    weight = load_teacher(teacher_dir, reader.plan).lm_head.weight_VD
    assert weight.dtype == hidden.dtype
    expected = (hidden.double() @ weight.double().T).float()
    answers = stored_ladder(reader, CPU).logits_at(positions, every_id(positions))
    assert_answers_are_the_teacher_s(answers, expected, is_stored(positions), STEP)


def test_a_mix_of_stored_and_other_ids_is_answered_in_place(reader, model):
    positions = positions_of(reader)
    ids = torch.randint(VOCAB_SIZE, (len(positions), 11), generator=torch.Generator().manual_seed(0))
    ids[:, 3] = positions.token_ids_NK[:, -1]
    ids[:, 4] = ids[:, 5]  # asked twice, answered and counted twice
    ladder = stored_ladder(reader, CPU)
    stored = is_stored(positions).gather(1, ids)
    expected = dense_logits(model, reader).gather(1, ids)
    assert_answers_are_the_teacher_s(ladder.logits_at(positions, ids), expected, stored, STEP)
    counts = ladder.take_counts()[0]
    assert (counts["cached"], counts["hidden"]) == (int(stored.sum()), int((~stored).sum()))


def test_whole_rows_are_the_teacher_s(reader, model):
    positions, expected = positions_of(reader), dense_logits(model, reader)
    ladder = stored_ladder(reader, CPU)
    for chunk in (slice(0, 5), slice(5, 6), slice(6, len(positions))):
        torch.testing.assert_close(ladder.rows(positions, chunk), expected[chunk], rtol=1e-5, atol=1e-4)


def test_a_batch_of_some_sequences_in_another_order_is_answered_for_those(reader, model):
    positions = positions_of(reader, indexes=[4, 1, 6])
    answers = stored_ladder(reader, CPU).logits_at(positions, every_id(positions))
    assert_answers_are_the_teacher_s(answers, dense_logits(model, reader, [4, 1, 6]), is_stored(positions), STEP)


def test_a_live_teacher_runs_once_for_a_batch_and_again_for_the_next(bare_reader, teacher_dir):
    ladder = live_ladder(bare_reader, teacher_dir)
    first, second = positions_of(bare_reader, indexes=[0, 2]), positions_of(bare_reader, indexes=[1, 3, 5])
    ladder.logits_at(first, first.token_ids_NK)
    assert ladder.take_counts()[1] == 0  # nothing was missing
    ladder.logits_at(first, every_id(first))
    ladder.rows(first, slice(0, 1))
    assert ladder.take_counts()[1] == 2
    ladder.logits_at(second, every_id(second))
    assert ladder.take_counts()[1] == 3


def test_without_hidden_states_or_teacher_the_stored_ids_are_answered_and_no_other(reader):
    ladder, positions = Ladder(), positions_of(reader)
    assert torch.equal(ladder.logits_at(positions, positions.token_ids_NK.flip(1)), positions.logits_NK.flip(1))
    assert ladder.take_counts()[0]["cached"] == positions.token_ids_NK.numel()
    with pytest.raises(InputError, match="no hidden states, teacher or bound"):
        ladder.logits_at(positions, every_id(positions)[:, :20])


@pytest.mark.parametrize("part", ["response", "prompt"])
def test_the_parts_of_a_cache_of_all_positions_point_at_their_tokens(reader_of_all, model, part):
    order = [5, 0, 3]
    batch = collate(reader_of_all, order, ["response", "prompt"], CPU)
    positions = batch.parts[part]
    n = 0
    for row, index in enumerate(order):
        sequence = reader_of_all[index].sequence
        tokens = torch.tensor(sequence.input_ids).long()
        assert torch.equal(batch.input_ids_BT[row, : len(tokens)], tokens)
        assert not batch.input_ids_BT[row, len(tokens) :].any()
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        # A token that is trained is predicted from the token before it.
        for token in range(1, len(tokens)):
            if bool(sequence.loss_mask[token]) == (part == "response"):
                assert (int(positions.sequence_of_N[n]), int(positions.token_of_N[n])) == (row, token - 1)
                assert int(positions.labels_N[n]) == int(tokens[token])
                values, ids = exact_top_k(logits[token - 1][None], TOP_K)
                assert torch.equal(positions.token_ids_NK[n], ids[0])
                assert float((positions.logits_NK[n] - values[0]).abs().max()) <= STEP / 2 + 1e-4
                n += 1
    assert n == len(positions) == batch.num_positions(part)
    answers = stored_ladder(reader_of_all, CPU).logits_at(positions, every_id(positions))
    rows = [
        (logits[token - 1])
        for index in order
        for sequence in [reader_of_all[index].sequence]
        for logits in [model(torch.tensor(sequence.input_ids).long()[None]).logits[0].detach()]
        for token in range(1, sequence.num_tokens)
        if bool(sequence.loss_mask[token]) == (part == "response")
    ]
    assert_answers_are_the_teacher_s(answers, torch.stack(rows), is_stored(positions), STEP)


def test_a_cache_of_responses_has_no_prompt_positions(reader):
    batch = collate(reader, [0, 1], ["response", "prompt"], CPU)
    assert batch.num_positions("prompt") == 0
    assert batch.num_positions("response") == sum(reader[i].sequence.loss_mask.sum() for i in (0, 1))


def swapped(weight, first, second):
    weight = weight.clone()
    weight[[first, second]] = weight[[second, first]]
    return weight


def test_the_head_of_the_dump_is_accepted(reader, reader_of_all):
    require_head_of_cache(reader, load_head(reader.lm_head_path, CPU))
    require_head_of_cache(reader_of_all, load_head(reader_of_all.lm_head_path, CPU), num_sequences=1000)


HEADS = {
    "perturbed": lambda weight, ids: weight + 0.02 * torch.randn(weight.shape, generator=torch.manual_seed(0)),
    "scaled": lambda weight, ids: weight * 1.02,
    "two rows exchanged": lambda weight, ids: swapped(weight, *ids),
    "a row moved in from outside": lambda weight, ids: weight.index_copy(
        0, torch.tensor([next(i for i in range(VOCAB_SIZE) if i not in ids)]), 3 * weight[ids[:1]]
    ),
    "all rows reversed": lambda weight, ids: weight.flip(0),
    "a row that is not a number": lambda weight, ids: weight.index_fill(0, torch.tensor(ids[:1]), torch.nan),
    "rows missing": lambda weight, ids: weight[:-1],
}


@pytest.mark.parametrize("changed", HEADS.values(), ids=HEADS.keys())
def test_a_head_that_is_not_the_dump_s_is_refused(reader, changed):
    head = load_head(reader.lm_head_path, CPU)
    first_ids = reader[0].rows.token_ids[0, :2].tolist()
    wrong = dataclasses.replace(head, weight_VD=changed(head.weight_VD, first_ids))
    with pytest.raises(CacheCorruptError, match="lm_head"):
        require_head_of_cache(reader, wrong)


def test_hidden_states_are_not_read_with_a_wrong_head(teacher_dir, sequences, tmp_path):
    reader = dump_tiny_cache(tmp_path / "cache", teacher_dir, sequences)
    head = load_head(reader.lm_head_path, CPU)
    save_head(dataclasses.replace(head, weight_VD=head.weight_VD.flip(0)), reader.lm_head_path)
    with pytest.raises(CacheCorruptError, match="its SHA-256 is not the manifest"):
        stored_head(reader, CPU)


def test_another_teacher_is_refused(reader, teacher_dir, tmp_path):
    other = save_tiny_llama(tmp_path / "other", tiny_tokenizer(), layers=2, seed=1)
    for model_dir, dtype, field in ((other, "float32", "fingerprint"), (teacher_dir, "bfloat16", "dtype")):
        plan = reader.plan.model_copy(update={"teacher": identity_of(str(model_dir), dtype)})
        with pytest.raises(CacheMismatchError, match=f"its {field} is"):
            LiveTeacher(reader, load_teacher(model_dir, plan))


def test_stored_hidden_states_are_the_teacher_s(reader, model):
    for index in range(len(reader)):
        sequence = reader[index].sequence
        with torch.no_grad():
            hidden = model.model(torch.tensor(sequence.input_ids).long()[None]).last_hidden_state[0]
        rows = np.flatnonzero(sequence.loss_mask) - 1
        torch.testing.assert_close(stored_hidden_states(reader, index), hidden[rows], rtol=1e-5, atol=1e-5)
