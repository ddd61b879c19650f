"""A transport of kombu: ``Connection("millstream:///var/lib/app")``, and so the broker of Celery.

``pip install 'millstream[kombu]'``. The alias ``millstream`` is there once kombu's module of
producers and consumers, or this one, has been imported.

- A queue of kombu is a queue of the store. A message is leased until it is acknowledged, however
  long that takes, and comes back within 100 ms when its holder dies.
- Priorities are those of AMQP: 0 to 9, the highest number first, in eight lanes: 4 and 5 share one,
  as do 8 and 9.
- A Celery task with an ``eta`` or ``countdown`` is delayed in the store; no worker holds it before.
- Exchanges (direct, topic, fanout) and what is bound to them are in the stream `kombu.routes`, for
  all processes. A queue that is declared with `auto_delete` or `expires` goes when nobody consumes
  it any more, or dead consumers left it.

Options (`transport_options`) for queues that are made: ``capacity``, messages that are not
acknowledged (250,000); for this connection: ``durability`` ("process", "interval", "sync") and
``put_timeout``, seconds to wait for room in a full queue before `QueueFull` is raised (10).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count
from typing import Any, TypeVar
from urllib.parse import unquote

import millstream
from millstream import Empty, LeaseLost, Message, NotFound, QueueFull, RetryPolicy
from millstream.contrib import require
from millstream.contrib.sharing import LANES, SharedStore, lane_of

require("kombu", "kombu", (5, 5), (6,))

import kombu  # noqa: E402
from kombu.transport import TRANSPORT_ALIASES, virtual  # noqa: E402
from kombu.transport.base import to_rabbitmq_queue_arguments  # noqa: E402

__all__ = ["Broker", "Channel", "Transport", "path_of"]

TRANSPORT_ALIASES.setdefault("millstream", "millstream.contrib.kombu:Transport")

ROUTES = "kombu.routes"
LEASE = 30 * 86400.0
RENEW_SECONDS = 86400.0
UNUSED_SECONDS = 60.0  # for a queue with auto_delete that nobody has consumed yet
LOOK_SECONDS = 1.0  # between two looks whether a transient queue has consumers
LOST_SECONDS = 10.0  # between two warnings of a queue that is full
TURN_SECONDS = 1.0
OPTIONS = {"capacity", "put_timeout", "durability"}
OF_KOMBU = {
    *("max_retries", "interval_start", "interval_step", "interval_max"),
    *("connect_retries_timeout", "errback", "callback"),
}
"""How often a connection is tried, of any transport; Celery gives some of them always."""
ARGUMENTS = {"x-expires", "x-message-ttl", "x-max-priority"}

T = TypeVar("T")

logger = logging.getLogger(__name__)


def path_of(url: str) -> str:
    """The directory that ``millstream:///path`` names; %-escapes are resolved.

    >>> path_of("millstream:///var/lib/my%20app")
    '/var/lib/my app'
    """
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    if scheme != "millstream" or not separator:
        raise millstream.InvalidArgument(f"address {url!r}: expected millstream:///PATH")
    if host not in ("", "localhost"):
        raise millstream.InvalidArgument(
            f"address {url!r}: a store is on this machine; write millstream:///{host}{slash}{path},"
            " with three slashes"
        )
    if not path.strip("/"):
        raise millstream.InvalidArgument(
            f"address {url!r}: names no directory; write millstream:///PATH"
        )
    if "?" in path or "#" in path:
        raise millstream.InvalidArgument(
            f"address {url!r}: takes neither ? nor #; options go into broker_transport_options, and"
            " in a path write %3F or %23"
        )
    return "/" + unquote(path)


@lru_cache(maxsize=4096)
def _stored_name(queue: str) -> str:
    """The name of the store's queue: other characters become ``__`` and their hex code."""
    plain = re.sub(
        r"^\.|[^A-Za-z0-9._-]|_(?=_|[^A-Za-z0-9._-])", lambda found: f"__{ord(found[0]):02X}", queue
    )
    if not 1 <= len(plain) <= 128:
        raise millstream.InvalidArgument(
            f"queue {queue!r}: its name in the store would have {len(plain)} characters; 1 to 128"
            " are allowed"
        )
    return plain


