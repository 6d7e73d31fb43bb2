"""How far the vLLM engine's logits are from the reference engine's, in float32 and in bfloat16.

Both give hidden states; logits are made of them in one way, with float32 accumulation. bfloat16 rounds every layer's
output, so two engines differ there by as much as either differs from float32, which is shown beside. The text is the
repository's own documentation. Needs vllm: `make test-vllm` makes an environment with it, and
`.venv-vllm/bin/python -m benchmarks.engines` runs this in it.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.material import ROOT, fetch_teacher
from cache_schema.plan import Engine
from cache_schema.sequence import TokenSequence
from workers.teacher.checkpoint import identity_of
from workers.teacher.lm_head import LMHead
from workers.teacher.transformers_teacher import TransformersTeacher
from workers.teacher.vllm_teacher import VllmTeacher
from workers.tokenizers import load_tokenizer, vocab_size

TOP_K = 64
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """What an engine gave for every sequence."""

    head: LMHead
    states: list[Tensor]
    tokens_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, help="a model's folder; by default the demo's, which is fetched")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    teacher = str(arguments.teacher or fetch_teacher())
    batch = documentation(teacher, arguments.sequences, arguments.tokens)
    runs = {
        (engine, dtype): run(engine, dtype, teacher, batch)
        for dtype in ("float32", "bfloat16")
        for engine in ("transformers", "vllm")
    }
    print(f"{len(batch)} sequences of {arguments.tokens} tokens, top {TOP_K}, {torch.get_num_threads()} CPU threads")
    print(f"{'':44} {'max':>9} {'mean':>9} {'max |logit|':>11} {'top-1':>8} {'top-64 sets':>11}")
    compared = [
        (("vllm", "float32"), ("transformers", "float32")),
        (("vllm", "bfloat16"), ("transformers", "bfloat16")),
        (("transformers", "bfloat16"), ("transformers", "float32")),
        (("vllm", "bfloat16"), ("transformers", "float32")),
    ]
    for ours, theirs in compared:
        largest, mean, logit, top_1, sets = agreement(runs[ours], runs[theirs])
        name = f"{' '.join(ours)} - {' '.join(theirs)}"
        print(f"{name:44} {largest:9.2g} {mean:9.2g} {logit:11.1f} {top_1:8.3%} {sets:11.3%}")
    for (engine, dtype), done in runs.items():
        print(f"{engine} {dtype}: {done.tokens_per_second:,.0f} tokens/s in the body")


def documentation(teacher: str, num_sequences: int, num_tokens: int) -> list[TokenSequence]:
    pages = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))))
    ids = load_tokenizer(teacher)(pages, add_special_tokens=False, verbose=False)["input_ids"]
    borders = range(0, (num_sequences + 1) * num_tokens, num_tokens)
    parts = [np.array(ids[start:end], dtype=np.int32) for start, end in pairwise(borders)]
    return [TokenSequence(part, np.arange(len(part)) > 0, "docs") for part in parts if len(part) == num_tokens]


def run(name: str, dtype: str, folder: str, batch: list[TokenSequence]) -> Run:
    identity, size = identity_of(folder, dtype), vocab_size(load_tokenizer(folder))
    num_tokens = batch[0].num_tokens
    engine = Engine(name=name, device="cpu", num_threads=0, tokens_per_batch=8 * num_tokens, versions={})
    teacher: TransformersTeacher | VllmTeacher
    if name == "vllm":
        teacher = VllmTeacher(
            folder, identity, engine, vocab_size=size, device=CPU, max_tokens=num_tokens, self_check=False
        )
    else:
        teacher = TransformersTeacher(folder, identity, engine, vocab_size=size, device=CPU)
    teacher.hidden_states(batch[:1], "all")  # the first one warms up
    started = time.perf_counter()
    states = [
        part for start in range(0, len(batch), 8) for part in teacher.hidden_states(batch[start : start + 8], "all")
    ]
    seconds = time.perf_counter() - started
    if isinstance(teacher, VllmTeacher):
        teacher.close()
    return Run(teacher.lm_head, states, num_tokens * len(batch) / seconds)


def logits(done: Run) -> Iterator[Tensor]:
    with torch.inference_mode():
        for hidden_TD in done.states:
            yield done.head.logits(hidden_TD)


def agreement(ours: Run, theirs: Run) -> tuple[float, float, float, float, float]:
    """Largest and mean difference of a logit, largest logit, shares of equal top-1 ids and of top-64 ids in both."""
    differences, means, largest, top_1, shared = [], [], [], [], []
    for ours_TV, theirs_TV in zip(logits(ours), logits(theirs), strict=True):
        delta_TV = (ours_TV - theirs_TV).abs()
        differences.append(float(delta_TV.max()))
        means.append(float(delta_TV.mean()))
        largest.append(float(theirs_TV.abs().max()))
        ours_TK, theirs_TK = ours_TV.topk(TOP_K).indices, theirs_TV.topk(TOP_K).indices
        top_1.append(float((ours_TK[:, 0] == theirs_TK[:, 0]).float().mean()))
        shared.append(float((ours_TK.unsqueeze(2) == theirs_TK.unsqueeze(1)).any(2).float().mean()))
    return max(differences), sum(means) / len(means), max(largest), sum(top_1) / len(top_1), sum(shared) / len(shared)


if __name__ == "__main__":
    main()
