"""The documents of a cache: exactly this text on disk, and nothing else is accepted."""

import json

import pytest

from cache_schema import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheMismatchError,
    CacheReader,
    Manifest,
    Plan,
    Receipt,
    read_manifest,
)
from cache_schema.manifest import MANIFEST_NAME, PLAN_NAME, StoredFile, read_json, write_json
from cache_schema.plan import Generation, require_same_plan
from tests.caches import make_plan, make_scoreds, write_cache

PLAN_JSON = """{
  "format_version": 1,
  "teacher": {
    "name": "tiny/teacher",
    "fingerprint": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "architecture": "TinyForCausalLM",
    "num_parameters": 1234,
    "dtype": "bfloat16"
  },
  "tokenizer": {
    "fingerprint": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "vocab_size": 97,
    "chat_template": null
  },
  "dataset": {
    "name": "rows.jsonl",
    "sha256": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
    "sequences_sha256": "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd",
    "num_rows": 7,
    "num_duplicates": 0,
    "num_truncated": 0,
    "max_tokens": 64
  },
  "responses": null,
  "engine": {
    "name": "transformers",
    "device": "cpu",
    "num_threads": 2,
    "tokens_per_batch": 4096,
    "compiled": false,
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "quantization": null,
    "logits": "head",
    "versions": {
      "torch": "2.0.0"
    }
  },
  "positions": "response",
  "sampling": null,
  "top_k": 8,
  "logit_step": 0.015625,
  "temperatures": [
    1.0,
    3.0
  ],
  "hidden_states": {
    "dtype": "bfloat16",
    "size": 4,
    "channel_scale": null,
    "residual_channels": null,
    "mean_logit_error": null,
    "max_logit_error": null
  },
  "num_sequences": 7,
  "sequences_per_shard": 4
}
"""

RECEIPT_JSON = """{
  "shard": 0,
  "num_sequences": 4,
  "num_tokens": 50,
  "num_positions": 20,
  "logits_bytes": 1000,
  "scalar_bytes": 300,
  "files": [
    {
      "name": "shard-00000.parquet",
      "num_bytes": 1400,
      "sha256": "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd"
    }
  ]
}
"""

MANIFEST_JSON = """{
  "plan": PLAN,
  "receipts": [
    RECEIPT
  ],
  "files": [
    {
      "name": "tokenizer/tokenizer.json",
      "num_bytes": 13,
      "sha256": "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee"
    }
  ]
}
"""
MANIFEST_JSON = MANIFEST_JSON.replace("PLAN", PLAN_JSON.strip().replace("\n", "\n  "))
MANIFEST_JSON = MANIFEST_JSON.replace("RECEIPT", RECEIPT_JSON.strip().replace("\n", "\n    "))

RECEIPT = Receipt(
    shard=0,
    num_sequences=4,
    num_tokens=50,
    num_positions=20,
    logits_bytes=1000,
    scalar_bytes=300,
    files=(StoredFile(name="shard-00000.parquet", num_bytes=1400, sha256="d" * 64),),
)


@pytest.fixture
def cache(tmp_path):
    plan = make_plan()
    return write_cache(tmp_path / "cache", plan, make_scoreds(plan))


