"""A dump against the bare teacher forward in the same arithmetic, and what a position costs to store and to decode.

The bare forward is body and LM head with float32 accumulation over the same batches, no top-k, nothing written.
Both alternate; medians of ROUNDS.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.material import TEACHER, make_cache
from cache_schema import CacheReader
from pipeline.describe import describe
from workers.teacher.dump import batches, dump
from workers.teacher.lm_head import chunks
from workers.teacher.transformers_teacher import TransformersTeacher
from workers.tokenizers import load_tokenizer

ROUNDS = 3


def main() -> None:
    cache_dir = make_cache()
    reader = CacheReader(cache_dir)
    plan = reader.plan.model_copy(update={"responses": None})
    sequences = [scored.sequence for scored in reader]
    teacher = TransformersTeacher(
        str(TEACHER),
        plan.teacher,
        plan.engine,
        vocab_size=plan.tokenizer.vocab_size,
        device=torch.device("cpu"),
    )
    tokenizer = load_tokenizer(str(TEACHER))

    def bare() -> None:
        for batch in batches(sequences, plan.engine.tokens_per_batch):
            hidden = torch.cat(teacher.hidden_states(batch, plan.positions))
            with torch.inference_mode():
                for rows in chunks(len(hidden), 4 * teacher.lm_head.vocab_size):
                    teacher.lm_head.logits(hidden[rows])

    def full() -> None:
        with tempfile.TemporaryDirectory() as folder:
            dump(Path(folder) / "cache", plan, sequences, teacher, tokenizer)

    seconds: dict[str, list[float]] = {"bare": [], "dump": []}
    for _ in range(ROUNDS):
        for name, work in (("bare", bare), ("dump", full)):
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    bare_s, dump_s = (statistics.median(seconds[name]) for name in ("bare", "dump"))
    num_tokens = reader.manifest.num_tokens
    print(f"{num_tokens:,} tokens, {reader.manifest.num_positions:,} positions, top 50, float32, medians of {ROUNDS}")
    print(f"bare forward {num_tokens / bare_s:,.0f} tokens/s, dump {num_tokens / dump_s:,.0f} tokens/s")
    print(f"dump / bare throughput {bare_s / dump_s:.3f}")
    facts = describe(cache_dir)
    print(
        f"{facts['bytes_per_position']} B a position for ids and logits, {facts['scalar_bytes_per_position']} B for "
        f"scalars, {facts['hidden_bytes_per_position']} B for hidden states; logits within "
        f"{facts['max_logit_error']:g} nat"
    )
    print(f"decoded {decode_speed(cache_dir) / 1e6:.2f} M positions per CPU second")


def decode_speed(cache_dir: Path) -> float:
    """Positions per second of CPU time, best of five passes over the cache from a fresh reader."""
    best = 0.0
    for _ in range(5):
        reader = CacheReader(cache_dir)
        started = time.process_time()
        positions = sum(scored.rows.num_positions for scored in reader)
        best = max(best, positions / (time.process_time() - started))
    return best


if __name__ == "__main__":
    main()
