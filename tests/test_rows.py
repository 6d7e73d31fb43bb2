"""The same rows come out of every form of storage; what cannot be read is named with its place."""

import gzip
import hashlib
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny import EOS, tiny_tokenizer
from workers.errors import InputError
from workers.teacher.sequences import read_sequences

QUESTION = {"prompt": "What is two plus three? ", "response": "Two plus three is five."}


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def read(data, tokenizer, split=None):
    return read_sequences(
        str(data), tokenizer, max_tokens=128, responses="dataset", max_new_tokens=16, limit=None, split=split
    )


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stored_as(kind, folder):
    """Write two rows of text in one of the accepted forms and return where."""
    rows = [{"text": "the teacher runs once", "id": 1}, {"text": "the student reads\u2028its logits", "id": 2}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if kind == "jsonl":
        (folder / "data.jsonl").write_text(lines)
    elif kind == "jsonl.gz":
        (folder / "data.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "json array":
        (folder / "data.json").write_text("\n" + json.dumps(rows, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    elif kind == "two files":
        write_jsonl(folder / "a.jsonl", rows[:1])
        pq.write_table(pa.Table.from_pylist(rows[1:]), folder / "b.parquet")
        (folder / "README.md").write_text("not data")
        return folder
    elif kind == "glob":
        write_jsonl(folder / "part-1.jsonl", rows[:1])
        write_jsonl(folder / "part-2.jsonl", rows[1:])
        return folder / "part-*"
    elif kind == "saved data set":
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        return folder / "saved"
    elif kind == "saved splits":
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(folder / "saved")
        return folder / "saved"
    return next(folder.iterdir())


KINDS = ["jsonl", "jsonl.gz", "json array", "parquet", "two files", "glob", "saved data set", "saved splits"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_give_the_same_sequences_and_hash_however_they_are_stored(tokenizer, tmp_path, capfd, kind):
    data = stored_as(kind, tmp_path)
    capfd.readouterr()
    result = read(data, tokenizer)
    assert [tokenizer.decode(sequence.input_ids) for sequence in result.sequences] == [
        "the teacher runs once" + EOS,
        "the student reads\u2028its logits" + EOS,
    ]
    read_in_order = '{"text":"the teacher runs once"}\n{"text":"the student reads\u2028its logits"}\n'
    assert result.sha256 == hashlib.sha256(read_in_order.encode()).hexdigest()
    assert result.name == result.sequences[0].source == data.name
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "a b"}\n\n{"text": \n', "line 3 is not JSON"),
        (b'{"text": "a b"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
        (b'[{"text": "a b"},\n{"text": }]', "line 2 is not JSON"),
    ],
)
def test_a_bad_json_line_is_refused_with_file_and_line(tokenizer, tmp_path, content, complaint):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}, {complaint}"):
        read(path, tokenizer)


def test_a_json_line_without_columns_is_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"row 2 of .*data\.jsonl is not a JSON object"):
        read(write_jsonl(tmp_path / "data.jsonl", [{"text": "a b"}, "a b"]), tokenizer)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("data.parquet", "not a readable Parquet file"), ("data.jsonl.gz", "is damaged"), ("data.csv", "not a data file")],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_with_its_path(tokenizer, tmp_path, name, complaint):
    path = tmp_path / name
    path.write_text("prompt,response\n")
    with pytest.raises(InputError, match=f"{path} is .*{complaint.removeprefix('is ')}"):
        read(path, tokenizer)


def test_a_compressed_file_cut_short_is_refused(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(QUESTION).encode())[:-12])
    with pytest.raises(InputError, match=r"data.jsonl.gz is damaged"):
        read(path, tokenizer)


def test_a_missing_file_is_refused_with_its_path_and_without_a_network(tokenizer, tmp_path):
    for data in (tmp_path / "none", tmp_path / "none.jsonl", "none.jsonl", "./none", "../some/where"):
        with pytest.raises(InputError, match="no file, saved data set folder or data set called") as caught:
            read(data, tokenizer)
        assert str(data) in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_a_file_without_rows_is_refused(tokenizer, tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=f"{path} has no rows"):
        read(path, tokenizer)


def test_a_folder_or_glob_without_data_files_is_refused(tokenizer, tmp_path):
    for data in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(InputError, match=r"has no data file: none ends in .jsonl"):
            read(data, tokenizer)


def test_a_split_is_chosen_by_name_and_an_unknown_one_lists_the_others(tokenizer, tmp_path):
    splits = {name: datasets.Dataset.from_list([{"text": f"the {name} split"}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    result = read(tmp_path / "saved", tokenizer, split="test")
    assert tokenizer.decode(result.sequences[0].input_ids) == "the test split" + EOS
    with pytest.raises(InputError, match="has no split validation: choose one of train, test"):
        read(tmp_path / "saved", tokenizer, split="validation")
    with pytest.raises(InputError, match="files, which have no splits: leave out split=test"):
        read(write_jsonl(tmp_path / "data.jsonl", [QUESTION]), tokenizer, split="test")


def test_a_damaged_saved_data_set_is_refused(tokenizer, tmp_path):
    datasets.Dataset.from_list([QUESTION]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text("{")
    with pytest.raises(InputError, match=r"data set saved in .*/saved cannot be read"):
        read(tmp_path / "saved", tokenizer)


def test_a_name_that_is_no_path_is_looked_up_on_the_hub_without_progress_bars(tokenizer, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        assert datasets.are_progress_bars_disabled()
        return datasets.Dataset.from_list([QUESTION])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("someone/questions", tokenizer).name == "someone/questions"
    read("questions", tokenizer, split="test")
    assert asked == [("someone/questions", "train"), ("questions", "test")]
    assert not datasets.are_progress_bars_disabled()


def test_a_name_the_hub_does_not_have_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no file, saved data set folder or data set called someone/nothing"):
        read("someone/nothing", tokenizer)
