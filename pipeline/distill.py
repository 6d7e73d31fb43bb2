"""``pipeline distill``: one student's run, from the checks to the summary."""

import re
import resource
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cache_schema.reader import CacheReader
from cache_schema.storage import exclusive
from pipeline.evaluation import measure, require_top_k
from pipeline.evaluations import Evaluations, require_metric
from pipeline.fetching import at_hand
from pipeline.model_card import write_model_card
from pipeline.progress import progress_bar, say
from pipeline.run_record import RunRecord
from pipeline.stopping import stop_asked
from pipeline.students import save_best, save_models
from pipeline.trackers import Trackers, open_trackers, require_trackers
from workers.device import device_name, resolve_device
from workers.distill.checkpoint import FOLDER, save_checkpoint
from workers.distill.checks import asked_of, check, needs_lookups
from workers.distill.config import DistillConfig
from workers.distill.curriculum import configs_in_turn
from workers.distill.data import TrainingData
from workers.distill.engines.opening import check_engine
from workers.distill.loss_config import LossConfig
from workers.distill.order import ORDER_VERSION
from workers.distill.terms import losses_of
from workers.distill.train import Training, prepare
from workers.errors import InputError
from workers.lookup.opening import open_log, source_of_misses
from workers.ranks import Ranks, joined
from workers.teacher.checkpoint import identity_of


def run(config: DistillConfig, run_dir: Path, *, resume: bool) -> dict[str, Any] | None:
    """Train, or go on training, a student; returns the summary. A finished run is returned as it is.

    Nothing is written before every check has passed and the models are loaded. Of several ranks the first writes, and
    the others return None. A run that SIGTERM has stopped returns where, under ``stopped``.

    Raises:
        InputError, CacheError: something does not fit; see ``workers.distill.train.prepare``.
    """
    with joined(config.device, needs_group=config.engine.name != "torch") as ranks:
        summary = _run(config, run_dir, ranks, resume=resume)
        return summary if ranks.is_first else None


def _run(config: DistillConfig, run_dir: Path, ranks: Ranks, *, resume: bool) -> dict[str, Any]:
    record = RunRecord(run_dir)
    data, eval_reader = ranks.together(lambda: check_all(config, ranks))
    made_of = ranks.from_first(lambda: _made_of(config, data, eval_reader, ranks))
    asked = config.model_dump(mode="json")
    # Refuses another run's directory before anything is made.
    ranks.from_first(lambda: record.find(asked, made_of, resume=resume))
    with ExitStack() as held:
        ranks.from_first(lambda: held.enter_context(exclusive(run_dir)))
        finished = ranks.from_first(lambda: record.find(asked, made_of, resume=resume))
        if finished is not None:
            # Where a kill came between the summary and these.
            ranks.from_first(lambda: write_model_card(record.model_dir, asked, made_of, data.readers, finished))
            ranks.from_first(lambda: _discard_checkpoints(config, record))
            return finished
        ranks.from_first(record.discard_leftovers)
        if ranks.is_first:
            _say_what_is_bounded(config, data.readers)
        is_asked_to_stop = held.enter_context(stop_asked())
        with closing(prepare(config, data, run_dir, ranks)) as training:
            before = ranks.from_first(record.eval_before) if training.first_step else _evaluate(training, eval_reader)
            ranks.from_first(lambda: record.begin(asked, made_of, before))
            past = ranks.from_first(lambda: record.metrics(training.first_step))
            evaluations = Evaluations.of(config, past, eval_reader.plan.top_k if eval_reader else 0)
            trackers = held.enter_context(_trackers(training, run_dir, asked))
            if before and not training.first_step:
                trackers.log({"step": 0, "eval": before})
            done = _train(training, record, eval_reader, evaluations, trackers, is_asked_to_stop)
            if done < training.num_steps and not evaluations.are_over:
                return {"run": str(run_dir), "steps": done, "of_steps": training.num_steps, "stopped": True}
            after = _evaluate(training, eval_reader)
            extra = save_models(training, record, evaluations, done, after)
        peak = max(ranks.gather(_peak_memory_bytes(ranks.device)))
        extra |= {"peak_memory_bytes": peak, "ranks": ranks.size, "eval_before": before, "eval": after}
        summary = ranks.from_first(lambda: record.finish(extra))
        ranks.from_first(lambda: write_model_card(record.model_dir, asked, made_of, data.readers, summary))
        trackers.finish(summary)
        ranks.from_first(lambda: _discard_checkpoints(config, record))
    return summary


def _trackers(training: Training, run_dir: Path, asked: dict[str, Any]) -> AbstractContextManager[Trackers]:
    """Those of the run, on the rank that writes."""
    config, names = training.config, training.config.trackers if training.ranks.is_first else ()
    return training.ranks.together(
        lambda: open_trackers(names, run_dir, config.tracker_project, asked, first_step=training.first_step)
    )


def check_all(config: DistillConfig, ranks: Ranks) -> tuple[TrainingData, CacheReader | None]:
    """Open the caches, refusing from files alone what cannot be trained."""
    check_engine(config, ranks)
    require_trackers(config.trackers)
    for location in config.cache:
        at_hand(location)  # with a progress bar, before it is looked at
    data = check(config)
    return data, _eval_reader(config, data.readers[0])


