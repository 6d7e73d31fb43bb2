"""Rows become token sequences once: which tokens, which of them trained, and where they are cut."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from tests.tiny import BOS, CHATML, CHATML_WITH_GENERATION, EOS, tiny_tokenizer
from workers.errors import InputError
from workers.teacher.sequences import read_sequences

QUESTION = {"prompt": "What is two plus three? ", "response": "Two plus three is five."}
CHAT = [
    {"role": "system", "content": "answer"},
    {"role": "user", "content": "What is two plus three?"},
    {"role": "assistant", "content": " five\n"},
    {"role": "user", "content": "the capital of France?"},
    {"role": "assistant", "content": "Paris"},
]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(data, tokenizer, **options):
    defaults = {"max_tokens": 128, "responses": "dataset", "max_new_tokens": 16, "limit": None}
    return read_sequences(str(data), tokenizer, **(defaults | options))


@pytest.fixture
def read_row(tmp_path):
    """Read a data set of one row and return its sequence."""

    def read_one(row, tokenizer, **options):
        (sequence,) = read(write_jsonl(tmp_path / "one.jsonl", [row]), tokenizer, **options).sequences
        return sequence

    return read_one


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def trained_text(tokenizer, sequence):
    return tokenizer.decode(sequence.input_ids[sequence.loss_mask])


# ---- prompt and response ----


def test_prompt_and_response_are_tokenized_apart_and_the_response_and_eos_are_trained(tokenizer, read_row):
    sequence = read_row({"prompt": "the tea", "response": "cher"}, tokenizer)
    prompt, response = ids(tokenizer, "the tea"), ids(tokenizer, "cher")
    assert prompt + response != ids(tokenizer, "the teacher")  # together they would have merged
    assert sequence.input_ids.tolist() == [*prompt, *response, tokenizer.eos_token_id]
    assert sequence.loss_mask.tolist() == [False] * len(prompt) + [True] * (len(response) + 1)
    assert sequence.input_ids.dtype == np.int32


@pytest.mark.parametrize("appends_eos", [False, True])
def test_a_prompt_begins_with_the_tokenizers_own_bos_and_never_ends_with_its_eos(read_row, appends_eos):
    tokenizer = tiny_tokenizer(bos=True, appends_eos=appends_eos)
    sequence = read_row(QUESTION, tokenizer)
    assert tokenizer.decode(sequence.input_ids) == BOS + QUESTION["prompt"] + QUESTION["response"] + EOS
    assert trained_text(tokenizer, sequence) == QUESTION["response"] + EOS


def test_a_response_too_long_is_cut_on_the_right_without_eos_and_counted(tokenizer, tmp_path):
    prompt, response = ids(tokenizer, QUESTION["prompt"]), ids(tokenizer, QUESTION["response"])
    whole = len(prompt) + len(response) + 1
    data = write_jsonl(tmp_path / "data.jsonl", [QUESTION])
    uncut = read(data, tokenizer, max_tokens=whole)
    cut = read(data, tokenizer, max_tokens=whole - 1)
    assert (uncut.num_truncated, cut.num_truncated) == (0, 1)
    assert uncut.sequences[0].input_ids[-1] == tokenizer.eos_token_id
    assert cut.sequences[0].input_ids.tolist() == prompt + response
    assert cut.sequences[0].loss_mask.sum() == len(response)


def test_a_prompt_that_fills_the_context_is_refused_with_its_row(tokenizer, tmp_path):
    prompt = ids(tokenizer, QUESTION["prompt"])
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "response": "b"}, QUESTION])
    assert read(data, tokenizer, max_tokens=len(prompt) + 1).sequences[1].loss_mask.sum() == 1
    with pytest.raises(InputError, match=r"row 2 of data\.jsonl .*`--set data\.max_tokens=N`.* drop the row") as caught:
        read(data, tokenizer, max_tokens=len(prompt))
    assert f"prompt of {len(prompt)} tokens" in str(caught.value)
    assert f"max_tokens={len(prompt)}" in str(caught.value)


def test_an_empty_prompt_leaves_the_first_response_token_untrained(tokenizer, read_row):
    sequence = read_row({"prompt": "", "response": "Paris"}, tokenizer)
    assert sequence.loss_mask.tolist() == [False] + [True] * (sequence.num_tokens - 1)


@pytest.mark.parametrize("row", [{"prompt": "a", "response": ""}, {"text": ""}])
def test_an_empty_response_is_refused_with_its_row(tokenizer, read_row, row):
    with pytest.raises(InputError, match=r"row 1 of one.jsonl has an empty .*--responses teacher"):
        read_row(row, tokenizer)


def test_a_tokenizer_without_eos_is_refused(read_row):
    with pytest.raises(InputError, match=r"no EOS token .*set eos_token in its tokenizer_config.json"):
        read_row(QUESTION, tiny_tokenizer(eos=False))


# ---- text ----


@pytest.mark.parametrize("bos", [False, True])
def test_all_of_a_text_but_its_first_token_is_trained(read_row, bos):
    tokenizer = tiny_tokenizer(bos=bos)
    sequence = read_row({"text": "the capital of France"}, tokenizer)
    assert tokenizer.decode(sequence.input_ids) == (BOS if bos else "") + "the capital of France" + EOS
    assert sequence.loss_mask.tolist() == [False] + [True] * (sequence.num_tokens - 1)


# ---- messages ----


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_GENERATION])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_the_assistants_turns_are_trained_up_to_their_end_token(read_row, template, trim_offsets):
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    sequence = read_row({"messages": CHAT}, tokenizer)
    assert tokenizer.decode(sequence.input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert trained_text(tokenizer, sequence) == f" five\n{EOS}Paris{EOS}"


def test_marked_turns_are_those_that_transformers_masks(read_row):
    tokenizer = tiny_tokenizer(chat_template=CHATML_WITH_GENERATION)
    sequence = read_row({"messages": CHAT}, tokenizer)
    reference = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert sequence.input_ids.tolist() == reference["input_ids"]
    assert sequence.loss_mask.tolist() == [bool(trained) for trained in reference["assistant_masks"]]


def test_a_template_writes_its_own_bos(read_row):
    tokenizer = tiny_tokenizer(bos=True, chat_template="{{ bos_token }}" + CHATML)
    sequence = read_row({"messages": CHAT}, tokenizer)
    assert (sequence.input_ids == tokenizer.bos_token_id).sum() == 1


def test_whitespace_that_a_template_marks_is_trained_even_if_the_tokenizer_trims_offsets(read_row):
    marked = "{% generation %}{{ message['content'] + ' ' }}{% endgeneration %}"
    tokenizer = tiny_tokenizer(chat_template="{% for message in messages %}>" + marked + "{% endfor %}")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    sequence = read_row({"messages": [{"role": "assistant", "content": "five"}] * 2}, tokenizer)
    assert trained_text(tokenizer, sequence) == "five five "


THOUGHT = "{{ '<think></think>' }}"


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("{% endfor %}", "{% if loop.last %}" + THOUGHT + "{% endif %}{% endfor %}"),
        CHATML.replace("{% endfor %}", "{% if loop.last and loop.index % 2 %}" + THOUGHT + "{% endif %}{% endfor %}"),
        CHATML + "{% if add_generation_prompt %}" + THOUGHT + "{% endif %}",
    ],
    ids=["every last turn", "an assistant's last turn", "the generation prompt"],
)
def test_a_template_whose_turns_do_not_continue_each_other_is_refused(read_row, template):
    with pytest.raises(InputError, match=r"row 1 of one\.jsonl: with message 3 the chat template does not go on"):
        read_row({"messages": CHAT}, tiny_tokenizer(chat_template=template))


def test_what_a_template_refuses_is_reported_with_its_row(read_row):
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"row 1 of one.jsonl: the chat template refuses .*roles must alternate"):
        read_row({"messages": CHAT}, tokenizer)


def test_messages_without_a_chat_template_are_refused(tokenizer, read_row):
    with pytest.raises(InputError, match=r"no chat template.*put a chat_template.jinja"):
        read_row({"messages": CHAT}, tokenizer)


def test_a_conversation_without_an_assistant_is_refused_with_the_way_out(read_row):
    with pytest.raises(InputError, match=r"row 1 of one.jsonl has no token to train.*`--responses teacher`"):
        read_row({"messages": CHAT[:2]}, tiny_tokenizer(chat_template=CHATML))


def test_a_conversation_cut_before_its_first_answer_is_refused(read_row):
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    num_before = len(tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True).input_ids)
    assert read_row({"messages": CHAT}, tokenizer, max_tokens=num_before + 1).loss_mask.sum() == 1
    with pytest.raises(InputError, match=r"row 1 of one.jsonl has a prompt of .*max_tokens"):
        read_row({"messages": CHAT}, tokenizer, max_tokens=num_before)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", "is not a list of messages"),
        ([], "is not a list of messages"),
        ([{"role": "user"}], "message 1 of `messages` has no text in `content`"),
        ([CHAT[0], {"content": "hi"}], "message 2 of `messages` has no text in `role`"),
    ],
)
def test_malformed_messages_are_refused_with_their_row(read_row, messages, complaint):
    with pytest.raises(InputError, match=f"row 1 of one.jsonl: .*{complaint}"):
        read_row({"messages": messages}, tiny_tokenizer(chat_template=CHATML))


# ---- the teacher writes ----


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (QUESTION, BOS + QUESTION["prompt"]),
        ({"prompt": QUESTION["prompt"]}, BOS + QUESTION["prompt"]),
        ({"text": "the capital of"}, BOS + "the capital of"),
        ({"messages": CHAT[1:3]}, "<|im_start|>user\nWhat is two plus three?<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_when_the_teacher_writes_a_sequence_is_the_prompt_alone_and_nothing_is_trained(read_row, row, prompt):
    tokenizer = tiny_tokenizer(bos=True, appends_eos=True, chat_template=CHATML)
    sequence = read_row(row, tokenizer, responses="teacher")
    assert tokenizer.decode(sequence.input_ids) == prompt
    assert not sequence.loss_mask.any()


def test_a_prompt_leaves_room_for_what_the_teacher_will_write(tokenizer, read_row):
    num_prompt = len(ids(tokenizer, QUESTION["prompt"]))
    options = {"responses": "teacher", "max_new_tokens": 5}
    assert read_row(QUESTION, tokenizer, max_tokens=num_prompt + 5, **options).num_tokens == num_prompt
    with pytest.raises(InputError, match=r"row 1 of one.jsonl has a prompt of .*max_new_tokens=5.*data.max_tokens=N"):
        read_row(QUESTION, tokenizer, max_tokens=num_prompt + 4, **options)


@pytest.mark.parametrize("prompt", ["", "a"])
def test_a_prompt_of_less_than_two_tokens_is_refused_with_its_row(tokenizer, read_row, prompt):
    with pytest.raises(InputError, match=r"row 1 of one.jsonl has a prompt of . tokens, but a sequence needs two"):
        read_row({"prompt": prompt}, tokenizer, responses="teacher")


def test_messages_without_a_user_are_refused_when_the_teacher_is_to_answer(read_row):
    with pytest.raises(InputError, match=r"row 1 of one.jsonl: .*no message of role user"):
        read_row({"messages": CHAT[:1]}, tiny_tokenizer(chat_template=CHATML), responses="teacher")


# ---- rows ----


def test_messages_go_before_prompt_and_prompt_before_text(read_row):
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    both = QUESTION | {"text": "nothing"}
    assert trained_text(tokenizer, read_row(both, tokenizer)) == QUESTION["response"] + EOS
    assert trained_text(tokenizer, read_row(both | {"messages": CHAT}, tokenizer)).endswith("Paris" + EOS)


def test_unknown_columns_are_listed_with_the_three_forms_accepted(tokenizer, tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), path)
    with pytest.raises(InputError, match=r"columns question, answer: .*`messages`, `prompt` and `response`, or `text`"):
        read(path, tokenizer)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a"}, "has no value in column `response`"),
        ({"prompt": None, "response": "b"}, "has no value in column `prompt`"),
        ({"prompt": "a", "response": 5}, "has a value of type int, not text, in column `response`"),
        ({"prompt": "a", "response": "\ud83d"}, "has half of a surrogate pair"),
    ],
)
def test_a_value_that_is_not_text_is_refused_with_its_row_and_column(tokenizer, tmp_path, row, complaint):
    data = write_jsonl(tmp_path / "data.jsonl", [QUESTION, row])
    with pytest.raises(InputError, match=f"row 2 of data.jsonl {complaint}"):
        read(data, tokenizer)


def test_the_same_tokens_and_mask_twice_are_kept_once(tokenizer, tmp_path):
    other = {"prompt": QUESTION["prompt"], "response": "5"}
    result = read(write_jsonl(tmp_path / "data.jsonl", [QUESTION, other, QUESTION]), tokenizer)
    assert (result.num_rows, result.num_duplicates) == (3, 1)
    assert [trained_text(tokenizer, sequence) for sequence in result.sequences] == [
        QUESTION["response"] + EOS,
        "5" + EOS,
    ]


def test_only_the_first_rows_up_to_the_limit_are_read(tokenizer, tmp_path):
    rows = [{"text": f"two plus {number}"} for number in range(5)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    first_two = write_jsonl(tmp_path / "first.jsonl", rows[:2])
    limited = read(data, tokenizer, limit=2)
    assert (limited.num_rows, limited.sha256) == (2, read(first_two, tokenizer).sha256)


def test_progress_counts_up_to_the_number_of_rows(tokenizer, tmp_path):
    calls = []
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": f"row {number}"} for number in range(2500)])
    result = read(data, tokenizer, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1000, 2500), (2000, 2500), (2500, 2500)]
    assert len(result.sequences) == 2500


def test_a_file_has_the_same_hash_in_any_folder_and_another_when_it_changes(tokenizer, tmp_path):
    data = tmp_path / "data.jsonl"
    before = read(write_jsonl(data, [QUESTION]), tokenizer)
    (tmp_path / "elsewhere").mkdir()
    moved = read(shutil.copy(data, tmp_path / "elsewhere"), tokenizer)
    after = read(write_jsonl(data, [QUESTION | {"response": "Two plus three is 5.00."}]), tokenizer)
    assert (before.name, before.sha256) == (moved.name, moved.sha256)
    assert after.sha256 != before.sha256
    assert trained_text(tokenizer, after.sequences[0]) == "Two plus three is 5.00." + EOS


def test_messages_survive_parquet_and_datasets_without_fields_they_never_had(tmp_path):
    named = "{% if 'name' in message %}{{ '(' + message['name'] + ')' }}{% endif %}"
    tokenizer = tiny_tokenizer(chat_template=CHATML.replace("{% endfor %}", named + "{% endfor %}", 1))
    row = {"messages": [CHAT[0], CHAT[1] | {"name": "Ann"}, CHAT[2]]}
    write_jsonl(tmp_path / "data.jsonl", [row])
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "data.parquet")
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    results = [read(tmp_path / name, tokenizer) for name in ("data.jsonl", "data.parquet", "saved")]
    assert len({result.sha256 for result in results}) == 1
    assert len({result.sequences[0].sequence_id for result in results}) == 1
    assert tokenizer.decode(results[0].sequences[0].input_ids).count("(Ann)") == 1
