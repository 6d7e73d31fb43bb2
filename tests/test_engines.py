"""Every engine, on however many ranks, trains the student that one process trains."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cache_schema.reader import CacheReader
from pipeline import distill
from tests.command_line import pipeline
from tests.engines_process import step_of
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny_cache import CPU
from tests.tiny_models import save_tiny_llama
from workers.distill.config import DistillConfig
from workers.distill.data import TrainingData
from workers.distill.student import load_student
from workers.distill.student_loss import StudentLoss
from workers.distill.train import prepare
from workers.lookup.opening import stored_ladder
from workers.ranks import Ranks

ROOT = Path(__file__).parent.parent

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "torch"},
    "fsdp2": {"name": "fsdp2"},
    **{f"zero-{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
SHARDED = ("fsdp2", "zero-3")
ON_THREE_RANKS = ("ddp", "fsdp2", "zero-2")

# Of a step's three micro-batches one of two ranks has none in the second round; of the two in an epoch's last step one
# of three ranks has none at all. Both paths of the loss: leading ids and whole rows.
RUN = {
    "student_layers": [0, 2], "loss": "t_ld+kl", "dtype": "float32", "device": "cpu", "seed": 7,
    "sequences_per_step": 5, "micro_batch_sequences": 2, "optimizer": {"lr": 3e-3, "max_grad_norm": 0.5},
}  # fmt: skip
LORA = {"r": 4, "alpha": 8}
CASES: dict[str, dict[str, Any]] = {
    "whole": {"epochs": 2, "eval_every": 4},
    "untied": {"student": "untied"},
    "checkpointed": {"gradient_checkpointing": True},
    "frozen": {"freeze": ["embeddings"]},
    "lora": {"peft": LORA},
    "bild": {"loss": "bild"},
    "bfloat16": {"dtype": "bfloat16"},
}
OF_SHARDED = ("untied", "checkpointed", "frozen", "lora")

# What micro-batches of other sizes change in one process is rounding; engines add in yet another order.
ROUNDINGS = 10
OF_A_REAL_STUDENT = 100  # amplifies rounding over 20 steps: 34 times as far were seen, of a norm under ZeRO
# One rounding may flip BiLD's choice at a near-tie: seen to move a gradient norm by 7e-4. A mean in place of a sum, or
# a micro-batch counted twice, moves it by far more.
FLIP = 0.01
OF_FLIPS = 0.2  # over 20 steps of a larger student
# bfloat16 keeps 8 bits: the distance of its loss from float32's, in any engine.
OF_BFLOAT16 = 0.05
OF_A_REAL_BFLOAT16 = 0.2  # over 20 steps of a larger student, from one process in bfloat16

HEAD_SIZE = 384 * 32  # numbers

_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Material:
    cache: Path
    teacher: Path
    untied: Path
    """The same with a head of its own."""

    def config(self, case: str, engine: Mapping[str, Any] | None = None, **others: Any) -> dict[str, Any]:
        settings = {**RUN, **CASES[case], **others}
        settings["student"] = str(self.untied if settings.get("student") == "untied" else self.teacher)
        if "eval_every" in settings:
            settings["eval_cache"] = str(self.cache)
        return {**settings, "cache": str(self.cache), "engine": dict(engine or {})}


@dataclass(frozen=True)
class Run:
    """A finished run's directory."""

    folder: Path

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model" / "model.safetensors")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Before the first step, between, after the last."""
        summary = json.loads((self.folder / "run.json").read_text())["summary"]
        between = [step["eval"] for step in self.steps if "eval" in step]
        return [summary["eval_before"], *between, summary["eval"]]

    def apart(self, other: "Run") -> dict[str, float]:
        """The largest difference of a step's loss and gradient norm, as a share of it, and of a final weight."""
        weights, others = self.weights, other.weights
        return {
            **{key: apart(self.steps, other.steps, key) for key in ("loss", "grad_norm")},
            "weight": max(float((weights[name] - others[name]).abs().max()) for name in others),
        }


def apart(steps: list[dict[str, Any]], others: list[dict[str, Any]], key: str) -> float:
    return max(abs(step[key] / other[key] - 1) for step, other in zip(steps, others, strict=True))


