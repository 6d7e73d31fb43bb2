"""``pipeline distill``: one student's run, from the checks to the summary."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import torch

from cache_schema.reader import CacheReader
from cache_schema.storage import exclusive, publish_directory
from pipeline.progress import progress_bar
from pipeline.run_record import RunRecord
from workers.device import device_name, resolve_device
from workers.distill.checkpoint import FOLDER, save_checkpoint
from workers.distill.config import DistillConfig
from workers.distill.order import steps_per_epoch
from workers.distill.train import Training, check_needs, prepare
from workers.errors import InputError
from workers.evaluate.overlap import evaluate_on_cache
from workers.teacher.checkpoint import identity_of
from workers.tokenizers import check_same_vocabulary, load_tokenizer


def run(config: DistillConfig, run_dir: Path, *, resume: bool) -> dict[str, Any]:
    """Train, or go on training, a student; returns the summary. A finished run is returned as it is.

    Nothing is written before every check has passed and the models are loaded.

    Raises:
        InputError, CacheError: something does not fit; see ``workers.distill.train.prepare``.
    """
    record = RunRecord(run_dir)
    reader = check(config)
    eval_reader = _eval_reader(config, reader)
    device = resolve_device(config.device)
    made_of = _made_of(config, reader, device)
    finished = record.find(config.model_dump(mode="json"), made_of, resume=resume)
    if finished is not None:
        return finished
    training = prepare(config, run_dir, device)
    before = _evaluate(training, eval_reader) if training.first_step == 0 else record.eval_before()
    record.begin(config.model_dump(mode="json"), made_of, before)
    with exclusive(record.config_path):
        _train(training, record, eval_reader)
        after = _evaluate(training, eval_reader)
        _save_model(training, record)
        summary = record.finish({"peak_memory_bytes": _peak_memory_bytes(device), "eval_before": before, "eval": after})
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    return summary


def check(config: DistillConfig) -> CacheReader:
    """Open the cache and refuse, from files alone, what cannot be trained from it."""
    reader = CacheReader(config.cache)
    check_needs(config, reader)
    check_same_vocabulary(load_tokenizer(str(reader.tokenizer_dir)), load_tokenizer(config.student))
    return reader


def expected_work(config: DistillConfig, reader: CacheReader) -> dict[str, Any]:
    """What a run would do, for ``--dry-run``."""
    per_epoch = steps_per_epoch(len(reader), config.sequences_per_step)
    num_steps = config.steps or config.epochs * per_epoch
    return {
        "steps": num_steps,
        "epochs": num_steps / per_epoch,
        "sequences_in_cache": len(reader),
        "positions_in_cache": reader.manifest.num_positions,
        "loss": {"name": config.loss.name, **config.loss.parameters},
        "lookups_from": "hidden" if reader.has_hidden_states else "live" if config.teacher else "cached",
    }


def _train(training: Training, record: RunRecord, eval_reader: CacheReader | None) -> None:
    config = training.config
    with record.open_metrics(training.first_step) as metrics, progress_bar("distilling") as progress:
        for step in training.steps():
            done = step["step"]
            if eval_reader and config.eval_every and done % config.eval_every == 0 and done < training.num_steps:
                step["eval"] = _evaluate(training, eval_reader)
            metrics.write(json.dumps(step) + "\n")
            metrics.flush()
            if done % config.checkpoint_every == 0 or done == training.num_steps:
                save_checkpoint(record.run_dir, done, training.student, training.optimizer, training.scheduler)
            progress(done, training.num_steps)


def _eval_reader(config: DistillConfig, reader: CacheReader) -> CacheReader | None:
    if config.eval_cache is None:
        return None
    held_out = CacheReader(config.eval_cache)
    if held_out.plan.tokenizer.fingerprint != reader.plan.tokenizer.fingerprint:
        raise InputError(
            f"--eval-cache {config.eval_cache} was made with another tokenizer than {config.cache}: dump it with the "
            f"same teacher."
        )
    return held_out


def _evaluate(training: Training, eval_reader: CacheReader | None) -> dict[str, Any] | None:
    if eval_reader is None:
        return None
    with progress_bar("evaluating") as progress:
        measured = evaluate_on_cache(training.student.model, eval_reader, training.device, progress)
    training.student.train()
    return measured


def _made_of(config: DistillConfig, reader: CacheReader, device: torch.device) -> dict[str, Any]:
    import transformers

    return {
        "manifest_sha256": reader.manifest_sha256,
        "student_fingerprint": identity_of(config.student, None).fingerprint,
        "device": device_name(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _save_model(training: Training, record: RunRecord) -> None:
    """Publish the student as a plain Hugging Face model with the cache's tokenizer."""
    if record.model_dir.exists():
        return
    model = training.student.model
    end = load_tokenizer(str(training.reader.tokenizer_dir)).eos_token_id
    if end is not None and model.generation_config is not None:
        # It was trained to end with the cache's EOS, which need not be the base model's.
        model.generation_config.eos_token_id = end
    with publish_directory(record.model_dir) as temporary:
        model.save_pretrained(temporary)
        for file in training.reader.tokenizer_dir.iterdir():
            shutil.copyfile(file, temporary / file.name)


def _peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
