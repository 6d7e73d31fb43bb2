"""The files in examples/, and the commands and configs of the pages on training, are accepted as they are."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.command_line import pipeline
from tests.conftest import dump, write_jsonl
from tests.forked import Forks
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_models import save_tiny_llama
from workers.distill.config import DistillConfig
from workers.distill.terms import terms_of

EXAMPLES = Path(__file__).parent.parent / "examples"
THESIS = EXAMPLES / "bild-thesis.toml"
ZERO2 = EXAMPLES / "deepspeed-zero2.json"
PAGES = [EXAMPLES.parent / "docs" / "howto" / name for name in ("train-at-scale.md", "adapters-and-curricula.md")]


def blocks(language: str) -> list[str]:
    """Code of one language in the pages; "" of none."""
    found = [re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S) for page in PAGES]
    return [code for in_page in found for its_language, code in in_page if its_language == language]


def commands_with_caches() -> list[str]:
    """Options of every ``pipeline distill`` in the pages that says what it trains on."""
    code = "\n".join(blocks("")).replace("\\\n", " ")
    return [options for options in re.findall(r"pipeline distill (.*)", code) if "--cache" in options]


@pytest.fixture(scope="module")
def all_positions(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 sequences, the prompts' positions among theirs."""
    return dump(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "all", "--positions", "all")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    return save_tiny_llama(folder, tiny_tokenizer(chat_template=CHATML), layers=2, seed=1)


@pytest.mark.parametrize(("options", "steps"), [(("sequences_per_step=3",), 64), (("optimizer.warmup_steps=2",), 8)])
def test_the_thesis_s_recipe_is_eight_epochs_of_bild_and_prompt_kl(
    all_positions: Path, student: Path, tmp_path: Path, options: tuple[str, ...], steps: int
) -> None:
    work = pipeline(
        "distill", "--config", THESIS, "--cache", all_positions, "--student", student, "--out", tmp_path / "run",
        "--dry-run", "--json", "--set", *options,
    ).json  # fmt: skip
    assert (work["steps"], work["epochs"]) == (steps, 8)
    assert work["loss"] == {"name": "bild", "k": 8, "temperature": 3.0}
    assert work["prompt_loss"] == {"name": "kl", "temperature": 1.0, "T2": False}
    assert not (tmp_path / "run").exists()


def test_the_thesis_s_recipe_is_the_loss_bild_total() -> None:
    recipe = {**tomllib.loads(THESIS.read_text(encoding="utf-8")), "cache": "cache", "student": "student"}
    total = {**recipe, "loss": "bild_total"}
    del total["prompt_loss"]
    written, named = (terms_of(DistillConfig(**config), 16, 100) for config in (recipe, total))
    assert [(term.part, term.loss.values, term.params, term.weight) for term in written] == [
        (term.part, term.loss.values, term.params, term.weight) for term in named
    ]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--config", THESIS, "--set", "optimizer.warmup_steps=2"),
        ("--dtype", "float32", "--set", "optimizer.lr=1e-3"),
    ],
)
def test_the_deepspeed_file_leaves_the_run_what_is_the_run_s(
    all_positions: Path, student: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'logit-cache[deepspeed]'")
    result = pipeline(
        "distill", "--engine", "deepspeed", "--deepspeed-config", ZERO2, "--cache", all_positions,
        "--student", student, "--out", tmp_path / "run", "--dry-run", *options,
    )  # fmt: skip
    assert result.code == 0, result.err


@pytest.fixture(scope="module")
def workplace(cache_dir: Path, student: Path, tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path) -> Path:
    """A folder with what the pages name."""
    folder = tmp_path_factory.mktemp("workplace")
    rows = [{"prompt": f"def f{number}():", "response": f"return {number}"} for number in range(6)]
    (folder / "caches").mkdir()
    for name in ("code", "held-out"):
        dump(teacher_dir, write_jsonl(folder / f"{name}.jsonl", rows), folder / "caches" / name)
    (folder / "caches" / "train").symlink_to(cache_dir)
    (folder / "student").symlink_to(student)
    (folder / "examples").symlink_to(EXAMPLES)
    return folder


@pytest.mark.parametrize("options", commands_with_caches())
def test_the_pages_commands_are_accepted(options: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tiny teacher is never that sure.
    arguments = shlex.split(options.replace("min_confidence=0.3", "min_confidence=0.1"))
    for extra in ("deepspeed", "peft", "tensorboard"):
        if extra in options:
            pytest.importorskip(extra, reason=f"{extra} is not installed: pip install 'logit-cache[{extra}]'")
    monkeypatch.chdir(workplace)
    result = pipeline("distill", *arguments, "--dry-run")
    assert result.code == 0, result.err


@pytest.mark.parametrize("config", blocks("toml"))
def test_the_pages_configs_are_accepted(
    config: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(config)
    monkeypatch.chdir(workplace)
    result = pipeline("distill", "--config", tmp_path / "run.toml", "--out", tmp_path / "run", "--dry-run")
    assert result.code == 0, result.err


def test_the_pages_show_commands_and_configs() -> None:
    assert len(commands_with_caches()) >= 10
    assert len(blocks("toml")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--deepspeed-config", ZERO2)], ids=["alone", "with the file"])
def test_the_thesis_s_recipe_trains_on_two_ranks(
    all_positions: Path, student: Path, tmp_path: Path, commands: Forks, options: tuple[object, ...]
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'logit-cache[deepspeed]'")
    # As `deepspeed` starts them: with an option before the command.
    ranks = commands.start_ranks(
        2, "--local_rank=0", "distill", "--config", THESIS, "--cache", all_positions, "--student", student,
        "--out", tmp_path / "run", "--device", "cpu", "--steps", 2, "--set", "optimizer.warmup_steps=2", *options,
    )  # fmt: skip
    ended = [rank.wait() for rank in ranks]
    assert [result.code for result in ended] == [0, 0], ended
    first, second = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert (first["ranks"], first["sequences"], len(first["terms"])) == (2, 24, 2)
    assert [first["lr"], second["lr"]] == pytest.approx([1e-5, 2e-5])
    assert first["loss"] == pytest.approx(sum(first["terms"]))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["summary"]["ranks"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
