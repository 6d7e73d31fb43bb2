"""Caches of an engine's own logits: what stands in them, and who can use them. They are written without the engine."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from cache_schema import CacheReader, Manifest, Plan, Receipt
from cache_schema.manifest import MANIFEST_NAME, PLAN_NAME, read_json, receipt_name, shard_name, write_json
from cache_schema.plan import HiddenStates, Sampling
from cache_schema.verify import verify
from tests.caches import make_plan, make_scoreds, rewrite_column, with_rows, write_cache, write_shard
from tests.command_line import pipeline
from tests.conftest import dump
from workers.errors import InputError
from workers.losses.catalogue import LOSSES
from workers.teacher.self_check import require_raw_logits

OF_A_WHOLE_ROW = ("tail_logsumexp", "row_mean", "row_std")


@pytest.fixture(scope="module")
def bare(teacher_dir, data_file, tmp_path_factory):
    """A cache of the head's logits without hidden states."""
    return dump(teacher_dir, data_file, tmp_path_factory.mktemp("caches") / "bare", "--no-hidden-states")


@pytest.fixture(scope="module")
def alone(bare, tmp_path_factory):
    """The same as an engine would have given it: the same logits, and nothing that takes a whole row."""
    reader, out = CacheReader(bare), tmp_path_factory.mktemp("caches") / "alone"
    shutil.copytree(bare, out, ignore=shutil.ignore_patterns("shard-*", PLAN_NAME, MANIFEST_NAME))
    engine = reader.plan.engine.model_copy(update={"name": "vllm", "logits": "engine"})
    plan = reader.plan.model_copy(update={"engine": engine, "temperatures": ()})
    write_json(out / PLAN_NAME, plan)
    for shard in range(plan.num_shards):
        scoreds = [as_engine_says(reader[index]) for index in plan.shard_range(shard)]
        write_shard(out, plan, shard, scoreds)
    receipts = tuple(read_json(out / receipt_name(shard), Receipt) for shard in range(plan.num_shards))
    write_json(out / MANIFEST_NAME, Manifest(plan=plan, receipts=receipts, files=reader.manifest.files))
    return out


def as_engine_says(scored):
    no_tails = np.empty((scored.rows.num_positions, 0), np.float32)
    return with_rows(scored, tail_logsumexp=no_tails, row_mean=None, row_std=None)


def distill(cache, student, loss, out, *options):
    return pipeline(
        "distill", "--cache", cache, "--student", student, "--student-layers", "0,2", "--loss", loss, "--dtype",
        "float32", "--out", out, *options,
    )  # fmt: skip


# ---- the format ----


@pytest.mark.parametrize("logit_step", [1 / 64, 0])
def test_logits_alone_are_read_back_and_no_other_column_is_there(tmp_path, logit_step):
    plan = make_plan(logits="engine", logit_step=logit_step, positions="all")
    scoreds = make_scoreds(plan)
    reader = CacheReader(write_cache(tmp_path / "cache", plan, scoreds))
    for scored, stored in zip(scoreds, reader, strict=True):
        np.testing.assert_array_equal(stored.rows.token_ids, scored.rows.token_ids)
        np.testing.assert_allclose(stored.rows.logits, scored.rows.logits, atol=logit_step / 2)
        np.testing.assert_array_equal(stored.rows.label_logit, scored.rows.label_logit)
        assert stored.rows.tail_logsumexp.shape == (scored.rows.num_positions, 0)
        assert stored.rows.row_mean is stored.rows.row_std is None
    names = pq.read_schema(tmp_path / "cache" / shard_name(0)).names
    assert "label_logit" in names
    assert not set(OF_A_WHOLE_ROW) & set(names)
    assert all(receipt.scalar_bytes > 0 for receipt in reader.manifest.receipts)
    assert verify(tmp_path / "cache").ok


def test_a_plan_of_an_engine_s_own_logits_has_nothing_of_whole_rows():
    plan = make_plan(logits="engine").model_dump()
    assert Plan(**plan).logits_alone
    for changes in (
        {"temperatures": (1.0,)},
        {"hidden_states": HiddenStates(dtype="bfloat16", size=4)},
        {"sampling": Sampling(draws=5, seed=0), "top_k": 0, "logit_step": 0.0},
        {"engine": plan["engine"] | {"name": "transformers"}},
    ):
        with pytest.raises(ValidationError, match="logits of the engine's own"):
            Plan(**plan | changes)


