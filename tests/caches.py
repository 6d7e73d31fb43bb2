"""Whole small caches written by hand, without a model: plans, scored sequences of random numbers, and the commit."""

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from cache_schema import Manifest, Plan, Receipt, SampledRows, ScoredSequence, ShardWriter, TokenSequence, TopKRows
from cache_schema.manifest import (
    LM_HEAD_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    TOKENIZER_NAME,
    read_json,
    receipt_name,
    write_json,
)
from cache_schema.plan import DatasetIdentity, Engine, HiddenStates, TeacherIdentity, TokenizerIdentity
from cache_schema.writer import stored_file


def make_plan(
    *,
    vocab_size=97,
    top_k=8,
    logit_step=1 / 64,
    temperatures=(1.0, 3.0),
    hidden_dtype="bfloat16",
    hidden_size=4,
    positions="response",
    num_sequences=7,
    sequences_per_shard=4,
    sampling=None,
    logits="head",
):
    """Return a plan; one with ``sampling`` has no top-k, whatever the other settings say.

    One of the engine's own logits has neither tails nor hidden states.
    """
    if logits == "engine":
        temperatures, hidden_dtype = (), None
    return Plan(
        teacher=TeacherIdentity(
            name="tiny/teacher",
            fingerprint="a" * 64,
            architecture="TinyForCausalLM",
            num_parameters=1234,
            dtype=hidden_dtype or "float32",
        ),
        tokenizer=TokenizerIdentity(fingerprint="b" * 64, vocab_size=vocab_size, chat_template=None),
        dataset=DatasetIdentity(
            name="rows.jsonl",
            sha256="c" * 64,
            sequences_sha256="d" * 64,
            num_rows=num_sequences,
            num_duplicates=0,
            num_truncated=0,
            max_tokens=64,
        ),
        responses=None,
        engine=Engine(
            name="transformers" if logits == "head" else "vllm",
            device="cpu",
            num_threads=2,
            tokens_per_batch=4096,
            logits=logits,
            versions={"torch": "2.0.0"},
        ),
        positions=positions,
        sampling=sampling,
        top_k=0 if sampling else top_k,
        logit_step=0.0 if sampling else logit_step,
        temperatures=() if sampling else temperatures,
        hidden_states=HiddenStates(dtype=hidden_dtype, size=hidden_size) if hidden_dtype else None,
        num_sequences=num_sequences,
        sequences_per_shard=sequences_per_shard,
    )


def make_scored(plan, rng, num_tokens=None, scale=8.0):
    """Return a sequence with the top k, tails and moments of a random row of V logits per target position.

    With ``sampling``, with draws from it instead.
    """
    num_tokens = num_tokens or int(rng.integers(2, 30))
    vocab_size = plan.tokenizer.vocab_size
    loss_mask = rng.random(num_tokens) < 0.6
    loss_mask[0], loss_mask[-1] = False, True
    sequence = TokenSequence(rng.integers(0, vocab_size, num_tokens, dtype=np.int32), loss_mask, source="rows.jsonl")
    targets = sequence.target_rows(plan.positions)
    logits = (scale * rng.standard_normal((len(targets), vocab_size))).astype(np.float32)  # [P, V]
    if plan.sampling:
        return ScoredSequence(
            sequence, _draws(logits, plan.sampling.draws, rng), _hidden_states(plan, rng, len(targets))
        )
    order = np.argsort(-logits, axis=1, kind="stable")
    top, rest = order[:, : plan.top_k], order[:, plan.top_k :]
    return ScoredSequence(
        sequence,
        TopKRows(
            token_ids=top.astype(np.int32),
            logits=np.take_along_axis(logits, top, axis=1),
            tail_logsumexp=_logsumexp(np.take_along_axis(logits, rest, axis=1), plan.temperatures),
            label_logit=logits[np.arange(len(targets)), sequence.input_ids[targets + 1]],
            row_mean=None if plan.logits_alone else logits.mean(axis=1),
            row_std=None if plan.logits_alone else logits.std(axis=1, ddof=1),
        ),
        _hidden_states(plan, rng, len(targets)),
    )


