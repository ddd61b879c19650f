"""Streams on RabbitMQ: the partitions of a super stream, publishing ids, subscriptions."""

from __future__ import annotations

import errno
import itertools
import os
import time
from typing import TYPE_CHECKING, Any

from rstream.exceptions import ServerError, StreamDoesNotExist

from millstream import PartitionStats, StreamStats, _native, timestamps
from millstream._native import Position, Record, Span, batch_of, xxh3_64
from millstream.engines.rabbitmq import records
from millstream.engines.rabbitmq.capabilities import FRAME_BYTES
from millstream.engines.rabbitmq.wire import Cursor
from millstream.engines.stream import ServerProducer, ServerStream, joined, sequences_of
from millstream.errors import (
    Indeterminate,
    InvalidArgument,
    InvalidType,
    LimitExceeded,
    MillstreamError,
    NotFound,
    OffsetOutOfRange,
    StorageError,
)
from millstream.options import Retention, as_index, check_timeout, integer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from millstream import Batch
    from millstream.engines.rabbitmq.connection import RabbitConnection
    from millstream.engines.rabbitmq.groups import RabbitConsumer, RabbitGroup
    from millstream.engines.rabbitmq.store import RabbitStore
    from millstream.engines.rabbitmq.wire import Wire
    from millstream.options import Durability

BATCH_MOST = 10_000
"""Records of one entry, and of one batch that is read."""
CHUNK_SECONDS = 10.0
ENTRY_BYTES = 12


