"""Options that several commands share, and what turns their text into values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with any of the keys.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One key, for instance --set optimizer.lr=1e-4.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; by default an accelerator if there is one.")]
LogAt = Annotated[
    str | None, typer.Option("--lookups", help="The lookup log in this directory, not the one in the cache.")
]
CacheAt = Annotated[str, typer.Argument(metavar="CACHE", help="A cache directory, or its URI.", show_default=False)]


def show(result: dict[str, Any], as_json: bool, words: Callable[[], str]) -> None:
    """A result on stdout, as one JSON object or in words."""
    typer.echo(json.dumps(result) if as_json else words())


def required(value: Path | None, flag: str, what: str) -> Path:
    """The value of an option that has no default.

    Raises:
        BadParameter: it was not given.
    """
    if value is None:
        raise typer.BadParameter(f"give {what}", param_hint=flag)
    return value


def log_at(text: str | None) -> Path | None:
    """The directory of ``--lookups``.

    Raises:
        InputError: it is empty, or a URI.
    """
    from workers.errors import InputError
    from workers.lookup.config import local_directory

    try:
        return None if text is None else Path(local_directory(text))
    except ValueError as error:
        raise InputError(f"{error}.") from None


def weights_of(text: str | None) -> tuple[float, ...] | None:
    """``2,1`` as numbers."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers", param_hint="--weights") from None


def layers_of(text: str | None) -> tuple[int, ...] | None:
    """``0,3,6`` as layer indexes."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of layer indexes", param_hint="--student-layers") from None


def layers_with(student: str | None, text: str | None) -> tuple[int, ...] | None:
    """The same for an option that means nothing without ``--student``."""
    if text is not None and student is None:
        raise typer.BadParameter("give --student too", param_hint="--student-layers")
    return layers_of(text)
