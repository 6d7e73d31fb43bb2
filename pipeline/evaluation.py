"""``pipeline evaluate``: a model against a held-out cache."""

from pathlib import Path
from typing import Any

import torch

from cache_schema.reader import CacheReader
from pipeline.progress import progress_bar
from workers.device import resolve_device
from workers.evaluate.overlap import evaluate_on_cache
from workers.teacher.checkpoint import load_model, require_finite, require_plain_head, require_vocabulary
from workers.tokenizers import check_same_vocabulary, load_tokenizer


def evaluate_model(model: str, cache_dir: Path, device_name: str) -> dict[str, Any]:
    """overlap@k, KL, top-1 agreement and loss, in float32."""
    reader = CacheReader(cache_dir)
    device = resolve_device(device_name)
    check_same_vocabulary(load_tokenizer(str(reader.tokenizer_dir)), load_tokenizer(model))
    loaded = load_model(model, torch.float32).to(device)
    require_finite(model, loaded)
    require_vocabulary(loaded, reader.plan.tokenizer.vocab_size)
    require_plain_head(loaded, reader.plan.tokenizer.vocab_size)
    with progress_bar("evaluating") as progress:
        return evaluate_on_cache(loaded, reader, device, progress)
