"""Every tier of the ladder, alone and mixed, against the rows of the teacher itself."""

import dataclasses
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PhiConfig

from cache_schema.compaction import compact
from cache_schema.errors import CacheCorruptError, CacheMismatchError
from cache_schema.lookup_writer import lookups_dir
from cache_schema.lookups import LookupLog
from cache_schema.reader import CacheReader
from cache_schema.storage import sha256_of
from tests.test_ladder import assert_answers_are_the_teacher_s, dense_logits, every_id, is_stored, positions_of
from tests.test_lm_head import HEADS, numpy_logits, random_head, random_hidden
from tests.tiny import tiny_tokenizer
from tests.tiny_cache import CPU, dump_tiny_cache, load_teacher, random_sequences
from tests.tiny_models import save_tiny_llama, save_tiny_model
from workers.errors import InputError
from workers.lookup.config import LookupConfig
from workers.lookup.ladder import TIERS, Ladder
from workers.lookup.live import LiveTeacher
from workers.lookup.opening import Asked, open_ladders, source_of_misses
from workers.lookup.states import TeacherStates
from workers.lookup.stored import stored_head
from workers.ordering import exact_top_k
from workers.teacher import lm_head
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
    """Of a cache without hidden states."""
    return dump_tiny_cache(tmp_path_factory.mktemp("caches") / "bare", teacher_dir, sequences, hidden_states=False)


@pytest.fixture(scope="module")
def reader_with_states(teacher_dir, sequences, tmp_path_factory):
    return dump_tiny_cache(tmp_path_factory.mktemp("caches") / "whole", teacher_dir, sequences)


@pytest.fixture
def open_ladder(tmp_path):
    """Opens a run's ladder; the log stands in a directory of the test's own. Closed after the test."""
    with ExitStack() as resources:

        def opened(reader, teacher=None, on_miss="refuse", **lookups):
            asked = Asked(str(teacher) if teacher else None, on_miss, LookupConfig(**{"dir": str(tmp_path)} | lookups))
            return open_ladders([reader], asked, CPU, resources)[0]

        opened.close = resources.close
        yield opened


def log_of(reader, tmp_path):
    return LookupLog(reader, [lookups_dir(reader, tmp_path)])


def ask(ladder, reader, indexes=None, ids=None, ahead=None):
    """Every logit of some sequences' positions, or some ids', in one micro-batch."""
    positions = positions_of(reader, indexes=indexes)
    return ladder.logits_at(positions, every_id(positions) if ids is None else ids, ahead)


def counts(forwards=0, **pairs):
    return dict.fromkeys(TIERS, 0) | pairs, forwards


def num_positions(reader, indexes):
    return sum(int(reader[index].sequence.loss_mask.sum()) for index in indexes)


def cached_pairs(reader, indexes):
    return TOP_K * num_positions(reader, indexes)


def other_pairs(reader, indexes):
    return (VOCAB_SIZE - TOP_K) * num_positions(reader, indexes)


def assert_are_the_teacher_s(answers, reader, model, indexes=None):
    stored = is_stored(positions_of(reader, indexes=indexes))
    assert_answers_are_the_teacher_s(answers, dense_logits(model, reader, indexes), stored, STEP)


# One tier


def test_stored_live_and_logged_states_all_give_the_teacher_s_logits(
    reader, reader_with_states, model, teacher_dir, open_ladder
):
    everyone = range(len(reader))
    cached, others = cached_pairs(reader, everyone), other_pairs(reader, everyone)
    for tier, of, teacher, forwards in (
        ("hidden", reader_with_states, None, 0),
        ("live", reader, teacher_dir, len(reader)),
        ("logged", reader, teacher_dir, 0),
        ("logged", reader, None, 0),
    ):
        ladder = open_ladder(of, teacher)
        ladder.expect(everyone)
        assert_are_the_teacher_s(ask(ladder, of), of, model)
        assert ladder.take_counts() == counts(forwards, cached=cached, **{tier: others})
        assert ladder.take_counts() == counts()


