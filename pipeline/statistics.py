"""``pipeline inspect --stats``: what a finished cache's K holds, what it misses, and what each column takes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cache_schema.errors import CacheCorruptError, CacheError
from cache_schema.manifest import hidden_name, shard_name
from cache_schema.reader import CacheReader
from pipeline.progress import progress_bar
from workers.device import resolve_device
from workers.distill.config import DistillConfig
from workers.distill.student import load_student, require_layers
from workers.errors import InputError
from workers.evaluate.misses import TOP_KS, Misses, mass_outside, measure_misses
from workers.lookup.config import LookupConfig
from workers.lookup.opening import Asked, Source, open_log, source_of_misses
from workers.losses.bild import DEFAULT_K
from workers.teacher.checkpoint import (
    context_length,
    model_directory,
    read_text_config,
    require_plain_head,
    require_vocabulary,
)
from workers.tokenizers import check_same_vocabulary, load_tokenizer

STUDENT_K = DEFAULT_K
"""Leading ids of the student that are looked up: the default of the losses that look them up."""


def statistics(
    cache_dir: Path,
    *,
    student: str | None,
    student_layers: Sequence[int] | None,
    sample_sequences: int,
    device_name: str,
    lookups: Path | None = None,
) -> dict[str, Any]:
    """Bytes by column, exact; the mass outside each K and, given a student, its misses, on a sample of sequences.

    A cache that stores draws has no K: of it, bytes and the ids drawn a position, exact.

    Args:
        lookups: where the lookup log is, if it is not the one in the cache.

    Raises:
        CacheIncompleteError, CacheCorruptError: the cache is not finished, or damaged.
        CacheMismatchError, InputError: the student does not fit the cache, or does not load.
    """
    reader = CacheReader(cache_dir)
    plan, device = reader.plan, resolve_device(device_name)
    if plan.sampling and student is not None:
        raise InputError(
            f"--student: misses are counted outside a stored top-k, and {cache_dir} stores draws: leave it out, or "
            f"give a cache dumped with --sampling top-k (the default)."
        )
    stored_ks = sorted({min(top_k, plan.top_k) for top_k in TOP_KS} | {plan.top_k})
    sample = evenly_spread(len(reader), sample_sequences)
    facts: dict[str, Any] = {
        "columns": column_bytes(reader),
        "sample": {"sequences": len(sample), "indexes": sample},
        "ids_per_position": None,
        "mass_outside": None,
        "misses": None,
        "one_epoch": None,
    }
    if plan.sampling:
        facts["ids_per_position"] = round(_num_values(reader, "token_ids") / reader.manifest.num_positions, 2)
    if 1.0 in plan.temperatures:
        logits_NK, tail_N = stored_logits(reader, sample)
        facts["mass_outside"] = by_top_k(mass_outside(logits_NK, tail_N, stored_ks))
    if student is not None:
        tokenizer = load_tokenizer(str(reader.tokenizer_dir))
        longest = max(reader[index].sequence.num_tokens for index in sample)
        require_student(student, student_layers, tokenizer, longest)
        vocab_size = plan.tokenizer.vocab_size
        asked_ks = sorted({*stored_ks, *(min(top_k, vocab_size) for top_k in TOP_KS)})
        model = load_student(student, student_layers, gradient_checkpointing=False).to(device)
        require_vocabulary(model, vocab_size)
        require_plain_head(model, vocab_size)
        with progress_bar("counting misses") as progress:
            misses = measure_misses(
                model,
                reader,
                sample,
                k=min(STUDENT_K, vocab_size),
                top_ks=asked_ks if reader.has_hidden_states else stored_ks,
                device=device,
                progress=progress,
            )
        facts["misses"] = {"k": min(STUDENT_K, vocab_size), **misses_by_top_k(misses)}
        facts["one_epoch"] = _one_epoch(reader, sample, misses, lookups)
    return facts


def evenly_spread(num_sequences: int, at_most: int) -> list[int]:
    """Indexes of some sequences, from the first to the last."""
    spread: list[int] = np.unique(np.linspace(0, num_sequences - 1, min(at_most, num_sequences), dtype=int)).tolist()
    return spread


def require_student(student: str, layers: Sequence[int] | None, tokenizer: Any, longest: int) -> None:
    """Refuse, from files alone, a student that cannot read the teacher's tokens.

    Args:
        longest: tokens of the longest sequence it will read.

    Raises:
        CacheMismatchError, InputError: says what does not fit.
    """
    if not student:
        raise InputError("--student is empty: give a model folder or a hub name.")
    directory = model_directory(student)
    check_same_vocabulary(tokenizer, load_tokenizer(student))
    context = context_length(directory)
    if context is not None and context < longest:
        raise InputError(
            f"{student} reads {context:,} tokens, the longest sequence here has {longest:,}: give a student with a "
            f"longer context."
        )
    if layers is not None:
        require_layers(layers, read_text_config(directory).num_hidden_layers)


def stored_logits(reader: CacheReader, indexes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the tail's log-sum-exp at temperature 1 of all stored positions of some sequences. [N, K] and [N]"""
    rows = [reader[index].top_k_rows for index in indexes]
    place = reader.plan.temperatures.index(1.0)
    tails = np.concatenate([row.tail_logsumexp[:, place] for row in rows])
    return torch.from_numpy(np.concatenate([row.logits for row in rows])), torch.from_numpy(tails)


