"""A queue: messages that many processes put, lease, and acknowledge or give back."""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from millstream import _native, codecs
from millstream._native import Message
from millstream.disk import files
from millstream.errors import (
    ConfigMismatch,
    InvalidArgument,
    MillstreamError,
    NotFound,
    WaitTimeout,
)
from millstream.log import settings
from millstream.options import FOREVER, Durability, RetryPolicy, check_timeout, integer
from millstream.queue_errors import Empty, QueueFull
from millstream.queues import capacity as capacity_of_queue
from millstream.queues import dedup
from millstream.queues import settings as queue_settings
from millstream.queues.dead_letters import DeadLetters, message_id
from millstream.queues.handle import QueueHandle

if TYPE_CHECKING:
    from types import ModuleType

    from millstream.disk.open_store import OpenStore
    from millstream.queues.records import QueueStats, StoredMessage
    from millstream.sleepers import Calls

__all__ = ["Queue"]

SETTINGS = (
    *("priorities", "lease", "ordering", "ttl", "dedup_window", "dead_limit", "on_dead", "ageing"),
    *("slot_bytes", "payload_bytes", "payload_max"),
)
ALL = 0x7FFFFFFF
IN_STATES = ("ready", "delayed", "held", "leased", "prepared", "acking")
UNSEEN = ("writing", "spare", "free", "invalid")
Function = TypeVar("Function", bound=Callable[[Any], object])


