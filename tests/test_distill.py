"""A student from the cache is the student a live teacher would have trained."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cache_schema import CacheReader
from tests.command_line import pipeline
from tests.conftest import dump
from workers.distill.order import Order
from workers.distill.student import keep_layers
from workers.losses.dense import dense_loss

STEPS = 20
RUN = [
    "--student-layers", "0,2", "--steps", STEPS, "--dtype", "float32", "--set", "sequences_per_step=6",
    "--set", "micro_batch_sequences=4", "--set", "optimizer.lr=3e-3", "--seed", 7, "--json",
]  # fmt: skip


@pytest.fixture(scope="module")
def exact_cache(teacher_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits stored as float32."""
    return dump(
        teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "exact", "--set", "cache.logit_step=0",
        "--positions", "all",
    )  # fmt: skip


def distill(cache: Path, student: Path, out: Path, *options: object) -> dict[str, Any]:
    return pipeline("distill", "--cache", cache, "--student", student, "--out", out, *RUN, *options).json


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def live_losses(cache: Path, teacher_dir: Path, name: str) -> Iterator[float]:
    """Plain distillation: teacher and student both whole, dense logits, one sequence at a time, autograd throughout.

    The cache gives the tokens and nothing else.
    """
    reader = CacheReader(cache)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir).eval()
    student = AutoModelForCausalLM.from_pretrained(teacher_dir).train()
    keep_layers(student, (0, 2))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    order = Order([len(reader)], None, sequences_per_step=6, seed=7)
    for step in range(STEPS):
        sequences = [reader[pick.index].sequence for pick in order.step(step)]
        values: list[Tensor] = []
        for sequence in sequences:
            input_ids = torch.tensor(sequence.input_ids).long()[None]
            rows = torch.tensor(sequence.loss_mask[1:]).nonzero().squeeze(1)
            with torch.no_grad():
                teacher_logits = teacher(input_ids).logits[0, rows]
            student_logits = student(input_ids).logits[0, rows]
            mean = dense_loss(
                name, student_logits, teacher_logits, torch.ones(len(rows)), labels=input_ids[0, rows + 1]
            )
            values.append(mean * len(rows))
        loss = torch.stack(values).sum() / sum(int(sequence.loss_mask[1:].sum()) for sequence in sequences)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        # Two steps of warm-up, then a cosine to zero.
        rate = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.parametrize("loss", ["bild", "kl", "rkl", "sft"])
def test_a_student_from_the_cache_is_the_student_of_a_live_teacher(
    exact_cache: Path, teacher_dir: Path, tmp_path: Path, loss: str
) -> None:
    """Stored float32 logits and hidden states are the live teacher's own numbers, so only the order of float32 sums
    (batching, chunks, gathered rows) sets the two apart: about 1e-6 of a logit at equal weights, hence 1e-5 of the
    first loss. Adam's first updates divide a gradient by its own size, so where one is rounding noise its sign decides
    a whole step of a weight: twenty steps carry that to below 1e-2 of the loss, ten to below 1e-3."""
    distill(exact_cache, teacher_dir, tmp_path / "run", "--loss", loss)
    from_cache, live = losses(tmp_path / "run"), list(live_losses(exact_cache, teacher_dir, loss))
    assert from_cache[0] == pytest.approx(live[0], rel=1e-5)
    assert from_cache[:10] == pytest.approx(live[:10], rel=1e-3)
    assert from_cache == pytest.approx(live, rel=1e-2)
    assert from_cache[-1] < 0.9 * from_cache[0]


def test_a_teacher_asked_live_gives_the_student_of_the_hidden_states(
    teacher_dir: Path, data_file: Path, exact_cache: Path, tmp_path: Path
) -> None:
    bare = dump(
        teacher_dir, data_file, tmp_path / "bare", "--no-hidden-states", "--set", "cache.logit_step=0",
        "--positions", "all",
    )  # fmt: skip
    hidden = distill(exact_cache, teacher_dir, tmp_path / "hidden")
    live = distill(bare, teacher_dir, tmp_path / "live", "--teacher", teacher_dir)
    assert losses(tmp_path / "live") == pytest.approx(losses(tmp_path / "hidden"), rel=1e-2)
    assert hidden["lookups"]["live"] == hidden["teacher_forwards"] == live["lookups"]["hidden"] == 0
    assert live["lookups"]["live"] > 0
    assert 0 < live["teacher_forwards"] <= live["sequences"]
    pairs = 2 * live["positions"] * 8 // 2
    assert sum(hidden["lookups"].values()) == sum(live["lookups"].values()) == pairs


