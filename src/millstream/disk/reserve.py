"""Room kept aside in a store, so that one on a full disk can still be opened, altered and emptied.

Opening and altering replace small files whole, and so need room for a second copy for a moment. On
a full disk the reserve is given up for that moment, then made again. It holds zeros; where it is
missing, nothing but this fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from millstream.disk import files
from millstream.errors import StorageError, StoreFull

BYTES = 320 << 10  # the control file of a thousand partitions, and a JSON file


def make(directory: files.Path) -> None:
    """Put room aside in the store's directory; less where the disk has less."""
    path = directory / "reserve"
    for size in (BYTES, BYTES // 4, BYTES // 16):
        if files.allocated_bytes(path) >= size:
            return
        with contextlib.suppress(StorageError):
            files.remove(path)
            files.make(path, size, b"")


def lend(directory: files.Path, work: Callable[..., None], *arguments: object) -> None:
    """Do what replaces files; where the disk is full, again with the room of the reserve."""
    try:
        work(*arguments)
    except StoreFull:
        path = directory / "reserve"
        if not files.exists(path):
            raise
        files.remove(path)
        try:
            work(*arguments)
        finally:
            make(directory)
