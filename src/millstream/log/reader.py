"""Reading: from where, how far, and waiting for more."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator

from millstream import _native, timestamps
from millstream._native import Batch, Cursor, Position
from millstream.errors import InvalidArgument, InvalidType, NotFound, OffsetOutOfRange
from millstream.log import recovery
from millstream.log.control import POISON_CORRUPT
from millstream.options import FOREVER, as_index, boolean, check_timeout, integer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from millstream.log.handle import StreamHandle
    from millstream.log.partition import PartitionLog
    from millstream.sleepers import Sleepers

    Asked: TypeAlias = "tuple[list[PartitionReader], bool, int]"
    """Readers, whether partitions that are added join them, and how many records at most."""

UNLIMITED = 1 << 62
KEEP_MAPS = 16


def extend_private(log: PartitionLog) -> None:
    """A read-only opener without members to tell it the tail walks on from where it was."""
    recovery.extend(log)


def offset_at(log: PartitionLog, timestamp: int) -> int:
    """First offset with a timestamp at or after this one."""
    while True:
        try:
            return _offset_at(log, timestamp)
        except NotFound as error:  # retention was faster: begin at what is left
            if not log.segments.not_found(error):
                raise


def _offset_at(log: PartitionLog, timestamp: int) -> int:
    # Before the numbers: what is appended later may lie in a segment that they do not have.
    tail, following, _, _ = log.end()
    numbers = log.segments.current()
    low, high = 0, max(len(numbers) - 1, 0)
    while low < high:
        # A successor's record says the largest timestamp of all before it.
        middle = (low + high) // 2
        if log.segments.activated(numbers[middle + 1]).timestamp_max < timestamp:
            low = middle + 1
        else:
            high = middle
    for i in range(low, len(numbers)):
        last = i + 1 == len(numbers)
        end = tail if last else log.segments.activated(numbers[i + 1]).base_position
        found = log.segments.activated(numbers[i]).find_timestamp(timestamp, end)
        if found is not None:
            return int(found)
    return following


def epoch_end(log: PartitionLog, epoch: int) -> int | None:
    """The offset behind all that an epoch, and those before it, have kept; None: it goes on."""
    numbers = log.segments.current()
    try:
        at = bisect_right(numbers, epoch, key=lambda number: log.segments.activated(number).epoch)
        return log.segments.base(numbers[at])[1] if at < len(numbers) else None
    except NotFound as error:
        if not log.segments.not_found(error):
            raise
    return epoch_end(log, epoch)


def is_held(log: PartitionLog, epoch: int, offset: int) -> bool:
    """Does the log of an epoch reach to an offset? Else a power cut took what lay before it."""
    end = epoch_end(log, epoch)
    return offset <= (log.next_offset if end is None else end)


def check_epoch(log: PartitionLog, epoch: int, offset: int) -> None:
    """Raise where an offset is not the one that an epoch had: a power cut took what was there."""
    found = log.segments.locate_offset(offset)
    if found is None or found[0].epoch == epoch:
        return
    if found[0].epoch > epoch and offset == epoch_end(log, epoch):
        return  # the first record after all that its epoch had
    raise log.out_of_range(
        offset, f" of epoch {epoch} was lost; what is there now is of epoch {found[0].epoch}"
    )


def check_record(log: PartitionLog, epoch: int, offset: int) -> None:
    """Raise where a record was lost, also where another has its offset now."""
    found = log.segments.locate_offset(offset)
    if found is not None and found[0].epoch != epoch:
        raise log.out_of_range(
            offset, f" of epoch {epoch} was lost; what is there now is of epoch {found[0].epoch}"
        )


def place(log: PartitionLog, epoch: int | None, offset: int) -> tuple[_native.Segment, int]:
    """The segment that has a record, and where its batches end; the next `get` finds it at once.

    Raises: OffsetOutOfRange, CorruptBatch.
    """
    while True:
        structure = log.native.structure
        if not log.first_offset <= offset < log.next_offset:
            if offset >= log.next_offset and log.native.poison == POISON_CORRUPT:
                raise log.corrupt()
            raise log.out_of_range(offset)
        try:
            if epoch is not None:
                check_record(log, epoch, offset)
            found = log.segments.locate_offset(offset)
            if found is None:  # retention came between
                continue
            segment, end = found
            # On an overlay it may have to be mapped anew.
            if not log.session.layered:
                numbers = log.segments.current()
                at = bisect_right(numbers, segment.number)
                sealed_at = log.segments.base(numbers[at])[0] if at < len(numbers) else 0
                log.native.place(segment, sealed_at, structure)
            return segment, end
        except NotFound as error:
            if not log.segments.not_found(error):
                raise


class PartitionReader:
    """One reader's place in one partition."""

    def __init__(self, log: PartitionLog, start: Any, *, durable: bool, on_lost: str) -> None:
        self.log = log
        self.durable = durable
        self.on_lost = on_lost
        self.cursor = Cursor(0, 0)
        self._segment: Any = None
        self._end = 0
        self._salt = 0
        while True:
            try:
                self._go_to(self._offset_of(start))
                return
            except OffsetOutOfRange:
                named = isinstance(start, str) or timestamps.is_time(start)
                if not named or log.stream.closed:
                    raise  # else retention came between the check and the step

    def _offset_of(self, start: Any) -> int:
        log = self.log
        if type(start) is int:
            return start
        if isinstance(start, str):
            if start == "earliest":
                return log.first_offset
            if start == "latest":
                return int(log.native.durable_offset) if self.durable else log.next_offset
            raise InvalidArgument(
                f'start {start!r}: expected an offset, a Position, a datetime, "earliest" or'
                ' "latest"'
            )
        if isinstance(start, Position):
            self._check_epoch(start)
            return int(start.offset)
        if timestamps.is_time(start):
            return offset_at(log, timestamps.microseconds(start))
        offset = as_index(start)
        if offset is None:
            raise InvalidType(
                f'start {start!r}: expected an offset, a Position, a datetime, "earliest" or'
                ' "latest"'
            )
        return offset

    def _check_epoch(self, start: Position) -> None:
        """Refuse an offset that a power cut took, and that another record got."""
        check_epoch(self.log, start.epoch, start.offset)

    def _go_to(self, offset: int) -> None:
        log = self.log
        if not 0 <= offset < UNLIMITED or not log.native.holds(offset):
            first, following = log.first_offset, log.next_offset
            if offset > following and log.native.poison == POISON_CORRUPT:
                raise log.corrupt()
            if not first <= offset <= following:
                if self.on_lost != "earliest":
                    raise log.out_of_range(offset)
                offset = first
        while True:
            try:
                found = log.segments.locate_offset(offset)
                if found is None and offset >= log.first_offset:
                    self.cursor.move(
                        0
                        if not log.segments.current()
                        else log.segments.activated(log.segments.current()[0]).base_position,
                        offset,
                    )
                    return
                if found is not None:
                    segment, end = found
                    if self.cursor.seek(segment, offset, end):
                        self._segment, self._end, self._salt = segment, end, segment.salt
                    return
            except NotFound as error:
                if not log.segments.not_found(error):
                    raise
            if offset < log.first_offset:  # retention came between
                if self.on_lost != "earliest":
                    raise log.out_of_range(offset)
                offset = log.first_offset

    def limit(self) -> int:
        """Position to read up to."""
        native = self.log.native
        return int(native.durable if self.durable else native.tail)

    def ready(self) -> bool:
        """Is there something to read?"""
        return self.cursor.position < self.limit()

    def forget(self) -> None:
        """Hold no map between batches.

        A map is a descriptor, and there may be readers of many partitions.
        """
        self._segment = None

    def next(self, most: int) -> Batch | None:
        """The next batch of at most `most` records, or None at the end."""
        cursor, log = self.cursor, self.log
        while True:
            if log.stream.closed:
                log.stream._check_live()  # which says why
            limit = self.limit()
            position = cursor.position
            if position >= limit:
                log.stream._keep_up()
                if log.native.poison == POISON_CORRUPT:
                    raise log.corrupt()
                return None
            segment = self._segment
            if segment is None or not segment.base_position <= position < self._end:
                if self._has_grown(position):
                    self._end = limit
                elif not self._enter(position):
                    continue
                segment = self._segment
            batch: Batch | None = cursor.next(segment, min(self._end, limit), most)
            if batch is not None:
                return batch
            # Nothing but fillers were left before the end.

    def _has_grown(self, position: int) -> bool:
        """Is the segment that was read last the active one still? Then it goes on to the limit.

        The limit was read before: the core says which segment is active, then moves the tail into
        it.
        """
        segment, log = self._segment, self.log
        return (
            segment is not None
            and segment.number == log.native.active_number
            and segment.base_position <= position
            and not log.session.layered  # where the map may have to be another
        )

    def _enter(self, position: int) -> bool:
        """Find the segment of the position; False where retention came first: the cursor moved."""
        log = self.log
        log.stream._check_live()
        found = log.segments.locate(position)
        if found is None:
            if self.on_lost == "earliest":
                self._go_to(log.first_offset)
                return False
            raise log.out_of_range(self.cursor.offset, " was removed by retention")
        segment, self._end = found
        self._segment = segment
        if segment.salt != self._salt and position != segment.base_position:
            # Compaction put another file there: its batches begin elsewhere.
            self.cursor.seek(segment, self.cursor.offset, self._end)
        self._salt = segment.salt
        return True