def test_rows_and_plan_must_agree_on_what_is_there(tmp_path):
    alone, whole = make_plan(logits="engine"), make_plan(hidden_dtype=None)
    of_alone, of_whole = make_scoreds(alone)[0], make_scoreds(whole)[0]
    no_tails = np.empty((of_whole.rows.num_positions, 0), np.float32)
    for plan, scored, fault in (
        (whole, of_alone, "row_mean and row_std are missing"),
        (alone, with_rows(of_whole, tail_logsumexp=no_tails), "row_mean and row_std are there"),
        (alone, with_rows(of_whole, tail_logsumexp=no_tails, row_mean=None), "row_mean and row_std are there"),
        (alone, with_rows(of_whole, row_mean=None, row_std=None), "tail_logsumexp is .* the plan and the mask say"),
        (alone, with_rows(of_alone, label_logit=of_alone.rows.label_logit + np.nan), "label_logit is not finite"),
    ):
        with pytest.raises(ValueError, match=fault):
            write_shard(tmp_path, plan, 0, [scored])


def test_damage_in_logits_alone_is_found(tmp_path):
    plan = make_plan(logits="engine", logit_step=0)
    cache = write_cache(tmp_path / "cache", plan, make_scoreds(plan))

    def raised(column):
        lists = column.to_pylist()
        lists[0][-1] = 1e9
        return pa.chunked_array([pa.array(lists, type=column.type)])

    rewrite_column(cache, plan, 0, shard_name(0), "label_logit", raised)
    report = verify(cache)
    assert ["label" in error.reason for error in report.errors] == [True]


# ---- what a dump is told ----


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ((), "give --no-hidden-states (cache.hidden_states=false) too"),
        (("--no-hidden-states", "--set", "cache.temperatures=[1.0]"), "leave cache.temperatures out"),
        (("--no-hidden-states", "--sampling", "random"), "draws from whole rows: leave one of them out"),
    ],
)
def test_what_takes_a_whole_row_is_refused_before_anything_is_written(teacher_dir, data_file, tmp_path, options, fix):
    refused = pipeline(
        "teacher-dump", "--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "cache", "--engine", "vllm",
        "--set", "engine.logits=engine", *options,
    )  # fmt: skip
    assert refused.code == 1
    assert fix in " ".join(refused.err.split())
    assert not (tmp_path / "cache").exists()


def test_an_estimate_needs_tails(teacher_dir, data_file):
    refused = pipeline(
        "estimate", "--teacher", teacher_dir, "--data", data_file, "--set", "engine.name=vllm", "--set",
        "engine.logits=engine", "--set", "cache.hidden_states=false",
    )  # fmt: skip
    assert refused.code == 1
    assert "engine.logits=engine gives no tails" in refused.err


def test_log_probabilities_are_told_from_logits_however_low():
    logits_NV = np.random.default_rng(0).normal(0, 3, (20, 97)).astype(np.float32)
    highest_NK = -np.sort(-logits_NV, axis=1)[:, :8]
    for shift in (-40, 0, 40):  # GPT-2's logits are all far below 0
        require_raw_logits(highest_NK + np.float32(shift), 97, "vllm 0.32.0")
    logprobs_NK = highest_NK - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)
    with pytest.raises(InputError, match=r"vllm 0.32.0 gives log-probabilities .*engine.self_check=false"):
        require_raw_logits(logprobs_NK, 97, "vllm 0.32.0")


# ---- what looks at a cache ----


def test_inspect_and_verify_show_logits_alone(alone, teacher_dir):
    facts = pipeline("inspect", alone, "--stats", "--json").json
    assert facts["engine"] == {"name": "vllm", "logits": "engine"}
    assert facts["temperatures"] == []
    assert facts["stats"]["mass_outside"] is None
    assert not set(OF_A_WHOLE_ROW) & set(facts["stats"]["columns"])
    words = pipeline("inspect", alone, "--stats", "--student", teacher_dir)
    assert words.code == 0, words.err
    assert "no tails (vllm's own logits)" in words.out
    assert "mass outside the top K: unknown" in words.out
    assert "label_logit" in pipeline("inspect", alone, "--sequence", "0", "--json").json["positions"][0]
    assert pipeline("inspect", alone, "--sequence", "0").code == 0
    assert pipeline("verify", alone, "--json").json["ok"]