class Queue(QueueHandle):
    """A queue of a store; made by `Store.queue`.

    Thread-safe; pickles by the store's path and its name (and its codec, which must pickle).

    `put`, `put_many`, `get`, `get_many` and `ack_many` are the extension's own.

    Attributes:
        store: the store.
        name: the name.
    """

    _records: ModuleType | None = None
    """What `stats` returns values of, once it was asked: it is asked every second."""

    def __init__(
        self,
        store: OpenStore,
        name: str,
        config: dict[str, Any],
        durability: Durability | None,
        codec: object,
    ) -> None:
        self.store = store
        self._workers: list[Any] = []
        self._callers: list[Calls] = []
        self._surprise_id = 0
        super().__init__(store.session, name, config, durability, codec)

    def __repr__(self) -> str:
        state = "closed"
        with contextlib.suppress(MillstreamError):
            if not self.closed:
                state = f"{len(self)} of {self.capacity} messages{', paused' * self.paused}"
        return f"<Queue {self.name!r} of {self.session.path!r}: {state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Queue._reopened, (self.store, self.name, self._override, self._codec))

    @staticmethod
    def _reopened(store: OpenStore, name: str, durability: Durability | None, codec: object) -> Any:
        if name not in store.queues():
            raise NotFound(f"{store.path}: there is no queue {name!r} any more")
        return store.queue(name, durability=durability, codec=codec, create=False)

    @property
    def dead(self) -> DeadLetters:
        """The dead letters."""
        return DeadLetters(self)  # kept, it would be a cycle, and hold the files until collected

    # --- asyncio ----------------------------------------------------------------------------------

    async def _rest(self, place: Literal["message", "room"], ticket: int, deadline: float) -> None:
        """Return when something may have come to a place, or at the deadline."""
        with _native.loading:
            import asyncio

            from millstream.sleepers import Sleepers
        loop, name = asyncio.get_running_loop(), f"millstream-{place}"
        for waiter in self._waiters:
            if waiter.loop is loop and waiter.name == name and not waiter.over:
                break
        else:
            self._waiters = [one for one in self._waiters if not one.over]
            waiter = Sleepers(name, partial(self._sleep, place), partial(self._wake, place, ALL))
            self._waiters.append(waiter)
        try:
            await waiter.wait(ticket, deadline)
        except asyncio.CancelledError:
            if not self.closed:
                self._wake(place, 1)  # the one that was meant for us
            raise

    def _calls(self) -> Calls:
        """The threads in which puts of the running loop sync."""
        with _native.loading:
            import asyncio

            from millstream.sleepers import Calls
        loop = asyncio.get_running_loop()
        for calls in self._callers:
            if calls.loop is loop:
                return calls
        self._callers = [one for one in self._callers if not one.over]
        self._callers.append(Calls("millstream-put", self.path))
        return self._callers[-1]

    async def aput(
        self,
        value: Any,
        *,
        priority: int = 0,
        delay: float = 0.0,
        at: Any = None,
        key: Any = None,
        ttl: float | None = None,
        dedup_id: str | bytes | None = None,
        headers: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> int:
        """`put` for asyncio: waits for room without blocking the loop.

        Where it is cancelled while it waits, nothing was put. At durability "sync" the sync runs in
        a thread, and after a cancellation the message may be there.
        """
        checked = check_timeout(timeout)
        deadline = time.monotonic() + (FOREVER if checked is None else checked)

        def put() -> int:
            return self.put(
                value, priority=priority, delay=delay, at=at, key=key, ttl=ttl, dedup_id=dedup_id,
                headers=headers, timeout=0,
            )  # fmt: skip

        while True:
            ticket = self._announce("room")
            try:
                # Where a handler runs this loop in the middle of a call of its own thread, that has
                # what another thread would wait for; this one goes on with it.
                if self._durability != "sync" or _native.held(self.session.members):
                    return put()
                found: int = await self._calls().call(put)
                return found
            except QueueFull:
                if time.monotonic() >= deadline:
                    raise
            await self._rest("room", ticket, deadline)

    def aget(self, *, timeout: float | None = None) -> Getting:
        """`get` for asyncio: ``async with q.aget() as m``, or ``m = await q.aget()``.

        A coroutine, so that tasks can be made of it. Waits without blocking the loop; cancelling it
        loses no message. No thread of it is left when the loop ends, or the store is closed.
        """
        return Getting(self, check_timeout(timeout))

    def _expect(self) -> None:
        """It was made by its name alone, just now: a reader that finds nothing is told so."""
        self._surprise_id = self._next_id
        self._surprise = time.monotonic()

    def _wait_patiently(self) -> None:
        """Somebody waits in short calls: warn of an empty queue after a second only."""
        if self._surprise:
            self._surprise = time.monotonic() + settings.SURPRISE_SECONDS

    def _point_out(self) -> None:
        """Warn, once, where a queue that was not there before it was named has nothing."""
        if not self._surprise or time.monotonic() < self._surprise:
            return
        self._surprise = 0.0
        if self._next_id != self._surprise_id:  # something was put meanwhile
            return
        with _native.loading:
            from millstream.log import surprise
        surprise.point_out(self.session.path, "queue", self.name, self.store.queues())

    async def _aget(self, timeout: float | None) -> Message:
        self._wait_patiently()
        deadline = time.monotonic() + (FOREVER if timeout is None else timeout)
        while True:
            ticket = self._announce("message")
            # Taken and handed over without an await in between.
            try:
                return self.get(timeout=0)
            except Empty:
                if time.monotonic() >= deadline:
                    self._surprise = min(self._surprise, deadline)
                    self._point_out()
                    raise
            await self._rest("message", ticket, deadline)

    async def __aiter__(self) -> AsyncIterator[Message]:
        while True:
            yield await self._aget(None)

    # --- reading ----------------------------------------------------------------------------------

    def _stored(self, slot: int, word: int) -> StoredMessage | None:
        with _native.loading:
            from millstream.queues.records import StoredMessage, moment
        found = self._record(slot, word)
        if found is None:
            return None
        number, state, priority, attempts, put_at, due, expires, key, headers, data = found
        return StoredMessage(
            number,
            state,
            self._decoded(data),
            key,
            headers,
            priority,
            attempts,
            moment(put_at),
            moment(due) if due else None,
            moment(expires) if expires else None,
        )

    def _decoded(self, data: bytes | None) -> Any:
        codec = codecs.resolve(self._codec)
        if codec is None or data is None:
            return data
        try:
            return codec.decode(data)
        except Exception:  # whatever a codec of a user raises: the bytes are what there is
            return data

    def peek(self, count: int = 1) -> list[StoredMessage]:
        """Return the messages that would come next, without taking them.

        The ready ones by priority and age, then those that wait.
        """
        count = integer("count", count, 0)
        found: list[StoredMessage] = []
        for states in (("ready",), ("held", "delayed")):
            if len(found) >= count:
                break
            for _, _, slot, word in heapq.nsmallest(count - len(found), self._scan(states)):
                stored = self._stored(slot, word)
                if stored is not None:
                    found.append(stored)
        if not found and count:
            self._point_out()
        return found

    def stats(self) -> QueueStats:
        """The queue in numbers, as of now; also where no descriptor is left, see `Stream.stats`."""
        if Queue._records is None:
            with self.session.spare, _native.loading:
                from millstream.queues import records
            Queue._records = records
        counts, config = self._counts(), self._config
        for unseen in UNSEEN:
            del counts[unseen]
        for name in SETTINGS:
            counts[name] = config[name]
        counts["by_priority"] = tuple(counts.pop("by_lane"))
        counts["unfinished"] = sum([counts[state] for state in IN_STATES])
        del counts["prepared"], counts["acking"]
        counts["name"] = self.name
        counts["durability"] = self._durability
        counts["capacity"] = config["capacity"]
        counts["paused"] = bool(self._paused)
        counts["slots"] = self._slot_count
        counts["blocks"] = self._block_count
        counts["health"] = self._health()
        counts["retry"] = self._retry
        found: QueueStats = Queue._records.stats_of(counts)
        return found

    def join(self, *, timeout: float | None = None) -> None:
        """Return when no message is left that is not finished.

        Raises: WaitTimeout.
        """
        checked = check_timeout(timeout)
        deadline = time.monotonic() + (FOREVER if checked is None else checked)
        while True:
            self._check_writable()
            ticket = self._announce("finished")
            self._upkeep()
            left = len(self)
            if left == 0:
                return
            if time.monotonic() >= deadline:
                raise WaitTimeout(f"{self.path}: {left} messages are not finished")
            self._sleep("finished", ticket, deadline - time.monotonic())
            if left > 1000:
                time.sleep(0.001)  # counting them costs more than they do

    # --- changing what nobody has leased ----------------------------------------------------------

    def cancel(self, id: int) -> bool:
        """Remove a message by its id, dead letters too.

        Returns: False where it is finished, or leased by somebody.
        """
        self._check_writable()
        found = self._find(message_id(id))
        return found is not None and self._cancel(*found)

    def pause(self) -> None:
        """Have nothing leased, by anyone, until `resume`; puts and acknowledgements go on."""
        self._check_writable()
        self._set_paused(1)

    def resume(self) -> None:
        """End a `pause`."""
        self._check_writable()
        self._set_paused(0)
        self._wake_all()

    @property
    def paused(self) -> bool:
        """Is nothing leased until `resume`?"""
        self._keep_up()
        return bool(self._paused)

    def purge(self) -> int:
        """Remove all messages that are neither leased nor dead; how many."""
        self._check_writable()
        states: tuple[Literal["ready", "delayed", "held"], ...] = ("ready", "delayed", "held")
        found = self._scan(states)
        ids, gone, before = {number for _, number, _, _ in found}, 0, -1
        while gone > before:  # with ordering, one that goes readies the next of its key
            before = gone
            gone += sum(self._cancel(slot, word) for _, _, slot, word in found)
            found = [one for one in self._scan(states) if one[1] in ids]
        return gone

    def alter(
        self,
        *,
        capacity: int | Literal["unchanged"] = "unchanged",
        lease: float | Literal["unchanged"] = "unchanged",
        retry: RetryPolicy | Literal["unchanged"] = "unchanged",
        ttl: float | Literal["unchanged"] | None = "unchanged",
        durability: Durability | Literal["unchanged"] | None = "unchanged",
        payload_max: int | str = "unchanged",
        dedup_window: float | Literal["unchanged"] = "unchanged",
        ageing: bool | Literal["unchanged"] = "unchanged",
    ) -> None:
        """Change the stored configuration.

        Every process that has the queue open follows at its next call, without opening it again;
        puts that wait for room go on. Killed on the way, it is as before or as asked for. What was
        put or leased before keeps its time to live and its lease.

        Args:
            capacity: how many messages may be not finished: it can be raised, never lowered. Each
                raise keeps the maps of before in every process that has the queue open, until that
                closes: raise it seldom, and far.
            lease: seconds for which a message is leased from now on.
            retry: how often, and when.
            ttl: seconds after which a message is not delivered any more; None: never.
            durability: the stored level; None: the store's.
            payload_max: the longest payload.
            dedup_window: seconds within which a `dedup_id` is stored once; a queue that had none
                gets one, and keeps one.
            ageing: let the longest waiting message come first now and then, whatever its priority.

        Raises: InvalidArgument for a smaller `capacity`, or a `dedup_window` of 0 where there is
        one; StoreFull where the disk has no room for a larger one's hints (nothing has changed
        then).

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     queue = store.queue("mail", capacity=1)
        ...     _ = queue.put(b"a")
        ...     queue.alter(capacity=2)
        ...     _ = queue.put(b"b", timeout=0)
        ...     len(queue)
        2
        """
        self._check_writable()
        asked = {
            "capacity": capacity, "lease": lease, "retry": retry, "ttl": ttl,
            "durability": durability, "payload_max": payload_max, "dedup_window": dedup_window,
            "ageing": ageing,
        }  # fmt: skip
        given = {
            name: value
            for name, value in asked.items()
            if not (isinstance(value, str) and value == "unchanged")
        }
        try:
            self._alter(queue_settings.check(given))
        except ConfigMismatch as error:
            raise InvalidArgument(str(error)) from None

    def _alter(self, asked: dict[str, Any]) -> None:
        """Have settings stored. Raises ConfigMismatch for what cannot be changed."""
        with self._maintaining("altering"):
            path = self.path / "queue.json"
            config = files.read_json(path)
            queue_settings.require_alterable(self.path, config, asked)
            before = config.copy()
            config.update(asked)
            if config != before:
                queue_settings.check_together(config)
                with settings.changing(self):
                    if config["dedup_window"] and not before["dedup_window"]:
                        table = self._files.path("dedup")
                        dedup.create(table, self.session.id, self._files.queue_id)
                    if config["capacity"] == before["capacity"]:
                        files.write_json(path, config)
                    else:
                        capacity_of_queue.raise_to(self, config)
        self._keep_up()

    # --- working ----------------------------------------------------------------------------------

    def worker(
        self,
        *,
        concurrency: int = 1,
        mode: Literal["thread", "process"] = "thread",
        time_limit: float = 300.0,
        batch: int | None = None,
        linger: float = 0.0,
    ) -> Callable[[Function], Function]:
        """Register a function that is called with each message; `millstream.run` runs it.

        Args:
            concurrency: how many calls at once.
            mode: "thread", or "process" (the function is imported there by its name).
            time_limit: seconds for which a lease is renewed at most.
            batch: call it with a list of up to so many messages.
            linger: seconds to wait for a batch to fill.
        """
        with _native.loading:
            from millstream.queues.worker import register
        return register(
            self,
            concurrency=concurrency,
            mode=mode,
            time_limit=time_limit,
            batch=batch,
            linger=linger,
        )


class Getting(Coroutine[Any, Any, Message]):
    """What `Queue.aget` gives: a coroutine, and an async context manager."""

    def __init__(self, queue: Queue, timeout: float | None) -> None:
        self._coroutine = queue._aget(timeout)
        given = "" if timeout is None else f"timeout={timeout!r}"
        self._shown = f"Queue.aget({given}) of {queue.name!r}"
        self._message: Message | None = None
        self.__name__ = "aget"  # as a task shows it
        self.__qualname__ = "Queue.aget"

    def __repr__(self) -> str:
        return f"<{self._shown}: to be awaited, or for async with>"

    def send(self, value: Any) -> Any:
        """As of any coroutine."""
        return self._coroutine.send(value)

    def throw(self, *raised: Any) -> Any:
        """As of any coroutine."""
        return self._coroutine.throw(*raised)

    def close(self) -> None:
        """As of any coroutine."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, None, Message]:
        return self._coroutine.__await__()

    async def __aenter__(self) -> Message:
        self._message = await self._coroutine
        return self._message

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert self._message is not None
        return self._message.__exit__(kind, error, trace)


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Queue.__module__ = "millstream"
Queue._reopened.__module__ = "millstream"
