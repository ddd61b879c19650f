"""What several drop-ins have: the open store of a process, and each one's part in it.

Imported by the modules of frameworks, not by programs.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import millstream
from millstream import InvalidArgument, NotFound
from millstream.contrib.renewal import Renewal
from millstream.contrib.rows import Durability, Rows

__all__ = ["Share", "SharedStore"]

Kept = TypeVar("Kept")
PUT_SECONDS = 10.0
"""To wait for room in a queue that is full."""
AGAIN_SECONDS = 5.0
"""Until what could not be ended in good order comes again."""


class SharedStore:
    """A store as this process has it open for a framework; one for each directory and durability.

    Opened at its first use, and opened anew after a fork, since handles are void in the child, and
    after `close`.
    """

    _all: ClassVar[dict[tuple[type, str, Durability | None], Any]] = {}
    _lock = threading.RLock()  # a finalizer may leave one where another is joined

    def __init__(self, path: str, durability: Durability | None = None) -> None:
        self.path = path
        self._durability = durability
        self._key = type(self), os.path.abspath(path), durability
        self._users = 0
        self._opening = threading.RLock()
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._store: millstream.Store | None = None
        self.shared: dict[Any, Any] = {}
        """What others keep for as long as the store is open."""

    @classmethod
    def join(cls, path: str, durability: Durability | None = None) -> Self:
        """The store of a directory; `leave` it when it is not used any more."""
        made = cls(path, durability)
        with SharedStore._lock:
            joined: Self = SharedStore._all.setdefault(made._key, made)
            joined._users += 1
            return joined

    def leave(self) -> None:
        """Close the store with its last user."""
        with SharedStore._lock:
            self._users -= 1
            if self._users or SharedStore._all.get(self._key) is not self:
                return
            del SharedStore._all[self._key]
        if self._pid == os.getpid() and self._store is not None:
            self._end(self._store, self.shared)

    def close(self) -> None:
        """Close the store, for all who use it; the next use opens it again."""
        if self._pid != os.getpid():
            return
        with self._opening:
            store, shared = self._store, self.shared
            self._begin()
        if store is not None:
            self._end(store, shared)

    @staticmethod
    def _end(store: millstream.Store, shared: dict[Any, Any]) -> None:
        for kept in shared.values():
            if isinstance(kept, Renewal):
                kept.end()
        store.close()

    @staticmethod
    def _forget() -> None:
        """In a forked child: all handles are the parent's."""
        SharedStore._lock = threading.RLock()
        for joined in SharedStore._all.values():
            joined._opening = threading.RLock()

    @property
    def store(self) -> millstream.Store:
        """The open store."""
        if self._pid != os.getpid():
            self._begin()
        if self._store is None:
            with self._opening:
                if self._store is None:  # not while we waited
                    self._store = millstream.open(self.path, durability=self._durability)
                    self.path = str(self._store.path)  # absolute: the program may go elsewhere
                return self._store
        return self._store

    def keep(self, key: object, make: Callable[[millstream.Store], Kept]) -> Kept:
        """What is kept under a key for as long as the store is open; made at its first use."""
        store = self.store
        found: Kept | None = self.shared.get(key)
        if found is None:
            with self._opening:
                found = self.shared.get(key)
                if found is None:
                    found = self.shared[key] = make(store)
        return found


LANES = 8


def lane_of(priority: int) -> int:
    """Of a priority of AMQP, 0 to 9 and 9 the most urgent, the one of the store's queue."""
    return LANES - 1 - -(-priority * (LANES - 1) // 9)


os.register_at_fork(after_in_child=SharedStore._forget)


class Share:
    """The part of one object in the store of a directory, which it has open.

    It ends with `end`, or with the object; `begin` begins it again.

    Args:
        path: the directory.
        owner: whose part it is.
        open: opens what the owner needs of it, so that what cannot be opened is said now.

    Raises: InvalidArgument, and what `millstream.open` and `open` raise.
    """

    def __init__(
        self, path: object, owner: object, open: Callable[[Share], object] | None = None
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            name = type(owner).__name__
            raise InvalidArgument(f"{name}({path!r}): the path is the directory of a store")
        self.path = os.fspath(path)
        self._owner = weakref.ref(owner)
        self._open_first = open
        self._leave: weakref.finalize[..., Any] | None = None
        self._store: millstream.Store | None = None
        self._queues: dict[str, millstream.Queue] = {}
        self.begin()

    def begin(self) -> None:
        """Open the store, where it is not."""
        if not self.ended:
            return
        self._joined = SharedStore.join(self.path)
        self._leave = weakref.finalize(self._owner(), self._joined.leave)
        try:
            self.path = str(self.store.path)  # absolute: the program may go elsewhere
            if self._open_first is not None:
                self._open_first(self)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Close the store, where it is its last user. May be called again."""
        if self._leave is not None:
            self._leave()

    @property
    def ended(self) -> bool:
        """Has it ended?"""
        return self._leave is None or not self._leave.alive

    @property
    def store(self) -> millstream.Store:
        """The open store, of this process."""
        return self._joined.store

    def keep(self, key: object, make: Callable[[millstream.Store], Kept]) -> Kept:
        """What is kept under a key for as long as the store is open; made at its first use."""
        return self._joined.keep(key, make)

    def rows(self, name: str, durability: Durability | None) -> Rows:
        """The rows of a stream. Raises ConfigMismatch."""
        return self.keep(("rows", name, durability), lambda store: Rows(store, name, durability))

    def renewal(self, lease: float) -> Renewal:
        """What renews the leases of this process that last so long."""
        return self.keep(("renewal", lease), lambda _: Renewal(lease))

    def queue(self, name: str, settings: dict[str, Any]) -> millstream.Queue:
        """A queue, made where it is not there. Raises ConfigMismatch."""
        store = self.store
        if store is not self._store:  # of a forked process, or it was begun again
            self._store, self._queues = store, {}
        found = self._queues.get(name)
        if found is None or (found.closed and not store.closed):  # dropped: this is another one
            found = self._queues[name] = self._open(store, name, settings)
        return found

    @staticmethod
    def _open(store: millstream.Store, name: str, settings: dict[str, Any]) -> millstream.Queue:
        with contextlib.suppress(NotFound):
            return store.queue(name, create=False, **settings)
        return store.queue(name, slot_bytes=1024, **settings)
