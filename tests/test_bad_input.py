"""Whatever a user gets wrong is one clear paragraph, exit code 1, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import pipeline
from tests.conftest import dump, write_jsonl
from tests.tiny import tiny_tokenizer
from tests.tiny_models import save_tiny_llama
from workers.teacher.lm_head import LMHead, save_head


def refused(*arguments: object, says: str, out: Path | None = None) -> None:
    """Assert a one-paragraph error with ``says`` in it, exit code 1, and that ``out`` is as it was."""
    before = snapshot(out)
    result = pipeline(*arguments, *(["--out", out] if out else []))
    assert result.code == 1, f"exit {result.code}: {result.err or result.out}"
    message = result.err[result.err.index("error: ") :]
    assert message.count("\n") == 1, message
    assert says in message
    assert "Traceback" not in result.err
    assert result.out == ""
    assert snapshot(out) == before


def snapshot(folder: Path | None) -> dict[str, bytes] | None:
    if folder is None or not folder.exists():
        return None
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(model_dir: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model with changed weights."""
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def poison(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan


# Dump


def test_a_missing_teacher(data_file: Path, tmp_path: Path) -> None:
    refused("teacher-dump", "--teacher", tmp_path / "nope", "--data", data_file, out=tmp_path / "c", says="nope")


def test_a_teacher_with_pickled_weights(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(teacher_dir, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused("teacher-dump", "--teacher", folder, "--data", data_file, out=tmp_path / "c", says="no *.safetensors")


def test_a_teacher_with_a_nan_weight(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    folder = changed(teacher_dir, tmp_path / "nan", poison)
    command = ["teacher-dump", "--teacher", folder, "--data", data_file, "--top-k", 16]
    refused(*command, out=tmp_path / "c", says="model.layers.1.mlp.up_proj.weight is not finite")


def test_a_missing_data_file(teacher_dir: Path, tmp_path: Path) -> None:
    refused(
        "teacher-dump", "--teacher", teacher_dir, "--data", tmp_path / "none.jsonl", out=tmp_path / "c",
        says="none.jsonl",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "rows.jsonl"),
        ('{"question": "a", "answer": "b"}\n', "question"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": \n', "line 2"),
        ('{"prompt": "a", "response": 3}\n', "response"),
        (json.dumps({"prompt": "why? " * 200, "response": "so"}) + "\n", "max_tokens"),
    ],
    ids=["empty", "wrong columns", "broken JSON", "not a string", "prompt longer than the context"],
)
def test_a_bad_data_file(teacher_dir: Path, tmp_path: Path, content: str, says: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(content, encoding="utf-8")
    refused(
        "teacher-dump", "--teacher", teacher_dir, "--data", rows, "--set", "data.max_tokens=128", "--top-k", 16,
        out=tmp_path / "c", says=says,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--top-k", 100_000], "vocabulary of"),
        (["--top-k", 0], "cache.top_k"),
        (["--dtype", "int4"], "teacher.dtype"),
        (["--positions", "some"], "cache.positions"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--set", "data.max_tokens=100000"], "max_tokens=100000 is more than"),
        (["--set", "cache.logit_step=inf"], "cache.logit_step"),
        (["--set", "cache.logit_step=1e-9"], "give 0 to store float32"),
        (["--set", "cache.temperatures=[]"], "cache.temperatures"),
        (["--set", "cache.temperatures=[inf]"], "cache.temperatures"),
        (["--set", "cache.topk=3"], "cache.topk: no such key"),
        (["--set", "cache.top_k"], "write key=value"),
    ],
)
def test_a_bad_dump_option(
    teacher_dir: Path, data_file: Path, tmp_path: Path, options: list[object], says: str
) -> None:
    options = [*options, *([] if "max_tokens" in says else ["--set", "data.max_tokens=128"])]
    refused("teacher-dump", "--teacher", teacher_dir, "--data", data_file, *options, out=tmp_path / "c", says=says)


def test_all_mistakes_in_a_config_are_reported_at_once(teacher_dir: Path, tmp_path: Path) -> None:
    result = pipeline(
        "teacher-dump", "--teacher", teacher_dir, "--top-k", -1, "--set", "engine.tokens_per_batch=0",
        "--out", tmp_path / "c",
    )  # fmt: skip
    assert all(key in result.err for key in ("data", "cache.top_k", "engine.tokens_per_batch"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--top-k", 8], "top_k is 16, this command's is 8"),
        (["--no-hidden-states"], "hidden_states"),
        (["--dtype", "bfloat16"], "teacher.dtype is float32"),
        (["--limit", 5], "dataset.sha256"),
    ],
)
def test_a_directory_of_another_plan(
    teacher_dir: Path, data_file: Path, cache_dir: Path, options: list[object], says: str
) -> None:
    defaults = ["--top-k", 16, "--set", "data.max_tokens=128", "--set", "cache.sequences_per_shard=8"]
    refused(
        "teacher-dump", "--teacher", teacher_dir, "--data", data_file, *defaults, *options, out=cache_dir, says=says
    )


def test_a_directory_of_another_teacher(teacher_dir: Path, data_file: Path, cache_dir: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "teacher", tiny_tokenizer(), seed=1)
    refused(
        "teacher-dump", "--teacher", other, "--data", data_file, "--set", "data.max_tokens=128", "--top-k", 16,
        "--set", "cache.sequences_per_shard=8", out=cache_dir, says="teacher.fingerprint",
    )  # fmt: skip


def test_a_directory_that_holds_something_else(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    refused(
        "teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--set", "data.max_tokens=128",
        "--top-k", 16, out=tmp_path / "home", says="holds no cache",
    )  # fmt: skip


# Distill


def distill(cache: Path, student: Path, *options: object) -> list[object]:
    return ["distill", "--cache", cache, "--student", student, "--dtype", "float32", *options]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "loss.k=2"], "identically zero below k = 3"),
        (["--set", "loss.k=17"], "more than the top 16"),
        (["--loss", "bidl"], "no loss is called 'bidl'"),
        (["--loss", "kl", "--set", "loss.k=3"], "loss kl has no parameter 'k'"),
        (["--set", "loss.temperature=hot"], "loss.temperature='hot'"),
        (["--set", "loss.temperature=0.0"], "loss.temperature=0.0"),
        (["--set", "loss.temperature=inf"], "loss.temperature=inf"),
        (["--prompt-loss", "kl"], "--positions all"),
        (["--student-layers", "0,9"], "from 0 to 3"),
        (["--student-layers", "2,1"], "ascending"),
        (["--steps", 0], "steps"),
        (["--set", "optimizer.learning_rate=1"], "optimizer.learning_rate: no such key"),
        (["--eval-cache", "nowhere"], "nowhere"),
    ],
)
def test_a_bad_distill_option(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, options: list[object], says: str
) -> None:
    refused(*distill(cache_dir, teacher_dir, *options), out=tmp_path / "run", says=says)


@pytest.mark.parametrize("flag", ["--device", "--head-device", "--teacher-device"])
@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_here(cache_dir: Path, teacher_dir: Path, tmp_path: Path, flag: str, name: str) -> None:
    command = distill(cache_dir, teacher_dir, flag, name)
    for options in ([], ["--dry-run"]):
        says = f"{flag} {name} cannot be used here: "
        refused(*command, *options, out=tmp_path / "run", says=says)
        refused(*command, *options, out=tmp_path / "run", says=f". Use {flag} auto.")
    assert len(pipeline(*command, "--out", tmp_path / "run").err) < 300


@pytest.mark.parametrize(
    ("option", "key"),
    [("--lookups", "lookups.dir"), ("--teacher", "teacher"), ("--cache", "cache"), ("--eval-cache", "eval_cache")],
)
def test_an_empty_value(cache_dir: Path, teacher_dir: Path, tmp_path: Path, option: str, key: str) -> None:
    refused(*distill(cache_dir, teacher_dir, option, ""), out=tmp_path / "run", says=f"{key}: the value is empty")


def test_an_empty_value_of_other_commands(cache_dir: Path, teacher_dir: Path) -> None:
    refused("inspect", cache_dir, "--lookups", "", says="--lookups is empty")
    refused("inspect", cache_dir, "--stats", "--student", "", says="--student is empty")
    refused("verify", "", says="the cache's name is empty")
    refused("evaluate", "", "--cache", cache_dir, says="the model's name is empty")


@pytest.mark.parametrize("command", ["inspect", "verify", "compact", "distill", "evaluate"])
def test_a_log_in_object_storage(cache_dir: Path, teacher_dir: Path, tmp_path: Path, command: str) -> None:
    arguments: dict[str, list[object]] = {
        "distill": distill(cache_dir, teacher_dir), "evaluate": ["evaluate", teacher_dir, "--cache", cache_dir],
    }  # fmt: skip
    out = tmp_path / "run" if command == "distill" else None
    given = arguments.get(command, [command, cache_dir])
    refused(*given, "--lookups", "s3://b/x", out=out, says="--lookups s3://b/x is a URI")


def test_an_unknown_student_of_an_estimate(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    command = ["estimate", "--teacher", teacher_dir, "--data", data_file, "--set", "data.max_tokens=128"]
    refused(*command, "--student", tmp_path / "none", says="none is neither a folder nor a model the hub gives")


@pytest.mark.parametrize("name", ["shard-00001.hidden.parquet", "lm_head.safetensors"])
def test_hidden_states_that_are_there_in_part(cache_dir: Path, teacher_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(cache_dir, tmp_path / "cache")
    (tmp_path / "cache" / name).unlink()
    says = f"{name} is missing, while shard-00000.hidden.parquet is there"
    for options in ([], ["--teacher", teacher_dir], ["--on-miss", "bound"]):
        refused(*distill(tmp_path / "cache", teacher_dir, *options), out=tmp_path / "run", says=says)
    assert pipeline(*distill(tmp_path / "cache", teacher_dir, "--loss", "t_ld", "--dry-run", "--out", "r")).code == 0


def test_a_run_of_an_older_release(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    command = distill(cache_dir, teacher_dir, "--steps", 1, "--loss", "t_ld")
    assert pipeline(*command, "--out", tmp_path / "run").code == 0
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "dropped_forwards"}))
    assert pipeline(*command, "--resume", "--out", tmp_path / "run").code == 0
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "order_version"}))
    refused(*command, "--resume", out=tmp_path / "run", says="was begun by an older release")


