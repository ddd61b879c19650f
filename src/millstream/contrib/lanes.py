"""Queues whose messages have any whole number as their priority, for drop-ins whose tasks have."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from millstream import InvalidArgument, LimitExceeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from millstream import Message, Queue, Store

__all__ = ["Lanes", "take"]

LEVELS = 8
LOOK_SECONDS = 0.02
"""Between two looks of an idle worker, where there is more than one queue."""
NEW_SECONDS = 0.5
"""Between two looks for queues that others made."""


class Lanes:
    """A queue ``<kind>.<name>`` with the priorities 0 to 7, and further ones as they are needed.

    Each has 8 neighbouring priorities: ``<kind>-from-8.<name>`` has 8 to 15.
    """

    def __init__(
        self, store: Store, kind: str, name: str, most: int, settings: dict[str, Any]
    ) -> None:
        self._store = store
        self._kind, self.name, self._most = kind, name, most
        self._settings = {"priorities": LEVELS, **settings}
        self._further = re.compile(rf"{re.escape(kind)}-from-(-?\d+)\.{re.escape(name)}")
        self.queues = {0: self._queue(0)}
        self.look()

    def _queue(self, block: int) -> Queue:
        of = self._kind if block == 0 else f"{self._kind}-from-{block * LEVELS}"
        return self._store.queue(f"{of}.{self.name}", **self._settings)

    def look(self) -> None:
        """Open the queues that others made."""
        for queue in self._store.queues():
            found = self._further.fullmatch(queue)
            if found and int(found[1]) // LEVELS not in self.queues:
                block = int(found[1]) // LEVELS
                self.queues[block] = self._queue(block)
        self._looked = time.monotonic()

    def of(self, priority: float) -> tuple[Queue, int]:
        """The queue of a priority, which is made where it is not there, and its level in it.

        Raises: InvalidArgument where it is no whole number; LimitExceeded: too many queues.
        """
        block, rest = divmod(priority, LEVELS)
        if rest != int(rest):
            raise InvalidArgument(f"priority {priority!r}: millstream has whole numbers only")
        queue = self.queues.get(int(block))
        if queue is None:
            self.look()
            if int(block) not in self.queues and len(self.queues) > self._most:
                raise LimitExceeded(
                    f"priority {priority}: the tasks of {self.name!r} have priorities out"
                    f" of {self._most + 1} ranges of {LEVELS} already; use fewer"
                )
            queue = self.queues[int(block)] = self._queue(int(block))
        return queue, LEVELS - 1 - int(rest)

    def by_urgency(self) -> list[Queue]:
        """All queues, the most urgent first."""
        if time.monotonic() - self._looked > NEW_SECONDS:
            self.look()
        return [self.queues[block] for block in sorted(self.queues, reverse=True)]


def take(every: Sequence[Lanes], timeout: float) -> Message | None:
    """Lease the most urgent message there is, or return None where none comes within seconds."""
    queues = _merged(every)
    if len(queues) == 1:  # nearly always
        found = queues[0].get_many(1, timeout=timeout)
        return found[0] if found else None
    deadline = time.monotonic() + timeout
    while True:
        for queue in queues[:-1]:
            for message in queue.get_many(1, timeout=0):
                return message
        left = max(deadline - time.monotonic(), 0.0)
        wait = min(left, LOOK_SECONDS)
        for message in queues[-1].get_many(1, timeout=wait):
            return message
        if wait >= left:
            return None
        queues = _merged(every)


def _merged(every: Sequence[Lanes]) -> list[Queue]:
    if len(every) == 1:
        return every[0].by_urgency()
    for lanes in every:
        lanes.by_urgency()
    blocks = [(block, queue) for lanes in every for block, queue in list(lanes.queues.items())]
    return [queue for _, queue in sorted(blocks, key=lambda one: -one[0])]
