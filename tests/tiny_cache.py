"""A real cache: a tiny teacher run over sequences that are given as tokens."""

from pathlib import Path

import numpy as np
import torch

from cache_schema.plan import HiddenStates
from cache_schema.reader import CacheReader
from cache_schema.sequence import TokenSequence
from tests.caches import make_plan
from workers.teacher.checkpoint import identity_of
from workers.teacher.dump import dump
from workers.teacher.transformers_teacher import TransformersTeacher
from workers.tokenizers import load_tokenizer, vocab_size

CPU = torch.device("cpu")


def random_sequences(num_sequences=7, vocab_size=384, seed=0):
    """Ragged sequences; most train what follows a prompt, the last one two turns, the first its final token alone."""
    rng = np.random.default_rng(seed)
    sequences = []
    for number in range(num_sequences):
        num_tokens = int(rng.integers(6, 30))
        mask = np.arange(num_tokens) >= num_tokens // 2
        if number == 0:
            mask = np.arange(num_tokens) == num_tokens - 1
        if number == num_sequences - 1:
            mask[1:3], mask[-2:] = True, False
        ids = rng.integers(0, vocab_size, num_tokens).astype(np.int32)
        sequences.append(TokenSequence(ids, mask, "random"))
    return sequences


def load_teacher(model_dir, plan):
    """The engine the cache of this plan was dumped with, or is to be."""
    return TransformersTeacher(
        str(model_dir), plan.teacher, plan.engine, vocab_size=plan.tokenizer.vocab_size, device=CPU
    )


def dump_tiny_cache(
    folder: Path, model_dir: Path, sequences, *, dtype="float32", hidden_states=True, hidden_dtype=None, **plan
):
    """Dump into ``folder``, three sequences a shard, batches of 64 padded tokens. Returns the reader."""
    identity = identity_of(str(model_dir), dtype)
    tokenizer = load_tokenizer(str(model_dir))
    settings = {"top_k": 8, "vocab_size": vocab_size(tokenizer), "sequences_per_shard": 3, **plan}
    made = make_plan(num_sequences=len(sequences), **settings)
    whole = made.model_copy(
        update={
            "teacher": identity,
            "hidden_states": HiddenStates(dtype=hidden_dtype or identity.dtype, size=32) if hidden_states else None,
            "engine": made.engine.model_copy(update={"tokens_per_batch": 64}),
        }
    )
    dump(folder, whole, sequences, load_teacher(model_dir, whole), tokenizer)
    return CacheReader(folder)