def test_the_sources_of_misses_are_told_from_files_alone(
    reader, reader_with_states, teacher_dir, open_ladder, tmp_path
):
    def source(of, teacher=None, on_miss="refuse"):
        return source_of_misses(of, Asked(teacher, on_miss, LookupConfig(dir=str(tmp_path))))

    assert source(reader_with_states, "some/teacher", "bound") == "hidden"
    assert (source(reader), source(reader, on_miss="bound")) == ("cached", "bound")
    assert source(reader, "some/teacher", "bound") == "live"
    ladder = open_ladder(reader, teacher_dir)
    ask(ladder, reader, [0, 1, 2])
    assert (source(reader), source(reader, "some/teacher")) == ("cached", "live")  # the log has three of seven
    ask(ladder, reader, [3, 4, 5, 6])
    assert source(reader) == source(reader, "some/teacher", "bound") == "logged"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logged_states_give_the_live_teacher_s_answers_bit_for_bit(
    teacher_dir, sequences, tmp_path, open_ladder, dtype
):
    reader = dump_tiny_cache(tmp_path / "cache", teacher_dir, sequences, dtype=dtype, hidden_states=False)
    answers = [ask(open_ladder(reader, teacher), reader) for teacher in (teacher_dir, None)]
    assert torch.equal(*answers)
    # In half precision a body's rounding depends on the padding of the batch: the logged states are the truth.
    log, head = log_of(reader, tmp_path), load_teacher(teacher_dir, reader.plan).lm_head
    bits = np.concatenate([log.hidden_states(index) for index in range(len(reader))])
    hidden = torch.from_numpy(bits)
    hidden = hidden.view(torch.bfloat16) if dtype == "bfloat16" else hidden
    expected = (hidden.double() @ head.weight_VD.double().T).float()
    outside = ~is_stored(positions_of(reader))
    assert float((answers[0] - expected)[outside].abs().max()) <= 1e-5 * float(expected.abs().max())


FAMILIES = {
    "padding and bias": (PhiConfig, {"vocab_size": 448}),
    "padding and soft cap": (Gemma2Config, {"vocab_size": 448, "head_dim": 16, "final_logit_softcapping": 3.0}),
    "scale": (CohereConfig, {"logit_scale": 0.25}),
}


@pytest.mark.parametrize(("family", "config"), FAMILIES.values(), ids=FAMILIES.keys())
def test_every_kind_of_head_answers_live_and_from_the_log(tmp_path, sequences, open_ladder, family, config):
    folder = save_tiny_model(tmp_path / "teacher", tiny_tokenizer(), family, num_hidden_layers=2, **config)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    reader = dump_tiny_cache(tmp_path / "cache", folder, sequences[:4], hidden_states=False)
    expected = dense_logits(model, reader)[:, :VOCAB_SIZE]
    stored = is_stored(positions_of(reader))
    for teacher in (folder, None):
        assert_answers_are_the_teacher_s(ask(open_ladder(reader, teacher), reader), expected, stored, STEP)


@pytest.mark.parametrize("temperatures", [(1.0, 3.0), (3.0, 1.0), (2.0,)])
def test_the_bound_is_the_lower_of_the_last_stored_logit_and_the_tail(
    teacher_dir, sequences, model, tmp_path, open_ladder, temperatures
):
    reader = dump_tiny_cache(
        tmp_path / "cache", teacher_dir, sequences, hidden_states=False, temperatures=temperatures, top_k=TOP_K
    )
    ladder = open_ladder(reader, on_miss="bound")
    answers, expected, positions = ask(ladder, reader), dense_logits(model, reader), positions_of(reader)
    stored = is_stored(positions)
    assert ladder.take_counts() == counts(cached=int(stored.sum()), bound=int((~stored).sum()))
    values = exact_top_k(expected, TOP_K)[0]
    bound = values[:, -1]
    if 1.0 in temperatures:
        bound = torch.minimum(bound, expected.double().masked_fill(stored, -torch.inf).logsumexp(1).float())
    # Half a step for the last stored logit, and float32 sums.
    error = STEP / 2 + 1e-5 * float(expected.abs().max())
    assert float((answers - bound[:, None])[~stored].abs().max()) <= error
    assert float((expected - answers)[~stored].max()) <= error  # never below what it bounds
    assert float((answers - expected)[stored].abs().max()) <= error  # what is stored is not touched