def change(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_the_plan_is_exactly_this_json(tmp_path):
    write_json(tmp_path / PLAN_NAME, make_plan())
    assert (tmp_path / PLAN_NAME).read_text() == PLAN_JSON
    assert read_json(tmp_path / PLAN_NAME, Plan) == make_plan()


def test_a_receipt_is_exactly_this_json(tmp_path):
    write_json(tmp_path / "shard-00000.json", RECEIPT)
    assert (tmp_path / "shard-00000.json").read_text() == RECEIPT_JSON
    assert read_json(tmp_path / "shard-00000.json", Receipt) == RECEIPT


def test_the_manifest_is_exactly_this_json(tmp_path):
    file = StoredFile(name="tokenizer/tokenizer.json", num_bytes=13, sha256="e" * 64)
    manifest = Manifest(plan=make_plan(), receipts=(RECEIPT,), files=(file,))
    write_json(tmp_path / MANIFEST_NAME, manifest)
    assert (tmp_path / MANIFEST_NAME).read_text() == MANIFEST_JSON
    assert read_manifest(tmp_path) == manifest


def test_how_the_teacher_responded_is_exactly_this_json():
    generation = Generation(max_new_tokens=9, temperature=0.5, top_p=1.0, seed=3, end_token_ids=(2, 7))
    text = '{"max_new_tokens":9,"temperature":0.5,"top_p":1.0,"seed":3,"end_token_ids":[2,7]}'
    assert generation.model_dump_json() == text
    assert Generation.model_validate_json(text) == generation


def test_a_tokenizer_may_have_folders(cache):
    name = "tokenizer/additional_chat_templates/tool_use.jinja"
    change(cache / MANIFEST_NAME, lambda document: document["files"][0].update(name=name))
    assert read_manifest(cache).files[0].name == name


def test_the_last_shard_may_be_short():
    plan = make_plan(num_sequences=7, sequences_per_shard=4)
    assert [list(plan.shard_range(shard)) for shard in range(plan.num_shards)] == [[0, 1, 2, 3], [4, 5, 6]]
    assert make_plan(num_sequences=8, sequences_per_shard=4).num_shards == 2
    assert make_plan(num_sequences=1, sequences_per_shard=4).num_shards == 1


def test_a_cache_is_not_readable_until_its_manifest_is_there(cache):
    (cache / MANIFEST_NAME).unlink()
    with pytest.raises(CacheIncompleteError, match=r"has no manifest\.json.*Run `pipeline teacher-dump` again"):
        CacheReader(cache)


def test_a_directory_without_a_cache_is_told_from_an_unfinished_one(tmp_path):
    with pytest.raises(CacheIncompleteError, match="holds no cache"):
        read_manifest(tmp_path)
    with pytest.raises(CacheIncompleteError, match="nowhere is not a directory: give the --out of a teacher-dump"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CacheIncompleteError, match="is not a directory"):
        read_manifest(tmp_path / "file")


def test_another_format_version_is_refused_with_both_versions(cache):
    change(cache / MANIFEST_NAME, lambda document: document["plan"].update(format_version=2))
    with pytest.raises(CacheCorruptError, match=r"format version 2, this program reads version 1: install"):
        read_manifest(cache)
    change(cache / PLAN_NAME, lambda document: document.update(format_version=2, unknown=1))
    with pytest.raises(CacheCorruptError, match=r"plan\.json is of format version 2, this program reads version 1"):
        read_json(cache / PLAN_NAME, Plan)


def test_an_unknown_key_is_refused_by_name(cache):
    change(cache / MANIFEST_NAME, lambda document: document["plan"]["teacher"].update(colour="blue"))
    with pytest.raises(CacheCorruptError, match=r"plan\.teacher\.colour: Extra inputs are not permitted"):
        read_manifest(cache)


@pytest.mark.parametrize("key", ["plan", "receipts", "files"])
def test_a_missing_key_is_refused_by_name(cache, key):
    change(cache / MANIFEST_NAME, lambda document: document.pop(key))
    with pytest.raises(CacheCorruptError, match=f"{key}: Field required"):
        read_manifest(cache)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'{"plan": 3}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5_000,
        MANIFEST_JSON[:-9].encode(),
    ],
    ids=["empty", "open", "list", "null", "number", "no plan", "not UTF-8", "deep", "long number", "cut"],
)
def test_a_damaged_document_is_named_with_what_to_do(cache, text):
    (cache / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(CacheCorruptError, match=r"manifest\.json is damaged: .*Restore the file, or delete"):
        read_manifest(cache)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "tokenizer/../../x",
        "..",
        ".hidden",
        "a/b",
        "tokenizer/",
        "tokenizer/a/../b",
        "tokenizer//a",
        "tokenizer/.a/b",
        "",
        "a\nb",
        "a\n",
        "C:\\x",
    ],
)
def test_no_file_name_in_a_manifest_can_leave_the_directory(cache, name):
    change(cache / MANIFEST_NAME, lambda document: document["files"][0].update(name=name))
    with pytest.raises(CacheCorruptError, match=r"files\.0\.name"):
        read_manifest(cache)


def test_a_plan_is_the_same_as_itself(tmp_path):
    require_same_plan(tmp_path, make_plan(), make_plan())


def test_the_same_teacher_under_another_name_is_the_same_plan(tmp_path):
    plan = make_plan()
    renamed = plan.model_copy(update={"teacher": plan.teacher.model_copy(update={"name": "moved"})})
    require_same_plan(tmp_path, plan, renamed)
    other = plan.model_copy(
        update={"teacher": plan.teacher.model_copy(update={"name": "moved", "fingerprint": "f" * 64})}
    )
    with pytest.raises(CacheMismatchError, match=r"its teacher\.fingerprint is aaaa.*, this command's is ffff"):
        require_same_plan(tmp_path, plan, other)


@pytest.mark.parametrize(
    ("stored", "wanted", "said"),
    [
        ({"top_k": 8}, {"top_k": 16}, "its top_k is 8, this command's is 16"),
        ({"vocab_size": 97}, {"vocab_size": 98, "top_k": 9}, "its tokenizer.vocab_size is 97, this command's is 98"),
        ({}, {"temperatures": (1.0,)}, r"its temperatures is \[1.0, 3.0\], this command's is \[1.0\]"),
        ({"hidden_dtype": "float32"}, {"hidden_dtype": "float16"}, "its teacher.dtype is float32"),
        ({"hidden_size": 4}, {"hidden_size": 5}, "its hidden_states.size is 4, this command's is 5"),
    ],
)
def test_another_plan_is_refused_with_the_first_field_that_differs(tmp_path, stored, wanted, said):
    with pytest.raises(CacheMismatchError, match=f"{tmp_path} belongs to another dump: {said}.*Give --out"):
        require_same_plan(tmp_path, make_plan(**stored), make_plan(**wanted))


def test_a_plan_without_hidden_states_differs_from_one_with(tmp_path):
    without = make_plan().model_copy(update={"hidden_states": None})
    with pytest.raises(CacheMismatchError, match=r"its hidden_states is None, this command's is \{'dtype': 'bfloat16'"):
        require_same_plan(tmp_path, without, make_plan())
