"""Which items of a `compat.Queue` its processes got and are not done with."""

from __future__ import annotations

import contextlib
import queue
from typing import TYPE_CHECKING

from millstream import _native
from millstream.errors import LeaseLost
from millstream.options import RetryPolicy
from millstream.store.store import Store

if TYPE_CHECKING:
    from millstream._native import Message

SLICE_SECONDS = 0.1
"""How often a waiting call checks whether the queue was shut down."""

_lock = _native.Lock("counting tasks", reentrant=True)


class Tasks:
    """How many items this process got and is not done with.

    While there is one, the process holds the lease of a message in a queue beside: `join` waits
    until nobody does. A dead process holds none.
    """

    def __init__(self, store: Store, name: str) -> None:
        # Nobody renews the lease, so that users who never call `task_done` pay for nothing.
        self.queue = store.queue(
            f"{name}.tasks", capacity=1024, lease=30 * 86400.0, priorities=1, payload_bytes=0,
            dead_limit=1024, retry=RetryPolicy(max_attempts=62),
        )  # fmt: skip
        self._lock = _native.Lock(f"{name}: counting tasks", reentrant=True)
        self.gate = _native.Lock(f"{name}: putting", reentrant=True)
        self._count = 0
        self._token: Message | None = None

    def begin(self) -> None:
        """One more."""
        with self._lock:
            token = None if self._count else self._take_token()
            if self._count == 0:
                self._token, token = token, None
            self._count += 1
            if token is not None:  # a handler has come between
                token.ack()

    def _take_token(self) -> Message:
        while True:
            self.queue.put(b"")
            with contextlib.suppress(queue.Empty):  # unless another process took this one
                return self.queue.get(timeout=0)

    @property
    def count(self) -> int:
        """How many this process has."""
        return self._count

    def end(self) -> None:
        """One less."""
        with self._lock:
            if self._count == 0:
                raise ValueError("task_done() called too many times")
            self._count -= 1
            if self._count == 0 and self._token is not None:
                token, self._token = self._token, None
                with contextlib.suppress(LeaseLost):
                    token.ack()

    def join(self) -> None:
        """Wait until no process has any."""
        while True:
            counts = self.queue._counts()
            if counts["leased"] == 0:
                for left in self.queue.get_many(1024, timeout=0):  # of a process that died
                    left.ack()
                if self.queue._counts()["ready"] == 0:
                    return
            with contextlib.suppress(TimeoutError):
                self.queue.join(timeout=SLICE_SECONDS)

    @property
    def is_shutdown(self) -> bool:
        """Was `shut_down` called, by any process?"""
        return len(self.queue) > 0 and self.queue._counts()["delayed"] > 0

    def shut_down(self) -> None:
        """Leave the sign: a message that is due when nobody is left to see it."""
        if not self.is_shutdown:
            self.queue.put(b"", delay=99 * 365 * 86400.0)


_tasks: dict[tuple[int, tuple[int, int], str], Tasks] = {}


def tasks_of(store: Store, name: str) -> Tasks:
    """Those of a queue: all handles of it in this process count together."""
    key = _native.fork_count(), store.session.directory.identity, name
    with _lock:
        return _tasks.get(key) or _tasks.setdefault(key, Tasks(store, name))