@pytest.fixture(scope="module")
def material(teacher_dir: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    untied = save_tiny_llama(tmp_path_factory.mktemp("models") / "untied", tokenizer, tie_word_embeddings=False)
    return Material(cache_dir, teacher_dir, untied)


@pytest.fixture(scope="module")
def one(material: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Run]:
    """One process, by case and sequences of a micro-batch."""
    folder = tmp_path_factory.mktemp("one")
    runs = {}
    for case in CASES:
        for size in (1, 2, 5) if case != "bfloat16" else (2,):
            config = material.config(case, micro_batch_sequences=size, gradient_checkpointing=False)
            out = folder / f"{case}-{size}"
            distill.run(DistillConfig.model_validate(config), out, resume=False)
            runs[case, size] = Run(out)
    return runs


@pytest.fixture(scope="module")
def two_ranks(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two ranks make of every case, named CASE-ENGINE."""
    jobs = [
        {"name": f"{case}-{engine}", "kind": "run", "config": material.config(case, ENGINES[engine])}
        for case in CASES
        for engine in (SHARDED if case in OF_SHARDED else ENGINES)
    ]
    jobs += [
        {"name": f"gradients-{engine}", "kind": "gradients", "config": material.config("bild", ENGINES[engine])}
        for engine in ("ddp", "fsdp2")
    ]
    folder = tmp_path_factory.mktemp("two")
    # Otherwise DeepSpeed keeps whatever is as small as a tiny model's weights.
    nothing_is_small = folder / "deepspeed.json"
    nothing_is_small.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}', encoding="utf-8")
    in_full = {"fsdp2": ENGINES["fsdp2"], "zero-3": {**ENGINES["zero-3"], "deepspeed_config": str(nothing_is_small)}}
    jobs += [
        {
            "name": f"gathers-{case}-{engine}",
            "kind": "gathers",
            "config": material.config(case, in_full[engine], steps=3, micro_batch_sequences=1, eval_every=None),
        }
        for case in ("whole", "untied")
        for engine in SHARDED
    ]
    return launch(2, jobs, folder)


@pytest.fixture(scope="module")
def three_ranks(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    jobs = [
        {"name": f"whole-{engine}", "kind": "run", "config": material.config("whole", ENGINES[engine])}
        for engine in ON_THREE_RANKS
    ]
    return launch(3, jobs, tmp_path_factory.mktemp("three"))


def launch(
    num_ranks: int, jobs: list[dict[str, Any]], folder: Path, patience_seconds: float = _PATIENCE_SECONDS
) -> Path:
    """Do jobs of ``tests.engines_process`` on so many ranks; returns the folder, where they are."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks),
        "-m", "tests.engines_process", str(folder / "jobs.json"), str(folder),
    ]  # fmt: skip
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = launcher.communicate(timeout=patience_seconds)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # which ends the ranks too
        output, _ = launcher.communicate()
        pytest.fail(f"{num_ranks} ranks wait for one another:\n{output[-3000:]}")
    assert launcher.returncode == 0, output[-6000:]
    return folder


def rounding(one: Mapping[tuple[str, int], Run], case: str) -> dict[str, float]:
    """What engines may be apart by."""
    spreads = [one[case, size].apart(one[case, 2]) for size in (1, 5)]
    least = torch.finfo(torch.float32).eps
    return {key: ROUNDINGS * max(least, *(spread[key] for spread in spreads)) for key in spreads[0]}


def assert_same_training(run: Run, reference: Run, most: Mapping[str, float]) -> None:
    for key in ("step", "lr", "sequences", "positions", "lookups", "teacher_forwards"):
        assert [step[key] for step in run.steps] == [step[key] for step in reference.steps]
    found = run.apart(reference)
    assert all(found[key] <= most[key] for key in found), (found, most)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_what_one_process_trains(one: dict[tuple[str, int], Run], two_ranks: Path, engine: str) -> None:
    run = Run(two_ranks / f"whole-{engine}")
    assert {step["ranks"] for step in run.steps} == {2}
    assert [step["sequences"] for step in run.steps] == [5, 5, 5, 5, 4] * 2
    assert all(step["grad_norm"] > RUN["optimizer"]["max_grad_norm"] for step in run.steps)
    assert_same_training(run, one["whole", 2], rounding(one, "whole"))


@pytest.mark.parametrize("engine", ON_THREE_RANKS)
def test_three_ranks_train_what_one_process_trains(
    one: dict[tuple[str, int], Run], three_ranks: Path, engine: str
) -> None:
    run = Run(three_ranks / f"whole-{engine}")
    assert {step["ranks"] for step in run.steps} == {3}
    assert_same_training(run, one["whole", 2], rounding(one, "whole"))


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("case", OF_SHARDED)
def test_sharded_students_of_every_kind_are_those_of_one_process(
    one: dict[tuple[str, int], Run], two_ranks: Path, case: str, engine: str
) -> None:
    """Gradient checkpointing against a run without."""
    assert_same_training(Run(two_ranks / f"{case}-{engine}"), one[case, 2], rounding(one, case))


@pytest.mark.parametrize("engine", ENGINES)
def test_bild_and_its_lookups_are_those_of_one_process(
    one: dict[tuple[str, int], Run], two_ranks: Path, engine: str
) -> None:
    run, reference = Run(two_ranks / f"bild-{engine}").steps, one["bild", 2].steps
    assert max(apart(run, reference, key) for key in ("loss", "grad_norm")) < FLIP
    asked = [sum(step["lookups"].values()) for step in reference]
    assert [sum(step["lookups"].values()) for step in run] == asked
    assert all(step["lookups"]["cached"] > 0 and step["lookups"]["hidden"] > 0 for step in run)
    near = [{tier: pytest.approx(pairs, abs=2) for tier, pairs in step["lookups"].items()} for step in reference]
    assert [step["lookups"] for step in run] == near


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluations_within_a_run_are_those_of_one_process(
    one: dict[tuple[str, int], Run], two_ranks: Path, engine: str
) -> None:
    reference = one["whole", 2].evaluations
    assert len(reference) == 4
    for found, expected in zip(Run(two_ranks / f"whole-{engine}").evaluations, reference, strict=True):
        assert found["positions"] == expected["positions"]
        most = rounding(one, "whole")["loss"]
        assert (found["kl"], found["loss"]) == pytest.approx((expected["kl"], expected["loss"]), rel=most)
        # Two of the student's logits that all but tie may change places.
        one_position = 1 / expected["positions"]
        assert found["overlap"]["8"] == pytest.approx(expected["overlap"]["8"], abs=one_position)
        assert found["top1_agreement"] == pytest.approx(expected["top1_agreement"], abs=one_position)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_leaves_the_same_plain_model(
    one: dict[tuple[str, int], Run], two_ranks: Path, engine: str
) -> None:
    ours, theirs = (run / "model" for run in (two_ranks / f"whole-{engine}", one["whole", 2].folder))
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in set(names) - {"README.md", "model.safetensors"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert described(ours) == described(theirs)
    model, loading = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert model(torch.arange(24)[None]).logits.isfinite().all()


def described(folder: Path) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return file.metadata(), {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("engine", SHARDED)
def test_sharded_adapters_are_saved_alone_as_by_one_process(
    one: dict[tuple[str, int], Run], two_ranks: Path, engine: str
) -> None:
    ours, theirs = (run / "adapter" for run in (two_ranks / f"lora-{engine}", one["lora", 2].folder))
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert found.keys() == expected.keys()
    most = rounding(one, "lora")["weight"]
    assert all(torch.allclose(found[name], expected[name], rtol=0.0, atol=most) for name in expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_stays_near_float32(one: dict[tuple[str, int], Run], two_ranks: Path, engine: str) -> None:
    run = Run(two_ranks / f"bfloat16-{engine}").steps
    assert all(math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"]) for step in run)
    # The reference of checkpointing: as long, in float32, and without.
    assert 0 < apart(run, one["checkpointed", 2].steps, "loss") < OF_BFLOAT16
    assert apart(run, one["bfloat16", 2].steps, "loss") < OF_BFLOAT16


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_gradients_are_the_plain_sum_over_micro_batches_and_ranks(
    material: Material, two_ranks: Path, engine: str
) -> None:
    """Against one process in float64, and no further from it than one process in float32, a few times."""
    config = DistillConfig.model_validate(material.config("bild"))
    data = TrainingData.of([CacheReader(material.cache)])
    training = prepare(config, data, Path("no-such-run"), Ranks(CPU))
    batches, terms = step_of(training)
    training.close()

    def summed(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = load_student(config.student, config.student_layers, gradient_checkpointing=False).to(dtype)
        ladder = stored_ladder(data.readers[0], CPU)
        student = StudentLoss(model, [ladder], vocab_size=data.vocab_size, autocast=False)
        sums = {name: torch.zeros_like(parameter) for name, parameter in student.named_parameters()}
        for batch in batches:
            loss, _ = student.share(batch, terms)
            for name, gradient in zip(sums, torch.autograd.grad(loss, list(student.parameters())), strict=True):
                sums[name] += gradient
        return sums

    exact, single = summed(torch.float64), summed(torch.float32)
    found = load_file(two_ranks / f"gradients-{engine}")
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        most = ROUNDINGS * max(distance(single[name], gradient), torch.finfo(torch.float32).eps)
        assert distance(found[name], gradient) <= most, name


def distance(gradient: torch.Tensor, exact: torch.Tensor) -> float:
    """L2, as a share of the exact one's."""
    return float((gradient.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", ["whole", "untied"])
@pytest.mark.parametrize("engine", SHARDED)
def test_the_head_is_gathered_once_a_step(two_ranks: Path, case: str, engine: str) -> None:
    """Of three micro-batches on each rank, forward and backward."""
    steps = json.loads((two_ranks / f"gathers-{case}-{engine}").read_text())
    if engine == "fsdp2":
        # With what else is the root's own; a layer is smaller.
        assert [len([size for size in sizes if size >= HEAD_SIZE]) for sizes in steps] == [1, 1, 1]
    else:
        # Alone, and in ZeRO-3's first step oftener, which finds out what is used when.
        assert [sizes.count(HEAD_SIZE) for sizes in steps[1:]] == [1, 1]


@pytest.mark.slow
def test_engines_train_a_student_of_a_real_teacher_alike(tmp_path: Path) -> None:
    """20 steps of SmolLM2's 10-layer student on two ranks: DDP, FSDP2 and ZeRO 1 to 3."""
    teacher, cache, prompts = tmp_path / "teacher", tmp_path / "cache", tmp_path / "prompts.jsonl"
    subprocess.run([sys.executable, str(ROOT / "examples" / "fetch_teacher.py"), str(teacher)], check=True)
    lines = (ROOT / "examples" / "prompts-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    prompts.write_text("".join(lines[:48]), encoding="utf-8")
    dumped = pipeline(
        "teacher-dump", "--teacher", teacher, "--data", prompts, "--responses", "teacher", "--out", cache,
        "--set", "responses.max_new_tokens=16",
    )  # fmt: skip
    assert dumped.code == 0, dumped.err

    def config(loss: str, dtype: str, engine: Mapping[str, Any], size: int = 2) -> dict[str, Any]:
        return {
            "cache": str(cache), "student": str(teacher), "student_layers": [0, 3, 6, 9, 12, 15, 18, 21, 25, 29],
            "loss": loss, "dtype": dtype, "device": "cpu", "steps": 20, "sequences_per_step": 5,
            "micro_batch_sequences": size, "optimizer": {"lr": 5e-4}, "engine": engine,
        }  # fmt: skip

    def alone(loss: str, dtype: str, size: int = 2) -> list[dict[str, Any]]:
        asked = DistillConfig.model_validate(config(loss, dtype, {"name": "torch"}, size))
        training = prepare(asked, TrainingData.of([CacheReader(cache)]), tmp_path / "no-such-run", Ranks(CPU))
        steps = list(training.steps())
        training.close()
        return steps

    compared = [("t_ld+kl", "float32"), ("bild", "float32"), ("t_ld+kl", "bfloat16")]
    engines = {name: engine for name, engine in ENGINES.items() if name != "zero-0"}
    jobs = [
        {"name": f"{loss}-{dtype}-{name}", "kind": "steps", "config": config(loss, dtype, engine)}
        for loss, dtype in compared
        for name, engine in engines.items()
    ]
    folder = launch(2, jobs, tmp_path, patience_seconds=3600.0)
    whole, bild, half = (alone(*pair) for pair in compared)
    other = alone("t_ld+kl", "float32", size=1)
    for name in engines:
        found, found_bild, found_half = (
            json.loads((folder / f"{loss}-{dtype}-{name}").read_text()) for loss, dtype in compared
        )
        for key in ("loss", "grad_norm"):
            rounded = max(torch.finfo(torch.float32).eps, apart(other, whole, key))
            assert apart(found, whole, key) <= OF_A_REAL_STUDENT * rounded, (name, key)
            assert apart(found_bild, bild, key) < OF_FLIPS, (name, key)
        assert all(math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"]) for step in found_half)
        assert apart(found_half, half, "loss") < OF_A_REAL_BFLOAT16, name
