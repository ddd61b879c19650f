"""The dead letters of a queue: messages that are not tried any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from millstream import _native
from millstream.errors import InvalidArgument, InvalidType, MillstreamError, NotFound
from millstream.options import as_index, integer
from millstream.queue_errors import QueueFull

if TYPE_CHECKING:
    from millstream.queues.queue import Queue
    from millstream.queues.records import DeadLetter

__all__ = ["DeadLetters", "message_id"]


class DeadLetters:
    """The messages of a queue that are not tried any more; `Queue.dead`."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def __repr__(self) -> str:
        state = "closed"
        with contextlib.suppress(MillstreamError):
            if not self._queue.closed:
                count = len(self)
                state = f"{count} message{'s' * (count != 1)}"
        return f"<DeadLetters of queue {self._queue.name!r}: {state}>"

    def __len__(self) -> int:
        return int(self._queue._counts()["dead"])

    def _letters(self, found: Sequence[tuple[int, int, int]]) -> Iterator[DeadLetter]:
        """Those at (id, slot, word) that are there still."""
        with _native.loading:
            from millstream.queues import tracebacks
        kept = tracebacks.of_letters(self._queue.path, [number for number, _, _ in found])
        for number, slot, word in found:
            letter = self._letter(slot, word, kept.get(number, ""))
            if letter is not None:
                yield letter

    def _letter(self, slot: int, word: int, traceback: str) -> DeadLetter | None:
        with _native.loading:
            from millstream.queues.records import REASONS, DeadLetter, moment
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
            traceback,
        )

    def list(self, count: int | None = None) -> list[DeadLetter]:
        """The dead letters, by id; at most `count`."""
        found = sorted((number, slot, word) for _, number, slot, word in self._scan())
        if count is not None:
            found = found[: integer("count", count, 0)]
        return list(self._letters(found))

    def peek(self, id: int) -> DeadLetter:
        """One dead letter.

        Raises: NotFound.
        """
        found = [(number, slot, word) for _, number, slot, word in self._scan()]
        for letter in self._letters([one for one in found if one[0] == message_id(id)]):
            return letter
        raise NotFound(f"{self._queue.path}: message {id} is no dead letter")

    def redrive(self, ids: int | Iterable[int] | None = None) -> int:
        """Have dead letters tried again, with their ids and all attempts; how many.

        A dead letter does not count for the `capacity` of its queue, a message that is tried again
        does: where there is not room for all, the oldest go back, and the others stay dead letters.

        Durability: as an acknowledgement. Where a power cut takes it, the message is a dead letter
        again.

        Args:
            ids: which; None: all.

        Raises: QueueFull where there is room for none of them; nothing was changed. Unsupported
        (read-only), Closed, InvalidType, InvalidArgument.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     queue = store.queue("mail", capacity=2)
        ...     _ = queue.put_many([b"a", b"b"])
        ...     for message in queue.get_many(2):
        ...         message.reject("no")
        ...     _ = queue.put(b"c")
        ...     print(queue.dead.redrive(), "of 2; dead:", [one.value for one in queue.dead.list()])
        1 of 2; dead: [b'b']
        """
        done = 0
        for slot, word in self._chosen(ids):
            try:
                done += self._queue._redrive(slot, word)
            except QueueFull:
                if done == 0:
                    raise
                break
        self._erase_tracebacks()
        return done

    def purge(self, ids: int | Iterable[int] | None = None) -> int:
        """Remove dead letters for good, their tracebacks with them; how many. None: all.

        After a kill in it some are gone, and the next call removes tracebacks that were left.
        """
        done = sum(self._queue._cancel(slot, word) for slot, word in self._chosen(ids))
        self._erase_tracebacks()
        return done

    def _erase_tracebacks(self) -> None:
        with _native.loading:
            from millstream.queues import tracebacks
        tracebacks.erase(self._queue.path, lambda: (number for _, number, _, _ in self._scan()))

    def _scan(self) -> Any:
        return self._queue._scan(("dead",))

    def _chosen(self, ids: int | Iterable[int] | None) -> Any:
        self._queue._check_writable()
        given: Any = ids if as_index(ids) is None else [ids]
        wanted = None if given is None else {message_id(one) for one in given}
        found = sorted((number, slot, word) for _, number, slot, word in self._scan())
        return [(slot, word) for number, slot, word in found if wanted is None or number in wanted]


def message_id(id: object) -> int:
    """Check an id that a caller gave."""
    number = as_index(id)
    if number is None:
        raise InvalidType(f"id {id!r}: expected an int")
    if not 0 <= number < 1 << 64:
        raise InvalidArgument(f"id {number}: not the id of a message")
    return number


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
DeadLetters.__module__ = "millstream"