def column_bytes(reader: CacheReader) -> dict[str, int]:
    """Compressed bytes of each column over all shards, hidden states among them where they are there.

    Raises:
        CacheCorruptError: a footer cannot be read; names the file.
    """
    sizes: dict[str, int] = {}
    for name, column in _columns(reader):
        sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes


def _num_values(reader: CacheReader, wanted: str) -> int:
    """Numbers in all lists of a column, none of which is empty, over all shards."""
    return sum(column.num_values for name, column in _columns(reader) if name == wanted)


def _columns(reader: CacheReader) -> Iterator[tuple[str, Any]]:
    """Each column of each row group with what the footer says of it."""
    names = [shard_name(receipt.shard) for receipt in reader.manifest.receipts]
    if reader.has_hidden_states:
        names += [hidden_name(receipt.shard) for receipt in reader.manifest.receipts]
    for name in names:
        path = reader.cache_dir / name
        try:
            metadata = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise CacheCorruptError(
                f"{path} is damaged: {error}. `pipeline verify {reader.cache_dir}` lists every damaged file."
            ) from error
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                yield column.path_in_schema.split(".")[0], column


def by_top_k(values: dict[int, float]) -> dict[str, float]:
    """Keys as JSON has them."""
    return {str(top_k): value for top_k, value in values.items()}


def misses_by_top_k(misses: Misses) -> dict[str, Any]:
    return {
        "pairs": misses.num_pairs,
        "share_of_pairs": by_top_k({top_k: misses.share_of_pairs(top_k) for top_k in misses.pairs}),
        "share_of_sequences": by_top_k({top_k: misses.share_of_sequences(top_k) for top_k in misses.pairs}),
    }


def _one_epoch(reader: CacheReader, sample: Sequence[int], misses: Misses, lookups: Path | None) -> dict[str, Any]:
    """What an epoch of this student, as it is, would ask of each tier: the sample's shares on all positions.

    A live teacher runs on the whole of a step in which one sequence misses: on all of them but where none does. What a
    log of answers, or of some sequences' hidden states, spares it is not known before the student asks.
    """
    in_sample = sum(reader[index].rows.num_positions for index in sample)
    pairs = misses.num_pairs * reader.manifest.num_positions / in_sample
    missing = round(pairs * misses.share_of_pairs(reader.plan.top_k))
    source, at_most = _source_and_log(reader, LookupConfig(dir=str(lookups) if lookups else None))
    sequences_per_step = DistillConfig.model_fields["sequences_per_step"].default
    quiet_step = (1 - misses.share_of_sequences(reader.plan.top_k)) ** sequences_per_step
    forwards = round((1 - quiet_step) * len(reader)) if source == "live" else 0
    return {
        "lookups": {"cached": round(pairs) - missing, source: missing},
        "teacher_forwards": forwards,
        "at_most": at_most,
    }


def _source_and_log(reader: CacheReader, lookups: LookupConfig) -> tuple[Source, bool]:
    """Who answers what the stored top-k does not, and whether a log spares a live teacher some of it."""
    try:
        source = source_of_misses(reader, Asked(reader.plan.teacher.name, "refuse", lookups))
        return source, source == "live" and bool(open_log(reader, lookups).files())
    except (CacheError, OSError):  # what is wrong with the log stands beside this, in ``lookups``
        return "live", False
