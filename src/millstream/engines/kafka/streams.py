"""Streams on Kafka: topics."""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from confluent_kafka import (
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import NewPartitions, OffsetSpec

from millstream import PartitionStats, StreamStats, _native, timestamps
from millstream._native import Position, Record, Span, batch_of, xxh3_64
from millstream.engines.kafka import records
from millstream.engines.kafka.capabilities import NO_SYNC
from millstream.engines.kafka.records import Row
from millstream.engines.stream import ServerStream
from millstream.errors import (
    InvalidArgument,
    InvalidType,
    LimitExceeded,
    MillstreamError,
    NotFound,
    OffsetOutOfRange,
    StorageError,
    Unsupported,
)
from millstream.options import FOREVER, Retention, as_index, check_timeout, integer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from millstream import Batch
    from millstream.engines.kafka.connection import KafkaConnection
    from millstream.engines.kafka.groups import KafkaConsumer, KafkaGroup
    from millstream.engines.kafka.producers import KafkaProducer
    from millstream.engines.kafka.store import KafkaStore
    from millstream.options import Durability

FETCH_MOST = 5000
SEND_ROWS, SEND_BYTES = 50_000, 64 << 20
"""What is handed to the client at a time."""
ERRORS_LOST = 100
LOOK_SECONDS = 0.5


class KafkaStream(ServerStream):
    """A topic of a Kafka cluster; made by `KafkaStore.stream`. Thread-safe."""

    store: KafkaStore
    _connection: KafkaConnection

    def __init__(
        self,
        store: KafkaStore,
        name: str,
        partitions: int,
        config: dict[str, str],
        durability: Durability,
    ) -> None:
        self.store = store
        self.name = name
        self.partitions = partitions
        self.config = config
        self.synced = int(config.get("flush.messages", FOREVER)) == 1
        if durability == "sync":
            self._check_level("sync")
        self.durability = durability
        self._turn = itertools.count()
        self._connection = store.connection
        self._most = int(config.get("max.message.bytes", 1048588))

    def __repr__(self) -> str:
        return f"<KafkaStream {self.name!r} of {self.store.path!r}: {self.partitions} partitions>"

    @property
    def retention(self) -> Retention:
        """What the topic keeps, by its retention.ms and retention.bytes."""
        if "delete" not in self.config.get("cleanup.policy", "delete"):
            return Retention()
        age, size = int(self.config["retention.ms"]), int(self.config["retention.bytes"])
        return Retention(
            age=None if age < 0 else age / 1000, bytes=None if size < 0 else size
        )  # fmt: skip

    @property
    def id(self) -> str:
        """What the cluster tells this topic by from others of its name, before and after it."""
        topics = TopicCollection([self.name])
        request = partial(self._connection.admin.describe_topics, topics)
        return str(self._connection.ask(request, f"stream {self.name!r}")[self.name].topic_id)

    @property
    def loses(self) -> str:
        """Why records that nobody has read could be removed from it; "": it keeps all."""
        config = self.config
        if "compact" in config["cleanup.policy"]:
            return f"cleanup.policy={config['cleanup.policy']} keeps one record of each key"
        if int(config["retention.bytes"]) >= 0:
            return f"retention.bytes={config['retention.bytes']} removes what is beyond; set it -1"
        if int(config["retention.ms"]) >= 0 and not self.log_append_time:
            return (
                f"retention.ms={config['retention.ms']} goes by the time that a record has itself,"
                " so old ones are removed as soon as they arrive; set retention.ms=-1, or"
                " message.timestamp.type=LogAppendTime"
            )
        return ""

    @property
    def log_append_time(self) -> bool:
        """Has each record the time at which it arrived, whatever its writer says?"""
        return self.config.get("message.timestamp.type") == "LogAppendTime"

    def _check_level(self, durability: object) -> None:
        level = self.store.level(durability)
        if level == "sync" and not self.synced:
            raise Unsupported(
                capability="durability.sync", engine=self.store.engine, instead=NO_SYNC
            )

    def check_transacted(self, durability: object) -> None:
        """Raise Unsupported where a transaction could not be as durable as was asked for."""
        if "sync" in (durability, self.durability):
            raise Unsupported(
                capability="durability.sync",
                engine=self.store.engine,
                instead="the server does not sync that a transaction was committed; append with"
                " append_many of the stream",
            )

    def check_partition(self, partition: object) -> int:
        """The number of a partition that is there."""
        index = integer("partition", partition, 0)
        if index >= self.partitions:
            raise NotFound(f"stream {self.name!r}: there is no partition {index}")
        return int(index)

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
        """Append records; where it fails `appended` of the error says which are stored."""
        rows = self.rows_of(values, keys, headers, timestamps, durability)
        shares = self.shares_of(rows, partition)
        check_timeout(timeout)
        if not shares:
            return []
        return self._send(shares)

    def rows_of(
        self, values: Any, keys: Any, headers: Any, times: Any, durability: Durability | None
    ) -> list[Row]:
        """What is to be sent, checked as every append is: nothing was sent yet."""
        self._connection.check_open()
        self.store.check_writable()
        self._check_level(self.durability if durability is None else durability)
        if not hasattr(values, "__len__"):
            values = list(values)
        if len(values) == 0:
            return []
        plain = keys is headers is times is None and type(values) is list
        if plain and all(type(one) is bytes for one in values):
            return self._fitting([Row(one, None, 0, None) for one in values])
        made: Any = 0
        if times is not None:
            made = timestamps.column(times, len(values))
        batch = batch_of(0, 1, 0, values, keys=keys, headers=headers, timestamps=made)
        stamps = itertools.repeat(None) if times is None else batch.timestamps.tolist()
        given = itertools.repeat(None) if headers is None else batch.headers
        late = self.log_append_time
        return self._fitting(
            [
                records.row_of(value, key, some, stamp, late)
                for value, key, some, stamp in zip(
                    batch.values, batch.keys, given, stamps, strict=False
                )
            ]
        )

    def _fitting(self, rows: list[Row]) -> list[Row]:
        near = self._most - 256
        for row in rows:
            if len(row.value or b"") > near or row.key or row.headers:
                size = row.size
                if size > self._most:
                    raise LimitExceeded(
                        f"stream {self.name!r}: a record of {size} bytes: {self.store.engine} at"
                        f" {self.store.path} takes {self._most}; raise max.message.bytes of the"
                        " topic"
                    )
        return rows

    def shares_of(self, rows: list[Row], partition: int | None) -> dict[int, list[Row]]:
        """The rows of each partition, in their order."""
        if partition is not None:
            index = self.check_partition(partition)
            return {index: rows} if rows else {}
        shares: dict[int, list[Row]] = {}
        turn: int | None = None
        for row in rows:
            if row.key is None:
                if turn is None:
                    turn = next(self._turn) % self.partitions
                index = turn
            else:
                index = xxh3_64(row.key) % self.partitions
            shares.setdefault(index, []).append(row)
        return dict(sorted(shares.items()))

    def _send(self, shares: dict[int, list[Row]]) -> list[Span]:
        producer, lock = self._connection.producer(self._most)
        sending = Sending(self, producer)
        with lock:
            try:
                for index, rows in shares.items():
                    for part in parts_of(rows):
                        sending.hand_over(index, part)
                        sending.finish()
            except MillstreamError as error:
                if sending.is_fatal:
                    self._connection.forget(producer)
                error.appended = tuple(sending.spans())
                raise
        return sending.spans()

    def producer(self, id: str) -> KafkaProducer:
        """The producer of that id, 1 to 128 characters."""
        from millstream.engines.kafka.producers import KafkaProducer

        if not isinstance(id, str):
            raise InvalidType(f"producer id {id!r}: expected str")
        if not 1 <= len(id) <= 128:
            raise InvalidArgument(f"producer id {id!r:.80}: expected 1 to 128 characters")
        return KafkaProducer(self, id)

    # --- reading ----------------------------------------------------------------------------------

    def bounds(self, which: Sequence[int]) -> dict[int, tuple[int, int]]:
        """First and next offset of partitions; what is not committed does not count."""
        places = [TopicPartition(self.name, index) for index in which]
        first, following = (
            self._offsets_at(places, spec) for spec in (OffsetSpec.earliest(), OffsetSpec.latest())
        )
        return {index: (first[index], following[index]) for index in which}

    def _offsets_at(self, places: list[Any], spec: Any) -> dict[int, int]:
        """What the server says of partitions, each asked for the same; -1: there is none."""
        request = partial(
            self._connection.admin.list_offsets,
            dict.fromkeys(places, spec),
            isolation_level=IsolationLevel.READ_COMMITTED,
        )
        found = self._connection.ask(request, f"stream {self.name!r}")
        return {place.partition: int(one.offset) for place, one in found.items()}

    def await_seen(self, spans: Sequence[Span]) -> None:
        """Return when readers see these, at most half a second later.

        A commit is answered before its marks are written, and an older transaction of others that
        is still open holds up what readers see.
        """
        ends = {span.partition: span.first_offset + span.count for span in spans}
        end = time.monotonic() + LOOK_SECONDS
        while ends and time.monotonic() < end:
            places = [TopicPartition(self.name, index) for index in ends]
            found = self._offsets_at(places, OffsetSpec.latest())
            ends = {index: offset for index, offset in ends.items() if found[index] < offset}

    def _bounds(self, partition: int) -> tuple[int, int]:
        index = self.check_partition(partition)
        return self.bounds([index])[index]

    def first_offset(self, partition: int) -> int:
        """Offset of the oldest record that there is."""
        return self._bounds(partition)[0]

    def next_offset(self, partition: int) -> int:
        """Offset that the next record will get."""
        return self._bounds(partition)[1]

    def stats(self) -> StreamStats:
        """Offsets of the stream and each partition, as of now; no client is told bytes."""
        parts = [
            PartitionStats(index, first, end, end, end - first, 0, 0, 1, "sound")
            for index, (first, end) in self.bounds(range(self.partitions)).items()
        ]
        return StreamStats(
            self.name, self.durability, self.retention, 0, sum(part.records for part in parts),
            0, 0, tuple(parts),
        )  # fmt: skip

    def get(self, partition: int | Position, offset: int | None = None, /) -> Record:
        """One record. Raises OffsetOutOfRange."""
        if isinstance(partition, Position):
            return self.get(partition.partition, partition.offset)
        index = self.check_partition(partition)
        at = integer("offset", offset, 0)
        first, following = self._bounds(index)
        if first <= at < following:
            for batch in self.batches({index: at}, False, None, 1):
                if batch.first_offset == at:
                    return _native.records_of(batch)[0]
        raise self._out_of_range(index, at, first, following)

    def _out_of_range(
        self, partition: int, offset: int, first: int, following: int
    ) -> OffsetOutOfRange:
        return OffsetOutOfRange(
            f"stream {self.name!r}, partition {partition}: offset {offset} is not there;"
            f" there are {first} to {following - 1}",
            partition=partition, first=first, next=following,
        )  # fmt: skip

    def resolve(self, partition: int, start: Any, on_lost: str = "raise") -> int:
        """The offset that a start means in a partition. Raises OffsetOutOfRange."""
        return self.resolve_all([self.check_partition(partition)], start, on_lost)[partition]

    def resolve_all(
        self, which: Sequence[int], start: Any, on_lost: str = "raise"
    ) -> dict[int, int]:
        """The same of several partitions."""
        if isinstance(start, str):
            if start not in ("earliest", "latest"):
                raise InvalidArgument(f'start {start!r}: expected "earliest" or "latest"')
            side = 0 if start == "earliest" else 1
            return {index: ends[side] for index, ends in self.bounds(which).items()}
        if timestamps.is_time(start):
            return {index: self.offset_at(start, index) for index in which}
        offset = int(start.offset) if isinstance(start, Position) else as_index(start)
        if offset is None:
            raise InvalidType(f"start {start!r}: expected an offset, a Position, a datetime")
        if offset < 0:
            raise InvalidArgument(f"start {offset}: cannot be negative")
        found = {}
        for index, (first, following) in self.bounds(which).items():
            if offset < first and on_lost == "earliest":
                found[index] = first
            elif first <= offset <= following:
                found[index] = offset
            else:
                raise self._out_of_range(index, offset, first, following)
        return found

    def read(
        self,
        *,
        partition: int | None = None,
        start: Any = "earliest",
        follow: bool = False,
        timeout: float | None = None,
        max_records: int | None = None,
        on_lost: Any = "raise",
    ) -> Iterator[Batch]:
        """Iterate over batches: of one partition in order, or of all, each in order."""
        self._connection.check_open()
        if isinstance(start, Position) and partition is None:
            partition = int(start.partition)
        which = range(self.partitions)
        if partition is not None:
            which = range(self.check_partition(partition), partition + 1)
        at = self.resolve_all(which, start, on_lost)
        most = FOREVER if max_records is None else integer("max_records", max_records, 0)
        return self.batches(at, follow, check_timeout(timeout), int(most))

    def batches(
        self, at: dict[int, int], follow: bool, timeout: float | None, most: int
    ) -> Iterator[Batch]:
        """Read partitions, each from an offset on; see `read`."""
        if most <= 0:
            return
        if not follow:
            ends = self.bounds(list(at))
            at = {index: offset for index, offset in at.items() if offset < ends[index][1]}
            if not at:
                return
        what = f"reading stream {self.name!r}"
        reader = self._connection.reader()
        left = set(at)
        try:
            reader.assign([TopicPartition(self.name, i, offset) for i, offset in at.items()])
            waited = time.monotonic()
            looked = waited
            while left and most > 0:
                now = time.monotonic()
                wait = LOOK_SECONDS
                if timeout is not None and follow:
                    wait = max(0.0, min(wait, waited + timeout - now))
                found = self.consume(reader, min(most, FETCH_MOST), wait)
                shares: dict[int, list[Any]] = {}
                for message in found:
                    error = message.error()
                    if error is None:
                        shares.setdefault(message.partition(), []).append(message)
                    elif error.code() == KafkaError._PARTITION_EOF:
                        left -= set() if follow else {message.partition()}
                    elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                        index = message.partition()
                        raise self._out_of_range(index, message.offset(), *self._bounds(index))
                    elif not error.retriable():
                        raise self._connection.error_of(error, what)
                now = time.monotonic()
                for index, share in shares.items():
                    most -= len(share)
                    yield records.batch(index, share)
                    waited = looked = now = time.monotonic()
                if not found and now - looked > self._connection.timeout:
                    looked = now
                    self.bounds(list(left))  # is the server there?
                    if not follow and now - waited > 4 * self._connection.timeout:
                        raise StorageError(
                            5, f"{what}: nothing came for {now - waited:.0f} s", self.store.path
                        )
                if follow and timeout is not None and not shares and now - waited >= timeout:
                    return
        finally:
            self._connection.give_back(reader)

    def consume(self, client: Any, most: int, wait: float) -> list[Any]:
        """Messages and events: those that are there, or the first one in time."""
        what = f"stream {self.name!r}"
        found: list[Any] = self._connection.call(lambda: client.consume(1, wait), what)
        if found and most > 1:
            found += self._connection.call(lambda: client.consume(most - 1, 0), what)
        return found

    def offset_at(self, timestamp: Any, partition: int) -> int:
        """Offset of the first record at or after a time."""
        index = self.check_partition(partition)
        wanted = timestamps.microseconds(timestamp)
        first, following = self._bounds(index)
        spec = OffsetSpec.for_timestamp(max(0, wanted // 1000))
        found = self._offsets_at([TopicPartition(self.name, index)], spec)[index]
        offset = following if found < 0 else max(first, found)
        # The server knows milliseconds; a header of the record may say more.
        while wanted % 1000 and offset < following:
            batch = next(self.batches({index: offset}, False, None, FETCH_MOST), None)
            if batch is None:
                return following
            stamps = batch.timestamps.tolist()
            for at, stamp in zip(batch.offsets.tolist(), stamps, strict=True):
                if stamp >= wanted:
                    return int(at)
            offset = int(batch.next_offset)
        return offset

    def delete_before(self, position: Position) -> int:
        """Remove the records before a position; return the first offset left."""
        self.store.check_writable()
        if not isinstance(position, Position):
            raise InvalidType(f"position {position!r}: expected a Position")
        index = self.check_partition(position.partition)
        place = TopicPartition(self.name, index, position.offset)
        what = f"stream {self.name!r}, partition {index}"
        self._connection.ask(partial(self._connection.admin.delete_records, [place]), what)
        return self.first_offset(index)

    def add_partitions(self, count: int) -> int:
        """Add `count` partitions and return how many there are now. They cannot be removed.

        The partition of most keys changes, and others must open the stream again.
        """
        self.store.check_writable()
        there = len(self._connection.topics(name=self.name)[self.name].partitions)
        wanted = there + integer("count", count, 1)
        more = [NewPartitions(self.name, wanted)]
        request = partial(self._connection.admin.create_partitions, more)
        self._connection.ask(request, f"stream {self.name!r}")
        self.store.await_topic(self.name, wanted)
        self.partitions = wanted
        return wanted

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
    ) -> KafkaConsumer:
        """Join a consumer group; see `millstream.Stream.consumer`."""
        from millstream.engines.kafka.groups import KafkaConsumer

        return KafkaConsumer(
            self, group, start, delivery, auto_commit, max_records, timeout, session,
            max_processing, on_lost, create,
        )  # fmt: skip

    def groups(self) -> list[str]:
        """Names of the consumer groups that have a position in it, sorted."""
        from millstream.engines.kafka import groups

        return groups.names(self)

    def group(self, name: str) -> KafkaGroup:
        """A consumer group. Raises NotFound."""
        from millstream.engines.kafka.groups import KafkaGroup

        return KafkaGroup(self, name)


class Sending:
    """Rows on their way: what became of each."""

    def __init__(self, stream: KafkaStream, producer: Any) -> None:
        self._stream = stream
        self._producer = producer
        self._left = 0
        self._offsets: dict[int, list[int]] = {}
        self.error: KafkaError | None = None

    @property
    def is_fatal(self) -> bool:
        """Can the producer not go on?"""
        return self.error is not None and self.error.fatal()

    def _delivered(self, error: KafkaError | None, message: Any) -> None:
        self._left -= 1
        if error is not None:
            self.error = self.error or error
        else:
            self._offsets[message.partition()].append(message.offset())

    def _noted(self, error: KafkaError | None, _: object) -> None:
        self._left -= 1
        self.error = self.error or error

    def note(self, topic: str, key: bytes, value: bytes, index: int) -> None:
        """Give the client a record beside them, of another topic."""
        self._left += 1
        self._stream.store.connection.call(
            lambda: self._producer.produce(topic, value, key, index, on_delivery=self._noted),
            topic,
        )

    def hand_over(self, index: int, part: Sequence[Row]) -> None:
        """Give rows to the client, in their order."""
        self._offsets.setdefault(index, [])
        producer, name = self._producer, self._stream.name
        self._left += len(part)
        what = f"stream {name!r}, partition {index}"
        connection = self._stream.store.connection
        connection.know(producer, name, self._stream.partitions)
        if all(row.headers is None and not row.timestamp for row in part):
            messages = [{"value": row.value, "key": row.key} for row in part]
            queued = connection.call(
                lambda: producer.produce_batch(
                    name, messages, partition=index, on_delivery=self._delivered
                ),
                what,
            )
            if queued != len(part):
                failed = next(one["_error"] for one in messages if "_error" in one)
                self._left -= len(part) - queued
                self.error = self.error or failed
            return
        for row in part:
            send = partial(
                producer.produce, name, row.value, row.key, index, on_delivery=self._delivered,
                timestamp=row.timestamp, headers=row.headers,
            )  # fmt: skip
            connection.call(send, what)

    def finish(self) -> None:
        """Return when the server has answered for all of them.

        Raises: what the first one that was not stored says.
        """
        lost = 0
        while self._left:
            try:
                self._producer.flush(LOOK_SECONDS)
            except (KafkaException, SystemError) as error:
                # The client raises a fatal error within a callback, which may fail of it; or it has
                # lost the error by then, and what was not stored says it in its own callback.
                cause = error.__cause__ if isinstance(error, SystemError) else error
                if isinstance(cause, KafkaException):
                    self.error = cause.args[0]
                    continue
                lost += 1
                if lost > ERRORS_LOST or cause is not None:
                    raise
        if self.error is not None:
            raise self._stream.store.connection.error_of(
                self.error, f"stream {self._stream.name!r}"
            )

    def spans(self) -> list[Span]:
        """Where they are: a `Span` for each run."""
        found = []
        for index, offsets in sorted(self._offsets.items()):
            begin = 0
            while begin < len(offsets):
                end = len(offsets)
                if offsets[-1] - offsets[begin] != end - begin - 1:
                    end = begin + 1
                    while end < len(offsets) and offsets[end] == offsets[end - 1] + 1:
                        end += 1
                found.append(Span(index, 1, offsets[begin], end - begin))
                begin = end
        return found


def parts_of(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows in parts that the client can hold."""
    size = sum(len(row.value or b"") for row in rows)
    step = SEND_ROWS if size <= SEND_BYTES else max(1, len(rows) * SEND_BYTES // size)
    for begin in range(0, len(rows), step):
        yield rows[begin : begin + step]
