"""What lower floors know of higher ones: protocols, which are imported for types alone."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Notices", "Undecided"]


class Notices(Protocol):
    """The background of a store. Where its thread cannot be, `runs` says so, and the caller syncs.

    A log is a `millstream.log.partition.PartitionLog`, a stream the handle that it belongs to; what
    has positions or messages is a queue or a group, with ``sync()``.
    """

    @property
    def trouble(self) -> str:
        """What keeps it from its work now; "": nothing."""
        ...

    def adopt(self, log: Any, /) -> None:
        """A partition was opened here."""
        ...

    def tune(self, log: Any, /) -> None:
        """Have the core report what the level of its stream needs."""
        ...

    def watch(self, stream: Any, /) -> None:
        """A stream was opened or altered: its retention is held also where nobody appends."""
        ...

    def watch_journal(self) -> None:
        """Apply from now on what the dead committed, where there is a journal."""
        ...

    def notice(self, log: Any, events: int, /) -> None:
        """An append asks for something: bits of `_native.EVENTS`."""
        ...

    def notice_queue(self, one: Any, /) -> None:
        """Something was changed at level "interval" in a queue, or in the positions of a group."""
        ...

    def forget(self, stream: Any, /) -> None:
        """A stream was dropped or closed: hold nothing of it."""
        ...

    def runs(self) -> bool:
        """Is the thread there? Starts it where it is not; False where that cannot be."""
        ...


class Undecided(Protocol):
    """The transactions of a store, for what they have prepared in queues and groups."""

    def exist(self) -> bool:
        """Was there ever one in this store?"""
        ...

    def check(self) -> None:
        """Raise `Reentered` where this thread is in the middle of the commit that is waited for."""
        ...

    def decide_queue(self, queue: Any, /) -> None:
        """Decide what one whose process died has prepared in a queue."""
        ...

    def decide_position(self, group: Any, partition: int, /) -> None:
        """A position is pending: is its transaction committed?"""
        ...
