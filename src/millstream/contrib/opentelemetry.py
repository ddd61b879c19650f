"""Spans and metrics of OpenTelemetry: `instrument`, and `uninstrument`.

``pip install 'millstream[opentelemetry]'``. By the conventions for messaging: what is put or
appended carries ``traceparent`` in its headers, and what takes it has links to the spans that sent
it. Nothing of millstream is changed before `instrument` is called, or after `uninstrument`.

>>> import millstream
>>> from millstream.contrib.opentelemetry import instrument, process, uninstrument
>>> instrument()  # with the providers of the program
>>> with millstream.temporary() as store:
...     mail = store.queue("mail")
...     _ = mail.put(b"to ann")
...     with mail.get(timeout=5) as message, process(message):
...         message.value
b'to ann'
>>> uninstrument()
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import millstream
from millstream import (
    Batch,
    Consumer,
    Empty,
    InvalidType,
    Message,
    Producer,
    Put,
    Queue,
    Record,
    Stream,
    Transaction,
)
from millstream.contrib import require

require("opentelemetry-api", "opentelemetry", (1, 30), (2,), "opentelemetry.trace")

from opentelemetry import context as contexts  # noqa: E402
from opentelemetry import metrics, propagate, trace  # noqa: E402
from opentelemetry.trace import Link, SpanKind, Status, StatusCode  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

__all__ = ["instrument", "process", "uninstrument"]

SCHEMA = "https://opentelemetry.io/schemas/1.40.0"
SYSTEM = "messaging.system"
OPERATION = "messaging.operation.name"
KIND = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
PARTITION = "messaging.destination.partition.id"
GROUP = "messaging.consumer.group.name"
COUNT = "messaging.batch.message_count"
MESSAGE = "messaging.message.id"
SIZE = "messaging.message.body.size"
OFFSET = "millstream.offset"
SETTLE = "set" + "tle"  # what the conventions call it; here it is no word
ERROR = "error.type"
OFF = "suppress_instrumentation"
"""The key of the context with which instrumentations are told to be silent."""
LINKS_MAX = 128
SECONDS = (0.000_01, 0.000_1, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


class Sent(dict[str, Any]):
    """Headers that have been seen to: who gets these is within a call that has a span."""


class Instruments:
    """What spans and measurements go to."""

    def __init__(self, tracers: TracerProvider | None, meters: MeterProvider | None) -> None:
        version = millstream.__version__
        self.tracer = trace.get_tracer("millstream", version, tracers, schema_url=SCHEMA)
        meter = metrics.get_meter("millstream", version, meters, schema_url=SCHEMA)
        self.durations = {
            "process": meter.create_histogram(
                "messaging.process.duration",
                unit="s",
                description="Duration of processing operation.",
                explicit_bucket_boundaries_advisory=SECONDS,
            )
        }
        self.duration = meter.create_histogram(
            "messaging.client.operation.duration",
            unit="s",
            description="Duration of messaging operation initiated by a producer or consumer"
            " client.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self.sent = meter.create_counter(
            "messaging.client.sent.messages",
            unit="{message}",
            description="Number of messages producer attempted to send to the broker.",
        )
        self.consumed = meter.create_counter(
            "messaging.client.consumed.messages",
            unit="{message}",
            description="Number of messages that were delivered to the application.",
        )

    @contextlib.contextmanager
    def span(
        self,
        operation: str,
        kind: str,
        destination: str,
        *,
        span_kind: SpanKind = SpanKind.CLIENT,
        links: Sequence[Link] = (),
        parent: contexts.Context | None = None,
        **more: Any,
    ) -> Iterator[Span]:
        """A span around what is done in the block, and its duration."""
        common = _common(operation, kind, destination)
        began = time.perf_counter()
        with self.tracer.start_as_current_span(
            f"{operation} {destination}",
            context=parent,
            kind=span_kind,
            links=links,
            attributes={**common, **_named(more)},
        ) as span:
            try:
                yield span
            except BaseException as error:
                common[ERROR] = type(error).__qualname__
                span.set_attribute(ERROR, common[ERROR])
                raise
            finally:
                seconds = time.perf_counter() - began
                self.durations.get(kind, self.duration).record(seconds, common)

    def received(
        self,
        operation: str,
        destination: str,
        began: int,
        headers: Iterable[Mapping[str, bytes]],
        count: int,
        **more: Any,
    ) -> None:
        """A span of what was received since a time, in nanoseconds; nothing is said of waits."""
        common = _common(operation, "receive", destination)
        self.tracer.start_span(
            f"{operation} {destination}",
            kind=SpanKind.CLIENT,
            links=_links(headers),
            start_time=began,
            attributes={**common, COUNT: count, **_named(more)},
        ).end()
        self.duration.record((time.time_ns() - began) / 1e9, common)
        self.consumed.add(count, common)

    def failed(self, operation: str, destination: str, began: int, error: BaseException) -> None:
        """A span of a call that was to receive, and failed."""
        common = {**_common(operation, "receive", destination), ERROR: type(error).__qualname__}
        span = self.tracer.start_span(
            f"{operation} {destination}",
            kind=SpanKind.CLIENT,
            start_time=began,
            attributes=common,
        )
        span.record_exception(error)
        span.set_status(Status(StatusCode.ERROR, str(error)))
        span.end()
        self.duration.record((time.time_ns() - began) / 1e9, common)


def _common(operation: str, kind: str, destination: str) -> dict[str, Any]:
    return {SYSTEM: "millstream", OPERATION: operation, KIND: kind, DESTINATION: destination}


NAMES = {"partition": PARTITION, "group": GROUP, "count": COUNT, "message": MESSAGE}
NAMES |= {"size": SIZE, "offset": OFFSET}


def _named(more: dict[str, Any]) -> dict[str, Any]:
    """Attributes by their names in the conventions; ids are texts there."""
    texts = ("partition", "message")
    return {
        NAMES[name]: str(value) if name in texts else value
        for name, value in more.items()
        if value is not None
    }


# --- contexts in headers --------------------------------------------------------------------------


def _injected(headers: Mapping[str, Any] | None) -> Sent:
    """Headers with the context of now; what the program has set itself stays."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return Sent({**{name: text.encode() for name, text in carrier.items()}, **(headers or {})})


