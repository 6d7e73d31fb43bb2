"""``pipeline distill``: one student's run, from the checks to the summary."""

import re
import resource
import shutil
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cache_schema.reader import CacheReader
from cache_schema.storage import exclusive, publish_directory
from pipeline.evaluation import measure, require_top_k
from pipeline.fetching import at_hand
from pipeline.progress import progress_bar, say
from pipeline.run_record import RunRecord
from workers.device import device_name, resolve_device
from workers.distill.checkpoint import FOLDER, save_checkpoint
from workers.distill.checks import asked_of, check, needs_lookups
from workers.distill.config import DistillConfig
from workers.distill.loss_config import LossConfig
from workers.distill.order import ORDER_VERSION
from workers.distill.terms import losses_of
from workers.distill.train import Training, num_steps_of, order_of, prepare
from workers.errors import InputError
from workers.lookup.opening import open_log, source_of_misses
from workers.teacher.checkpoint import identity_of
from workers.tokenizers import load_tokenizer


def run(config: DistillConfig, run_dir: Path, *, resume: bool) -> dict[str, Any]:
    """Train, or go on training, a student; returns the summary. A finished run is returned as it is.

    Nothing is written before every check has passed and the models are loaded.

    Raises:
        InputError, CacheError: something does not fit; see ``workers.distill.train.prepare``.
    """
    record = RunRecord(run_dir)
    readers, eval_reader, device = check_all(config)
    made_of = _made_of(config, readers, eval_reader, device)
    asked = config.model_dump(mode="json")
    record.find(asked, made_of, resume=resume)  # refuses another run's directory before anything is made
    with exclusive(run_dir):
        finished = record.find(asked, made_of, resume=resume)
        if finished is not None:
            shutil.rmtree(run_dir / FOLDER, ignore_errors=True)  # where a kill came between the summary and this
            return finished
        record.discard_leftovers()
        _say_what_is_bounded(config, readers)
        with closing(prepare(config, readers, run_dir, device)) as training:
            before = _evaluate(training, eval_reader) if training.first_step == 0 else record.eval_before()
            record.begin(asked, made_of, before)
            _train(training, record, eval_reader)
            after = _evaluate(training, eval_reader)
            _save_model(training, record)
        summary = record.finish({"peak_memory_bytes": _peak_memory_bytes(device), "eval_before": before, "eval": after})
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    return summary


def check_all(config: DistillConfig) -> tuple[list[CacheReader], CacheReader | None, torch.device]:
    """Open the caches and find the device, refusing from files alone what cannot be trained."""
    for location in config.cache:
        at_hand(location)  # with a progress bar, before it is looked at
    readers = check(config)
    return readers, _eval_reader(config, readers[0]), resolve_device(config.device)


def expected_work(config: DistillConfig, readers: Sequence[CacheReader]) -> dict[str, Any]:
    """What a run would do, for ``--dry-run``."""
    order = order_of(config, readers)
    num_steps = num_steps_of(config, order)
    sources = [source_of_misses(reader, asked_of(config)) for reader in readers]
    return {
        "steps": num_steps,
        "epochs": num_steps / order.steps_per_epoch,
        "sequences_in_cache": sum(len(reader) for reader in readers),
        "positions_in_cache": sum(reader.manifest.num_positions for reader in readers),
        "sequences_per_epoch": list(order.quotas),
        **{
            key: {"name": loss.name, **_parameters_in_full(loss, readers)}
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


def _train(training: Training, record: RunRecord, eval_reader: CacheReader | None) -> None:
    config = training.config
    with record.open_metrics(training.first_step) as metrics, progress_bar("distilling") as progress:
        for step in training.steps():
            done = step["step"]
            if eval_reader and config.eval_every and done % config.eval_every == 0 and done < training.num_steps:
                step["eval"] = _evaluate(training, eval_reader)
            record.append(metrics, step)
            if done % config.checkpoint_every == 0 or done == training.num_steps:
                save_checkpoint(record.run_dir, done, training.student, training.optimizer, training.moving)
            progress(done, training.num_steps)


def _eval_reader(config: DistillConfig, reader: CacheReader) -> CacheReader | None:
    if config.eval_cache is None:
        return None
    held_out = CacheReader(at_hand(config.eval_cache))
    require_top_k(held_out)
    if held_out.plan.tokenizer.fingerprint != reader.plan.tokenizer.fingerprint:
        raise InputError(
            f"--eval-cache {config.eval_cache} was made with another tokenizer than {reader.cache_dir}: dump it with "
            f"the same teacher."
        )
    return held_out


def _evaluate(training: Training, eval_reader: CacheReader | None) -> dict[str, Any] | None:
    if eval_reader is None:
        return None
    measured = measure(training.student.model, eval_reader, training.device, training.config.lookups.dir)
    training.student.train()
    return measured


def _made_of(
    config: DistillConfig, readers: Sequence[CacheReader], eval_reader: CacheReader | None, device: torch.device
) -> dict[str, Any]:
    """What the config names by path, by content; and what it ran on."""
    import transformers

    return {
        "manifest_sha256": [reader.manifest_sha256 for reader in readers],
        "eval_manifest_sha256": eval_reader.manifest_sha256 if eval_reader else None,
        "student_fingerprint": identity_of(config.student, None).fingerprint,
        "loss_parameters": {part: _parameters_in_full(loss, readers) for part, loss in losses_of(config).items()},
        "order_version": ORDER_VERSION,
        "device": device_name(device),
        "versions": {
            "logit-cache": version("logit-cache"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _parameters_in_full(loss: LossConfig, readers: Sequence[CacheReader]) -> dict[str, Any]:
    """Every parameter of a loss; of a sum, a table of them for each."""
    top_k, vocab_size = min(reader.plan.top_k for reader in readers), readers[0].plan.tokenizer.vocab_size
    tables: dict[str, Any] = {summand.loss.name: summand.parameters(top_k, vocab_size) for summand in loss.summands}
    return tables if len(tables) > 1 else tables.popitem()[1]


def _save_model(training: Training, record: RunRecord) -> None:
    """Publish the student as a plain Hugging Face model with the cache's tokenizer."""
    if record.model_dir.exists():
        return
    model = training.student.model
    tokenizer_dir, responses = training.readers[0].tokenizer_dir, training.readers[0].plan.responses
    ends = responses.end_token_ids if responses else (load_tokenizer(str(tokenizer_dir)).eos_token_id,)
    if model.generation_config is not None:
        # It was trained to end as the teacher does, which need not be how the base model did.
        known = model.generation_config.eos_token_id
        known = known if isinstance(known, list) else [known]
        model.generation_config.eos_token_id = sorted({end for end in (*ends, *known) if end is not None}) or None
    with publish_directory(record.model_dir) as temporary:
        model.save_pretrained(temporary)
        shutil.copytree(tokenizer_dir, temporary, dirs_exist_ok=True)


def _peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage where the system says it better: that counts the process which started this one until its exec.
    status = Path("/proc/self/status")
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return (int(kilobytes[1]) if kilobytes else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