@pytest.mark.parametrize("temperatures", [(1.0, 3.0), (3.0, 1.0)])
def test_the_bound_of_the_only_id_that_is_not_stored_is_its_logit(
    tmp_path, teacher_dir, sequences, model, open_ladder, temperatures
):
    """The tail is that id alone, and may stand far below the last stored one."""
    reader = dump_tiny_cache(
        tmp_path / "cache",
        teacher_dir,
        sequences,
        hidden_states=False,
        top_k=VOCAB_SIZE - 1,
        temperatures=temperatures,
    )
    answers, expected, positions = (
        ask(open_ladder(reader, on_miss="bound"), reader),
        dense_logits(model, reader),
        positions_of(reader),
    )
    outside = ~is_stored(positions)
    last = positions.logits_NK[:, -1]
    assert bool((expected[outside] < last - 0.5).any())
    # The last stored logit may have been rounded below it.
    lowest = torch.minimum(expected[outside], last)
    torch.testing.assert_close(answers[outside], lowest, rtol=1e-5, atol=1e-5)


# Mixtures


def test_logged_and_live_sequences_share_a_micro_batch(reader, model, teacher_dir, open_ladder):
    ask(open_ladder(reader, teacher_dir), reader, [5, 1])
    ladder = open_ladder(reader, teacher_dir)
    order = [4, 1, 6, 0, 5]
    positions = positions_of(reader, indexes=order)
    ids = torch.randint(VOCAB_SIZE, (len(positions), 9), generator=torch.Generator().manual_seed(0))
    answers = ask(ladder, reader, order, ids)
    stored = is_stored(positions).gather(1, ids)
    expected = dense_logits(model, reader, order).gather(1, ids)
    assert_answers_are_the_teacher_s(answers, expected, stored, STEP)
    logged = torch.isin(positions.sequence_of_N, torch.tensor([1, 4]))[:, None].expand_as(stored)
    assert ladder.take_counts() == counts(
        3, cached=int(stored.sum()), logged=int((logged & ~stored).sum()), live=int((~logged & ~stored).sum())
    )
    again = open_ladder(reader)
    assert_answers_are_the_teacher_s(ask(again, reader, order, ids), expected, stored, STEP)
    assert again.take_counts() == counts(cached=int(stored.sum()), logged=int((~stored).sum()))


def test_logged_and_bounded_sequences_share_a_micro_batch(reader, model, teacher_dir, open_ladder):
    ask(open_ladder(reader, teacher_dir), reader, [5, 1])
    ladder = open_ladder(reader, on_miss="bound")
    order = [1, 3, 5]
    answers, positions = ask(ladder, reader, order), positions_of(reader, indexes=order)
    assert ladder.take_counts() == counts(
        cached=cached_pairs(reader, order), logged=other_pairs(reader, [1, 5]), bound=other_pairs(reader, [3])
    )
    exact = positions.sequence_of_N != 1
    expected, stored = dense_logits(model, reader, order), is_stored(positions)
    assert_answers_are_the_teacher_s(answers[exact], expected[exact], stored[exact], STEP)
    bounded = answers[~exact][~stored[~exact]].view(int((~exact).sum()), -1)
    assert torch.equal(bounded, positions.bounds_N[~exact][:, None].expand_as(bounded))


def test_a_sequence_that_stands_twice_in_a_micro_batch_is_run_once(reader, model, teacher_dir, open_ladder):
    ladder = open_ladder(reader, teacher_dir)
    ladder.expect([2, 2, 4])
    assert_are_the_teacher_s(ask(ladder, reader, [2, 2, 4]), reader, model, [2, 2, 4])
    assert ladder.take_counts()[1] == 2


def test_the_teacher_runs_once_for_all_of_a_step_and_not_for_what_is_logged(reader, model, teacher_dir, open_ladder):
    ask(open_ladder(reader, teacher_dir), reader, [3])
    ladder = open_ladder(reader, teacher_dir)
    ladder.expect([0, 2, 3, 5])
    positions = positions_of(reader, indexes=[0, 3])
    ladder.logits_at(positions, positions.token_ids_NK)
    assert ladder.take_counts()[1] == 0  # nothing is missing yet
    first = ask(ladder, reader, [0, 3])
    assert ladder.take_counts() == counts(
        3, cached=cached_pairs(reader, [0, 3]), live=other_pairs(reader, [0]), logged=other_pairs(reader, [3])
    )
    second = ask(ladder, reader, [5, 2])
    assert ladder.take_counts() == counts(0, cached=cached_pairs(reader, [5, 2]), live=other_pairs(reader, [5, 2]))
    assert_are_the_teacher_s(first, reader, model, [0, 3])
    assert_are_the_teacher_s(second, reader, model, [5, 2])
    ladder.expect([2, 5])  # the next epoch
    assert_are_the_teacher_s(ask(ladder, reader, [2, 5]), reader, model, [2, 5])
    assert ladder.take_counts() == counts(0, cached=cached_pairs(reader, [2, 5]), logged=other_pairs(reader, [2, 5]))


