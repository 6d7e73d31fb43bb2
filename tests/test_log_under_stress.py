"""Eight processes share a cache and its lookup log, one is killed every few seconds, a compaction is always at work."""

import logging
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cache_schema import CacheReader
from cache_schema.compaction import compact
from cache_schema.lookup_writer import lookups_dir
from cache_schema.lookups import LookupLog
from tests.log_worker import asked_ids
from tests.tiny import tiny_tokenizer
from tests.tiny_cache import dump_tiny_cache, random_sequences
from tests.tiny_models import save_tiny_llama

SECONDS, WORKERS, SEQUENCES = 180, 8, 4000


def dense_logits(model_dir: Path, reader: CacheReader) -> np.ndarray:
    """What the teacher itself says at every stored position, each sequence alone. float32 [all positions, V]"""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    rows = []
    for scored in reader:
        with torch.inference_mode():
            logits = model(torch.tensor(scored.sequence.input_ids).long()[None]).logits[0]
        rows.append(logits[scored.sequence.target_rows("response")].numpy())
    return np.concatenate(rows)


@pytest.mark.slow
def test_no_answer_is_lost_or_wrong_while_processes_are_killed_and_the_log_is_folded(tmp_path: Path) -> None:
    teacher = save_tiny_llama(tmp_path / "teacher", tiny_tokenizer(), layers=2)
    sequences = random_sequences(SEQUENCES)
    reader = dump_tiny_cache(tmp_path / "cache", teacher, sequences, hidden_states=False, sequences_per_shard=1000)
    truth = dense_logits(teacher, reader)
    np.save(tmp_path / "truth.npy", truth)
    chance, stop = random.Random(0), tmp_path / "stop"
    journals: list[Path] = []

    def start(number: int) -> subprocess.Popen[bytes]:
        journals.append(tmp_path / f"journal-{len(journals)}")
        command = [
            sys.executable, "-m", "tests.log_worker", reader.cache_dir, teacher, tmp_path / "truth.npy", journals[-1],
            "hidden" if number % 2 else "logits", len(journals), stop,
        ]  # fmt: skip
        return subprocess.Popen([str(part) for part in command])

    def start_compaction() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "pipeline", "compact", str(reader.cache_dir)], stdout=-3)

    workers = [start(number) for number in range(WORKERS)]
    while not all(journal.exists() and journal.stat().st_size for journal in journals):
        time.sleep(0.1)
        assert all(worker.poll() is None for worker in workers)
    compaction, kills, folds = start_compaction(), 0, 0
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        time.sleep(chance.uniform(2, 5))
        # A compaction is killed more rarely: it must now and then come to its end.
        number = WORKERS if chance.random() < 0.05 else chance.randrange(WORKERS)
        victim = compaction if number == WORKERS else workers[number]
        if victim.poll() is None:
            victim.send_signal(signal.SIGKILL)
            kills += 1
            assert victim.wait() == -signal.SIGKILL
            if number < WORKERS:
                workers[number] = start(number)
        if compaction.poll() is not None:
            assert compaction.returncode in (0, -signal.SIGKILL)
            folds += compaction.returncode == 0
            compaction = start_compaction()
        assert all(worker.poll() in (None, 0) for worker in workers)
    stop.touch()
    assert [worker.wait() for worker in workers] == [0] * WORKERS
    assert compaction.wait() == 0
    compact(reader, lookups_dir(reader))

    notes = [line.split() for path in journals if path.exists() for line in path.read_text().splitlines()]
    published = {kind: {int(words[1]) for words in notes if words[0] == kind} for kind in ("hidden", "logits")}
    log = LookupLog(reader, [lookups_dir(reader)])
    head = AutoModelForCausalLM.from_pretrained(teacher).lm_head.weight.detach().numpy()
    first_row = np.cumsum([0, *(scored.rows.num_positions for scored in reader)])
    for index in published["hidden"]:
        states = log.hidden_states(index)
        assert states is not None
        np.testing.assert_allclose(states @ head.T, truth[first_row[index] : first_row[index + 1]], atol=1e-4)
    for index in published["logits"]:
        logged = log.logits(index)
        assert logged is not None
        positions = np.repeat(np.arange(len(logged.counts)), logged.counts) + first_row[index]
        np.testing.assert_allclose(logged.logits, truth[positions, logged.token_ids], atol=1e-4)
        stored = reader[index].rows.token_ids
        for place, ids in enumerate(asked_ids(index, first_row, truth.shape[1])):
            ends = np.cumsum(logged.counts)
            known = {*logged.token_ids[ends[place] - logged.counts[place] : ends[place]], *stored[place]}
            assert known.issuperset(ids)
    answered = Counter()
    for words in notes:
        if words[0] == "answered":
            answered += Counter({"live": int(words[1]), "logged": int(words[2])})
    logging.getLogger(__name__).info(
        "%d kills, %d compactions; %d sequences published as states, %d as answers; pairs %s",
        kills, folds, len(published["hidden"]), len(published["logits"]), dict(answered),
    )  # fmt: skip
    assert min(kills, *map(len, published.values()), *answered.values()) > 10
    assert folds > 2
    leftovers = [path for path in lookups_dir(reader).rglob("*") if path.name.startswith(".")]
    assert leftovers == []
