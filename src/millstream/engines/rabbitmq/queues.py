"""Queues on RabbitMQ: quorum queues of 4.3 and later.

Whoever takes messages has a channel for them alone, with one lease: when it ends the server takes
back what is left and closes that channel, which is how a late acknowledgement is seen.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import json
import math
import os
import time
from typing import TYPE_CHECKING, Any

import pika
from pika import exceptions as amqp_errors

from millstream import DeadLetter, Put, QueueStats, RetryPolicy, codecs, timestamps
from millstream.engines.queue import ServerQueue, moment
from millstream.engines.rabbitmq.capabilities import PRIORITIES
from millstream.engines.rabbitmq.connection import Refused, Unroutable
from millstream.engines.rabbitmq.records import KEY
from millstream.errors import (
    InvalidArgument,
    InvalidType,
    LeaseLost,
    LimitExceeded,
    NotFound,
    Reject,
    Retry,
    Snooze,
    StorageError,
    Unsupported,
)
from millstream.options import CENTURY, FOREVER, check_timeout, integer, number
from millstream.queue_errors import QueueFull

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from millstream.engines.rabbitmq.connection import Channel, RabbitConnection
    from millstream.engines.rabbitmq.store import RabbitStore
    from millstream.options import Durability

__all__ = ["RabbitMessage", "RabbitQueue"]

PUT_AT, ODD = "ms-put-at", "ms-headers"
REASON, ERROR, ATTEMPTS, DEAD_AT = "ms-reason", "ms-error", "ms-attempts", "ms-dead-at"
SERVERS = ("x-", "ms-")
"""Beginnings of names that are not a user's."""
HEADER_BYTES = 100_000
"""They go in one frame, whose length the server limits to 131,072."""
FULL_SECONDS = 0.05
BURST_SECONDS = 0.03
BACK_LOOKS, BACK_SECONDS = 50, 0.02
TOP = PRIORITIES - 1