def test_what_a_run_logs_another_one_that_is_under_way_does_not_ask_again(reader, model, teacher_dir, open_ladder):
    one, other = open_ladder(reader, teacher_dir), open_ladder(reader, teacher_dir)
    ask(one, reader, [0, 1, 2])
    other.expect([1, 2, 6])
    assert_are_the_teacher_s(ask(other, reader, [1, 2, 6]), reader, model, [1, 2, 6])
    assert other.take_counts() == counts(
        1, cached=cached_pairs(reader, [1, 2, 6]), logged=other_pairs(reader, [1, 2]), live=other_pairs(reader, [6])
    )


def test_without_a_log_the_teacher_is_asked_in_every_step(reader, model, teacher_dir, open_ladder, tmp_path):
    ladder = open_ladder(reader, teacher_dir, log="none")
    for _ in range(2):
        ladder.expect([0, 4])
        assert_are_the_teacher_s(ask(ladder, reader, [0, 4]), reader, model, [0, 4])
        assert ladder.take_counts() == counts(2, cached=cached_pairs(reader, [0, 4]), live=other_pairs(reader, [0, 4]))
    assert not list(tmp_path.iterdir())


def test_what_is_logged_for_one_part_of_the_positions_answers_the_other(
    teacher_dir, sequences, model, tmp_path, open_ladder
):
    reader = dump_tiny_cache(tmp_path / "cache", teacher_dir, sequences, hidden_states=False, positions="all")
    ask(open_ladder(reader, teacher_dir), reader)  # the response's
    ladder, prompt = open_ladder(reader), positions_of(reader, "prompt")
    answers = ladder.logits_at(prompt, every_id(prompt))
    rows = []
    for index in range(len(reader)):
        sequence = reader[index].sequence
        with torch.no_grad():
            logits = model(torch.tensor(sequence.input_ids).long()[None]).logits[0]
        rows += [logits[token - 1] for token in range(1, sequence.num_tokens) if not sequence.loss_mask[token]]
    assert_answers_are_the_teacher_s(answers, torch.stack(rows), is_stored(prompt), STEP)
    assert ladder.take_counts()[1] == 0


# Whole rows


def test_whole_rows_are_the_teacher_s_from_every_tier(reader, reader_with_states, model, teacher_dir, open_ladder):
    expected = dense_logits(model, reader)
    for of, teacher, forwards in ((reader_with_states, None, 0), (reader, teacher_dir, 7), (reader, None, 0)):
        ladder, positions = open_ladder(of, teacher), positions_of(of)
        for chunk in (slice(0, 5), slice(5, 6), slice(6, len(positions))):
            torch.testing.assert_close(ladder.rows(positions, chunk), expected[chunk], rtol=1e-5, atol=1e-4)
        assert ladder.take_counts() == counts(forwards)


def test_whole_rows_of_logged_and_live_sequences_share_a_micro_batch(reader, model, teacher_dir, open_ladder):
    ask(open_ladder(reader, teacher_dir), reader, [5, 1])
    ladder, order = open_ladder(reader, teacher_dir), [1, 2, 5]
    positions, expected = positions_of(reader, indexes=order), dense_logits(model, reader, order)
    for chunk in (slice(0, 3), slice(3, len(positions))):
        torch.testing.assert_close(ladder.rows(positions, chunk), expected[chunk], rtol=1e-5, atol=1e-4)
    assert ladder.take_counts()[1] == 1
    with pytest.raises(InputError, match="whole rows"):
        open_ladder(reader, on_miss="bound").rows(positions_of(reader, indexes=[1, 3]), slice(0, 1))


# A log of answers


def ahead_of(model, reader, indexes, log):
    """Stands for the student's highest ids: those the teacher ranks lowest, which no cache stores."""

    def ahead(num_ids):
        log.append(num_ids)
        return exact_top_k(-dense_logits(model, reader, indexes), num_ids)[1]

    return ahead