def test_a_config_file_that_is_no_toml(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("steps: 3")
    refused(
        *distill(cache_dir, teacher_dir, "--config", tmp_path / "run.toml"), out=tmp_path / "run", says="is not TOML"
    )


def test_a_missing_student(cache_dir: Path, tmp_path: Path) -> None:
    refused(*distill(cache_dir, tmp_path / "nobody"), out=tmp_path / "run", says="nobody")


def test_a_foreign_tokenizer(cache_dir: Path, tmp_path: Path) -> None:
    foreign = save_tiny_llama(tmp_path / "foreign", tiny_tokenizer(corpus=("zebras quiz jazzy foxes " * 3,)))
    refused(*distill(cache_dir, foreign), out=tmp_path / "run", says="token")
    assert pipeline("evaluate", foreign, "--cache", cache_dir).code == 1


def test_a_student_with_a_smaller_vocabulary(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    small = save_tiny_llama(tmp_path / "small", tiny_tokenizer(), vocab_size=300)
    refused(*distill(cache_dir, small), out=tmp_path / "run", says="has 300 rows")


def test_a_student_with_a_nan_weight(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    student = changed(teacher_dir, tmp_path / "nan", poison)
    refused(*distill(cache_dir, student), out=tmp_path / "run", says="model.layers.1.mlp.up_proj.weight")


def test_an_unfinished_cache(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_dir, tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    refused(*distill(tmp_path / "cache", teacher_dir), out=tmp_path / "run", says="the dump has not finished")


def test_a_cache_that_is_not_there(teacher_dir: Path, tmp_path: Path) -> None:
    refused(*distill(tmp_path / "none", teacher_dir), out=tmp_path / "run", says="is not a directory")


def test_a_corrupt_shard(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_dir, tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0x10
    shard.write_bytes(content)
    result = pipeline(*distill(tmp_path / "cache", teacher_dir, "--out", tmp_path / "run"))
    assert result.code == 1
    assert "shard-00001.parquet is damaged" in result.err
    assert not (tmp_path / "run" / "model").exists()
    assert pipeline("verify", tmp_path / "cache").code == 1


@pytest.mark.parametrize("loss", ["bild", "s_ld", "kl", "rkl"])
def test_a_loss_that_looks_outside_a_cache_without_hidden_states(
    teacher_dir: Path, data_file: Path, tmp_path: Path, loss: str
) -> None:
    bare = dump(teacher_dir, data_file, tmp_path / "bare", "--no-hidden-states", "--limit", "4")
    refused(*distill(bare, teacher_dir, "--loss", loss), out=tmp_path / "run", says="Give --teacher")


def test_a_live_teacher_that_is_not_the_caches(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    bare = dump(teacher_dir, data_file, tmp_path / "bare", "--no-hidden-states", "--limit", "4")
    other = save_tiny_llama(tmp_path / "other", tiny_tokenizer(), seed=5)
    refused(*distill(bare, teacher_dir, "--teacher", other), out=tmp_path / "run", says="is not the teacher of")


def test_an_lm_head_of_another_teacher(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_dir, tmp_path / "cache")
    head = tmp_path / "cache" / "lm_head.safetensors"
    save_head(LMHead(load_file(head)["weight"].flip(0)), head)
    refused(*distill(tmp_path / "cache", teacher_dir), out=tmp_path / "run", says="its SHA-256 is not the manifest's")


def test_a_run_directory_in_use(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    command = distill(cache_dir, teacher_dir, "--steps", 1, "--loss", "t_ld")
    assert pipeline(*command, "--out", tmp_path / "run").code == 0
    refused(*command, out=tmp_path / "run", says="give --resume")
    refused(*command, "--resume", "--seed", 3, out=tmp_path / "run", says="its seed is 0, this command's is 3")


def test_a_finished_dump_is_not_touched_by_a_rerun(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    cache = dump(teacher_dir, data_file, tmp_path / "cache")
    before = snapshot(cache)
    assert dump(teacher_dir, data_file, cache) == cache
    assert snapshot(cache) == before


def test_a_duplicate_row_is_stored_once(teacher_dir: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "twice.jsonl", [{"prompt": "Who?", "response": "Me."}] * 3)
    dump(teacher_dir, rows, tmp_path / "cache")
    facts = pipeline("inspect", tmp_path / "cache", "--json").json
    assert (facts["num_sequences"], facts["dataset"]["num_duplicates"]) == (1, 2)


@pytest.mark.parametrize("name", ["shard-00001.parquet", "lm_head.safetensors", "tokenizer/tokenizer.json"])
def test_a_finished_dump_with_a_file_gone_is_not_called_finished(
    teacher_dir: Path, data_file: Path, cache_dir: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(cache_dir, tmp_path / "cache")
    (tmp_path / "cache" / name).unlink()
    refused(
        "teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--top-k", 16, "--set", "data.max_tokens=128",
        "--set", "cache.sequences_per_shard=8", out=tmp_path / "cache", says=f"{name} is missing or short",
    )  # fmt: skip
