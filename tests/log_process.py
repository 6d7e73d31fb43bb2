"""A process that lives with others on one lookup log: ``python -m tests.log_process ROLE CACHE LOG STOP SEED``.

What is logged of a sequence follows from its index, so that every process knows what every other wrote.
"""

import sys
from pathlib import Path

import numpy as np

from cache_schema.compaction import compact
from cache_schema.errors import StorageError
from cache_schema.lookup_files import LoggedLogits
from cache_schema.lookup_writer import LookupWriter
from cache_schema.lookups import LookupLog
from cache_schema.reader import CacheReader

HIDDEN_SIZE = 5
ROUNDS = 8
"""Different sets of answers that are logged of a sequence."""


def states_of(reader, index):
    shape = (reader[index].rows.num_positions, HIDDEN_SIZE)
    return np.random.default_rng(index).standard_normal(shape).astype(np.float32)


def pairs_of(reader, index, number=0):
    """Positions, ids (some of them twice) and the logits, which follow from both."""
    rng = np.random.default_rng([index, number])
    positions = rng.integers(0, reader[index].rows.num_positions, 12)
    token_ids = rng.integers(0, 30, 12)
    return positions, token_ids, logit_of(index, positions, token_ids)


def logit_of(index, positions, token_ids):
    return (index + 0.25 * positions - 0.5 * token_ids).astype(np.float32)


def answers_of(reader, index, number=0):
    return LoggedLogits.of_pairs(reader[index].rows.num_positions, *pairs_of(reader, index, number))


def row_of(reader, index, content):
    return index, reader[index].sequence.sequence_id, content


def pairs_in(logged):
    """As a dictionary from (position, id) to the logit."""
    positions = np.repeat(np.arange(len(logged.counts)), logged.counts)
    keys = list(zip(positions.tolist(), logged.token_ids.tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, logged.logits.tolist(), strict=True))


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def write_and_read(reader, log_dir, stop, rng):
    """Publish, say so on stdout, and read what whoever has published."""
    log, writer = LookupLog(reader, [log_dir]), LookupWriter(log_dir, reader.manifest_sha256, "f" * 64)
    while not stop.exists():
        indexes = np.sort(rng.choice(len(reader), 3, replace=False)).tolist()
        if rng.random() < 0.5:
            writer.write("hidden", [row_of(reader, index, states_of(reader, index)) for index in indexes])
            say("hidden", *indexes)
        else:
            number = int(rng.integers(ROUNDS))
            writer.write("logits", [row_of(reader, index, answers_of(reader, index, number)) for index in indexes])
            say("logits", number, *indexes)
        if rng.random() < 0.5:
            log.refresh()
        for index in rng.integers(0, len(reader), 10).tolist():
            states, answers = log.hidden_states(index), log.logits(index)
            assert states is None or np.array_equal(states, states_of(reader, index))
            for (position, token_id), logit in pairs_in(answers).items() if answers else ():
                assert logit == logit_of(index, np.array(position), np.array(token_id))
    writer.close()


def compact_again_and_again(reader, log_dir, stop):
    while not stop.exists():
        try:
            compact(reader, log_dir, sequences_per_file=16)
        except StorageError as error:
            assert "another process" in str(error)  # noqa: PT017, the other compaction
        say("compacted")


if __name__ == "__main__":
    role, cache_dir, log_dir, stop, seed = sys.argv[1], *map(Path, sys.argv[2:5]), int(sys.argv[5])
    if role == "writer":
        write_and_read(CacheReader(cache_dir), log_dir, stop, np.random.default_rng(seed))
    else:
        compact_again_and_again(CacheReader(cache_dir), log_dir, stop)