def make_scoreds(plan, seed=0):
    rng = np.random.default_rng(seed)
    return [make_scored(plan, rng) for _ in range(plan.num_sequences)]


def with_rows(scored, **changes):
    """Return the sequence with other rows."""
    return dataclasses.replace(scored, rows=dataclasses.replace(scored.rows, **changes))


def write_shard(cache_dir, plan, shard, scoreds):
    with ShardWriter(cache_dir, plan, shard) as writer:
        for scored in scoreds:
            writer.append(scored)


def write_cache(cache_dir, plan, scoreds):
    """Write plan, shards, LM head, tokenizer and manifest as a dump does."""
    write_json(cache_dir / PLAN_NAME, plan)
    for shard in range(plan.num_shards):
        write_shard(cache_dir, plan, shard, [scoreds[index] for index in plan.shard_range(shard)])
    (cache_dir / TOKENIZER_NAME).mkdir()
    (cache_dir / TOKENIZER_NAME / "tokenizer.json").write_text('{"vocab": {}}')
    if plan.hidden_states:
        save_file({"weight": np.ones((plan.tokenizer.vocab_size, 4), np.float32)}, cache_dir / LM_HEAD_NAME)
    write_manifest(cache_dir, plan)
    return cache_dir


def write_manifest(cache_dir, plan):
    names = [*([LM_HEAD_NAME] if plan.hidden_states else []), f"{TOKENIZER_NAME}/tokenizer.json"]
    receipts = tuple(read_json(cache_dir / receipt_name(shard), Receipt) for shard in range(plan.num_shards))
    files = tuple(stored_file(cache_dir, name) for name in names)
    write_json(cache_dir / MANIFEST_NAME, Manifest(plan=plan, receipts=receipts, files=files))


def rewrite_table(cache_dir, plan, shard, name, change):
    """Change a shard's file as a table and vouch for it with new receipts: damage that no hash can show."""
    path = cache_dir / name
    pq.write_table(change(pq.read_table(path)), path, row_group_size=16, write_page_checksum=True)
    receipt = read_json(cache_dir / receipt_name(shard), Receipt)
    files = tuple(stored_file(cache_dir, file.name) for file in receipt.files)
    write_json(cache_dir / receipt_name(shard), receipt.model_copy(update={"files": files}))
    write_manifest(cache_dir, plan)


def rewrite_column(cache_dir, plan, shard, name, column, change):
    """The same for one column."""

    def change_column(table):
        return table.set_column(table.column_names.index(column), table.schema.field(column), change(table[column]))

    rewrite_table(cache_dir, plan, shard, name, change_column)


def flip_bit(path: Path, bit: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)


def content(directory):
    """Return a SHA-256 for every file below a directory, by relative name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _draws(logits, draws, rng):
    """Return ids and counts as they are defined, position by position. [P, V] -> [P, U] each"""
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    positions = [Counter(rng.choice(logits.shape[1], draws, p=row).tolist()) for row in probabilities]
    padded = np.zeros((2, len(positions), max(map(len, positions))), np.int32)
    for place, counts in enumerate(positions):
        by_count = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        padded[:, place, : len(counts)] = np.array(by_count).T
    return SampledRows(*padded)


def _logsumexp(logits, temperatures):
    """Log-sum-exp of logit/T over each row, -inf over none. [P, V] -> [P, R]"""
    tails = np.full((len(logits), len(temperatures)), -np.inf)
    if logits.shape[1]:
        for column, temperature in enumerate(temperatures):
            tails[:, column] = np.logaddexp.reduce(logits.astype(np.float64) / temperature, axis=1)
    return tails.astype(np.float32)


def _hidden_states(plan, rng, num_positions):
    if plan.hidden_states is None:
        return None
    states = rng.standard_normal((num_positions, plan.hidden_states.size)).astype(np.float32)
    if plan.teacher.dtype == "bfloat16":
        return (states.view(np.uint32) >> 16).astype(np.uint16)
    return states.astype(plan.teacher.dtype)
