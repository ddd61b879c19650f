"""Directories of streams and queues that appear whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from millstream import files
from millstream.errors import StorageError


@contextlib.contextmanager
def published(parent: str, name: str, configuration: str) -> Iterator[str]:
    """Make a directory, to be filled and synced in the block, and give it its name at the end.

    Where another process was faster, theirs stays: `configuration` is the file that each has. The
    name survives a power cut when the block has ended.
    """
    making = os.path.join(parent, f".{name}-{os.urandom(4).hex()}.tmp")
    files.make_directory(making)
    try:
        yield making
        try:
            files.rename(making, os.path.join(parent, name))
        except StorageError:
            if not os.path.lexists(os.path.join(parent, name, configuration)):
                raise
    finally:
        if os.path.lexists(making):
            files.remove_tree(making)
    files.sync_directory(parent)
