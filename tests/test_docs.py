"""The pages in docs/ say what the program does."""

import hashlib
import re
import runpy
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel
from typer.main import get_command

from cache_schema import CacheReader, Manifest, Plan, Receipt
from cache_schema.encoding import SCALAR_COLUMNS, hidden_schema, logit_columns, shard_schema
from cache_schema.manifest import hidden_name, shard_name
from cache_schema.plan import FORMAT_VERSION, HiddenStates
from pipeline.cli import app
from tests.caches import make_plan
from tests.command_line import pipeline
from tests.conftest import dump
from workers.distill.config import DistillConfig
from workers.teacher.config import DumpConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FORMAT_PAGE = DOCS / "reference" / "cache-format.md"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("README.md")])
ON_A_GRID, AS_FLOATS = make_plan(), make_plan(logit_step=0.0)


def section(heading: str) -> str:
    """Text of a section of the format page, up to the next heading of its level."""
    text = FORMAT_PAGE.read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"cache-format.md has no section {heading}"
    return found[2]


def table(text: str) -> list[list[str]]:
    """Cells of all rows below the header of a section's tables, without backquotes."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("`") for cell in row] for row in rows]
    return [row for row, below in zip(cells, [*cells[1:], [""]], strict=True) if not {row[0], below[0]} & {"---"}]


def code(text: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def in_place(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CacheReader:
    """Make the cache the ``caches/train`` of the page's examples."""
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / "train").symlink_to(cache_dir)
    monkeypatch.chdir(tmp_path)
    return CacheReader(cache_dir)


# ---- generated pages ----


@pytest.mark.parametrize("page", ["cli.md", "config.md"])
@pytest.mark.parametrize("columns", ["40", "200"])
def test_generated_pages_are_what_the_program_says(page: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    pages = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]
    assert (DOCS / "reference" / page).read_text(encoding="utf-8") == pages[page](), "run `make docs`"


@pytest.mark.parametrize("model", [DumpConfig, DistillConfig], ids=["teacher-dump", "distill"])
def test_the_config_page_lists_every_key(model: type[BaseModel]) -> None:
    text = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    for key in keys_of(model):
        assert f"| `{key}` |" in text


