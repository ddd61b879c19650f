"""Pages made ready ahead of the tail of a log that grows fast (docs/decisions/0016).

A page that is stored to for the first time costs a fault, and a page to be zeroed. Zeros written to
the file by 512 KiB make one large folio instead, which a single fault maps whole, and lie in the
cache when they are stored to. Whoever appends writes them, with the append word held. The price is
that a sync writes what was made ready, and the whole folio of each record: so this is for logs that
grow fast, and never at level "sync", where a long batch zeroes its own pages (`clear_for`).

Whether the file system has large folios is found out by what a fault maps of the first zeros.
Where it has none, the background faults pages in (`store/background.py`).
"""

from __future__ import annotations

import os
import resource
import time

from millstream import _native
from millstream.disk import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream.log.partition import PartitionLog

__all__ = ["LOW_BYTES", "WARM_BYTES", "Ahead"]

WARM_BYTES = 4 << 20
"""A log that has grown by so much within a time of PACES is worth it."""
PACES = {"process": 1.0, "interval": 0.1}
"""Seconds. At "interval" that is one sync, which writes at most a folio or two more for it."""
LOW_BYTES = 64 << 10
"""What has to be ready ahead of the tail, besides room for a batch as long as the last one."""
MOST_BYTES = 8 << 20
"""At once, where batches are longer."""
TRIES = 32
"""Small pages may be in the cache already: what the kernel has read ahead, say."""
FOLIO_FAULTS = _native.FILL_BYTES // 4096 // 4
"""Fewer faults than these map what one write has filled, where folios are large."""


class Ahead:
    """What is ready ahead of one partition's tail.

    Attributes:
        folios: has the file system large ones? None: not known.
    """

    def __init__(self) -> None:
        self.folios: bool | None = None
        self._tries = self._filled = 0
        self._since, self._from, self._is_fast = 0.0, 0, False
        """Its pace: measured from when and from where on, and what the last one was."""

    def low(self, level: str) -> int:
        """How many bytes ahead of the tail have to be ready; 0: the core need not ask."""
        return LOW_BYTES if level in PACES and self.folios is not False else 0

    def go_on(self, log: PartitionLog, level: str) -> bool:
        """The tail has come near to the end of what is ready: make more ready, if it came fast.

        False: it cannot be done here, now and later.

        Raises: StorageError.
        """
        if self.folios is not False:
            self._go_on(log, level)
        return self.folios is not False

    def _go_on(self, log: PartitionLog, level: str) -> None:
        native = log.native
        segment, tail = native.active, native.tail
        if segment is None or not segment.activated or level not in PACES:
            return
        if not self._keeps_pace(tail, PACES[level]):
            native.set_ready(tail + WARM_BYTES)
            return
        if not segment.can_fill and not _open(log, segment):
            return
        # The core asks for room for another batch like the last one.
        asked = min(max(native.ready, tail + LOW_BYTES), tail + MOST_BYTES)
        begin = max(tail, self._filled)
        reached = native.fill(segment, begin, asked + _native.FILL_BYTES)
        if reached < 0:
            self.folios = False
            raise files.storage_error(
                OSError(-reached, os.strerror(-reached)), segment.path, "filling"
            )
        if self.folios is None and reached >= begin + _native.FILL_BYTES:
            self._tries += 1
            if _are_large(segment, reached - _native.FILL_BYTES, reached):
                self.folios = True
            elif self._tries == TRIES:
                self.folios = False
        self._filled = reached
        native.set_ready(reached)

    def _keeps_pace(self, tail: int, seconds: float) -> bool:
        """Does it grow by WARM_BYTES in so many seconds?"""
        now = time.monotonic()
        elapsed, grown = now - self._since, tail - self._from
        if grown >= WARM_BYTES or elapsed > seconds:
            self._is_fast = elapsed * WARM_BYTES < seconds * grown
            self._since, self._from = now, tail
        return self._is_fast


def _open(log: PartitionLog, segment: _native.Segment) -> bool:
    """Have a descriptor to write with; False: another file lies there."""
    descriptor = files.open_file(segment.path, write=True)
    if not log.segments.is_mapped(segment, descriptor):
        files.close(descriptor)
        return False
    segment.fill_with(descriptor)
    return True


def _are_large(segment: _native.Segment, begin: int, end: int) -> bool:
    """Does one fault map the whole of what one write has filled?"""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    could = segment.populate(begin, end) == end
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    return could and faults < FOLIO_FAULTS
