"""Queues with the interface of the standard library's, for threads and for processes.

`Queue`, `PriorityQueue` and `SimpleQueue` take the place of those of `queue`, and of
`multiprocessing.Queue` and `multiprocessing.JoinableQueue`: same methods, same exceptions. One that
is given to another process, as an argument or in a message, is the same queue there. There is no
feeder thread: when `put` returns, the item is in the queue, and no process that dies can damage or
block it.

Warning: items travel as pickles, as those of `multiprocessing.Queue` do. Whoever can write to the
directory of the store can run code in every process that gets from the queue.

Where they must differ:

- Items are copied. What `get` returns equals what was put, and is another object; what cannot be
  pickled cannot be put.
- A queue without `maxsize` holds 100,000 items, not any number: then `put` waits.
- `get` takes the item for good, as there: if the process dies before it is done with it, the item
  is gone. `store.queue` has leases for that.
- `task_done` is called in the process that called `get`, at most once for each; more is a
  ValueError. The items that a process died over count as done.
- `close` ends the use of this object alone; `join_thread` and `cancel_join_thread` have no thread
  to wait for.
- `maxsize` may be changed: to more for all, to less for this handle only.
- There is no `LifoQueue`, and nothing to override (the mutex, `queue`, `_put`, `_get` ...).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue as standard
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from millstream import _native, address
from millstream.codecs import pickle as pickled
from millstream.compat.tasks import SLICE_SECONDS, tasks_of
from millstream.disk import files
from millstream.errors import LeaseLost
from millstream.store.store import Store, shared, temporary

if TYPE_CHECKING:
    from millstream._native import Message
    from millstream.queues.queue import Queue as Handle
    from millstream.store.store import Place

__all__ = ["Empty", "Full", "PriorityQueue", "Queue", "ShutDown", "SimpleQueue"]

Item = TypeVar("Item")

Empty = standard.Empty
Full = standard.Full
UNBOUNDED = 100_000
DEAD_LIMIT = 100
PURGE_SECONDS = 1.0

if hasattr(standard, "ShutDown"):  # Python 3.13
    ShutDown: type[Exception] = standard.ShutDown
else:

    class _ShutDown(Exception):
        """The queue was shut down: nothing can be put, and nothing is left to get."""

    _ShutDown.__name__ = _ShutDown.__qualname__ = "ShutDown"
    ShutDown = _ShutDown


# --- where queues without a path live -------------------------------------------------------------

_lock = _native.Lock("opening a temporary store", reentrant=True)
_numbers = itertools.count(1)
_own: tuple[int, Store] | None = None
"""The temporary store of this process, and which process that is."""


def _temporary_store() -> Store:
    global _own
    with _lock:
        if not _is_here(_own):
            made = _native.fork_count(), temporary(durability="process")
            if not _is_here(_own):  # a handler may have come between
                _own = made
        assert _own is not None
        return _own[1]


def _is_here(own: tuple[int, Store] | None) -> bool:
    return own is not None and own[0] == _native.fork_count() and not own[1].closed


# --- the classes ----------------------------------------------------------------------------------


class SimpleQueue(Generic[Item]):
    """Unbounded (100,000 items), first in, first out; see the module for where it differs.

    Args:
        path: directory of a store; by default a temporary one, which goes away with this process.
        name: of the queue in that store; by default a new one.

    >>> from millstream.compat import SimpleQueue
    >>> q = SimpleQueue()
    >>> q.put({"a": 1})
    >>> q.get(), q.empty()
    ({'a': 1}, True)
    """

    def __init__(
        self, *, path: str | os.PathLike[str] | None = None, name: str | None = None
    ) -> None:
        self._open(path, name, 0)

    def _open(self, path: str | os.PathLike[str] | None, name: str | None, maxsize: int) -> None:
        store = _temporary_store() if path is None else _opened(path)
        if name is None:
            name = f"compat-{os.getpid()}-{next(_numbers)}" if path is None else "compat"
        self._attach(store, name, maxsize, maxsize if maxsize > 0 else UNBOUNDED)

    def _attach(self, store: Store, name: str, maxsize: int, bound: int) -> None:
        self._path, self._place = store.path, store._place
        self._name = name
        self._maxsize = maxsize
        self._bound = bound
        self._closed = False
        self._process = _native.fork_count()
        self._handle = store.queue(
            name, capacity=bound, priorities=1, dead_limit=DEAD_LIMIT, codec=pickled
        )

    def _here(self) -> None:
        """After a fork, open in the child what the parent has open."""
        if self._process != _native.fork_count():
            self._attach(_opened(self._path, self._place), self._name, self._maxsize, self._bound)

    @property
    def _queue(self) -> Handle:
        self._here()
        return self._handle

    def __reduce__(self) -> tuple[object, ...]:
        place = self._path, self._place
        return (_reopen, (type(self), place, self._name, self._maxsize, self._bound))

    def _seconds(self, block: bool, timeout: float | None) -> float | None:
        """How long a call of an open queue may wait; None: for ever."""
        self._here()
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        if not block:
            return 0.0
        if timeout is not None and timeout < 0:
            raise ValueError("'timeout' must be a non-negative number")
        return timeout

    def put(self, item: Item, block: bool = True, timeout: float | None = None) -> None:
        """Put an item. Raises: Full, only where 100,000 items are in the queue."""
        seconds = self._seconds(block, None)
        if block and timeout is not None:
            seconds = max(timeout, 0.0)  # there never is anything to wait for in the standard one
        self._queue.put(item, timeout=seconds)

    def put_nowait(self, item: Item) -> None:
        """The same."""
        self.put(item, block=False)

    def get(self, block: bool = True, timeout: float | None = None) -> Item:
        """Remove and return an item.

        Args:
            block: wait for one; False: raise Empty at once where there is none.
            timeout: seconds to wait; None: as long as it takes.

        Raises: Empty.
        """
        return self._take(self._seconds(block, timeout))

    def get_nowait(self) -> Item:
        """The item that is there now. Raises: Empty."""
        return self.get(block=False)

    def _take(self, seconds: float | None) -> Item:
        while True:
            message = self._queue.get(timeout=seconds)
            with contextlib.suppress(LeaseLost):  # this process was stopped for half a minute
                return self._finish(message)

    def _finish(self, message: Message) -> Item:
        """Take a leased message for good."""
        item: Item = message.value
        message.ack()
        return item

    def qsize(self) -> int:
        """How many items there are, about: others put and get at the same time."""
        return len(self._queue)

    def empty(self) -> bool:
        """Is there none?"""
        return self.qsize() == 0

    def close(self) -> None:
        """Let `put` and `get` of this object raise ValueError; what was put is there."""
        self._here()
        self._closed = True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name!r} in {self._path}>"

    def __class_getitem__(cls, item: Any) -> Any:
        """Allow `Queue[int]`, as the standard classes do."""
        return super().__class_getitem__(item)  # type: ignore[misc]


class Queue(SimpleQueue[Item]):
    """First in, first out, of at most `maxsize` items; see the module for where it differs.

    Args:
        maxsize: 0 or less: 100,000.
        path: directory of a store; by default a temporary one, which goes away with this process.
        name: of the queue in that store; by default a new one.

    >>> from millstream.compat import Full, Queue
    >>> q = Queue(maxsize=1)
    >>> q.put("tea")
    >>> try:
    ...     q.put("coffee", timeout=0.01)
    ... except Full:
    ...     print("full")
    full
    >>> q.get()
    'tea'
    >>> q.task_done()
    >>> q.join()
    """

    def __init__(
        self,
        maxsize: int = 0,
        *,
        path: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        self._open(path, name, maxsize)

    def _attach(self, store: Store, name: str, maxsize: int, bound: int) -> None:
        super()._attach(store, name, maxsize, bound)
        self._tasks = tasks_of(store, name)

    @property
    def maxsize(self) -> int:
        """How many items there may be; 0 or less: 100,000."""
        return self._maxsize

    @maxsize.setter
    def maxsize(self, maxsize: int) -> None:
        bound = maxsize if maxsize > 0 else UNBOUNDED
        if bound > self._bound:
            self._queue.alter(capacity=bound)
            self._bound = bound
        self._maxsize = maxsize

    @property
    def is_shutdown(self) -> bool:
        """Was it shut down, by any process?"""
        self._here()
        return self._tasks.is_shutdown

    def full(self) -> bool:
        """Are there `maxsize` items?"""
        return 0 < self._maxsize <= self.qsize()

    def put(self, item: Item, block: bool = True, timeout: float | None = None) -> None:
        """Put an item, waiting for room.

        Args:
            item: anything that can be pickled.
            block: wait; False: raise Full at once where there is no room.
            timeout: seconds to wait; None: as long as it takes.

        Raises: Full; ShutDown.
        """
        seconds = self._seconds(block, timeout)
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = SLICE_SECONDS if end is None else max(0.0, end - time.monotonic())
            ticket = self._queue._announce("room")
            try:
                if 0 < self._maxsize < self._bound and self.full():
                    raise Full  # it was made smaller
                self._put_now(item)
            except Full:
                if end is not None and time.monotonic() >= end:
                    raise
                self._queue._sleep("room", ticket, min(left, SLICE_SECONDS))
            else:
                return

    def _put_now(self, item: Item) -> None:
        tasks = self._tasks
        with tasks.gate:  # in this process nothing is put behind a shutdown
            if tasks.is_shutdown:
                raise ShutDown
            number = self._queue.put(item, timeout=0)
        # Another process may have shut it down meanwhile.
        if self.is_shutdown and self._queue.cancel(number):
            raise ShutDown

    def get(self, block: bool = True, timeout: float | None = None) -> Item:
        """Remove and return an item, waiting for one.

        Args:
            block: wait; False: raise Empty at once where there is none.
            timeout: seconds to wait; None: as long as it takes.

        Raises: Empty; ShutDown, once it is empty.
        """
        seconds = self._seconds(block, timeout)
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            shut = self.is_shutdown  # before the items are counted: none comes after it
            left = SLICE_SECONDS if end is None else max(0.0, end - time.monotonic())
            try:
                return self._take(0.0 if shut else min(left, SLICE_SECONDS))
            except Empty:
                if shut:
                    raise ShutDown from None
                if end is not None and time.monotonic() >= end:
                    raise

    def _finish(self, message: Message) -> Item:
        item: Item = message.value
        self._tasks.begin()  # before the item is gone: `join` sees the one or the other
        try:
            message.ack()
        except LeaseLost:
            self._tasks.end()
            raise
        return item

    @property
    def unfinished_tasks(self) -> int:
        """Items that are there, and those that this process got and is not done with."""
        self._here()
        return len(self._queue) + self._tasks.count

    def task_done(self) -> None:
        """Say that an item which was got is done.

        Raises: ValueError where this process has none that is not done.
        """
        self._here()
        self._tasks.end()

    def join(self) -> None:
        """Wait until all that was put has been got and is done."""
        while len(self._queue):
            with contextlib.suppress(TimeoutError):
                self._queue.join(timeout=SLICE_SECONDS)
        self._tasks.join()

    def join_thread(self) -> None:
        """Return at once, as no thread has anything left to put. Only after `close`."""
        assert self._closed, f"Queue {self!r} not closed"

    def cancel_join_thread(self) -> None:
        """Do nothing: the end of the process waits for no thread, and loses no item."""

    def shutdown(self, immediate: bool = False) -> None:
        """Let every `put` raise ShutDown from now on, and every `get` once nothing is left.

        In all processes, and for as long as the queue exists.

        Args:
            immediate: throw away what is there.
        """
        self._here()
        with (tasks := self._tasks).gate:
            tasks.shut_down()
            end = time.monotonic() + PURGE_SECONDS  # what is just being got is there till then
            while immediate and (self._queue.purge() or self.qsize()) and time.monotonic() < end:
                time.sleep(0.0001)


class PriorityQueue(Queue[Item]):
    """The least item comes first; see the module for where it differs.

    Besides: `get` reads all items, so that the queue is meant for hundreds, not for millions; items
    that cannot be compared are found out by `get`, which raises TypeError. While several processes
    get at once, each gets the least of those that no other has before it. The lanes of
    `store.queue(priorities=...)` have no such costs.

    >>> from millstream.compat import PriorityQueue
    >>> q = PriorityQueue()
    >>> for item in (3, 1, 2):
    ...     q.put(item)
    >>> [q.get() for _ in range(3)]
    [1, 2, 3]
    """

    def _finish(self, message: Message) -> Item:
        """The leased message is the oldest: there may be a lesser one behind it."""
        try:
            while True:
                ready = self._queue.peek(UNBOUNDED)
                least = min(ready, key=lambda each: _Order(each.value), default=None)
                if least is None or not least.value < message.value:
                    return super()._finish(message)
                self._tasks.begin()
                if self._queue.cancel(least.id):  # it was still there, and now it is ours
                    message.release()
                    item: Item = least.value
                    return item
                self._tasks.end()
        except TypeError:
            message.release()
            raise


class _Order:
    """Compares by `<` alone, as heaps do."""

    __slots__ = ("item",)

    def __init__(self, item: Any) -> None:
        self.item = item

    def __lt__(self, other: _Order) -> bool:
        return bool(self.item < other.item)


def _opened(path: str | os.PathLike[str], place: Place | None = None) -> Store:
    """The store at a path, of which `place` says more: one for all queues of this process."""
    return shared(files.absolute(address.directory(path)), "rw", False, place=place)


def _reopen(
    kind: type[SimpleQueue[Any]],
    place: tuple[str, Place],
    name: str,
    maxsize: int,
    bound: int,
) -> Any:
    made: SimpleQueue[Any] = object.__new__(kind)
    made._attach(_opened(*place), name, maxsize, bound)
    return made
