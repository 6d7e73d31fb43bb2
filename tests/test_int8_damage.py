"""int8 hidden states that were damaged, and heads that are not theirs."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch

from cache_schema import CacheReader, verify
from cache_schema.encoding import from_int8, to_float32, to_int8
from cache_schema.errors import CacheCorruptError
from cache_schema.plan import HiddenStates
from tests.caches import make_plan, make_scoreds, rewrite_column, rewrite_table, write_cache
from tests.command_line import pipeline
from tests.tiny_cache import CPU, dump_tiny_cache, random_sequences
from workers.lookup.stored import require_head_of_cache
from workers.teacher.lm_head import load_head

SEQUENCES = random_sequences()
SIZE = 32


@pytest.fixture(scope="module")
def rounded(teacher_dir, tmp_path_factory):
    return dump_tiny_cache(tmp_path_factory.mktemp("caches") / "int8", teacher_dir, SEQUENCES, hidden_dtype="int8")


# ---- damage ----


BAD_SCALES = {
    "scales of a plan that was never measured": ({"channel_scale": None}, "stand together or not at all"),
    "a scale missing": ({"channel_scale": [1.0] * (SIZE - 1)}, "channel_scale must be 32 finite numbers above 0"),
    "a scale of zero": ({"channel_scale": [0.0] + [1.0] * (SIZE - 1)}, "channel_scale must be"),
    "a negative scale": ({"channel_scale": [-1.0] + [1.0] * (SIZE - 1)}, "channel_scale must be"),
    "a scale that is no number": ({"channel_scale": [float("nan")] + [1.0] * (SIZE - 1)}, "channel_scale must be"),
    "an infinite scale": ({"channel_scale": [float("inf")] + [1.0] * (SIZE - 1)}, "channel_scale must be"),
    "a channel twice": ({"residual_channels": [3, 3]}, "residual_channels must ascend from 0 to 31"),
    "a channel too high": ({"residual_channels": [32]}, "residual_channels must ascend"),
    "a negative channel": ({"residual_channels": [-1]}, "residual_channels must ascend"),
    "an error that is no number": ({"mean_logit_error": float("nan")}, "logit errors must be finite"),
    "another dtype": ({"dtype": "float32"}, "float32 hidden states have no int8 scales"),
    "nothing measured": (
        dict.fromkeys(("channel_scale", "residual_channels", "mean_logit_error", "max_logit_error")),
        "int8 hidden states without their scales",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_SCALES.values(), ids=BAD_SCALES.keys())
def test_a_plan_with_damaged_scales_is_refused(rounded, tmp_path, change, message):
    folder = shutil.copytree(rounded.cache_dir, tmp_path / "cache")
    for name, of_plan in (("plan.json", lambda d: d), ("manifest.json", lambda d: d["plan"])):
        document = json.loads((folder / name).read_text())
        of_plan(document)["hidden_states"] |= change
        (folder / name).write_text(json.dumps(document))
    with pytest.raises(CacheCorruptError, match=message):
        CacheReader(folder)
    assert pipeline("inspect", folder).code == 1


@pytest.fixture
def written(tmp_path):
    """A cache of random states, as one writes it who has scales: (folder, plan)."""
    hidden = HiddenStates(
        dtype="int8", size=4, channel_scale=(0.5, 1.0, 2.0, 4.0), residual_channels=(1,), mean_logit_error=0.1,
        max_logit_error=1.0,
    )  # fmt: skip
    plan = make_plan(hidden_size=4).model_copy(update={"hidden_states": hidden})
    return write_cache(tmp_path / "cache", plan, make_scoreds(plan)), plan


def first_scale(number):
    def change(column):
        rows = column.to_pylist()
        rows[1][0] = number
        return pa.array(rows, column.type)

    return change


def shorter(column):
    rows = column.to_pylist()
    rows[1] = rows[1][:-1]
    return pa.array(rows, column.type)


@pytest.mark.parametrize(
    ("column", "change", "reason"),
    [
        *(("row_scale", first_scale(number), "finite numbers above 0") for number in (0.0, -1.0, np.nan, np.inf)),
        ("row_scale", shorter, "finite numbers above 0"),
        ("hidden_states", shorter, "hidden_states of row 1 holds"),
        ("residuals", shorter, "residuals of row 1 holds"),
    ],
)
def test_a_damaged_file_is_not_read_and_is_found_behind_right_hashes(written, column, change, reason):
    cache, plan = written
    assert verify(cache).ok
    rewrite_column(cache, plan, 0, "shard-00000.hidden.parquet", column, change)
    reader = CacheReader(cache)
    with pytest.raises(CacheCorruptError, match=rf"shard-00000\.hidden\.parquet is damaged: .*{reason}"):
        reader.hidden_states(1)
    report = verify(cache)
    assert {damage.file for damage in report.errors} == {"shard-00000.hidden.parquet"}
    assert reason in report.errors[0].reason


def test_a_file_without_a_column_is_refused(written):
    cache, plan = written
    rewrite_table(cache, plan, 0, "shard-00000.hidden.parquet", lambda table: table.drop_columns(["residuals"]))
    with pytest.raises(CacheCorruptError, match="its columns are not those of the format"):
        CacheReader(cache).hidden_states(0)


def test_what_is_written_is_read_back_as_the_two_functions_say(written):
    cache, plan = written
    reader, scoreds = CacheReader(cache), make_scoreds(plan)
    for index, scored in enumerate(scoreds):
        expected = from_int8(
            to_int8(to_float32(scored.hidden_states, "bfloat16"), plan.hidden_states), plan.hidden_states
        )
        assert reader.hidden_states(index).tobytes() == expected.tobytes()


# ---- the head ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_head_of_the_dump_is_accepted(teacher_dir, tmp_path, dtype):
    reader = dump_tiny_cache(
        tmp_path / "cache", teacher_dir, SEQUENCES, dtype=dtype, hidden_dtype="int8", positions="all"
    )
    require_head_of_cache(reader, load_head(reader.lm_head_path, CPU), num_sequences=1000)


def swapped(weight, ids):
    weight = weight.clone()
    weight[ids] = weight[ids[::-1]]
    return weight


HEADS = {
    "perturbed": lambda weight, ids: weight + 0.05 * torch.randn(weight.shape, generator=torch.manual_seed(0)),
    "scaled": lambda weight, ids: weight * 1.02,
    "two rows exchanged": swapped,
    "all rows reversed": lambda weight, ids: weight.flip(0),
    "channels permuted": lambda weight, ids: weight.roll(1, dims=1),
    "two channels exchanged": lambda weight, ids: weight[:, [1, 0, *range(2, SIZE)]],
    "another head": lambda weight, ids: weight[torch.randperm(len(weight), generator=torch.manual_seed(0))],
    "a row that is not a number": lambda weight, ids: weight.index_fill(0, torch.tensor(ids[:1]), torch.nan),
    "rows missing": lambda weight, ids: weight[:-1],
}


@pytest.mark.parametrize("changed", HEADS.values(), ids=HEADS.keys())
def test_a_head_that_is_not_the_dump_s_is_refused(rounded, changed):
    head = load_head(rounded.lm_head_path, CPU)
    first_ids = rounded[0].rows.token_ids[0, :2].tolist()
    wrong = dataclasses.replace(head, weight_VD=changed(head.weight_VD, first_ids))
    with pytest.raises(CacheCorruptError, match="lm_head"):
        require_head_of_cache(rounded, wrong)


def test_scales_of_another_plan_are_refused_by_the_logits(rounded, tmp_path):
    """Every hash can be right and the states still wrong: scales that have changed places."""
    folder = shutil.copytree(rounded.cache_dir, tmp_path / "cache")
    for name, of_plan in (("plan.json", lambda d: d), ("manifest.json", lambda d: d["plan"])):
        document = json.loads((folder / name).read_text())
        of_plan(document)["hidden_states"]["channel_scale"].reverse()
        (folder / name).write_text(json.dumps(document))
    result = pipeline("verify", folder, "--json")
    assert result.code == 1
    assert "differ from the stored ones" in result.out
