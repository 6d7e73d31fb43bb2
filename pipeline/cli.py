"""The command line: flags to configs, results to stdout, errors to one paragraph. Logic lives in the commands.

torch and transformers are imported inside the commands, so that ``--help`` answers at once.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run the teacher once, distill as many students as you like from disk.",
)

_INTERRUPTED = 130  # what typer exits with on Ctrl-C: 128 + SIGINT

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with any of the keys.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One key, for instance --set optimizer.lr=1e-4.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; by default an accelerator if there is one.")]
CacheDir = Annotated[Path, typer.Argument(help="A cache directory.", show_default=False)]


@app.command()
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
        student_layers=_layers_of(student, student_layers),
        epochs=epochs,
        students=students,
        pilot_sequences=pilot_sequences,
        pilot_steps=pilot_steps,
        pilot_lr=pilot_lr,
    )
    facts = make_estimate(settled, intent)
    _print(facts, json_output, lambda: estimate_in_words(facts))


@app.command()
def teacher_dump(
    teacher: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    data: Annotated[str | None, typer.Option(help="JSONL, Parquet, saved dataset folder, or hub dataset.")] = None,
    out: Annotated[Path | None, typer.Option(help="Cache directory to make, or to go on with.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Logits kept per position. [default: 64]")] = None,
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
    device: Device = None,
    limit: Annotated[int | None, typer.Option(help="Read this many rows at most.")] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the dump would hold and stop.")] = False,
    json_output: Json = False,
) -> None:
    """Run the teacher once over a data set and store its top-k logits and hidden states.

    Killed anywhere, the same command finishes the job; finished shards are not scored again.

    Example: pipeline teacher-dump --teacher ./teacher --data train.jsonl --out caches/train
    """
    from pipeline.config import build_config
    from pipeline.teacher_dump import expected_size, prepare, run
    from pipeline.words import dump_in_words, size_in_words
    from workers.teacher.config import DumpConfig

    flags = {
        "teacher.model": teacher,
        "teacher.dtype": dtype,
        "data.path": data,
        "data.limit": limit,
        "cache.top_k": top_k,
        "cache.hidden_states": hidden_states,
        "cache.hidden_dtype": hidden_dtype,
        "cache.positions": positions,
        "responses.source": responses,
        "engine.device": device,
    }
    settled = build_config(DumpConfig, config, settings or [], flags)
    cache_dir = _required(out, "--out", "the cache directory to make")
    prepared = prepare(settled, cache_dir)
    size = expected_size(prepared)
    if dry_run:
        _print(size, json_output, lambda: size_in_words(size))
        return
    typer.echo(size_in_words(size), err=True)
    facts = run(prepared, settled, cache_dir)
    _print(facts, json_output, lambda: dump_in_words(cache_dir, facts))


@app.command()
def inspect(
    cache: CacheDir,
    sequence: Annotated[str | None, typer.Option(help="Show one sequence: its id or its index.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Measure what each K holds, and bytes by column.")] = False,
    student: Annotated[str | None, typer.Option(help="With --stats: count what this student misses.")] = None,
    student_layers: Annotated[str | None, typer.Option(help="Keep these layers of it, for instance 0,3,6.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="With --stats: measure on this many sequences at most.")] = 64,
    device: Device = None,
    json_output: Json = False,
) -> None:
    """Say what is in a cache, finished or not.

    Example: pipeline inspect caches/train --stats --student ./student
    """
    from pipeline.describe import describe, describe_sequence, in_words, sequence_in_words

    layers = _layers_of(student, student_layers)
    if student is not None and not stats:
        raise typer.BadParameter("give --stats too", param_hint="--student")
    if sequence is not None:
        if stats:
            raise typer.BadParameter("give it or --sequence", param_hint="--stats")
        shown = describe_sequence(cache, sequence)
        _print(shown, json_output, lambda: sequence_in_words(shown))
        return
    facts = describe(cache)
    if not stats:
        _print(facts, json_output, lambda: in_words(cache, facts))
        return
    from pipeline.statistics import statistics
    from pipeline.top_k_words import statistics_in_words

    found = statistics(
        cache, student=student, student_layers=layers, sample_sequences=sample, device_name=device or "auto"
    )
    facts["stats"] = found
    _print(facts, json_output, lambda: f"{in_words(cache, facts)}\n{statistics_in_words(facts)}")


@app.command()
def verify(cache: CacheDir, json_output: Json = False) -> None:
    """Check every hash and every row of a cache, and its LM head against its hidden states.

    Example: pipeline verify caches/train
    """
    from pipeline.verification import verify_cache
    from pipeline.words import report_in_words

    report = verify_cache(cache)
    _print(report, json_output, lambda: report_in_words(cache, report))
    if not report["ok"]:
        raise typer.Exit(1)


@app.command()
def compact(
    cache: CacheDir,
    lookups: Annotated[Path | None, typer.Option(help="Fold the log in this directory, not the cache's own.")] = None,
    json_output: Json = False,
) -> None:
    """Fold a cache's lookup log into few files, each sequence once; runs may go on meanwhile.

    Example: pipeline compact caches/train
    """
    from pipeline.lookups import compact_log
    from pipeline.words import compaction_in_words

    folded = compact_log(cache, lookups)
    _print(folded, json_output, lambda: compaction_in_words(folded))


@app.command()
def distill(
    cache: Annotated[
        list[str] | None, typer.Option(help="The cache to train from; several, each with its own --cache, are mixed.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory to make, or to go on with.")] = None,
    student_layers: Annotated[str | None, typer.Option(help="Keep these layers of it, for instance 0,3,6.")] = None,
    loss: Annotated[str | None, typer.Option(help="bild (default), t_ld, s_ld, kl, rkl, topk_kl or sft.")] = None,
    prompt_loss: Annotated[str | None, typer.Option(help="A loss for the prompt; needs --positions all.")] = None,
    teacher: Annotated[str | None, typer.Option(help="For lookups a cache without hidden states misses.")] = None,
    on_miss: Annotated[
        str | None, typer.Option(help="refuse (default), or bound: an upper bound for what nothing else answers.")
    ] = None,
    lookups: Annotated[
        Path | None, typer.Option(help="Write the lookup log here, for a cache that cannot be written.")
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    config: ConfigFile = None,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what the run would do.")] = False,
    json_output: Json = False,
) -> None:
    """Train a student from a cache, with no teacher in memory.

    Example: pipeline distill --cache caches/train --student ./teacher --student-layers 0,9,19,29 --out runs/bild
    """
    from pipeline.config import build_config
    from pipeline.distill import check_all, expected_work, run
    from pipeline.words import run_in_words, work_in_words
    from workers.distill.config import DistillConfig

    flags = {
        "cache": cache or None,
        "weights": _weights(weights),
        "student": student,
        "student_layers": _layers(student_layers),
        "loss.name": loss,
        "prompt_loss.name": prompt_loss,
        "teacher": teacher,
        "on_miss": on_miss,
        "lookups.dir": _text(lookups),
        "lookups.log": log,
        "lookups.head_device": head_device,
        "lookups.teacher_device": teacher_device,
        "epochs": epochs,
        "steps": steps,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "eval_cache": eval_cache,
    }
    run_dir = _required(out, "--out", "the run directory to make")
    if resume and config is None and not cache and (run_dir / "config.toml").exists():
        config = run_dir / "config.toml"  # --resume --out RUN goes on with what the run was started with
    settled = build_config(DistillConfig, config, settings or [], flags)
    if dry_run:
        work = expected_work(settled, check_all(settled)[0])
        _print(work, json_output, lambda: work_in_words(work))
        return
    summary = run(settled, run_dir, resume=resume)
    _print(summary, json_output, lambda: run_in_words(summary))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.", show_default=False)],
    cache: Annotated[Path, typer.Option(help="Held-out cache of the teacher.")],
    device: Device = None,
    json_output: Json = False,
) -> None:
    """Compare a model with the teacher on a held-out cache, with no teacher in memory.

    Example: pipeline evaluate runs/bild/model --cache caches/held-out
    """
    from pipeline.evaluation import evaluate_model
    from pipeline.words import evaluation_in_words

    measured = evaluate_model(model, cache, device or "auto")
    _print(measured, json_output, lambda: evaluation_in_words(measured))


def main() -> None:
    """Entry point: expected errors become one paragraph on stderr and exit code 1."""
    try:
        app()
    except Exception as error:
        # Imported late: cache_schema brings pyarrow, which --help should not wait for.
        from cache_schema.errors import CacheError
        from workers.errors import InputError

        if not isinstance(error, CacheError | InputError):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            typer.echo("interrupted; finished work is kept: run it again to go on (distill: with --resume)", err=True)
        raise


def _print(result: dict[str, Any], as_json: bool, words: Callable[[], str]) -> None:
    typer.echo(json.dumps(result) if as_json else words())


def _required(value: Path | None, flag: str, what: str) -> Path:
    if value is None:
        raise typer.BadParameter(f"give {what}", param_hint=flag)
    return value


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _weights(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers", param_hint="--weights") from None


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of layer indexes", param_hint="--student-layers") from None


def _layers_of(student: str | None, text: str | None) -> tuple[int, ...] | None:
    if text is not None and student is None:
        raise typer.BadParameter("give --student too", param_hint="--student-layers")
    return _layers(text)