# --- what the processes share ---------------------------------------------------------------------


class Broker(SharedStore):
    """A store as this process has it open for kombu and Celery."""

    def _begin(self) -> None:
        super()._begin()
        self._queues: dict[tuple[str, str | None], millstream.Queue] = {}
        self._routes: Routes | None = None

    @property
    def routes(self) -> Routes:
        """Exchanges, bindings and transient queues."""
        store = self.store
        with self._opening:
            if self._routes is None:
                self._routes = Routes(self, store)
            return self._routes

    def queue(
        self, name: str, durability: Any = None, create: bool = True, **settings: Any
    ) -> millstream.Queue:
        """The queue of that name, made with these settings where it is not there.

        Raises ConfigMismatch where somebody made it with settings that kombu cannot work with;
        NotFound where it is not to be made.
        """
        store = self.store
        key = (name, durability)
        found = self._queues.get(key)
        if found is None or found.closed:
            with self._opening:
                found = self._queues[key] = self._open(store, name, durability, create, settings)
        return found

    def _open(
        self,
        store: millstream.Store,
        name: str,
        durability: Any,
        create: bool,
        settings: dict[str, Any],
    ) -> millstream.Queue:
        needed = {"priorities": LANES, "lease": LEASE, "durability": durability}
        try:
            return store.queue(_stored_name(name), create=False, **needed)
        except NotFound:
            if not create:
                raise
        retry = RetryPolicy(max_attempts=62, backoff=0.0)
        made = {"capacity": 250_000, "slot_bytes": 2048, "retry": retry, **settings}
        return store.queue(_stored_name(name), **needed, **made, on_mismatch="keep")

    def forget(self, name: str) -> None:
        """A queue was dropped: one that is made under its name later is another one."""
        for key in [key for key in list(self._queues) if key[0] == name]:
            self._queues.pop(key, None)

    def has(self, name: str) -> bool:
        """Is there such a queue?"""
        return _stored_name(name) in self.store.queues()

    def drop(self, name: str) -> None:
        """Remove a queue and its messages."""
        self.forget(name)
        with contextlib.suppress(NotFound):
            self.store.drop_queue(_stored_name(name))


Bound = tuple[str, Any, str]
"""As kombu has it: routing key, pattern, queue."""


