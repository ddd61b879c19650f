"""The table of deduplication ids of a queue: made, mapped, replaced by a larger one.

The process that replaces it holds the queue's maintenance word, copies, syncs the copy and renames
it over the old one, which says from the first moment on that it is not to be changed: each claim
is in the one or the other.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from millstream import _native
from millstream.disk import files
from millstream.errors import LimitExceeded

if TYPE_CHECKING:
    from millstream._native import _DedupTable
    from millstream.queues.handle import QueueHandle
    from millstream.queues.slots import Files

STRIPES = 16
STRIPES_MAX = 1 << 20


def create(path: files.Path, store_id: bytes, queue_id: int, stripes: int = STRIPES) -> None:
    """Make an empty table, whole and durable."""
    header = _native.dedup_header(stripes, store_id, queue_id)
    files.replace(path, header, length=_native.dedup_size(stripes))


def open_table(queue_files: Files) -> _DedupTable:
    """Map the table that is there."""
    path = queue_files.path("dedup")
    memory = queue_files.map_again("dedup")
    return _native._DedupTable(memory, queue_files.store_id, queue_files.queue_id, path)


def open_first(queue: QueueHandle) -> None:
    """As the first to open the queue, alone: what the messages say counts."""
    queue_files = queue._files
    path = queue_files.path("dedup")
    for name in files.names(queue_files.directory):
        if name.startswith("dedup."):  # of somebody who was killed while making it
            files.remove(queue_files.path(name))
    if not files.exists(path):  # a copy without it: it is made from the messages
        create(path, queue_files.store_id, queue_files.queue_id)
    queue._use_dedup(open_table(queue_files))
    while not queue._recover_claims():
        _replace(queue)


def follow(queue: QueueHandle) -> None:
    """The table that is mapped here is not the one in use any more: map that."""
    with queue._maintaining("mapping dedup"):
        _follow_owned(queue)


def grow(queue: QueueHandle) -> None:
    """A stripe is full of ids whose window is not over: go on with a larger table."""
    with queue._maintaining("growing dedup"):
        assert queue._dedup is not None
        if queue._dedup.is_live:
            _replace(queue)
        else:
            _follow_owned(queue)


def _follow_owned(queue: QueueHandle) -> None:
    table = open_table(queue._files)
    if not table.is_live:
        table.thaw()  # who copied it was killed before the copy was published
    queue._use_dedup(table)


def _replace(queue: QueueHandle) -> None:
    """Holder of maintenance: copy to a table of twice the size or more."""
    old, queue_files = queue._dedup, queue._files
    assert old is not None
    path = queue_files.path("dedup")
    temporary = path + f".{os.getpid()}-{os.urandom(4).hex()}.tmp"
    stripes = old.stripes
    descriptor = None
    try:
        copied = False
        while not copied:
            if descriptor is not None:
                files.close(descriptor)
                descriptor = None
            stripes *= 2
            if stripes > STRIPES_MAX:
                raise LimitExceeded(
                    f"{queue.path}: more than {STRIPES_MAX * 64} deduplication ids within the"
                    " dedup_window; make a queue with a shorter one"
                )
            create(temporary, queue_files.store_id, queue_files.queue_id, stripes)
            descriptor, memory = queue_files.map_other(temporary)
            ids = queue_files.store_id, queue_files.queue_id
            table = _native._DedupTable(memory, *ids, temporary)
            copied = queue._copy_dedup(table)
        assert descriptor is not None
        files.sync(descriptor, temporary)
        files.rename(temporary, path)
    except BaseException:
        old.thaw()
        if descriptor is not None:
            files.close(descriptor)
        files.remove(temporary)
        raise
    queue_files.use("dedup", descriptor)
    files.sync_directory(queue_files.directory)
    queue._use_dedup(table)
