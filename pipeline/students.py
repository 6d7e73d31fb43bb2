"""What a run leaves: its student, the best one on the way and an average, each a plain Hugging Face model."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cache_schema.reader import CacheReader
from cache_schema.storage import publish_directory
from pipeline.evaluations import Evaluations
from pipeline.run_record import RunRecord
from workers.distill.adapters import add_adapters, freeze_parts, load_trained, merged_state, save_adapter
from workers.distill.engines.optimizer import EMA
from workers.distill.student import load_student
from workers.distill.train import Training
from workers.tokenizers import load_tokenizer


def save_best(training: Training, record: RunRecord, step: int) -> None:
    """The student as it now is, which is better than those before. Collective."""
    _save(training, record.best_model_dir(step))


def save_models(
    training: Training, record: RunRecord, evaluations: Evaluations, done: int, after: dict[str, Any] | None
) -> dict[str, Any]:
    """The student at the end of a run; returns what the summary says of it. Collective."""
    _save(training, record.model_dir, record=record)
    said: dict[str, Any] = {"stopped_early": evaluations.are_over}
    if training.config.peft is not None:
        said["adapter"] = str(record.adapter_dir)
    if training.config.optimizer.ema_decay is not None:
        said["ema"] = str(record.ema_dir)
        _save(training, record.ema_dir, averaged=True)
    if training.config.eval_every is None or after is None:
        return said
    if not evaluations.are_over:
        evaluations.add(done, after)
    best_is_last = evaluations.best_step == done
    training.ranks.from_first(lambda: record.keep_best(None if best_is_last else evaluations.best_step))
    if evaluations.best_step is None:  # none was finite
        return said
    model = record.model_dir if best_is_last else record.best_model_dir(evaluations.best_step)
    best = {"step": evaluations.best_step, evaluations.metric: evaluations.best_value, "model": str(model)}
    return said | {"best": best}


def _save(training: Training, folder: Path, *, averaged: bool = False, record: RunRecord | None = None) -> None:
    """Publish the student, with the cache's tokenizer; adapters are merged. Collective.

    Args:
        averaged: by the average of its weights.
        record: the run whose adapters are published alone too.
    """
    ranks, engine = training.ranks, training.engine
    if ranks.from_first(folder.exists):
        return
    average = ((name, state[EMA]) for name, state in engine.optimizer_state()) if averaged else None
    weights: dict[str, Tensor] = {}
    for name, weight in average or engine.weights():
        if ranks.is_first:
            weights[name.removeprefix("model.")] = weight.cpu()
    ranks.from_first(lambda: _publish(training, folder, weights, record))


def _publish(training: Training, folder: Path, weights: Mapping[str, Tensor], record: RunRecord | None) -> None:
    config, reader = training.config, training.data.readers[0]
    model = load_student(config.student, config.student_layers, gradient_checkpointing=False)
    _end_as_the_teacher(model, reader)
    base = config.student
    if config.peft is not None:
        if config.student_layers is not None and record is not None:
            base = str(record.base_dir)
            _write(model, record.base_dir, reader)
        add_adapters(model, config.peft, config.seed)
    freeze_parts(model, config.freeze)
    load_trained(model, weights)
    if config.peft is not None and record is not None and not record.adapter_dir.exists():
        with publish_directory(record.adapter_dir) as temporary:
            save_adapter(model, temporary, base)
    _write(model, folder, reader)


def _write(model: Any, folder: Path, reader: CacheReader) -> None:
    """As a plain model, unless it is there."""
    if not folder.exists():
        with publish_directory(folder) as temporary:
            model.save_pretrained(temporary, state_dict=merged_state(model))
            shutil.copytree(reader.tokenizer_dir, temporary, dirs_exist_ok=True)


def _end_as_the_teacher(model: Any, reader: CacheReader) -> None:
    """It was trained to, and the base model may end otherwise."""
    responses = reader.plan.responses
    ends = responses.end_token_ids if responses else (load_tokenizer(str(reader.tokenizer_dir)).eos_token_id,)
    if model.generation_config is not None:
        known = model.generation_config.eos_token_id
        known = known if isinstance(known, list) else [known]
        model.generation_config.eos_token_id = sorted({end for end in (*ends, *known) if end is not None}) or None