class RabbitStream(ServerStream):
    """A stream on a RabbitMQ server; made by `RabbitStore.stream`. Thread-safe."""

    store: RabbitStore
    _connection: RabbitConnection

    def __init__(
        self,
        store: RabbitStore,
        name: str,
        settings: dict[str, Any],
        durability: Durability,
        consent: frozenset[str],
    ) -> None:
        self.store = store
        self.name = name
        self.durability = durability
        self.partitions = int(settings["partitions"])
        self.retention = Retention(**settings["retention"])
        self._consent = consent
        self._turn = itertools.count()
        self._connection = store.connection
        self._tag = os.urandom(8)
        self._tags = itertools.count(1)

    def __repr__(self) -> str:
        return f"<RabbitStream {self.name!r} of {self.store.path!r}: {self.partitions} partitions>"

    def part(self, partition: int) -> str:
        """The name of the server's stream of a partition."""
        index = integer("partition", partition, 0)
        if index >= self.partitions:
            raise NotFound(f"stream {self.name!r}: there is no partition {index}")
        return f"{self.name}.{index}"

    def where(self, partition: int) -> str:
        """What errors call a partition."""
        return f"{self.store.path}, stream {self.name!r}, partition {partition}"

    # --- appending --------------------------------------------------------------------------------

    def append_many(
        self,
        values: Any,
        *,
        keys: Any = None,
        headers: Any = None,
        timestamps: Any = None,
        partition: int | None = None,
        durability: Durability | None = None,
        timeout: float | None = None,
    ) -> list[Span]:
        """Append records; those of a partition that fit in a frame are seen whole or not at all."""
        check_timeout(timeout)
        rows = self.rows_of(values, keys, headers, timestamps, durability)
        shares: dict[int, list[Row]] = {}
        turn: int | None = None
        for row in rows:
            index = partition
            if index is not None:
                self.part(index)
            elif row.key is not None:
                index = xxh3_64(row.key) % self.partitions
            else:
                if turn is None:
                    turn = next(self._turn) % self.partitions
                index = turn
            shares.setdefault(int(index), []).append(row)
        spans: list[Span] = []
        for index, share in sorted(shares.items()):
            for part in parts_of(share):
                try:
                    spans.append(self._connection.call(self._store(index, part)))
                except MillstreamError as error:
                    error.appended = tuple(spans)
                    raise
                except ServerError as error:
                    raise self.gone(index, error) from error
        return joined(spans)

    async def _store(self, index: int, part: Sequence[Row]) -> Span:
        """Store rows as one entry, and find out where it is."""
        wire = await self._connection.wire()
        name = self.part(index)
        tag = self._tag + next(self._tags).to_bytes(4, "big")
        _, since = await wire.bounds(name)
        outlet = await wire.outlet(name, "")
        messages = [part[0].encoded(tag), *(row.encoded(b"") for row in part[1:])]
        try:
            await outlet.send(messages)
            found = await self.find(wire, name, since, {tag})
        except (TimeoutError, OSError) as error:
            raise self._connection.unsure(self.where(index)) from error
        return Span(index, 1, found[0], len(part))

    async def find(self, wire: Wire, name: str, since: int, tags: set[bytes]) -> list[int]:
        """Offsets of the records with these tags, which are stored; a re-send may be missing."""
        _, end = await wire.bounds(name)
        found: list[int] = []
        cursor = Cursor(wire, name)
        await cursor.begin(since)
        at = since
        try:
            while at < end and len(found) < len(tags):
                chunk = await cursor.chunk(CHUNK_SECONDS)
                if chunk is None:
                    break
                for number, data in enumerate(chunk.messages()):
                    if records.Stored(0, 0, data).tag in tags:
                        found.append(chunk.first + number)
                at = chunk.first + chunk.count
        finally:
            await cursor.close()
        return found

    def rows_of(
        self, values: Any, keys: Any, headers: Any, times: Any, durability: Durability | None
    ) -> list[Row]:
        """What is to be sent, checked as every append is: nothing was sent yet."""
        self._connection.check_open()
        self.store.check_writable()
        if durability is not None:
            self.store.level(durability, "stream")
        if not hasattr(values, "__len__"):
            values = list(values)
        if len(values) == 0:
            return []
        made: Any = 0
        if times is not None:
            made = timestamps.column(times, len(values))
        batch = batch_of(0, 1, 0, values, keys=keys, headers=headers, timestamps=made)
        stamps = itertools.repeat(None) if times is None else batch.timestamps.tolist()
        all_headers = itertools.repeat(None) if headers is None else batch.headers
        rows = []
        for value, key, given, stamp in zip(
            batch.values, batch.keys, all_headers, stamps, strict=False
        ):
            row = Row(value, key, given, stamp)
            if row.size > FRAME_BYTES:
                raise LimitExceeded(
                    f"a record of {row.size} bytes with its headers: {self.store.engine} at"
                    f" {self.store.path} takes {FRAME_BYTES} in a frame; keep it elsewhere, and"
                    " append where"
                )
            rows.append(row)
        return rows

    def producer(self, id: str) -> RabbitProducer:
        """The producer of that id, 1 to 128 characters."""
        if not isinstance(id, str):
            raise InvalidType(f"producer id {id!r}: expected str")
        if not 1 <= len(id) <= 128:
            raise InvalidArgument(f"producer id {id!r:.80}: expected 1 to 128 characters")
        return RabbitProducer(self, id)

    # --- reading ----------------------------------------------------------------------------------

    def gone(self, partition: int, error: Exception) -> MillstreamError:
        """What an error of the server means for a partition."""
        if getattr(error, "code", None) == StreamDoesNotExist.code or "removed" in str(error):
            return NotFound(f"{self.store.path}: there is no stream {self.name!r} any more")
        return StorageError(errno.EIO, f"the server refused: {error!r}", self.where(partition))

    def bounds(self, partition: int) -> tuple[int, int]:
        """First and next offset."""
        name = self.part(partition)

        async def ask() -> tuple[int, int]:
            return await (await self._connection.wire()).bounds(name)

        self._connection.check_open()
        try:
            return self._connection.call(ask())
        except ServerError as error:
            raise self.gone(partition, error) from error

    def first_offset(self, partition: int) -> int:
        """Offset of the oldest record that there is."""
        return self.bounds(partition)[0]

    def next_offset(self, partition: int) -> int:
        """Offset that the next record will get."""
        return self.bounds(partition)[1]

    def stats(self) -> StreamStats:
        """Offsets of the stream and each partition, as of now; the server tells no bytes."""
        parts = []
        for index in range(self.partitions):
            first, following = self.bounds(index)
            count = following - first
            parts.append(
                PartitionStats(index, first, following, following, count, 0, 0, 1, "sound")
            )
        return StreamStats(
            self.name, self.durability, self.retention, 0, sum(part.records for part in parts),
            0, 0, tuple(parts),
        )  # fmt: skip

    def places(self) -> Places:
        """Where a consumer reads."""
        return Places(self)

    def fetch(self, partition: int, offset: int, most: int) -> list[records.Stored]:
        """Records from an offset on, at most `most`; none where there is none yet."""
        if self.bounds(partition)[1] <= offset:
            return []
        with Reader(self, partition, offset) as reader:
            return reader.read(most, LOOK_SECONDS)

    @staticmethod
    def batch(partition: int, found: list[records.Stored]) -> Batch:
        """The batch of some records that lie one behind the other."""
        return records.batch(partition, found)

    def get(self, partition: int | Position, offset: int | None = None, /) -> Record:
        """One record. Raises OffsetOutOfRange."""
        if isinstance(partition, Position):
            return self.get(partition.partition, partition.offset)
        index = integer("offset", offset, 0)
        first, following = self.bounds(partition)
        found: list[records.Stored] = []
        if first <= index < following:
            with Reader(self, partition, index) as reader:
                found = reader.read(1, CHUNK_SECONDS)
        if not found or found[0].offset != index:
            raise self._out_of_range(partition, index)
        return _native.records_of(records.batch(partition, found))[0]

    def _out_of_range(self, partition: int, offset: int) -> OffsetOutOfRange:
        first, following = self.bounds(partition)
        return OffsetOutOfRange(
            f"stream {self.name!r}, partition {partition}: offset {offset} is not there;"
            f" there are {first} to {following - 1}",
            partition=partition, first=first, next=following,
        )  # fmt: skip

    def resolve(self, partition: int, start: Any, on_lost: str = "raise") -> int:
        """The offset that a start means in a partition. Raises OffsetOutOfRange."""
        if isinstance(start, str):
            if start not in ("earliest", "latest"):
                raise InvalidArgument(f'start {start!r}: expected "earliest" or "latest"')
            return self.bounds(partition)[0 if start == "earliest" else 1]
        if timestamps.is_time(start):
            return self.offset_at(start, partition)
        offset = int(start.offset) if isinstance(start, Position) else as_index(start)
        if offset is None:
            raise InvalidType(f"start {start!r}: expected an offset, a Position, a datetime")
        first, following = self.bounds(partition)
        if offset < 0:
            raise InvalidArgument(f"start {offset}: cannot be negative")
        if offset < first and on_lost == "earliest":
            return first
        if not first <= offset <= following:
            raise self._out_of_range(partition, offset)
        return offset

    def _read(
        self, at: dict[int, int], follow: bool, timeout: float | None, most: int
    ) -> Iterator[Batch]:
        readers = {index: Reader(self, index, offset) for index, offset in at.items()}
        ends = {} if follow else {index: self.bounds(index)[1] for index in at}
        waited = time.monotonic()
        try:
            while most > 0 and readers:
                idle = True
                for index, reader in list(readers.items()):
                    wanted = min(most, BATCH_MOST)
                    if not follow:
                        if reader.at >= ends[index]:
                            readers.pop(index).close()
                            continue
                        wanted = min(wanted, ends[index] - reader.at)
                    alone = not follow or len(readers) == 1
                    found = reader.read(wanted, LOOK_SECONDS if alone else 0.0)
                    if found:
                        idle = False
                        most -= len(found)
                        yield records.batch(index, found)
                        waited = time.monotonic()
                    elif not follow:  # the rest is no record: somebody keeps offsets in there
                        readers.pop(index).close()
                    if most <= 0:
                        return
                if idle:
                    if timeout is not None and time.monotonic() - waited >= timeout:
                        return
                    if len(readers) > 1:
                        time.sleep(POLL_SECONDS)
        finally:
            for reader in readers.values():
                reader.close()

    def offset_at(self, timestamp: Any, partition: int) -> int:
        """Offset of the first record at or after a time: the partition is read from its start."""
        self._refuse("stream.start_at_time")
        wanted = timestamps.microseconds(timestamp)
        first, following = self.bounds(partition)
        with Reader(self, partition, first) as reader:
            while reader.at < following:
                found = reader.read(BATCH_MOST, LOOK_SECONDS)
                if not found:
                    break
                for one in found:
                    if one.timestamp >= wanted:
                        return one.offset
        return following

    def delete_before(self, position: Position) -> int:
        """Raise Unsupported."""
        raise self.store.capabilities.refusal("stream.delete_before")

    def add_partitions(self, count: int) -> None:
        """Raise Unsupported."""
        raise self.store.capabilities.refusal("stream.add_partitions")

    # --- groups -----------------------------------------------------------------------------------

    def consumer(
        self,
        group: str,
        *,
        start: Any = "earliest",
        delivery: Any = "at_least_once",
        auto_commit: bool = False,
        max_records: int | None = None,
        timeout: float | None = None,
        session: float = 10.0,
        max_processing: float = 300.0,
        on_lost: Any = "raise",
        create: bool = True,
    ) -> RabbitConsumer:
        """Join a consumer group; see `millstream.Stream.consumer`."""
        from millstream.engines.rabbitmq.groups import RabbitConsumer

        if delivery == "exactly_once":
            raise self.store.capabilities.refusal("stream.transaction")
        return RabbitConsumer(
            self, group, start, delivery, auto_commit, max_records, timeout, session,
            max_processing, on_lost, create,
        )  # fmt: skip

    def groups(self) -> list[str]:
        """Names of the consumer groups, sorted."""
        from millstream.engines.rabbitmq import groups

        return groups.names(self)

    def group(self, name: str) -> RabbitGroup:
        """A consumer group. Raises NotFound."""
        from millstream.engines.rabbitmq.groups import RabbitGroup

        return RabbitGroup(self, name)


