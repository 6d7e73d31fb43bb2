"""Merges a TOML file, ``--set`` and flags into one validated config: a flag beats ``--set`` beats the file."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from workers.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


def build_config(
    model: type[Model],
    file: Path | None,
    settings: Sequence[str],
    flags: Mapping[str, Any],
    *,
    exclusive: str | None = None,
) -> Model:
    """Validate the merged keys, reporting every mistake at once.

    Args:
        settings: ``key=value`` with dotted keys; the value is TOML, or a string where it is no TOML.
        flags: dotted keys to values; None means the flag was not given.
        exclusive: a section whose keys are of its ``name`` alone: the file's goes where a flag names another.

    Raises:
        InputError: the file cannot be read, a setting has no ``=``, or keys or values are wrong.
    """
    values = _read_toml(file) if file else {}
    if exclusive is not None:
        there, named = values.get(exclusive), flags.get(f"{exclusive}.name")
        if isinstance(there, dict) and named is not None and there.get("name", named) != named:
            del values[exclusive]
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise InputError(f"--set {setting}: write key=value, for instance --set optimizer.lr=1e-4.")
        _assign(values, key.strip(), _parse(text.strip()))
    for key, value in flags.items():
        if value is not None:
            _assign(values, key, value)
    empty = list(_empty_keys(values))
    if empty:
        raise InputError(f"{', '.join(empty)}: the value is empty; give one, or leave it out.")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(error)) from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {file} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file} is not TOML: {error}.") from None


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    *sections, key = dotted_key.split(".")
    for section in sections:
        inner = values.get(section)
        # `loss = "kl"` in the file is short for `loss = {name = "kl"}`; a parameter beside it keeps the name.
        values[section] = dict(inner) if isinstance(inner, dict) else {"name": inner} if inner is not None else {}
        values = values[section]
    values[key] = value


def _empty_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of empty strings: a shell's unset variable, which would else pass for a path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _empty_keys(value, f"{prefix}{key}.")
        elif value == "" or (isinstance(value, list | tuple) and "" in value):
            yield f"{prefix}{key}"


def _explain(error: ValidationError) -> str:
    lines = []
    for mistake in error.errors():
        key = ".".join(str(part) for part in mistake["loc"])
        message = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            message = "no such key; `--help` and docs/reference/config.md list the keys"
        elif mistake["type"] == "missing":
            message = "it must be given"
        elif key and mistake["type"] != "value_error":
            message = f"{message}, not {mistake['input']!r}"
        lines.append(f"{key}: {message}" if key else message)
    return "; ".join(lines) + "."
