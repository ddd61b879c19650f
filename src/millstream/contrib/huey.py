"""huey without a server: `MillstreamHuey(name, path=...)` in the place of `SqliteHuey`.

>>> import tempfile
>>> from millstream.contrib.huey import MillstreamHuey
>>> directory = tempfile.TemporaryDirectory()
>>> huey = MillstreamHuey("app", path=directory.name)
>>> @huey.task(name="add", priority=3)
... def add(a, b):
...     return a + b
>>> result = add(1, 2)
>>> huey.execute(huey.dequeue()), result()
(3, 3)
>>> huey.storage.close()
True
>>> directory.cleanup()

A task is leased to the worker that runs it, and is off the queue when it has ended: if the worker
is killed, another runs it. huey's own storages lose it then.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import struct
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import millstream
from millstream import (
    Closed,
    Compaction,
    InvalidArgument,
    LimitExceeded,
    OffsetOutOfRange,
    RetryPolicy,
)
from millstream.contrib import require
from millstream.contrib.lanes import Lanes, take
from millstream.contrib.renewal import AGAIN_SECONDS_MAX, Renewal
from millstream.contrib.sharing import PUT_SECONDS

require("huey", "huey", (3, 5), (4,))

from huey import Huey  # noqa: E402
from huey.constants import EmptyData  # noqa: E402
from huey.signals import SIGNAL_INTERRUPTED  # noqa: E402
from huey.storage import BaseStorage  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from typing import Literal

    from millstream import Message, Store

__all__ = ["MillstreamHuey", "MillstreamStorage"]


Outcome = TypeVar("Outcome")
BLOCKS_MAX = 32
"""Of 8 neighbouring priorities each; each is a queue."""
CLAIM_SECONDS = 60.0
"""For which nobody else gets what was read off the schedule."""
STALE_SECONDS = 3600.0
"""A table that was not brought up to date for so long is read anew: tombstones may be gone."""
EXPIRY = struct.Struct("<d")
SCHEDULED = struct.Struct("<dd")
RESULTS, COUNTERS, SCHEDULE = b"r", b"c", b"s"


class Table:
    """Keys and values of all processes, which a stream keeps; each change is atomic.

    Everybody has the whole of it in memory. A change is an append that succeeds where nothing was
    appended since its author has read: its sequence is the offset that it expects, of one producer
    that all share, and the second of one sequence adds nothing.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._stream = store.stream(name, partitions=1, compact=Compaction())
        self._producer = self._stream.producer("huey")
        self._lock = threading.RLock()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._rows: dict[bytes, dict[bytes, bytes]] = {
            space: {} for space in (RESULTS, COUNTERS, SCHEDULE)
        }
        self.next = 0
        self._seen = -math.inf

    def rows(self, space: bytes) -> dict[bytes, bytes]:
        """The rows of a space as they are now, to read under no change: a copy."""
        with self._lock:
            return self._current()[space].copy()

    def get_many(self, space: bytes, keys: list[bytes]) -> list[bytes | None]:
        """The values of some keys, as they are at one moment."""
        with self._lock:
            rows = self._current()[space]
            return [rows.get(key) for key in keys]

    def _current(self) -> dict[bytes, dict[bytes, bytes]]:
        """Apply what was appended since."""
        end, now = self._stream.next_offset(0), time.monotonic()
        if now - self._seen > STALE_SECONDS and self.next:
            self._begin_anew()
        while self.next < end:
            try:
                for batch in self._stream.read(partition=0, start=self.next or "earliest"):
                    for key, value in zip(batch.keys, batch.values, strict=True):
                        self._apply(key or b"", value)
                    self.next = batch.next_offset
                self.next = max(self.next, end)  # compaction leaves offsets without a record
            except OffsetOutOfRange:
                self._begin_anew()
        self._seen = now
        return self._rows

    def _apply(self, key: bytes, value: bytes | None) -> None:
        rows = self._rows.get(key[:1])
        if rows is None:  # somebody else's
            return
        if value is None:
            rows.pop(key[1:], None)
        else:
            rows[key[1:]] = value

    def change(
        self,
        space: bytes,
        key: bytes,
        decide: Callable[[bytes | None], tuple[bytes | None, Outcome]],
    ) -> Outcome:
        """Replace the value of a key by what `decide` makes of it; None: there is none.

        Returns: what `decide` says beside it.
        """
        with self._lock:
            while True:
                rows = self._current()[space]
                before = rows.get(key)
                after, outcome = decide(before)
                if after is before:
                    return outcome
                expected = self.next
                done = self._producer.append(after, key=space + key, sequence=expected)
                if done is not None:
                    self.next = done.offset + 1
                    self._apply(space + key, after)
                    return outcome

    def remove_all(self, space: bytes) -> None:
        """Remove the rows of a space that there are now."""
        for key in self.rows(space):
            self.change(space, key, lambda _: (None, None))

    def wait(self, seen: int, seconds: float) -> None:
        """Return when something was changed since `next` was `seen`, or after some seconds."""
        with contextlib.suppress(OffsetOutOfRange):
            follow = self._stream.read(partition=0, start=seen, follow=True, timeout=seconds)
            for _ in follow:
                return