LOOK_SECONDS = 2.0
"""How long a record that is there may take."""
POLL_SECONDS = 0.01


class Reader:
    """A place in a partition, from which it reads on. For one thread."""

    def __init__(self, stream: RabbitStream, partition: int, offset: int) -> None:
        self._stream = stream
        self._partition = partition
        self._name = stream.part(partition)
        self.at = offset
        self._cursor: Cursor | None = None
        self._rest: list[records.Stored] = []

    def read(self, most: int, seconds: float) -> list[records.Stored]:
        """At most so many records; none where none came in time."""
        connection = self._stream.store.connection
        if not self._rest:
            try:
                self._rest = connection.call(self._more(most, seconds), seconds + CHUNK_SECONDS)
            except ServerError as error:
                raise self._stream.gone(self._partition, error) from error
        found, self._rest = self._rest[:most], self._rest[most:]
        if found:
            self.at = found[-1].offset + 1
        return found

    async def _more(self, most: int, seconds: float) -> list[records.Stored]:
        wire = await self._stream.store.connection.wire()
        if self._cursor is None or self._cursor.ended is not None:
            self._cursor = Cursor(wire, self._name)
            await self._cursor.begin(self.at)
            seconds = max(seconds, 0.05)
        found: list[records.Stored] = []
        while len(found) < most and (chunk := await self._cursor.chunk(seconds)) is not None:
            for number, data in enumerate(chunk.messages()):
                if chunk.first + number >= self.at:
                    found.append(records.Stored(chunk.first + number, chunk.time, data))
            if found:
                seconds = 0.0
        return found

    def close(self) -> None:
        """Let go of it."""
        cursor, self._cursor = self._cursor, None
        connection = self._stream.store.connection
        if cursor is not None and not self._stream.store.closed:
            connection.call(cursor.close())

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class Places:
    """Where a consumer reads in each partition: readers that go on."""

    def __init__(self, stream: RabbitStream) -> None:
        self._stream = stream
        self._readers: dict[int, Reader] = {}

    def fetch(self, partition: int, offset: int, most: int) -> list[records.Stored]:
        """Records from an offset on, at most `most`; none where there is none yet."""
        reader = self._readers.get(partition)
        if reader is None or reader.at != offset:
            if reader is not None:
                reader.close()
            reader = self._readers[partition] = Reader(self._stream, partition, offset)
        return reader.read(most, 0.0)

    def close(self) -> None:
        """Let go of them."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


class Row:
    """A record that is to be sent."""

    __slots__ = ("_given", "key", "size")

    def __init__(
        self, value: bytes | None, key: bytes | None, headers: Any, timestamp: int | None
    ) -> None:
        self.key = key
        self._given = value, key, headers, timestamp
        named = sum(len(name.encode()) + len(item) + 15 for name, item in (headers or {}).items())
        self.size = len(value or b"") + len(key or b"") + named + 120

    def encoded(self, tag: bytes) -> bytes:
        """The message."""
        return records.encoded(*self._given, tag)


def parts_of(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Rows that go in one frame each."""
    begin = size = 0
    for at, row in enumerate(rows):
        if at > begin and (size + row.size > FRAME_BYTES or at - begin >= BATCH_MOST):
            yield rows[begin:at]
            begin, size = at, 0
        size += row.size
    if rows:
        yield rows[begin:]


