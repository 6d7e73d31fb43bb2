"""Runs the teacher once over a data set, shard by shard.

The batches of a shard depend on the shard alone, and a shard's receipt is written after its files: a dump killed
anywhere goes on with the shards that have no receipt and ends with the same bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema.errors import CacheCorruptError, CacheMismatchError
from cache_schema.manifest import (
    LM_HEAD_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    TOKENIZER_NAME,
    Generation,
    Manifest,
    Plan,
    Receipt,
    StoredFile,
    hidden_name,
    read_json,
    read_manifest,
    receipt_name,
    require_same_plan,
    shard_name,
    write_json,
)
from cache_schema.sequence import SampledRows, ScoredSequence, TokenSequence, TopKRows
from cache_schema.storage import discard_leftovers, exclusive, is_leftover, publish_directory
from cache_schema.writer import ShardWriter, stored_file
from workers.teacher.int8 import measure_int8
from workers.teacher.lm_head import LMHead, save_head, score
from workers.teacher.sampling import counted, draw, uniforms
from workers.teacher.teacher import Teacher

Progress = Callable[[int, int], None]


def remaining_shards(cache_dir: Path, plan: Plan) -> list[int]:
    """The shards that still have to be scored; all of them where nothing was begun. Writes nothing.

    Raises:
        CacheMismatchError: the directory belongs to another dump, or holds something else.
    """
    try:
        stored = read_json(cache_dir / PLAN_NAME, Plan)
        require_same_plan(cache_dir, stored, _with_scales_of(stored, plan))
    except (FileNotFoundError, NotADirectoryError):
        if cache_dir.exists() and (not cache_dir.is_dir() or any(_foreign(cache_dir))):
            raise CacheMismatchError(f"{cache_dir} exists and holds no cache: give --out a new directory.") from None
    if (cache_dir / MANIFEST_NAME).exists():
        _require_files(cache_dir)
        return []
    return [shard for shard in range(plan.num_shards) if not _is_finished(cache_dir, shard)]


def _with_scales_of(stored: Plan, plan: Plan) -> Plan:
    """The plan with the int8 scales that the dump began with: they are measured once, and follow from the rest."""
    hidden = plan.hidden_states
    if hidden is None or hidden.is_measured or stored.hidden_states is None or stored.hidden_states.dtype != "int8":
        return plan
    return plan.model_copy(update={"hidden_states": stored.hidden_states})


def _require_files(cache_dir: Path) -> None:
    """Refuse to call a cache finished whose files are not there; its hidden states may have been deleted."""
    for file in read_manifest(cache_dir).all_files:
        path = cache_dir / file.name
        if ".hidden." not in file.name and (not path.exists() or path.stat().st_size != file.num_bytes):
            raise CacheCorruptError(
                f"{path} is missing or short, but {MANIFEST_NAME} says the dump was finished: restore it, or delete "
                f"{cache_dir / MANIFEST_NAME} and the shard's receipt and run the dump again, which makes it anew."
            )


def dump(
    cache_dir: Path,
    plan: Plan,
    sequences: Sequence[TokenSequence],
    teacher: Teacher,
    tokenizer: Any,
    progress: Progress | None = None,
) -> Manifest:
    """Write the plan, tokenizer and LM head, score every shard without a receipt, then commit the cache.

    A directory that another dump began keeps its plan, which can differ in the teacher's name alone. A plan of int8
    hidden states may come without their scales, which are measured before it is written.

    Args:
        sequences: in data set order; prompts alone where the plan lets the teacher respond.
        progress: called with (sequences done, of sequences); finished shards count as done. Where the teacher
            responds, every sequence counts twice: once answered, once scored.
    """
    with exclusive(cache_dir):
        remaining = remaining_shards(cache_dir, plan)
        finished = finished_manifest(cache_dir)
        if finished is not None:
            return finished
        for name in (PLAN_NAME, MANIFEST_NAME):
            discard_leftovers(cache_dir / name)
        if (cache_dir / PLAN_NAME).exists():
            plan = read_json(cache_dir / PLAN_NAME, Plan)
        else:
            if plan.hidden_states and not plan.hidden_states.is_measured:
                plan = plan.model_copy(update={"hidden_states": measure_int8(plan, sequences, teacher)})
            write_json(cache_dir / PLAN_NAME, plan)
        # Before the first shard: what cannot be stored shows in seconds, not after the last one.
        files = _store_head_and_tokenizer(cache_dir, plan, teacher.lm_head, tokenizer)
        steps = 2 if plan.responses else 1
        total = steps * len(sequences)
        num_done = total - steps * sum(len(plan.shard_range(shard)) for shard in remaining)

        def advance(num_sequences: int) -> None:
            nonlocal num_done
            num_done += num_sequences
            if progress:
                progress(num_done, total)

        for shard in remaining:
            for name in (shard_name(shard), hidden_name(shard), receipt_name(shard)):
                discard_leftovers(cache_dir / name)
            with ShardWriter(cache_dir, plan, shard) as writer:
                for batch in _score_shard(plan, shard, sequences, teacher, advance):
                    for scored in batch:
                        writer.append(scored)
                    advance(len(batch))
        return _commit(cache_dir, plan, files)


def _store_head_and_tokenizer(cache_dir: Path, plan: Plan, head: LMHead, tokenizer: Any) -> tuple[StoredFile, ...]:
    for name in (LM_HEAD_NAME, TOKENIZER_NAME):
        discard_leftovers(cache_dir / name)
    names = []
    if plan.hidden_states:
        save_head(head, cache_dir / LM_HEAD_NAME)
        names.append(LM_HEAD_NAME)
    folder = cache_dir / TOKENIZER_NAME
    if not folder.exists():
        with publish_directory(folder) as temporary:
            tokenizer.save_pretrained(temporary)
    # Several chat templates stand in a folder of their own.
    names += [path.relative_to(cache_dir).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return tuple(stored_file(cache_dir, name) for name in names)


def _commit(cache_dir: Path, plan: Plan, files: tuple[StoredFile, ...]) -> Manifest:
    """Write the manifest, after which nothing of the cache changes."""
    manifest = Manifest(
        plan=plan,
        receipts=tuple(read_json(cache_dir / receipt_name(shard), Receipt) for shard in range(plan.num_shards)),
        files=files,
    )
    write_json(cache_dir / MANIFEST_NAME, manifest)
    return manifest


def finished_manifest(cache_dir: Path) -> Manifest | None:
    """The manifest, if the dump has already been committed."""
    return read_manifest(cache_dir) if (cache_dir / MANIFEST_NAME).exists() else None


def batches(sequences: Sequence[TokenSequence], tokens_per_batch: int, extra: int = 0) -> Iterator[list[TokenSequence]]:
    """Longest first, so that memory is tight at once or never; as many as fit ``tokens_per_batch`` when padded.

    Args:
        extra: tokens that each sequence will grow by.
    """
    batch: list[TokenSequence] = []
    for sequence in sorted(sequences, key=lambda s: (-s.num_tokens, s.sequence_id)):
        if batch and (len(batch) + 1) * (batch[0].num_tokens + extra) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _score_shard(
    plan: Plan, shard: int, sequences: Sequence[TokenSequence], teacher: Teacher, answered: Callable[[int], None]
) -> Iterator[list[ScoredSequence]]:
    """Score a shard batch by batch; ``answered`` is called with the number of responses the teacher has written."""
    members = [sequences[index] for index in plan.shard_range(shard)]
    if plan.responses is not None:
        members = _respond(plan, plan.responses, shard, members, teacher, answered)
    for batch in batches(members, plan.engine.tokens_per_batch):
        yield score_batch(plan, batch, teacher.hidden_states(batch, plan.positions), teacher.lm_head)


def _respond(
    plan: Plan,
    generation: Generation,
    shard: int,
    prompts: list[TokenSequence],
    teacher: Teacher,
    answered: Callable[[int], None],
) -> list[TokenSequence]:
    responses: list[TokenSequence] = []
    # A generated batch keeps its keys and values, so it is sized by the tokens it will have in the end.
    sized = batches(prompts, plan.engine.tokens_per_batch, extra=generation.max_new_tokens)
    for number, batch in enumerate(sized):
        # One seed per batch of a shard: the same numbers whichever shards this process scores.
        seed = generation.seed * 1_000_003 + shard * 1_009 + number
        responses += teacher.respond(batch, generation, seed % 2**63)
        answered(len(batch))
    return responses


def score_batch(
    plan: Plan, batch: Sequence[TokenSequence], states: Sequence[Tensor], head: LMHead
) -> list[ScoredSequence]:
    """What the plan stores of the target rows of a batch, all of them in one call and one copy a column.

    Args:
        states: hidden states at each sequence's target rows. [P_i, D] each
    """
    hidden_ND = torch.cat(list(states))
    # Where each sequence's rows end and the next one's begin.
    borders = np.cumsum([len(hidden_PD) for hidden_PD in states])[:-1]
    rows: Sequence[TopKRows | SampledRows]
    if plan.sampling is None:
        rows = _top_k_rows(plan, batch, hidden_ND, borders, head)
    else:
        uniforms_NS = torch.from_numpy(np.concatenate([uniforms(sequence, plan) for sequence in batch]))
        with torch.inference_mode():
            drawn_NS = draw(head, hidden_ND, uniforms_NS.to(hidden_ND.device))
        rows = [counted(drawn_PS) for drawn_PS in np.split(drawn_NS.cpu().numpy(), borders)]
    if plan.hidden_states is None:
        return [ScoredSequence(sequence, part, None) for sequence, part in zip(batch, rows, strict=True)]
    # numpy has no bfloat16; its bits travel as uint16.
    bits = hidden_ND.view(torch.uint16) if hidden_ND.dtype == torch.bfloat16 else hidden_ND
    stored = np.split(bits.cpu().numpy(), borders)
    return [ScoredSequence(*parts) for parts in zip(batch, rows, stored, strict=True)]


def _top_k_rows(
    plan: Plan, batch: Sequence[TokenSequence], hidden_ND: Tensor, borders: npt.NDArray[np.int64], head: LMHead
) -> list[TopKRows]:
    """Top-k logits, tails and statistics, one ``TopKRows`` a sequence."""
    labels = np.concatenate([sequence.input_ids[sequence.target_rows(plan.positions) + 1] for sequence in batch])
    labels_N = torch.from_numpy(labels).long().to(hidden_ND.device)
    with torch.inference_mode():
        top = score(head, hidden_ND, labels_N, plan.top_k, plan.temperatures)
    columns = {
        "token_ids": top.token_ids_NK.int(),
        "logits": top.logits_NK,
        "tail_logsumexp": top.tail_logsumexp_NR,
        "label_logit": top.label_logit_N,
        "row_mean": top.row_mean_N,
        "row_std": top.row_std_N,
    }
    split = {name: np.split(column.cpu().numpy(), borders) for name, column in columns.items()}
    return [TopKRows(**dict(zip(split, parts, strict=True))) for parts in zip(*split.values(), strict=True)]


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
    return (path for path in cache_dir.iterdir() if not is_leftover(path))
