"""`contrib.opentelemetry`: what its exporters get, by the conventions for messaging."""

import asyncio
import subprocess
import sys

import pytest

import millstream

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from millstream.contrib import opentelemetry as ours
from millstream.contrib.opentelemetry import instrument, process, uninstrument


class Seen:
    """Spans and metrics of a test."""

    def __init__(self):
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader])

    def spans(self):
        found = self.exporter.get_finished_spans()
        self.exporter.clear()
        return list(found)

    def names(self):
        return [span.name for span in self.spans()]

    def metrics(self):
        """{(metric, operation): points}."""
        found = {}
        data = self.reader.get_metrics_data()
        for metric in data.resource_metrics[0].scope_metrics[0].metrics:
            for point in metric.data.data_points:
                key = metric.name, point.attributes["messaging.operation.name"]
                found.setdefault(key, []).append(point)
        return found


@pytest.fixture
def seen():
    seen = Seen()
    instrument(tracer_provider=seen.tracers, meter_provider=seen.meters)
    yield seen
    uninstrument()


def context_of(span):
    return span.context.trace_id, span.context.span_id


def links_of(span):
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def replaced():
    """The methods of public classes, as they are now."""
    kinds = {kind for kind, _, _ in ours.PLACES}
    return {(kind, name): one for kind in kinds for name, one in vars(kind).items()}


# --- off ------------------------------------------------------------------------------------------


def test_nothing_is_replaced_before_and_after():
    program = """
        import millstream
        from millstream import Consumer, Message, Producer, Queue, Stream, Transaction
        kinds = (Consumer, Message, Producer, Queue, Stream, Transaction)
        before = [dict(vars(kind)) for kind in kinds]
        from millstream.contrib.opentelemetry import instrument, uninstrument
        assert [dict(vars(kind)) for kind in kinds] == before
        instrument()
        assert [dict(vars(kind)) for kind in kinds] != before
        instrument()
        uninstrument()
        uninstrument()
        assert [dict(vars(kind)) for kind in kinds] == before
    """
    subprocess.run([sys.executable, "-c", "if True:" + program], check=True)


def test_each_place_is_replaced_and_put_back():
    before = replaced()
    instrument()
    now = replaced()
    for kind, name, _ in ours.PLACES:
        assert now[kind, name] is not before.get((kind, name))
    uninstrument()
    assert replaced() == before


def test_process_does_nothing_when_off(store):
    queue = store.queue("q", capacity=10)
    queue.put(b"1")
    with queue.get(timeout=5) as message, process(message):
        assert not trace.get_current_span().get_span_context().is_valid
        assert message.headers == {}


def test_what_was_taken_before_it_ended_goes_on(store, seen):
    stream = store.stream("s", partitions=1)
    batches = stream.read(follow=True, timeout=60)
    stream.append(b"1")
    assert list(next(batches).values) == [b"1"]
    uninstrument()
    seen.spans()
    stream.append(b"2")
    assert list(next(batches).values) == [b"2"]
    batches.close()
    assert seen.spans() == []


# --- queues ---------------------------------------------------------------------------------------


def test_a_message_from_put_to_ack(store, seen):
    queue = store.queue("mail", capacity=10)
    number = queue.put(b"to ann", headers={"x": b"y"})
    with queue.get(timeout=5) as message, process(message):
        assert message.headers["x"] == b"y"
        assert message.headers["traceparent"].startswith(b"00-")
    put, get, work, ack = seen.spans()
    assert [put.name, get.name, work.name, ack.name] == [
        *["put mail", "get mail", "process mail", "ack mail"]
    ]
    assert [put.kind, get.kind, work.kind, ack.kind] == [
        SpanKind.PRODUCER,
        SpanKind.CLIENT,
        SpanKind.CONSUMER,
        SpanKind.CLIENT,
    ]
    assert dict(put.attributes) == {
        "messaging.system": "millstream",
        "messaging.operation.name": "put",
        "messaging.operation.type": "send",
        "messaging.destination.name": "mail",
        "messaging.message.id": str(number),
        "messaging.message.body.size": 6,
    }
    assert get.attributes["messaging.operation.type"] == "receive"
    assert get.attributes["messaging.batch.message_count"] == 1
    assert get.attributes["messaging.message.id"] == str(number)
    assert work.attributes["messaging.operation.type"] == "process"
    assert dict(ack.attributes) == {
        "messaging.system": "millstream",
        "messaging.operation.name": "ack",
        "messaging.operation.type": "settle",
        "messaging.destination.name": "mail",
        "messaging.message.id": str(number),
    }
    assert links_of(get) == links_of(work) == links_of(ack) == [context_of(put)]
    assert (work.parent.trace_id, work.parent.span_id) == context_of(put)
    assert put.start_time <= put.end_time <= work.end_time
    assert put.instrumentation_scope.schema_url == ours.SCHEMA


