"""dramatiq without a server: `MillstreamBroker(path)` in the place of `RedisBroker`.

>>> import tempfile
>>> from dramatiq import Worker, actor, set_broker
>>> from dramatiq.results import Results
>>> from millstream.contrib.dramatiq import MillstreamBroker, MillstreamResultBackend
>>> directory = tempfile.TemporaryDirectory()
>>> broker = MillstreamBroker(directory.name)
>>> kept = MillstreamResultBackend(directory.name)
>>> broker.add_middleware(Results(backend=kept))
>>> set_broker(broker)
>>> @actor(store_results=True)
... def add(x, y):
...     return x + y
>>> sent = add.send(1, 2)
>>> worker = Worker(broker, worker_threads=1, worker_timeout=10)
>>> worker.start()  # as a rule: dramatiq app
>>> sent.get_result(block=True, timeout=30_000)
3
>>> worker.stop()
>>> broker.close()
>>> kept.close()
>>> directory.cleanup()

A message is leased to the worker that has fetched it, and is off the queue when it is acknowledged:
if the worker is killed, another gets it, within about 100 ms. One with a delay waits in the store,
in no worker's memory.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import millstream
from millstream import (
    Closed,
    InvalidArgument,
    LeaseLost,
    LimitExceeded,
    MillstreamError,
    Reject,
    RetryPolicy,
    WaitTimeout,
)
from millstream.contrib import require
from millstream.contrib.renewal import Renewal
from millstream.contrib.rows import Get, Rows
from millstream.contrib.sharing import AGAIN_SECONDS, PUT_SECONDS, Share

require("dramatiq", "dramatiq", (2, 2), (3,))

from dramatiq import broker as brokers  # noqa: E402
from dramatiq.common import current_millis, q_name  # noqa: E402
from dramatiq.errors import (  # noqa: E402
    ConnectionClosed,
    DecodeError,
    QueueJoinTimeout,
    QueueNotFound,
)
from dramatiq.message import Message  # noqa: E402
from dramatiq.rate_limits import RateLimiterBackend  # noqa: E402
from dramatiq.results import ResultBackend, ResultMissing, ResultTimeout  # noqa: E402
from dramatiq.results.backend import DEFAULT_TIMEOUT, Missing  # noqa: E402

if TYPE_CHECKING:
    from dramatiq.encoder import Encoder
    from dramatiq.middleware import Middleware

    from millstream.contrib.rows import Durability

__all__ = ["MillstreamBroker", "MillstreamRateLimiterBackend", "MillstreamResultBackend"]

LANE_BEGINS = (0, 1, 2, 5, 10, 20, 100)
"""Of dramatiq's priorities, which are any number: where each of the queue's, but the first, begins.
"""
FOREVER_SECONDS = 366 * 86400.0


def _lane(priority: int) -> int:
    return bisect_right(LANE_BEGINS, priority)


# --- messages -------------------------------------------------------------------------------------


class LeasedMessage(brokers.MessageProxy):  # type: ignore[misc]
    """A message in the hands of a worker."""

    def __init__(
        self, message: Message[Any], lease: millstream.Message, consumer: Consumer
    ) -> None:
        super().__init__(message)
        self.lease = lease
        self.consumer = consumer
        self.unsent: BaseException | None = None
        """Why what was to follow it could not be put."""


class Consumer(brokers.Consumer):  # type: ignore[misc]
    """Fetches from one queue, for a thread of a worker; what it has fetched any thread may end."""

    def __init__(self, broker: MillstreamBroker, queue_name: str, prefetch: int, timeout: int):
        self._broker = broker
        self._queue_name = queue_name
        self.room = threading.Semaphore(prefetch)
        self._seconds = timeout / 1000

    def __next__(self) -> LeasedMessage | None:
        if not self.room.acquire(timeout=self._seconds):
            return None
        message = None
        try:
            message = self._fetch()
        finally:
            if message is None:
                self.room.release()
        return message

    def _fetch(self) -> LeasedMessage | None:
        try:
            leases = self._broker.queue(self._queue_name).get_many(1, timeout=self._seconds)
        except Closed as error:  # it was dropped, or its store is closed
            raise ConnectionClosed(error) from None
        for lease in leases:
            try:
                message = Message.decode(lease.value)
            except DecodeError as error:
                self._broker.logger.error("%r is no message: %r", lease, error.error)
                lease.reject(f"no message of dramatiq: {error.error!r}")
                return None
            self._broker.renewal.begin(lease)
            return LeasedMessage(message, lease, self)
        return None

    def ack(self, message: brokers.MessageProxy) -> None:
        """Take a message off the queue; one that led to another that could not be put stays."""
        if isinstance(message, LeasedMessage):
            lease = message.lease
            reason = repr(message.unsent)
            if message.unsent is None:
                self._end(message, lease.ack)
            elif isinstance(message.unsent, InvalidArgument | LimitExceeded):  # it never can be put
                self._end(message, lambda: lease.reject(reason))
            else:
                self._end(message, lambda: lease.nack(delay=AGAIN_SECONDS, reason=reason))

    def nack(self, message: brokers.MessageProxy) -> None:
        """Make a message a dead letter."""
        if isinstance(message, LeasedMessage):
            error = message._exception
            self._broker.remember_failure(self._queue_name, error)
            reason = "failed by a middleware" if error is None else repr(error)
            self._end(message, lambda: _reject(message.lease, reason, error))

    def requeue(self, messages: Iterable[brokers.MessageProxy]) -> None:
        """Give messages back that were not begun: another worker gets them, uncounted."""
        for message in messages:
            if isinstance(message, LeasedMessage):
                self._end(message, message.lease.release)

    def _end(self, message: LeasedMessage, end: Callable[[], object]) -> None:
        self._broker.renewal.leave(message.lease)
        try:
            end()
        except LeaseLost as error:
            self._broker.logger.warning("%s; it is delivered again: %s", error, message)
        except Closed:  # the lease ended with the store, or the queue was dropped
            self._broker.logger.warning("the store is closed; it is delivered again: %s", message)
        finally:
            message.consumer.room.release()


def _reject(lease: millstream.Message, reason: str, error: BaseException | None) -> None:
    """Make it a dead letter, which keeps the traceback."""
    with lease:
        raise Reject(reason) from error


# --- the broker -----------------------------------------------------------------------------------


class MillstreamBroker(brokers.Broker):  # type: ignore[misc]
    """A broker of dramatiq over a millstream store: ``MillstreamBroker("/var/lib/app")``.

    A queue of dramatiq is the queue ``dramatiq.<queue>`` of the store. Thread-safe; a forked
    process opens the store again at its first call.

    Durability: what was sent survives the kill of any process when `send` returns. A power cut may
    take the last 100 ms or so; with durability "sync" nothing.

    Args:
        path: the directory of the store, which is made where it is not there.
        middleware: as `dramatiq.Broker` has it.
        namespace: what the names of the store's queues begin with, before a dot.
        durability: "process", "interval" or "sync"; default: as stored, "interval" in a new store.
        capacity: how many messages of a queue may wait or run; more make `send` wait up to 10 s
            and raise `QueueFull`. Default 100,000.
        lease: seconds after which another worker gets the messages of one that was stopped. One
            that is killed is noticed within 100 ms.
        max_attempts: a message that its workers did not outlive so often is a dead letter, up to
            62, the default. What a worker has fetched and not begun counts as well.

    Raises: InvalidArgument, and what `millstream.open` raises. Where an actor is declared or a
        message sent: ConfigMismatch where the queue is there with other settings, InvalidArgument
        for a name that is none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        middleware: list[Middleware] | None = None,
        namespace: str = "dramatiq",
        durability: Durability | None = None,
        capacity: int | None = None,
        lease: float = 60.0,
        max_attempts: int = 62,
    ) -> None:
        super().__init__(middleware=middleware)
        self.queues: dict[str, millstream.Queue | None] = {}
        self.namespace = namespace
        self._settings: dict[str, Any] = {
            "priorities": len(LANE_BEGINS) + 1,
            "lease": lease,
            "retry": RetryPolicy(max_attempts=max_attempts, backoff=0.0),
            "capacity": capacity,
            "durability": durability,
        }
        self._lease = lease
        self._ending = threading.local()
        self._failures: dict[str, BaseException] = {}
        self._share = Share(path, self)

    @property
    def path(self) -> str:
        """The directory of the store."""
        return self._share.path

    @property
    def renewal(self) -> Renewal:
        """What renews the leases of this process."""
        return self._share.renewal(self._lease)

    def close(self) -> None:
        """Close the store, where nothing else of this process uses it. May be called again."""
        self._share.end()

    def queue(self, queue_name: str) -> millstream.Queue:
        """The store's queue of a queue that was declared. Raises QueueNotFound."""
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)
        return self._share.queue(f"{self.namespace}.{queue_name}", self._settings)

    # --- what a program does ----------------------------------------------------------------------

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue, and make it where it is not there.

        Raises: ConfigMismatch, InvalidArgument.
        """
        queue_name = q_name(queue_name)
        if queue_name in self.queues:
            return
        self.emit_before("declare_queue", queue_name)
        self.queues[queue_name] = None
        try:
            self.queues[queue_name] = self.queue(queue_name)
        except BaseException:
            del self.queues[queue_name]
            raise
        self.emit_after("declare_queue", queue_name)

    def enqueue(self, message: Any, *, delay: float | None = None) -> Any:
        """Put a message, of its actor's priority.

        Args:
            message: to put.
            delay: milliseconds until a worker gets it, up to 100 years. It waits in the store.

        Raises: QueueNotFound, QueueFull, and what `Queue.put` raises.
        """
        try:
            return self._enqueue(message, q_name(message.queue_name), delay)
        except (MillstreamError, QueueNotFound) as error:
            ended = getattr(self._ending, "message", None)
            if ended is not None:  # by a middleware, of which dramatiq only logs what it raises
                ended.unsent = error
            raise

    def _enqueue(self, message: Any, queue_name: str, delay: float | None) -> Any:
        self.queue(queue_name)
        self.emit_before("enqueue", message, delay)
        seconds = (delay or 0) / 1000
        options = message.options
        if "eta" in options or message.queue_name != queue_name:  # of another broker
            with contextlib.suppress(TypeError):
                seconds = max(seconds, (options.get("eta", 0) - current_millis()) / 1000)
            message = message.copy(queue_name=queue_name)
            message.options.pop("eta", None)
        actor = self.actors.get(message.actor_name)
        lane = 0 if actor is None else _lane(actor.priority)
        self._put(queue_name, message.encode(), priority=lane, delay=max(seconds, 0.0))
        self.emit_after("enqueue", message, delay)
        return message

    def _put(self, queue_name: str, data: bytes, **options: Any) -> None:
        try:
            self.queue(queue_name).put(data, timeout=PUT_SECONDS, **options)
        except Closed:
            if self._share.store.closed:
                raise
            self.queue(queue_name).put(data, timeout=PUT_SECONDS, **options)  # it was dropped

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        """Tell middleware what has happened."""
        if signal != "process_message":
            super().emit_after(signal, *args, **kwargs)
            return
        self._ending.message = args[0]
        try:
            super().emit_after(signal, *args, **kwargs)
        finally:
            self._ending.message = None

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30000) -> Consumer:
        """What fetches from a queue. Raises QueueNotFound."""
        self.queue(queue_name)
        return Consumer(self, queue_name, prefetch, timeout)

    def flush(self, queue_name: str) -> None:
        """Remove the messages of a queue that no worker has, and its dead letters."""
        queue = self.queue(queue_name)
        queue.purge()
        queue.dead.purge()

    def flush_all(self) -> None:
        """Remove them of all queues that were declared."""
        for queue_name in self.get_declared_queues():
            self.flush(queue_name)

    def join(
        self,
        queue_name: str,
        *,
        interval: int | None = None,
        timeout: int | None = None,
        fail_fast: bool = False,
    ) -> None:
        """Wait until all messages of a queue are done, those with a delay as well; for tests.

        Args:
            queue_name: of the queue.
            interval: not used: it is woken.
            timeout: milliseconds; None: as long as it takes.
            fail_fast: raise what the last message raised that became a dead letter, where this
                process ran it; RuntimeError where another did.

        Raises: QueueJoinTimeout, QueueNotFound.
        """
        queue = self.queue(queue_name)
        try:
            queue.join(timeout=None if timeout is None else timeout / 1000)
        except WaitTimeout:
            raise QueueJoinTimeout(queue_name) from None
        if fail_fast and (letters := queue.dead.list()):
            last = letters[-1]
            raise self._failures.get(queue_name) or RuntimeError(f"{last}: {last.last_error}")

    @property
    def dead_letters(self) -> list[brokers.MessageProxy]:
        """The dead letters of all queues that were declared, by queue, the oldest first."""
        found = []
        for queue_name in sorted(self.queues):
            for letter in self.queue(queue_name).dead.list():
                with contextlib.suppress(DecodeError):  # what is no message is one for this
                    found.append(brokers.MessageProxy(Message.decode(letter.value)))
        return found

    def remember_failure(self, queue_name: str, error: BaseException | None) -> None:
        """Keep what a message raised that becomes a dead letter, for `join`: a copy, no frames."""
        self._failures.pop(queue_name, None)
        with contextlib.suppress(Exception):  # whatever the class of a user does when it is copied
            self._failures[queue_name] = copy.copy(error or RuntimeError("failed by a middleware"))


# --- results --------------------------------------------------------------------------------------


class MillstreamResultBackend(ResultBackend):  # type: ignore[misc]
    """Results of dramatiq in a store: ``Results(backend=MillstreamResultBackend(path))``.

    They are in the stream of the namespace's name. A process that waits for one is woken when
    it comes. One that asks keeps in memory where those lie that have not expired, about 250 bytes
    for each; a worker that only stores them keeps nothing.

    Durability: as of `MillstreamBroker`.

    Args:
        path: the directory of the store, as a rule that of the broker.
        namespace: the name of the stream.
        encoder, use_namespace_prefix_keys: as `dramatiq.results.ResultBackend` has them.
        durability: "process", "interval" or "sync"; default: as stored.

    Raises: InvalidArgument, and what `millstream.open` raises.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = "dramatiq-results",
        encoder: Encoder | None = None,
        use_namespace_prefix_keys: bool = False,
        durability: Durability | None = None,
    ) -> None:
        super().__init__(
            namespace=namespace,
            encoder=encoder,
            use_namespace_prefix_keys=use_namespace_prefix_keys,
        )
        self._durability = durability
        self._share = Share(path, self, lambda share: share.rows(namespace, durability))

    @property
    def _rows(self) -> Rows:
        return self._share.rows(self.namespace, self._durability)

    def close(self) -> None:
        """Close the store, where nothing else of this process uses it. May be called again."""
        self._share.end()

    def get_result(self, message: Any, *, block: bool = False, timeout: int | None = None) -> Any:
        """The result of a message.

        Args:
            message: that was sent.
            block: wait for it.
            timeout: milliseconds to wait; default 10,000.

        Raises: ResultMissing, ResultTimeout, ResultFailure where the actor raised.
        """
        key = self.build_message_key(message).encode()
        if block:
            value = self._rows.wait_for(
                key, (DEFAULT_TIMEOUT if timeout is None else timeout) / 1000
            )
            if value is None:
                raise ResultTimeout(message)
        else:
            value = self._rows.get(key)
            if value is None:
                raise ResultMissing(message)
        return self.unwrap_result(self.encoder.decode(value))

    def _get(self, message_key: str) -> Any:
        value = self._rows.get(message_key.encode())
        return Missing if value is None else self.encoder.decode(value)

    def _store(self, message_key: str, result: Any, ttl: int) -> None:
        self._rows.put(message_key.encode(), self.encoder.encode(result), ttl / 1000)


