"""``pipeline distill``: one student's run, from the checks to the summary."""

import re
import resource
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cache_schema.reader import CacheReader
from cache_schema.storage import exclusive
from pipeline.evaluation import HeldOut, require_top_k
from pipeline.evaluations import Evaluations, require_metric
from pipeline.fetching import at_hand
from pipeline.model_card import write_model_card
from pipeline.progress import say
from pipeline.run_record import RunRecord
from pipeline.stopping import stop_asked
from pipeline.students import save_models
from pipeline.trackers import open_trackers, require_trackers
from pipeline.training_run import TrainingRun
from workers.device import device_name, resolve_device
from workers.distill.checkpoint import FOLDER
from workers.distill.checks import asked_of, check, needs_lookups
from workers.distill.config import DistillConfig
from workers.distill.curriculum import configs_in_turn
from workers.distill.data import TrainingData
from workers.distill.engines.opening import check_engine
from workers.distill.loss_config import LossConfig
from workers.distill.order import ORDER_VERSION
from workers.distill.terms import losses_of
from workers.distill.train import prepare
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
    data, eval_reader = ranks.together(lambda: check_all(config, ranks.size))
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
        record.require_shared(ranks)
        if ranks.is_first:
            _say_what_is_bounded(config, data.readers)
            _say_where_the_rate_ends(config, data)
        is_asked_to_stop = held.enter_context(stop_asked())
        held_out = ranks.together(lambda: HeldOut(eval_reader, ranks, config.lookups.dir)) if eval_reader else None
        with closing(prepare(config, data, run_dir, ranks)) as training:
            first_step = training.first_step
            before = ranks.from_first(lambda: record.eval_before() if first_step else None)
            if held_out and not first_step:
                before = held_out.measure(training.engine.measure)
            ranks.from_first(lambda: record.begin(asked, made_of, before))
            past = ranks.from_first(lambda: record.metrics(first_step))
            evaluations = Evaluations.of(config, past, eval_reader.plan.top_k if eval_reader else 0)
            told = config.trackers if ranks.is_first else ()
            trackers = ranks.together(
                lambda: held.enter_context(
                    open_trackers(told, run_dir, config.tracker_project, asked, first_step=first_step)
                )
            )
            if before and not first_step:
                trackers.log({"step": 0, "eval": before})
            steps = TrainingRun(training, record, held_out, evaluations, trackers)
            done = steps.train(is_asked_to_stop)
            if done < training.num_steps and not evaluations.are_over:
                return {"run": str(run_dir), "steps": done, "of_steps": training.num_steps, "stopped": True}
            after = steps.evaluate()
            extra = save_models(training, record, evaluations, done, after)
        peak = max(ranks.gather(_peak_memory_bytes(ranks.device)))
        extra |= {"peak_memory_bytes": peak, "ranks": ranks.size, "eval_before": before, "eval": after}
        summary = ranks.from_first(lambda: record.finish(extra))
        ranks.from_first(lambda: write_model_card(record.model_dir, asked, made_of, data.readers, summary))
        trackers.finish(summary)
        ranks.from_first(lambda: _discard_checkpoints(config, record))
    return summary


def check_all(config: DistillConfig, num_ranks: int | None) -> tuple[TrainingData, CacheReader | None]:
    """Open the caches, refusing from files alone what cannot be trained."""
    check_engine(config, num_ranks)
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
    resolve_device(config.device)
    data, _ = check_all(config, None)
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


def _say_where_the_rate_ends(config: DistillConfig, data: TrainingData) -> None:
    """As a short trial of a long recipe has it."""
    warmup_steps, num_steps = config.optimizer.warmup_steps or 0, data.num_steps(config)
    if warmup_steps > num_steps:
        say(
            f"warning: optimizer.warmup_steps={warmup_steps} is more than the run's {num_steps} steps: the learning "
            f"rate ends below optimizer.lr"
        )


def _discard_checkpoints(config: DistillConfig, record: RunRecord) -> None:
    """Unless the run is told to keep some, or was when it began."""
    if config.keep_checkpoints is None and not record.keeps_checkpoints():
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