def _context(headers: Mapping[str, bytes]) -> contexts.Context:
    carrier = {name: value.decode("utf-8", "replace") for name, value in headers.items()}
    return propagate.extract(carrier, contexts.Context())


def _links(every: Iterable[Mapping[str, bytes]]) -> list[Link]:
    """Links to the spans that sent these, one for each span."""
    found: dict[Any, Link] = {}
    for headers in every:
        if not headers:
            continue
        sender = trace.get_current_span(_context(headers)).get_span_context()
        if sender.is_valid:
            found.setdefault((sender.trace_id, sender.span_id), Link(sender))
        if len(found) >= LINKS_MAX:
            break
    return list(found.values())


def _of_batch(batch: Batch) -> Iterator[Mapping[str, bytes]]:
    """The headers of records, those of one span once: they are alike in most of a batch."""
    seen = set()
    for headers in batch.headers:
        if headers and (parent := headers.get("traceparent")) not in seen:
            seen.add(parent)
            yield headers


def _silent() -> bool:
    return bool(contexts.get_value(OFF)) or bool(contexts.get_value(WITHIN))


WITHIN = contexts.create_key("within millstream")


@contextlib.contextmanager
def _within() -> Iterator[None]:
    """What is called in the block is part of a call that has a span."""
    token = contexts.attach(contexts.set_value(WITHIN, True))
    try:
        yield
    finally:
        contexts.detach(token)


# --- processing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def process(
    what: Message | Sequence[Message] | Record | Batch, *, destination: str | None = None
) -> Iterator[None]:
    """A span around the processing of messages or records; nothing before `instrument`.

    Links lead to the spans that sent them. Where no span is under way, that of a single message is
    a child of the span that sent it. Functions of ``queue.worker`` with mode "thread" are in one
    without this.

    Args:
        what: a message, a list of messages, a record or a batch.
        destination: the name of the stream, which records and batches do not know.

    >>> with millstream.temporary() as store:
    ...     mail = store.queue("mail")
    ...     _ = mail.put(b"to ann")
    ...     with mail.get(timeout=5) as message, process(message):
    ...         message.value
    b'to ann'
    """
    state = _now.instruments
    if state is None or _silent():
        yield
        return
    headers, more, name = _described(what)
    several = list(headers)
    if destination is None and name is None:
        raise InvalidType("process: say destination=, the name of the stream")
    alone = len(several) == 1 and not trace.get_current_span().get_span_context().is_valid
    with state.span(
        "process",
        "process",
        destination or name or "",
        span_kind=SpanKind.CONSUMER,
        links=_links(several),
        parent=_context(several[0]) if alone else None,
        **more,
    ):
        yield


