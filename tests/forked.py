"""Runs ``pipeline`` in processes forked from one that has imported everything, for tests that need many.

``python -m tests.forked`` is that one. It reads JSON, line by line: to ``[arguments, environment, folder, moment]`` it
answers with the id of a process whose stdout and stderr are files in the folder; to an id with the exit status.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def start(
        self, *arguments: object, signalled: tuple[signal.Signals, str] | None = None, **environment: str
    ) -> Forked:
        """``pipeline ARGUMENTS`` with more variables in its environment.

        Args:
            signalled: the signal it sends itself, and when: at the first audit event of Python's that matches, written
                as the event and its arguments (``os.rename .*/model$``), before what the event announces.
        """
        folder = self._folder / str(self._count)
        folder.mkdir()
        self._count += 1
        pid = int(_ask(self._parent, [[str(argument) for argument in arguments], environment, str(folder), signalled]))
        return Forked(pid, folder, self._parent)

    def start_ranks(self, number: int, *arguments: object, **first: Any) -> list[Forked]:
        """So many processes of one run, as torchrun would start them.

        Args:
            first: what else ``start`` is told of the first rank.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        sizes = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
        return [
            self.start(
                *arguments, **(first if rank == 0 else {}), **ranks, **sizes, RANK=f"{rank}", LOCAL_RANK=f"{rank}"
            )
            for rank in range(number)
        ]


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
        arguments, environment, folder, signalled = question
        if arguments[0] == "distill":
            _import_what_trains()
        pid = os.fork()
        if pid:
            _answer(pid)
            continue
        os.environ.update(environment)
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
        sys.argv = ["pipeline", *arguments]
        if signalled:
            _send_at(*signalled)
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _import_what_trains() -> None:
    import torch._dynamo
    import torch.distributed.fsdp  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

    import pipeline.distill
    import pipeline.students  # noqa: F401

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with suppress(ImportError), redirect_stdout(sys.stderr):  # standard output is for answers
        import deepspeed  # noqa: F401


def _send_at(number: int, moment: str) -> None:
    """Send this process a signal, once."""
    is_moment, sent = re.compile(moment).fullmatch, False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal sent
        if (
            not sent
            and event.startswith(("open", "os.", "shutil."))
            and is_moment(" ".join(map(str, [event, *arguments])))
        ):
            sent = True
            os.kill(os.getpid(), number)

    sys.addaudithook(watch)


def _answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
