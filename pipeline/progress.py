"""Progress bars on stderr with rate and time left; silent where stderr is no terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from workers.teacher.dump import Progress


def say(text: str) -> None:
    """One line on stderr, beside results and bars."""
    sys.stderr.write(f"{text}\n")


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total)."""
    with _bars() as bars:
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
    with _bars() as bars:
        if bars is None:
            yield lambda progress: None
            return
        task = bars.add_task(label, total=None, rate="")

        def advance(progress: "Progress") -> None:
            pace = progress.tokens / max(time.monotonic() - started, 1e-9)
            shown = f"{progress.shards}/{progress.num_shards} shards {pace:,.0f} tokens/s"
            bars.update(task, completed=progress.done, total=progress.total, rate=shown)

        yield advance


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
