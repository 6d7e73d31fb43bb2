"""The same student from the same cache, trained whole, by LoRA and by DoRA: agreement with the teacher, and reloading.

    python -m benchmarks.adapters --steps 80

The adapters are read back by plain PEFT on the base that the run saved, the merged model by plain transformers; both
are asked for the logits of one prompt.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.material import OUT, PROMPTS, STUDENT_LAYERS, dump, fetch_teacher, make_cache, pipeline

HELD_OUT = PROMPTS.parent / "prompts-heldout.jsonl"
# LoRA wants a higher learning rate than the weights themselves.
VARIANTS = {
    "whole": ["--set", "optimizer.lr=7e-4"],
    "LoRA, r=16": ["--set", "optimizer.lr=2e-3", "--set", "peft.method=lora"],
    "DoRA, r=16": ["--set", "optimizer.lr=2e-3", "--set", "peft.method=dora"],
    "LoRA, r=16, and embeddings": [
        "--set", "optimizer.lr=7e-4", "--set", "peft.method=lora", "--set", "peft.train_embeddings=true",
        "--set", "peft.train_head=true",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--loss", default="kl")
    options = parser.parse_args()
    cache = make_cache()
    held_out = dump_held_out()
    rows = {name: train(name, flags, cache, held_out, options) for name, flags in VARIANTS.items()}
    before = next(iter(rows.values()))["eval_before"]
    print(f"{'student':<28} {'overlap@1':>9} {'overlap@8':>9} {'KL':>6} {'adapter':>10}  reloaded")
    print(f"{'before':<28} {measures(before)}")
    for name, summary in rows.items():
        size = folder_size(Path(summary["adapter"])) if "adapter" in summary else 0
        adapter = f"{size / 2**20:.1f} MiB" if size else "-"
        print(f"{name:<28} {measures(summary['eval'])} {adapter:>10}  {reloaded(summary)}")


def dump_held_out() -> Path:
    return dump("bench-held-out", HELD_OUT, 40, "--responses", "teacher", "--set", "responses.max_new_tokens=64")


def train(name: str, flags: list[str], cache: Path, held_out: Path, options: argparse.Namespace) -> dict[str, Any]:
    out = OUT / "runs" / "adapters" / f"{name.replace(', ', '-').replace(' ', '-')}-{options.loss}-{options.steps}"
    pipeline(
        "distill", "--cache", cache, "--student", fetch_teacher(), "--student-layers",
        ",".join(map(str, STUDENT_LAYERS)), "--loss", options.loss, "--set", "loss.temperature=1.0",
        "--steps", options.steps, "--set", "sequences_per_step=4", "--eval-cache", held_out, "--out", out, "--resume",
        *flags,
    )  # fmt: skip
    summary: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))["summary"]
    return summary


def measures(measured: dict[str, Any]) -> str:
    return f"{measured['overlap']['1']:>9.3f} {measured['overlap']['8']:>9.3f} {measured['kl']:>6.2f}"


def folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def reloaded(summary: dict[str, Any]) -> str:
    """How far the merged model's logits are from those of base and adapter, by plain transformers and plain PEFT."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    run = Path(summary["run"])
    tokens = AutoTokenizer.from_pretrained(run / "model")("Name three things in a kitchen.", return_tensors="pt")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(run / "model")(**tokens).logits
        if "adapter" not in summary:
            return "merged: all finite" if merged.isfinite().all() else "NOT FINITE"
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(run / "base")
        apart = PeftModel.from_pretrained(base, run / "adapter")(**tokens).logits
    difference = (merged - apart).abs().max()
    return f"merged and adapter on base differ by {difference:.1e} at logits up to {merged.abs().max():.0f}"


if __name__ == "__main__":
    main()
