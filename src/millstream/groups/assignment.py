"""The partitions that a consumer has: how they come and go, and its readers of them."""

from __future__ import annotations

import time

from millstream import _native
from millstream._native import Position
from millstream.errors import Closed, InvalidArgument, LimitExceeded
from millstream.groups.group import Group, epoch_at
from millstream.log.reader import KEEP_MAPS, PartitionReader, Rotation, check_epoch, epoch_end
from millstream.options import integer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from millstream.groups.sql_position import SqlPosition
    from millstream.log.handle import StreamHandle

__all__ = ["Assignment"]

WATCH_SECONDS = 0.045
ALONE_SECONDS = 1.0


class _GroupRotation(Rotation):
    """What a consumer waits for: records of its partitions, or a change of the group."""

    def __init__(self, stream: StreamHandle, member: _native.Membership) -> None:
        super().__init__(stream, [], False)
        self.member = member

    def wait(self, deadline: float) -> None:
        """Sleep until there may be something, it is time to watch for the dead, or the deadline."""
        stream, member = self.stream, self.member
        seen = stream._prepare_wait()
        if self.ready() or self.over() or member.unseen:
            return
        slice_ = WATCH_SECONDS if member.others else ALONE_SECONDS
        left = min(deadline - time.monotonic(), slice_)
        if left > 0:
            stream._wait(seen, left)


class Assignment:
    """Base of `millstream.Consumer`."""

    group: Group
    _closed: bool

    def __init__(
        self,
        stream: StreamHandle,
        member: _native.Membership,
        transacted: bool,
        on_lost: str,
        on_assign: Callable[[list[int]], object] | None,
        on_revoke: Callable[[list[int]], object] | None,
    ) -> None:
        self.stream = stream
        self._member = member
        self._transacted = transacted
        self._on_lost = on_lost
        self._on_assign, self._on_revoke = on_assign, on_revoke
        self._readers: dict[int, PartitionReader] = {}
        self._due: set[int] = set()
        """Partitions of ours whose reader is not there yet."""
        self._untold: list[int] = []
        """Those of them that `on_assign` has not been told of."""
        self._leaving: list[int] = []
        """Partitions that another waits for."""
        self._gone: list[int] = []
        """Lost ones, of which `on_revoke` is to hear."""
        self._paused: set[int] = set()
        self._active: list[PartitionReader] = []
        self._sql: SqlPosition | None = None
        self._rotation = _GroupRotation(stream, member)

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
        stream._keep_up()
        if not member.joined:
            self._join()
        if group._watch(False):
            stream._wake()
        if group._partitions < stream.partitions or group._room < group._partitions:
            group._follow()
        if member.unseen:
            self._take_up()
        if self._gone or self._leaving:
            self._give_up()
        if self._due or self._untold:
            self._start_readers()

    def _take_up(self) -> None:
        """Take up what was assigned, drop what was lost. What leaves stays until the next batch."""
        found = self._member.take_up()
        if found is None:  # taken for hung: what it had is the others'
            self._drop_readers(self._member.ended())
            self._join()
            found = self._member.take_up()
            if found is None:
                raise Closed(f"{self.group.path}: the membership ended as it began")
        new, lost, self._leaving = found
        self._drop_readers(lost)
        self._due.update(new)
        self._untold += new

    def _drop_readers(self, lost: list[int]) -> None:
        for partition in lost:
            self._readers.pop(partition, None)
            self._due.discard(partition)
        self._gone += [partition for partition in lost if partition not in self._untold]
        self._untold = [partition for partition in self._untold if partition not in lost]
        self._choose()

    def _give_up(self) -> None:
        """Say what is lost or about to go, then hand over what is to go.

        With a transaction under way, what it has read stays until that ends.
        """
        member, gone = self._member, self._gone
        kept = [one for one in self._leaving if self._transacted and member.is_dirty(one)]
        leaving = [one for one in self._leaving if one not in kept]
        self._gone, self._leaving = [], kept
        try:
            told = gone + [partition for partition in leaving if partition not in self._untold]
            if told and self._on_revoke is not None:
                self._on_revoke(told)
        finally:
            for partition in leaving:
                member.release(partition)
            self._drop_readers(leaving)
            self._gone = []
            if leaving:
                self.stream._wake()

    def _start_readers(self) -> None:
        """Read on in what is ours now. Raises OffsetOutOfRange, again and again until `seek`."""
        gone, self._gone = self._gone, []
        if gone and self._on_revoke is not None:
            self._on_revoke(gone)
        came, self._untold = self._untold, []
        if came and self._on_assign is not None:
            self._on_assign(came)
        for partition in sorted(self._due):
            if self.group._pending(partition) is not None:
                # The journal has to say first where the group is.
                if self.group._decide is not None:
                    self.group._decide(self.group, partition)
                if self.group._pending(partition) is not None:
                    continue
            position = self._sql and self._sql.claim(partition)
            position = position or self.group._committed(partition)
            self._start_reader(partition, position, sought=False)
        self._choose()

    def _start_reader(self, partition: int, position: Position | None, *, sought: bool) -> None:
        log = self.stream._log(partition)
        start: Any = 0
        if position is not None:
            start = position.offset
            try:
                check_epoch(log, position.epoch, position.offset)
            except IndexError:
                if self._on_lost != "earliest":
                    raise
                start = epoch_end(log, position.epoch)
            if self._on_lost == "earliest":
                following = log.next_offset
                start = following if start is None else min(start, following)
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
        self._rotation.readers = self._active
        if len(self._active) > KEEP_MAPS:
            for one in self._active:
                one.forget()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"{self.group.path}: the consumer is closed; join the group with another")
        self.group._keep_up()

    def _refresh(self) -> None:
        """Take up what was assigned, without asking for a batch."""
        self._check_open()
        if self._member.unseen:
            self.group._follow()
            self._take_up()

    def _mine(self, partition: Any) -> int:
        index = integer("partition", partition, 0)
        if index not in self._readers and index not in self._due:
            raise InvalidArgument(
                f"{self.group.path}: partition {index} is not assigned to this consumer, which has"
                f" {sorted({*self._readers, *self._due})}"
            )
        return index
