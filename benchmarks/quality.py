"""The student of each tier against the student of a live teacher: same seed, same data, 100 steps of BiLD in float32.

The live teacher is a loop of its own: both models whole, dense logits, no cache but for the tokens, one sequence at a
time. It runs twice, the second time over each step's sequences in reverse: the sum of a step is the same but for its
rounding, so what sets these two apart is what rounding explains.
`python -m benchmarks.quality [--data FILE.jsonl] [--rows 80] [--steps 100]`
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.material import OUT, STUDENT_LAYERS, TEACHER, add_data_options, dump, pipeline
from cache_schema import CacheReader
from workers.distill.config import OptimizerConfig
from workers.distill.learning_rate import learning_rate
from workers.distill.order import Order
from workers.distill.student import keep_layers
from workers.losses.dense import dense_loss

SEED, SEQUENCES_PER_STEP, LR, HELD_OUT = 7, 4, 5e-4, 16
COMPARED = (
    ("reverse", "plain loop"),
    ("hidden, float32 logits", "plain loop"),
    ("logged", "live"),
    ("hidden", "live"),
    ("hidden, float32 logits", "hidden"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_options(parser, rows=80)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    rows = options.data.read_text(encoding="utf-8").splitlines(keepends=True)[: options.rows]
    OUT.mkdir(exist_ok=True)
    files = {"train": rows[:-HELD_OUT], "held-out": rows[-HELD_OUT:]}
    for name, part in files.items():
        (OUT / f"quality-{name}.jsonl").write_text("".join(part), encoding="utf-8")
    answers = [] if "response" in json.loads(rows[0]) else ["--responses", "teacher"]
    caches = {}
    for name, flags in (("train", []), ("held-out", []), ("bare", ["--no-hidden-states"])):
        data = OUT / f"quality-{'train' if name == 'bare' else name}.jsonl"
        caches[name] = dump(f"quality-{name}", data, options.rows, *answers, *flags)
    exact = dump("quality-exact", OUT / "quality-train.jsonl", options.rows, *answers, "--set", "cache.logit_step=0")
    work = OUT / "quality"
    shutil.rmtree(work, ignore_errors=True)
    runs: dict[str, tuple[Path, list[object]]] = {
        "hidden": (caches["train"], []),
        "hidden, float32 logits": (exact, []),
        "live": (caches["bare"], ["--teacher", TEACHER, "--lookups", work / "log"]),
        "logged": (caches["bare"], ["--lookups", work / "log"]),
        "bound": (caches["bare"], ["--on-miss", "bound", "--lookups", work / "no-log"]),
    }
    marks = [1, 10, 25, 50, 75, options.steps]
    print(f"{options.steps} steps of {SEQUENCES_PER_STEP} sequences; loss at step")
    print(f"{'run':<24}" + "".join(f"{mark:>9}" for mark in marks) + "   overlap@1/8 held out, forwards, bound share")
    live = live_losses(caches["train"], options.steps, work / "live-loop")
    show("live teacher, plain loop", live, marks, evaluate(work / "live-loop", caches["held-out"]), "")
    again = live_losses(caches["train"], options.steps, work / "live-again", reverse=True)
    show("the same in reverse", again, marks, evaluate(work / "live-again", caches["held-out"]), "")
    curves = {"plain loop": live, "reverse": again}
    for name, (cache, flags) in runs.items():
        out = work / name.replace(", ", "-").replace(" ", "-")
        pipeline(
            "distill", "--cache", cache, "--student", TEACHER, "--student-layers", ",".join(map(str, STUDENT_LAYERS)),
            "--steps", options.steps, "--dtype", "float32", "--seed", SEED, "--out", out, "--set",
            f"sequences_per_step={SEQUENCES_PER_STEP}", "--set", f"optimizer.lr={LR}", *flags,
        )  # fmt: skip
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((out / "run.json").read_text())["summary"]
        extra = f", {summary['teacher_forwards']}, {summary['bound_share']:.1%}"
        show(name, losses, marks, evaluate(out / "model", caches["held-out"]), extra)
        curves[name] = losses
    say_differences(curves)


def say_differences(curves: dict[str, list[float]]) -> None:
    """How far two curves are apart: largest difference of a step's loss up to a step, as a share of it."""
    marks = [1, 2, 5, 10, 20, 50, len(curves["plain loop"])]
    print("largest difference of a step's loss, up to step  " + "".join(f"{mark:>9}" for mark in marks))
    for name, other in COMPARED:
        apart = [abs(ours / theirs - 1) for ours, theirs in zip(curves[name], curves[other], strict=True)]
        print(f"{name + ', from ' + other:<49}" + "".join(f"{max(apart[:mark]):>9.1e}" for mark in marks))
    for name, losses in curves.items():
        print(f"mean loss of the last 20 steps: {name:<24}{sum(losses[-20:]) / 20:.3f}")


def live_losses(cache: Path, num_steps: int, out: Path, *, reverse: bool = False) -> list[float]:
    reader = CacheReader(cache)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).train()
    keep_layers(student, STUDENT_LAYERS)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=1e-4)
    order = Order([len(reader)], None, sequences_per_step=SEQUENCES_PER_STEP, seed=SEED)
    losses = []
    for step in range(num_steps):
        sequences = [reader[pick.index].sequence for pick in order.step(step)][:: -1 if reverse else 1]
        total = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
        loss = 0.0
        for sequence in sequences:
            input_ids = torch.tensor(sequence.input_ids).long()[None]
            rows = torch.tensor(sequence.loss_mask[1:]).nonzero().squeeze(1)
            with torch.inference_mode():
                teacher_NV = teacher(input_ids).logits[0, rows]
            student_NV = student(input_ids).logits[0, rows]
            share = dense_loss("bild", student_NV, teacher_NV.clone(), torch.ones(len(rows))) * len(rows) / total
            share.backward()
            loss += float(share.detach())
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, OptimizerConfig(lr=LR))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    student.save_pretrained(out)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(out)
    return losses


def evaluate(model: Path, held_out: Path) -> dict[str, Any]:
    from pipeline.evaluation import evaluate_model

    return evaluate_model(str(model), held_out, "cpu")


def show(name: str, losses: list[float], marks: list[int], measured: dict[str, Any], extra: str) -> None:
    curve = "".join(f"{losses[mark - 1]:>9.4f}" for mark in marks)
    print(f"{name:<24}{curve}   {measured['overlap']['1']:.3f}/{measured['overlap']['8']:.3f}{extra}", flush=True)


if __name__ == "__main__":
    main()
