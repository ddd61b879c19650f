"""Directories of streams and queues that appear whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from millstream.disk import files
from millstream.errors import StorageError


@contextlib.contextmanager
def published(parent: files.Path, name: str, configuration: str) -> Iterator[files.Path]:
    """Make a directory, to be filled and synced in the block, and give it its name at the end.

    Where another process was faster, theirs stays: `configuration` is the file that each has. The
    name survives a power cut when the block has ended.
    """
    making = parent / f".{name}-{os.urandom(4).hex()}.tmp"
    files.make_directory(making)
    try:
        yield making
        try:
            files.rename(making, parent / name)
        except StorageError:
            if not files.exists(parent / name / configuration):
                raise
    finally:
        if files.exists(making):
            files.remove_tree(making)
    files.sync_directory(parent)