def _described(what: Any) -> tuple[Iterable[Mapping[str, bytes]], dict[str, Any], str | None]:
    """Headers, attributes and, of messages, the name of their queue."""
    if isinstance(what, Message):
        return [what.headers], {"message": what.id, "size": len(what.data)}, what.queue.name
    if isinstance(what, Record):
        more = {"partition": what.partition, "offset": what.offset}
        return [what.headers], more, None
    if isinstance(what, Batch):
        more = {"partition": what.partition, "offset": what.first_offset, "count": len(what)}
        return _of_batch(what), more, None
    messages = list(what)
    for one in messages:
        if not isinstance(one, Message):
            raise InvalidType(f"process: expected messages, found {type(one).__name__}")
    name = messages[0].queue.name if messages else None
    return [one.headers for one in messages], {"count": len(messages)}, name


# --- what is replaced -----------------------------------------------------------------------------


def _put(operation: str) -> Callable[[Any], Any]:
    """For a call that stores one message or record."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def call(self: Any, value: Any, **given: Any) -> Any:
            state, headers = _now.instruments, given.get("headers")
            if state is None or isinstance(headers, Sent) or _silent():
                return original(self, value, **given)
            stream = isinstance(self, Producer)
            name = self.stream.name if stream else self.name
            size = len(value) if isinstance(value, bytes) else None
            kind = SpanKind.PRODUCER
            with state.span(operation, "send", name, span_kind=kind, size=size) as span:
                with _within():
                    done = original(self, value, **{**given, "headers": _injected(headers)})
                if isinstance(done, int):
                    span.set_attribute(MESSAGE, str(done))
                elif done is not None:  # or it was sent again
                    span.set_attributes({PARTITION: str(done.partition), OFFSET: done.offset})
            state.sent.add(1, _common(operation, "send", name))
            return done

        return call

    return make


def _aput(original: Any) -> Any:
    @functools.wraps(original)
    async def call(self: Any, value: Any, **given: Any) -> Any:
        state, headers = _now.instruments, given.get("headers")
        if state is None or isinstance(headers, Sent) or _silent():
            return await original(self, value, **given)
        size = len(value) if isinstance(value, bytes) else None
        kind = SpanKind.PRODUCER
        with state.span("put", "send", self.name, span_kind=kind, size=size) as span:
            with _within():
                done = await original(self, value, **{**given, "headers": _injected(headers)})
            span.set_attribute(MESSAGE, str(done))
        state.sent.add(1, _common("put", "send", self.name))
        return done

    return call


def _put_many(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, values: Any, **given: Any) -> Any:
        state = _now.instruments
        if state is None or _silent() or isinstance(values, str | bytes | bytearray | dict):
            return original(self, values, **given)
        with state.span("put", "send", self.name, span_kind=SpanKind.PRODUCER) as span:
            rows = [_with_headers(one) for one in values]
            with _within():
                done = original(self, rows, **given)
            span.set_attribute(COUNT, len(done))
        state.sent.add(len(done), _common("put", "send", self.name))
        return done

    return call


def _with_headers(one: Any) -> Put:
    if not isinstance(one, Put):
        return Put(one, headers=_injected(None))
    return Put(
        one.value, priority=one.priority, delay=one.delay, at=one.at, key=one.key, ttl=one.ttl,
        dedup_id=one.dedup_id, headers=_injected(one.headers),
    )  # fmt: skip


def _for_all(headers: Any) -> Any:
    """Headers of many records: one mapping for all, or one for each."""
    if headers is None or hasattr(headers, "keys"):
        return _injected(headers)
    return [_injected(one) for one in headers]


def _append_many(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, values: Any, **given: Any) -> Any:
        state = _now.instruments
        if state is None or isinstance(given.get("headers"), Sent) or _silent():
            return original(self, values, **given)
        name = self.stream.name if isinstance(self, Producer) else self.name
        with state.span("append", "send", name, span_kind=SpanKind.PRODUCER) as span, _within():
            done = original(self, values, **{**given, "headers": _for_all(given.get("headers"))})
            spans = done if isinstance(done, list | tuple) else [done]
            count = sum(one.count for one in spans if one is not None)
            span.set_attribute(COUNT, count)
        state.sent.add(count, _common("append", "send", name))
        return done

    return call


def _get(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, *words: Any, **given: Any) -> Any:
        state = _now.instruments
        if state is None or _silent():
            return original(self, *words, **given)
        began = time.time_ns()
        try:
            with _within():
                found = original(self, *words, **given)
        except Empty:
            raise
        except Exception as error:
            state.failed("get", self.name, began, error)
            raise
        messages = [found] if isinstance(found, Message) else found
        if messages:
            more = {"message": messages[0].id} if isinstance(found, Message) else {}
            headers = [one.headers for one in messages]
            state.received("get", self.name, began, headers, len(messages), **more)
        return found

    return call


def _ack_many(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, messages: Any) -> Any:
        state = _now.instruments
        if state is None or _silent():
            return original(self, messages)
        messages = list(messages)
        links = _links(one.headers for one in messages)
        with state.span("ack", SETTLE, self.name, links=links, count=len(messages)), _within():
            return original(self, messages)

    return call


def _finish(message: Message, how: str, arguments: tuple[object, ...]) -> int:
    """Around what finishes a message: a call, or the end of a block."""
    state = _now.instruments
    if state is None or _silent():
        return message._finish(how, arguments)
    links = _links([message.headers])
    with state.span(how, SETTLE, message.queue.name, links=links, message=message.id), _within():
        return message._finish(how, arguments)


def _worker(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, **options: Any) -> Any:
        register = original(self, **options)
        if _now.instruments is None or options.get("mode", "thread") != "thread":
            return register

        def decorate(function: Any) -> Any:
            if not callable(function):
                return register(function)

            @functools.wraps(function)
            def processed(what: Any) -> object:
                with process(what):
                    return function(what)

            register(processed)
            return function

        return decorate

    return call


def _next_of(state: Instruments, batches: Iterator[Batch], name: str, group: str | None) -> Any:
    """The next batch of an iterator, or None; with a span where there is one."""
    began = time.time_ns()
    try:
        with _within():
            batch = next(batches, None)
    except Exception as error:
        state.failed("read", name, began, error)
        raise
    if batch is not None:
        _read(state, batch, name, group, began)
    return batch


def _read(state: Instruments, batch: Batch, name: str, group: str | None, began: int) -> None:
    more = {"partition": batch.partition, "offset": batch.first_offset, "group": group}
    state.received("read", name, began, _of_batch(batch), len(batch), **more)


def _named_by(self: Any) -> tuple[str, str | None]:
    """The stream and the group of a consumer, or the stream."""
    if isinstance(self, Consumer):
        return self.stream.name, self.group.name
    return self.name, None


def _batches(original: Any) -> Any:
    """For an iterator of batches."""

    def each(self: Any, batches: Iterator[Batch]) -> Iterator[Batch]:
        name, group = _named_by(self)
        try:
            while True:
                state = _now.instruments
                batch = (
                    next(batches, None) if state is None else _next_of(state, batches, name, group)
                )
                if batch is None:
                    return
                yield batch
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    @functools.wraps(original)
    def call(self: Any, *words: Any, **given: Any) -> Any:
        batches = original(self, *words, **given)
        return batches if _now.instruments is None or _silent() else each(self, batches)

    return call


def _abatches(original: Any) -> Any:
    async def each(self: Any, batches: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
        name, group = _named_by(self)
        async with contextlib.aclosing(batches):  # type: ignore[type-var]
            while True:
                began = time.time_ns()
                try:
                    with _within():
                        batch = await anext(batches, None)
                except Exception as error:
                    if _now.instruments is not None:
                        _now.instruments.failed("read", name, began, error)
                    raise
                if batch is None:
                    return
                if _now.instruments is not None:
                    _read(_now.instruments, batch, name, group, began)
                yield batch

    @functools.wraps(original)
    def call(self: Any, *words: Any, **given: Any) -> Any:
        batches = original(self, *words, **given)
        return batches if _now.instruments is None or _silent() else each(self, batches)

    return call


def _poll(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, *words: Any, **given: Any) -> Any:
        state = _now.instruments
        if state is None or _silent():
            return original(self, *words, **given)
        name, group = _named_by(self)
        return _next_of(state, (original(self, *words, **given) for _ in "1"), name, group)

    return call


def _apoll(original: Any) -> Any:
    @functools.wraps(original)
    async def call(self: Any, *words: Any, **given: Any) -> Any:
        state = _now.instruments
        if state is None or _silent():
            return await original(self, *words, **given)
        (name, group), began = _named_by(self), time.time_ns()
        with _within():
            batch = await original(self, *words, **given)
        if batch is not None:
            _read(state, batch, name, group, began)
        return batch

    return call


def _commit(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, *words: Any, **given: Any) -> Any:
        state = _now.instruments
        if state is None or _silent():
            return original(self, *words, **given)
        name, group = _named_by(self)
        with state.span("commit", SETTLE, name, group=group), _within():
            return original(self, *words, **given)

    return call


def _within_transaction(operation: str) -> Callable[[Any], Any]:
    """For what a transaction is to store: a span of its own, since the commit sends it."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def call(self: Any, where: Any, value: Any, **given: Any) -> Any:
            state, headers = _now.instruments, given.get("headers")
            if state is None or isinstance(headers, Sent) or _silent():
                return original(self, where, value, **given)
            name, many = where.name, operation == "append_many"
            if many and not isinstance(value, list | tuple):
                value = list(value)
            count = len(value) if many else 1
            with state.span("create", "create", name, span_kind=SpanKind.PRODUCER) as span:
                if many:
                    span.set_attribute(COUNT, count)
                    given["headers"] = _for_all(headers)
                else:
                    given["headers"] = _injected(headers)
                with _within():
                    original(self, where, value, **given)
                created = _now.created.setdefault(self, [])
                created.append((name, count, Link(span.get_span_context())))

        return call

    return make


