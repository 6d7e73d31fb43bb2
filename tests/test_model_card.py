"""The model card of a real tiny run."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache_schema.reader import CacheReader
from pipeline.model_card import hub_name, model_card, write_model_card
from tests.command_line import pipeline


@pytest.fixture(scope="module")
def run_dir(teacher_dir: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny-bild"
    result = pipeline(
        "distill", "--cache", cache_dir, "--eval-cache", cache_dir, "--student", teacher_dir, "--student-layers", "0",
        "--loss", "bild+0.5*sft", "--out", out, "--steps", 2, "--dtype", "float32", "--device", "cpu", "--seed", 12345,
    )  # fmt: skip
    assert result.code == 0, result.err
    return out


def test_the_front_matter_is_what_the_hub_reads(run_dir: Path, cache_dir: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(_card(run_dir, cache_dir)).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert "distillation" in data["tags"]
    assert "base_model" not in data, "a folder without a hub name has none"
    assert "datasets" not in data, "a local file is no data set of the hub"


def test_hub_names_stand_in_the_front_matter(run_dir: Path, cache_dir: Path) -> None:
    reader = CacheReader(cache_dir)
    dataset = reader.plan.dataset.model_copy(update={"name": "databricks/dolly"})
    plan = reader.plan.model_copy(update={"dataset": dataset})
    object.__setattr__(reader, "manifest", reader.manifest.model_copy(update={"plan": plan}))
    document = _run_json(run_dir)
    document["config"]["student"] = "HuggingFaceTB/SmolLM2-135M"
    front = yaml.safe_load(_card_of(document, run_dir, reader).split("---")[1])
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert front["datasets"] == ["databricks/dolly"]


def test_it_says_what_the_run_was(run_dir: Path, cache_dir: Path) -> None:
    document, reader = _run_json(run_dir), CacheReader(cache_dir)
    rows = _rows(_card(run_dir, cache_dir))
    plan, summary = reader.plan, document["summary"]
    assert rows["Teacher", "name"] == "teacher"
    assert rows["Teacher", "fingerprint"] == plan.teacher.fingerprint
    assert rows["Teacher", "dtype"] == plan.teacher.dtype
    assert rows["Cache", "manifest sha256"] == reader.manifest_sha256
    assert rows["Cache", "sequences"] == "24"
    assert rows["Cache", "positions"] == f"{reader.manifest.num_positions} (response)"
    assert rows["Cache", "top-k"] == "16"
    assert rows["Cache", "hidden states"].startswith(plan.hidden_states.dtype)  # type: ignore[union-attr]
    assert rows["Student", "layers kept"] == "0"
    assert rows["Student", "layers"] == "1"
    assert rows["Loss", "response"] == "bild+0.5*sft"
    assert {key for section, key in rows if section == "Loss"} >= {
        f"response: {name}.{key}"
        for name, table in document["loss_parameters"]["response"].items()
        for key in table
    }  # fmt: skip
    assert rows["Recipe", "seed"] == "12345"
    assert rows["Recipe", "steps"] == "2"
    assert rows["Recipe", "optimizer.lr"] == "2e-05"
    assert rows["Recipe", "dtype"] == "float32"
    assert rows["Work", "teacher forwards"] == "0"
    assert rows["Work", "lookups, hidden"] == str(summary["lookups"]["hidden"])
    assert rows["Versions", "torch"] == document["versions"]["torch"]


def test_results_stand_before_and_after(run_dir: Path, cache_dir: Path) -> None:
    summary, card = _run_json(run_dir)["summary"], _card(run_dir, cache_dir)
    before, after = summary["eval_before"], summary["eval"]
    assert f"| overlap@8 | {before['overlap']['8']:.4g} | {after['overlap']['8']:.4g} |" in card
    assert f"| KL | {before['kl']:.4g} | {after['kl']:.4g} |" in card
    assert f"| loss | {before['loss']:.4g} | {after['loss']:.4g} |" in card
    assert "overlap@32" not in card, "a cache of 16 ids does not know it"


def test_a_run_without_evaluation_has_no_results(run_dir: Path, cache_dir: Path) -> None:
    document = _run_json(run_dir)
    document["summary"] |= {"eval": None, "eval_before": None}
    card = _card_of(document, run_dir, CacheReader(cache_dir))
    assert "## Results" not in card
    assert "None" not in card


def test_no_path_and_no_host_of_the_machine_stands_in_it(run_dir: Path, cache_dir: Path, teacher_dir: Path) -> None:
    card = _card(run_dir, cache_dir)
    for folder in (run_dir, cache_dir, teacher_dir):
        assert folder.name in card
        assert str(folder.parent) not in card
        assert folder.parent.name not in card
    assert not re.search(r"(?<![\w.:/-])/\w", card), "no absolute path"
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", card)


def test_its_example_loads_the_model(run_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = _card(run_dir, cache_dir).split("```python\n")[1].split("```")[0]
    (run_dir.parent / "here").mkdir()
    (run_dir.parent / "here" / run_dir.name).symlink_to(run_dir / "model")
    monkeypatch.chdir(run_dir.parent / "here")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].config.num_hidden_layers == 1
    assert len(names["tokenizer"]) > 0


def test_it_is_written_once(run_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    document, reader = _run_json(run_dir), CacheReader(cache_dir)
    (tmp_path / "config.json").write_bytes((run_dir / "model" / "config.json").read_bytes())
    for _ in range(2):
        write_model_card(tmp_path, document["config"], document, [reader], document["summary"])
        assert (tmp_path / "README.md").read_text() == _card(run_dir, cache_dir)
        document["summary"] |= {"eval": None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json"]


def test_deepspeed_s_settings_stand_where_it_ran(run_dir: Path, cache_dir: Path) -> None:
    document, reader = _run_json(run_dir), CacheReader(cache_dir)
    document["config"]["engine"] = {"name": "torch", "zero_stage": 2}
    assert "zero_stage" not in _card_of(document, run_dir, reader)
    document["config"]["engine"] = {"name": "deepspeed", "zero_stage": 3, "deepspeed_config": "/home/me/zero.json"}
    document["summary"]["engines"] = [
        {"engine": "torch", "ranks": 1, "first_step": 1}, {"engine": "deepspeed", "ranks": 2, "first_step": 3}
    ]  # fmt: skip
    rows = _rows(_card_of(document, run_dir, reader))
    assert rows["Recipe", "engine.zero_stage"] == "3"
    assert rows["Recipe", "engine.deepspeed_config"] == "zero.json"
    assert rows["Recipe", "engine"] == "torch on 1 rank; deepspeed on 2 ranks from step 3 on"


def test_a_folder_is_named_as_on_the_hub_where_it_says_so(tmp_path: Path) -> None:
    assert hub_name("gpt2") == "gpt2"
    snapshot = tmp_path / "models--owner--small" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    assert hub_name(str(snapshot)) == "owner/small"
    (tmp_path / "config.json").write_text('{"_name_or_path": "owner/other"}')
    assert hub_name(str(tmp_path)) == "owner/other"
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path)}))
    assert hub_name(str(tmp_path)) is None


def _card(run_dir: Path, cache_dir: Path) -> str:
    return _card_of(_run_json(run_dir), run_dir, CacheReader(cache_dir))


def _card_of(document: dict[str, Any], run_dir: Path, reader: CacheReader) -> str:
    made_of = {key: value for key, value in document.items() if key not in ("config", "summary")}
    model_config = json.loads((run_dir / "model" / "config.json").read_text())
    return model_card(document["config"], made_of, [reader], document["summary"], model_config)


def _run_json(run_dir: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return document


def _rows(card: str) -> dict[tuple[str, str], str]:
    """Two-column tables by (section, first cell)."""
    rows, section = {}, ""
    for line in card.splitlines():
        section = line[3:] if line.startswith("## ") else section
        if cells := re.fullmatch(r"\| ([^|]+) \| ([^|]+) \|", line):
            rows[section, cells[1]] = cells[2]
    return rows