def test_the_grid_moves_the_loss_by_no_more_than_its_rounding(
    cache_dir: Path, exact_cache: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Each stored logit is within h = 1/128 nat, a difference of two within 2h, and the derivative of KL(P || Q) by
    one of the teacher's differences is P (log P/Q - KL) / T: at equal weights a half of the loss moves by at most
    2h/T = 0.0052 times the mean of |log P/Q - KL| under P, which is below 1 where the loss is. Later steps start from
    weights that have drifted apart a little, so they are held to a tenth."""
    distill(cache_dir, teacher_dir, tmp_path / "grid")
    distill(exact_cache, teacher_dir, tmp_path / "exact")
    grid, exact = losses(tmp_path / "grid"), losses(tmp_path / "exact")
    assert exact[0] < 1
    assert grid[0] != exact[0]
    assert grid[0] == pytest.approx(exact[0], abs=2 * (2 / 128) / 3)
    assert grid == pytest.approx(exact, rel=0.1)


def test_micro_batch_size_changes_memory_not_the_training(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    for size in (1, 6):
        distill(cache_dir, teacher_dir, tmp_path / f"{size}", "--set", f"micro_batch_sequences={size}")
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "6"), rel=1e-2)


def test_gradient_checkpointing_changes_memory_not_the_training(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    distill(cache_dir, teacher_dir, tmp_path / "plain")
    distill(cache_dir, teacher_dir, tmp_path / "checkpointed", "--set", "gradient_checkpointing=true")
    assert losses(tmp_path / "checkpointed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_the_same_seed_gives_the_same_bytes(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        distill(cache_dir, teacher_dir, tmp_path / name)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_bf16_trains_float32_weights_under_autocast(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    distill(cache_dir, teacher_dir, tmp_path / "bf16", "--dtype", "bfloat16")
    distill(cache_dir, teacher_dir, tmp_path / "fp32")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16" / "model").dtype == torch.float32


def test_a_prompt_loss_trains_the_prompts_positions_too(exact_cache: Path, teacher_dir: Path, tmp_path: Path) -> None:
    with_prompt = distill(
        exact_cache, teacher_dir, tmp_path / "prompt", "--prompt-loss", "kl", "--set", "prompt_loss.temperature=1.0"
    )
    without = distill(exact_cache, teacher_dir, tmp_path / "plain")
    assert with_prompt["positions"] > without["positions"]
    first = json.loads((tmp_path / "prompt" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["terms"][0] == pytest.approx(losses(tmp_path / "plain")[0])
    assert first["loss"] == pytest.approx(sum(first["terms"]))


def test_the_run_directory_holds_what_the_run_was(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    summary = distill(cache_dir, teacher_dir, tmp_path / "run", "--eval-cache", cache_dir)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.toml", "metrics.jsonl", "model", "run.json",
    ]  # fmt: skip
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["manifest_sha256"] == [CacheReader(cache_dir).manifest_sha256]
    assert record["summary"] == summary
    assert summary["eval"]["overlap"]["8"] > summary["eval_before"]["overlap"]["8"]
    evaluated = pipeline("evaluate", tmp_path / "run" / "model", "--cache", cache_dir, "--json").json
    assert evaluated == summary["eval"]
    again = pipeline("distill", "--config", tmp_path / "run" / "config.toml", "--out", tmp_path / "again", "--json")
    assert again.json["loss"] == summary["loss"]


def test_a_dry_run_writes_nothing(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    work = distill(cache_dir, teacher_dir, tmp_path / "run", "--dry-run")
    assert (work["steps"], work["sequences_in_cache"]) == (STEPS, 24)
    assert not (tmp_path / "run").exists()
