"""What positions cost a dump besides the teacher: this project's columns against one Python object an entry.

The teacher is a random model of two narrow layers and 1,024 ids, so that computing is nearly free; both ways score the
same hidden states with the same head. The other way is that of tools around an inference server: a dict of token id to
log-probability for each position, written as JSON Lines.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.material import fetch_teacher
from cache_schema.plan import Plan
from cache_schema.sequence import TokenSequence
from pipeline.config import build_config
from pipeline.teacher_dump import prepare
from workers.teacher.batches import batches
from workers.teacher.config import DumpConfig
from workers.teacher.dump import dump
from workers.teacher.scoring import score
from workers.teacher.transformers_teacher import TransformersTeacher
from workers.tokenizers import load_tokenizer

LENGTH = 512
VOCAB_SIZE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir = narrow_model(folder / "model")
        sequences = random_sequences(asked.sequences)
        plan = plan_of(folder, model_dir, sequences)
        teacher = TransformersTeacher(
            str(model_dir),
            plan.teacher,
            plan.engine,
            vocab_size=plan.tokenizer.vocab_size,
            device=torch.device("cpu"),
        )
        tokenizer = load_tokenizer(str(model_dir))
        print("| top k | positions | scored and dropped | this project | objects | objects / this project |")
        print("|---|---|---|---|---|---|")
        for top_k in (8, 64, 256):
            one = plan.model_copy(update={"top_k": top_k})
            works = (
                lambda plan=one: consume(plan, sequences, teacher),
                lambda plan=one: dump(folder / str(time.monotonic_ns()), plan, sequences, teacher, tokenizer),
                lambda plan=one: write_objects(folder / "objects.jsonl", plan, sequences, teacher),
            )
            num_positions = asked.sequences * (LENGTH - 1)
            times = [[timed(work) for work in works] for _ in range(asked.rounds + 1)][1:]
            pace = [num_positions / statistics.median(column) for column in zip(*times, strict=True)]
            ratio = statistics.median(turn[2] / turn[1] for turn in times)
            print(
                f"| {top_k} | {num_positions:,} | {' | '.join(f'{one:,.0f}' for one in pace)} | {ratio:.1f} |",
                flush=True,
            )


def narrow_model(folder: Path) -> Path:
    tokenizer = load_tokenizer(str(fetch_teacher()))
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_sequences(num_sequences: int) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    mask = np.arange(LENGTH) > 0
    return [
        TokenSequence(random.integers(0, VOCAB_SIZE, LENGTH, dtype=np.int32), mask, "random")
        for _ in range(num_sequences)
    ]


def plan_of(folder: Path, model_dir: Path, sequences: Sequence[TokenSequence]) -> Plan:
    """The plan of a command line, for sequences that no file holds."""
    (folder / "rows.jsonl").write_text('{"text": "any"}\n')
    asked = {"teacher.model": str(model_dir), "data.path": str(folder / "rows.jsonl"), "cache.positions": "all"}
    plan = prepare(build_config(DumpConfig, None, ["cache.hidden_states=false"], asked)).plan
    cut = plan.tokenizer.model_copy(update={"vocab_size": VOCAB_SIZE})
    return plan.model_copy(update={"num_sequences": len(sequences), "tokenizer": cut})


def consume(plan: Plan, sequences: list[TokenSequence], teacher: TransformersTeacher) -> None:
    for _ in scored(plan, sequences, teacher):
        pass


def write_objects(path: Path, plan: Plan, sequences: list[TokenSequence], teacher: TransformersTeacher) -> None:
    with path.open("w") as file:
        for batch, ids_NK, logprobs_NK in scored(plan, sequences, teacher):
            positions = iter(zip(ids_NK.tolist(), logprobs_NK.tolist(), strict=True))
            for sequence in batch:
                rows = [dict(zip(*next(positions), strict=True)) for _ in range(sequence.num_tokens - 1)]
                file.write(json.dumps({"input_ids": sequence.input_ids.tolist(), "logprobs": rows}) + "\n")


def scored(
    plan: Plan, sequences: list[TokenSequence], teacher: TransformersTeacher
) -> Iterator[tuple[list[TokenSequence], Tensor, Tensor]]:
    for batch in batches(sequences, plan.engine.tokens_per_batch):
        hidden_ND = torch.cat(teacher.hidden_states(batch, plan.positions))
        labels_N = torch.from_numpy(np.concatenate([sequence.input_ids[1:] for sequence in batch])).long()
        with torch.inference_mode():
            top = score(teacher.lm_head, hidden_ND, labels_N, plan.top_k, plan.temperatures)
            whole_N1 = torch.logaddexp(torch.logsumexp(top.logits_NK, 1), top.tail_logsumexp_NR[:, 0]).unsqueeze(1)
            yield batch, top.token_ids_NK, top.logits_NK - whole_N1


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
