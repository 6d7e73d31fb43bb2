"""The cache format: what a teacher said about a data set, in Parquet. Needs no ML framework."""

from cache_schema.errors import (
    CacheCorruptError,
    CacheError,
    CacheIncompleteError,
    CacheMismatchError,
    SequenceNotFoundError,
    StorageError,
)
from cache_schema.manifest import Manifest, Receipt, read_manifest
from cache_schema.plan import Plan, Sampling
from cache_schema.reader import CacheReader
from cache_schema.sequence import SampledRows, ScoredSequence, TokenSequence, TopKRows
from cache_schema.verify import verify
from cache_schema.writer import ShardWriter

__all__ = [
    "CacheCorruptError",
    "CacheError",
    "CacheIncompleteError",
    "CacheMismatchError",
    "CacheReader",
    "Manifest",
    "Plan",
    "Receipt",
    "SampledRows",
    "Sampling",
    "ScoredSequence",
    "SequenceNotFoundError",
    "ShardWriter",
    "StorageError",
    "TokenSequence",
    "TopKRows",
    "read_manifest",
    "verify",
]
