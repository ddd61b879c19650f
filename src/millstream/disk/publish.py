"""Directories of streams and queues that appear whole, or not at all, and go the same way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from millstream.disk import files
from millstream.errors import NotFound, StorageError


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


@contextlib.contextmanager
def withdrawn(parent: files.Path, name: str) -> Iterator[None]:
    """Rename a directory so that nobody opens it, durably; after the block, remove it.

    The block gives up what is mapped of it. Killed on the way it is there whole, or the next first
    opener removes it.

    Raises: NotFound where another process was faster.
    """
    gone = parent / f".{name}-{os.urandom(4).hex()}.dropped"
    try:
        files.rename(parent / name, gone)
    except StorageError as error:
        if files.exists(parent / name):
            raise
        raise NotFound(f"{parent}: another process dropped {name!r}") from error
    files.sync_directory(parent)
    yield
    files.remove_tree(gone)
