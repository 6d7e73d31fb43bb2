"""``pipeline inspect``: what is in a cache, in words and numbers."""

from pathlib import Path
from typing import Any

from cache_schema.errors import CacheIncompleteError
from cache_schema.manifest import (
    LM_HEAD_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    Receipt,
    hidden_name,
    manifest_sha256,
    read_json,
    read_manifest,
    receipt_name,
)
from cache_schema.plan import Plan
from cache_schema.reader import CacheReader
from cache_schema.sequence import SampledRows, TopKRows
from pipeline.lookups import NO_LOG, describe_log
from pipeline.work_in_progress import describe_workers, workers_in_words
from workers.errors import InputError
from workers.tokenizers import load_tokenizer


def describe(cache_dir: Path, lookups: Path | None = None) -> dict[str, Any]:
    """The numbers of a cache, finished or not; an unfinished one counts the shards it has.

    Raises:
        CacheIncompleteError: no cache there at all.
        CacheCorruptError: a document is damaged.
    """
    complete = (cache_dir / MANIFEST_NAME).exists()
    if complete:
        manifest = read_manifest(cache_dir)
        plan, receipts, extra = manifest.plan, list(manifest.receipts), manifest.files
    else:
        plan, receipts, extra = _read_plan(cache_dir), [], ()
        for shard in range(plan.num_shards):
            if (cache_dir / receipt_name(shard)).exists():
                receipts.append(read_json(cache_dir / receipt_name(shard), Receipt))
    num_sequences = sum(receipt.num_sequences for receipt in receipts)
    num_positions = sum(receipt.num_positions for receipt in receipts)
    hidden_files = [cache_dir / hidden_name(receipt.shard) for receipt in receipts]
    head_files = [cache_dir / LM_HEAD_NAME] if complete else []
    hidden = plan.hidden_states
    hidden_bytes = sum(path.stat().st_size for path in hidden_files if path.exists())

    def per_position(num_bytes: int) -> float | None:
        return round(num_bytes / num_positions, 2) if num_positions else None

    return {
        "complete": complete,
        "format_version": plan.format_version,
        "sampling": plan.sampling.model_dump() if plan.sampling else None,
        "top_k": plan.top_k,
        "positions": plan.positions,
        "num_sequences": num_sequences,
        "num_tokens": sum(receipt.num_tokens for receipt in receipts),
        "num_positions": num_positions,
        "num_shards": plan.num_shards,
        "finished_shards": len(receipts),
        "bytes": hidden_bytes
        + sum(file.num_bytes for file in extra)
        + sum(file.num_bytes for receipt in receipts for file in receipt.files if ".hidden." not in file.name),
        "bytes_per_position": per_position(sum(receipt.logits_bytes for receipt in receipts)),
        "scalar_bytes_per_position": per_position(sum(receipt.scalar_bytes for receipt in receipts)),
        "hidden_bytes_per_position": per_position(hidden_bytes),
        "hidden_states": bool(hidden_files) and all(path.exists() for path in [*head_files, *hidden_files]),
        "hidden_dtype": hidden.dtype if hidden else None,
        "hidden_logit_error": (
            {"mean": hidden.mean_logit_error, "max": hidden.max_logit_error}
            if hidden and hidden.dtype == "int8"
            else None
        ),
        "max_logit_error": None if plan.sampling else plan.logit_step / 2,
        "temperatures": list(plan.temperatures),
        "engine": {"name": plan.engine.name, "logits": plan.engine.logits},
        "teacher": {
            "name": plan.teacher.name,
            "fingerprint": plan.teacher.fingerprint,
            "dtype": plan.teacher.dtype,
            "num_parameters": plan.teacher.num_parameters,
        },
        "tokenizer": {"fingerprint": plan.tokenizer.fingerprint, "vocab_size": plan.tokenizer.vocab_size},
        "dataset": plan.dataset.model_dump(),
        "responses": plan.responses.model_dump() if plan.responses else None,
        "lookups": describe_log(CacheReader(cache_dir), lookups) if complete else NO_LOG,
        "manifest_sha256": manifest_sha256(cache_dir) if complete else None,
        **({} if complete else describe_workers(cache_dir, plan.num_sequences, num_sequences)),
    }


def in_words(cache_dir: Path, facts: dict[str, Any]) -> str:
    """The description a person reads."""
    state = (
        "finished" if facts["complete"] else f"NOT finished: {facts['finished_shards']} of {facts['num_shards']} shards"
    )
    stored, columns = _rows_in_words(facts)
    wrote = "teacher-written" if facts["responses"] else "the data set's"
    lines = [
        f"{cache_dir}: {state}",
        f"  teacher     {facts['teacher']['name']}, {facts['teacher']['num_parameters'] / 1e6:,.0f} M parameters, "
        f"{facts['teacher']['dtype']}, fingerprint {facts['teacher']['fingerprint'][:12]}",
        f"  tokenizer   {facts['tokenizer']['vocab_size']:,} ids, fingerprint {facts['tokenizer']['fingerprint'][:12]}",
        f"  data        {facts['dataset']['name']}: {facts['dataset']['num_rows']:,} rows, "
        f"{facts['dataset']['num_duplicates']:,} duplicates, {facts['dataset']['num_truncated']:,} truncated; "
        f"responses {wrote}",
        f"  content     {facts['num_sequences']:,} sequences, {facts['num_tokens']:,} tokens, "
        f"{facts['num_positions']:,} {facts['positions']} positions in {facts['num_shards']} shards",
        f"  stored      {stored}, hidden states: {_hidden_in_words(facts)}",
        f"  size        {human_bytes(facts['bytes'])}; per position {columns}, "
        f"{facts['hidden_bytes_per_position']} B hidden states",
        *_log_in_words(facts),
        *([] if facts["complete"] else workers_in_words(facts)),
    ]
    return "\n".join(lines)


