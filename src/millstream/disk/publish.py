"""Directories of streams and queues that appear whole, or not at all, and go the same way."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

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
        finish_drop(parent / name)
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
def withdrawn(
    parent: files.Path, name: str, configuration: str, directory: files.Directory
) -> Iterator[None]:
    """Rename a directory so that nobody opens it, durably; after the block, remove it.

    The block gives up what is mapped of it. Killed on the way it is there whole, or the next first
    opener removes it. A directory that an overlay has in a lower layer cannot be renamed, but its
    configuration can, and it is removed where it is.

    `directory` is what a handle of it holds open: another of its name stays.

    Raises: NotFound where another process was faster.
    """
    path, gone = parent / name, parent / f".{name}-{os.urandom(4).hex()}.dropped"
    remove: Callable[[files.Path], object] = files.remove_tree
    if not files.is_at(directory, path):
        raise NotFound(f"{parent}: another process dropped {name!r}")
    try:
        files.rename(path, gone)
    except StorageError as error:
        if error.errno == errno.EXDEV:
            gone, remove = path, finish_drop
            files.rename(gone / configuration, gone / files.LEFT)
            files.sync_directory(gone)
        elif files.exists(path):
            raise
        else:
            raise NotFound(f"{parent}: another process dropped {name!r}") from error
    files.sync_directory(parent)
    yield
    remove(gone)


def withdraw(
    parent: files.Path,
    name: str,
    configuration: str,
    directory: files.Directory,
    give_up: Callable[[str], None],
) -> None:
    """Remove what somebody has dropped as `withdrawn` does, unless another process was faster."""
    with contextlib.suppress(NotFound), withdrawn(parent, name, configuration, directory):
        give_up(name)


def finish_drop(path: files.Path) -> bool:
    """Remove a directory that was dropped where it is, maybe beside others; False: it was not."""
    found = False
    while files.exists(path / files.LEFT):
        found = True
        try:
            files.remove_whole(files.Directory(path), path, last=files.LEFT)
        except NotFound:
            continue
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
    return found
