"""The command line: flags to configs, results to stdout, errors to one paragraph. Logic lives behind the commands.

torch and transformers are imported inside the commands, so that ``--help`` answers at once.
"""

import os
import sys
from typing import Annotated, NoReturn

import typer

from pipeline.cli_cache import compact, estimate, inspect, teacher_dump, verify
from pipeline.cli_student import distill, evaluate, losses
from pipeline.stopping import STOPPED

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run the teacher once, distill as many students as you like from disk.",
)


@app.callback()
def _launched(local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None) -> None:
    """Take what `deepspeed` puts before the command; it says the same in LOCAL_RANK."""


for command in (estimate, teacher_dump, inspect, verify, compact, losses, distill, evaluate):
    app.command()(command)


def main() -> None:
    """Entry point: expected errors become one paragraph on stderr and exit code 1."""
    try:
        _run_command()
    except SystemExit as stop:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _leave_at_once(stop.code)
        raise


def _leave_at_once(code: str | int | None) -> NoReturn:
    """Without the interpreter's last rites, in which threads of gloo or DeepSpeed have aborted ranks that were done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _run_command() -> None:
    try:
        app()
    except Exception as error:
        # Imported late: cache_schema brings pyarrow, which --help should not wait for.
        from cache_schema.errors import CacheError
        from workers.errors import InputError

        if not isinstance(error, CacheError | InputError):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code in STOPPED:
            typer.echo("interrupted; finished work is kept: run it again to go on (distill: with --resume)", err=True)
        raise
