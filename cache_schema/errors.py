"""The errors a cache can raise, each with the sentence that fixes it.

CacheError
├── CacheIncompleteError    the dump has not finished: no manifest
├── CacheCorruptError       a file is missing, short, damaged or breaks the format
├── CacheMismatchError      another teacher, tokenizer, data set or setting than the cache was made with
├── SequenceNotFoundError   a sequence the cache does not hold
└── StorageError            the disk or object store refused a read or a write

Only ``pipeline/cli.py`` catches them.
"""


class CacheError(Exception):
    """Base of everything in this package that a user can cause or cure."""


class CacheIncompleteError(CacheError):
    """The directory has no manifest: nothing may be read from it yet."""


class CacheCorruptError(CacheError):
    """A stored byte, row or file is not what the receipts say."""


class CacheMismatchError(CacheError):
    """Two things that must be the same are not; the message names the first field that differs."""


class SequenceNotFoundError(CacheError):
    """The cache holds no sequence with these tokens or at this index."""


class StorageError(CacheError):
    """The file system refused; nothing half-written was left under a final name."""
