"""Streams on NATS: a JetStream stream for each partition, atomic batches, direct reads."""

from __future__ import annotations

import errno
import itertools
import re
import threading
import time
from typing import TYPE_CHECKING, Any

from millstream import PartitionStats, StreamStats, _native, timestamps
from millstream._native import Position, Record, Span, batch_of, xxh3_64
from millstream.engines.nats import records
from millstream.engines.nats.capabilities import BATCH_MOST
from millstream.engines.nats.connection import WRONG_SEQUENCE, ApiError
from millstream.engines.stream import ServerProducer, ServerStream, joined, sequences_of
from millstream.errors import (
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
    from millstream.engines.nats.connection import NatsConnection
    from millstream.engines.nats.groups import NatsConsumer, NatsGroup
    from millstream.engines.nats.store import NatsStore
    from millstream.options import Durability

FETCH_BYTES = 8 << 20
FETCH_SECONDS = 10.0
POLL_SECONDS = 0.02
TOKEN = re.compile(r"[A-Za-z0-9_-]+")


def token_of(name: str) -> str:
    """A name as one token of a subject."""
    return name if TOKEN.fullmatch(name) else "x~" + name.encode().hex()


class NatsStream(ServerStream):
    """A stream on a NATS server; made by `NatsStore.stream`. Thread-safe."""

    store: NatsStore
    _connection: NatsConnection

    def __init__(
        self,
        store: NatsStore,
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
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<NatsStream {self.name!r} of {self.store.path!r}: {self.partitions} partitions>"

    def jetstream(self, partition: int) -> str:
        """The name of the JetStream stream of a partition."""
        index = integer("partition", partition, 0)
        if index >= self.partitions:
            raise NotFound(f"stream {self.name!r}: there is no partition {index}")
        return self.name if index == 0 else f"{self.name}~{index}"

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
        """Append records; 1,000 of a partition at a time are seen whole or not at all."""
        rows = self.rows_of(values, keys, headers, timestamps, durability)
        return self.append_rows(rows, partition, "", timeout)

    def rows_of(
        self, values: Any, keys: Any, headers: Any, times: Any, durability: Durability | None
    ) -> list[Row]:
        """What is to be sent, checked as every append is: nothing was sent yet."""
        self._connection.check_open()
        self.store.check_writable()
        if durability is not None:
            self.store.level(durability)
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
        most = int(self._connection.client.max_payload)
        rows = []
        for value, key, given, stamp in zip(
            batch.values, batch.keys, all_headers, stamps, strict=False
        ):
            row = Row(key, value or b"", records.headers_of(value, key, given, stamp))
            if row.size > most:
                raise LimitExceeded(
                    f"a record of {row.size} bytes with its headers: {self.store.engine} at"
                    f" {self.store.path} takes {most}; raise max_payload in its configuration"
                )
            rows.append(row)
        return rows

    def append_rows(
        self, rows: Sequence[Row], partition: int | None, subject: str, timeout: float | None
    ) -> list[Span]:
        """Send rows, each to its partition."""
        check_timeout(timeout)
        shares: dict[int, list[Row]] = {}
        if partition is not None:
            self.jetstream(partition)
            shares = {int(partition): list(rows)} if rows else {}
        else:
            turn: int | None = None
            for row in rows:
                if row.key is None:
                    if turn is None:
                        turn = next(self._turn) % self.partitions
                    index = turn
                else:
                    index = xxh3_64(row.key) % self.partitions
                shares.setdefault(index, []).append(row)
        spans: list[Span] = []
        for index, share in sorted(shares.items()):
            for begin in range(0, len(share), BATCH_MOST):
                part = share[begin : begin + BATCH_MOST]
                try:
                    last = self.send(index, part, subject, None)
                except MillstreamError as error:
                    error.appended = tuple(spans)
                    raise
                spans.append(Span(index, 1, last - len(part), len(part)))
        return joined(spans)

    def send(self, index: int, part: Sequence[Row], subject: str, expected: int | None) -> int:
        """Store rows as one atomic batch; the sequence of the last.

        Args:
            index: the partition.
            part: at most BATCH_MOST of them.
            subject: behind the partition's.
            expected: last sequence of that subject; where it is another one nothing is stored.

        Raises: ApiError where it is another one.
        """
        name = f"{self.name}.{index}{subject}"
        what = f"{self.store.path}, stream {self.name!r}, partition {index}"
        try:
            found = self._connection.call(self._send(name, part, expected, what))
        except ApiError as error:
            if error.err_code in WRONG_SEQUENCE and expected is not None:
                raise
            raise StorageError(errno.EIO, f"nothing was stored: {error}", what) from error
        return int(found["seq"])

    async def _send(
        self, subject: str, part: Sequence[Row], expected: int | None, what: str
    ) -> dict[str, Any]:
        connection = self._connection
        first = {} if expected is None else {"Nats-Expected-Last-Subject-Sequence": str(expected)}
        if len(part) == 1:
            row = part[0]
            return await connection.publish(subject, row.data, {**row.headers, **first}, what)
        number = _native.monotonic_ns()
        batch = f"{connection.inbox[7:]}-{number:x}"[-64:]
        for at, row in enumerate(part[:-1], 1):
            headers = {
                **row.headers, **first, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(at),
            }  # fmt: skip
            first = {}
            await connection.client.publish(subject, row.data, headers=headers)
        headers = {
            **part[-1].headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(len(part)),
            "Nats-Batch-Commit": "1",
        }  # fmt: skip
        return await connection.publish(subject, part[-1].data, headers, what)

    def producer(self, id: str) -> NatsProducer:
        """The producer of that id, 1 to 128 characters."""
        if not isinstance(id, str):
            raise InvalidType(f"producer id {id!r}: expected str")
        if not 1 <= len(id) <= 128:
            raise InvalidArgument(f"producer id {id!r:.80}: expected 1 to 128 characters")
        return NatsProducer(self, id)

    # --- reading ----------------------------------------------------------------------------------

    def _state(self, partition: int) -> tuple[int, int]:
        """First and next offset."""
        name = self.jetstream(partition)
        info = self.store.info(name)
        if info is None:
            raise NotFound(f"{self.store.path}: there is no stream {self.name!r} any more")
        state = info["state"]
        following = int(state["last_seq"])
        return min(max(int(state["first_seq"]) - 1, 0), following), following

    def first_offset(self, partition: int) -> int:
        """Offset of the oldest record that there is."""
        return self._state(partition)[0]

    def next_offset(self, partition: int) -> int:
        """Offset that the next record will get."""
        return self._state(partition)[1]

    def stats(self) -> StreamStats:
        """Offsets and bytes of the stream and each partition, as of now."""
        parts = []
        for index in range(self.partitions):
            info = self.store.info(self.jetstream(index))
            if info is None:
                raise NotFound(f"{self.store.path}: there is no stream {self.name!r} any more")
            state = info["state"]
            following = int(state["last_seq"])
            first = min(max(int(state["first_seq"]) - 1, 0), following)
            size, count = int(state["bytes"]), int(state["messages"])
            parts.append(
                PartitionStats(index, first, following, following, count, size, size, 1, "sound")
            )
        size = sum(part.log_bytes for part in parts)
        return StreamStats(
            self.name, self.durability, self.retention, 0, sum(part.records for part in parts),
            size, size, tuple(parts),
        )  # fmt: skip

    def fetch(self, partition: int, offset: int, most: int) -> list[records.Stored]:
        """Records from an offset on, at most `most`; none where there is none yet."""
        name = self.jetstream(partition)
        body = {"seq": offset + 1, "batch": min(most, BATCH_MOST), "max_bytes": FETCH_BYTES}
        work = self._connection.collect(f"$JS.API.DIRECT.GET.{name}", body, FETCH_SECONDS, 1 << 30)
        try:
            found = self._connection.call(work, FETCH_SECONDS)
        except ApiError as error:
            raise self._connection.refused(error, f"reading {name}") from error
        return [records.Stored(message) for message in found]

    def places(self) -> NatsStream:
        """Where a consumer reads: no place of its own is kept on the server."""
        return self

    def close(self) -> None:
        """Let go of `places`: nothing is held."""

    @staticmethod
    def batch(partition: int, found: list[records.Stored]) -> Batch:
        """The batch of some records that lie one behind the other."""
        return records.batch(partition, found)

    def get(self, partition: int | Position, offset: int | None = None, /) -> Record:
        """One record. Raises OffsetOutOfRange."""
        if isinstance(partition, Position):
            return self.get(partition.partition, partition.offset)
        index = integer("offset", offset, 0)
        found = self.fetch(partition, index, 1)
        if not found or found[0].sequence != index + 1:
            raise self._out_of_range(partition, index)
        return _native.records_of(records.batch(partition, found))[0]

    def _out_of_range(self, partition: int, offset: int) -> OffsetOutOfRange:
        first, following = self._state(partition)
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
            return self._state(partition)[0 if start == "earliest" else 1]
        if timestamps.is_time(start):
            return self.offset_at(start, partition)
        offset = int(start.offset) if isinstance(start, Position) else as_index(start)
        if offset is None:
            raise InvalidType(f"start {start!r}: expected an offset, a Position, a datetime")
        first, following = self._state(partition)
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
        waited = time.monotonic()
        while most > 0:
            idle = True
            for index in list(at):
                found = self.fetch(index, at[index], most)
                if found:
                    idle = False
                    at[index] = found[-1].sequence
                    most -= len(found)
                    yield records.batch(index, found)
                    waited = time.monotonic()
                elif not follow:
                    del at[index]
                if most <= 0:
                    return
            if idle:
                if not follow or (timeout is not None and time.monotonic() - waited >= timeout):
                    return
                time.sleep(POLL_SECONDS)

    def offset_at(self, timestamp: Any, partition: int) -> int:
        """Offset of the first record at or after a time: the partition is read from its start."""
        self._refuse("stream.start_at_time")
        wanted = timestamps.microseconds(timestamp)
        offset, following = self._state(partition)
        while offset < following:
            found = self.fetch(partition, offset, BATCH_MOST)
            if not found:
                break
            for one in found:
                if one.timestamp >= wanted:
                    return one.sequence - 1
            offset = found[-1].sequence
        return following

    def delete_before(self, position: Position) -> int:
        """Remove the records before a position; return the first offset left."""
        self.store.check_writable()
        if not isinstance(position, Position):
            raise InvalidType(f"position {position!r}: expected a Position")
        name = self.jetstream(position.partition)
        self._connection.do(f"STREAM.PURGE.{name}", {"seq": position.offset + 1})
        return self.first_offset(position.partition)

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
    ) -> NatsConsumer:
        """Join a consumer group; see `millstream.Stream.consumer`."""
        from millstream.engines.nats.groups import NatsConsumer

        if delivery == "exactly_once":
            raise self.store.capabilities.refusal("stream.transaction")
        return NatsConsumer(
            self, group, start, delivery, auto_commit, max_records, timeout, session,
            max_processing, on_lost, create,
        )  # fmt: skip

    def groups(self) -> list[str]:
        """Names of the consumer groups, sorted."""
        from millstream.engines.nats import groups

        return groups.names(self)

    def group(self, name: str) -> NatsGroup:
        """A consumer group. Raises NotFound."""
        from millstream.engines.nats.groups import NatsGroup

        return NatsGroup(self, name)


class Row:
    """A record that is to be sent."""

    __slots__ = ("data", "headers", "key")

    def __init__(self, key: bytes | None, data: bytes, headers: dict[str, str]) -> None:
        self.key = key
        self.data = data
        self.headers = headers

    @property
    def size(self) -> int:
        """Bytes with the headers, as the server counts them, and room for those of a batch."""
        named = sum(len(name) + len(text) + 4 for name, text in self.headers.items())
        return len(self.data) + named + 256


class NatsProducer(ServerProducer):
    """A producer: its records have a subject of their own, whose last message says how far it is.

    A record is stored under the expected last sequence of that subject, so that what was sent
    before, by whom and when ever, adds nothing. Made by `NatsStream.producer`.
    """

    def __init__(self, stream: NatsStream, id: str) -> None:
        stream.store.check_writable()
        self.stream = stream
        self.id = id
        self._subject = f".{token_of(id)}"
        self._lock = threading.Lock()
        self._known: dict[int, tuple[int, int]] = {}
        """Of each partition: the last sequence of the producer, and that of JetStream."""

    def __repr__(self) -> str:
        return f"<NatsProducer {self.id!r} of stream {self.stream.name!r}>"

    def _load(self, index: int) -> tuple[int, int]:
        """Ask the server how far it is."""
        name = self.stream.jetstream(index)
        subject = f"{self.stream.name}.{index}{self._subject}"
        connection = self.stream.store.connection
        connection.check_open()
        work = connection.collect(
            f"$JS.API.DIRECT.GET.{name}", {"last_by_subj": subject}, FETCH_SECONDS, 1
        )
        try:
            found = connection.call(work, FETCH_SECONDS)
        except ApiError as error:
            raise connection.refused(error, f"producer {self.id!r}") from error
        if found:
            stored = records.Stored(found[0])
            known = int(stored.headers[records.SEQUENCE]), stored.sequence
        else:
            known = -1, 0
        self._known[index] = known
        return known

    @property
    def last_sequences(self) -> tuple[int, ...]:
        """The last sequence in each partition; -1: none."""
        with self._lock:
            return tuple(self._load(index)[0] for index in range(self.stream.partitions))

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
            row.headers[records.SEQUENCE] = str(number)
            shares.setdefault(index, []).append((number, row))
        spans: list[Span] = []
        with self._lock:
            for index, share in sorted(shares.items()):
                self.stream.jetstream(index)
                try:
                    for begin in range(0, len(share), BATCH_MOST):
                        span = self._send(index, share[begin : begin + BATCH_MOST])
                        spans += [span] if span else []
                except MillstreamError as error:
                    error.appended = tuple(spans)
                    self._known.pop(index, None)  # it may be stored: ask before the next one
                    raise
        return joined(spans)

    def _send(self, index: int, part: list[tuple[int, Row]]) -> Span | None:
        while True:
            last, at = self._known.get(index) or self._load(index)
            left = [one for one in part if one[0] > last]
            if not left:
                return None
            try:
                end = self.stream.send(index, [row for _, row in left], self._subject, at)
            except ApiError:  # another process sent as this producer
                before = self._known.pop(index)
                if self._load(index) == before:
                    raise StorageError(
                        errno.EIO,
                        f"producer {self.id!r}: the server refuses the sequence it has told",
                        self.stream.store.path,
                    ) from None
                continue
            self._known[index] = left[-1][0], end
            return Span(index, 1, end - len(left), len(left))

    def close(self) -> None:
        """Let go of it; nothing is left to send."""
