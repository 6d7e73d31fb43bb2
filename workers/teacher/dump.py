"""Runs the teacher once over a data set, shard by shard.

The batches of a shard depend on the shard alone, and a shard's receipt is written after its files: a dump killed
anywhere goes on with the shards that have no receipt and ends with the same bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_schema.errors import CacheCorruptError, CacheMismatchError
from cache_schema.manifest import (
    LM_HEAD_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    TOKENIZER_NAME,
    Manifest,
    Plan,
    Receipt,
    read_json,
    read_manifest,
    receipt_name,
    require_same_plan,
    write_json,
)
from cache_schema.sequence import ScoredSequence, TokenSequence, TopKRows
from cache_schema.storage import exclusive, publish_directory
from cache_schema.writer import ShardWriter, stored_file
from workers.teacher.lm_head import LMHead, save_head, score
from workers.teacher.teacher import Teacher

Progress = Callable[[int, int], None]


def remaining_shards(cache_dir: Path, plan: Plan) -> list[int]:
    """The shards that still have to be scored; all of them where nothing was begun. Writes nothing.

    Raises:
        CacheMismatchError: the directory belongs to another dump, or holds something else.
    """
    try:
        require_same_plan(cache_dir, read_json(cache_dir / PLAN_NAME, Plan), plan)
    except (FileNotFoundError, NotADirectoryError):
        if cache_dir.exists() and (not cache_dir.is_dir() or any(_foreign(cache_dir))):
            raise CacheMismatchError(f"{cache_dir} exists and holds no cache: give --out a new directory.") from None
    if (cache_dir / MANIFEST_NAME).exists():
        return []  # committed; its hidden states may have been deleted since
    return [shard for shard in range(plan.num_shards) if not _is_finished(cache_dir, shard)]


def dump(
    cache_dir: Path,
    plan: Plan,
    sequences: Sequence[TokenSequence],
    teacher: Teacher,
    tokenizer: Any,
    progress: Progress | None = None,
) -> Manifest:
    """Write the plan, score every shard without a receipt, then commit the cache.

    Args:
        sequences: in data set order; prompts alone where the plan lets the teacher respond.
        progress: called with (sequences done, of sequences); finished shards count as done.
    """
    remaining_shards(cache_dir, plan)  # refuses another plan's directory before anything is written
    if not (cache_dir / PLAN_NAME).exists():
        write_json(cache_dir / PLAN_NAME, plan)
    with exclusive(cache_dir / PLAN_NAME):
        remaining = remaining_shards(cache_dir, plan)
        num_done = len(sequences) - sum(len(plan.shard_range(shard)) for shard in remaining)
        for shard in remaining:
            with ShardWriter(cache_dir, plan, shard) as writer:
                for scored in _score_shard(plan, shard, sequences, teacher):
                    writer.append(scored)
                    num_done += 1
                    if progress:
                        progress(num_done, len(sequences))
        return commit_cache(cache_dir, plan, teacher.lm_head, tokenizer)


def commit_cache(cache_dir: Path, plan: Plan, head: LMHead, tokenizer: Any) -> Manifest:
    """Write tokenizer, LM head and, last, the manifest."""
    names = []
    if plan.hidden_states:
        save_head(head, cache_dir / LM_HEAD_NAME)
        names.append(LM_HEAD_NAME)
    if not (cache_dir / TOKENIZER_NAME).exists():
        with publish_directory(cache_dir / TOKENIZER_NAME) as temporary:
            tokenizer.save_pretrained(temporary)
    names += [f"{TOKENIZER_NAME}/{file.name}" for file in sorted((cache_dir / TOKENIZER_NAME).iterdir())]
    manifest = Manifest(
        plan=plan,
        receipts=tuple(read_json(cache_dir / receipt_name(shard), Receipt) for shard in range(plan.num_shards)),
        files=tuple(stored_file(cache_dir, name) for name in names),
    )
    write_json(cache_dir / MANIFEST_NAME, manifest)
    return manifest


def finished_manifest(cache_dir: Path) -> Manifest | None:
    """The manifest, if the dump has already been committed."""
    return read_manifest(cache_dir) if (cache_dir / MANIFEST_NAME).exists() else None


def batches(sequences: Sequence[TokenSequence], tokens_per_batch: int) -> Iterator[list[TokenSequence]]:
    """Longest first, so that memory is tight at once or never; as many as fit ``tokens_per_batch`` when padded."""
    batch: list[TokenSequence] = []
    for sequence in sorted(sequences, key=lambda s: (-s.num_tokens, s.sequence_id)):
        if batch and (len(batch) + 1) * batch[0].num_tokens > tokens_per_batch:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _score_shard(
    plan: Plan, shard: int, sequences: Sequence[TokenSequence], teacher: Teacher
) -> Iterator[ScoredSequence]:
    members = [sequences[index] for index in plan.shard_range(shard)]
    if plan.responses is not None:
        members = _respond(plan, shard, members, teacher)
    for batch in batches(members, plan.engine.tokens_per_batch):
        states = teacher.hidden_states(batch, plan.positions)
        for sequence, hidden_PD in zip(batch, states, strict=True):
            yield score_sequence(plan, sequence, hidden_PD, teacher.lm_head)


def _respond(plan: Plan, shard: int, prompts: list[TokenSequence], teacher: Teacher) -> list[TokenSequence]:
    assert plan.responses is not None
    longest = plan.responses.max_new_tokens
    # A generated batch keeps its keys and values, so it is sized by the tokens it will have in the end.
    sized = batches(prompts, max(plan.engine.tokens_per_batch, longest) * 4)
    answered: list[TokenSequence] = []
    for number, batch in enumerate(sized):
        # One seed per batch of a shard: the same numbers whichever shards this process scores.
        seed = plan.responses.seed * 1_000_003 + shard * 1_009 + number
        answered += teacher.respond(batch, plan.responses, seed % 2**63)
    return answered


def score_sequence(plan: Plan, sequence: TokenSequence, hidden_PD: Tensor, head: LMHead) -> ScoredSequence:
    """Logits, tails and statistics of one sequence's target rows."""
    labels = sequence.input_ids[sequence.target_rows(plan.positions) + 1]
    labels_P = torch.from_numpy(labels).long().to(hidden_PD.device)
    with torch.inference_mode():
        top = score(head, hidden_PD, labels_P, plan.top_k, plan.temperatures)
    rows = TopKRows(
        token_ids=top.token_ids_NK.int().cpu().numpy(),
        logits=top.logits_NK.cpu().numpy(),
        tail_logsumexp=top.tail_logsumexp_NR.cpu().numpy(),
        label_logit=top.label_logit_N.cpu().numpy(),
        row_mean=top.row_mean_N.cpu().numpy(),
        row_std=top.row_std_N.cpu().numpy(),
    )
    stored = None
    if plan.hidden_states:
        # numpy has no bfloat16; its bits travel as uint16.
        bits = hidden_PD.view(torch.uint16) if hidden_PD.dtype == torch.bfloat16 else hidden_PD
        stored = bits.cpu().numpy()
    return ScoredSequence(sequence, rows, stored)


def _is_finished(cache_dir: Path, shard: int) -> bool:
    """A receipt says so, provided its files are there: a receipt without them is an error, not a reason to rescore."""
    try:
        receipt = read_json(cache_dir / receipt_name(shard), Receipt)
    except FileNotFoundError:
        return False
    for file in receipt.files:
        path = cache_dir / file.name
        if not path.exists() or path.stat().st_size != file.num_bytes:
            raise CacheCorruptError(
                f"{path} is missing or short, but {receipt_name(shard)} says it was finished: delete "
                f"{cache_dir / receipt_name(shard)} and run the dump again to score that shard anew."
            )
    return True


def _foreign(cache_dir: Path) -> Iterator[Path]:
    """What does not look like the leftovers of a dump killed before its plan was written."""
    return (path for path in cache_dir.iterdir() if path.name != f".{PLAN_NAME}.tmp")