def arguments_of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """How the server is told to hold a queue."""
    retry = RetryPolicy(**settings["retry"])
    made: dict[str, Any] = {
        "x-queue-type": "quorum",
        "x-consumer-timeout": max(1, round(float(settings["lease"]) * 1000)),
        "x-delivery-limit": retry.max_attempts - 1,  # it is dead one behind the limit
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": f"{name}.dead",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    if retry.backoff > 0:
        least = max(1, round(retry.backoff * 1000))
        made["x-delayed-retry-type"] = "failed"
        made["x-delayed-retry-min"] = least
        made["x-delayed-retry-max"] = max(least, round(retry.max_delay * 1000))
    if settings["ttl"] is not None:
        made["x-message-ttl"] = math.ceil(float(settings["ttl"]) * 1000)
    return made


class RabbitQueue(ServerQueue["RabbitMessage"]):
    """A queue on a RabbitMQ server; made by `RabbitStore.queue`. Thread-safe."""

    store: RabbitStore
    connection: RabbitConnection

    def __init__(
        self, store: RabbitStore, name: str, settings: dict[str, Any], durability: Durability,
        codec: object,
    ) -> None:  # fmt: skip
        self.store = store
        self.name = name
        self.durability = durability
        self.priorities = int(settings["priorities"])
        self.lease = float(settings["lease"])
        self.retry = RetryPolicy(**settings["retry"])
        self.ttl: float | None = settings["ttl"]
        self._codec = codecs.resolve(codec)
        self.connection = store.connection

    def __repr__(self) -> str:
        return f"<RabbitQueue {self.name!r} of {self.store.path!r}>"

    def _refuse(self, name: str) -> Unsupported:
        return self.store.capabilities.refusal(name)

    # --- putting ----------------------------------------------------------------------------------

    def put(
        self,
        value: Any,
        *,
        priority: int = 0,
        delay: float = 0.0,
        at: Any = None,
        key: Any = None,
        ttl: float | None = None,
        dedup_id: Any = None,
        headers: Any = None,
        timeout: float | None = None,
    ) -> int:
        """Put a message; its id."""
        checked = check_timeout(timeout)
        made = self._message(value, priority, delay, at, key, ttl, dedup_id, headers)
        return self.send(self.name, [made], checked)[0]

    def _message(
        self, value: Any, priority: int, delay: float, at: Any, key: Any, ttl: float | None,
        dedup_id: Any, headers: Any,
    ) -> tuple[bytes, Any]:  # fmt: skip
        self.connection.check_open()
        self.store.check_writable()
        integer("priority", priority, 0, self.priorities - 1)
        if dedup_id is not None:
            raise self._refuse("queue.dedup")
        if at is not None:
            delay = max(delay, timestamps.microseconds(at) / 1e6 - time.time())
        if number("delay", max(delay, 0.0) if at is not None else delay, 0.0, CENTURY) > 0:
            raise self._refuse("queue.delay")
        data = self._encoded(value)
        table: dict[str, Any] = {PUT_AT: int(time.time() * 1e6)}
        if key is not None:
            table[KEY] = bytes(key)
        odd = {}
        for name, content in _headers(headers).items():
            if name.startswith(SERVERS) or not 1 <= len(name.encode()) <= 255:
                odd[name] = base64.b64encode(content).decode()
            else:
                table[name] = content
        if odd:
            table[ODD] = json.dumps(odd).encode()
        size = sum(len(name) + len(item) + 8 for name, item in table.items()
                   if isinstance(item, bytes))  # fmt: skip
        if size > HEADER_BYTES:
            raise LimitExceeded(
                f"headers of {size} bytes: {self.store.engine} takes them in one frame, so"
                f" {HEADER_BYTES}; put them into the value"
            )
        expiration = None
        if ttl is not None:
            expiration = str(math.ceil(number("ttl", ttl, 0.0, CENTURY) * 1000))
        return data, pika.BasicProperties(
            delivery_mode=2, headers=table, priority=TOP - priority, expiration=expiration,
            message_id=str(int.from_bytes(os.urandom(8), "big") >> 1),
        )  # fmt: skip

    def send(
        self, target: str, made: Sequence[tuple[bytes, Any]], timeout: float | None
    ) -> list[int]:
        """Store messages in a queue of the server, and return their ids.

        Raises: QueueFull where no room came in time, with those that were put in `put`.
        """
        end = time.monotonic() + (FOREVER if timeout is None else timeout)
        left = list(made)
        while True:
            left = self.connection.call(self.send_all(target, left))
            if not left:
                return [int(properties.message_id) for _, properties in made]
            if time.monotonic() >= end:
                raise QueueFull(
                    f"{self.where}: the server refuses, by its limits of length;"
                    f" {len(made) - len(left)} of {len(made)} were put"
                )
            time.sleep(FULL_SECONDS)

    async def send_all(
        self, target: str, made: Sequence[tuple[bytes, Any]]
    ) -> list[tuple[bytes, Any]]:
        """Those that the server has refused for want of room."""
        publisher = await self.connection.publisher()
        waiting = [publisher.send(target, *one) for one in made]
        left = []
        failed: Exception | None = None
        for one, future in zip(made, waiting, strict=True):
            try:
                await _within(future, self.connection.timeout)
            except Refused:
                left.append(one)
            except Unroutable:
                failed = NotFound(f"{self.where}: it is not there any more")
            except TimeoutError:
                failed = self.connection.unsure(self.where)
            except amqp_errors.AMQPError as error:
                failed = self._not_put(error, len(one[0]))
        if failed is not None:
            raise failed
        return left

    def _not_put(self, error: Exception, size: int) -> Exception:
        text = str(error)
        if "larger than" in text or "max_message_size" in text or "max size" in text:
            return LimitExceeded(
                f"a message of {size} bytes: {self.store.engine} at {self.store.path} does not take"
                f" it: {text}; raise max_message_size in its configuration"
            )
        return StorageError(
            errno.EIO, f"the connection was lost, so it may be put or not: {text}", self.where
        )

    def put_many(self, items: Iterable[Any], timeout: float | None = 0) -> list[int]:
        """Put values or `Put`s; their ids. All are checked before the first is sent."""
        checked = check_timeout(timeout)
        made = []
        for item in items:
            put = item if isinstance(item, Put) else Put(item)
            made.append(
                self._message(
                    put.value, put.priority, put.delay, put.at, put.key, put.ttl, put.dedup_id,
                    put.headers,
                )
            )  # fmt: skip
        return self.send(self.name, made, checked) if made else []

    # --- getting ----------------------------------------------------------------------------------

    def get_many(self, count: int, *, timeout: float | None = None) -> list[RabbitMessage]:
        """Lease up to so many: those that are there, or the first that comes."""
        wanted = integer("count", count, 0, 65_535)
        checked = check_timeout(timeout)
        self.connection.check_open()
        self.store.check_writable()
        if wanted == 0:
            return []
        seconds = FOREVER if checked is None else checked
        return self.connection.call(self._take(wanted, seconds))

    async def _take(self, count: int, seconds: float) -> list[RabbitMessage]:
        channel = await self.connection.channel()
        lease = Lease(channel)
        asked = time.monotonic()
        found = []
        try:
            first = await channel.get(self.name)
            if first is not None:
                found.append(RabbitMessage(self, lease, asked, *first))
            if len(found) < count and (found or seconds > 0):
                wait = BURST_SECONDS if found else seconds
                found += await self._burst(lease, count - len(found), wait)
        except amqp_errors.ChannelClosedByBroker as error:
            if error.reply_code == 404:
                raise NotFound(f"{self.where}: it is not there any more") from error
            raise
        except BaseException:
            if channel.raw.is_open:  # what it holds goes back
                channel.raw.close()
            raise
        lease.held = len(found)
        if not found:
            self.connection.keep(channel)
        return found

    async def _burst(self, lease: Lease, count: int, seconds: float) -> list[RabbitMessage]:
        """What a consumer gets at once, or as the first within some seconds."""
        channel = lease.channel
        came: list[tuple[float, Any]] = []
        arrived = channel.future()

        def take(_: object, *message: Any) -> None:
            nonlocal arrived
            came.append((time.monotonic(), message))
            if not arrived.done():
                arrived.set_result(None)

        asked = time.monotonic()
        await channel.ask("basic_qos", prefetch_count=count)
        tag = f"m{os.urandom(8).hex()}"
        await channel.ask(
            "basic_consume", queue=self.name, on_message_callback=take, consumer_tag=tag
        )
        with contextlib.suppress(TimeoutError):
            await _within(arrived, seconds)
            while len(came) < count:  # what is there comes without a pause
                arrived = channel.future()
                await _within(arrived, BURST_SECONDS)
        arrived.cancel()
        await channel.ask("basic_cancel", consumer_tag=tag)
        return [RabbitMessage(self, lease, max(asked, at - 0.05), *message) for at, message in came]

    # --- looking ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many wait; the server does not tell how many are leased."""
        return self.connection.call(self.waiting(self.name))

    async def waiting(self, name: str) -> int:
        """How many wait in a queue of the server."""
        channel = await self.connection.channel()
        try:
            frame = await channel.ask("queue_declare", queue=name, passive=True)
        except amqp_errors.ChannelClosedByBroker as error:
            raise NotFound(f"{self.where}: it is not there any more") from error
        self.connection.keep(channel)
        return int(frame.method.message_count)

    def stats(self) -> QueueStats:
        """What waits and what is dead, as of now; the server tells no more."""
        ready = len(self)
        return QueueStats(
            name=self.name, durability=self.durability, capacity=0, unfinished=ready, ready=ready,
            delayed=0, held=0, leased=0, dead=len(self.dead), by_priority=(), paused=False,
            oldest_age=None, put=0, done=0, failed=0, cancelled=0, redelivered=0, expired=0,
            evicted=0, corrupt=0, refused=0, slots=0, blocks=0, health="sound",
            priorities=self.priorities, lease=self.lease, ordering=None, retry=self.retry,
            ttl=self.ttl, dedup_window=0.0, dead_limit=0, on_dead="skip", ageing=False,
            slot_bytes=0, payload_bytes=0, payload_max=0,
        )  # fmt: skip

    def peek(self, count: int = 1) -> Any:
        """Raise Unsupported."""
        raise self._refuse("queue.peek")

    def cancel(self, id: int) -> bool:
        """Raise Unsupported."""
        raise self._refuse("queue.cancel")

    def purge(self) -> int:
        """Remove all messages that wait; how many."""
        self.store.check_writable()
        return self.connection.call(self.emptied(self.name))

    async def emptied(self, name: str) -> int:
        """Remove what waits in a queue of the server; how many."""
        channel = await self.connection.channel()
        frame = await channel.ask("queue_purge", queue=name)
        self.connection.keep(channel)
        return int(frame.method.message_count)

    def pause(self) -> None:
        """Raise Unsupported."""
        raise self._refuse("queue.pause")

    def resume(self) -> None:
        """Raise Unsupported."""
        raise self._refuse("queue.pause")

    def worker(self, **_: object) -> Any:
        """Raise Unsupported."""
        raise self._refuse("queue.worker")

    @property
    def dead(self) -> RabbitDeadLetters:
        """The dead letters."""
        return RabbitDeadLetters(self)


async def _within(future: Any, seconds: float) -> None:
    """Await a future, for so many seconds; it is not cancelled."""
    import asyncio

    done, _ = await asyncio.wait([future], timeout=min(seconds, FOREVER))
    if not done:
        raise TimeoutError
    future.result()


def _headers(given: Any) -> Mapping[str, bytes]:
    if given is None:
        return {}
    if not hasattr(given, "items"):
        raise InvalidType(f"headers {given!r}: expected a mapping of str to bytes")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, bytes | bytearray | memoryview):
            raise InvalidType(f"header {name!r}: expected str and bytes-like")
    return {name: bytes(value) for name, value in given.items()}