def test_a_span_under_way_is_the_parent(store, seen):
    queue = store.queue("mail", capacity=10)
    with seen.tracers.get_tracer("t").start_as_current_span("request") as request:
        queue.put(b"1")
        with queue.get(timeout=5) as message, process(message):
            pass
    put, get, work, ack, _ = seen.spans()
    for span in (put, get, work, ack):
        assert span.parent.span_id == request.get_span_context().span_id
    assert links_of(work) == [context_of(put)]


def test_many_messages(store, seen):
    queue = store.queue("mail", capacity=10)
    own = {"traceparent": b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"}
    queue.put_many(
        [b"1", millstream.Put(b"2", priority=0, key=b"k"), millstream.Put(b"3", headers=own)]
    )
    queue.put(b"4")
    messages = queue.get_many(10, timeout=5)
    assert sorted(one.value for one in messages) == [b"1", b"2", b"3", b"4"]
    assert {one.key for one in messages} == {None, b"k"}
    with process(messages):
        queue.ack_many(messages)
    many, one, get, ack, work = seen.spans()
    assert many.attributes["messaging.batch.message_count"] == 3
    senders = {context_of(many), context_of(one), (int("1" * 32, 16), int("2" * 16, 16))}
    assert set(links_of(get)) == set(links_of(ack)) == set(links_of(work)) == senders
    assert len(get.links) == 3  # two of one span are one link
    assert get.attributes["messaging.batch.message_count"] == 4
    assert (ack.name, ack.attributes["messaging.operation.type"]) == ("ack mail", "settle")
    assert work.parent is None


def test_waiting_for_nothing_is_no_span(store, seen):
    queue = store.queue("mail", capacity=10)
    assert queue.get_many(5, timeout=0) == []
    with pytest.raises(millstream.Empty):
        queue.get(timeout=0)
    assert seen.spans() == []


def test_errors(store, seen):
    queue = store.queue("mail", capacity=1)
    queue.put(b"1")
    with pytest.raises(millstream.QueueFull):
        queue.put(b"2", timeout=0)
    with pytest.raises(millstream.InvalidArgument):
        queue.get(timeout=-1)
    with queue.get(timeout=5) as message, pytest.raises(ZeroDivisionError), process(message):
        _ = 1 / 0
    _, full, bad, _, work, _ = seen.spans()
    for span, error in [
        (full, "QueueFull"),
        (bad, "InvalidArgument"),
        (work, "ZeroDivisionError"),
    ]:
        assert span.attributes["error.type"] == error
        assert not span.status.is_ok
        assert span.events[0].name == "exception"


@pytest.mark.parametrize(
    ("name", "finish", "outcome"),
    [
        ("ack", lambda message: message.ack(), "ack"),
        ("nack", lambda message: message.nack(delay=60, reason="later"), "nack"),
        ("release", lambda message: message.release(60), "release"),
        ("reject", lambda message: message.reject("no"), "dead"),
    ],
)
def test_what_finishes_a_message_is_a_span(store, seen, name, finish, outcome):
    queue = store.queue("mail", capacity=10)
    number = queue.put(b"1")
    message = queue.get(timeout=5)
    (put, _) = seen.spans()
    assert finish(message) is None
    assert message.finished == outcome
    (span,) = seen.spans()
    assert (span.name, span.kind) == (f"{name} mail", SpanKind.CLIENT)
    assert span.attributes["messaging.operation.type"] == "settle"
    assert span.attributes["messaging.message.id"] == str(number)
    assert links_of(span) == [context_of(put)]
    with pytest.raises(millstream.LeaseLost):
        finish(message)
    (span,) = seen.spans()
    assert span.attributes["error.type"] == "LeaseLost"
    uninstrument()
    queue.put(b"2")
    with pytest.raises(millstream.LeaseLost):
        finish(message)
    finish(queue.get(timeout=5))
    assert seen.spans() == []


def test_the_end_of_a_block_is_a_span(store, seen):
    queue = store.queue("mail", capacity=10, retry=millstream.RetryPolicy(max_attempts=1))
    for error in (None, millstream.Retry(60), millstream.Snooze(60), millstream.Reject("no")):
        queue.put(b"1")
        with queue.get(timeout=5):
            if error is not None:
                raise error
    queue.put(b"2")
    with pytest.raises(ZeroDivisionError), queue.get(timeout=5):
        _ = 1 / 0
    names = [name for name in seen.names() if name not in ("put mail", "get mail")]
    assert names == ["ack mail", "nack mail", "release mail", "reject mail", "nack mail"]
    assert queue.dead.list()[-1].traceback.endswith("ZeroDivisionError: division by zero\n")


def test_a_worker_processes_in_spans(store, seen):
    queue = store.queue("mail", capacity=10)
    queue.put_many([b"1", b"2"])
    done = []

    def handle(message):
        done.append(trace.get_current_span().get_span_context().span_id)

    assert queue.worker()(handle) is handle
    millstream.run(queue, until_empty=True)
    every = seen.spans()
    spans = [span for span in every if span.name == "process mail"]
    assert sorted(done) == sorted(span.context.span_id for span in spans)
    assert len(done) == 2
    assert len([one for one in every if one.name == "ack mail"]) == 2


def test_asyncio(store, seen):
    queue = store.queue("mail", capacity=10, durability="sync")

    async def main():
        await queue.aput(b"1")
        async with queue.aget(timeout=5) as message:
            return message.headers

    headers = asyncio.run(main())
    put, get, ack = seen.spans()
    assert [put.name, get.name, ack.name] == ["put mail", "get mail", "ack mail"]
    assert put.attributes["messaging.message.body.size"] == 1
    assert headers["traceparent"].decode().split("-")[2] == f"{put.context.span_id:016x}"
    assert links_of(get) == [context_of(put)]


# --- streams --------------------------------------------------------------------------------------


def test_records(store, seen):
    stream = store.stream("orders", partitions=2)
    position = stream.append(b"1", partition=1)
    stream.append_many([b"2", b"3"], partition=0, headers={"x": b"y"})
    stream.append_many([b"4", b"5"], partition=0, headers=[{"n": b"4"}, None])
    with process(stream.get(position), destination="orders"):
        pass
    batches = list(stream.read())
    assert [headers.get("x") for headers in batches[0].headers[:2]] == [b"y", b"y"]
    one, two, three, work, *reads = seen.spans()
    assert (one.attributes["messaging.destination.partition.id"], one.name) == (
        "1",
        "append orders",
    )
    assert one.attributes["millstream.offset"] == 0
    assert two.attributes["messaging.batch.message_count"] == 2
    assert links_of(work) == [context_of(one)]
    assert {span.name for span in reads} == {"read orders"}
    linked = [link for span in reads for link in links_of(span)]
    assert sorted(linked) == sorted(map(context_of, (one, two, three)))
    assert sum(span.attributes["messaging.batch.message_count"] for span in reads) == 5


def test_producer_and_consumer(store, seen):
    stream = store.stream("orders", partitions=1)
    with stream.producer("p") as producer:
        producer.append(b"1", sequence=1)
        producer.append(b"1", sequence=1)  # again
        producer.append_many([b"2", b"3"], first_sequence=2)
    with stream.consumer(group="g", timeout=0.01, max_records=2) as consumer:
        batch = consumer.poll(timeout=5)
        with process(batch, destination="orders"):
            consumer.commit(batch)
        assert sum(map(len, consumer)) == 1
        assert consumer.poll(timeout=0) is None

        async def more():
            stream.append(b"4")
            found = [await consumer.apoll(timeout=5)]
            stream.append(b"5")
            found += [batch async for batch in consumer]
            return [list(batch.values) for batch in found]

        assert asyncio.run(more()) == [[b"4"], [b"5"]]
    names = seen.names()
    assert names == [
        *["append orders"] * 3,
        *["read orders", "commit orders", "process orders", "read orders"],
        *["append orders", "read orders"] * 2,
    ]


def test_the_group_is_named(store, seen):
    stream = store.stream("orders", partitions=1)
    stream.append(b"1")
    with stream.consumer(group="g", timeout=0.01) as consumer:
        consumer.commit(consumer.poll(timeout=5))
    _, read, commit = seen.spans()
    for span in (read, commit):
        assert span.attributes["messaging.consumer.group.name"] == "g"
    assert commit.attributes["messaging.operation.type"] == "settle"


def test_following_in_asyncio(store, seen):
    stream = store.stream("orders", partitions=1)
    stream.append(b"1")

    async def main():
        return [batch.values[0] async for batch in stream.aread(max_records=1)]

    assert asyncio.run(main()) == [b"1"]
    assert seen.names() == ["append orders", "read orders"]


# --- transactions, and the rest -------------------------------------------------------------------


def test_a_transaction(store, seen):
    stream, queue = store.stream("orders", partitions=1), store.queue("mail", capacity=10)
    with store.transaction() as tx:
        tx.append(stream, b"1")
        tx.append_many(stream, (value for value in (b"2", b"3")), headers=[None, {"x": b"y"}])
        tx.put(queue, b"4", headers={"x": b"y"})
    one, two, three, commit = spans = seen.spans()
    assert [span.name for span in spans] == [
        *["create orders", "create orders", "create mail", "commit orders, mail"]
    ]
    assert links_of(commit) == [context_of(one), context_of(two), context_of(three)]
    assert commit.attributes["messaging.batch.message_count"] == 4
    with queue.get(timeout=5) as message:
        assert message.headers["x"] == b"y"
    (batch,) = stream.read()
    assert batch.headers[2]["x"] == b"y"
    get, ack, read = seen.spans()
    assert links_of(get) == links_of(ack) == [context_of(three)]
    assert links_of(read) == [context_of(one), context_of(two)]


def test_a_transaction_has_links_to_what_it_acknowledges(store, seen):
    inbox, outbox = store.queue("inbox", capacity=10), store.queue("outbox", capacity=10)
    inbox.put(b"1")
    message = inbox.get(timeout=5)
    put, _ = seen.spans()
    with store.transaction() as tx:
        tx.put(outbox, b"2")
        tx.ack(message)
    create, commit = seen.spans()
    assert commit.name == "commit outbox"
    assert links_of(commit) == [context_of(create), context_of(put)]
    with pytest.raises(ZeroDivisionError), store.transaction() as tx:
        tx.ack(outbox.get(timeout=5))
        _ = 1 / 0
    assert seen.names() == ["get outbox"]


def test_a_transaction_that_is_rolled_back_sends_nothing(store, seen):
    queue = store.queue("mail", capacity=10)
    with pytest.raises(ZeroDivisionError), store.transaction() as tx:
        tx.put(queue, b"1")
        _ = 1 / 0
    assert seen.names() == ["create mail"]
    assert ("messaging.client.sent.messages", "commit") not in seen.metrics()


def test_metrics(store, seen):
    queue = store.queue("mail", capacity=10)
    queue.put(b"1")
    queue.put_many([b"2", b"3"])
    with process(queue.get_many(10, timeout=5)):
        pass
    with store.transaction() as tx:
        tx.put(queue, b"4")
    found = seen.metrics()
    sent = found["messaging.client.sent.messages", "put"]
    assert [(point.attributes["messaging.destination.name"], point.value) for point in sent] == [
        ("mail", 3)
    ]
    assert found["messaging.client.sent.messages", "commit"][0].value == 1
    assert found["messaging.client.consumed.messages", "get"][0].value == 3
    assert found["messaging.client.operation.duration", "put"][0].count == 2
    assert found["messaging.process.duration", "process"][0].count == 1
    assert ("messaging.client.operation.duration", "process") not in found


def test_instrumentations_that_are_told_to_be_silent(store, seen):
    from opentelemetry import context

    queue, stream = store.queue("mail", capacity=10), store.stream("s", partitions=1)
    token = context.attach(context.set_value("suppress_instrumentation", True))
    try:
        queue.put(b"1")
        queue.put_many([b"2"])
        queue.ack_many(queue.get_many(2, timeout=5))
        stream.append(b"1")
        stream.append_many([b"2"])
        with process(next(iter(stream.read())), destination="s"):
            pass
        with store.transaction() as tx:
            tx.put(queue, b"3")
        with stream.consumer(group="g", timeout=0.01) as consumer:
            consumer.poll(timeout=5)
            consumer.commit()
    finally:
        context.detach(token)
    assert seen.spans() == []


def test_what_process_cannot_take(store, seen):
    stream = store.stream("s", partitions=1)
    stream.append(b"1")
    (batch,) = stream.read()
    with pytest.raises(millstream.InvalidType, match="destination="), process(batch):
        pass
    with pytest.raises(millstream.InvalidType, match="found bytes"), process([b"1"]):
        pass
