"""Progress bars on stderr with rate and time left. Where stderr is no terminal, a dump says a line a minute."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from workers.teacher.dump import Progress


_SECONDS_PER_LINE = 60.0


def say(text: str) -> None:
    """One line on stderr, beside results and bars."""
    sys.stderr.write(f"{text}\n")


@contextmanager
def progress_bar(label: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total)."""
    with _bars() if shown else nullcontext() as bars:
        if bars is None:
            yield lambda done, total: None
            return
        task = bars.add_task(label, total=None, rate="")

        def advance(done: int, total: int) -> None:
            speed = bars.tasks[task].speed
            bars.update(task, completed=done, total=total, rate=f"{speed:,.1f}/s" if speed else "")

        yield advance


@contextmanager
def dump_bar(label: str) -> Iterator[Callable[["Progress"], None]]:
    """The same for a dump: sequences and shards of all its workers, and this one's tokens a second."""
    started = time.monotonic()

    def pace(progress: "Progress") -> str:
        tokens = progress.tokens / max(time.monotonic() - started, 1e-9)
        return f"{progress.shards}/{progress.num_shards} shards {tokens:,.0f} tokens/s"

    with _bars() as bars:
        if bars is None:
            yield _lines(label, pace)
            return
        task = bars.add_task(label, total=None, rate="")
        yield lambda progress: bars.update(task, completed=progress.done, total=progress.total, rate=pace(progress))


def _lines(label: str, pace: Callable[["Progress"], str]) -> Callable[["Progress"], None]:
    """For the log of a job: a line now and then."""
    last = time.monotonic()

    def advance(progress: "Progress") -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_PER_LINE:
            last = time.monotonic()
            say(f"{label}: {progress.done:,} of {progress.total:,}, {pace(progress)}")

    return advance


@contextmanager
def _bars() -> Iterator["Bars | None"]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield bars
