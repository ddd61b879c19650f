"""How millstream is used, for type checkers: never run, checked by test_typing.py."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, assert_type

import numpy as np
import numpy.typing as npt

import millstream
import millstream.engines
from millstream import (
    Batch,
    Consumer,
    Group,
    Position,
    Producer,
    Retention,
    Span,
    Store,
    Stream,
    StreamStats,
)
from millstream.engines.kafka.store import KafkaStore
from millstream.engines.nats.store import NatsStore


def stores() -> None:
    with millstream.open("data") as store:
        assert_type(store, Store)
        assert_type(store.streams(), list[str])
        store.drop_stream("old")
        store.backup(Path("elsewhere"))
    millstream.open("file:///var/lib/app", create=False).close()
    with millstream.open("data") as store:
        store.flush(timeout=1.0)
    with millstream.temporary(durability="process") as store:
        assert_type(store, Store)
    millstream.open(Path("data"), durability="sync", mode="r", timeout=5.0).close()
    millstream.open("data", durability="often")  # type: ignore[arg-type]
    millstream.open("data", mode="w")  # type: ignore[arg-type]


def engines_of(store: Store, stream: Stream) -> None:
    """A store in a directory is one of the engines: mypy compares each method with the protocol."""
    one: millstream.engines.Store = store
    log: millstream.engines.Stream = stream
    queue: millstream.engines.Queue = store.queue("q")
    producer: millstream.engines.Producer = stream.producer("p")
    group: millstream.engines.Group = stream.group("g")
    assert_type(one.stream("s"), millstream.engines.Stream)
    assert_type(one.capabilities["queue.delay"].level, Literal["native", "emulated", "none"])
    one.require("queue.delay", emulated=False)
    for batch in log.consumer("g", timeout=1.0):
        assert_type(batch, Batch)
    with queue.get(timeout=1.0) as message:
        assert_type(message.attempt, int)
    with NatsStore("nats://h", timeout=1.0) as server:
        member: millstream.engines.Consumer = server.stream("s").consumer("g")
        part: millstream.engines.Stream = server.stream("s")
        another: millstream.engines.Store = server
        assert_type(member.assignment, list[int])
        assert_type(part.name, str)
        assert_type(another.engine, str)
    with KafkaStore("kafka://h", timeout=1.0) as cluster:
        third: millstream.engines.Store = cluster
        topic: millstream.engines.Stream = cluster.stream("s")
        of_topic: millstream.engines.Producer = cluster.stream("s").producer("p")
        reader: millstream.engines.Consumer = cluster.stream("s").consumer("g")
        its: millstream.engines.Group = cluster.stream("s").group("g")
        assert_type((third.engine, topic.name, its.name), tuple[str, str, str])
        assert_type((reader.assignment, of_topic.last_sequences), tuple[list[int], tuple[int, ...]])
    producer.append_many([b"x"], first_sequence=1)
    group.seek("earliest")
    store.queue("q", emulate={"delay"})


def producers(stream: Stream) -> None:
    with stream.producer(id="ingest-7") as producer:
        assert_type(producer, Producer)
        assert_type(producer.append(b"x", sequence=1, key=b"k"), Position | None)
        assert_type(producer.append_many([b"x"], first_sequence=2), list[Span])
        assert_type(producer.append_many([b"x"], sequences=[7], durability="sync"), list[Span])
        assert_type(producer.last_sequence, int)
        assert_type(producer.last_sequences, tuple[int, ...])
        producer.append(b"x")  # type: ignore[call-arg]


def streams(store: Store) -> Stream:
    keep = Retention(bytes="10GiB", age="30d", records=1000)
    assert_type(keep.bytes, int | None)
    assert_type(keep.age, float | None)
    flights = store.stream("flights", partitions=8, retention=keep, segment_bytes=128 << 20)
    store.stream("flights", partitions=9, on_mismatch="alter")
    store.queue("mail", retry=millstream.RetryPolicy(), on_mismatch="keep")
    store.queue("mail", on_mismatch="yes")  # type: ignore[arg-type]
    store.stream("flights", create=False).consumer("billing", create=False).close()
    store.queue("mail", create=False).put_many([b"x", millstream.Put(b"y", priority=1, at=None)])
    assert_type(millstream.Put(b"y").priority, int)
    assert_type(store.queue("mail").retry, millstream.RetryPolicy)
    assert_type(millstream.codecs.json.encode([1]), bytes)
    with millstream.testing.clock() as clock:
        assert_type(clock.advance(1.0), float)
    worker = millstream.Worker(store.queue("mail"), print)
    assert_type(worker.stop(), millstream.worker.Counts)
    flights.alter(retention=None, segment_bytes=1 << 20, durability="sync")
    assert_type(flights.add_partitions(2), int)
    assert_type(flights.partition_for(b"N14228"), int)
    assert_type(flights.offset_at(datetime.now(UTC), 0), int)
    assert_type(flights.first_offset(3), int)
    assert_type(flights.next_offset(3), int)
    assert_type(flights.durable_offset(3), int)
    assert_type(flights.stats(), StreamStats)
    assert_type(flights.stats().partitions[0].records, int)
    assert_type(flights.enforce_retention(), int)
    flights.flush()
    copy: Stream = pickle.loads(pickle.dumps(flights))
    return copy


def append(flights: Stream) -> None:
    position = flights.append(b"...", key=b"N14228", headers={"src": b"demo"})
    assert_type(position, Position)
    partition, epoch, offset = position
    assert_type(offset, int)
    assert_type(position.epoch, int)
    flights.append(
        memoryview(b"x"),
        key=bytearray(b"k"),
        timestamp=datetime.now(UTC),
        partition=partition,
        durability="sync",
        timeout=1.0,
    )
    flights.append(None, key=b"k", timestamp=np.datetime64("2013-01-01"))
    flights.wait_durable(position, timeout=1.0)
    flights.delete_before(position)
    print(position < Position(partition, epoch, offset + 1), position in {position})
    flights.append("text")  # type: ignore[arg-type]
    flights.append(b"x", headers={"src": "text"})  # type: ignore[dict-item]


def append_many(flights: Stream, rows: npt.NDArray[np.void], table: Any) -> None:
    spans = flights.append_many([b"a", None], keys=[b"1", None], timestamps=[1, 2])
    assert_type(spans, list[Span])
    assert_type(spans[0].first_offset + spans[0].count, int)
    flights.wait_durable(spans[0])
    flights.append_many(rows, keys=np.array([b"a", b"b"]), timestamps=np.zeros(2, "M8[us]"))
    flights.append_many(rows, headers=[{"a": b"1"}, None], partition=0)
    flights.append_many(table, timestamps=datetime.now(UTC), durability="process")
    try:
        flights.append_arrow(table, value="payload", key="tail", timestamp=None)
    except millstream.StoreFull as full:
        assert_type(full.appended, tuple[Span, ...])
    flights.append_many([1, 2])  # type: ignore[list-item]


def read(flights: Stream, position: Position) -> None:
    for batch in flights.read(partition=3, start=0):
        columns(batch)
    assert_type(flights.read(), Iterator[Batch])
    flights.read(start=position, follow=True, timeout=1.0, max_records=10)
    flights.read(start=datetime.now(UTC), durable=True, on_lost="earliest")
    flights.read(start="latest")
    flights.read(start="newest")  # type: ignore[arg-type]
    try:
        next(flights.read(start=7))
    except millstream.OffsetOutOfRange as lost:
        assert_type((lost.partition, lost.first, lost.next), tuple[int, int, int])
    except millstream.CorruptBatch as damage:
        assert_type(damage.path, str)


async def aread(flights: Stream) -> None:
    assert_type(flights.aread(), AsyncIterator[Batch])
    async for batch in flights.aread(follow=True, timeout=1.0):
        columns(batch)
        await asyncio.sleep(0)


def columns(batch: Batch) -> None:
    assert_type(batch.partition, int)
    assert_type(batch.offsets, npt.NDArray[np.int64])
    assert_type(batch.timestamps, npt.NDArray[np.int64])
    for key, value, headers in zip(batch.keys, batch.values, batch.headers, strict=True):
        assert_type(key, bytes | None)
        assert_type(value, bytes | None)
        assert_type(headers, dict[str, bytes])
    assert_type(batch.values[0], bytes | None)
    assert_type(batch.values.tolist(), list[bytes | None])
    assert_type(batch.values.view(0), memoryview | None)
    assert_type(batch[1:], Batch)
    assert_type(len(batch) + batch.next_offset, int)
    batch.values_as(np.dtype([("sensor", "<u4"), ("celsius", "<f4")]))
    batch.to_arrow(columns=["key", "value", "headers"])
    batch.arrow(("value",)).__arrow_c_array__()
    batch[0]  # type: ignore[index]


def consume(flights: Stream, position: Position) -> None:
    with flights.consumer(group="billing", start=position, delivery="at_most_once") as consumer:
        assert_type(consumer, Consumer)
        for batch in consumer:
            columns(batch)
            consumer.commit(batch, allow_backwards=True)
        assert_type(consumer.poll(1.0), Batch | None)
        assert_type(consumer.assignment, list[int])
        assert_type(consumer.position, dict[int, Position])
        assert_type(consumer.lag(), int)
        consumer.seek(datetime.now(UTC))
        consumer.seek(17, partition=3)
    flights.consumer("billing", on_assign=print, on_revoke=lambda gone: gone.sort())
    flights.consumer("billing", delivery="often")  # type: ignore[arg-type]
    assert_type(flights.groups(), list[str])
    assert_type(flights.group("billing"), Group)
    assert_type(flights.group("billing").positions(), dict[int, Position | None])


async def aconsume(flights: Stream) -> None:
    async for batch in flights.consumer("billing"):
        columns(batch)