def users(table: Mapping[str, Any]) -> dict[str, bytes]:
    """The user's headers among those of a message."""
    found = {
        name: item if isinstance(item, bytes) else str(item).encode()
        for name, item in table.items()
        if not name.startswith(SERVERS)
    }
    if ODD in table:
        odd = json.loads(table[ODD])
        found |= {name: base64.b64decode(text) for name, text in odd.items()}
    return found


class Lease:
    """A channel with the messages that were leased together."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.held = 0

    def done(self) -> None:
        """One message less; the channel is free behind the last."""
        self.held -= 1
        if self.held == 0:
            self.channel.connection.keep(self.channel)


class RabbitMessage:
    """A leased message of a queue on RabbitMQ."""

    def __init__(
        self, queue: RabbitQueue, lease: Lease, leased: float, method: Any, properties: Any,
        data: bytes,
    ) -> None:  # fmt: skip
        self.queue = queue
        self.data = data
        self.properties = properties
        self._table: dict[str, Any] = properties.headers or {}
        self._lease = lease
        self._tag = method.delivery_tag
        given = properties.priority
        self.priority = 0 if given is None else min(max(TOP - given, 0), queue.priorities - 1)
        self.id = id_of(properties)
        self.attempt = int(self._table.get("x-delivery-count", 0)) + 1
        self.put_at = moment(int(self._table.get(PUT_AT, 0)))
        self._ends = leased + queue.lease
        self.deadline = moment(int((time.time() + self._ends - time.monotonic()) * 1e6))
        self.finished = ""

    def __repr__(self) -> str:
        return f"<RabbitMessage {self.id} of {self.queue!r}: attempt {self.attempt}>"

    @property
    def value(self) -> Any:
        """The payload, as the codec reads it."""
        return self.queue.decoded(self.data)

    @property
    def key(self) -> bytes | None:
        """Its key."""
        key: bytes | None = self._table.get(KEY)
        return key

    @property
    def headers(self) -> dict[str, bytes]:
        """Its headers."""
        return users(self._table)

    @property
    def lost(self) -> bool:
        """Is the lease over, by the server's word or by our clock?"""
        over = time.monotonic() >= self._ends or not self._lease.channel.raw.is_open
        return not self.finished and over

    def _check(self) -> None:
        if self.finished:
            raise InvalidArgument(f"message {self.id}: it was finished already: {self.finished}")
        self.queue.connection.check_open()
        if self.lost:
            raise self._late("before this call; somebody else may have it now")

    def _late(self, when: str) -> LeaseLost:
        return LeaseLost(f"{self.queue.where}: the lease of message {self.id} ended {when}")

    def _answer(self, method: str, finished: str, **arguments: Any) -> None:
        """Tell the server, and wait until it has heard that, within the lease."""
        self._check()
        channel = self._lease.channel

        async def answer() -> None:
            getattr(channel.raw, method)(self._tag, **arguments)
            await channel.barrier()

        try:
            self.queue.connection.call(answer())
        except StorageError as error:
            if channel.raw.is_open:
                raise
            raise self._late("while this call was under way; it may be done, or come again"
                             ) from error  # fmt: skip
        if time.monotonic() >= self._ends:
            self.finished = "lost"
            raise self._late("while this call was under way; it may be done, or come again")
        self.finished = finished
        self.queue.connection.loop.call_soon_threadsafe(self._lease.done)

    def ack(self) -> None:
        """It is done. Raises LeaseLost where the lease is over."""
        self._answer("basic_ack", "ack")

    def nack(self, delay: float | None = None, reason: object = "") -> None:
        """It failed: deliver it again; after the last attempt it is a dead letter.

        The server waits as the queue's `RetryPolicy` says, `backoff` times the failures.
        """
        policy = self.queue.retry
        if delay is not None and (number("delay", delay, 0, CENTURY) > 0 or policy.backoff > 0):
            raise self.queue.store.capabilities.refusal("queue.nack_delay")
        if self.attempt >= policy.max_attempts:
            self._bury("failed", str(reason))
            return
        self._answer("basic_reject", "nack", requeue=True)

    def reject(self, reason: object = "") -> None:
        """To the dead letters."""
        self._bury(str(reason) or "rejected", str(reason))

    def _bury(self, reason: str, error: str) -> None:
        self._check()
        table = {name: item for name, item in self._table.items() if not name.startswith("x-")}
        table |= {REASON: reason.encode()[:4096], ERROR: error.encode()[:4096],
                  ATTEMPTS: self.attempt, DEAD_AT: int(time.time() * 1e6)}  # fmt: skip
        properties = pika.BasicProperties(
            delivery_mode=2, headers=table, priority=self.properties.priority,
            message_id=self.properties.message_id,
        )  # fmt: skip
        self.queue.send(f"{self.queue.name}.dead", [(self.data, properties)], 0)
        self._answer("basic_ack", "dead")

    def release(self, delay: float = 0) -> None:
        """Give it back, uncounted."""
        if number("delay", delay, 0, CENTURY) > 0:
            raise self.queue.store.capabilities.refusal("queue.delay")
        self._answer("basic_nack", "released", requeue=True)

    def extend(self, seconds: float | None = None) -> None:
        """Raise Unsupported: a lease on RabbitMQ is as long as it was made."""
        raise self.queue.store.capabilities.refusal("queue.extend")

    def __enter__(self) -> RabbitMessage:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if self.finished:
            return False
        if error is None:
            self.ack()
            return False
        if isinstance(error, Retry):
            self.nack(error.delay, repr(error))
            return True
        if isinstance(error, Snooze):
            self.release(error.delay)
            return True
        if isinstance(error, Reject):
            self.reject(error.reason)
            return True
        if isinstance(error, Exception):
            self.nack(None, repr(error))
        return False


