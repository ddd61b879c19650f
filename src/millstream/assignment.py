"""The partitions that a consumer has: how they come and go, and its readers of them."""

from __future__ import annotations

import time

from millstream import _native
from millstream._native import Position
from millstream.errors import Closed, InvalidArgument, LimitExceeded
from millstream.group import Group, epoch_at
from millstream.options import integer
from millstream.reader import (
    KEEP_MAPS,
    PartitionReader,
    _Turn,
    check_epoch,
    epoch_end,
    is_held,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from millstream.sql_position import SqlPosition
    from millstream.stream import Stream

__all__ = ["Assignment"]

LOOK_SECONDS = 0.045
ALONE_SECONDS = 1.0


class _GroupTurn(_Turn):
    """What a consumer waits for: records of its partitions, or a change of the group."""

    def __init__(self, stream: Stream, member: _native.Membership) -> None:
        super().__init__(stream, [], False)
        self.member = member

    def wait(self, deadline: float) -> None:
        """Sleep until there may be something, it is time to look for the dead, or the deadline."""
        stream, member = self.stream, self.member
        seen = stream._prepare_wait()
        if self.ready() or stream.closed or stream._state != 1 or member.unseen:
            return
        slice_ = LOOK_SECONDS if member.others else ALONE_SECONDS
        left = min(deadline - time.monotonic(), slice_)
        if left > 0:
            stream._wait(seen, left)


class Assignment:
    """Base of `millstream.Consumer`."""

    group: Group
    _closed: bool

    def __init__(
        self,
        stream: Stream,
        member: _native.Membership,
        on_lost: str,
        on_assign: Callable[[list[int]], object] | None,
        on_revoke: Callable[[list[int]], object] | None,
    ) -> None:
        self.stream = stream
        self._member = member
        self._on_lost = on_lost
        self._on_assign, self._on_revoke = on_assign, on_revoke
        self._readers: dict[int, PartitionReader] = {}
        self._due: set[int] = set()
        """Partitions of ours whose reader is not there yet."""
        self._paused: set[int] = set()
        self._active: list[PartitionReader] = []
        self._sql: SqlPosition | None = None
        self._turn = _GroupTurn(stream, member)

    def _join(self) -> None:
        self.group._watch(True)
        if not self._member.join():
            raise LimitExceeded(
                f"{self.group.path}: the group has {_native.GROUP_MEMBERS} members, the most there"
                " can be"
            )
        self.stream._wake()

    def _tend(self) -> None:
        """Do what is due in the group, and follow what became of our partitions."""
        group, member, stream = self.group, self._member, self.stream
        stream._check_live()
        if group._watch(False):
            stream._wake()
        if group._partitions < stream.partitions or group._room < group._partitions:
            group._follow()
        if member.unseen:
            self._follow()
        if self._due:
            self._start_readers()

    def _follow(self) -> None:
        found = self._member.look()
        if found is None:  # taken for hung: what it had is the others'
            gone = self._member.ended()
            self._stop_readers(gone, revoked=gone)
            self._join()
            found = self._member.look()
            if found is None:
                raise Closed(f"{self.group.path}: the membership ended as it began")
        new, lost, leaving, undecided = found
        self._stop_readers(lost, revoked=lost)
        if leaving:
            self._stop_readers(leaving, revoked=leaving)
            for partition in leaving:
                self._member.release(partition)
            self.stream._wake()
        self._due.update(partition for partition in new if partition not in leaving)
        if self.group._decide is not None:
            for partition in undecided:
                self.group._decide(self.group, partition)
        came = [partition for partition in new if partition in self._due]
        if came and self._on_assign is not None:
            self._on_assign(came)

    def _stop_readers(self, partitions: list[int], *, revoked: list[int]) -> None:
        if revoked and self._on_revoke is not None:
            self._on_revoke(revoked)
        for partition in partitions:
            self._readers.pop(partition, None)
            self._due.discard(partition)
        self._choose()

    def _start_readers(self) -> None:
        """Read on in what is ours now. Raises OffsetOutOfRange, again and again until `seek`."""
        for partition in sorted(self._due):
            if self.group._pending(partition) is not None:
                continue  # the journal has to say first where the group is
            position = self._sql and self._sql.claim(partition)
            position = position or self.group._committed(partition)
            self._start_reader(partition, position, sought=False)
        self._choose()

    def _start_reader(self, partition: int, position: Position | None, *, sought: bool) -> None:
        log = self.stream._log(partition)
        start: Any = "earliest"
        if position is not None:
            start = position.offset
            try:
                check_epoch(log, position.epoch, position.offset)
            except IndexError:
                if self._on_lost != "earliest":
                    raise
                start = epoch_end(log, position.epoch)
            if self._on_lost == "earliest" and not is_held(log, position.epoch, position.offset):
                start = log.next_offset if start > log.next_offset else start
        found = PartitionReader(log, start, durable=False, on_lost=self._on_lost)
        offset = found.cursor.offset
        same = position is not None and position.offset == offset
        epoch = position.epoch if same and position else epoch_at(self.stream, partition, offset)
        self._readers[partition] = found
        self._member.start(partition, epoch, offset, sought)
        self._due.discard(partition)

    def _choose(self) -> None:
        """Which readers are asked."""
        self._active = [
            one for partition, one in self._readers.items() if partition not in self._paused
        ]
        self._turn.readers = self._active
        if len(self._active) > KEEP_MAPS:
            for one in self._active:
                one.forget()

    def _refresh(self) -> None:
        """Take up what was assigned, without asking for a batch."""
        if self._closed:
            raise Closed(f"{self.group.path}: the consumer is closed")
        if self._member.unseen:
            self.group._follow()
            self._follow()

    def _mine(self, partition: Any) -> int:
        index = integer("partition", partition, 0)
        if index not in self._readers and index not in self._due:
            raise InvalidArgument(
                f"{self.group.path}: partition {index} is not assigned to this consumer, which has"
                f" {sorted({*self._readers, *self._due})}"
            )
        return index