# --- rate limits ----------------------------------------------------------------------------------


class MillstreamRateLimiterBackend(RateLimiterBackend):  # type: ignore[misc]
    """What rate limiters and barriers of dramatiq count, in a store; for all processes of it.

    Each change is atomic between threads and processes. What was counted when a call returned
    survives the kill of any process: who held a `ConcurrentRateLimiter` and was killed holds it
    until its ``ttl``.

    Args:
        path: the directory of the store, as a rule that of the broker.
        namespace: the name of the stream that keeps it.
        durability: "process", "interval" or "sync"; default: as stored.

    Raises: InvalidArgument, and what `millstream.open` raises.

    >>> import tempfile
    >>> from dramatiq.rate_limits import ConcurrentRateLimiter
    >>> from millstream.contrib.dramatiq import MillstreamRateLimiterBackend
    >>> directory = tempfile.TemporaryDirectory()
    >>> backend = MillstreamRateLimiterBackend(directory.name)
    >>> mutex = ConcurrentRateLimiter(backend, "the printer", limit=1)
    >>> with mutex.acquire():
    ...     with mutex.acquire(raise_on_failure=False) as acquired:
    ...         print(acquired)
    False
    >>> backend.close()
    >>> directory.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = "dramatiq-limits",
        durability: Durability | None = None,
    ) -> None:
        self.namespace = namespace
        self._durability = durability
        self._share = Share(path, self, lambda share: share.rows(namespace, durability))

    @property
    def _rows(self) -> Rows:
        return self._share.rows(self.namespace, self._durability)

    def close(self) -> None:
        """Close the store, where nothing else of this process uses it. May be called again."""
        self._share.end()

    def _change(self, key: str, ttl: int, decide: Callable[[Get], int | None]) -> bool:
        def encoded(get: Get) -> bytes | None:
            count = decide(get)
            return None if count is None else b"%d" % count

        return self._rows.change(key.encode(), ttl / 1000, encoded)

    def add(self, key: str, value: int, ttl: int) -> bool:
        """Set a key that is not there, for some milliseconds. False: it is there."""
        return self._change(key, ttl, lambda get: value if get(key.encode()) is None else None)

    def incr(self, key: str, amount: int, maximum: int, ttl: int) -> bool:
        """Add to a key, but not beyond a maximum. False: it would be."""

        def decide(get: Get) -> int | None:
            count = int(get(key.encode()) or 0) + amount
            return count if count <= maximum else None

        return self._change(key, ttl, decide)

    def decr(self, key: str, amount: int, minimum: int, ttl: int) -> bool:
        """Take from a key, but not below a minimum. False: it would be."""

        def decide(get: Get) -> int | None:
            count = int(get(key.encode()) or 0) - amount
            return count if count >= minimum else None

        return self._change(key, ttl, decide)

    def incr_and_sum(
        self, key: str, keys: Callable[[], list[str]], amount: int, maximum: int, ttl: int
    ) -> bool:
        """Add to a key, where it and the sum of some keys stay within a maximum."""

        def decide(get: Get) -> int | None:
            count = int(get(key.encode()) or 0) + amount
            total = amount + sum(int(get(one.encode()) or 0) for one in keys())
            return count if max(count, total) <= maximum else None

        return self._change(key, ttl, decide)

    def wait(self, key: str, timeout: int | None) -> bool:
        """Wait until a key is notified, or was: woken, not polling. False: after the time-out."""
        seconds = FOREVER_SECONDS if timeout is None else timeout / 1000
        return self._rows.wait_for(key.encode(), seconds) is not None

    def wait_notify(self, key: str, ttl: int) -> None:
        """Notify all who wait for a key, or will within some milliseconds."""
        self._change(key, ttl, lambda _: 1)
