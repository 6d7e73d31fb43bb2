"""What moves the weights: schedules, decay, an average, AdamW of torch and of bitsandbytes."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from tests.command_line import Result, pipeline
from tests.forked import Forks
from tests.test_kill import differences
from tests.test_resume import without_times
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_models import save_tiny_model
from workers.distill.config import OptimizerConfig
from workers.distill.engines.optimizer import make_optimizer


def command(cache_dir: Path, student: Path, steps: int, **optimizer: object) -> list[object]:
    settings = [word for key, value in optimizer.items() for word in ("--set", f"optimizer.{key}={value}")]
    return [
        "distill", "--cache", cache_dir, "--student", student, "--steps", steps, "--dtype", "float32", "--device",
        "cpu", "--loss", "sft", "--set", "sequences_per_step=4", *settings, "--out",
    ]  # fmt: skip


def trained(folder: Path) -> dict[str, Tensor]:
    """Weights of a saved model by name, tied ones once."""
    return {name: weight.detach() for name, weight in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("cosine", [0.5, 1, 1, 0.1 + 0.9 * (2 + 2**0.5) / 4, 0.55, 0.1 + 0.9 * (2 - 2**0.5) / 4]),
        ("linear", [0.5, 1, 1, 0.775, 0.55, 0.325]),
        ("constant", [0.5, 1, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_of_every_step_is_that_of_its_schedule(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, schedule: str, shares: list[float]
) -> None:
    ends = {} if schedule == "constant" else {"min_lr_ratio": 0.1}
    made = command(cache_dir, teacher_dir, 6, lr=0.01, schedule=schedule, warmup_steps=2, **ends)
    assert pipeline(*made, tmp_path / "run").code == 0
    rates = [record["lr"] for record in without_times(tmp_path / "run")]
    assert rates == pytest.approx([0.01 * share for share in shares])


def test_a_step_moves_a_weight_by_about_its_learning_rate(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """AdamW's first: the gradient divided by its own size."""
    made = command(cache_dir, teacher_dir, 1, lr=0.001, warmup=0.0, weight_decay=0.0)
    assert pipeline(*made, tmp_path / "run").code == 0
    before, after = trained(teacher_dir), trained(tmp_path / "run" / "model")
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    assert moved.max().item() == pytest.approx(0.001, rel=1e-3)
    assert moved.median().item() == pytest.approx(0.001, rel=1e-2)


def test_matrices_decay_and_norms_and_biases_do_not(cache_dir: Path, tmp_path: Path) -> None:
    """A step of 1e-6 with a decay of 1e5 takes a tenth of a weight."""
    student = save_tiny_model(tmp_path / "gpt2", tiny_tokenizer(chat_template=CHATML), GPT2Config, num_hidden_layers=2)
    made = command(cache_dir, student, 1, lr=1e-6, warmup=0.0, weight_decay=1e5)
    assert pipeline(*made, tmp_path / "run").code == 0
    before, after = trained(student), trained(tmp_path / "run" / "model")
    kept = {name for name in before if name.endswith("bias") or ".ln_" in name}
    assert len(kept) == 2 * 8 + 2
    assert {name for name in before if before[name].ndim < 2} == kept
    for name, weight in before.items():
        expected = weight if name in kept else 0.9 * weight
        torch.testing.assert_close(after[name], expected, atol=1.1e-6, rtol=1e-6)


def test_the_average_is_that_of_the_weights_after_each_step(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    made = command(cache_dir, teacher_dir, 4, lr=0.01, ema_decay=0.75)
    kept = ["--set", "checkpoint_every=1", "--keep-checkpoints", 4]
    summary = pipeline(*made, tmp_path / "run", *kept, "--json").json
    assert summary["ema"] == str(tmp_path / "run" / "ema")
    steps = [
        load_file(folder / "model-00000.safetensors")
        for folder in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    ]
    assert len(steps) == 4
    average, last = trained(tmp_path / "run" / "ema"), trained(tmp_path / "run" / "model")
    for name, weight in average.items():
        first, *others = (step[f"model.{name}"].double() for step in steps)
        expected = first
        for other in others:
            expected = 0.75 * expected + 0.25 * other
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(average[name], last[name]) for name in last)
    files = {path.name for path in (tmp_path / "run" / "model").iterdir()} - {"README.md"}
    assert {path.name for path in (tmp_path / "run" / "ema").iterdir()} == files


def test_the_fused_optimizer_is_adamw() -> None:
    torch.manual_seed(0)
    config = OptimizerConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    shapes = {"matrix": (5, 3), "norm": (3,)}
    ours = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    plain = {name: nn.Parameter(parameter.detach().double()) for name, parameter in ours.items()}
    optimizer = make_optimizer(ours, config)
    groups = [
        {"params": [plain["matrix"]], "weight_decay": 0.1},
        {"params": [plain["norm"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6, foreach=False, fused=False)
    assert optimizer.defaults["fused"]
    for _ in range(10):
        for name, parameter in ours.items():
            parameter.grad = torch.randn_like(parameter)
            plain[name].grad = parameter.grad.double()
        optimizer.step()
        reference.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.double(), plain[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "adamw_8bit",
        pytest.param("paged_adamw", marks=pytest.mark.slow),
        pytest.param("paged_adamw_8bit", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_of_an_optimizer_of_bitsandbytes_resumes_bit_for_bit(
    cache_dir: Path, commands: Forks, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'logit-cache[bitsandbytes]'")
    # Its states are in 8 bits for tensors of 4096 numbers or more.
    student = save_tiny_model(tmp_path / "gpt2", tiny_tokenizer(chat_template=CHATML), GPT2Config, n_layer=1)
    made = [*command(cache_dir, student, 8, lr=0.01, name=name), tmp_path / "run", "--set", "checkpoint_every=3"]
    moment = (signal.SIGKILL, r"os.rename .*/\.step-000006.*")
    assert commands.start(*made, signalled=moment).wait().code == -signal.SIGKILL
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "optimizer-00000.safetensors")
    in_bits = {value.dtype for place, value in kept.items() if place.endswith("wte.weight/state1")}
    assert in_bits == {torch.uint8 if name.endswith("8bit") else torch.float32}
    assert commands.start(*made, "--resume").wait().code == 0
    made[made.index(tmp_path / "run")] = tmp_path / "undisturbed"
    assert commands.start(*made).wait().code == 0
    assert without_times(tmp_path / "run") == without_times(tmp_path / "undisturbed")
    assert differences(tmp_path / "run" / "model", tmp_path / "undisturbed" / "model") == []
    losses = [record["loss"] for record in without_times(tmp_path / "run")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_optimizers_of_bitsandbytes_are_for_whole_weights(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, engine: str
) -> None:
    made = command(cache_dir, teacher_dir, 1, name="adamw_8bit")
    result: Result = pipeline(*made, tmp_path / "run", "--engine", engine)
    assert result.code == 1
    assert f"optimizer.name=adamw_8bit keeps its state in blocks that engine {engine} would cut" in result.err
    assert not (tmp_path / "run").exists()


def test_an_average_under_deepspeed_is_refused(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    made = command(cache_dir, teacher_dir, 1, ema_decay=0.9)
    result = pipeline(*made, tmp_path / "run", "--engine", "deepspeed")
    assert result.code == 1
    assert "DeepSpeed keeps no average of the weights: choose --engine fsdp2" in result.err
