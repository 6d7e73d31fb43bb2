"""Bytes of stored hidden states against what they do to the logits: bfloat16, and int8 with and without its parts.

Every variant is written to Parquet and read back. Bytes are the file's; the error is |logit from the stored state -
logit from the teacher's| over whole rows, at POSITIONS positions spread over the cache; reading is CPU time on one
thread, from the file to a tensor of the compute dtype, the best of ROUNDS passes.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.material import TEACHER, make_cache
from cache_schema import CacheReader, Plan, ScoredSequence, ShardWriter
from cache_schema.manifest import (
    LM_HEAD_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    Manifest,
    Receipt,
    hidden_name,
    read_json,
    receipt_name,
    write_json,
)
from cache_schema.plan import HiddenStates
from workers.lookup.stored import stored_hidden_states
from workers.teacher.checkpoint import identity_of
from workers.teacher.dump import dump
from workers.teacher.int8 import measure_int8
from workers.teacher.lm_head import LMHead, chunks, load_head
from workers.teacher.transformers_teacher import TransformersTeacher
from workers.tokenizers import load_tokenizer

ROUNDS = 5
POSITIONS = 512


def variants(hidden: HiddenStates) -> dict[str, HiddenStates]:
    """int8 as it is stored, and poorer forms of it."""
    channels = np.array(hidden.channel_scale)
    channels[list(hidden.residual_channels or ())] /= 4  # without residuals they need the scale of any channel
    return {
        "int8, row scales alone": hidden.model_copy(
            update={"channel_scale": (1.0,) * hidden.size, "residual_channels": ()}
        ),
        "int8, row and channel scales": hidden.model_copy(
            update={"channel_scale": tuple(channels.tolist()), "residual_channels": ()}
        ),
        "int8, scales and residuals": hidden,
    }


def rewritten(reader: CacheReader, hidden: HiddenStates, cache_dir: Path) -> CacheReader:
    """The same cache with its hidden states stored as ``hidden`` says."""
    plan: Plan = reader.plan.model_copy(update={"hidden_states": hidden})
    cache_dir.mkdir()
    write_json(cache_dir / PLAN_NAME, plan)
    (cache_dir / LM_HEAD_NAME).symlink_to(reader.lm_head_path)
    for shard in range(plan.num_shards):
        with ShardWriter(cache_dir, plan, shard) as writer:
            for index in plan.shard_range(shard):
                scored: ScoredSequence = reader[index]
                writer.append(replace(scored, hidden_states=reader.hidden_states(index)))
    receipts = tuple(read_json(cache_dir / receipt_name(shard), Receipt) for shard in range(plan.num_shards))
    write_json(cache_dir / MANIFEST_NAME, Manifest(plan=plan, receipts=receipts, files=reader.manifest.files))
    return CacheReader(cache_dir)


def logit_errors(head: LMHead, exact: Tensor, stored: Tensor) -> tuple[float, float]:
    total, largest = 0.0, 0.0
    with torch.inference_mode():
        for rows in chunks(len(exact), 8 * head.vocab_size):
            difference = (head.logits(stored[rows]) - head.logits(exact[rows])).abs()
            total, largest = total + float(difference.double().sum()), max(largest, float(difference.max()))
    return total / (len(exact) * head.vocab_size), largest


def states_of(reader: CacheReader) -> Tensor:
    return torch.cat([stored_hidden_states(reader, index) for index in range(len(reader))])


def seconds_to_read(reader: CacheReader) -> float:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    passes = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for index in range(len(reader)):
            stored_hidden_states(reader, index)
        passes.append(time.process_time() - started)
    torch.set_num_threads(num_threads)
    return min(passes)


def main() -> None:
    source = CacheReader(make_cache())
    sequences = [scored.sequence for scored in source]
    identity = identity_of(str(TEACHER), "bfloat16")
    size = source.plan.hidden_states.size
    plan = source.plan.model_copy(
        update={"responses": None, "teacher": identity, "hidden_states": HiddenStates(dtype="bfloat16", size=size)}
    )
    vocab_size = plan.tokenizer.vocab_size
    teacher = TransformersTeacher(
        str(TEACHER), identity, plan.engine, vocab_size=vocab_size, device=torch.device("cpu")
    )
    with tempfile.TemporaryDirectory() as folder:
        dump(Path(folder) / "bfloat16", plan, sequences, teacher, load_tokenizer(str(TEACHER)))
        reader = CacheReader(Path(folder) / "bfloat16")
        pending = plan.model_copy(update={"hidden_states": HiddenStates(dtype="int8", size=size)})
        measured = measure_int8(pending, sequences, teacher)
        head = load_head(reader.lm_head_path, torch.device("cpu"))
        caches = {"bfloat16": reader}
        for number, (name, hidden) in enumerate(variants(measured).items()):
            caches[name] = rewritten(reader, hidden, Path(folder) / str(number))
        num_positions = reader.manifest.num_positions
        exact = states_of(reader)
        sample = torch.from_numpy(np.linspace(0, num_positions - 1, min(POSITIONS, num_positions), dtype=int))
        print(
            f"{len(sequences)} sequences, {num_positions:,} positions, d = {size}, V = {vocab_size}, bfloat16 teacher"
        )
        print(f"{'':<30} {'B/position':>10} {'mean':>8} {'max nat':>8} {'us/position to read':>20}")
        for name, cache in caches.items():
            num_bytes = sum((cache.cache_dir / hidden_name(shard)).stat().st_size for shard in range(plan.num_shards))
            mean, largest = logit_errors(head, exact[sample], states_of(cache)[sample])
            microseconds = 1e6 * seconds_to_read(cache) / num_positions
            print(f"{name:<30} {num_bytes / num_positions:>10.0f} {mean:>8.4f} {largest:>8.3f} {microseconds:>20.1f}")
        print(f"the plan of the last says {measured.mean_logit_error:.4f} and {measured.max_logit_error:.3f}")


if __name__ == "__main__":
    main()