def _readers(
    stream: StreamHandle, partition: int | None, start: Any, durable: bool, on_lost: Any
) -> tuple[list[PartitionReader], bool]:
    if not isinstance(on_lost, str) or on_lost not in ("raise", "earliest"):
        raise InvalidArgument(f'on_lost {on_lost!r}: expected "raise" or "earliest"')
    boolean("durable", durable)
    if isinstance(start, Position):
        if partition is not None and partition != start.partition:
            raise InvalidArgument(f"start {start!r} is not of partition {partition}")
        partition = start.partition
    which = range(stream.partitions) if partition is None else [partition]
    readers = []
    for index in which:
        readers.append(PartitionReader(stream._log(index), start, durable=durable, on_lost=on_lost))
        if len(which) > KEEP_MAPS:
            readers[-1].forget()
    return readers, partition is None


def _most(follow: bool, timeout: float | None, max_records: int | None) -> int:
    boolean("follow", follow)
    check_timeout(timeout)
    if max_records is None:
        return UNLIMITED
    return min(UNLIMITED, integer("max_records", max_records, 0))


class Rotation:
    """The readers of a `read`, asked in turn."""

    def __init__(self, stream: StreamHandle, readers: list[PartitionReader], grows: bool) -> None:
        self.stream = stream
        self.readers = readers
        self.grows = grows
        self.began = time.monotonic()

    def round(self, left: int) -> Iterator[Batch]:
        """Yield at most a batch of each reader, `left` records in all."""
        for one in self.readers:
            if left <= 0:
                return
            batch = one.next(left)
            if len(self.readers) > KEEP_MAPS:
                one.forget()
            if batch is not None:
                left -= len(batch)
                yield batch

    def ready(self) -> bool:
        """Return whether a reader has something."""
        return any(one.ready() for one in self.readers)

    def over(self) -> bool:
        """Is there nothing left to wait for? Whoever makes it so wakes the stream afterwards."""
        return self.stream.closed or self.stream._state != 1

    def refresh(self) -> None:
        """Between waits: follow partitions that were added; raise where the stream was dropped."""
        stream = self.stream
        stream._keep_up()
        stream._point_out(self.began)
        for one in self.readers:
            if one.log.private:
                extend_private(one.log)
        if self.grows:
            for index in range(len(self.readers), stream.partitions):
                first = self.readers[0]
                self.readers.append(
                    PartitionReader(
                        stream._log(index), "earliest", durable=first.durable, on_lost=first.on_lost
                    )
                )

    def wait(self, deadline: float) -> None:
        """Sleep until there may be something, or the deadline."""
        stream = self.stream
        seen = stream._prepare_wait()
        if self.ready() or self.over():
            return
        if self.grows and stream.partitions > len(self.readers):
            return
        left = min(deadline - time.monotonic(), 1.0)
        if left <= 0:
            return
        if self.readers and self.readers[0].durable:
            # Durability has a wake word a partition; it comes within a sync, so wake often enough.
            one = self.readers[0]
            one.log.native.wait_durable(one.limit() + 1, min(left, 0.02))
        else:
            stream._wait(seen, left)


