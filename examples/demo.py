"""The whole path on a real teacher, on a CPU, in about a quarter of an hour: `make demo`.

SmolLM2-135M-Instruct answers the prompts of this folder once. From its cached top-k logits and hidden states a
student of 10 of its 30 layers is distilled twice, by BiLD and by KL over the whole vocabulary, and the same student is
fine-tuned on the same answers for comparison.
Every command is printed before it runs; run again, finished parts are kept.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent
STUDENT_LAYERS = "0,3,6,9,12,15,18,21,25,29"
SAMPLE_PROMPT = "Name three things you would find in a kitchen."
# Many short answers are written at once, so a batch may have more tokens than the default for long sequences.
DUMP = [
    "--responses", "teacher", "--set", "responses.max_new_tokens=48", "--set", "data.max_tokens=256",
    "--set", "engine.tokens_per_batch=16384",
]  # fmt: skip
# A student cut from its teacher starts broken, and the number of updates mends it more than their size.
TRAIN = [
    "--student-layers", STUDENT_LAYERS, "--steps", "180", "--set", "sequences_per_step=4", "--set", "optimizer.lr=7e-4",
]  # fmt: skip
# The thesis trains the prompt with KL at T = 1 beside BiLD on the response. Its k = 8 and T = 3 suit a student that
# starts near its teacher; this one does not, and learns faster from more of the ranking, unsmoothed.
RUNS = {
    "BiLD": "--loss bild --set loss.k=32 --set loss.temperature=1.0 --prompt-loss kl --set prompt_loss.temperature=1.0",
    "KL": "--loss kl --set loss.temperature=1.0 --prompt-loss kl --set prompt_loss.temperature=1.0",
    "SFT": "--loss sft",
}


def main(folder: Path) -> None:
    started = time.perf_counter()
    teacher = folder / "teacher"
    run([sys.executable, str(EXAMPLES / "fetch_teacher.py"), str(teacher)])
    train, held_out = folder / "caches" / "train", folder / "caches" / "held-out"
    dump(teacher, "prompts-train.jsonl", train, "--positions", "all")
    dump(teacher, "prompts-heldout.jsonl", held_out)
    pipeline("verify", held_out)
    summaries = {name: distill(name, options, teacher, train, held_out, folder) for name, options in RUNS.items()}
    report(summaries, teacher, time.perf_counter() - started)


def dump(teacher: Path, prompts: str, out: Path, *options: str) -> None:
    pipeline(
        "teacher-dump", "--teacher", teacher, "--data", EXAMPLES / prompts, "--out", out, "--dtype", dtype(),
        *DUMP, *options,
    )  # fmt: skip


def distill(name: str, options: str, teacher: Path, train: Path, held_out: Path, folder: Path) -> dict[str, Any]:
    out = folder / "runs" / name.lower()
    resume = ["--resume"] if (out / "run.json").exists() else []
    pipeline(
        "distill", "--cache", train, "--student", teacher, "--eval-cache", held_out, "--out", out, "--dtype", dtype(),
        *TRAIN, *options.split(), *resume,
    )  # fmt: skip
    summary: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))["summary"]
    return summary


def dtype() -> str:
    """bfloat16 where the processor multiplies it in hardware, which halves the time; float32 elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def report(summaries: dict[str, dict[str, Any]], teacher: Path, seconds: float) -> None:
    start = next(iter(summaries.values()))["eval_before"]
    rows = [("before", start, None), *((name, summary["eval"], summary) for name, summary in summaries.items())]
    print(f"\n{'student':<8} {'overlap@1':>9} {'overlap@8':>9} {'KL':>6} {'positions/s':>11}  lookups by tier")
    for name, measured, summary in rows:
        line = f"{name:<8} {measured['overlap']['1']:>9.3f} {measured['overlap']['8']:>9.3f} {measured['kl']:>6.2f}"
        if summary:
            tiers = ", ".join(f"{tier} {count:,}" for tier, count in summary["lookups"].items() if count) or "none"
            line += (
                f" {summary['positions_per_second']:>11,.0f}  {tiers}; teacher forwards {summary['teacher_forwards']}"
            )
        print(line)
    print(f"\n{SAMPLE_PROMPT}")
    for name, model in [("teacher", str(teacher)), *((name, summary["model"]) for name, summary in summaries.items())]:
        print(f"  {name:<8} {answer(model)}")
    print(f"\n{seconds / 60:.1f} minutes. The teacher ran once; another student needs no teacher.")


def answer(model_dir: str) -> str:
    """Greedy answer of a model that is a plain transformers folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": SAMPLE_PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(written, skip_special_tokens=True).split())


def pipeline(*arguments: object) -> None:
    run([sys.executable, "-m", "pipeline", *map(str, arguments)])


def run(command: list[str]) -> None:
    print(f"\n$ {shlex.join(['python', *command[1:]])}", flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit("demo: stopped at the command above; run `make demo` again to go on from there")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo-output"))
