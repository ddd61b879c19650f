"""A queue: messages that many processes put, lease, and acknowledge or give back."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from millstream import _native, codecs, files, queue_settings, slots, timestamps
from millstream._native import Message
from millstream.errors import (
    Closed,
    Empty,
    Indeterminate,
    InvalidArgument,
    InvalidType,
    MillstreamError,
    NotFound,
    Poisoned,
    QueueFull,
    StorageError,
    Unsupported,
    WaitTimeout,
)
from millstream.options import Durability, RetryPolicy, as_index, check_timeout, integer

if TYPE_CHECKING:
    from millstream.queue_records import DeadLetter, QueueStats, StoredMessage
    from millstream.queue_waiter import Waiter
    from millstream.store import Store

__all__ = ["DeadLetters", "Queue"]

LOCK_SECONDS = 30.0
COUNTER_BITS = 40
FOREVER = 1e9
Function = TypeVar("Function", bound=Callable[[Any], object])


class Queue(_native.QueueCore):
    """A queue of a store; made by `Store.queue`.

    Thread-safe; pickles by the store's path and its name (and its codec, which must pickle).

    `put`, `put_many`, `get`, `get_many` and `ack_many` are the extension's own.

    Attributes:
        store: the store.
        name: the name.
        capacity: how many messages may be not finished.
        lease: seconds that a lease lasts.
        retry: the `RetryPolicy`.
        dead: the dead letters.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        config: dict[str, Any],
        durability: Durability | None,
        codec: object,
    ) -> None:
        self.store = store
        self.name = name
        self.path = store._queue_path(name)
        self._override = durability
        self._codec = codec
        self._workers: list[Any] = []
        self._waiter: Waiter | None = None
        self._random: Callable[[], float] | None = None
        self.dead = DeadLetters(self)
        self._config = config
        self._files = slots.Files(self.path, config, store._store_id, write=store.writable)
        try:
            self._open()
        except BaseException:
            self._files.close()
            raise

    def __repr__(self) -> str:
        return f"<Queue {self.name!r} of {self.store.path!r}{' (closed)' if self.closed else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.store, self.name, self._override, self._codec))

    # --- opening ----------------------------------------------------------------------------------

    def _open(self) -> None:
        hints = self._files.map_hints()
        if hints is None and self.store.writable:
            with self._files.making_hints():
                hints = self._files.map_hints()
                if hints is None:
                    self._make_hints()
                    return
        if hints is None:
            hints = self._files.private_hints()
        self._files.counts()
        self._use(hints)

    def _use(self, hints: Any) -> None:
        config = self._config
        numbers = {
            **{name: config[name] for name in ("slot_bytes", "capacity", "dead_limit")},
            **{name: config[name] for name in ("priorities", "ageing")},
            "block_max": self._files.sizes.block_max,
            "max_attempts": config["retry"]["max_attempts"],
            "generation": self.store._generation,
            "block_key": config["on_dead"] == "stop",
        }
        members = self.store._members
        self._attach(
            self._files.slots, self._files.blocks, hints, numbers, members, self.store.writable
        )
        self._configure()

    def _make_hints(self) -> None:
        """As the first of this session, alone: recover the queue into new hints."""
        hints, temporary = self._files.make_hints()
        try:
            slot_count, block_count = self._files.counts()
            # A copied directory may have holes where the original had blocks.
            self._files.allocate_slots(slot_count)
            if block_count:
                self._files.allocate_blocks(block_count)
            self._use(hints)
            self._set_next_id(self.store._generation << COUNTER_BITS | 1)
            self._recover(verify=bool(self._poison) or not self.store._clean)
            if slot_count == 0:
                first = min(slots.EXTENT_SLOTS, self._files.sizes.slot_max)
                self._files.allocate_slots(first)
                self._publish_slots(first)
            if self._poison:
                self._files.sync()  # all was verified; what is there now is what is written
                self._set_poison(0)
            self._files.publish_hints(temporary)
        except BaseException:
            files.remove(temporary)
            raise

    def _configure(self) -> None:
        config = self._config
        self.capacity = int(config["capacity"])
        self.lease = float(config["lease"])
        self.retry = RetryPolicy(**config["retry"])
        self._durability: Durability = (
            self._override or config["durability"] or self.store._override or self.store.durability
        )
        self._configure_core(
            self.lease,
            config["ttl"],
            config["payload_max"],
            codecs.resolve(self._codec),
            self._durability,
        )
        self._set_policy(self.retry.max_attempts, config["ageing"], config["on_dead"] == "stop")

    @property
    def durability(self) -> Durability:
        """What a put or an acknowledgement through this handle has survived when it returns."""
        return self._durability

    # --- hooks of the core ------------------------------------------------------------------------

    def _check_live(self) -> None:
        self.store._check_open()
        if self.closed:
            raise Closed(f"{self.path}: the queue is closed; open the store again")
        if self._state == slots.DROPPED:
            self._dispose()
            raise Closed(f"{self.path}: the queue was dropped")
        if self._state == slots.REPLACED:
            self._dispose()
            raise Closed(f"{self.path}: recovered by another process; open the store again")

    def _check_writable(self) -> None:
        self._check_live()
        self.store._check_writable()
        if self._poison:
            raise Poisoned(
                5,
                "an earlier sync failed; close the store in every process and open it again",
                self.path,
            )

    def _grow_slots(self, seen: int) -> None:
        with self._word("maintenance", f"{self.path}: growing", LOCK_SECONDS):
            count = self._slot_count
            if count == seen:
                most = self._files.sizes.slot_max
                count = min(max(2 * count, slots.EXTENT_SLOTS), most)
                self._files.allocate_slots(count)
                self._publish_slots(count)

    def _grow_blocks(self, seen: int) -> None:
        with self._word("maintenance", f"{self.path}: growing", LOCK_SECONDS):
            count = self._block_count
            if count == seen:
                most = self._files.sizes.block_max
                count = min(max(2 * count, slots.EXTENT_BLOCKS), most)
                self._files.allocate_blocks(count)
                self._publish_blocks(count)

    def _retry_delay(self, attempt: int) -> float:
        if self._random is None:
            from random import random

            self._random = random
        return self.retry.delay(attempt, self._random())

    def _due(self, at: Any) -> int:
        return timestamps.microseconds(at)

    def _check_dedup(self) -> None:
        if not self._config["dedup_window"]:
            raise InvalidArgument(
                f"{self.path}: the queue was made without a dedup_window, so that a dedup_id would"
                " do nothing"
            )
        raise Unsupported(f"{self.path}: deduplication is not there yet")

    def _changed(self) -> None:
        if self._durability == "interval":
            self.store._background.notice_queue(self)

    def _make_durable(self) -> None:
        """Return when all that was changed before this call survives a power cut."""
        begun, _ = self._syncs
        word = self._word("sync", f"{self.path}: syncing", LOCK_SECONDS)
        with word:
            # A sync that began after our change covers it.
            if self._syncs[1] <= begun:
                self._sync_now()

    def _sync_now(self) -> None:
        """Holder of the sync word."""
        if self._poison:
            raise Poisoned(5, "an earlier sync failed", self.path)
        number = self._begin_sync()
        try:
            self._files.sync()
        except StorageError as error:
            self._set_poison(1)
            raise Indeterminate(
                error.errno or 5, f"the sync behind a change failed: {error.strerror}", self.path
            ) from error
        self._end_sync(number)

    def _sync_in_background(self) -> None:
        if self._take_changed() and not self.closed and self._state == slots.LIVE:
            self._make_durable()

    def flush(self) -> None:
        """Return when all that was done before this call, by anyone, survives a power cut.

        Raises: Indeterminate, Poisoned.
        """
        self._check_writable()
        self._make_durable()

    # --- asyncio ----------------------------------------------------------------------------------

    def _wait_in_loop(self) -> Waiter:
        from millstream.queue_waiter import Waiter

        if self._waiter is None or not self._waiter.usable():
            self._waiter = Waiter(self)
        return self._waiter

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
                if self._durability != "sync":
                    return put()
                import asyncio

                return await asyncio.get_running_loop().run_in_executor(None, put)
            except QueueFull:
                if time.monotonic() >= deadline:
                    raise
            await self._wait_in_loop().wait("room", ticket, deadline)

    def aget(self, *, timeout: float | None = None) -> Getting:
        """`get` for asyncio: ``async with q.aget() as m``, or ``m = await q.aget()``.

        Waits without blocking the loop; cancelling it loses no message.
        """
        return Getting(self, check_timeout(timeout))

    async def _aget(self, timeout: float | None) -> Message:
        deadline = time.monotonic() + (FOREVER if timeout is None else timeout)
        while True:
            ticket = self._announce("message")
            # Taken and handed over without an await in between.
            try:
                return self.get(timeout=0)
            except Empty:
                if time.monotonic() >= deadline:
                    raise
            await self._wait_in_loop().wait("message", ticket, deadline)

    async def __aiter__(self) -> AsyncIterator[Message]:
        while True:
            yield await self._aget(None)

    # --- looking ----------------------------------------------------------------------------------

    def _stored(self, slot: int, word: int) -> StoredMessage | None:
        from millstream.queue_records import StoredMessage, moment

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
        """Look at the messages that would come next, without taking them.

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
        return found

    def stats(self) -> QueueStats:
        """The queue in numbers, as of now."""
        from millstream.queue_records import QueueStats

        counts, counters = self._counts(), self._counters()
        in_states = ("ready", "delayed", "held", "leased", "prepared", "acking")
        return QueueStats(
            name=self.name,
            durability=self._durability,
            capacity=self.capacity,
            unfinished=sum(counts[state] for state in in_states),
            by_priority=tuple(counts["by_lane"]),
            paused=bool(self._paused),
            slots=self._slot_count,
            blocks=self._block_count,
            health="sync failed" if self._poison else "sound",
            **{state: counts[state] for state in ("ready", "delayed", "held", "leased", "dead")},
            **{name: counters[name] for name in ("redelivered", "expired", "evicted", "corrupt")},
        )

    def join(self, *, timeout: float | None = None) -> None:
        """Return when no message is left that is not finished.

        Raises: WaitTimeout.
        """
        checked = check_timeout(timeout)
        deadline = time.monotonic() + (FOREVER if checked is None else checked)
        while True:
            self._check_writable()
            ticket = self._announce("settled")
            self._look()
            left = len(self)
            if left == 0:
                return
            if time.monotonic() >= deadline:
                raise WaitTimeout(f"{self.path}: {left} messages are not finished")
            self._sleep("settled", ticket, deadline - time.monotonic())
            if left > 1000:
                time.sleep(0.001)  # counting them costs more than they do

    # --- changing what nobody has leased ----------------------------------------------------------

    def cancel(self, id: int) -> bool:
        """Remove a message by its id, dead letters too.

        Returns: False where it is finished, or leased by somebody.
        """
        self._check_writable()
        found = self._find(_message_id(id))
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
        return bool(self._paused)

    def purge(self) -> int:
        """Remove all messages that are neither leased nor dead; how many."""
        self._check_writable()
        found = self._scan(("ready", "delayed", "held"))
        return sum(self._cancel(slot, word) for _, _, slot, word in found)

    def alter(
        self,
        *,
        capacity: int | Literal["unchanged"] = "unchanged",
        lease: float | Literal["unchanged"] = "unchanged",
        retry: RetryPolicy | Literal["unchanged"] = "unchanged",
        ttl: float | Literal["unchanged"] | None = "unchanged",
        durability: Durability | Literal["unchanged"] | None = "unchanged",
    ) -> None:
        """Change the stored configuration.

        Other processes follow when they open the queue again. `capacity` cannot be raised yet.

        Raises: Unsupported for another `capacity`.
        """
        self._check_writable()
        asked = {
            "capacity": capacity, "lease": lease, "retry": retry, "ttl": ttl,
            "durability": durability,
        }  # fmt: skip
        given = {
            name: value
            for name, value in asked.items()
            if not (isinstance(value, str) and value == "unchanged")
        }
        checked = queue_settings.check(given)
        with self._word("maintenance", f"{self.path}: altering", LOCK_SECONDS):
            path = os.path.join(self.path, "queue.json")
            config = files.read_json(path)
            if checked.get("capacity", config["capacity"]) != config["capacity"]:
                raise Unsupported(
                    f"{self.path}: the capacity of a queue cannot be changed yet; make another"
                    " queue and move the messages"
                )
            config.update(checked)
            files.write_json(path, config)
            self._config = config
            self._configure()

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
        from millstream.worker import register

        return register(
            self,
            concurrency=concurrency,
            mode=mode,
            time_limit=time_limit,
            batch=batch,
            linger=linger,
        )

    # --- the end ----------------------------------------------------------------------------------

    def _sync_at_close(self) -> Exception | None:
        """Sync what this process wrote; what failed."""
        try:
            if not self.closed and self._state == slots.LIVE and not self._poison:
                self._make_durable()
        except (StorageError, MillstreamError) as error:
            return error
        return None

    def _dispose(self) -> None:
        """Give up this handle; messages that were taken through it keep their bytes."""
        if not self.closed:
            self._close()
            self._wake_all()  # who waits here, of all processes, looks again
            self._files.close()
        if self._waiter is not None:
            self._waiter.stop()


class Getting:
    """What `Queue.aget` gives: awaitable, and an async context manager."""

    def __init__(self, queue: Queue, timeout: float | None) -> None:
        self._queue = queue
        self._timeout = timeout
        self._message: Message | None = None

    def __await__(self) -> Generator[Any, None, Message]:
        return self._queue._aget(self._timeout).__await__()

    async def __aenter__(self) -> Message:
        self._message = await self._queue._aget(self._timeout)
        return self._message

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert self._message is not None
        return self._message.__exit__(kind, error, trace)


class DeadLetters:
    """The messages of a queue that are not tried any more; `Queue.dead`."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def __len__(self) -> int:
        return int(self._queue._counts()["dead"])

    def _letter(self, slot: int, word: int) -> DeadLetter | None:
        from millstream.queue_records import REASONS, DeadLetter, moment

        queue = self._queue
        found = queue._record(slot, word)
        if found is None:
            return None
        number, _, priority, attempts, put_at, _, _, key, headers, data = found
        failure = queue._failure(slot, number)
        first_at, last_at, attempts, kind, first, last = failure or (
            None,
            None,
            attempts,
            0,
            "",
            "",
        )
        reason = last if kind == 4 and last else REASONS.get(kind, "unknown")
        return DeadLetter(
            number,
            queue._decoded(data),
            reason,
            first,
            last,
            None if first_at is None else moment(first_at),
            None if last_at is None else moment(last_at),
            attempts,
            key,
            headers,
            priority,
            moment(put_at),
        )

    def list(self, count: int | None = None) -> list[DeadLetter]:
        """The dead letters, by id; at most `count`."""
        found = sorted((number, slot, word) for _, number, slot, word in self._scan())
        if count is not None:
            found = found[: integer("count", count, 0)]
        letters = (self._letter(slot, word) for _, slot, word in found)
        return [letter for letter in letters if letter is not None]

    def peek(self, id: int) -> DeadLetter:
        """One dead letter.

        Raises: NotFound.
        """
        for _, number, slot, word in self._scan():
            if number == _message_id(id):
                letter = self._letter(slot, word)
                if letter is not None:
                    return letter
        raise NotFound(f"{self._queue.path}: message {id} is no dead letter")

    def redrive(self, ids: int | Iterable[int] | None = None) -> int:
        """Have dead letters tried again, with their ids and all attempts; how many.

        Args:
            ids: which; None: all.

        Raises: QueueFull when the queue has no room for one more; those before it were redriven.
        """
        return sum(self._queue._redrive(slot, word) for slot, word in self._chosen(ids))

    def purge(self, ids: int | Iterable[int] | None = None) -> int:
        """Remove dead letters for good; how many. None: all."""
        return sum(self._queue._cancel(slot, word) for slot, word in self._chosen(ids))

    def _scan(self) -> Any:
        return self._queue._scan(("dead",))

    def _chosen(self, ids: int | Iterable[int] | None) -> Any:
        self._queue._check_writable()
        if as_index(ids) is not None:
            ids = [ids]  # type: ignore[list-item]
        wanted = None if ids is None else {_message_id(one) for one in ids}  # type: ignore[union-attr]
        found = sorted((number, slot, word) for _, number, slot, word in self._scan())
        return [(slot, word) for number, slot, word in found if wanted is None or number in wanted]


def _message_id(id: object) -> int:
    number = as_index(id)
    if number is None:
        raise InvalidType(f"id {id!r}: expected an int")
    if not 0 <= number < 1 << 64:
        raise InvalidArgument(f"id {number}: not the id of a message")
    return number


def _reopen(store: Store, name: str, durability: Durability | None, codec: object) -> Queue:
    if name not in store.queues():
        raise NotFound(f"{store.path}: there is no queue {name!r} any more")
    return store.queue(name, durability=durability, codec=codec)