def asked(
    stream: StreamHandle,
    partition: int | None,
    start: Any,
    follow: bool,
    timeout: float | None,
    max_records: int | None,
    durable: bool,
    on_lost: str,
) -> Asked:
    """Check what `Stream.read` was asked for: at the call, not at the first batch."""
    left = _most(follow, timeout, max_records)
    return *_readers(stream, partition, start, durable, on_lost), left


def read(
    stream: StreamHandle, asked: Asked, follow: bool, timeout: float | None
) -> Iterator[Batch]:
    """`Stream.read`."""
    readers, grows, left = asked
    if len(readers) == 1 and not follow:
        return _read_one(readers[0], left)
    return _read(Rotation(stream, readers, grows), left, follow, timeout)


def _read_one(one: PartitionReader, left: int) -> Iterator[Batch]:
    """One partition to its tail: what was there at the call, and what came while reading."""
    while left > 0:
        batch = one.next(left)
        if batch is None:
            return
        left -= len(batch)
        yield batch


def _read(rotation: Rotation, left: int, follow: bool, timeout: float | None) -> Iterator[Batch]:
    quiet_until = _quiet_until(timeout)
    while left > 0:
        some = False
        for batch in rotation.round(left):
            some = True
            left -= len(batch)
            yield batch
        if some:
            quiet_until = _quiet_until(timeout)
            continue
        if not follow or time.monotonic() >= quiet_until:
            return
        rotation.wait(quiet_until)
        if not rotation.ready():
            rotation.refresh()


def _quiet_until(timeout: float | None) -> float:
    return time.monotonic() + (FOREVER if timeout is None else timeout)


async def aread(
    stream: StreamHandle, asked: Asked, follow: bool, timeout: float | None
) -> AsyncIterator[Batch]:
    """`Stream.aread`."""
    with _native.loading:
        import asyncio
    readers, grows, left = asked
    rotation = Rotation(stream, readers, grows)
    quiet_until = _quiet_until(timeout)
    waiter = sleepers(rotation)
    try:
        while left > 0:
            some = False
            for batch in rotation.round(left):
                some = True
                left -= len(batch)
                yield batch
            if some:
                quiet_until = _quiet_until(timeout)
                await asyncio.sleep(0)
                continue
            if not follow or time.monotonic() >= quiet_until:
                return
            await waiter.wait(0, quiet_until)
            if not rotation.ready():
                rotation.refresh()
    finally:
        waiter.stop()


def sleepers(rotation: Rotation) -> Sleepers:
    """The thread that sleeps for coroutines of the running loop until a reader may have a batch."""
    with _native.loading:
        from millstream.sleepers import Sleepers
    return Sleepers(
        "millstream-aread",
        lambda _, seconds: rotation.wait(time.monotonic() + seconds),
        rotation.stream._wake,
    )
