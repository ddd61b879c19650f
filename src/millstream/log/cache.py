"""The maps of segments: one list a store, bounded by the limit of open files."""

from __future__ import annotations

import resource
from collections import OrderedDict

from millstream import _native

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream.disk.members import Members
    from millstream.log.segments import Segments


class SegmentCache:
    """The maps of one store, bounded by the limit of open files.

    A map takes none, but syncing it keeps one, and writing zeros ahead of its tail another.
    """

    def __init__(self, members: Members) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = max(16, min((min(limit, 1 << 16) - 100) // 2, 4096))
        self._segments: OrderedDict[tuple[int, int], tuple[Segments, _native.Segment]] = (
            OrderedDict()
        )
        self._lock = _native.Lock("the maps of segments", members, reentrant=True)

    def get(self, segments: Segments, number: int) -> _native.Segment | None:
        """The segment, where it is mapped."""
        found = self._segments.get((id(segments), number))
        return None if found is None else found[1]

    def put(self, segments: Segments, segment: _native.Segment) -> None:
        """Keep a map, and let the oldest go when there are too many."""
        surplus = []
        with self._lock:
            before = self._segments.pop((id(segments), segment.number), None)
            if before is not None:
                surplus.append(before)  # mapped read-only, or by two threads at once
            self._segments[id(segments), segment.number] = (segments, segment)
            while len(self._segments) > self.most:
                surplus.append(self._segments.popitem(last=False)[1])
        for owner, oldest in surplus:
            owner.let_go(oldest)

    def drop(self, segments: Segments, number: int) -> None:
        """Let one map go."""
        with self._lock:
            found = self._segments.pop((id(segments), number), None)
        if found is not None:
            segments.let_go(found[1])

    def forget(self, segments: Segments) -> None:
        """Let all maps of a partition go."""
        with self._lock:
            numbers = [number for owner, number in self._segments if owner == id(segments)]
        for number in numbers:
            self.drop(segments, number)

    def clear(self) -> None:
        """Let all maps go."""
        with self._lock:
            while self._segments:
                _, (owner, segment) = self._segments.popitem()
                owner.let_go(segment)
