"""``pipeline verify``: the format's checks, then the LM head against the hidden states."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_schema.errors import CacheCorruptError, CacheError
from cache_schema.manifest import LM_HEAD_NAME
from cache_schema.reader import CacheReader
from cache_schema.verify import verify
from pipeline.lookups import faults_in_log, num_files_in_log
from pipeline.progress import progress_bar
from workers.lookup.stored import require_head_of_cache, stored_hidden_states
from workers.teacher.lm_head import LMHead, load_head
from workers.teacher.sampling import fault_in_draws

_RECOMPUTED_SEQUENCES = 16


def verify_cache(cache_dir: Path, lookups: Path | None = None) -> dict[str, Any]:
    """Every hash and row; and, with hidden states, a sample of the rows made again from them and the head."""
    with progress_bar("verifying") as progress:
        report = verify(cache_dir, progress)
    errors = [{"file": damage.file, "reason": damage.reason} for damage in report.errors]
    recomputed = log_files = 0
    if report.ok:
        reader = CacheReader(cache_dir)
        if reader.has_hidden_states:
            recomputed = min(_RECOMPUTED_SEQUENCES, len(reader))
            with progress_bar("recomputing") as progress:
                try:
                    head = load_head(reader.lm_head_path, torch.device("cpu"))
                    check = require_head_of_draws if reader.plan.sampling else require_head_of_cache
                    check(reader, head, recomputed)
                except CacheError as error:
                    errors.append({"file": LM_HEAD_NAME, "reason": str(error)})
                progress(recomputed, recomputed)
        log_files = num_files_in_log(reader, lookups)
        errors += [{"file": file, "reason": reason} for file, reason in faults_in_log(reader, lookups)]
    return {
        "ok": not errors,
        "checked_bytes": report.checked_bytes,
        "recomputed_sequences": recomputed,
        "log_files": log_files,
        "errors": errors,
    }


def require_head_of_draws(reader: CacheReader, head: LMHead, num_sequences: int) -> None:
    """Draw again, from hidden states and head, in sequences over a cache that stores draws.

    Raises:
        CacheCorruptError: they are not the stored ones: the head or the hidden states are another teacher's.
    """
    if head.vocab_size != reader.plan.tokenizer.vocab_size:
        raise CacheCorruptError(
            f"{reader.lm_head_path} has {head.vocab_size} rows, the plan {reader.plan.tokenizer.vocab_size}"
        )
    for index in np.unique(np.linspace(0, len(reader) - 1, num_sequences, dtype=int)).tolist():
        with torch.inference_mode():
            fault = fault_in_draws(reader.plan, reader[int(index)], stored_hidden_states(reader, index), head)
        if fault:
            raise CacheCorruptError(
                f"{reader.lm_head_path} does not belong to the hidden states of {reader.cache_dir}: in sequence "
                f"{index}, {fault}. Restore both from the same dump, or dump again."
            )
