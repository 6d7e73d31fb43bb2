"""The commands on students: losses, distill, evaluate."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.options import ConfigFile, Device, Json, Settings, layers_of, log_at, required, show, weights_of


def losses(
    name: Annotated[str | None, typer.Argument(help="Tell this one in full.", show_default=False)] = None,
    json_output: Json = False,
) -> None:
    """List the losses: what each needs of a cache, where it comes from, why to choose it.

    Example: pipeline losses tail_gjsd
    """
    from pipeline.losses import facts_of_losses, losses_in_words

    facts = facts_of_losses(name)
    show({"losses": facts}, json_output, lambda: losses_in_words(facts))


def distill(
    cache: Annotated[
        list[str] | None, typer.Option(help="The cache to train from; several, each with its own --cache, are mixed.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory to make, or to go on with.")] = None,
    student_layers: Annotated[str | None, typer.Option(help="Keep these layers of it, for instance 0,3,6.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="From `pipeline losses`, or a sum: bild+0.5*sft. [default: bild]")
    ] = None,
    prompt_loss: Annotated[str | None, typer.Option(help="A loss for the prompt; needs --positions all.")] = None,
    teacher: Annotated[str | None, typer.Option(help="For lookups a cache without hidden states misses.")] = None,
    on_miss: Annotated[
        str | None, typer.Option(help="refuse (default), or bound: an upper bound for what nothing else answers.")
    ] = None,
    lookups: Annotated[
        str | None, typer.Option(help="Write the lookup log here, for a cache that cannot be written.")
    ] = None,
    log: Annotated[
        str | None, typer.Option(help="What a live teacher leaves behind: hidden (default), logits or none.")
    ] = None,
    head_device: Annotated[
        str | None, typer.Option(help="Where the teacher's LM head answers. [default: with the student, if it fits]")
    ] = None,
    teacher_device: Annotated[
        str | None, typer.Option(help="Where a live teacher runs: a device, or offload. [default: the student's]")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Shares of several caches, for instance 2,1.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the cache. [default: 1]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; wins over epochs.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the order of the data. [default: 0]")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 (default: autocast) or float32.")] = None,
    device: Device = None,
    eval_cache: Annotated[str | None, typer.Option(help="Held-out cache to evaluate on before and after.")] = None,
    engine: Annotated[str | None, typer.Option(help="torch (default; DDP under torchrun), fsdp2 or deepspeed.")] = None,
    zero_stage: Annotated[int | None, typer.Option(help="DeepSpeed's, 0 to 3. [default: 2]")] = None,
    deepspeed_config: Annotated[str | None, typer.Option(help="A DeepSpeed JSON file for --engine deepspeed.")] = None,
    tracker: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, trackio or mlflow; repeatable.")
    ] = None,
    keep_checkpoints: Annotated[int | None, typer.Option(help="Keep the latest so many, for good.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, or begin it.")] = False,
    config: ConfigFile = None,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what the run would do.")] = False,
    json_output: Json = False,
) -> None:
    """Train a student from a cache; with hidden states in it, no teacher is loaded.

    Example: pipeline distill --cache caches/train --student ./teacher --student-layers 0,9,19,29 --out runs/bild
    """
    from pipeline.config import build_config
    from pipeline.distill import expected_work, run
    from pipeline.words import run_in_words, work_in_words
    from workers.distill.config import DistillConfig
    from workers.errors import InputError

    flags = {
        "cache": cache,
        "weights": weights_of(weights),
        "student": student,
        "student_layers": layers_of(student_layers),
        "loss.name": loss,
        "prompt_loss.name": prompt_loss,
        "teacher": teacher,
        "on_miss": on_miss,
        "lookups.dir": lookups,
        "lookups.log": log,
        "lookups.head_device": head_device,
        "lookups.teacher_device": teacher_device,
        "epochs": epochs,
        "steps": steps,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "eval_cache": eval_cache,
        "engine.name": engine,
        "engine.zero_stage": zero_stage,
        "engine.deepspeed_config": deepspeed_config,
        "keep_checkpoints": keep_checkpoints,
        "trackers": tracker,
    }
    run_dir = required(out, "--out", "the run directory to make")
    if resume and config is None and not cache and (run_dir / "config.toml").exists():
        config = run_dir / "config.toml"  # --resume --out RUN goes on with what the run was started with
    try:
        settled = build_config(DistillConfig, config, settings or [], flags, exclusive="engine")
    except InputError:
        if os.environ.get("RANK", "0") != "0":  # of several ranks, the first says it
            raise typer.Exit(1) from None
        raise
    if dry_run:
        work = expected_work(settled)
        show(work, json_output, lambda: work_in_words(work))
        return
    summary = run(settled, run_dir, resume=resume)
    if summary is not None:  # of several ranks, the first one's
        show(summary, json_output, lambda: run_in_words(summary))


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.", show_default=False)],
    cache: Annotated[str, typer.Option(help="Held-out cache of the teacher.")],
    lookups: Annotated[
        str | None, typer.Option(help="A lookup log in this directory serves for the KL too, as one in the cache does.")
    ] = None,
    device: Device = None,
    json_output: Json = False,
) -> None:
    """Compare a model with the teacher on a held-out cache, with no teacher in memory.

    Example: pipeline evaluate runs/bild/model --cache caches/held-out
    """
    from pipeline.evaluation import evaluate_model
    from pipeline.fetching import at_hand
    from pipeline.words import evaluation_in_words

    measured = evaluate_model(model, at_hand(cache), "auto" if device is None else device, log_at(lookups))
    show(measured, json_output, lambda: evaluation_in_words(measured))