def _rows_in_words(facts: dict[str, Any]) -> tuple[str, str]:
    """What is stored of a position, and the bytes it takes."""
    num_bytes = facts["bytes_per_position"]
    if facts["sampling"]:
        draws, seed = facts["sampling"]["draws"], facts["sampling"]["seed"]
        return f"{draws:,} draws from each softmax, seed {seed}", f"{num_bytes} B ids and counts"
    temperatures = ", ".join(f"{t:g}" for t in facts["temperatures"])
    tails = f"tails at T = {temperatures}" if temperatures else f"no tails ({facts['engine']['name']}'s own logits)"
    return (
        f"top {facts['top_k']} logits within {facts['max_logit_error']:g} nat, {tails}",
        f"{num_bytes} B ids and logits, {facts['scalar_bytes_per_position']} B scalars",
    )


def _log_in_words(facts: dict[str, Any]) -> list[str]:
    """A line, if there is a log."""
    log = facts["lookups"]
    if log["error"]:
        return [f"  lookup log  cannot be used: {log['error']}"]
    if not log["files"]:
        return []
    hidden = log["sequences_with_hidden_states"]
    parts = [f"{hidden:,} of {facts['num_sequences']:,} sequences with hidden states"] if hidden else []
    parts += [f"answers of {log['answered_pairs']:,} pairs"] if log["answered_pairs"] else []
    return [f"  lookup log  {', '.join(parts)}, {log['files']:,} files, {human_bytes(log['bytes'])}"]


def _hidden_in_words(facts: dict[str, Any]) -> str:
    if not facts["hidden_states"]:
        return "no"
    error = facts["hidden_logit_error"]
    if error is None:
        return f"yes, {facts['hidden_dtype']}"
    return (
        f"yes, {facts['hidden_dtype']}: logits from them within {error['mean']:.2g} nat on average, {error['max']:.2g} "
        f"at most (on the dump's pilot)"
    )


def human_bytes(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _read_plan(cache_dir: Path) -> Plan:
    try:
        return read_json(cache_dir / PLAN_NAME, Plan)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheIncompleteError(
            f"{cache_dir} holds no cache: there is neither plan nor manifest in it. Give the --out of a teacher-dump."
        ) from None


def describe_sequence(cache_dir: Path, which: str) -> dict[str, Any]:
    """One sequence by id (32 hex digits) or index: its tokens and, at each stored position, the teacher's five best, or
    the five ids drawn most often."""
    reader = CacheReader(cache_dir)
    try:
        index = int(which) if len(which) < 32 else reader.index_of(bytes.fromhex(which))
        scored = reader[index]
    except ValueError:
        raise InputError(f"--sequence {which}: give an index, or an id of 32 hexadecimal digits.") from None
    except IndexError as error:
        raise InputError(f"{error}: give an index from 0 to {len(reader) - 1}.") from None
    tokenizer = load_tokenizer(str(reader.tokenizer_dir))

    def text(token_id: int) -> str:
        return str(tokenizer.decode([int(token_id)]))

    sequence = scored.sequence
    positions = []
    for place, row in enumerate(sequence.target_rows(reader.plan.positions).tolist()):
        label = int(sequence.input_ids[row + 1])
        said, best = _said(scored.rows, place, label)
        positions.append(
            {
                "position": row,
                "next": text(label),
                **said,
                "teacher": [{"token": text(entry["id"]), **entry} for entry in best],
            }
        )
    return {
        "index": index,
        "sequence_id": sequence.sequence_id.hex(),
        "source": sequence.source,
        "num_tokens": sequence.num_tokens,
        "text": str(tokenizer.decode(sequence.input_ids.tolist())),
        "positions": positions,
    }


def _said(rows: TopKRows | SampledRows, place: int, label: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of one stored position: what the teacher says of the label, and its leading ids."""
    ids = rows.token_ids[place].tolist()
    if isinstance(rows, TopKRows):
        logits = zip(ids[:5], rows.logits[place, :5].tolist(), strict=True)
        return {"label_logit": float(rows.label_logit[place])}, [{"id": id_, "logit": logit} for id_, logit in logits]
    counts = {id_: count for id_, count in zip(ids, rows.counts[place].tolist(), strict=True) if count}
    return {"label_count": counts.get(label, 0)}, [{"id": id_, "count": counts[id_]} for id_ in list(counts)[:5]]


def sequence_in_words(shown: dict[str, Any]) -> str:
    lines = [f"sequence {shown['index']}, {shown['sequence_id']}, {shown['num_tokens']} tokens", shown["text"], ""]
    for position in shown["positions"]:
        if "label_count" in position:
            label = f"{position['label_count']:>7}"
            best = "  ".join(f"{entry['token']!r} {entry['count']}" for entry in position["teacher"])
        else:
            label = f"{position['label_logit']:>7.2f}"
            best = "  ".join(f"{entry['token']!r} {entry['logit']:.2f}" for entry in position["teacher"])
        lines.append(f"{position['position']:>5}  {position['next']!r:<16} {label}   {best}")
    return "\n".join(lines)