class Routes:
    """What exchanges there are and what is bound to them: the log of all changes, read to its end.

    The key of a record is a JSON list: ``[exchange]`` with its type, ``[exchange, routing key,
    queue]``, ``["", "", queue]`` with what a transient queue was declared with. Without a value
    it is not so any more. Compaction keeps the last record of each.
    """

    def __init__(self, broker: Broker, store: millstream.Store) -> None:
        self._broker = broker
        self._stream = store.stream(
            ROUTES, partitions=1, segment_bytes="1MiB", compact=millstream.Compaction()
        )
        self._next = 0
        self._lock = threading.Lock()
        self.exchanges: dict[str, str] = {}
        self.bindings: dict[str, dict[tuple[str, str], None]] = {}
        self.transient: dict[str, dict[str, Any]] = {}
        self._looked: dict[str, float] = {}
        self._lost: dict[str, tuple[int, float]] = {}

    def catch_up(self) -> Routes:
        """Know all that any process said before this call."""
        if self._stream.next_offset(0) != self._next:
            with self._lock:
                for batch in self._stream.read(partition=0, start=self._next):
                    for key, value in zip(batch.keys, batch.values, strict=True):
                        self._apply(json.loads(key or b"[]"), value)
                    self._next = batch.next_offset
        return self

    def _apply(self, key: list[str], value: bytes | None) -> None:
        if len(key) == 1 and value is not None:
            self.exchanges[key[0]] = json.loads(value)
        elif len(key) == 1:
            self.exchanges.pop(key[0], None)
            self.bindings.pop(key[0], None)
        elif len(key) == 3:
            exchange, routing_key, queue = key
            if exchange:
                there = self.bindings.setdefault(exchange, {})
                if value is None:
                    there.pop((routing_key, queue), None)
                else:
                    there[routing_key, queue] = None
            elif value is None:
                self.transient.pop(queue, None)
            else:
                self.transient[queue] = json.loads(value)

    def say(self, *key: str, value: object) -> None:
        """Tell all processes; a value of None takes the key away."""
        data = None if value is None else json.dumps(value).encode()
        self._stream.append(data, key=json.dumps(key).encode())
        self.catch_up()

    def unbind_all(self, queue: str) -> None:
        """Take a queue that is gone, or about to go, out of all exchanges."""
        self.catch_up()
        for exchange, there in list(self.bindings.items()):
            for routing_key, bound in list(there):
                if bound == queue:
                    self.say(exchange, routing_key, queue, value=None)
        if queue in self.transient:
            self.say("", "", queue, value=None)

    def sweep(self, queues: set[str]) -> None:
        """Remove those of these transient queues that nobody consumes any more.

        Each live consumer holds a lease in its queue (see `_Consumer`); leases end with processes.
        """
        now = time.monotonic()
        for queue in [name for name in queues if now - self._looked.get(name, -1e9) > LOOK_SECONDS]:
            self._looked[queue] = now
            told = self.transient.get(queue)
            if told is None:  # another one of these was removed, and this one with it
                continue
            try:
                used = self._broker.queue(queue, create=False).stats().leased > 0
            except millstream.Closed:
                self._broker.forget(queue)
                continue
            except NotFound:
                self.unbind_all(queue)
                continue
            if used and told["unused"] is not None:
                self.say("", "", queue, value={**told, "unused": None})
            elif not used and told["unused"] is None:
                self.say("", "", queue, value={**told, "unused": time.time()})
            elif not used and time.time() - told["unused"] > told["expires"]:
                self.remove(queue)

    def lose(self, queue: str) -> None:
        """A transient queue is full: who reads it too slowly stops nobody. Said now and then."""
        lost, said = self._lost.get(queue, (0, -1e9))
        if time.monotonic() - said > LOST_SECONDS:
            said = time.monotonic()
            logger.warning("queue %r is full, its reader too slow: %d lost", queue, lost + 1)
        self._lost[queue] = lost + 1, said

    def remove(self, queue: str) -> None:
        """Remove a queue and what is bound to it."""
        self._lost.pop(queue, None)
        self._looked.pop(queue, None)
        self.unbind_all(queue)
        self._broker.drop(queue)


# --- consuming ------------------------------------------------------------------------------------


