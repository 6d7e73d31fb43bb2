"""A tokenizer's identity is its content, and a student must share it."""

import json

import pytest
from tokenizers import AddedToken, models, normalizers, processors
from transformers import ByT5Tokenizer

from cache_schema.errors import CacheMismatchError
from tests.tiny import CHATML, CHATML_WITH_GENERATION, tiny_tokenizer
from workers.errors import InputError
from workers.tokenizers import (
    chat_template_fingerprint,
    check_same_vocabulary,
    load_tokenizer,
    tokenizer_fingerprint,
    vocab_size,
)


def with_model(**changes):
    """The tiny tokenizer with parts of its BPE model replaced."""
    tokenizer = tiny_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    parts = {"vocab": model["vocab"], "merges": merges} | changes
    tokenizer.backend_tokenizer.model = models.BPE(**parts)
    return tokenizer


# ---- loading ----


def test_a_saved_tokenizer_is_loaded_from_its_folder(tmp_path):
    saved = tiny_tokenizer(bos=True, chat_template=CHATML)
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "What is two plus three?"
    assert loaded(text).input_ids == saved(text).input_ids
    assert loaded.chat_template == CHATML


def test_a_missing_folder_is_refused_with_its_path_and_without_a_network(tmp_path):
    with pytest.raises(InputError, match=r"no model folder .*/teachers/none: give a folder"):
        load_tokenizer(str(tmp_path / "teachers/none"))


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="is a file: give the model folder"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({}, id="an empty folder"),
        pytest.param({"config.json": '{"model_type": "qwen2"}'}, id="a config without a tokenizer"),
        pytest.param({"tokenizer.json": '{"model": '}, id="a truncated tokenizer.json"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused_with_the_files_it_needs(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"holds no tokenizer.*tokenizer\.json and tokenizer_config\.json") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_without_a_fast_version_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"ByT5Tokenizer.* has no fast version"):
        load_tokenizer(str(tmp_path))


# ---- identity ----


def test_a_fingerprint_survives_saving_and_loading(tmp_path):
    tokenizer = tiny_tokenizer(bos=True, chat_template=CHATML)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(tokenizer)


def test_a_fingerprint_does_not_change_as_the_tokenizer_is_used(tmp_path):
    tokenizer = tiny_tokenizer()
    fresh = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == fresh
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is not None
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == fresh


def test_every_part_that_decides_token_ids_changes_the_fingerprint():
    with_normalizer, with_added, with_post_processor = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    with_normalizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with_added.add_tokens([AddedToken("<think>")])
    with_post_processor.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizers = [
        tiny_tokenizer(),
        tiny_tokenizer(corpus=("other words make other merges",)),
        tiny_tokenizer(eos=False),
        with_model(merges=[]),
        with_normalizer,
        with_added,
        with_post_processor,
    ]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) == len(tokenizers)


def test_a_chat_template_has_a_fingerprint_of_its_own():
    plain, marked = tiny_tokenizer(chat_template=CHATML), tiny_tokenizer(chat_template=CHATML_WITH_GENERATION)
    assert chat_template_fingerprint(tiny_tokenizer()) is None
    assert chat_template_fingerprint(plain) == chat_template_fingerprint(tiny_tokenizer(chat_template=CHATML))
    assert chat_template_fingerprint(plain) != chat_template_fingerprint(marked)
    assert tokenizer_fingerprint(plain) == tokenizer_fingerprint(marked)


def test_the_vocabulary_ends_after_the_highest_added_token():
    tokenizer = tiny_tokenizer()
    num_trained = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    tokenizer.add_tokens(["<one>", "<two>"])
    assert vocab_size(tokenizer) == num_trained + 2 == tokenizer.convert_tokens_to_ids("<two>") + 1


# ---- comparison ----


def test_a_base_student_of_an_instruct_teacher_is_accepted():
    teacher, student = tiny_tokenizer(chat_template=CHATML), tiny_tokenizer()
    student.eos_token, student.pad_token, student.bos_token = "<|pad|>", "<|im_end|>", "<|im_start|>"
    student.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    student(["a", "a longer text"], padding=True, truncation=True, max_length=2)
    check_same_vocabulary(teacher, student)


def test_the_first_token_that_differs_is_named_with_both_meanings():
    teacher = tiny_tokenizer()
    model = json.loads(teacher.backend_tokenizer.to_str())["model"]
    swapped = {token: {300: 301, 301: 300}.get(token_id, token_id) for token, token_id in model["vocab"].items()}
    student = with_model(vocab=swapped)
    ours, theirs = teacher.convert_ids_to_tokens([300, 301])
    with pytest.raises(CacheMismatchError, match="Use a student with the cache's tokenizer") as caught:
        check_same_vocabulary(teacher, student)
    assert f"token id 300 is {ours!r} in the cache's tokenizer and {theirs!r} in the student's" in str(caught.value)


def test_a_token_that_one_of_them_lacks_is_named_as_nothing():
    teacher, student = tiny_tokenizer(), tiny_tokenizer()
    student.add_tokens(["<tool>"])
    with pytest.raises(CacheMismatchError, match=r"token id 384 is nothing in the cache's .* and '<tool>' in"):
        check_same_vocabulary(teacher, student)
    with pytest.raises(CacheMismatchError, match=r"token id 384 is '<tool>' in the cache's .* and nothing in"):
        check_same_vocabulary(student, teacher)


def test_the_same_tokens_merged_otherwise_are_refused():
    with pytest.raises(CacheMismatchError, match=r"splits text into them otherwise .*merges differs"):
        check_same_vocabulary(tiny_tokenizer(), with_model(merges=[]))


@pytest.mark.parametrize("by", ["folder", "again"])
def test_what_is_saved_of_a_tokenizer_does_not_say_how_it_was_found(tmp_path, monkeypatch, by):
    tiny_tokenizer().save_pretrained(tmp_path / "given")
    saved = []
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        tokenizer = load_tokenizer(str(tmp_path / "given"))
        assert "local_files_only" not in tokenizer.init_kwargs
        tokenizer.save_pretrained(tmp_path / str(offline))
        if by == "again":
            load_tokenizer(str(tmp_path / str(offline))).save_pretrained(tmp_path / str(offline))
        saved.append({path.name: path.read_bytes() for path in (tmp_path / str(offline)).iterdir()})
    assert saved[0] == saved[1]