@pytest.mark.parametrize("fetch_ahead", [0, 5])
def test_a_log_of_answers_knows_what_was_asked_and_fetched_ahead(reader, model, teacher_dir, open_ladder, fetch_ahead):
    order, asked_ahead = [4, 1, 6], []
    positions = positions_of(reader, indexes=order)
    ids = torch.randint(VOCAB_SIZE, (len(positions), 9), generator=torch.Generator().manual_seed(0))
    stored = is_stored(positions).gather(1, ids)
    ladder = open_ladder(reader, teacher_dir, log="logits", fetch_ahead=fetch_ahead)
    first = ask(ladder, reader, order, ids, ahead_of(model, reader, order, asked_ahead))
    assert ladder.take_counts() == counts(3, cached=int(stored.sum()), live=int((~stored).sum()))
    assert asked_ahead == ([fetch_ahead] if fetch_ahead else [])

    later = open_ladder(reader, on_miss="bound")
    assert torch.equal(ask(later, reader, order, ids), first)
    assert later.take_counts() == counts(cached=int(stored.sum()), logged=int((~stored).sum()))
    if fetch_ahead:
        lowest = exact_top_k(-dense_logits(model, reader, order), fetch_ahead)[1]
        expected = dense_logits(model, reader, order).gather(1, lowest)
        torch.testing.assert_close(ask(later, reader, order, lowest), expected, rtol=1e-5, atol=1e-5)
        assert later.take_counts()[0]["bound"] == 0

    # Anything else is the bound's, pair by pair.
    answers, known = ask(later, reader, order), torch.zeros(len(positions), VOCAB_SIZE, dtype=torch.bool)
    known.scatter_(1, ids, True)
    if fetch_ahead:
        known.scatter_(1, lowest, True)
    known &= ~is_stored(positions)
    assert later.take_counts() == counts(
        cached=cached_pairs(reader, order),
        logged=int(known.sum()),
        bound=other_pairs(reader, order) - int(known.sum()),
    )
    rest = ~known & ~is_stored(positions)
    assert torch.equal(answers[rest], positions.bounds_N[:, None].expand_as(answers)[rest])
    with pytest.raises(InputError, match="give --teacher or --on-miss bound"):
        ask(open_ladder(reader), reader, order)


def test_a_log_of_answers_asks_for_the_sequences_that_miss_and_no_others(reader, model, teacher_dir, open_ladder):
    positions = positions_of(reader, indexes=[0, 2])
    ladder = open_ladder(reader, teacher_dir, log="logits", fetch_ahead=0)
    ladder.expect([0, 2, 5])
    lowest = exact_top_k(-dense_logits(model, reader, [0, 2]), 3)[1]
    ids = torch.where((positions.sequence_of_N == 0)[:, None], lowest, positions.token_ids_NK[:, :3])
    ask(ladder, reader, [0, 2], ids)
    assert ladder.take_counts()[1] == 1  # of sequence 2 only stored ids were asked
    ladder.expect([0, 2, 5])
    ask(ladder, reader, [0, 2], lowest)
    assert ladder.take_counts() == counts(1, logged=3 * num_positions(reader, [0]), live=3 * num_positions(reader, [2]))
    ladder.expect([0, 2, 5])
    answers = ask(ladder, reader, [0, 2], lowest)
    assert ladder.take_counts() == counts(logged=3 * len(positions))
    expected = dense_logits(model, reader, [0, 2]).gather(1, lowest)
    assert float((answers - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_what_a_teacher_says_twice_in_a_step_is_logged_twice(reader, model, teacher_dir, open_ladder, tmp_path):
    """Two losses ask of one sequence, one after the other: the second finds the teacher's states at hand."""
    lowest = exact_top_k(-dense_logits(model, reader, [2]), 6)[1]
    ladder = open_ladder(reader, teacher_dir, log="logits", fetch_ahead=0)
    ladder.expect([2])
    for ids in lowest.split(3, dim=1):
        ask(ladder, reader, [2], ids)
    assert ladder.take_counts() == counts(1, live=lowest.numel())
    later = open_ladder(reader, on_miss="bound")
    ask(later, reader, [2], lowest)
    assert later.take_counts() == counts(logged=lowest.numel())


def test_hidden_states_are_not_logged_beside_answers_nor_ids_fetched_beside_hidden_states(
    reader, model, teacher_dir, open_ladder, tmp_path
):
    for log, index, kinds in (("logits", 3, ["logits"]), ("hidden", 4, ["hidden", "logits"])):
        asked_ahead = []
        ladder = open_ladder(reader, teacher_dir, log=log)
        ask(ladder, reader, [index], ahead=ahead_of(model, reader, [index], asked_ahead))
        assert ladder.take_counts()[1] == 1
        assert asked_ahead == ([64] if log == "logits" else [])
        assert sorted(receipt.kind for receipt in log_of(reader, tmp_path).files().values()) == kinds
        assert (lookups_dir(reader, tmp_path) / "lm_head.safetensors").exists() == (log == "hidden")


# What does not fit


def rewritten_head(reader, tmp_path, change):
    """Change the head beside the log. Returns its path."""
    path = lookups_dir(reader, tmp_path) / "lm_head.safetensors"
    head = load_head(path, CPU)
    save_head(dataclasses.replace(head, weight_VD=change(head.weight_VD)), path)
    return path


def test_a_log_is_not_read_with_another_head(reader, teacher_dir, open_ladder, tmp_path):
    ask(open_ladder(reader, teacher_dir), reader)
    rewritten_head(reader, tmp_path, lambda weight: weight * 1.0001)
    for teacher in (None, teacher_dir):
        with pytest.raises(CacheCorruptError, match="is not the head that the log was written with"):
            open_ladder(reader, teacher)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight * 1.02,
        lambda weight: weight.flip(0),
        lambda weight: weight + 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)),
        lambda weight: weight.index_fill(0, torch.arange(weight.shape[0]), torch.nan),
    ],
    ids=["scaled", "reversed", "perturbed", "not a number"],
)
def test_a_head_that_its_log_vouches_for_must_give_the_stored_logits(
    reader, teacher_dir, open_ladder, tmp_path, change
):
    ask(open_ladder(reader, teacher_dir), reader)
    before = sha256_of(lookups_dir(reader, tmp_path) / "lm_head.safetensors")
    after = sha256_of(rewritten_head(reader, tmp_path, change))
    for receipt in lookups_dir(reader, tmp_path).glob("*/*.json"):
        assert before in receipt.read_text()
        receipt.write_text(receipt.read_text().replace(before, after))
    with pytest.raises(CacheCorruptError, match="does not belong to the log beside it"):
        open_ladder(reader)


