"""One member of a consumer group: batches, and the position that it keeps."""

from __future__ import annotations

import contextlib
import time
import warnings

from millstream import _native
from millstream._native import Batch, Position
from millstream.errors import Closed, InvalidArgument, InvalidType, MillstreamError, Unsupported
from millstream.groups.assignment import Assignment
from millstream.groups.group import Group, check_start, position_at
from millstream.log.reader import KEEP_MAPS, UNLIMITED, sleepers
from millstream.options import FOREVER, as_index, boolean, check_timeout, integer, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from typing import Any

    from millstream.groups.of_stream import Groups
    from millstream.groups.sql_position import SqlPosition
    from millstream.sleepers import Sleepers

__all__ = ["Consumer"]

DELIVERIES = ("at_least_once", "at_most_once", "exactly_once")
SECONDS_MOST = 1e8  # three years


class Consumer(Assignment):
    """A member of a consumer group; made by `Stream.consumer`.

    Iterate over it, also with ``async for``, or call `poll`. Used by one thread at a time; the
    others of a process join with consumers of their own. Close it, or use it in a `with`.

    Attributes:
        stream: the stream.
        group: the `Group`.
        delivery: "at_least_once", "at_most_once" or "exactly_once".
    """

    def __init__(
        self,
        groups: Groups,
        group: str,
        *,
        start: Any,
        delivery: Any,
        auto_commit: bool,
        max_records: int | None,
        timeout: float | None,
        session: float,
        max_processing: float,
        on_lost: str,
        on_assign: Callable[[list[int]], object] | None,
        on_revoke: Callable[[list[int]], object] | None,
    ) -> None:
        self._closed = True  # until it is open
        _check(delivery, auto_commit, on_lost)
        session = number("session", session, 0.01, SECONDS_MOST)
        max_processing = number("max_processing", max_processing, 0.01, SECONDS_MOST)
        for name, callback in (("on_assign", on_assign), ("on_revoke", on_revoke)):
            if callback is not None and not callable(callback):
                raise InvalidType(f"{name} {callback!r}: expected a function of a list, or None")
        check_start(start)
        self._timeout = check_timeout(timeout)
        self._most = UNLIMITED if max_records is None else integer("max_records", max_records, 1)
        groups.stream.session.check_writable()
        self.delivery = delivery
        self._auto = auto_commit
        self._at = 0
        self._waiter: Sleepers | None = None
        first, transacted = delivery == "at_most_once", delivery == "exactly_once"
        while True:
            self.group: Group = groups.open(group, make=start)
            try:
                member = _native.Membership(self.group, session, max_processing, first)
                super().__init__(groups.stream, member, transacted, on_lost, on_assign, on_revoke)
                self._join()
                break
            except Closed:
                if not self.group.removed:
                    raise
                # Somebody removed the group between: it is made anew, as if that had come first.
        self._closed = False
        self._among = groups.consumers
        self._among.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"partitions {self.assignment}"
        return f"<Consumer of group {self.group.name!r} of {self.stream!r}: {state}>"

    # --- batches ----------------------------------------------------------------------------------

    def poll(self, timeout: float | None = 0.0) -> Batch | None:
        """The next batch, or None where none came in `timeout` seconds (None: wait for ever).

        Whoever does not call this for `max_processing` seconds loses the partitions. Callbacks run
        in here.

        Raises: OffsetOutOfRange, Fenced (with `auto_commit`), CorruptBatch, Closed.
        """
        checked = check_timeout(timeout)
        batch = self._next()
        if batch is not None:
            return batch
        deadline = time.monotonic() + (FOREVER if checked is None else checked)
        try:
            while batch is None and time.monotonic() < deadline:
                self._member.rest()
                self._rotation.wait(deadline)
                batch = self._next()
                if batch is None:
                    self.stream._point_out(self._rotation.began)
        finally:
            self._member.work()
        return batch

    def _next(self) -> Batch | None:
        """The next batch that is there."""
        member = self._member
        if self._closed:
            self._check_open()  # raises
        if self._auto and member.dirty:
            member.commit(False)
        due = self._due or self._untold or self._leaving or self._gone
        if member.begin() or due or self._sql is not None:
            if self._sql is not None:
                self._sql.follow()
            self._tend()
            if self._closed:
                self._check_open()  # a callback has closed it
        active = self._active
        for _ in range(len(active)):
            at = self._at = self._at + 1 if self._at + 1 < len(active) else 0
            one = active[at]
            batch = one.next(self._most)
            if len(active) > KEEP_MAPS:
                one.forget()
            if batch is None:
                continue
            if member.deliver(batch):
                return batch
            return self._next()  # the partition was lost before the batch could be committed
        return None

    def __iter__(self) -> Iterator[Batch]:
        """Batches, until none came for `timeout` seconds."""
        next_, poll = self._next, self.poll
        while True:
            batch = next_() or poll(self._timeout)
            if batch is None:
                self.stream._point_out()
                return
            yield batch

    async def apoll(self, timeout: float | None = 0.0) -> Batch | None:
        """`poll` for asyncio: waits without blocking the loop; cancelling it loses nothing."""
        checked = check_timeout(timeout)
        deadline = time.monotonic() + (FOREVER if checked is None else checked)
        batch = self._next()
        try:
            while batch is None and time.monotonic() < deadline:
                self._member.rest()
                await self._sleepers().wait(0, deadline)
                batch = self._next()
                if batch is None:
                    self.stream._point_out(self._rotation.began)
        finally:
            self._member.work()
        return batch

    def _sleepers(self) -> Sleepers:
        """The thread that sleeps for the loop that runs now."""
        with _native.loading:
            import asyncio
        waiter = self._waiter
        if waiter is None or waiter.over or waiter.loop is not asyncio.get_running_loop():
            if waiter is not None:
                waiter.stop()
            waiter = self._waiter = sleepers(self._rotation)
        return waiter

    async def __aiter__(self) -> AsyncIterator[Batch]:
        """Batches, until none came for `timeout` seconds, without blocking the loop."""
        with _native.loading:
            import asyncio
        while True:
            batch = await self.apoll(self._timeout)
            if batch is None:
                self.stream._point_out()
                return
            yield batch
            await asyncio.sleep(0)

    # --- positions --------------------------------------------------------------------------------

    def commit(self, batch: Batch | None = None, *, allow_backwards: bool = False) -> None:
        """Keep that all up to here was done: all that was handed out, or all up to a batch's end.

        Durability: at "process" and "interval" the position survives the death of any process when
        this returns; at "interval" also a power cut after the next completed sync; at "sync" it
        survives a power cut when this returns. After a power cut a position may be an earlier one,
        never a later.

        Args:
            batch: one that came from this consumer.
            allow_backwards: also where the group is behind it already.

        Raises: Fenced where the partition has another owner now; InvalidArgument where it would go
            backwards; Unsupported with delivery="exactly_once": use ``tx.commit(consumer)``.
        """
        if self.delivery == "exactly_once":
            raise Unsupported(
                f'{self.group.path}: delivery is "exactly_once": the position is committed by a'
                " transaction, tx.commit(consumer), or with what position_in gives"
            )
        if self._closed:
            self._check_open()  # raises
        boolean("allow_backwards", allow_backwards)
        if batch is None:
            self._member.commit(allow_backwards)
        elif isinstance(batch, Batch):
            offset = int(batch.next_offset)
            self._member.commit_at(batch.partition, batch.epoch, offset, allow_backwards)
        else:
            raise InvalidType(f"batch {batch!r}: expected a Batch")

    def seek(self, to: Any, *, partition: int | None = None) -> None:
        """Read on from somewhere else; the next commit keeps it, also backwards.

        Args:
            to: an offset (of one partition), a `Position`, a datetime, "earliest" or "latest".
            partition: one that is assigned; None: all that are (that of the `Position`).

        Raises: OffsetOutOfRange, InvalidArgument where the partition is not assigned.
        """
        self._refresh()
        if isinstance(to, Position) and partition is None:
            partition = int(to.partition)
        mine = sorted({*self._readers, *self._due})
        if partition is None and as_index(to) is not None and len(mine) > 1:
            raise InvalidArgument(f"to {to!r}: an offset is of one partition; say which")
        which = mine if partition is None else [self._mine(partition)]
        goals = [position_at(self.stream, index, to) for index in which]
        for goal in goals:
            self._start_reader(int(goal.partition), goal, sought=True)
        self._choose()

    def rewind(self) -> None:
        """Read on from the committed positions: what was handed out since comes again."""
        self._refresh()
        self._give_back()
        self._start_readers()

    def _give_back(self) -> None:
        """What was handed out was not done: nothing of it is to be committed."""
        self._member.forgive()
        for partition in list(self._readers):
            self._member.forget(partition)
            self._due.add(partition)
            del self._readers[partition]
        self._choose()

    def _rewind(self) -> None:
        """`rewind` for a transaction that is over: what it would raise, the next batch raises."""
        self._give_back()
        with contextlib.suppress(MillstreamError):
            self._refresh()
            self._start_readers()

    def pause(self, *partitions: int) -> None:
        """Give no batches of these partitions (of all that are assigned), but stay their owner."""
        self._refresh()
        which = partitions or tuple({*self._readers, *self._due})
        self._paused.update(self._mine(partition) for partition in which)
        self._choose()

    def resume(self, *partitions: int) -> None:
        """Give batches of these partitions (of all) again, also of those that are not assigned."""
        self._check_open()
        most = self.stream.partitions - 1
        which = [integer("partition", partition, 0, most) for partition in partitions]
        self._paused.difference_update(which or tuple(self._paused))
        self._choose()

    @property
    def paused(self) -> list[int]:
        """The partitions that `pause` named, sorted."""
        return sorted(self._paused)

    @property
    def assignment(self) -> list[int]:
        """The partitions that are this consumer's now, sorted."""
        return [] if self._closed else self._member.assigned()

    @property
    def position(self) -> dict[int, Position]:
        """What comes next in each partition that was taken up: behind what was handed out."""
        found = [] if self._closed else self._member.positions()
        return {index: Position(*one) for one in found if (index := one[0]) in self._readers}

    @property
    def committed(self) -> dict[int, Position | None]:
        """The committed position of each assigned partition; None: there is none, so offset 0."""
        return {partition: self.group._committed(partition) for partition in self.assignment}

    def lag(self, partition: int | None = None) -> int:
        """Records that are not committed: of one partition, or of all that are assigned."""
        self.group._keep_up()
        which: Iterable[int] = self.assignment if partition is None else [partition]
        return sum(self.group._lag(index) for index in which)

    def position_in(self, connection: sqlite3.Connection) -> SqlPosition:
        """Keep the position in the user's own SQLite database, within their transactions.

        Effects and position are then committed once, both or neither. From here on the consumer
        begins where the database says, and ``commit`` of what this returns writes there.

        Args:
            connection: used by the thread that uses the consumer, now and while a batch is asked
                for, when it must not be within a transaction.

        Raises: InvalidArgument; what sqlite3 raises.
        """
        with _native.loading:
            from millstream.groups.sql_position import SqlPosition
        self._sql = SqlPosition(self, connection)
        self.rewind()
        return self._sql

    # --- the end ----------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Is it closed?"""
        return self._closed

    def close(self) -> None:
        """Leave the group; the others have its partitions at once. Commits nothing.

        `on_revoke` is called first, and may commit.
        """
        if self._closed:
            return
        told, self._on_revoke = self._on_revoke, None  # it may close the consumer itself
        try:
            mine = sorted(self._readers)
            if mine and told is not None and not self.group.closed:
                told(mine)
        finally:
            self._abandon()
            self._member.leave()
            if not self.stream.closed:
                self.stream._wake()

    def _abandon(self) -> None:
        self._closed = True
        self._among.discard(self)
        self._readers.clear()
        self._choose()
        if self._waiter is not None:
            self._waiter.stop()

    def __enter__(self) -> Consumer:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._auto and raised[0] is None and not self._closed and self._member.dirty:
            try:
                self._member.commit(False)
            finally:
                self.close()
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self.group.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._on_revoke = None
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a consumer is a member of its process: join the group there")


def _check(delivery: object, auto_commit: object, on_lost: object) -> None:
    if not isinstance(delivery, str) or delivery not in DELIVERIES:
        raise InvalidArgument(f"delivery {delivery!r}: expected one of {', '.join(DELIVERIES)}")
    if boolean("auto_commit", auto_commit) and delivery == "exactly_once":
        raise InvalidArgument(
            'auto_commit: with delivery="exactly_once" the position is committed by a transaction'
        )
    if not isinstance(on_lost, str) or on_lost not in ("raise", "earliest"):
        raise InvalidArgument(f'on_lost {on_lost!r}: expected "raise" or "earliest"')


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Consumer.__module__ = "millstream"