class RabbitProducer(ServerProducer):
    """A producer: the server drops what has a publishing id that it had before.

    A publishing id is one more than the sequence. What is dropped is confirmed all the same, so
    what was stored is looked for. Made by `RabbitStream.producer`.
    """

    def __init__(self, stream: RabbitStream, id: str) -> None:
        stream.store.check_writable()
        self.stream = stream
        self.id = id
        self._connection = stream.store.connection

    def __repr__(self) -> str:
        return f"<RabbitProducer {self.id!r} of stream {self.stream.name!r}>"

    def _last(self, index: int) -> int:
        """The last sequence in a partition, by the server."""
        name = self.stream.part(index)

        async def ask() -> int:
            wire = await self._connection.wire()
            return int(await wire.query_publisher_sequence(name, self.id)) - 1

        self._connection.check_open()
        return self._connection.call(ask())

    @property
    def last_sequences(self) -> tuple[int, ...]:
        """The last sequence in each partition; -1: none."""
        return tuple(self._last(index) for index in range(self.stream.partitions))

    def append_many(
        self,
        values: Any,
        *,
        first_sequence: int | None = None,
        sequences: Any = None,
        keys: Any = None,
        headers: Any = None,
        timestamps: Any = None,
        partition: int | None = None,
        durability: Durability | None = None,
        timeout: float | None = None,
    ) -> list[Span]:
        """Append those whose sequence is above the last one of their partition.

        Records without a key need a `partition` where there are several: sent again, they have to
        come to the same.
        """
        rows = self.stream.rows_of(values, keys, headers, timestamps, durability)
        numbers = sequences_of(first_sequence, sequences, len(rows))
        shares: dict[int, list[tuple[int, Row]]] = {}
        for number, row in zip(numbers, rows, strict=True):
            index = partition
            if index is None and row.key is not None:
                index = xxh3_64(row.key) % self.stream.partitions
            elif index is None:
                index = 0
                if self.stream.partitions > 1:
                    raise InvalidArgument(
                        "a record of a producer without a key: say which partition it goes to"
                    )
            shares.setdefault(index, []).append((number, row))
        spans: list[Span] = []
        for index, share in sorted(shares.items()):
            self.stream.part(index)
            try:
                spans += self._connection.call(self._send(index, share))
            except MillstreamError as error:
                error.appended = tuple(spans)
                raise
            except ServerError as error:
                raise self.stream.gone(index, error) from error
        return joined(spans)

    async def _send(self, index: int, share: list[tuple[int, Row]]) -> list[Span]:
        wire = await self._connection.wire()
        name = self.stream.part(index)
        last = int(await wire.query_publisher_sequence(name, self.id)) - 1
        left = [one for one in share if one[0] > last]
        if not left:
            return []
        _, since = await wire.bounds(name)
        outlet = await wire.outlet(name, self.id)
        mine = os.urandom(8)
        tags = {mine + at.to_bytes(4, "big") for at in range(len(left))}
        messages = [
            (number + 1, row.encoded(mine + at.to_bytes(4, "big")))
            for at, (number, row) in enumerate(left)
        ]
        try:
            await outlet.send_numbered(messages)
            found = await self.stream.find(wire, name, since, tags)
        except (TimeoutError, OSError) as error:
            raise Indeterminate(
                errno.ETIMEDOUT,
                "the server did not answer; send it again with the same sequences",
                self.stream.where(index),
            ) from error
        return joined([Span(index, 1, offset, 1) for offset in found])

    def close(self) -> None:
        """Let go of it; nothing is left to send."""
