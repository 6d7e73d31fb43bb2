"""One process of the stress test: asks about random sequences of a cache until it is killed or the file STOP appears.

``python -m tests.log_worker CACHE TEACHER TRUTH JOURNAL KIND SEED STOP``: every answer is compared with the dense
float32 logits in TRUTH; what was published is noted in JOURNAL afterwards. Exits 1 at the first wrong answer.
"""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from cache_schema import CacheReader
from cache_schema.lookup_writer import LookupWriter, lookups_dir
from cache_schema.lookups import LookupLog
from tests.tiny_cache import CPU, load_teacher
from workers.lookup.answers import AnswerLog
from workers.lookup.batch import collate
from workers.lookup.ladder import Ladder
from workers.lookup.live import LiveTeacher
from workers.lookup.states import TeacherStates

LONGEST_PAUSE = 0.3


def main(cache: str, model: str, truth: str, journal: str, kind: str, seed: str, stop: str) -> None:
    torch.set_num_threads(1)
    reader, dense_NV = CacheReader(cache), np.load(truth, mmap_mode="r")
    first_row = np.cumsum([0, *(reader[index].rows.num_positions for index in range(len(reader)))])
    teacher = load_teacher(Path(model), reader.plan)
    log_dir, choice = lookups_dir(reader), random.Random(seed)
    log, writer = LookupLog(reader, [log_dir]), LookupWriter(log_dir, reader.manifest_sha256, "0" * 64)
    states = TeacherStates(
        reader,
        teacher.lm_head,
        log=log,
        live=LiveTeacher(reader, teacher),
        writer=writer if kind == "hidden" else None,
        whole_steps=kind == "hidden",
    )
    ladder = Ladder(states, answers=AnswerLog(reader, log, writer if kind == "logits" else None, 0))
    with Path(journal).open("a") as notes:
        while not Path(stop).exists():
            indexes = choice.sample(range(len(reader)), 3)
            positions = collate(reader, indexes, ["response"], CPU).parts["response"]
            # Ids that depend on the sequence alone, so that another process's answers are of use.
            ids = np.concatenate([asked_ids(index, first_row, dense_NV.shape[1]) for index in indexes])
            truth_rows = np.concatenate([dense_NV[first_row[index] : first_row[index + 1]] for index in indexes])
            ladder.expect(indexes)
            answers = ladder.logits_at(positions, torch.from_numpy(ids)).numpy()
            expected = np.take_along_axis(truth_rows, ids, axis=1)
            difference = float(np.abs(answers - expected).max())
            counts, forwards = ladder.take_counts()
            if difference > reader.plan.logit_step / 2 + 1e-4:
                sys.exit(f"wrong answers for {indexes}: they differ by {difference}, {counts}")
            if forwards:  # published by now
                live = [index for index in indexes if (held := states.find([index])[0]) and held.tier == "live"]
                notes.write("".join(f"{kind} {index}\n" for index in live))
                notes.flush()
            notes.write(f"answered {counts['live']} {counts['logged']}\n")
            time.sleep(choice.uniform(0, LONGEST_PAUSE))
    writer.close()


def asked_ids(index: int, first_row: np.ndarray, vocab_size: int) -> np.ndarray:
    """Eight ids at each position of a sequence. [P, 8]"""
    num_positions = int(first_row[index + 1] - first_row[index])
    return np.random.default_rng(index).integers(0, vocab_size, (num_positions, 8))


if __name__ == "__main__":
    main(*sys.argv[1:])
