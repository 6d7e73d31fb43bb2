"""Signals end a command tidily: SIGTERM, with which Slurm and Kubernetes end a job, SIGHUP of a closed terminal."""

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

TERMINATED = 128 + signal.SIGTERM
STOPPED = frozenset({128 + signal.SIGINT, TERMINATED, 128 + signal.SIGHUP})
"""Exit codes of a command that a signal ended."""
_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def tidy_on_signals() -> Iterator[None]:
    """Turn the first SIGTERM or SIGHUP into SystemExit, so that what is open is closed; a second is ignored meanwhile.

    One that is ignored already, SIGHUP under ``nohup``, stays so.
    """
    heeded = {number: signal.getsignal(number) for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN}

    def leave(number: int, frame: FrameType | None) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)
        _let_go_of_closed_terminals()
        raise SystemExit(128 + number)

    try:
        for number in heeded:
            signal.signal(number, leave)
        yield
    finally:
        for number, before in heeded.items():
            signal.signal(number, before)


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Yield whether a SIGTERM has come, for what ends at a moment of its own choosing.

    More of them change nothing: a launcher sends its own to processes that a job's end has reached already. SIGINT ends
    it at once.
    """
    before = signal.getsignal(signal.SIGTERM)
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP wait until what is done in here is done, where it must be whole."""
    came: list[int] = []
    heeded = {
        number: handler
        for number in (signal.SIGINT, *_ENDING)
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    try:
        for number in heeded:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def sigterm_handler_kept() -> Iterator[None]:
    """Put the SIGTERM handler back that what is called in here replaces by one of ``sys.exit(SIGTERM)``."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
    except SystemExit as stop:
        if stop.code == signal.SIGTERM:
            raise SystemExit(TERMINATED) from None
        raise


def _let_go_of_closed_terminals() -> None:
    """A word more to a closed terminal would be an error in the midst of tidying up."""
    for stream in (1, 2):
        poll = select.poll()
        poll.register(stream)
        if any(event & select.POLLHUP for _, event in poll.poll(0)):
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream)
