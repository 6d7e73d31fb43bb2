"""``pipeline verify``: the format's checks, then the LM head against the hidden states."""

from pathlib import Path
from typing import Any

import torch

from cache_schema.errors import CacheError
from cache_schema.manifest import LM_HEAD_NAME
from cache_schema.reader import CacheReader
from cache_schema.verify import verify
from pipeline.lookups import faults_in_log, num_files_in_log
from pipeline.progress import progress_bar
from workers.lookup.stored import require_head_of_cache
from workers.teacher.lm_head import load_head

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
                    require_head_of_cache(reader, head, recomputed)
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