class _Consumer:
    """One consumer of a channel, and the thread that waits at its queue while nothing comes.

    `drain` of the channel takes messages itself; only when there is none does it arm the thread,
    which waits for the next one, hands it over and wakes the transport. Of a transient queue the
    consumer holds a message for as long as it lives: that is how others know that it does.
    """

    def __init__(
        self, channel: Channel, tag: str, queue: str, no_ack: bool, callback: Callable[[Any], Any]
    ) -> None:
        self.tag, self.queue, self.no_ack, self.callback = tag, queue, no_ack, callback
        self.handle = channel.queue(queue)
        self._channel = channel
        self._wake = channel.connection.wake
        self._found: deque[Message] = deque()
        self._lock = threading.Lock()
        self._armed = threading.Event()
        self._over = False
        self._error: Exception | None = None
        self._token: Message | None = None
        if queue in channel.routes.transient:
            try:
                self.handle.put(b"", priority=0, timeout=0)
            except QueueFull:  # nobody read it: what it has is old
                self.handle.purge()
                self.handle.put(b"", priority=0, timeout=10.0)
            self._token = self.handle.get(timeout=10.0)
        self._thread = threading.Thread(target=self._run, name=f"millstream-{tag}", daemon=True)
        self._thread.start()

    def arm(self) -> None:
        if not self._armed.is_set():
            self._armed.set()

    def take(self) -> Message | None:
        """The next message; None: there is none."""
        if self._error is not None:
            raise self._error
        if self._found:
            return self._found.popleft()
        try:
            return self.handle.get(timeout=0)
        except Empty:
            return None
        except millstream.Closed:
            return None  # dropped, or the store is closed

    def give_back(self) -> None:
        """Others may have what the thread took and this channel has no room for."""
        while self._found:
            _quietly(self._found.popleft().release)

    def end(self) -> None:
        with self._lock:
            self._over = True
        self._armed.set()
        self.give_back()
        if self._token is not None:
            _quietly(self._token.ack)

    def _run(self) -> None:
        renewed = time.monotonic()
        try:
            while not self._over:
                if self._armed.wait(RENEW_SECONDS / 24) and not self._over:
                    self._wait()
                if time.monotonic() - renewed > RENEW_SECONDS:
                    renewed = time.monotonic()
                    self._channel.renew()
                    if self._token is not None:
                        self._token.extend(LEASE)
        except millstream.Closed:
            return
        except Exception as error:  # the next drain_events raises it
            self._error = error
            with self._lock:
                if not self._over:
                    self._wake()

    def _wait(self) -> None:
        try:
            message = self.handle.get(timeout=TURN_SECONDS)
        except Empty:
            return
        self._armed.clear()
        with self._lock:
            if not self._over:
                self._found.append(message)
                self._wake()
                return
        _quietly(message.release)


def _quietly(finish: Callable[[], None]) -> None:
    """Finish a message; where its lease is over it is delivered again, which is said."""
    try:
        finish()
    except LeaseLost as error:
        logger.warning("%s; it is delivered again", error)
    except millstream.Closed:  # the store, or the queue was dropped: the lease ended with it
        pass