def test_a_run_that_is_killed_while_it_writes_the_head_leaves_it_to_a_compaction(
    reader, teacher_dir, open_ladder, tmp_path, monkeypatch
):
    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        patched.setattr("cache_schema.storage._discard", lambda temporary: None)  # nor does a kill
        with pytest.raises(KeyboardInterrupt):
            open_ladder(reader, teacher_dir)
    log_dir = lookups_dir(reader, tmp_path)
    open_ladder.close()
    assert [path.name.split(".")[1] for path in log_dir.glob("*/.*")] == ["lm_head"]
    compact(reader, log_dir)
    assert not log_dir.exists()


def test_a_head_that_is_gone_is_written_again_by_a_run_with_the_teacher(
    reader, model, teacher_dir, open_ladder, tmp_path
):
    ask(open_ladder(reader, teacher_dir), reader)
    head = lookups_dir(reader, tmp_path) / "lm_head.safetensors"
    whole = head.read_bytes()
    head.unlink()
    with pytest.raises(CacheCorruptError, match=r"lm_head.safetensors is gone.*give --teacher"):
        ask(open_ladder(reader), reader)
    ladder = open_ladder(reader, teacher_dir)
    assert head.read_bytes() == whole
    assert_are_the_teacher_s(ask(ladder, reader), reader, model)
    assert ladder.take_counts()[1] == 0
    assert_are_the_teacher_s(ask(open_ladder(reader), reader), reader, model)


def test_a_cache_that_lost_its_hidden_states_is_asked_live_and_logged_under_its_own_head(
    teacher_dir, sequences, model, tmp_path, open_ladder
):
    reader = dump_tiny_cache(tmp_path / "cache", teacher_dir, sequences)
    for path in (tmp_path / "cache").glob("*.hidden.parquet"):
        path.unlink()
    reader = CacheReader(reader.cache_dir)
    for teacher, forwards in ((teacher_dir, len(reader)), (None, 0)):
        ladder = open_ladder(reader, teacher)
        assert_are_the_teacher_s(ask(ladder, reader), reader, model)
        assert ladder.take_counts()[1] == forwards
    assert not (lookups_dir(reader, tmp_path) / "lm_head.safetensors").exists()