def expected_work(config: DistillConfig) -> dict[str, Any]:
    """What a run would do, for ``--dry-run``.

    Raises:
        InputError, CacheError: it would be refused.
    """
    data, _ = check_all(config, Ranks(resolve_device(config.device)))
    order, num_steps = data.order(config), data.num_steps(config)
    sources = [source_of_misses(reader, asked_of(config)) for reader in data.readers]
    return {
        "steps": num_steps,
        "epochs": num_steps / order.steps_per_epoch,
        "sequences_in_cache": sum(len(reader) for reader in data.readers),
        "sequences_kept": data.sizes,
        "positions_in_cache": sum(reader.manifest.num_positions for reader in data.readers),
        "sequences_per_epoch": list(order.quotas),
        **{
            key: {"name": loss.name, **_parameters_in_full(loss, data)}
            for key, loss in zip(("loss", "prompt_loss"), losses_of(config).values(), strict=False)
        },
        "lookups_from": ", ".join(dict.fromkeys(sources)) if needs_lookups(config) else "none are made",
    }


def _say_what_is_bounded(config: DistillConfig, readers: Sequence[CacheReader]) -> None:
    """How much of each cache is answered exactly all the same."""
    for reader in readers if needs_lookups(config) else []:
        if source_of_misses(reader, asked_of(config)) == "bound":
            logged, several = open_log(reader, config.lookups).num_with_hidden_states, len(readers) > 1
            say(
                f"bound: the log {f'of {reader.cache_dir} ' if several else ''}has hidden states of {logged:,} of "
                f"{len(reader):,} sequences; other misses get an upper bound"
            )


def _train(
    training: Training,
    record: RunRecord,
    eval_reader: CacheReader | None,
    evaluations: Evaluations,
    trackers: Trackers,
    is_asked_to_stop: Callable[[], bool],
) -> int:
    """To the last step, or to where the run is asked to stop or evaluations improve no more; returns the steps done."""
    config, ranks, done = training.config, training.ranks, training.first_step
    with ExitStack() as opened:
        metrics = ranks.together(lambda: opened.enter_context(record.open_metrics(done)) if ranks.is_first else None)
        progress = opened.enter_context(progress_bar("distilling", shown=ranks.is_first))
        steps = training.steps(is_asked_to_stop)
        while not evaluations.are_over and (step := next(steps, None)):
            done = step["step"]
            if eval_reader and config.eval_every and done % config.eval_every == 0 and done < training.num_steps:
                step["eval"] = _evaluate(training, eval_reader)
                if evaluations.add(done, step["eval"]):
                    save_best(training, record, done)
            if metrics:
                record.append(metrics, step)
            trackers.log(step)
            if done % config.checkpoint_every == 0:
                _checkpoint(training, record, done, evaluations)
            progress(done, training.num_steps)
    _checkpoint(training, record, done, evaluations)
    return done


def _checkpoint(training: Training, record: RunRecord, done: int, evaluations: Evaluations) -> None:
    """Of a run that has begun; students that a resumed run will not look back at go."""
    if done:
        keep = training.config.keep_checkpoints or 1
        save_checkpoint(record.run_dir, done, training.engine, training.curriculum.moving, training.ranks, keep=keep)
        training.ranks.from_first(lambda: record.keep_best(evaluations.best_step))


def _discard_checkpoints(config: DistillConfig, record: RunRecord) -> None:
    if config.keep_checkpoints is None:
        shutil.rmtree(record.run_dir / FOLDER, ignore_errors=True)


def _eval_reader(config: DistillConfig, reader: CacheReader) -> CacheReader | None:
    if config.eval_cache is None:
        return None
    held_out = CacheReader(at_hand(config.eval_cache))
    require_top_k(held_out)
    if config.early_stopping is not None:
        require_metric(config.early_stopping, held_out)
    if held_out.plan.tokenizer.fingerprint != reader.plan.tokenizer.fingerprint:
        raise InputError(
            f"--eval-cache {config.eval_cache} was made with another tokenizer than {reader.cache_dir}: dump it with "
            f"the same teacher."
        )
    return held_out


def _evaluate(training: Training, eval_reader: CacheReader | None) -> dict[str, Any] | None:
    if eval_reader is None:
        return None
    return measure(training.engine.measure, eval_reader, training.ranks, training.config.lookups.dir)


def _made_of(
    config: DistillConfig, data: TrainingData, eval_reader: CacheReader | None, ranks: Ranks
) -> dict[str, Any]:
    """What the config names by path, by content; and what it ran on."""
    import transformers

    return {
        "manifest_sha256": [reader.manifest_sha256 for reader in data.readers],
        "kept_sequences": data.sizes,
        "eval_manifest_sha256": eval_reader.manifest_sha256 if eval_reader else None,
        "student_fingerprint": identity_of(config.student, None).fingerprint,
        "loss_parameters": {part: _parameters_in_full(loss, data) for part, loss in losses_of(config).items()},
        "switched_parameters": [
            {part: _parameters_in_full(loss, data) for part, loss in losses_of(turn).items()}
            for turn in configs_in_turn(config, config.switch)[1:]
        ],
        "order_version": ORDER_VERSION,
        "device": device_name(ranks.device),
        "versions": {
            "logit-cache": version("logit-cache"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _parameters_in_full(loss: LossConfig, data: TrainingData) -> dict[str, Any]:
    """Every parameter of a loss; of a sum, a table of them for each."""
    tables: dict[str, Any] = {
        summand.loss.name: summand.parameters(data.top_k, data.vocab_size) for summand in loss.summands
    }
    return tables if len(tables) > 1 else tables.popitem()[1]


def _peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage where the system says it better: that counts the process which started this one until its exec.
    status = Path("/proc/self/status")
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return (int(kilobytes[1]) if kilobytes else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
