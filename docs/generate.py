"""Writes reference/cli.md and reference/config.md from the program itself: its help, its configs, its losses.

`make docs` runs it, and a test fails while the pages differ from what it would write.
"""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_command

from pipeline.cli import app
from pipeline.losses import facts_of_losses, range_in_words
from workers.distill.config import DistillConfig
from workers.distill.loss_config import LossConfig
from workers.losses.catalogue import LOSSES
from workers.teacher.config import DumpConfig

REFERENCE = Path(__file__).parent / "reference"
WIDTH = 100
"""Columns of the help texts, whatever terminal this runs in."""

COMMANDS = get_command(app)

CLI_INTRODUCTION = """\
# Command line

<!-- Written by docs/generate.py from the help of every command; `make docs` writes it again. -->

Results go to stdout, progress to stderr. `--json` prints one JSON object. Exit codes: 0 done, or a `distill` that
SIGTERM stopped at a checkpoint; 1 an expected error, said in one `error:` paragraph, or damage that `verify` found;
2 wrong usage.

`teacher-dump` and `distill` take any of the [config keys](config.md). A flag beats `--set`, and `--set` beats the file
of `--config`.
"""

CONFIG_INTRODUCTION = """\
# Configuration

<!-- Written by docs/generate.py from the config classes and the loss catalogue; `make docs` writes it again. -->

Every key can stand in the TOML file given by `--config`, or be set alone by `--set key=value`. A value after `--set` is
read as TOML, and as a string where it is no TOML. A flag beats `--set`, and `--set` beats the file. Unknown keys are
refused, and all mistakes are reported at once. TOML has no null: to leave a key unset, leave it out.

The [command line](cli.md) lists the flags. The [losses](#losses) stand at the end of this page.
"""


@dataclass(frozen=True)
class ConfigOf:
    command: str
    model: type[BaseModel]
    example: str


CONFIGS = (
    ConfigOf(
        "teacher-dump",
        DumpConfig,
        """\
[teacher]
model = "models/teacher"

[data]
path = "data/train.jsonl"
max_tokens = 512

[cache]
top_k = 64
""",
    ),
    ConfigOf(
        "distill",
        DistillConfig,
        """\
cache = "caches/train"
student = "models/student"
epochs = 3

[loss]
name = "bild"
k = 8

[optimizer]
lr = 1e-4
""",
    ),
)


def cli_page() -> str:
    """`pipeline --help` and that of every command, in the order they are listed."""
    top = COMMANDS.context_class(COMMANDS, info_name="pipeline", terminal_width=WIDTH)
    sections = [CLI_INTRODUCTION, f"## pipeline\n\n```\n{COMMANDS.get_help(top)}\n```\n"]
    for name, command in COMMANDS.commands.items():
        context = command.context_class(command, info_name=name, parent=top, terminal_width=WIDTH)
        sections.append(f"## pipeline {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(sections)


def config_page() -> str:
    """Keys of each config, section by section, then the losses."""
    sections = [CONFIG_INTRODUCTION]
    for config in CONFIGS:
        flags = _flags(config.command)
        sections.append(
            f"## {config.command}\n\nFor example, in the file of `pipeline {config.command} --config`:\n\n"
            f"```toml\n{config.example}```\n"
        )
        sections += _tables(config.model, flags)
    return "\n".join([*sections, *_losses()])


# ---- keys ----


@dataclass(frozen=True)
class Flag:
    spelling: str
    help: str


def _flags(command: str) -> dict[str, Flag]:
    """Config key to the flag that sets it, read off the ``flags`` of the command's function.

    Its help without the default, which has a column of its own, is the key's meaning where the field has no docstring.
    """
    function = COMMANDS.commands[command].callback
    options = {option.name: option for option in COMMANDS.commands[command].params}
    found = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "flags":
            for key, value in ast.literal_eval(_with_names_as_strings(node.value)).items():
                option = options[value]
                spelling = "/".join([*option.opts, *option.secondary_opts])
                found[key] = Flag(spelling, re.sub(r" \[default: [^]]*\]| \(default\)", "", option.help))
    return found


def _with_names_as_strings(node: ast.expr) -> ast.expr:
    """``{"steps": steps, "layers": _layers(layers)}`` with the argument's name in place of its value."""

    class Names(ast.NodeTransformer):
        def visit_Call(self, call: ast.Call) -> ast.expr:
            return self.visit(call.args[0])

        def visit_Name(self, name: ast.Name) -> ast.expr:
            return ast.Constant(name.id)

    return Names().visit(node)


def _tables(model: type[BaseModel], flags: dict[str, Flag]) -> Iterator[str]:
    """The model's own keys, then each of its sections under a heading of its own."""
    docs = _field_docs(model)
    plain = [(key, field) for key, field in model.model_fields.items() if _section(field) is None]
    if plain:
        yield _table(model, "", dict(plain), flags)
    described: set[type[BaseModel]] = set()
    for key, field in model.model_fields.items():
        section = _section(field)
        if section is None:
            continue
        of_class = "" if section.__doc__ == BaseModel.__doc__ else inspect.cleandoc(section.__doc__ or "")
        said = [_as_written(of_class) if of_class and section not in described else docs.get(key)]
        described.add(section)
        if field.default is None and section is not LossConfig:
            said.append("Off without this section; with it, these are the defaults.")
        heading = f"[[{key}]]" if _is_list(field) else f"[{key}]"
        is_first = section is LossConfig and field.default is not None
        rows = _table(section, f"{key}.", section.model_fields, flags, name_needed=not is_first)
        yield "\n\n".join([f"### `{heading}`", *filter(None, said), rows])


def _table(
    model: type[BaseModel], prefix: str, fields: dict[str, FieldInfo], flags: dict[str, Flag], name_needed: bool = False
) -> str:
    header = ["| key | type | default | flag | meaning |", "|---|---|---|---|---|"]
    return "\n".join([*header, *_rows(model, prefix, fields, flags, name_needed)]) + "\n"


def _rows(
    model: type[BaseModel], prefix: str, fields: dict[str, FieldInfo], flags: dict[str, Flag], name_needed: bool
) -> Iterator[str]:
    """Of a section, those of the sections in it among them.

    Args:
        name_needed: whether the name of a loss must be given where the loss is.
    """
    docs = _field_docs(model)
    for name, field in fields.items():
        key, inner = prefix + name, _section(field)
        if inner is not None:
            if name in docs:
                yield f"| `{key}` | table, or the name of a loss | {_default(field)} | | {_cell(docs[name])} |"
            yield from _rows(inner, f"{key}.", inner.model_fields, flags, name_needed)
            continue
        flag = flags.get(key)
        default = "required" if name_needed and model is LossConfig else _default(field)
        meaning = docs.get(name) or (flag.help if flag else "")
        cells = [
            f"`{key}`", _type(field.annotation, field.metadata), default, f"`{flag.spelling}`" if flag else "", meaning,
        ]  # fmt: skip
        yield f"| {' | '.join(_cell(cell) for cell in cells)} |"
    if model.model_config.get("extra") == "allow":
        yield f"| `{prefix}…` | | | | a parameter of the loss, see [Losses](#losses) |"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model a field holds, one or several, if it holds any."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            return kind
    return None


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The string under each field: Python drops it, the source has it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0].body
    docs = {}
    for field, under in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(under, ast.Expr) and isinstance(under.value, ast.Constant):
            docs[ast.unparse(field.target)] = _as_written(" ".join(inspect.cleandoc(under.value.value).split()))
    return docs