def id_of(properties: Any) -> int:
    """The id of a message: its number, or of one of others a digest of what names it."""
    text = properties.message_id or ""
    if text.isdigit() and len(text) <= 19:
        return int(text)
    from millstream._native import xxh3_64

    return xxh3_64(text.encode()) >> 1


class RabbitDeadLetters:
    """The messages that are tried no more: those that we put there, and those of the server."""

    def __init__(self, queue: RabbitQueue) -> None:
        self._queue = queue
        self._name = f"{queue.name}.dead"

    def __len__(self) -> int:
        return self._queue.connection.call(self._queue.waiting(self._name))

    async def _visit(self, most: int, act: Any) -> list[Any]:
        """Take letters, oldest first, hand each to `act`, and give back those that it left.

        Nobody else sees them meanwhile.
        """
        connection = self._queue.connection
        channel = await connection.channel()
        found: list[DeadLetter] = []
        kept: list[int] = []
        try:
            while len(found) < most and (one := await channel.get(self._name)) is not None:
                method, properties, data = one
                letter = self._letter(properties, data)
                if await act(letter, properties, data):
                    channel.raw.basic_ack(method.delivery_tag)
                else:
                    kept.append(method.delivery_tag)
                found.append(letter)
        finally:
            if channel.raw.is_open:
                for tag in kept:
                    channel.raw.basic_nack(tag, requeue=True)
                await channel.barrier()
                connection.keep(channel)
        # Given back is not yet there again: the queue does that behind its answer. Others may come.
        for _ in range(BACK_LOOKS if kept else 0):
            if await self._queue.waiting(self._name) >= len(kept):
                break
            await asyncio.sleep(BACK_SECONDS)
        return found

    def _letter(self, properties: Any, data: bytes) -> DeadLetter:
        table = properties.headers or {}
        deaths = table.get("x-death") or [{}]
        died = deaths[0].get("time")
        at = moment(table[DEAD_AT]) if DEAD_AT in table else died or moment(0)
        why = {"delivery_limit": "failed", "rejected": "rejected"}.get(
            str(deaths[0].get("reason")), str(deaths[0].get("reason"))
        )
        reason = bytes(table[REASON]).decode() if REASON in table else why
        error = bytes(table.get(ERROR, b"")).decode()
        attempts = int(table.get(ATTEMPTS, table.get("x-delivery-count", 1)))
        given = properties.priority
        return DeadLetter(
            id_of(properties), self._queue.decoded(data), reason, error, error, at, at, attempts,
            table.get(KEY), users(table), 0 if given is None else max(TOP - given, 0),
            moment(int(table.get(PUT_AT, 0))),
        )  # fmt: skip

    def list(self, count: int | None = None) -> list[DeadLetter]:
        """Up to so many of them, the oldest first."""
        most = 1 << 30 if count is None else integer("count", count, 0)

        async def look(*_: object) -> bool:
            return False

        return self._queue.connection.call(self._visit(most, look))

    def redrive(self, ids: int | Iterable[int] | None = None) -> int:
        """Try these again, or all; how many. Killed on the way, one may come twice."""
        self._queue.store.check_writable()
        wanted = None if ids is None else {ids} if isinstance(ids, int) else set(ids)
        count = 0

        async def again(letter: DeadLetter, properties: Any, data: bytes) -> bool:
            nonlocal count
            if wanted is not None and letter.id not in wanted:
                return False
            ours = {REASON, ERROR, ATTEMPTS, DEAD_AT}
            table = {
                name: item
                for name, item in (properties.headers or {}).items()
                if name not in ours and not name.startswith("x-")
            }
            made = pika.BasicProperties(
                delivery_mode=2, headers=table, priority=properties.priority,
                message_id=properties.message_id,
            )  # fmt: skip
            if await self._queue.send_all(self._queue.name, [(data, made)]):
                raise QueueFull(f"{self._queue.where}: there is no room for a dead letter")
            count += 1
            return True

        self._queue.connection.call(self._visit(len(self), again))
        return count

    def purge(self, ids: int | Iterable[int] | None = None) -> int:
        """Remove these, or all; how many."""
        self._queue.store.check_writable()
        if ids is None:
            return self._queue.connection.call(self._queue.emptied(self._name))
        wanted = {ids} if isinstance(ids, int) else set(ids)
        count = 0

        async def remove(letter: DeadLetter, *_: object) -> bool:
            nonlocal count
            count += letter.id in wanted
            return letter.id in wanted

        self._queue.connection.call(self._visit(1 << 30, remove))
        return count
