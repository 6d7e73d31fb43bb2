"""``README.md`` of a student: what it was made of and how, for people and for the Hugging Face hub.

A card names no folder of the machine it was written on: of a path the last component alone, and of a model its hub name
where it has one. What is not known is left out.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_schema.plan import Plan
from cache_schema.reader import CacheReader
from cache_schema.storage import publish_text

CARD_NAME = "README.md"
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_NOT_RECIPE = {
    "cache", "weights", "student", "student_layers", "loss", "prompt_loss", "teacher", "on_miss", "lookups", "device",
    "eval_cache", "eval_every", "checkpoint_every", "keep_checkpoints", "trackers", "tracker_project", "epochs",
    "steps",
}  # fmt: skip


def model_card(
    config: Mapping[str, Any],
    made_of: Mapping[str, Any],
    readers: Sequence[CacheReader],
    summary: Mapping[str, Any],
    model_config: Mapping[str, Any],
) -> str:
    """The card of a finished run.

    Args:
        config: the ``DistillConfig`` as JSON has it.
        made_of: what ``run.json`` says beside it: hashes, loss parameters, device, versions.
        readers: the caches trained from, in the config's order.
        summary: what the run came to; ``eval_before`` and ``eval`` may be None.
        model_config: the saved model's ``config.json``.
    """
    plans = [reader.plan for reader in readers]
    base_model = hub_name(config["student"])
    name = Path(summary["run"]).name
    sections = [
        _front_matter(base_model, plans),
        f"# {name}",
        _opening(config, plans, base_model),
        _section("Teacher", _table(_teacher_rows(plans))),
        _section("Caches" if len(readers) > 1 else "Cache", *(_table(rows) for rows in _cache_rows(config, readers))),
        _section("Student", _table(_student_rows(config, made_of, base_model, model_config))),
        _section("Loss", _table(_loss_rows(config, made_of))),
        _section("Recipe", _table(_recipe_rows(config, made_of, summary))),
        _section("Results", _results(summary)),
        _section("Work", _table(_work_rows(summary))),
        _section("Versions", _table(list(made_of.get("versions", {}).items()))),
        _section("Use", _USE.format(name=name)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_model_card(
    model_dir: Path,
    config: Mapping[str, Any],
    made_of: Mapping[str, Any],
    readers: Sequence[CacheReader],
    summary: Mapping[str, Any],
) -> None:
    """Put the card into a saved model that has none yet.

    Raises:
        StorageError: the disk refused.
    """
    path = model_dir / CARD_NAME
    if not path.exists():
        model_config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        publish_text(path, model_card(config, made_of, readers, summary, model_config))


_USE = """\
It is a plain transformers model with its tokenizer; `{name}` is this folder, or its name on the hub.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
```"""


def hub_name(model: str) -> str | None:
    """``owner/name`` of a model: as it was given, or as the folder's config or the hub's own cache names it."""
    folder = Path(model)
    if not folder.exists():
        return model if _HUB_NAME.fullmatch(model) else None
    snapshot = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{folder.resolve()}/")
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}"
    path = folder / "config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("_name_or_path") if path.exists() else None
    is_one = isinstance(named, str) and "/" in named and _HUB_NAME.fullmatch(named) and not Path(named).exists()
    return named if is_one else None


def _front_matter(base_model: str | None, plans: Sequence[Plan]) -> str:
    """The YAML that the hub reads; JSON's strings and lists are YAML's."""
    datasets = [
        name for name in dict.fromkeys(plan.dataset.name for plan in plans) if "/" in name and _HUB_NAME.fullmatch(name)
    ]
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base_model} if base_model else {}),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["distillation", "knowledge-distillation", "logit-cache"],
    }
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"])


def _opening(config: Mapping[str, Any], plans: Sequence[Plan], base_model: str | None) -> str:
    teachers = " and ".join(dict.fromkeys(plan.teacher.name for plan in plans))
    layers = config.get("student_layers")
    student = f"{len(layers)} layers of {base_model or _last(config['student'])}" if layers else None
    return f"{student or base_model or _last(config['student'])}, distilled from {teachers}."


def _teacher_rows(plans: Sequence[Plan]) -> list[tuple[str, Any]]:
    teachers = {plan.teacher.fingerprint: plan.teacher for plan in plans}
    return [
        row
        for teacher in teachers.values()
        for row in (
            ("name", teacher.name),
            ("fingerprint", teacher.fingerprint),
            ("architecture", teacher.architecture),
            ("parameters", teacher.num_parameters),
            ("dtype", teacher.dtype),
        )
    ]


def _cache_rows(config: Mapping[str, Any], readers: Sequence[CacheReader]) -> Iterator[list[tuple[str, Any]]]:
    for place, reader in enumerate(readers):
        plan, hidden = reader.plan, reader.plan.hidden_states
        yield [
            ("name", _last(config["cache"][place])),
            ("manifest sha256", reader.manifest_sha256),
            ("share", config["weights"][place] if config.get("weights") else None),
            ("data set", plan.dataset.name),
            ("data set sha256", plan.dataset.sha256),
            ("responses", _responses(plan)),
            ("sequences", len(reader)),
            ("positions", f"{reader.manifest.num_positions} ({plan.positions})"),
            ("top-k", plan.top_k or None),
            ("draws a position", plan.sampling.draws if plan.sampling else None),
            ("logit step", plan.logit_step or None),
            (
                "hidden states",
                f"{hidden.dtype}, width {hidden.size}" if hidden and reader.has_hidden_states else "none",
            ),
            ("engine", f"{plan.engine.name}, {plan.engine.device}"),
        ]


def _responses(plan: Plan) -> str:
    if plan.responses is None:
        return "the data set's own"
    written = plan.responses
    return f"the teacher's, temperature {written.temperature:g}, top-p {written.top_p:g}, seed {written.seed}"


def _student_rows(
    config: Mapping[str, Any], made_of: Mapping[str, Any], base_model: str | None, model_config: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    return [
        ("made of", base_model or _last(config["student"])),
        ("fingerprint of that", made_of.get("student_fingerprint")),
        ("layers kept", _joined(config.get("student_layers"))),
        ("architecture", _joined(model_config.get("architectures"))),
        ("layers", model_config.get("num_hidden_layers")),
        ("width", model_config.get("hidden_size")),
        ("vocabulary", model_config.get("vocab_size")),
    ]


def _loss_rows(config: Mapping[str, Any], made_of: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each part's loss by name, and every parameter it ran with, defaults included."""
    rows: list[tuple[str, Any]] = []
    names = [config[key]["name"] for key in ("loss", "prompt_loss") if config.get(key)]
    parts = made_of.get("loss_parameters", {})
    for place, (part, parameters) in enumerate(parts.items()):
        rows.append((part, names[place] if place < len(names) else None))
        rows += [(f"{part}: {key}", value) for key, value in _leaves(parameters)]
    return rows


def _recipe_rows(
    config: Mapping[str, Any], made_of: Mapping[str, Any], summary: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """What was done, then what the config says of how."""
    rest = {key: value for key, value in config.items() if key not in _NOT_RECIPE}
    turns = summary.get("engines", [])
    if all(turn["engine"] != "deepspeed" for turn in turns):
        rest["engine"] = None  # it stands among the turns, and the rest is DeepSpeed's
    return [
        ("steps", summary.get("steps")),
        ("epochs", summary.get("epochs")),
        ("device", made_of.get("device")),
        ("engine", "; ".join(_turn_in_words(turn) for turn in turns)),
        ("stopped early", "yes" if summary.get("stopped_early") else None),
        *_leaves(rest),
    ]


def _turn_in_words(turn: Mapping[str, Any]) -> str:
    since = f" from step {turn['first_step']} on" if turn["first_step"] > 1 else ""
    return f"{turn['engine']} on {turn['ranks']} rank{'s' if turn['ranks'] > 1 else ''}{since}"


def _results(summary: Mapping[str, Any]) -> str:
    """The held-out evaluation before the first step and after the last; empty without one."""
    before, after = _measured(summary.get("eval_before")), _measured(summary.get("eval"))
    if not after:
        return ""
    lines = ["| held-out | before | after |", "| --- | --- | --- |"]
    for name in dict.fromkeys([*before, *after]):
        lines.append(f"| {name} | {_number(before.get(name))} | {_number(after.get(name))} |")
    positions = summary["eval"].get("positions")
    over = f"Over {positions} held-out positions" if positions else "Held out"
    over = f"{over}, computed in {summary['eval'].get('dtype', 'float32')}: the"
    kinds = f"{over} share of the teacher's k likeliest tokens among the student's, KL(teacher ‖ student) and the loss "
    return "\n".join([f"{kinds}of the data's own tokens, in nats.", "", *lines])


def _measured(evaluation: Mapping[str, Any] | None) -> dict[str, float]:
    if evaluation is None:
        return {}
    named = {f"overlap@{k}": value for k, value in evaluation.get("overlap", {}).items()}
    named |= {"KL": evaluation.get("kl"), "loss": evaluation.get("loss")}
    return {name: value for name, value in named.items() if value is not None}


def _work_rows(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    lookups = summary.get("lookups") or {}
    return [
        ("positions trained", summary.get("positions")),
        ("first and last training loss", _pair(summary.get("first_loss"), summary.get("loss"))),
        ("teacher forwards", summary.get("teacher_forwards")),
        *((f"lookups, {tier}", number) for tier, number in lookups.items() if sum(lookups.values())),
        ("seconds of steps", _number(summary.get("seconds"))),
    ]


def _pair(first: float | None, last: float | None) -> str | None:
    return None if first is None or last is None else f"{_number(first)}, {_number(last)}"


def _section(title: str, *parts: str) -> str:
    """Empty when it would hold nothing."""
    return "\n\n".join([f"## {title}", *parts]) if any(parts) else ""


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    known = [(name, value) for name, value in rows if value is not None and value != ""]
    if not known:
        return ""
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in known]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: Any) -> str:
    text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str:
    """A measured number; empty when it is not known."""
    return "" if value is None else f"{value:.4g}"


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted names; no paths among them but by their last component."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", _last(value)
        else:
            yield f"{prefix}{key}", _joined(value)


def _joined(value: Any) -> Any:
    """A list in words; empty is not known."""
    if isinstance(value, list | tuple):
        return ", ".join(str(_last(item) if isinstance(item, str) else item) for item in value) or None
    return value


def _last(path: str) -> str:
    """Last component of a path or an address."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