def test_a_model_is_evaluated_without_a_kl(alone, bare, teacher_dir):
    found, whole = (pipeline("evaluate", teacher_dir, "--cache", cache, "--json").json for cache in (alone, bare))
    assert found["kl"] is None
    assert found["overlap"] == whole["overlap"]
    assert found["overlap"]["8"] > 0.99


# ---- students ----


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "logsumexp" in loss.needs])
def test_a_loss_with_a_tail_is_refused_with_one_that_needs_none(alone, teacher_dir, tmp_path, name):
    refused = distill(alone, teacher_dir, name, tmp_path / "run", "--teacher", teacher_dir)
    assert refused.code == 1
    said = " ".join(refused.err.split())
    assert "needs the teacher's log-sum-exp" in said
    assert "(t_ld, topk_kl)" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["bild", "kl", "normkd"])
def test_what_looks_outside_needs_a_teacher_and_no_bound_stands_in(alone, teacher_dir, tmp_path, name):
    refused = distill(alone, teacher_dir, name, tmp_path / "run")
    said = " ".join(refused.err.split())
    assert refused.code == 1
    assert "Give --teacher" in said
    assert "dump again without engine.logits=engine" in said
    assert "--on-miss bound" not in said
    bounded = distill(alone, teacher_dir, "s_ld", tmp_path / "run", "--on-miss", "bound")
    assert bounded.code == 1
    assert "--on-miss bound takes the teacher's log-sum-exp" in " ".join(bounded.err.split())
    assert not (tmp_path / "run").exists()


def test_the_losses_that_are_named_train_from_logits_alone(alone, bare, teacher_dir, tmp_path):
    for name in ("t_ld", "topk_kl"):
        found, whole = (
            distill(cache, teacher_dir, name, tmp_path / f"{name}-{cache.name}", "--steps", 2, "--json").json
            for cache in (alone, bare)
        )
        assert found["loss"] == whole["loss"]


def test_a_live_teacher_answers_beside_the_engine_s_logits_and_is_logged(alone, bare, teacher_dir, tmp_path):
    cache, bare = shutil.copytree(alone, tmp_path / "cache"), shutil.copytree(bare, tmp_path / "bare")
    live = distill(
        cache, teacher_dir, "bild", tmp_path / "live", "--teacher", teacher_dir, "--epochs", 1, "--json"
    ).json
    whole = distill(
        bare, teacher_dir, "bild", tmp_path / "whole", "--teacher", teacher_dir, "--epochs", 1, "--json"
    ).json
    assert live["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert live["lookups"]["live"] == whole["lookups"]["live"] > 0
    again = distill(cache, teacher_dir, "bild", tmp_path / "again", "--epochs", 1, "--json").json
    assert again["teacher_forwards"] == 0
    assert again["loss"] == pytest.approx(live["loss"], rel=1e-5)
    assert pipeline("compact", cache).code == 0
    assert pipeline("verify", cache, "--json").json["ok"]
    assert pipeline("evaluate", teacher_dir, "--cache", cache, "--json").json["kl"] == pytest.approx(0.0, abs=1e-5)


def test_a_live_teacher_that_says_something_else_is_refused(alone, teacher_dir, tmp_path):
    cache = shutil.copytree(alone, tmp_path / "cache")
    plan, reader = read_json(cache / PLAN_NAME, Plan), CacheReader(alone)
    moved = [
        with_rows(scored, logits=scored.rows.logits + 1, label_logit=scored.rows.label_logit + 1) for scored in reader
    ]
    for shard in range(plan.num_shards):
        write_shard(cache, plan, shard, [moved[index] for index in plan.shard_range(shard)])
    receipts = tuple(read_json(cache / receipt_name(shard), Receipt) for shard in range(plan.num_shards))
    write_json(cache / MANIFEST_NAME, Manifest(plan=plan, receipts=receipts, files=reader.manifest.files))
    refused = distill(cache, teacher_dir, "bild", tmp_path / "run", "--teacher", teacher_dir, "--steps", 1)
    assert refused.code == 1
    assert "gives other logits than" in refused.err