class Opened:
    """What one process has open."""

    def __init__(self, storage: MillstreamStorage) -> None:
        self.store = millstream.open(storage.path, durability=storage.durability)
        self.renewal = Renewal(storage.lease)
        settings: dict[str, Any] = {
            "capacity": storage.capacity,
            "lease": storage.lease,
            "retry": RetryPolicy(max_attempts=storage.max_attempts, backoff=0.0),
        }
        try:
            self.lanes = Lanes(self.store, "huey", storage.name, BLOCKS_MAX, settings)
            self.table = Table(self.store, f"huey.{storage.name}")
        except BaseException:
            self.store.close()
            raise

    def close(self) -> None:
        """Close the store."""
        self.renewal.end()
        self.store.close()


class MillstreamStorage(BaseStorage):  # type: ignore[misc]
    """A storage of huey in a millstream store; `MillstreamHuey` uses it.

    Tasks are in the queue ``huey.<name>``, those of priorities outside of 0 to 7 in further ones;
    the schedule, results, locks and counters in the stream of that name, which each process that
    asks for them has in memory. Thread-safe; a forked process opens the store again at its first
    call.

    Durability: what a call stored survives the kill of any process when it returns. A power cut may
    take the last 100 ms or so; with durability "sync" nothing.

    Args:
        name: of the huey: 1 to 100 characters of ``A-Z a-z 0-9 . _ -``.
        path: the directory of the store, which is made where it is not there.
        durability: "process", "interval" or "sync"; default: as stored, "interval" in a new store.
        capacity: how many tasks may wait or run; more make `enqueue` wait up to 10 s and raise
            `QueueFull`. Default 100,000.
        lease: seconds after which another worker gets the task of one that was stopped. One that is
            killed is noticed within 100 ms.
        max_attempts: a task that its worker did not outlive so often is a dead letter.
        blocking: let `dequeue` wait for a task.
        read_timeout: seconds for which it waits.

    Raises: InvalidArgument (no path, name), ConfigMismatch where the queue is there with other
        settings, and what `millstream.open` raises.
    """

    def __init__(
        self,
        name: str = "huey",
        path: str | os.PathLike[str] | None = None,
        *,
        durability: Literal["process", "interval", "sync"] | None = None,
        capacity: int | None = None,
        lease: float = 60.0,
        max_attempts: int = 12,
        blocking: bool = True,
        read_timeout: float = 1.0,
    ) -> None:
        super().__init__(name)
        if path is None:
            raise InvalidArgument(f"MillstreamHuey({name!r}): say path=, the directory of a store")
        self.path = path
        self.durability = durability
        self.capacity = capacity
        self.lease = lease
        self.max_attempts = max_attempts
        self.blocking = blocking
        self.read_timeout = read_timeout
        self._forget()
        self.path = self._open().store.path  # absolute: the program may go elsewhere
        STORAGES.add(self)

    def _forget(self) -> None:
        """In a forked process: what was open is the parent's, and so is a lock."""
        self._now_open: Opened | None = None
        self._lock = threading.Lock()

    def _open(self) -> Opened:
        opened = self._now_open
        if opened is None:
            with self._lock:
                opened = self._now_open = self._now_open or Opened(self)
        return opened

    def close(self) -> bool:
        """Close the store; the next call opens it again."""
        opened, self._now_open = self._now_open, None
        if opened is None:
            return False
        opened.close()
        return True

    # --- tasks ------------------------------------------------------------------------------------

    def enqueue(self, data: bytes, priority: float | None = None) -> None:
        """Put a task. Raises QueueFull; InvalidArgument where a priority is no whole number."""
        queue, level = self._open().lanes.of(priority or 0)
        queue.put(data, priority=level, timeout=PUT_SECONDS)

    def take(self) -> Message | None:
        """Lease the next task, or return None where there is none."""
        opened = self._open()
        try:
            return take([opened.lanes], self.read_timeout if self.blocking else 0.0)
        except Closed:
            if not opened.store.closed:
                raise
            self._now_open = None  # by `close`, or since the process ends
            return None

    def dequeue(self) -> bytes | None:
        """Take a task off for good, as other storages do; `MillstreamHuey` leases it instead."""
        message = self.take()
        if message is None:
            return None
        message.ack()
        return message.data

    @property
    def renewal(self) -> Renewal:
        """What renews the leases of this process."""
        return self._open().renewal

    def _all(self) -> list[millstream.Queue]:
        """All queues, those that others made this moment too."""
        lanes = self._open().lanes
        lanes.look()
        return lanes.by_urgency()

    def queue_size(self) -> int:
        """How many tasks wait."""
        every = [queue.stats() for queue in self._all()]
        return sum(one.ready + one.delayed for one in every)

    def enqueued_items(self, limit: int | None = None) -> list[bytes]:
        """The next tasks."""
        found: list[bytes] = []
        left = self.queue_size() if limit is None else limit
        for queue in self._all():
            found += [one.value for one in queue.peek(left - len(found))]
        return found

    def flush_queue(self) -> None:
        """Remove the tasks that nobody runs."""
        for queue in self._all():
            queue.purge()

    # --- the schedule -----------------------------------------------------------------------------

    def add_to_schedule(self, data: bytes, ts: datetime) -> None:
        """Keep a task for later."""
        row = SCHEDULED.pack(0.0, ts.timestamp()) + data
        key = secrets.token_bytes(16)
        self._open().table.change(SCHEDULE, key, lambda _: (row, None))

    def _scheduled(self) -> list[tuple[float, bytes, bytes]]:
        """Time, key and row of those that nobody claims, in order."""
        now, found = time.time(), []
        for key, row in self._open().table.rows(SCHEDULE).items():
            claimed, due = SCHEDULED.unpack_from(row)
            if claimed <= now:
                found.append((due, key, row))
        return sorted(found, key=lambda one: one[0])  # what has one time, as added

    def claim(self, ts: datetime) -> Iterator[tuple[bytes, bytes]]:
        """Key and data of what is due: nobody else gets it for a minute; `moved` removes it."""
        until = ts.timestamp()
        for due, key, row in self._scheduled():
            if due > until:
                return
            claimed = SCHEDULED.pack(time.time() + CLAIM_SECONDS, due) + row[SCHEDULED.size :]
            if self._replace(key, row, claimed):
                yield key, row[SCHEDULED.size :]

    def _replace(self, key: bytes, row: bytes, by: bytes | None) -> bool:
        def decide(before: bytes | None) -> tuple[bytes | None, bool]:
            return (by, True) if before == row else (before, False)

        return self._open().table.change(SCHEDULE, key, decide)

    def moved(self, key: bytes) -> None:
        """What was claimed is in the queue."""
        self._open().table.change(SCHEDULE, key, lambda _: (None, None))

    def read_schedule(self, ts: datetime) -> list[bytes]:
        """Take what is due off the schedule for good; `MillstreamHuey` claims it instead."""
        found = []
        for key, data in self.claim(ts):
            self.moved(key)
            found.append(data)
        return found

    def schedule_size(self) -> int:
        """How many tasks are kept for later."""
        return len(self._scheduled())

    def scheduled_items(self, limit: int | None = None) -> list[bytes]:
        """Tasks that are kept for later, the earliest first."""
        return [row[SCHEDULED.size :] for _, _, row in self._scheduled()[:limit]]

    def flush_schedule(self) -> None:
        """Remove them."""
        self._open().table.remove_all(SCHEDULE)

    # --- results and locks ------------------------------------------------------------------------

    def put_data(self, key: str | bytes, value: bytes, is_result: bool = False) -> None:
        """Store a value."""
        row = EXPIRY.pack(0.0) + value
        self._open().table.change(RESULTS, _bytes(key), lambda _: (row, None))

    def peek_data(self, key: str | bytes) -> Any:
        """The value of a key, or EmptyData."""
        return _value(*self._open().table.get_many(RESULTS, [_bytes(key)]))

    def peek_many(self, keys: list[Any]) -> dict[Any, bytes]:
        """The values of those keys that have one."""
        rows = self._open().table.get_many(RESULTS, [_bytes(key) for key in keys])
        return {
            key: value
            for key, row in zip(keys, rows, strict=True)
            if row is not None and (value := _value(row)) is not EmptyData
        }

    def pop_data(self, key: str | bytes) -> Any:
        """Remove a key, and return its value, or EmptyData."""

        def decide(before: bytes | None) -> tuple[None, Any]:
            return None, _value(before)

        return self._open().table.change(RESULTS, _bytes(key), decide)

    def has_data_for_key(self, key: str | bytes) -> bool:
        """Is there a value?"""
        return self.peek_data(key) is not EmptyData

    def put_if_empty(self, key: str | bytes, value: bytes, ttl: float | None = None) -> bool:
        """Store a value where there is none; it goes after `ttl` seconds."""
        row = EXPIRY.pack(0.0 if ttl is None else time.time() + ttl) + value

        def decide(before: bytes | None) -> tuple[bytes | None, bool]:
            return (row, True) if _value(before) is EmptyData else (before, False)

        return self._open().table.change(RESULTS, _bytes(key), decide)

    def wait_result(
        self,
        key: str | bytes,
        timeout: float | None = None,
        backoff: float = 1.15,
        max_delay: float = 1.0,
    ) -> bool:
        """Wait for a value: woken when something is stored, so `backoff` is not used."""
        table = self._open().table
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            seen = table.next
            if self.has_data_for_key(key):
                return True
            left = max_delay if deadline is None else min(deadline - time.monotonic(), max_delay)
            if left <= 0:
                return False
            table.wait(seen, left)

    def result_store_size(self) -> int:
        """How many values there are."""
        return len(self.result_items())

    def result_items(self) -> dict[str, bytes]:
        """All values."""
        every = self._open().table.rows(RESULTS)
        found = {key.decode(): _value(row) for key, row in every.items()}
        return {key: value for key, value in found.items() if value is not EmptyData}

    def flush_results(self) -> None:
        """Remove them."""
        self._open().table.remove_all(RESULTS)

    def incr(self, key: str | bytes, amount: int = 1) -> int:
        """Add to a counter, and return what it is then."""

        def decide(before: bytes | None) -> tuple[bytes, int]:
            count = int(before or 0) + amount
            return b"%d" % count, count

        return self._open().table.change(COUNTERS, _bytes(key), decide)

    def delete_counter(self, key: str | bytes) -> None:
        """Remove a counter."""
        self._open().table.change(COUNTERS, _bytes(key), lambda _: (None, None))

    def flush_counters(self) -> None:
        """Remove all counters."""
        self._open().table.remove_all(COUNTERS)