def test_a_teacher_that_no_longer_says_what_the_cache_holds_is_refused_and_nothing_logged(
    reader, teacher_dir, tmp_path
):
    """Its files are the cache's; what has changed is what becomes of them."""
    teacher = load_teacher(teacher_dir, reader.plan)
    teacher._model.model.norm.weight.mul_(1.01)
    written = []
    states = TeacherStates(reader, teacher.lm_head, live=LiveTeacher(reader, teacher), writer=written)
    with pytest.raises(CacheMismatchError, match="gives other logits than"):
        ask(Ladder(states), reader)
    assert not written


def test_a_teacher_of_other_weights_is_refused_before_it_runs(reader, teacher_dir, tmp_path, open_ladder):
    other = tmp_path / "other"
    other.mkdir()
    for path in teacher_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CacheMismatchError, match="its fingerprint is"):
        open_ladder(reader, other)


# Pairs


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("way", ["gathered", "dense", "by size"])
def test_single_pairs_are_those_of_whole_rows(monkeypatch, options, way):
    head, hidden = random_head(**options), random_hidden()
    if way != "by size":
        monkeypatch.setattr(lm_head, "_DENSE_PRODUCTS_PER_GATHER", 0 if way == "gathered" else 10**9)
        unwanted = "float32_matmul" if way == "gathered" else "chunks"
        monkeypatch.setattr(lm_head, unwanted, None)  # the other way would fail
        if way == "gathered":
            monkeypatch.setattr(lm_head, "CHUNK_BYTES", 7 * 8 * 16)
    expected = numpy_logits(head, hidden)
    generator = torch.Generator().manual_seed(0)
    for num_pairs, num_ids in ((1, 101), (2, 101), (300, 101), (40, 3), (7 * 4, 101)):
        rows = torch.randint(23, (num_pairs,), generator=generator)
        ids = torch.randint(num_ids, (num_pairs,), generator=generator)
        pairs = head.logits_of_pairs(hidden, rows, ids)
        assert pairs.dtype == torch.float32
        np.testing.assert_allclose(pairs.numpy(), expected[rows, ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_single_pairs_of_half_precision_are_accumulated_in_float32_both_ways(monkeypatch, dtype):
    head, hidden = random_head(dtype=dtype, **HEADS["everything"]), random_hidden(dtype=dtype)
    expected, rows, ids = numpy_logits(head, hidden), torch.arange(23), torch.arange(23) % 5
    for products in (0, 10**9):
        monkeypatch.setattr(lm_head, "_DENSE_PRODUCTS_PER_GATHER", products)
        np.testing.assert_allclose(
            head.logits_of_pairs(hidden, rows, ids).numpy(), expected[rows, ids], rtol=1e-5, atol=1e-5
        )


def test_a_log_elsewhere_has_its_head_though_the_cache_has_one_in_its_own_log(
    reader, teacher_dir, open_ladder, tmp_path
):
    """The directory may serve another copy of the cache, which has no log of its own."""
    own = lookups_dir(reader)
    try:
        ask(open_ladder(reader, teacher_dir, dir=None), reader, [0])
        assert (own / "lm_head.safetensors").exists()
        ask(open_ladder(reader, teacher_dir), reader, [0, 1])
        assert (lookups_dir(reader, tmp_path) / "lm_head.safetensors").exists()
    finally:
        open_ladder.close()
        shutil.rmtree(own)
    ladder = open_ladder(reader, on_miss="bound")
    ask(ladder, reader, [0, 1])
    logged = other_pairs(reader, [1])  # sequence 0 was in the cache's own log, and was not asked for again
    assert ladder.take_counts() == counts(
        cached=cached_pairs(reader, [0, 1]), logged=logged, bound=other_pairs(reader, [0])
    )


def test_whole_rows_come_to_the_positions_device_wherever_the_head_is(reader_with_states):
    """``meta`` stands for a device other than the student's: it computes shapes alone."""
    head = stored_head(reader_with_states, CPU)
    elsewhere = Ladder(TeacherStates(reader_with_states, head.to(torch.device("meta"))))
    positions = positions_of(reader_with_states, indexes=[0, 1])
    moved = dataclasses.replace(positions, labels_N=positions.labels_N.to("meta"))
    assert elsewhere.rows(moved, slice(0, 2)).device.type == "meta"
    with pytest.raises(NotImplementedError, match="meta"):  # the copy to the CPU is what cannot be done
        elsewhere.rows(positions, slice(0, 2))
