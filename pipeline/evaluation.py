"""``pipeline evaluate``: a model against a held-out cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from cache_schema.errors import CacheError
from cache_schema.reader import CacheReader
from pipeline.progress import progress_bar, say
from workers.device import resolve_device
from workers.errors import InputError
from workers.evaluate.overlap import Run, evaluate_on_cache
from workers.lookup.ladder import Ladder
from workers.lookup.opening import ladder_of_whole_rows
from workers.ranks import Ranks
from workers.teacher.checkpoint import (
    load_model,
    model_directory,
    require_finite,
    require_plain_head,
    require_vocabulary,
)
from workers.tokenizers import check_same_vocabulary, load_tokenizer

T = TypeVar("T")


def evaluate_model(model: str, cache_dir: Path, device_name: str, lookups: Path | None = None) -> dict[str, Any]:
    """overlap@k, KL, top-1 agreement and loss, in float32.

    Args:
        lookups: where the cache's lookup log is, if it is not the one in the cache.
    """
    if not model:
        raise InputError("the model's name is empty: give a model folder or a hub name.")
    reader = CacheReader(cache_dir)
    require_top_k(reader)
    device = resolve_device(device_name)
    model_directory(model)
    check_same_vocabulary(load_tokenizer(str(reader.tokenizer_dir)), load_tokenizer(model))
    loaded = load_model(model, torch.float32).to(device)
    require_finite(model, loaded)
    require_vocabulary(loaded, reader.plan.tokenizer.vocab_size)
    require_plain_head(loaded, reader.plan.tokenizer.vocab_size)
    loaded.eval()

    def run(job: Callable[[Any], T]) -> T:
        with torch.inference_mode():
            return job(loaded)

    return HeldOut(reader, Ranks(device), str(lookups) if lookups else None).measure(run)


def require_top_k(reader: CacheReader) -> None:
    """Refuse a cache that stores draws: which ids are the teacher's highest does not stand in it.

    Raises:
        InputError: it does.
    """
    if reader.plan.sampling:
        raise InputError(
            f"{reader.cache_dir} stores draws, and a model is evaluated by the teacher's top-k: dump the held-out data "
            f"with `pipeline teacher-dump --sampling top-k` (the default)."
        )


class HeldOut:
    """A held-out cache to measure models on, and the teacher's whole rows where they can be had.

    A lookup log that cannot be read costs the KL and no more.

    Args:
        lookups_dir: where the cache's log is, if it is not the one in the cache.

    Raises:
        InputError: the cache stores draws.
        CacheError: its hidden states or its head are damaged.
    """

    def __init__(self, reader: CacheReader, ranks: Ranks, lookups_dir: str | None) -> None:
        require_top_k(reader)
        self._reader, self._ranks = reader, ranks
        self._ladder: Ladder | None = None
        try:
            self._ladder = ladder_of_whole_rows(reader, ranks.device, lookups_dir)
        except (CacheError, OSError) as error:
            if reader.has_hidden_states:
                raise
            say(f"warning: no KL, the lookup log of {reader.cache_dir} cannot be used: {error}")

    def measure(self, run: Run) -> dict[str, Any]:
        """The model that ``run`` calls its argument with. Collective."""
        ladder = self._ladder if all(self._ranks.gather(self._ladder is not None)) else None
        with progress_bar("evaluating", shown=self._ranks.is_first) as progress:
            return evaluate_on_cache(run, self._reader, ladder, self._ranks, progress)
