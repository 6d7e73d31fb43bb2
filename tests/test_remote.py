"""A cache in object storage, behind a real S3 API."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from cache_schema import CacheReader
from cache_schema.remote import local_copy
from tests.caches import content
from tests.command_line import pipeline
from tests.conftest import dump

BUCKET = "caches"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An empty bucket; copies go to a folder of the test's."""
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("LOGIT_CACHE_HOME", str(tmp_path / "home"))
    storage = boto3.resource("s3", endpoint_url=f"http://{endpoint}").Bucket(BUCKET)
    storage.create()
    yield storage
    storage.objects.delete()


def upload(bucket, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.upload_file(str(path), f"train/{path.relative_to(folder).as_posix()}")


def uri(endpoint: str) -> str:
    return f"s3://{BUCKET}/train?endpoint_override={endpoint}&scheme=http"


def test_a_copy_is_the_cache_and_is_fetched_once(bucket, endpoint: str, cache_dir: Path) -> None:
    upload(bucket, cache_dir)
    calls: list[tuple[int, int]] = []
    copy = local_copy(uri(endpoint), lambda done, total: calls.append((done, total)))
    assert content(copy) == content(cache_dir)
    assert calls[-1][0] == calls[-1][1] == sum(file.num_bytes for file in CacheReader(cache_dir).manifest.all_files)
    written = {path: path.stat().st_mtime_ns for path in copy.rglob("*.parquet")}
    assert local_copy(uri(endpoint)) == copy
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_student_trains_from_a_bucket_as_from_the_disk(
    bucket, endpoint: str, cache_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    upload(bucket, cache_dir)
    summaries = [
        pipeline(
            "distill", "--cache", cache, "--eval-cache", cache, "--student", teacher_dir, "--steps", 2, "--dtype",
            "float32", "--out", tmp_path / name, "--json",
        ).json
        for name, cache in (("disk", cache_dir), ("bucket", uri(endpoint)))
    ]  # fmt: skip
    assert summaries[0]["loss"] == summaries[1]["loss"]
    assert summaries[0]["eval"] == summaries[1]["eval"]
    assert pipeline("verify", uri(endpoint)).code == 0
    assert pipeline("inspect", uri(endpoint), "--json").json["complete"]


def test_hidden_states_that_were_deleted_are_not_missed(
    bucket, endpoint: str, cache_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    upload(bucket, cache_dir)
    for shard in range(CacheReader(cache_dir).plan.num_shards):
        bucket.Object(f"train/shard-{shard:05d}.hidden.parquet").delete()
    assert not CacheReader(local_copy(uri(endpoint))).has_hidden_states


def test_the_log_comes_along(bucket, endpoint: str, bare_cache: Path, teacher_dir: Path, tmp_path: Path) -> None:
    run = ["distill", "--student", teacher_dir, "--steps", 3, "--json"]
    first = pipeline(*run, "--cache", bare_cache, "--teacher", teacher_dir, "--out", tmp_path / "live").json
    assert first["teacher_forwards"] == 24
    upload(bucket, bare_cache)
    second = pipeline(*run, "--cache", uri(endpoint), "--out", tmp_path / "logged").json
    assert (second["teacher_forwards"], second["lookups"]["live"]) == (0, 0)
    assert second["lookups"]["logged"] == first["lookups"]["live"] + first["lookups"]["logged"] > 0


@pytest.fixture
def bare_cache(cache_dir: Path, tmp_path: Path, teacher_dir: Path, data_file: Path) -> Path:
    return dump(teacher_dir, data_file, tmp_path / "bare", "--no-hidden-states")


def test_a_damaged_object_is_named_and_leaves_nothing(bucket, endpoint: str, cache_dir: Path, tmp_path: Path) -> None:
    upload(bucket, cache_dir)
    damaged = bytearray((cache_dir / "shard-00000.parquet").read_bytes())
    damaged[100] ^= 1
    bucket.put_object(Key="train/shard-00000.parquet", Body=bytes(damaged))
    result = pipeline("verify", uri(endpoint))
    assert result.code == 1
    assert "shard-00000.parquet is damaged" in result.err
    left = {path.name for path in (tmp_path / "home").rglob("*")}
    assert not {"shard-00000.parquet", "manifest.json"} & left
    assert not any(name.endswith(".tmp") for name in left)


@pytest.mark.parametrize("missing", ["everything", "manifest.json"])
def test_an_unfinished_or_absent_cache_is_refused(bucket, endpoint: str, cache_dir: Path, missing: str) -> None:
    if missing == "manifest.json":
        upload(bucket, cache_dir)
        bucket.Object("train/manifest.json").delete()
    result = pipeline("inspect", uri(endpoint))
    assert result.code == 1
    assert "no finished cache is there" in result.err


def test_a_store_that_cannot_be_reached_is_one_clear_error(bucket, tmp_path: Path) -> None:
    result = pipeline("inspect", "s3://caches/train?endpoint_override=127.0.0.1:9&scheme=http")
    assert result.code == 1
    assert "cannot be read" in result.err
    assert "Traceback" not in result.err
