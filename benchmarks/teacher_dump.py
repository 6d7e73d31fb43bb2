"""A whole dump against the bare teacher forward, and its peak memory against a dump of dense logits.

The bare forward is the body and the LM head, in the same float32-accumulated arithmetic, over the same batches; nothing
of it is kept. The dump goes on in a directory that has plan, tokenizer and LM head, which a dump writes once whatever
its size. Bare forward and dumps take turns; medians of the ratios of one turn.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.material import TEACHER, make_cache
from cache_schema import CacheReader
from cache_schema.plan import HiddenStates, Plan
from cache_schema.sequence import TokenSequence
from pipeline.describe import describe
from workers.device import device_name, resolve_device
from workers.teacher.batches import batches
from workers.teacher.checkpoint import identity_of
from workers.teacher.dump import dump
from workers.teacher.lm_head import LMHead, chunks, matmul_operands
from workers.teacher.transformers_teacher import TransformersTeacher
from workers.tokenizers import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", choices=("dump", "dense"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    reader = CacheReader(make_cache())
    sequences = [scored.sequence for scored in reader][: asked.sequences]
    if asked.peak:
        print(json.dumps(peak_bytes(asked.peak, plan_of(reader, asked, "float32", "response", True), sequences, asked)))
        return
    num_tokens = sum(sequence.num_tokens for sequence in sequences)
    print(f"{len(sequences)} sequences, {num_tokens:,} tokens, top {asked.top_k}, medians of {asked.rounds}")
    print(f"{device_name(resolve_device(asked.device))}, {asked.threads} threads\n")
    print(
        "| dtype | positions | bare, tokens/s | dump with hidden states / bare | without / bare |\n"
        "|---|---|---|---|---|"
    )
    for dtype in ("float32", "bfloat16"):
        for positions in ("response", "all"):
            print(row(reader, asked, dtype, positions, sequences), flush=True)
    print()
    for kind in ("dump", "dense"):
        command = [sys.executable, "-m", "benchmarks.teacher_dump", *sys.argv[1:], "--peak", kind]
        peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        before, highest = (peak[name] / 2**30 for name in ("before", "peak"))
        print(f"{kind}: {before:.2f} GiB with the teacher loaded, {highest:.2f} GiB at the peak")
    facts = describe(reader.cache_dir)
    print(
        f"\n{facts['bytes_per_position']} B a position for ids and logits at top {facts['top_k']}, "
        f"{facts['scalar_bytes_per_position']} B for scalars, {facts['hidden_bytes_per_position']} B hidden states; "
        f"logits within {facts['max_logit_error']:g} nat"
    )
    print(f"decoded {decode_speed(reader.cache_dir) / 1e6:.2f} M positions per CPU second")


def plan_of(reader: CacheReader, asked: argparse.Namespace, dtype: str, positions: str, hidden: bool) -> Plan:
    plan = reader.plan
    device, size = resolve_device(asked.device), json.loads((TEACHER / "config.json").read_text())["hidden_size"]
    engine = {"num_threads": asked.threads if device.type == "cpu" else 0, "device": device_name(device)}
    return plan.model_copy(
        update={
            "responses": None,
            "teacher": identity_of(str(TEACHER), dtype),
            "positions": positions,
            "top_k": asked.top_k,
            "num_sequences": min(asked.sequences, plan.num_sequences),
            "hidden_states": HiddenStates(dtype=dtype, size=size) if hidden else None,
            "engine": plan.engine.model_copy(update=engine),
        }
    )


def open_teacher(plan: Plan, asked: argparse.Namespace) -> TransformersTeacher:
    return TransformersTeacher(
        str(TEACHER),
        plan.teacher,
        plan.engine,
        vocab_size=plan.tokenizer.vocab_size,
        device=resolve_device(asked.device),
    )


def row(
    reader: CacheReader, asked: argparse.Namespace, dtype: str, positions: str, sequences: list[TokenSequence]
) -> str:
    plans = [plan_of(reader, asked, dtype, positions, hidden) for hidden in (True, False)]
    teacher, tokenizer = open_teacher(plans[0], asked), load_tokenizer(str(TEACHER))

    turns = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, plan in enumerate(plans):  # which warms up, too
            dump(folder / f"whole-{number}", plan, sequences, teacher, tokenizer)
        for _ in range(asked.rounds):
            turn = [timed(lambda: bare(plans[0], sequences, teacher), teacher.lm_head)]
            for number, plan in enumerate(plans):
                cache_dir = begun(folder / f"whole-{number}", folder / "cache")
                work = partial(dump, cache_dir, plan, sequences, teacher, tokenizer)
                turn.append(timed(work, teacher.lm_head))
                shutil.rmtree(cache_dir)
            turns.append(turn)
    num_tokens = sum(sequence.num_tokens for sequence in sequences)
    pace = num_tokens / statistics.median(turn[0] for turn in turns)
    ratios = [statistics.median(turn[0] / turn[place] for turn in turns) for place in (1, 2)]
    return f"| {dtype} | {positions} | {pace:,.0f} | {ratios[0]:.3f} | {ratios[1]:.3f} |"


def begun(whole: Path, cache_dir: Path) -> Path:
    """A directory with what a dump writes before its first shard."""
    ignored = shutil.ignore_patterns("shard-*", "manifest.json")
    return Path(shutil.copytree(whole, cache_dir, ignore=ignored, copy_function=os.link))


def timed(work: Callable[[], object], head: LMHead) -> float:
    started = time.perf_counter()
    work()
    if head.weight_VD.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def bare(plan: Plan, sequences: list[TokenSequence], teacher: TransformersTeacher) -> None:
    members = [[sequences[index] for index in plan.shard_range(shard)] for shard in range(plan.num_shards)]
    for batch in (batch for shard in members for batch in batches(shard, plan.engine.tokens_per_batch)):
        hidden_ND = torch.cat(teacher.hidden_states(batch, plan.positions))
        head, products_CV = teacher.lm_head, None
        with torch.inference_mode(), matmul_operands(hidden_ND, head.weight_VD) as (operand_ND, weight_VD):
            for rows in chunks(len(hidden_ND), 4 * head.vocab_size, hidden_ND.device):
                if products_CV is None:
                    products_CV = torch.empty(rows.stop, head.vocab_size, device=hidden_ND.device)
                operand_CD = operand_ND[rows]
                LMHead(weight_VD, head.bias_V, head.scale, head.softcap).logits(
                    operand_CD, products_CV[: len(operand_CD)]
                )


def peak_bytes(kind: str, plan: Plan, sequences: list[TokenSequence], asked: argparse.Namespace) -> dict[str, int]:
    """Resident memory of this process: before the work and at its highest."""
    teacher = open_teacher(plan, asked)
    teacher.hidden_states(sequences[:1], plan.positions)
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        if kind == "dump":
            dump(Path(folder) / "cache", plan, sequences, teacher, load_tokenizer(str(TEACHER)))
        else:
            dense_dump(Path(folder), plan, sequences, teacher)
    return {"before": before, "peak": resident("VmHWM")}


def dense_dump(folder: Path, plan: Plan, sequences: list[TokenSequence], teacher: TransformersTeacher) -> None:
    """What a model's own forward gives: the logits of a whole batch at once, then their top k."""
    for number, batch in enumerate(batches(sequences, plan.engine.tokens_per_batch)):
        hidden_ND = torch.cat(teacher.hidden_states(batch, "all"))
        with torch.inference_mode():
            logits_NV = teacher.lm_head.logits(hidden_ND)
            torch.save((logits_NV.topk(plan.top_k), torch.logsumexp(logits_NV, 1)), folder / f"{number}.pt")


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


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
