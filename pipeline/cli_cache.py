"""The commands on caches: estimate, teacher-dump, inspect, verify, compact."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.options import CacheAt, ConfigFile, Device, Json, LogAt, Settings, layers_with, log_at, required, show


def estimate(
    teacher: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    data: Annotated[str | None, typer.Option(help="What teacher-dump is to read.")] = None,
    student: Annotated[str | None, typer.Option(help="Count what this student asks outside the top K.")] = None,
    student_layers: Annotated[str | None, typer.Option(help="Keep these layers of it, for instance 0,3,6.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs each student will train.")] = 3,
    students: Annotated[int, typer.Option(min=1, help="Students that will train from the cache.")] = 1,
    pilot_sequences: Annotated[int, typer.Option(min=1, help="Sequences the teacher scores to measure on.")] = 16,
    pilot_steps: Annotated[int, typer.Option(min=1, help="Steps the student trains before it is counted again.")] = 30,
    pilot_lr: Annotated[float, typer.Option(min=1e-9, help="Highest learning rate of those steps.")] = 5e-4,
    positions: Annotated[str | None, typer.Option(help="response (default) or all.")] = None,
    responses: Annotated[str | None, typer.Option(help="dataset (default), or teacher: let it write them.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. [default: the checkpoint's]")] = None,
    device: Device = None,
    limit: Annotated[int | None, typer.Option(help="Read this many rows at most.")] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    json_output: Json = False,
) -> None:
    """Say what K and hidden states would cost and save, before anything is dumped.

    --config and --set take the keys of teacher-dump. Bytes a position and shares are measured on a pilot of
    sequences, totals and seconds extrapolated from it.

    Example: pipeline estimate --teacher ./teacher --data train.jsonl --student ./teacher --student-layers 0,9,19,29
    """
    from pipeline.config import build_config
    from pipeline.estimate import Intent
    from pipeline.estimate import estimate as make_estimate
    from pipeline.top_k_words import estimate_in_words
    from workers.teacher.config import DumpConfig

    flags = {
        "teacher.model": teacher,
        "teacher.dtype": dtype,
        "data.path": data,
        "data.limit": limit,
        "cache.positions": positions,
        "responses.source": responses,
        "engine.device": device,
    }
    settled = build_config(DumpConfig, config, settings or [], flags)
    intent = Intent(
        student=student,
        student_layers=layers_with(student, student_layers),
        epochs=epochs,
        students=students,
        pilot_sequences=pilot_sequences,
        pilot_steps=pilot_steps,
        pilot_lr=pilot_lr,
    )
    facts = make_estimate(settled, intent)
    show(facts, json_output, lambda: estimate_in_words(facts))


def teacher_dump(
    teacher: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    data: Annotated[str | None, typer.Option(help="JSONL, Parquet, saved dataset folder, or hub dataset.")] = None,
    out: Annotated[Path | None, typer.Option(help="Cache directory to make, or to go on with.")] = None,
    sampling: Annotated[
        str | None, typer.Option(help="top-k (default), or random: draw ids from the teacher's softmax, for RS-KD.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Logits kept per position. [default: 64]")] = None,
    draws: Annotated[int | None, typer.Option(help="With --sampling random: draws per position. [default: 50]")] = None,
    hidden_states: Annotated[
        bool | None,
        typer.Option("--hidden-states/--no-hidden-states", help="Keep what makes every lookup exact. [default: on]"),
    ] = None,
    hidden_dtype: Annotated[
        str | None, typer.Option(help="int8: half of bfloat16's bytes, logits not exact. [default: the teacher's]")
    ] = None,
    positions: Annotated[str | None, typer.Option(help="response (default) or all.")] = None,
    responses: Annotated[str | None, typer.Option(help="dataset (default), or teacher: let it write them.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. [default: the checkpoint's]")] = None,
    engine: Annotated[str | None, typer.Option(help="transformers (default), or vllm.")] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="With --engine vllm: GPUs that share each layer. [default: 1]")
    ] = None,
    pipeline_parallel: Annotated[
        int | None, typer.Option(help="With --engine vllm: groups of GPUs with a part of the layers. [default: 1]")
    ] = None,
    device: Device = None,
    worker: Annotated[
        str | None, typer.Option(metavar="I/N", help="Of several. [default: as torchrun, Slurm or Kubernetes say]")
    ] = None,
    launcher: Annotated[str | None, typer.Option(help="Start the workers: processes of this machine, or ray.")] = None,
    workers: Annotated[int | None, typer.Option(help="With --launcher: how many.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read this many rows at most.")] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the dump would hold and stop.")] = False,
    json_output: Json = False,
) -> None:
    """Run the teacher once over a data set and store its top-k logits, or draws, and hidden states.

    Killed anywhere, the same command finishes the job; finished shards are not scored again.

    Example: pipeline teacher-dump --teacher ./teacher --data train.jsonl --out caches/train
    """
    from pipeline.config import build_config
    from pipeline.launch import launch
    from pipeline.stopping import tidy_on_signals
    from pipeline.teacher_dump import expected_size, prepare, run
    from pipeline.words import dump_in_words, size_in_words
    from pipeline.worker import this_worker
    from workers.teacher.config import DumpConfig

    flags = {
        "teacher.model": teacher,
        "teacher.dtype": dtype,
        "data.path": data,
        "data.limit": limit,
        "cache.sampling": sampling,
        "cache.top_k": top_k,
        "cache.draws": draws,
        "cache.hidden_states": hidden_states,
        "cache.hidden_dtype": hidden_dtype,
        "cache.positions": positions,
        "responses.source": responses,
        "engine.name": engine,
        "engine.tensor_parallel": tensor_parallel,
        "engine.pipeline_parallel": pipeline_parallel,
        "engine.device": device,
        "worker.launcher": launcher,
        "worker.count": workers,
    }
    settled = build_config(DumpConfig, config, settings or [], flags)
    if worker is not None and settled.worker.launcher is not None:
        raise typer.BadParameter(
            "a launcher numbers its workers itself: give --worker or --launcher", param_hint="--worker"
        )
    this = None if settled.worker.launcher else this_worker(worker, settled.worker.lease_seconds, os.environ)
    cache_dir = required(out, "--out", "the cache directory to make")
    prepared = prepare(settled)
    size = expected_size(prepared)
    if dry_run:
        show(size, json_output, lambda: size_in_words(size))
        return
    typer.echo(size_in_words(size), err=True)
    with tidy_on_signals():
        facts = run(prepared, settled, cache_dir, this) if this else launch(prepared, settled, cache_dir)
    show(facts, json_output, lambda: dump_in_words(cache_dir, facts))


def inspect(
    cache: CacheAt,
    sequence: Annotated[str | None, typer.Option(help="Show one sequence: its id or its index.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Measure what each K holds, and bytes by column.")] = False,
    student: Annotated[str | None, typer.Option(help="With --stats: count what this student misses.")] = None,
    student_layers: Annotated[str | None, typer.Option(help="Keep these layers of it, for instance 0,3,6.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="With --stats: measure on this many sequences at most.")] = 64,
    lookups: LogAt = None,
    device: Device = None,
    json_output: Json = False,
) -> None:
    """Say what is in a cache, finished or not.

    Example: pipeline inspect caches/train --stats --student ./student
    """
    from pipeline.describe import describe, describe_sequence, in_words, sequence_in_words
    from pipeline.fetching import at_hand

    layers = layers_with(student, student_layers)
    if student is not None and not stats:
        raise typer.BadParameter("give --stats too", param_hint="--student")
    if sequence is not None:
        if stats:
            raise typer.BadParameter("give it or --sequence", param_hint="--stats")
        shown = describe_sequence(at_hand(cache), sequence)
        show(shown, json_output, lambda: sequence_in_words(shown))
        return
    cache_dir = at_hand(cache)
    log_dir = log_at(lookups)
    facts = describe(cache_dir, log_dir)
    if not stats:
        show(facts, json_output, lambda: in_words(cache_dir, facts))
        return
    from pipeline.statistics import statistics
    from pipeline.top_k_words import statistics_in_words

    found = statistics(
        cache_dir,
        student=student,
        student_layers=layers,
        sample_sequences=sample,
        device_name="auto" if device is None else device,
        lookups=log_dir,
    )
    facts["stats"] = found
    show(facts, json_output, lambda: f"{in_words(cache_dir, facts)}\n{statistics_in_words(facts)}")


def verify(cache: CacheAt, lookups: LogAt = None, json_output: Json = False) -> None:
    """Check every hash and every row of a cache, and its LM head against its hidden states.

    Example: pipeline verify caches/train
    """
    from pipeline.fetching import at_hand
    from pipeline.verification import verify_cache
    from pipeline.words import report_in_words

    cache_dir = at_hand(cache)
    report = verify_cache(cache_dir, log_at(lookups))
    show(report, json_output, lambda: report_in_words(cache_dir, report))
    if not report["ok"]:
        raise typer.Exit(1)


def compact(
    cache: CacheAt,
    lookups: LogAt = None,
    json_output: Json = False,
) -> None:
    """Fold a cache's lookup log into few files, each sequence once; runs may go on meanwhile.

    Example: pipeline compact caches/train
    """
    from pipeline.fetching import at_hand
    from pipeline.lookups import compact_log
    from pipeline.words import compaction_in_words

    folded = compact_log(at_hand(cache), log_at(lookups))
    show(folded, json_output, lambda: compaction_in_words(folded))