STORAGES: weakref.WeakSet[MillstreamStorage] = weakref.WeakSet()


def _begin_anew() -> None:
    for storage in list(STORAGES):
        storage._forget()


os.register_at_fork(after_in_child=_begin_anew)


def _bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


def _value(row: bytes | None) -> Any:
    if row is None:
        return EmptyData
    (expires,) = EXPIRY.unpack_from(row)
    return EmptyData if 0.0 < expires <= time.time() else row[EXPIRY.size :]


class MillstreamHuey(Huey):  # type: ignore[misc]
    """A `huey.Huey` over a millstream store: ``MillstreamHuey("app", path="/var/lib/app")``.

    A task is leased when a worker takes it, renewed while it runs, and off the queue when it has
    ended, whether well or not: huey's own `retries` are for those that fail. Where the worker is
    killed, or interrupted, it runs again, so a task may run twice. What no worker can read (its
    function is not registered, say) is a dead letter of the queue, for `millstream queue dead`.

    Arguments are those of `huey.Huey`, then those of `MillstreamStorage`.
    """

    storage_class = MillstreamStorage

    def __init__(self, name: str = "huey", **options: Any) -> None:
        super().__init__(name, **options)
        self.signal(SIGNAL_INTERRUPTED)(_give_back)

    def dequeue(self) -> Any:
        """Lease the next task, and return it; `execute` ends the lease."""
        if not isinstance(self.storage, MillstreamStorage):  # immediate mode has its own
            return super().dequeue()
        message = self.storage.take()
        if message is None:
            return None
        try:
            task = self.deserialize_task(message.data)
        except Exception as error:
            message.reject(repr(error))
            raise
        task.millstream_lease = message
        return task

    def execute(self, task: Any, timestamp: datetime | None = None) -> Any:
        """Run a task, and take it off the queue."""
        message = getattr(task, "millstream_lease", None)
        if message is None:
            outcome = super().execute(task, timestamp)
            self._moved(task)
            return outcome
        renewal = self.storage.renewal
        renewal.begin(message)
        try:
            outcome = super().execute(task, timestamp)
        except (InvalidArgument, LimitExceeded) as error:  # it can never be kept
            if not message.finished:
                message.reject(repr(error))
            raise
        except Exception:  # not the task's: what became of it could not be kept
            if not message.finished:
                message.nack(delay=min(2.0 ** (message.attempt - 1), AGAIN_SECONDS_MAX))
            raise
        except BaseException:
            _give_back(SIGNAL_INTERRUPTED, task)
            raise
        finally:
            renewal.leave(message)
            task.millstream_lease = None
        if not message.finished:
            message.ack()
        return outcome

    def read_schedule(self, timestamp: datetime | None = None) -> Any:
        """Tasks that are due: they are off the schedule once `enqueue` has put them."""
        if not isinstance(self.storage, MillstreamStorage):
            return super().read_schedule(timestamp)
        found = []
        for key, data in self.storage.claim(timestamp or self._get_timestamp()):
            for task in self._deserialize_all([data]):
                task.millstream_claim = key
                found.append(task)
        return found

    def enqueue(self, task: Any) -> Any:
        """Put a task, a group or a chord."""
        result = super().enqueue(task)
        self._moved(task)
        return result

    def _moved(self, task: Any) -> None:
        key = getattr(task, "millstream_claim", None)
        if key is not None:
            self.storage.moved(key)
            task.millstream_claim = None


def _give_back(signal: str, task: Any) -> None:
    """A task was interrupted: another worker runs it."""
    message = getattr(task, "millstream_lease", None)
    if message is not None and not message.finished:
        message.release()
