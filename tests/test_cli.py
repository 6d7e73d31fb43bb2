"""The command line as its users and their scripts see it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from cache_schema import CacheReader
from cache_schema.manifest import shard_name
from pipeline.cli import app
from tests.command_line import pipeline
from tests.conftest import dump, write_jsonl
from tests.tiny import tiny_tokenizer
from tests.tiny_models import save_tiny_llama

COMMANDS = get_command(app).commands
MAX_NEW_TOKENS = 6
RESPOND = ["--responses", "teacher", "--set", f"responses.max_new_tokens={MAX_NEW_TOKENS}"]

# What scripts rely on; more may be added, none renamed.
INSPECT_KEYS = {
    "complete", "format_version", "top_k", "num_sequences", "num_tokens", "num_positions", "num_shards", "bytes",
    "bytes_per_position", "scalar_bytes_per_position", "hidden_bytes_per_position", "hidden_states", "max_logit_error",
    "teacher", "tokenizer", "lookups", "manifest_sha256",
}  # fmt: skip
DISTILL_KEYS = {
    "run", "steps", "epochs", "sequences", "positions", "loss", "seconds", "positions_per_second", "lookups",
    "teacher_forwards", "peak_memory_bytes", "model",
}  # fmt: skip
EVALUATE_KEYS = {"positions", "overlap", "overlap_macro", "kl", "top1_agreement", "loss", "tasks"}


@pytest.fixture(scope="module")
def prompts_file(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = data_file.read_text(encoding="utf-8").splitlines()[:12]
    rows = [{"prompt": json.loads(line)["prompt"]} for line in lines]
    return write_jsonl(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def talkative_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that ends some responses within a few tokens and others not: its EOS logit spreads four times as wide.

    Its generation config asks for what a dump must not do.
    """
    tokenizer = tiny_tokenizer()
    folder = tmp_path_factory.mktemp("models") / "talkative"
    save_tiny_llama(folder, tokenizer, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][tokenizer.eos_token_id] *= 4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 0.2}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def answered_dir(talkative_dir: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of greedy responses."""
    return dump(talkative_dir, prompts_file, tmp_path_factory.mktemp("caches") / "greedy", *RESPOND)


@pytest.fixture(scope="module")
def unfinished_dir(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache as a dump killed in its last shard leaves it."""
    unfinished = tmp_path_factory.mktemp("caches") / "unfinished"
    shutil.copytree(cache_dir, unfinished, ignore=shutil.ignore_patterns("shard-00002*", "lm_head*", "tokenizer"))
    (unfinished / "manifest.json").unlink()
    return unfinished


def distill(cache: Path, student: Path, *options: object) -> list[object]:
    return [
        "distill",
        "--cache",
        cache,
        "--student",
        student,
        "--student-layers",
        "0,2",
        "--dtype",
        "float32",
        *options,
    ]


# ---- help ----


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = pipeline(name, "--help")
    assert result.code == 0
    words = shlex.split(" ".join(result.out.partition("Example: ")[2].partition("\n\n")[0].split()))
    assert words[:2] == ["pipeline", name]
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{name}: {parameter.name}"


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"]])
def test_help_waits_for_no_heavy_import(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage: ")


def test_wrong_usage_exits_with_2_and_says_nothing_on_stdout(cache_dir: Path) -> None:
    wrong = (
        ["inspect"], ["no-such-command"], ["verify", cache_dir, "--no-such-flag"],
        ["distill", "--cache", cache_dir, "--student", "s"],
    )  # fmt: skip
    for arguments in wrong:
        result = pipeline(*arguments)
        assert (result.code, result.out) == (2, "")
        assert "Usage" in result.err or "Error" in result.err


# ---- what scripts rely on ----


def test_inspect_has_the_keys_scripts_rely_on(cache_dir: Path) -> None:
    facts = pipeline("inspect", cache_dir, "--json").json
    assert facts.keys() >= INSPECT_KEYS
    assert facts["teacher"].keys() >= {"name", "fingerprint"}
    assert facts["tokenizer"].keys() >= {"fingerprint", "vocab_size"}
    assert facts["lookups"].keys() >= {"pairs", "bytes", "error"}
    reader = CacheReader(cache_dir)
    assert facts["num_tokens"] == sum(scored.sequence.num_tokens for scored in reader)
    assert facts["num_positions"] == sum(scored.rows.num_positions for scored in reader)
    assert facts["manifest_sha256"] == reader.manifest_sha256
    stored = [path for path in cache_dir.rglob("*") if path.is_file() and path.suffix != ".json"]
    stored += (cache_dir / "tokenizer").glob("*.json")
    assert facts["bytes"] == sum(path.stat().st_size for path in stored)
    # d = 32 in float32, and Parquet's own bytes around them: a row group a sequence
    assert 32 * 4 < facts["hidden_bytes_per_position"] < 32 * 4 + 200
    assert facts["max_logit_error"] == 1 / 128


def test_verify_has_the_keys_scripts_rely_on(cache_dir: Path, tmp_path: Path) -> None:
    report = pipeline("verify", cache_dir, "--json").json
    assert report.keys() >= {"ok", "checked_bytes", "log_files", "errors"}
    assert (report["ok"], report["errors"]) == (True, [])
    assert report["checked_bytes"] == pipeline("inspect", cache_dir, "--json").json["bytes"]
    shutil.copytree(cache_dir, tmp_path / "cache")
    (tmp_path / "cache" / "shard-00001.parquet").unlink()
    damaged = pipeline("verify", tmp_path / "cache", "--json")
    assert damaged.code == 1
    errors = json.loads(damaged.out)["errors"]
    assert [error.keys() for error in errors] == [{"file", "reason"}]
    assert errors[0]["file"] == "shard-00001.parquet"


def test_distill_has_the_keys_scripts_rely_on(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = pipeline(*distill(cache_dir, teacher_dir, "--steps", 2, "--out", run, "--json")).json
    assert summary.keys() >= DISTILL_KEYS
    assert set(summary["lookups"]) == {"cached", "logged", "hidden", "live", "bound"}
    assert (summary["run"], summary["model"]) == (str(run), str(run / "model"))
    assert (summary["steps"], summary["sequences"]) == (2, 16)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert summary["positions"] == sum(step["positions"] for step in steps)
    assert {"run.json", "config.toml", "metrics.jsonl", "model"} <= {path.name for path in run.iterdir()}
    assert list((run / "model").glob("*.safetensors"))


def test_evaluate_has_the_keys_scripts_rely_on(cache_dir: Path, teacher_dir: Path) -> None:
    measured = pipeline("evaluate", teacher_dir, "--cache", cache_dir, "--json").json
    assert measured.keys() >= EVALUATE_KEYS
    assert measured["positions"] == CacheReader(cache_dir).manifest.num_positions
    # The teacher compared with itself; a cache of 16 ids cannot say its overlap at 32.
    assert measured["overlap"] == measured["overlap_macro"] == {"1": 1.0, "8": 1.0, "32": None}
    assert measured["kl"] == pytest.approx(0, abs=1e-4)


def test_results_go_to_stdout_and_nothing_else_does(
    cache_dir: Path, teacher_dir: Path, data_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dumped = ["teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--top-k", 16, "--limit", 2]
    for arguments in (
        [*dumped, "--out", tmp_path / "cache"],
        [*dumped, "--out", tmp_path / "none", "--dry-run"],
        ["inspect", cache_dir],
        ["inspect", cache_dir, "--sequence", 0],
        ["verify", cache_dir],
        distill(cache_dir, teacher_dir, "--out", tmp_path / "run", "--steps", 1, "--eval-cache", cache_dir),
        distill(cache_dir, teacher_dir, "--out", tmp_path / "none", "--dry-run"),
        ["evaluate", teacher_dir, "--cache", cache_dir],
    ):
        # The same run again where there is one: a finished dump and a finished run say what they said.
        again = ["--resume"] if tmp_path / "run" in arguments else []
        in_words = pipeline(*arguments)
        assert in_words.code == 0, in_words.err
        assert in_words.out.strip()
        as_json = pipeline(*arguments, *again, "--json")
        assert isinstance(as_json.json, dict)
        assert as_json.out.count("\n") == 1
    # Past Python's own stdout nothing was written either, by a library in C for instance.
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "none").exists()


# ---- inspect ----


def test_an_unfinished_cache_says_so_and_counts_what_it_has(unfinished_dir: Path, cache_dir: Path) -> None:
    facts = pipeline("inspect", unfinished_dir, "--json").json
    assert facts.keys() >= INSPECT_KEYS
    assert (facts["complete"], facts["manifest_sha256"]) == (False, None)
    assert (facts["finished_shards"], facts["num_shards"]) == (2, 3)
    assert facts["num_sequences"] == 16
    assert facts["num_positions"] < CacheReader(cache_dir).manifest.num_positions
    assert "NOT finished: 2 of 3 shards" in pipeline("inspect", unfinished_dir).out


def test_a_cache_of_no_shard_yet_can_be_inspected(cache_dir: Path, tmp_path: Path) -> None:
    shutil.copy(cache_dir / "plan.json", tmp_path)
    facts = pipeline("inspect", tmp_path, "--json").json
    assert (facts["complete"], facts["num_sequences"], facts["bytes_per_position"]) == (False, 0, None)
    assert pipeline("inspect", tmp_path).code == 0


@pytest.mark.parametrize("index", [0, 15])
def test_a_sequence_is_the_same_by_index_and_by_id(cache_dir: Path, index: int) -> None:
    by_index = pipeline("inspect", cache_dir, "--sequence", index, "--json").json
    scored = CacheReader(cache_dir)[index]
    assert by_index["sequence_id"] == scored.sequence.sequence_id.hex()
    assert by_index == pipeline("inspect", cache_dir, "--sequence", by_index["sequence_id"], "--json").json
    assert [position["teacher"][0]["id"] for position in by_index["positions"]] == scored.rows.token_ids[:, 0].tolist()
    in_words = pipeline("inspect", cache_dir, "--sequence", index).out
    assert in_words == pipeline("inspect", cache_dir, "--sequence", by_index["sequence_id"]).out
    assert by_index["text"] in in_words


@pytest.mark.parametrize("which", ["24", "0" * 32, "first", "f" * 31, "g" * 32])
def test_a_sequence_that_is_not_there_is_one_error(cache_dir: Path, which: str) -> None:
    result = pipeline("inspect", cache_dir, "--sequence", which)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


# ---- configuration ----


def test_a_flag_beats_a_setting_beats_the_file(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    (tmp_path / "dump.toml").write_text(
        f"[teacher]\nmodel = {json.dumps(str(teacher_dir))}\n[data]\npath = {json.dumps(str(data_file))}\nlimit = 2\n"
        "[cache]\ntop_k = 16\n"
    )
    command = ["teacher-dump", "--config", tmp_path / "dump.toml", "--out", tmp_path / "cache", "--dry-run", "--json"]
    for options, expected in (
        ([], 2),
        (["--set", "data.limit=3"], 3),
        (["--limit", 4], 4),
        (["--set", "data.limit=3", "--limit", 4], 4),
        (["--limit", 4, "--set", "data.limit=3"], 4),
        (["--set", "data.limit=3", "--set", "data.limit=5"], 5),
    ):
        assert pipeline(*command, *options).json["num_sequences"] == expected, options


def test_a_flag_beats_a_setting_beats_the_file_in_a_run_too(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('steps = 2\nloss = "t_ld"\n')
    command = distill(
        cache_dir, teacher_dir, "--config", tmp_path / "run.toml", "--out", tmp_path / "run", "--dry-run", "--json"
    )
    setting = ["--set", "steps=3", "--set", "loss.name=topk_kl", "--set", "loss.k=5"]
    for options, steps, loss in (
        ([], 2, {"name": "t_ld", "k": 8, "temperature": 3.0}),
        (["--set", "loss.k=5"], 2, {"name": "t_ld", "k": 5, "temperature": 3.0}),
        (setting, 3, {"name": "topk_kl", "k": 5, "temperature": 3.0}),
        ([*setting, "--steps", 4, "--loss", "bild"], 4, {"name": "bild", "k": 5, "temperature": 3.0}),
    ):
        work = pipeline(*command, *options).json
        assert (work["steps"], work["loss"]) == (steps, loss)


# ---- what is dumped ----


def test_all_positions_are_one_less_than_the_tokens(teacher_dir: Path, data_file: Path, tmp_path: Path) -> None:
    cache = dump(teacher_dir, data_file, tmp_path / "all", "--positions", "all")
    facts = pipeline("inspect", cache, "--json").json
    assert facts["positions"] == "all"
    assert facts["num_positions"] == facts["num_tokens"] - facts["num_sequences"]
    for scored in CacheReader(cache):
        assert scored.rows.num_positions == scored.sequence.num_tokens - 1
        assert not scored.sequence.loss_mask.all()


def test_response_positions_are_the_rows_of_all_positions(
    cache_dir: Path, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    everything = CacheReader(dump(teacher_dir, data_file, tmp_path / "all", "--positions", "all"))
    for scored in CacheReader(cache_dir):
        whole = everything[everything.index_of(scored.sequence.sequence_id)]
        rows = scored.sequence.target_rows("response")
        assert (whole.rows.token_ids[rows] == scored.rows.token_ids).all()
        assert whole.rows.label_logit[rows] == pytest.approx(scored.rows.label_logit, abs=1e-4)


def test_messages_are_dumped_through_the_chat_template(teacher_dir: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "The teacher."}]
    rows = [{"messages": [*turns[:1], {**turns[1], "content": f"The teacher, {n}."}]} for n in range(3)]
    reader = CacheReader(dump(teacher_dir, write_jsonl(tmp_path / "chats.jsonl", rows), tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    texts = {tokenizer.decode(scored.sequence.input_ids) for scored in reader}
    assert texts == {tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows}
    for scored in reader:
        trained = tokenizer.decode(scored.sequence.input_ids[scored.sequence.loss_mask])
        assert re.fullmatch(r"The teacher, \d\.<\|im_end\|>\n?", trained)


def test_every_token_of_a_text_but_the_first_is_trained(teacher_dir: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"The student reads disk {n}."} for n in range(3)])
    reader = CacheReader(dump(teacher_dir, rows, tmp_path / "cache"))
    assert len(reader) == 3
    eos = AutoTokenizer.from_pretrained(teacher_dir).eos_token_id
    for scored in reader:
        assert scored.sequence.loss_mask.tolist() == [False] + [True] * scored.rows.num_positions
        assert scored.sequence.input_ids[-1] == eos


# ---- responses by the teacher ----


def test_a_response_starts_after_its_prompt_and_is_what_is_trained(
    answered_dir: Path, talkative_dir: Path, prompts_file: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talkative_dir)
    lines = prompts_file.read_text(encoding="utf-8").splitlines()
    prompts = [tokenizer(json.loads(line)["prompt"], add_special_tokens=False)["input_ids"] for line in lines]
    reader = CacheReader(answered_dir)
    found = []
    for scored in reader:
        ids, trained = scored.sequence.input_ids.tolist(), scored.sequence.loss_mask.tolist()
        length = trained.index(True)
        assert trained == [False] * length + [True] * (len(ids) - length)
        assert scored.rows.num_positions == len(ids) - length
        found.append(ids[:length])
    assert sorted(found) == sorted(prompts)


def test_a_response_ends_at_eos_or_at_its_longest(answered_dir: Path, talkative_dir: Path) -> None:
    eos = AutoTokenizer.from_pretrained(talkative_dir).eos_token_id
    ended = cut = 0
    for scored in CacheReader(answered_dir):
        response = scored.sequence.input_ids[scored.sequence.loss_mask].tolist()
        assert eos not in response[:-1]
        if response[-1] == eos:
            ended += 1
        else:
            assert len(response) == MAX_NEW_TOKENS
            cut += 1
    assert ended > 0
    assert cut > 0


def test_greedy_responses_are_the_argmax_chain_of_the_model(answered_dir: Path, talkative_dir: Path) -> None:
    """Token after token, one prompt at a time, without padding, cache or generation config."""
    model = AutoModelForCausalLM.from_pretrained(talkative_dir).eval()
    eos = AutoTokenizer.from_pretrained(talkative_dir).eos_token_id
    for scored in CacheReader(answered_dir):
        ids = torch.tensor(scored.sequence.input_ids).long()
        chain = ids[: scored.sequence.loss_mask.tolist().index(True)]
        for _ in range(MAX_NEW_TOKENS):
            with torch.no_grad():
                best = model(chain[None]).logits[0, -1].argmax()
            chain = torch.cat([chain, best[None]])
            if best == eos:
                break
        assert ids.tolist() == chain.tolist()
        # The stored rows say so too: the label is the teacher's first id.
        assert scored.rows.token_ids[:, 0].tolist() == ids[scored.sequence.loss_mask].tolist()


def test_the_same_seed_samples_the_same_bytes_and_another_seed_others(
    talkative_dir: Path, prompts_file: Path, tmp_path: Path
) -> None:
    def sampled(name: str, seed: int) -> dict[str, Any]:
        choice = ["--limit", 9, "--set", "responses.temperature=1.0", "--set", f"responses.seed={seed}"]
        cache = dump(talkative_dir, prompts_file, tmp_path / name, *RESPOND, *choice)
        return {path.name: path.read_bytes() for path in sorted(cache.iterdir()) if path.is_file()}

    first, again, other = sampled("first", 1), sampled("again", 1), sampled("other", 2)
    assert first == again
    assert all(first[shard_name(shard)] != other[shard_name(shard)] for shard in range(2))
