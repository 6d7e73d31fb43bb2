"""Runs ``pipeline`` in processes forked from one that has imported everything, for tests that need many.

``python -m tests.forked`` is that one. It reads JSON, line by line: to ``[arguments, environment, folder]`` it answers
with the id of a process whose stdout and stderr are files in the folder; to an id with the exit status.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.command_line import Result

_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Forked:
    """A command at work; ``wait`` for it."""

    pid: int
    folder: Path
    parent: "subprocess.Popen[str]"

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Result:
        """Its exit code, negative when a signal ended it, and what it printed."""
        status = int(_ask(self.parent, self.pid))
        return Result(status, *((self.folder / name).read_text() for name in ("stdout", "stderr")))


class Forks:
    def __init__(self, parent: "subprocess.Popen[str]", folder: Path) -> None:
        self._parent, self._folder, self._count = parent, folder, 0

    def start(self, *arguments: object, **environment: str) -> Forked:
        """``pipeline ARGUMENTS`` with more variables in its environment."""
        folder = self._folder / str(self._count)
        folder.mkdir()
        self._count += 1
        pid = int(_ask(self._parent, [[str(argument) for argument in arguments], environment, str(folder)]))
        return Forked(pid, folder, self._parent)


@contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forked"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        yield Forks(parent, folder)
        assert parent.stdin
        parent.stdin.close()


def _ask(parent: "subprocess.Popen[str]", question: object) -> str:
    assert parent.stdin
    assert parent.stdout
    parent.stdin.write(json.dumps(question) + "\n")
    parent.stdin.flush()
    return parent.stdout.readline()


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.002)


def _serve() -> None:
    import pipeline.launch  # noqa: F401
    from pipeline.cli import main

    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, int):
            status = os.waitstatus_to_exitcode(os.waitpid(question, 0)[1])
            _answer(status)
            continue
        pid = os.fork()
        if pid:
            _answer(pid)
            continue
        arguments, environment, folder = question
        os.environ.update(environment)
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
        sys.argv = ["pipeline", *arguments]
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