def _acknowledged(original: Any) -> Any:
    """For what a transaction is to acknowledge: its commit has a link to what sent it."""

    @functools.wraps(original)
    def call(self: Any, message: Message) -> None:
        original(self, message)
        if _now.instruments is not None and not _silent():
            _now.acknowledged.setdefault(self, []).extend(_links([message.headers]))

    return call


def _exit(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, kind: Any, *rest: Any) -> Any:
        state, created = _now.instruments, _now.created.pop(self, [])
        acknowledged = _now.acknowledged.pop(self, [])
        if state is None or kind is not None or _silent():
            return original(self, kind, *rest)
        links = [*(link for _, _, link in created), *acknowledged][:LINKS_MAX]
        name = ", ".join(dict.fromkeys(name for name, _, _ in created)) or "transaction"
        count = sum(count for _, count, _ in created)
        with state.span("commit", "send", name, links=links, count=count), _within():
            done = original(self, kind, *rest)
        for one, number, _ in created:
            state.sent.add(number, _common("commit", "send", one))
        return done

    return call


PLACES: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (Queue, "put", _put("put")),
    (Queue, "put_many", _put_many),
    (Queue, "aput", _aput),
    (Queue, "get", _get),
    (Queue, "get_many", _get),
    (Queue, "ack_many", _ack_many),
    (Queue, "worker", _worker),
    (Stream, "append", _put("append")),
    (Stream, "append_many", _append_many),
    (Stream, "read", _batches),
    (Stream, "aread", _abatches),
    (Producer, "append", _put("append")),
    (Producer, "append_many", _append_many),
    (Consumer, "poll", _poll),
    (Consumer, "apoll", _apoll),
    (Consumer, "__iter__", _batches),
    (Consumer, "__aiter__", _abatches),
    (Consumer, "commit", _commit),
    (Transaction, "append", _within_transaction("append")),
    (Transaction, "append_many", _within_transaction("append_many")),
    (Transaction, "put", _within_transaction("put")),
    (Transaction, "ack", _acknowledged),
    (Transaction, "__exit__", _exit),
)