class QoS(virtual.QoS):  # type: ignore[misc]
    """What a channel has delivered and not acknowledged."""

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        self.channel = channel
        self.prefetch_count = prefetch_count
        self.held: dict[Any, Message] = {}

    def can_consume(self) -> bool:
        """Is there room for one more?"""
        return not self.prefetch_count or len(self.held) < self.prefetch_count

    def can_consume_max_estimate(self) -> int | None:
        """For how many; None: any number."""
        return max(self.prefetch_count - len(self.held), 0) if self.prefetch_count else None

    def ack(self, delivery_tag: Any) -> None:
        """Finish a message."""
        self._finish(delivery_tag, lambda message: message.ack())

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Give a message back as it came, or have it among the dead letters."""
        if requeue:
            self._finish(delivery_tag, lambda message: message.release())
        else:
            self._finish(delivery_tag, lambda message: message.reject("rejected by its consumer"))

    def _finish(self, delivery_tag: Any, finish: Callable[[Message], None]) -> None:
        message = self.held.pop(delivery_tag, None)
        if message is not None:
            _quietly(lambda: finish(message))
            if self.channel.starved:
                self.channel.connection.wake()

    def restore_unacked(self) -> list[Any]:
        """Give back all."""
        while self.held:
            with contextlib.suppress(KeyError):
                _, message = self.held.popitem()
                _quietly(message.release)
        return []

    def restore_unacked_once(self, stderr: object = None) -> None:
        """Give back all."""
        self.restore_unacked()


class Channel(virtual.Channel):  # type: ignore[misc]
    """A channel: declares, publishes and consumes."""

    QoS = QoS
    supports_fanout = True
    body_encoding = None  # bodies are stored as they are

    def __init__(self, connection: Transport, **options: Any) -> None:
        super().__init__(connection, **options)
        self.closed: bool = False
        self._tags = count(1)
        self._by_tag: dict[str, _Consumer] = {}
        self._turn: deque[_Consumer] = deque()
        self.starved = False
        options = connection.client.transport_options
        self._durability = options.get("durability")
        self._put_timeout = _seconds("put_timeout", options.get("put_timeout", 10.0))
        self._capacity = options.get("capacity", 250_000)

    @property
    def broker(self) -> Broker:
        """The store."""
        broker: Broker = self.connection.broker
        return broker

    @property
    def routes(self) -> Routes:
        """Exchanges and bindings, as of now."""
        return self.broker.routes.catch_up()

    def queue(self, name: str, create: bool = True) -> millstream.Queue:
        """The store's queue, made where it is not there."""
        return self.broker.queue(name, self._durability, create, capacity=self._capacity)

    def _at(self, name: str, call: Callable[[millstream.Queue], T], create: bool = True) -> T:
        """Call something of a queue, of the new one where it was dropped and made again."""
        try:
            return call(self.queue(name, create))
        except millstream.Closed:
            if self.broker.store.closed:
                raise
            self.broker.forget(name)
            return call(self.queue(name, create))

    # --- declaring --------------------------------------------------------------------------------

    def exchange_declare(
        self, exchange: Any = None, type: Any = "direct", *args: Any, **options: Any
    ) -> None:
        """Declare an exchange. Raises ChannelError for a type that cannot be served."""
        type = type or "direct"
        exchange = exchange or f"amq.{type}"
        if type not in self.exchange_types:
            raise kombu.exceptions.ChannelError(
                f"exchange {exchange!r}: of type {type!r}; the transport millstream has direct,"
                " topic and fanout, and no other one",
                (40, 10), "Channel.exchange_declare", "540",
            )  # fmt: skip
        there = self.routes.exchanges.get(exchange)
        if there is not None and there != type:
            raise virtual.base.NotEquivalentError(
                f"exchange {exchange!r} of {self.broker.path} is of type {there!r}, not {type!r}"
            )
        if there is not None and options.get("passive"):
            return
        super().exchange_declare(exchange, type, *args, **options)
        if there is None:
            self.routes.say(exchange, value=type)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Remove an exchange and all that is bound to it."""
        for routing_key, queue in list(self.routes.bindings.get(exchange, ())):
            self.routes.say(exchange, routing_key, queue, value=None)
        self.routes.say(exchange, value=None)
        self.state.exchanges.pop(exchange, None)

    def typeof(self, exchange: str, default: str = "direct") -> Any:
        """The type of an exchange, whoever declared it."""
        return self.exchange_types[self.routes.exchanges.get(exchange, default)]

    def get_table(self, exchange: str) -> list[Bound]:
        """What is bound to an exchange."""
        bind = self.typeof(exchange).prepare_bind
        return [
            bind(queue, exchange, routing_key, None)
            for routing_key, queue in list(self.routes.bindings.get(exchange, ()))
        ]

    def get_exchanges(self) -> list[str]:
        """All exchanges."""
        return list(self.routes.exchanges)

    def list_bindings(self) -> Iterator[tuple[str, str, str]]:
        """All bindings: queue, exchange, routing key."""
        for exchange, there in list(self.routes.bindings.items()):
            for routing_key, queue in list(there):
                yield queue, exchange, routing_key

    def prepare_queue_arguments(self, arguments: Any, **options: Any) -> Any:
        """As RabbitMQ has them."""
        return to_rabbitmq_queue_arguments(arguments or {}, **options)

    def _new_queue(
        self, queue: str, auto_delete: bool = False, arguments: Any = None, **options: Any
    ) -> None:
        arguments = arguments or {}
        if unknown := sorted(set(arguments) - ARGUMENTS):
            raise kombu.exceptions.ChannelError(
                f"queue {queue!r}: {', '.join(unknown)} cannot be had with the transport"
                f" millstream, only {', '.join(sorted(ARGUMENTS))}",
                (50, 10), "Channel.queue_declare", "540",
            )  # fmt: skip
        settings: dict[str, Any] = {"capacity": self._capacity}
        expires = arguments.get("x-expires")
        transient = bool(auto_delete or expires)
        if transient:
            settings = {"capacity": 10_000, "slot_bytes": 1024}
        if ttl := arguments.get("x-message-ttl"):
            settings["ttl"] = ttl / 1000
        if transient:
            routes = self.routes
            routes.sweep(set(routes.transient))
            if routes.transient.get(queue, {"unused": 0})["unused"] is not None:
                told = {
                    "expires": expires / 1000 if expires else UNUSED_SECONDS,
                    "auto_delete": bool(auto_delete),
                    "unused": time.time(),
                }
                routes.say("", "", queue, value=told)
        self.broker.queue(queue, self._durability, **settings)

    def _has_queue(self, queue: str, **options: Any) -> bool:
        return self.broker.has(queue)

    def queue_bind(
        self, queue: str, exchange: Any = None, routing_key: Any = "", *args: Any, **options: Any
    ) -> None:
        """Have what is published to an exchange under a routing key put into a queue."""
        exchange, routing_key = exchange or "amq.direct", routing_key or ""
        if (routing_key, queue) not in self.routes.bindings.get(exchange, ()):
            self.routes.say(exchange, routing_key, queue, value=1)

    def queue_unbind(
        self, queue: str, exchange: Any = None, routing_key: Any = "", *args: Any, **options: Any
    ) -> None:
        """End a binding."""
        if (routing_key, queue) in self.routes.bindings.get(exchange or "amq.direct", ()):
            self.routes.say(exchange or "amq.direct", routing_key, queue, value=None)

    def queue_delete(
        self, queue: str, if_unused: bool = False, if_empty: bool = False, **options: Any
    ) -> None:
        """Remove a queue, its messages and bindings."""
        if not self.broker.has(queue) or (if_empty and self._size(queue)):
            return
        if if_unused and self._at(queue, lambda there: there.stats()).leased:
            return
        self.routes.remove(queue)

    def _purge(self, queue: str) -> int:
        return self._at(queue, lambda there: there.purge())

    def _size(self, queue: str) -> int:
        stats = self._at(queue, lambda there: there.stats())
        return int(stats.ready + stats.delayed)

    # --- publishing -------------------------------------------------------------------------------

    def _next_delivery_tag(self) -> int:
        return next(self._tags)

    def _put_fanout(
        self, exchange: str, message: dict[str, Any], routing_key: Any, **options: Any
    ) -> None:
        for queue in self._lookup(exchange, routing_key):
            self._put(queue, message, **options)

    def _lookup(self, exchange: str, routing_key: str, default: Any = None) -> Any:
        if exchange:
            routes = self.routes
            bound = {queue for _, queue in routes.bindings.get(exchange, ())}
            routes.sweep(bound & routes.transient.keys())
        return super()._lookup(exchange, routing_key, default)

    def _put(self, queue: str, message: dict[str, Any], **options: Any) -> None:
        head = dict(message)
        body = head.pop("body")
        properties, headers = message["properties"], message.get("headers") or {}
        lane = lane_of(self._get_message_priority(message))
        due = _due(headers)
        ttl = None
        if (expiration := properties.get("expiration")) and not headers.get("expires"):
            ttl = max(float(expiration) / 1000, 0.001)  # a task's `expires` is the worker's to see
        transient = queue in self.broker.routes.transient
        data = body.encode() if isinstance(body, str) else bytes(body)
        value = json.dumps(head, separators=(",", ":"), default=str).encode() + b"\n" + data
        try:
            self._at(
                queue,
                lambda there: there.put(
                    value,
                    priority=max(lane, 1) if transient else lane,
                    at=due,
                    ttl=ttl,
                    timeout=0 if transient else self._put_timeout,
                ),
                create=not properties["delivery_info"].get("exchange"),
            )
        except QueueFull:
            if not transient:
                raise
            self.broker.routes.lose(queue)
        except NotFound:  # what is bound can go: its reader left while this was on its way
            self.broker.routes.unbind_all(queue)

    # --- consuming --------------------------------------------------------------------------------

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **options: Any
    ) -> None:
        """Have the messages of a queue given to a callback by `drain_events`."""
        consumer = _Consumer(self, consumer_tag, queue, no_ack, callback)
        self._by_tag[consumer_tag] = consumer
        self._turn.append(consumer)
        self._consumers.add(consumer_tag)
        self.connection.wake()

    def basic_cancel(self, consumer_tag: str) -> None:
        """End a consumer; what it has delivered stays with the channel."""
        consumer = self._by_tag.pop(consumer_tag, None)
        if consumer is None:
            return
        self._consumers.discard(consumer_tag)
        self._turn.remove(consumer)
        consumer.end()
        routes = self.broker.routes
        told = routes.transient.get(consumer.queue)
        goes = told is not None and told["auto_delete"] and not consumer.handle.closed
        if goes and not consumer.handle.stats().leased:
            routes.remove(consumer.queue)

    def basic_get(self, queue: str, no_ack: bool = False, **options: Any) -> Any:
        """Take one message; None: there is none."""
        try:
            message = self._at(queue, lambda there: there.get(timeout=0))
        except Empty:
            return None
        return self._delivery(queue, message, no_ack)

    def basic_qos(self, *args: Any, **options: Any) -> None:
        """Say how many messages may be not acknowledged."""
        super().basic_qos(*args, **options)
        self.connection.wake()

    def _delivery(self, queue: str, message: Message, no_ack: bool) -> Any:
        tag = next(self._tags)
        head, _, body = message.value.partition(b"\n")
        try:
            payload = json.loads(head)
            payload["body"] = body
            payload["properties"]["delivery_tag"] = tag
            if message.attempt > 1:
                payload["properties"]["delivery_info"]["redelivered"] = True
            delivery = self.Message(payload, channel=self)
        except (ValueError, TypeError, KeyError) as error:
            reason = f"kombu did not put it: {error!r}"
            logger.error(
                "queue %r: message %d: %s; see its dead letters", queue, message.id, reason
            )
            message.reject(reason)
            return None
        if no_ack:
            message.ack()
        else:
            self.qos.held[tag] = message
        return delivery

    def drain(self) -> bool:
        """Deliver one message, the queues in turn; was there one, and room for it?

        One at a time: Celery acknowledges in the next turn of its event loop, and a pool without
        processes or threads runs a task where it is delivered. Of several, those that are done
        would be acknowledged after the last, and run again if the worker was killed before.
        """
        empty = 0
        self.starved = False
        while empty < len(self._turn):
            consumer = self._turn[0]
            self._turn.rotate(-1)
            if not consumer.no_ack and not self.qos.can_consume():
                self.starved = True
                consumer.give_back()
                empty += 1
            elif (message := consumer.take()) is None:
                empty += 1
            elif not message.value:  # the token of a consumer that is gone
                message.ack()
            else:
                empty = 0
                delivery = self._delivery(consumer.queue, message, consumer.no_ack)
                if delivery is not None:
                    consumer.callback(delivery)
                    return True
        for consumer in self._turn:
            if consumer.no_ack or not self.starved:
                consumer.arm()
        return False

    def renew(self) -> None:
        """Lease for longer what is not acknowledged."""
        for message in list(self.qos.held.values()):
            _quietly(lambda message=message: message.extend(LEASE))  # type: ignore[misc]

    def close(self) -> None:
        """End all consumers and give back what is not acknowledged."""
        if not self.closed:
            self.closed = True
            for tag in list(self._by_tag):
                self.basic_cancel(tag)
            if self._qos is not None:
                self._qos.restore_unacked()
            if self.connection is not None:
                self.connection.close_channel(self)


def _seconds(name: str, value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise millstream.InvalidArgument(f"transport option {name}={value!r}: expected seconds")
    return seconds


def _due(headers: dict[str, Any]) -> datetime | None:
    """When a task of Celery is to be run; None: at once."""
    eta = headers.get("eta") if "task" in headers else None
    if not eta:
        return None
    try:
        due = datetime.fromisoformat(eta)
    except (TypeError, ValueError):
        return None  # the worker says what is wrong with it
    return due if due.tzinfo else due.replace(tzinfo=UTC)


class Transport(virtual.Transport):  # type: ignore[misc]
    """kombu over the store in a directory, ``millstream:///var/lib/app``."""

    Channel = Channel
    can_parse_url = True
    driver_type = driver_name = "millstream"
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"])
    )

    def __init__(self, client: Any, **options: Any) -> None:
        super().__init__(client, **options)
        self._broker: Broker | None = None
        self._bell = -1
        self._bell_lock = threading.Lock()  # of its number, which another file may have soon
        self._loop: Any = None

    def driver_version(self) -> str:
        """The version of millstream."""
        return millstream.__version__

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """As it was given."""
        return uri

    @property
    def default_connection_params(self) -> dict[str, Any]:
        """None."""
        return {}

    @property
    def broker(self) -> Broker:
        """The store. Raises InvalidArgument, StorageError, ... where it cannot be opened."""
        if self._broker is None:
            url = self.client.hostname or ""
            if "://" not in url:  # after a fail-over kombu has parsed it
                url = "millstream:///" + (self.client.virtual_host or "").lstrip("/")
            broker = Broker.join(path_of(url))
            try:
                broker.store.queues()
            except BaseException:
                broker.leave()
                raise
            self._broker = broker
            if idle := sorted(self.client.transport_options.keys() - OPTIONS - OF_KOMBU):
                logger.warning("%s: no option of millstream; see its guide", ", ".join(idle))
        return self._broker

    def establish_connection(self) -> Transport:
        """Open the store."""
        self.broker  # noqa: B018
        if self._bell < 0:
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            connection: Transport = super().establish_connection()
        except BaseException:  # no connection, so nobody closes it
            self._leave()
            raise
        return connection

    def close_connection(self, connection: object) -> None:
        """Close all channels, and the store with its last connection."""
        super().close_connection(connection)
        if self._loop is not None:
            self.unregister_from_event_loop(connection, self._loop)
        self._leave()

    def _leave(self) -> None:
        with self._bell_lock:
            bell, self._bell = self._bell, -1
            if bell >= 0:
                os.close(bell)
        broker, self._broker = self._broker, None
        if broker is not None:
            broker.leave()

    def wake(self) -> None:
        """Have `drain_events`, or the event loop, look again; from any thread."""
        with self._bell_lock:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def _drain(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        return bool(sum(channel.drain() for channel in list(self.channels)))

    def drain_events(self, connection: object, timeout: float | None = None) -> None:
        """Deliver what there is; wait for it where there is nothing."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._drain():
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            select.select([self._bell], [], [], min(left, 1.0))

    def register_with_event_loop(self, connection: object, loop: Any) -> None:
        """Deliver from an event loop of kombu."""
        self._loop = loop
        loop.add_reader(self._bell, self._on_bell)
        loop.on_tick.add(self._on_tick)

    def unregister_from_event_loop(self, connection: object, loop: Any) -> None:
        """Deliver no more from it."""
        self._loop = None
        loop.on_tick.discard(self._on_tick)
        if self._bell >= 0:
            loop.remove_reader(self._bell)

    def _on_bell(self) -> None:
        if self._drain():
            self.wake()

    def _on_tick(self) -> None:
        for channel in list(self.channels):
            if channel.starved and channel.qos.can_consume() and channel.drain():
                self.wake()