def test_the_example_configs_are_valid() -> None:
    text = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```toml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for model, example in zip((DumpConfig, DistillConfig), examples, strict=True):
        model.model_validate(tomllib.loads(example))


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of a model's fields, those of the models inside it among them."""
    keys = []
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        keys += keys_of(inner[0], f"{prefix}{name}.") if inner else [prefix + name]
    return keys


# ---- the format page ----


def test_every_column_is_specified_and_every_specified_column_exists() -> None:
    shard = {name for plan in (ON_A_GRID, AS_FLOATS) for name in shard_schema(plan).names}
    assert {row[0] for row in table(section("Columns of shard-NNNNN.parquet").split("###")[0])} == shard
    hidden = table(section("Columns of shard-NNNNN.hidden.parquet"))
    assert [row[0] for row in hidden] == hidden_schema(HiddenStates(dtype="int8", size=4)).names
    assert [row[0] for row in hidden if "only with" not in row[-1]] == hidden_schema().names


def test_columns_have_the_parquet_types_specified(
    cache_dir: Path, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    exact = dump(
        teacher_dir, data_file, tmp_path / "exact", "--limit", "2", "--set", "cache.logit_step=0",
        "--hidden-dtype", "int8",
    )  # fmt: skip
    rows = table(section("Columns of shard-NNNNN.parquet")) + table(section("Columns of shard-NNNNN.hidden.parquet"))
    specified = {row[0]: row[1] for row in rows}
    for path in (folder / name for folder in (cache_dir, exact) for name in (shard_name(0), hidden_name(0))):
        schema = pq.read_metadata(path).schema
        for column in (schema.column(index) for index in range(len(schema))):
            kind = column.physical_type
            if ".list.element" in column.path:
                kind = f"LIST of {kind}"
            elif kind == "FIXED_LEN_BYTE_ARRAY":
                kind = f"{kind}({column.length})"
            elif column.logical_type.type == "STRING":
                kind = f"{kind} (String)"
            assert specified[column.path.split(".")[0]] == kind


def test_lists_have_the_lengths_specified(cache_dir: Path) -> None:
    reader = CacheReader(cache_dir)
    row = pq.read_table(cache_dir / shard_name(0)).slice(0, 1).to_pylist()[0]
    plan = reader.plan
    sizes = {
        "T": reader[0].sequence.num_tokens, "P": reader[0].rows.num_positions, "K": plan.top_k,
        "K - 1": plan.top_k - 1, "R": len(plan.temperatures),
    }  # fmt: skip
    for name, _, shape, *_ in table(section("Columns of shard-NNNNN.parquet").split("###")[0]):
        if shape and name in row:
            assert len(row[name]) == np.prod([sizes[size] for size in shape.strip("[]").split(", ")]), name


def test_a_sequence_id_is_the_hash_specified(cache_dir: Path) -> None:
    row = pq.read_table(cache_dir / shard_name(0)).slice(0, 1).to_pylist()[0]
    ids = b"".join(token.to_bytes(4, "little") for token in row["input_ids"])
    bits = "".join("01"[trained] for trained in row["loss_mask"])
    mask = bytes(int(bits[first : first + 8].ljust(8, "0"), 2) for first in range(0, len(bits), 8))
    assert hashlib.blake2b(ids + mask, digest_size=16).digest() == row["sequence_id"]


@pytest.mark.parametrize(
    ("heading", "model"), [("plan.json", Plan), ("Receipts and manifest", Receipt), ("Receipts and manifest", Manifest)]
)
def test_every_field_of_the_documents_is_specified(heading: str, model: type[BaseModel]) -> None:
    specified = {row[0] for row in table(section(heading))}
    if model is Plan:
        assert specified == {*keys_of(Plan), "responses", "hidden_states", "sampling"}
    else:
        assert set(model.model_fields) <= specified
        assert specified == {*Receipt.model_fields, *Manifest.model_fields}


def test_every_file_of_a_cache_is_specified(cache_dir: Path) -> None:
    specified = {row[0].rstrip("/") for row in table(section("Files"))}
    assert {re.sub(r"\d{5}", "NNNNN", path.name) for path in cache_dir.iterdir()} == specified


def test_the_version_table_ends_with_the_version_written() -> None:
    versions = [row[0] for row in table(section("Versions"))]
    assert versions == [str(version) for version in range(1, FORMAT_VERSION + 1)]


def test_the_numpy_example_gives_the_readers_logits(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = in_place(cache_dir, tmp_path, monkeypatch)
    names: dict[str, Any] = {}
    exec(code(section("Logits in numpy"), "python"), names)
    np.testing.assert_array_equal(names["logits"], reader[0].rows.logits)
    np.testing.assert_array_equal(names["token_ids"], reader[0].rows.token_ids)


def test_the_sql_example_gives_the_readers_logits(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    duckdb = pytest.importorskip("duckdb")
    reader = in_place(cache_dir, tmp_path, monkeypatch)
    assert reader.plan.top_k == 16, "the example's K"
    answers = duckdb.sql(code(section("Logits in SQL"), "sql")).fetchall()
    found = {(sequence.lower(), place, rank): (token, logit) for sequence, place, rank, token, logit in answers}
    wanted = {
        (scored.sequence.sequence_id.hex(), place, rank): (scored.rows.token_ids[place, rank], logit)
        for scored in reader
        for (place, rank), logit in np.ndenumerate(scored.rows.logits)
    }
    assert found == wanted


def test_the_worked_row_is_in_the_tests_cache(cache_dir: Path) -> None:
    """Ids and tokens exactly; what the teacher computed up to another machine's rounding."""
    first, second = (table(part) for part in section("A worked row").split("T = 28"))
    told = {name: value for name, value in first if name != "column"}
    reader = CacheReader(cache_dir)
    index = reader.index_of(bytes.fromhex(told["sequence_id"]))
    assert index == 15
    scored = reader[index]
    assert told["source"] == scored.sequence.source
    assert told["input_ids"].split() == [str(token) for token in scored.sequence.input_ids]
    assert told["loss_mask"].split() == [str(int(trained)) for trained in scored.sequence.loss_mask]
    assert scored.sequence.target_rows("response")[1] == 10
    row = pq.read_table(cache_dir / shard_name(1)).slice(index - 8, 1).to_pylist()[0]
    assert [name for name, *_ in second] == [*logit_columns(reader.plan), *SCALAR_COLUMNS]
    for name, entries, value in second:
        start, _, stop = entries.partition(" to ")
        stored = row[name][int(start) : int(stop or start) + 1]
        tolerance = {"token_ids": 0, "top_logit_steps": 1, "logit_drops": 1}.get(name, 1e-4)
        np.testing.assert_allclose([float(number) for number in value.split()], stored, rtol=0, atol=tolerance)
    tail = np.logaddexp.reduce(np.append(scored.rows.logits[1], scored.rows.tail_logsumexp[1, 0]))
    assert tail == pytest.approx(8.54791, abs=1e-2)
    assert reader.hidden_states(index)[1:].nbytes == 2304 - 128


def test_hidden_states_may_be_deleted_as_specified(cache_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_dir, tmp_path / "cache")
    for path in (tmp_path / "cache").glob("shard-*.hidden.parquet"):
        path.unlink()
    assert pipeline("verify", tmp_path / "cache", "--json").json["ok"]
    assert pipeline("inspect", tmp_path / "cache", "--json").json["hidden_states"] is False


# ---- all pages ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_commands_that_exist(page: Path) -> None:
    """In code: a sentence may well begin with the pipeline."""
    spans = re.findall(r"`pipeline ([a-z-]+)", page.read_text(encoding="utf-8"))
    assert set(spans) <= set(get_command(app).commands)


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_page_on_losses_computes_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "explanation" / "losses.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(compile(block, "losses.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    promised = [line.split("# ")[1] for block in blocks for line in block.splitlines() if line.startswith("print(")]
    assert printed == promised == ["0.2040 0.3243 0.5283", "0.0089 0.0142 0.0231"]
