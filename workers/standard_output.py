"""Standard output is for a command's result; what a library prints there belongs elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    with redirect_stdout(sys.stderr):
        yield