_MESSAGE: Any = Message  # what nobody can make is no class to type checkers


class Now:
    """Whether there is an instrumentation, and what was replaced for it."""

    def __init__(self) -> None:
        self.instruments: Instruments | None = None
        self.replaced: list[tuple[type, str, Any]] = []
        self.created: WeakKeyDictionary[Any, list[tuple[str, int, Link]]] = WeakKeyDictionary()
        self.acknowledged: WeakKeyDictionary[Any, list[Link]] = WeakKeyDictionary()


_now = Now()


def instrument(
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Begin with spans and metrics of what this process does with millstream, in all its stores.

    Calling it again is `uninstrument`, then this. A worker that is registered afterwards with mode
    "thread" has its function in a span as `process` makes it; in other processes call this, too.

    Args:
        tracer_provider: default: the global one.
        meter_provider: default: the global one.
    """
    uninstrument()
    _now.instruments = Instruments(tracer_provider, meter_provider)
    for kind, name, make in PLACES:
        own = vars(kind).get(name)
        setattr(kind, name, make(getattr(kind, name)))
        _now.replaced.append((kind, name, own))
    _MESSAGE._observe(_finish)


def uninstrument() -> None:
    """End it: all that `instrument` replaced is as it was."""
    _MESSAGE._observe(None)
    while _now.replaced:
        kind, name, own = _now.replaced.pop()
        if own is None:  # it was inherited
            delattr(kind, name)
        else:
            setattr(kind, name, own)
    _now.instruments = None
