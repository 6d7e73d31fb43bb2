"""Which sequences a step trains on: a pure function of (seed, step), so resuming needs no data-loader state."""

import numpy as np


def steps_per_epoch(num_sequences: int, sequences_per_step: int) -> int:
    """The last step of an epoch may be short."""
    return -(-num_sequences // sequences_per_step)


def step_indexes(step: int, *, num_sequences: int, sequences_per_step: int, seed: int) -> list[int]:
    """Indexes of the sequences of one step; each epoch is a fresh permutation of all of them."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_sequences, sequences_per_step))
    order = np.random.default_rng([seed, epoch]).permutation(num_sequences)
    first = step_in_epoch * sequences_per_step
    chosen: list[int] = order[first : first + sequences_per_step].tolist()
    return chosen
