"""A real tiny teacher, a real data set and a finished cache, made once per test session."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# No test reaches a hub: a name that is no folder fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# For models this small a second thread costs more than it saves, and on a busy machine several times as much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.command_line import pipeline
from tests.forked import Forks, forks
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_models import save_tiny_llama

TOPICS = ("the capital of France", "two plus three", "a student", "the teacher", "disk", "a token", "the mask", "Paris")


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "teacher", tiny_tokenizer(chat_template=CHATML))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 prompts with responses of ragged lengths."""
    rows = [
        {"prompt": f"What is {topic}? ({number}) ", "response": f"It is {'very ' * (number % 5)}well known: {topic}."}
        for number, topic in enumerate(TOPICS * 3)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


@pytest.fixture(scope="session")
def cache_dir(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache with hidden states, of three shards. Tests read it and never change it."""
    return dump(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "train")


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts ``pipeline`` in processes of its own, without the seconds that importing torch takes."""
    with forks(tmp_path_factory.mktemp("commands")) as started:
        yield started


def dump(teacher_dir: Path, data_file: Path, out: Path, *options: str) -> Path:
    result = pipeline(
        "teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--out", out,
        "--top-k", 16, "--set", "data.max_tokens=128", "--set", "cache.sequences_per_shard=8", *options,
    )  # fmt: skip
    assert result.code == 0, result.err
    return out


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
