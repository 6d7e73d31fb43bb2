"""SIGTERM, with which Slurm and Kubernetes end a job, ends a command like Ctrl-C: tidily."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 128 + signal.SIGTERM
"""Exit code."""


@contextmanager
def tidy_on_sigterm() -> Iterator[None]:
    """Turn the first SIGTERM into SystemExit, so that what is open is closed; a second one is ignored meanwhile."""

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
