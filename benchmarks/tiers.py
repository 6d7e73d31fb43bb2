"""The numbers of every tier against the teacher itself, run plainly in float32 by transformers, one sequence at a time.

At every position of the cache the ladder is asked for the 64 highest ids of a student cut from the teacher, and for as
many random ones. `python -m benchmarks.tiers [--data FILE.jsonl] [--rows 16]`
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.material import STUDENT_LAYERS, TEACHER, add_data_options, dump
from cache_schema import CacheReader
from cache_schema.lookup_writer import LookupWriter
from cache_schema.lookups import LookupLog
from workers.distill.student import keep_layers
from workers.lookup.answers import AnswerLog
from workers.lookup.batch import collate
from workers.lookup.ladder import Ladder
from workers.lookup.live import LiveTeacher
from workers.lookup.opening import stored_ladder
from workers.lookup.states import TeacherStates
from workers.ordering import exact_top_k
from workers.teacher.transformers_teacher import TransformersTeacher

CPU = torch.device("cpu")
ASKED = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_options(parser, rows=16)
    options = parser.parse_args()
    stored = CacheReader(dump("tiers-hidden", options.data, options.rows))
    bare = CacheReader(dump("tiers-bare", options.data, options.rows, "--no-hidden-states"))
    plan = bare.plan
    teacher = TransformersTeacher(
        str(TEACHER), plan.teacher, plan.engine, vocab_size=plan.tokenizer.vocab_size, device=CPU
    )
    with tempfile.TemporaryDirectory() as folder:
        ladders = {"hidden": stored_ladder(stored, CPU), "bound": Ladder(bound=True)}
        hidden_dir, answers_dir = Path(folder) / "hidden", Path(folder) / "answers"
        for name in ("live", "logged"):  # the second answers from what the first wrote
            ladders[name] = hidden_log_ladder(bare, teacher, hidden_dir, live=name == "live")
            if name == "live":
                measure("live", ladders["live"], bare)
        measure("live, answers", answers_ladder(bare, teacher, answers_dir, live=True), bare)
        ladders["logged answers"] = answers_ladder(bare, teacher, answers_dir, live=False)
        for name in ("hidden", "logged", "logged answers", "bound"):
            measure(name, ladders[name], stored if name == "hidden" else bare)


def hidden_log_ladder(reader: CacheReader, teacher: TransformersTeacher, log_dir: Path, *, live: bool) -> Ladder:
    writer = LookupWriter(log_dir, reader.manifest_sha256, "0" * 64) if live else None
    log = LookupLog(reader, [log_dir])
    return Ladder(
        TeacherStates(
            reader, teacher.lm_head, log=log, live=LiveTeacher(reader, teacher) if live else None, writer=writer
        )
    )


def answers_ladder(reader: CacheReader, teacher: TransformersTeacher, log_dir: Path, *, live: bool) -> Ladder:
    writer = LookupWriter(log_dir, reader.manifest_sha256) if live else None
    states = TeacherStates(reader, teacher.lm_head, live=LiveTeacher(reader, teacher), whole_steps=False)
    return Ladder(states if live else None, answers=AnswerLog(reader, LookupLog(reader, [log_dir]), writer, 0))


def measure(name: str, ladder: Ladder, reader: CacheReader) -> None:
    """Print the largest difference of the tier's answers, and of the cached ones beside them."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    keep_layers(student, STUDENT_LAYERS)
    worst = {"cached": 0.0, "other": 0.0}
    below, pairs, total = 0.0, 0, 0.0
    for index in range(len(reader)):
        positions = collate(reader, [index], ["response"], CPU).parts["response"]
        input_ids = torch.from_numpy(reader[index].sequence.input_ids).long()[None]
        with torch.inference_mode():
            truth_NV = model(input_ids).logits[0, positions.token_of_N].float()
            student_NV = student(input_ids).logits[0, positions.token_of_N].float()
        ids_NM = asked_ids(student_NV, index)
        ladder.expect([index])
        difference = ladder.logits_at(positions, ids_NM) - truth_NV.gather(1, ids_NM)
        is_stored = (ids_NM.unsqueeze(2) == positions.token_ids_NK.unsqueeze(1)).any(2)
        worst["cached"] = max(worst["cached"], float(difference[is_stored].abs().max()))
        worst["other"] = max(worst["other"], float(difference[~is_stored].abs().max()))
        below = min(below, float(difference[~is_stored].min()))
        pairs, total = pairs + int((~is_stored).sum()), total + float(difference[~is_stored].sum())
    counts = {tier: count for tier, count in ladder.take_counts()[0].items() if count}
    line = f"{name:<15} max |difference| {worst['other']:.2e} nat, cached ids {worst['cached']:.2e}; {counts}"
    print(line + (f"; mean {total / pairs:.2f} above, lowest {below:.4f}" if name == "bound" else ""))


def asked_ids(student_NV: Tensor, seed: int) -> Tensor:
    """The student's highest ids and random ones. [N, 2 * ASKED]"""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(student_NV.shape[1], (len(student_NV), ASKED), generator=random)
    return torch.cat([exact_top_k(student_NV, ASKED)[1], ids], 1)


if __name__ == "__main__":
    main()