def _as_written(docstring: str) -> str:
    """On the page a key is unset where in Python its field is None."""
    begins = re.sub(r"(^|\. )None\b", r"\1Unset", docstring)
    return re.sub(r"\bNone\b", "unset", begins).replace("``", "`")


def _type(annotation: Any, metadata: list[Any] | None = None) -> str:
    """In TOML's words, with the bounds a value must keep."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        bounds = [bound for item in extra for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _type(inner, bounds)
    bounds = "".join(
        f", {sign} {getattr(bound, name):g}"
        for bound in metadata or []
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if hasattr(bound, name)
    )
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type(inner) for inner in get_args(annotation) if inner is not NoneType) + bounds
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(annotation)) + bounds
    if get_origin(annotation) is tuple:
        inner = [_type(item) for item in get_args(annotation) if item is not Ellipsis]
        return (f"list of {inner[0]}" if get_args(annotation)[-1] is Ellipsis else f"pair of {inner[0]}") + bounds
    if get_origin(annotation) is dict:
        return f"table of {_type(get_args(annotation)[1])}" + bounds
    return {int: "integer", float: "float", bool: "boolean", str: "string"}[annotation] + bounds


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "unset" if field.default is None else f"`{_toml(field.default)}`"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# ---- losses ----


def _losses() -> Iterator[str]:
    yield (
        "## Losses\n\n"
        "`loss.name` and `prompt_loss.name` choose one, or a sum: `bild+0.5*sft`. A parameter stands beside the name "
        "(`loss.k`), or, where several losses of a sum have it, in its loss's table (`loss.bild.k`). What a loss needs "
        "of the teacher decides what the cache must hold: `top_k` is in every cache but one of draws, `logsumexp` at "
        "the temperatures of its plan; `lookups` (the teacher's logits at the student's own leading ids) and "
        "`full_row` (its logits at every id) take stored hidden states or `teacher`; `samples` a cache of `--sampling "
        "random`. [Losses](../explanation/losses.md) says how to choose, [lookups](../explanation/lookups.md) what "
        "answers them. `pipeline losses` prints this list.\n"
    )
    lines = ["| name | needs | source | reason |", "|---|---|---|---|"]
    for loss in LOSSES.values():
        needs = ", ".join(f"`{need}`" for need in sorted(loss.needs)) or "nothing"
        lines.append(f"| `{loss.name}` | {needs} | {_cell(loss.source)} | {_cell(loss.reason)} |")
    yield "\n".join(lines) + "\n"
    lines = ["| loss | parameter | default | range | meaning |", "|---|---|---|---|---|"]
    for facts in facts_of_losses(None):
        for name, parameter in facts["parameters"].items():
            default = "unset" if parameter["default"] is None else f"`{_toml(parameter['default'])}`"
            allowed = range_in_words(parameter).removeprefix("; ").removeprefix("one of ")
            lines.append(f"| `{facts['name']}` | `{name}` | {default} | {allowed} | {_cell(parameter['meaning'])} |")
    yield "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {"cli.md": cli_page, "config.md": config_page}


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
