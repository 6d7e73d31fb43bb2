"""A dump: what it refuses of a teacher, what it stores when, and what it leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, GPT2Config, LlamaConfig

from cache_schema import CacheReader, verify
from cache_schema.plan import Generation
from cache_schema.sequence import TokenSequence
from tests.caches import content
from tests.command_line import pipeline
from tests.conftest import dump as dump_by_command
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_cache import dump_tiny_cache, load_teacher, random_sequences
from tests.tiny_models import save_tiny_llama, save_tiny_model
from workers.errors import InputError
from workers.teacher.batches import batches, score_batch
from workers.teacher.checkpoint import context_length, end_token_ids, load_model, read_text_config
from workers.teacher.dump import dump
from workers.teacher.scoring import score
from workers.tokenizers import load_tokenizer

SEQUENCES = random_sequences()


class StoppingTeacher:
    """The teacher, until it has read ``num_batches`` batches."""

    def __init__(self, teacher, num_batches):
        self.identity, self.engine, self.lm_head = teacher.identity, teacher.engine, teacher.lm_head
        self._teacher, self._left = teacher, num_batches

    def hidden_states(self, batch, positions):
        if self._left == 0:
            raise RuntimeError("stopped")
        self._left -= 1
        return self._teacher.hidden_states(batch, positions)


class UnsavableTokenizer:
    def save_pretrained(self, folder):
        raise OSError(28, "No space left on device", str(folder))


@pytest.fixture(scope="module")
def finished(teacher_dir, tmp_path_factory):
    return dump_tiny_cache(tmp_path_factory.mktemp("caches") / "finished", teacher_dir, SEQUENCES)


def dump_again(folder, reader, teacher_dir, *, plan=None, num_batches=-1, progress=None, tokenizer=None):
    plan = plan or reader.plan
    teacher = StoppingTeacher(load_teacher(teacher_dir, plan), num_batches)
    return dump(folder, plan, SEQUENCES, teacher, tokenizer or load_tokenizer(str(teacher_dir)), progress)


def renamed(plan):
    return plan.model_copy(update={"teacher": plan.teacher.model_copy(update={"name": "moved"})})


# ---- the teacher's files ----


def change_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_checkpoint_with_all_its_weights_loads_tied_or_not(tmp_path):
    for tied in (True, False):
        folder = save_tiny_llama(tmp_path / str(tied), tiny_tokenizer(), tie_word_embeddings=tied)
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
        assert not load_model(str(folder), torch.float32).training


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_checkpoint_without_a_weight_is_refused_by_its_name(tmp_path, name):
    folder = save_tiny_llama(tmp_path, tiny_tokenizer(), tie_word_embeddings=False)
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(InputError, match=rf"has no weight {name} .*\(1 such weights\), so it would be random"):
        load_model(str(folder), torch.float32)


def test_a_weight_of_another_shape_is_refused(tmp_path):
    folder = save_tiny_llama(tmp_path, tiny_tokenizer())
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(InputError):
        load_model(str(folder), torch.float32)


@pytest.mark.parametrize(
    ("generation", "ids"),
    [
        (None, (2,)),
        ({}, (2,)),
        ({"eos_token_id": None}, (2,)),
        ({"eos_token_id": 2}, (2,)),
        ({"eos_token_id": 0}, (0, 2)),
        ({"eos_token_id": [9, 2, 7, 9]}, (2, 7, 9)),
    ],
)
def test_a_response_ends_at_the_tokenizer_s_eos_and_at_the_generation_config_s(tmp_path, generation, ids):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_token_ids(tmp_path, tiny_tokenizer()) == ids


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}', '{"eos_token_id": -1}', "[2]", "{"]
)
def test_a_bad_generation_config_is_refused(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        end_token_ids(tmp_path, tiny_tokenizer())


def test_width_and_context_are_found_under_any_family_s_names(tmp_path):
    save_tiny_model(tmp_path / "gpt2", tiny_tokenizer(), GPT2Config, max_position_embeddings=77)
    assert "hidden_size" not in json.loads((tmp_path / "gpt2" / "config.json").read_text())
    text = {"hidden_size": 24, "max_position_embeddings": 99, "num_hidden_layers": 1}
    Gemma3Config(text_config=text).save_pretrained(tmp_path / "nested")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert (context_length(tmp_path / "gpt2"), read_text_config(tmp_path / "gpt2").hidden_size) == (77, 32)
    assert (context_length(tmp_path / "nested"), read_text_config(tmp_path / "nested").hidden_size) == (99, 24)
    assert context_length(tmp_path / "llama") == 2048


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no-such-model"}', "[]"])
def test_a_config_of_no_known_model_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json is no config of a language model.*Give the folder"):
        context_length(tmp_path)


# ---- batches ----


def sequence_of(num_tokens, first=0):
    return TokenSequence(np.arange(first, first + num_tokens, dtype=np.int32), np.arange(num_tokens) > 0, "rows")


@pytest.mark.parametrize(
    ("extra", "sizes"),
    [(0, [[9, 8], [7, 4], [3, 2]]), (10, [[9], [8], [7], [4], [3], [2]]), (5, [[9], [8], [7], [4, 3], [2]])],
)
def test_a_batch_holds_what_fits_with_the_tokens_still_to_come(extra, sizes):
    sequences = [sequence_of(num_tokens) for num_tokens in (3, 9, 2, 7, 4, 8)]
    found = [[sequence.num_tokens for sequence in batch] for batch in batches(sequences, 18, extra=extra)]
    assert found == sizes


def test_a_sequence_too_long_for_a_batch_is_a_batch():
    assert [len(batch) for batch in batches([sequence_of(9), sequence_of(5), sequence_of(4)], 3, extra=100)] == [
        1,
        1,
        1,
    ]
    assert list(batches([], 3)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_is_scored_as_its_sequences_one_by_one(teacher_dir, dtype, tmp_path):
    reader = dump_tiny_cache(tmp_path / "cache", teacher_dir, SEQUENCES, dtype=dtype)
    teacher = load_teacher(teacher_dir, reader.plan)
    states = teacher.hidden_states(SEQUENCES, "response")
    for scored, hidden in zip(
        score_batch(reader.plan, SEQUENCES, states, teacher.lm_head).to_host(), states, strict=True
    ):
        labels = torch.tensor(scored.sequence.input_ids[1:][scored.sequence.loss_mask[1:]]).long()
        alone = score(teacher.lm_head, hidden, labels, 8, reader.plan.temperatures)
        assert scored.rows.token_ids.tolist() == alone.token_ids_NK.tolist()
        for name, expected in (
            ("logits", alone.logits_NK),
            ("tail_logsumexp", alone.tail_logsumexp_NR),
            ("label_logit", alone.label_logit_N),
            ("row_mean", alone.row_mean_N),
            ("row_std", alone.row_std_N),
        ):
            # A matmul of other shape may add in another order.
            np.testing.assert_allclose(getattr(scored.rows, name), expected.numpy(), rtol=1e-5, atol=1e-5)
        bits = hidden.view(torch.uint16) if dtype == "bfloat16" else hidden
        assert scored.hidden_states.tobytes() == bits.numpy().tobytes()


# ---- what is stored when ----


def test_tokenizer_and_head_are_stored_before_the_first_shard_is_scored(teacher_dir, finished, tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        dump_again(tmp_path / "cache", finished, teacher_dir, num_batches=0)
    stored = content(tmp_path / "cache")
    assert {"plan.json", "lm_head.safetensors", "tokenizer/tokenizer.json"} <= stored.keys()
    assert not [name for name in stored if name.startswith("shard")]
    assert stored.items() <= content(finished.cache_dir).items()


def test_a_tokenizer_that_cannot_be_stored_costs_no_scoring(teacher_dir, finished, tmp_path):
    with pytest.raises(Exception, match="tokenizer cannot be written: No space left on device"):
        dump_again(tmp_path / "cache", finished, teacher_dir, num_batches=0, tokenizer=UnsavableTokenizer())


def test_chat_templates_in_a_folder_are_stored_and_verified(tmp_path):
    tokenizer = tiny_tokenizer(chat_template={"default": CHATML, "tool_use": CHATML + "{# tools #}"})
    teacher = save_tiny_llama(tmp_path / "teacher", tokenizer)
    reader = dump_tiny_cache(tmp_path / "cache", teacher, SEQUENCES)
    assert "tokenizer/additional_chat_templates/tool_use.jinja" in {file.name for file in reader.manifest.files}
    assert verify(tmp_path / "cache").ok
    assert load_tokenizer(str(reader.tokenizer_dir)).chat_template == tokenizer.chat_template


def test_what_killed_dumps_left_is_gone_after_the_next_one(teacher_dir, finished, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="stopped"):
        dump_again(folder, finished, teacher_dir, num_batches=2)
    assert (folder / "shard-00000.json").exists()
    names = ["plan.json", "manifest.json", "lm_head.safetensors", "shard-00001.parquet", "shard-00001.hidden.parquet"]
    for name in [*names, "shard-00002.json"]:
        (folder / f".{name}.0123abcd.tmp").write_text("half")
    (folder / ".tokenizer.0123abcd.tmp").mkdir()
    (folder / ".tokenizer.0123abcd.tmp" / "tokenizer.json").write_text("half")
    dump_again(folder, finished, teacher_dir)
    assert content(folder) == content(finished.cache_dir)
    assert sorted(path.name for path in folder.iterdir()) == sorted(p.name for p in finished.cache_dir.iterdir())


def test_leftovers_of_a_plan_make_no_foreign_directory(teacher_dir, finished, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".plan.json.0123abcd.tmp").write_text("half")
    dump_again(tmp_path / "cache", finished, teacher_dir)
    assert content(tmp_path / "cache") == content(finished.cache_dir)


def test_a_dump_goes_on_under_a_renamed_teacher_and_keeps_its_plan(teacher_dir, finished, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="stopped"):
        dump_again(folder, finished, teacher_dir, num_batches=2)
    dump_again(folder, finished, teacher_dir, plan=renamed(finished.plan))
    assert content(folder) == content(finished.cache_dir)
    assert CacheReader(folder).plan.teacher.name == finished.plan.teacher.name


def test_a_finished_cache_is_not_written_again(teacher_dir, finished, tmp_path):
    folder = shutil.copytree(finished.cache_dir, tmp_path / "cache")
    (folder / "shard-00001.hidden.parquet").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert dump_again(folder, finished, teacher_dir, num_batches=0) == finished.manifest
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_plan_names_the_versions_that_decide_the_bytes(cache_dir):
    versions = CacheReader(cache_dir).plan.engine.versions
    assert versions.keys() == {"logit-cache", "torch", "transformers", "pyarrow", "safetensors"}


# ---- responses by the teacher ----


def test_a_response_stops_at_any_end_id(teacher_dir, data_file, tmp_path):
    teacher = shutil.copytree(teacher_dir, tmp_path / "teacher")
    ends = list(range(100, 160))
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    respond = ["--responses", "teacher", "--set", "responses.max_new_tokens=12"]
    reader = CacheReader(dump_by_command(teacher, data_file, tmp_path / "cache", *respond))
    assert reader.plan.responses.end_token_ids == (2, *ends)
    lengths = set()
    for scored in reader:
        response = scored.sequence.input_ids[scored.sequence.loss_mask].tolist()
        assert not set(response[:-1]) & {2, *ends}
        assert response[-1] in {2, *ends} or len(response) == 12
        lengths.add(len(response))
    assert min(lengths) < 12
    other = shutil.copytree(teacher_dir, tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": ends[:-1]}))
    result = pipeline("teacher-dump", "--teacher", other, "--data", data_file, "--out", tmp_path / "cache",
        "--top-k", 16, "--set", "data.max_tokens=128", "--set", "cache.sequences_per_shard=8", *respond)  # fmt: skip
    assert result.code == 1
    assert "responses.end_token_ids is" in result.err


@pytest.mark.parametrize("responds", [False, True])
def test_progress_ends_with_the_work_and_counts_answers(teacher_dir, finished, tmp_path, responds):
    plan, calls = finished.plan, []
    sequences = SEQUENCES
    if responds:
        generation = Generation(max_new_tokens=3, temperature=0.0, top_p=1.0, seed=0, end_token_ids=())
        plan = plan.model_copy(update={"responses": generation})
        sequences = [sequence_of(6, first) for first in range(len(SEQUENCES))]
    teacher, tokenizer = load_teacher(teacher_dir, plan), load_tokenizer(str(teacher_dir))
    dump(tmp_path / "cache", plan, sequences, teacher, tokenizer, calls.append)
    total = len(SEQUENCES) * (2 if responds else 1)
    assert {progress.total for progress in calls} == {total}
    assert calls[-1].done == total
    assert calls[-1].sequences == len(SEQUENCES)
    assert calls[-1].tokens == CacheReader(tmp_path / "cache").manifest.num_tokens
    assert calls[-1].shards == calls[-1].num_shards == plan.num_shards
    assert all(earlier.done <= later.done and earlier.shards <= later.shards for earlier, later in pairwise(calls))
    assert verify(tmp_path / "cache").ok


# ---- a compiled body ----


@pytest.mark.slow
def test_a_compiled_body_gives_the_same_hidden_states_for_batches_of_any_shape(teacher_dir, finished):
    plan = finished.plan
    compiled = plan.model_copy(update={"engine": plan.engine.model_copy(update={"compiled": True})})
    teachers = [load_teacher(teacher_dir, one) for one in (plan, compiled)]
    for batch in (SEQUENCES, SEQUENCES[:1], SEQUENCES[2:4]):
        plain, fast = (teacher.hidden_states(batch, "all") for teacher in teachers)
        for ours, theirs in zip(plain, fast, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_body_that_cannot_be_compiled_is_one_error(teacher_dir, data_file, tmp_path):
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    command = [sys.executable, "-m", "pipeline", "teacher-dump", "--teacher", teacher_dir, "--data", data_file,
               "--out", tmp_path / "cache", "--set", "engine.compile=true"]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: engine.compile=true: LlamaModel cannot be compiled here" in done.stderr
    assert "leave engine.compile out" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()
