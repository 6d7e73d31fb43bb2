"""Brings a cache that a URI names to this machine, with progress."""

from pathlib import Path

from cache_schema.remote import local_copy
from pipeline.progress import progress_bar
from workers.errors import InputError


def at_hand(location: str) -> Path:
    """A cache's local directory; see ``cache_schema.remote.local_copy``."""
    if not location:
        raise InputError("the cache's name is empty: give a cache directory, or its URI.")
    with progress_bar("fetching") as progress:
        return local_copy(location, progress)
