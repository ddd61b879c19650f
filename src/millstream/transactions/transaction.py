"""One transaction over streams, queues and consumer positions of a store: all of it, or nothing."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from millstream import _native, timestamps
from millstream._native import Message
from millstream.errors import Closed, InvalidArgument, InvalidType, LeaseLost, LimitExceeded
from millstream.groups.consumer import Consumer
from millstream.options import CENTURY, integer, number, parse_bytes
from millstream.queues.queue import Queue
from millstream.streams.stream import Stream
from millstream.transactions.commit import Commit
from millstream.transactions.effects import Asked, Share

if TYPE_CHECKING:
    from millstream.disk.session import Session
    from millstream.options import Durability
    from millstream.transactions.holdings import Holdings

__all__ = ["Transaction"]

MAX_BYTES = 64 << 20
RECORD_BYTES = 64
"""What a record counts beside its bytes."""


class Transaction(_native.TransactionCore):
    """What is to be done at once; made by `Store.transaction`, used in a `with`.

    Everything is kept in memory until the end of the block, which commits it; an exception in the
    block rolls it back, so that nothing of it was ever there. Used by one thread, or one task of an
    event loop, which has one of a store at a time.
    """

    def __init__(
        self,
        holdings: Holdings,
        durability: Durability | None = None,
        max_bytes: int | str = MAX_BYTES,
    ) -> None:
        self._holdings, self.session = holdings, holdings.session
        self.session.check_writable()
        self._level: Durability = durability or self.session.level
        if type(max_bytes) is not int or max_bytes < 1:
            max_bytes = integer("max_bytes", parse_bytes(max_bytes), 1)
        self._room = self._max = max_bytes
        self._state = "new"
        self._shares: dict[tuple[Stream, int], _Growing] = {}
        self._routed: dict[Stream, int] = {}  # by key, and to how many partitions
        self._puts: list[tuple[Queue, Asked]] = []
        self._messages: dict[int, Message] = {}
        """By identity."""
        self._consumers: list[Consumer] = []
        self._user: tuple[int, object] | None = None

    def __repr__(self) -> str:
        return f"<Transaction of {self.session.path!r}: {self._state}>"

    def __enter__(self) -> Transaction:
        if self._state != "new":
            raise InvalidArgument(f"{self!r}: a transaction is used once; make another")
        self._check_alone()
        try:
            self._holdings.under_way.add(self)
            self._state = "open"
        except BaseException:  # a signal: no `__exit__` follows
            self._let_go()
            raise
        return self

    def _check_alone(self) -> None:
        self.session.check_writable()
        self._user = _current_user()
        for other in [*self._holdings.under_way]:
            if other._user == self._user:
                raise InvalidArgument(
                    f"{self.session.path}: a transaction is open in this thread or task; they do"
                    " not nest"
                )

    def _end(self, kind: Any) -> None:
        """End the block; `kind`: the class of its exception."""
        self._let_go()
        if self._state == "abandoned" and kind is None:
            raise Closed(f"{self!r}: the store was closed within it, so nothing of it is done")
        if self._state != "open":
            return
        if kind is not None:
            self._roll_back()
            return
        self._commit()

    def _interrupted(self) -> None:
        """The end raised, maybe before it came to anything."""
        self._let_go()
        if self._state == "open":
            self._roll_back()

    def _let_go(self) -> None:
        self._holdings.under_way.discard(self)
        self._user = None

    def _abandon(self) -> None:
        """Its store is closed, maybe at exit; with it go the consumers."""
        self._let_go()
        what, self._state = repr(self), "abandoned"
        warnings.warn(f"{what} was never ended: rolled back", ResourceWarning, stacklevel=2)

    def rollback(self) -> None:
        """Give it up: nothing of it happens, and the consumers it named read again."""
        self._check()
        self._roll_back()

    def _check(self) -> None:
        if self._state != "open":
            raise InvalidArgument(f"{self!r}: use it within its `with`")
        self.session.check_writable()

    def _take_room(self, size: int, count: int = 1) -> None:
        left = self._room - size - RECORD_BYTES * count
        if left < 0:
            raise LimitExceeded(
                f"{self!r}: more than its max_bytes of {self._max}; commit more often, or pass a"
                " larger max_bytes to transaction()"
            )
        self._room = left

    # --- what it does -----------------------------------------------------------------------------

    def append(
        self,
        stream: Stream,
        value: Any,
        *,
        key: Any = None,
        headers: Mapping[str, Any] | None = None,
        timestamp: Any = None,
        partition: int | None = None,
    ) -> None:
        """Append a record to a stream; arguments as of `Stream.append`."""
        self.append_many(
            stream,
            [value],
            keys=None if key is None else [key],
            headers=headers,
            timestamps=timestamp,
            partition=partition,
        )

    def append_many(
        self,
        stream: Stream,
        values: Iterable[Any],
        *,
        keys: Iterable[Any] | None = None,
        headers: Any = None,
        timestamps: Any = None,
        partition: int | None = None,
    ) -> None:
        """Append records to a stream; arguments as of `Stream.append_many`.

        All that one partition gets in the transaction becomes visible at once.
        """
        self._check()
        self._require(stream, Stream, "stream")
        rows, size = _native.contents(values, "value")
        row_keys: list[bytes | None] | None = None
        if keys is not None:
            row_keys, key_size = _native.contents(keys, "key")
            size += key_size
            if len(row_keys) != len(rows):
                raise InvalidArgument(f"{len(row_keys)} keys for {len(rows)} values")
        row_headers, header_size = _headers_of(headers, len(rows))
        times = _times_of(timestamps, len(rows))
        before = self._room
        self._take_room(size + header_size, len(rows))
        if partition is None and row_keys is not None:
            self._routed.setdefault(stream, stream.partitions)
        if partition is not None:
            index = integer("partition", partition, 0, stream.partitions - 1)
        elif row_keys is None or stream.partitions == 1:
            index = stream._turn_of() if stream.partitions > 1 else 0
        else:
            self._extend(before, stream, _split(stream, rows, row_keys, row_headers, times))
            return
        self._extend(before, stream, [(index, (rows, row_keys, row_headers, times))])

    def _extend(self, room: int, stream: Stream, parts: list[tuple[int, _Columns]]) -> None:
        """Add these rows to the partitions: all, or none where memory runs out, say."""
        begun: list[tuple[_Growing, int]] = []
        try:
            for index, columns in parts:
                share = self._share(stream, index)
                begun.append((share, len(share.values)))
                share.extend(*columns)
        except BaseException:
            for share, count in begun:
                share.cut(count)
            self._room = room
            raise

    def _share(self, stream: Stream, index: int) -> _Growing:
        share = self._shares.get((stream, index))
        if share is None:
            share = self._shares[stream, index] = _Growing()
            stream._is_surprise = False  # it was made to append to it
        return share

    def put(
        self,
        queue: Queue,
        value: Any,
        *,
        priority: int = 0,
        delay: float = 0.0,
        at: Any = None,
        key: Any = None,
        ttl: float | None = None,
        dedup_id: Any = None,
        headers: Mapping[str, Any] | None = None,
    ) -> None:
        """Put a message into a queue; arguments as of `Queue.put`.

        It is delivered after the commit, which raises `QueueFull`, and does nothing, where there is
        no room for it.
        """
        self._check()
        self._require(queue, Queue, "queue")
        value = queue._encoded(value)
        data = _content("value", value)
        if data is None:
            raise InvalidType("value: expected bytes-like, found None")
        now = self.session.clock.now()
        due = timestamps.microseconds(at) if at is not None else 0
        waits = number("delay", delay, 0.0, CENTURY)
        if waits:
            if at is not None:
                raise InvalidArgument("give a delay or a time, not both")
            due = now + round(waits * 1e6)
        lives = ttl if ttl is not None else queue._config["ttl"]
        expires = now + round(number("ttl", lives, 0.0, CENTURY) * 1e6) if lives is not None else 0
        if dedup_id is not None and queue._dedup is None:
            raise InvalidArgument(
                f"{queue.path}: the queue was made without a dedup_window, so that a dedup_id would"
                " do nothing"
            )
        kept_key = _content("key", key)
        kept_headers, header_size = _kept(headers)
        self._take_room(len(data) + len(kept_key or b"") + header_size)
        self._puts.append(
            (
                queue,
                Asked(
                    integer("priority", priority, 0, queue._config["priorities"] - 1),
                    due,
                    expires,
                    None if dedup_id is None else queue._dedup_key(dedup_id),
                    at is not None,
                    data,
                    kept_key,
                    kept_headers,
                ),
            )
        )

    def ack(self, message: Message) -> None:
        """Acknowledge a leased message, when the transaction commits.

        Where its lease is lost by then, the transaction is `Aborted`.
        """
        self._check()
        if not isinstance(message, Message):
            raise InvalidType(f"expected a message, found {type(message).__name__}")
        self._require(message.queue, Queue, "message")
        if message.finished:
            raise LeaseLost(f"{message!r} is finished")
        if id(message) not in self._messages:
            self._take_room(0)
            self._messages[id(message)] = message

    def commit(self, consumer: Consumer) -> None:
        """Commit the position of a consumer: all that it has handed out by the end of the block.

        Where a partition has another owner by then, the transaction is `Aborted`. Rolled back or
        aborted, the consumer reads on from its committed positions.
        """
        self._check()
        if not isinstance(consumer, Consumer):
            raise InvalidType(f"expected a consumer, found {type(consumer).__name__}")
        self._require(consumer.stream, Stream, "consumer")
        if consumer._sql is not None:
            raise InvalidArgument(
                f"{consumer!r} keeps its position in a database: commit it there, with what"
                " position_in gave"
            )
        if not any(consumer is known for known in self._consumers):
            self._consumers.append(consumer)

    def _require(self, one: Any, kind: type, what: str) -> None:
        if not isinstance(one, kind):
            raise InvalidType(f"{what}: expected a {kind.__name__}, found {type(one).__name__}")
        session: Session = one.session  # type: ignore[attr-defined]
        if session.directory.identity != self.session.directory.identity:
            raise InvalidArgument(
                f"{one!r} is not of {self.session.path}: a transaction spans one store"
            )

    # --- the end ----------------------------------------------------------------------------------

    def _roll_back(self) -> None:
        for consumer in self._consumers:
            if not consumer.closed:
                consumer._rewind()
        self._state = "rolled back"

    def _has_moved(self) -> bool:
        """Has a consumer something to commit, or something to be told?"""
        return any(one.closed or one._member.has_uncommitted for one in self._consumers)

    def _commit(self) -> None:
        """What the end of the block does."""
        if not (self._shares or self._puts or self._messages or self._has_moved()):
            self._state = "committed"
            return
        commit = Commit(self, self._holdings.journal())
        try:
            commit.run()
        except BaseException:
            if commit.is_recorded:  # also where a signal came between record and effects
                self._state = "committed"
            else:
                self._roll_back()
            raise
        self._state = "committed"


def _content(what: str, value: Any) -> bytes | None:
    if value is None or type(value) is bytes:
        return value
    try:
        return memoryview(value).tobytes()
    except TypeError as error:
        advice = ""
        if isinstance(value, dict):
            advice = (
                "; for arguments of put write millstream.Put(value, ...) where it is taken, to"
                ' store the dict open the queue with codec="json"'
            )
        found = type(value).__name__
        raise InvalidType(f"{what}: expected bytes-like, found {found}{advice}") from error
    except (BufferError, ValueError) as error:  # released, or what its exporter says
        raise InvalidType(f"{what}: not bytes that can be read: {error}") from error


def _kept(headers: Any) -> tuple[Any, int]:
    """Headers as they are now, and their bytes; what are none, the commit refuses."""
    if not isinstance(headers, Mapping):
        return headers, 0
    kept = {name: _content("header", value) for name, value in headers.items()}
    return kept, sum(len(str(name)) + len(value or b"") for name, value in kept.items())


def _headers_of(given: Any, count: int) -> tuple[list[Any] | None, int]:
    """Those of each record as they are now, and their bytes."""
    if given is None:
        return None, 0
    if isinstance(given, Mapping):
        kept, size = _kept(given)
        return [kept] * count, size * count
    pairs = [_kept(row) for row in _rows_of("headers", given, count, Mapping)]
    return [kept for kept, _ in pairs], sum(size for _, size in pairs)


def _current_user() -> tuple[int, object]:
    """The thread, and the task that it runs, if any."""
    asyncio: Any = sys.modules.get("asyncio")
    # Another thread may be importing it, so that it is there and has nothing in it yet.
    running = getattr(asyncio, "_get_running_loop", None)
    has_loop = running is not None and running() is not None
    return threading.get_ident(), asyncio.current_task() if has_loop else None


def _rows_of(what: str, given: Any, count: int, one: type) -> list[Any]:
    """One for each record of what is given for all, or for each."""
    found = [given] * count if isinstance(given, one) else list(given)
    if len(found) != count:
        raise InvalidArgument(f"{len(found)} {what} for {count} values")
    return found


def _times_of(given: Any, count: int) -> list[int] | None:
    if given is None:
        return None
    if not isinstance(given, Iterable):
        given = [given] * count
    return _rows_of("timestamps", [timestamps.microseconds(one) for one in given], count, int)


_Columns = tuple[
    "list[bytes | None]", "list[bytes | None] | None", "list[Any] | None", "list[int] | None"
]
"""Values, keys, headers and timestamps of rows."""


def _split(
    stream: Stream,
    rows: list[bytes | None],
    keys: list[bytes | None],
    headers: list[Any] | None,
    times: list[int] | None,
) -> list[tuple[int, _Columns]]:
    """Each row to the partition of its key; those without one together to the next in turn."""
    of_partition: dict[int | None, list[int]] = {}
    for i, index in enumerate(stream._partitions_of(keys)):
        of_partition.setdefault(index, []).append(i)
    return [
        (
            stream._turn_of() if index is None else index,
            (
                [rows[i] for i in which],
                [keys[i] for i in which],
                None if headers is None else [headers[i] for i in which],
                None if times is None else [times[i] for i in which],
            ),
        )
        for index, which in of_partition.items()
    ]


class _Growing:
    """What one partition of a stream is to get."""

    def __init__(self) -> None:
        self.values: list[bytes | None] = []
        self.keys: list[bytes | None] | None = None
        self.headers: list[Any] | None = None
        self.times: list[int] | None = None

    def extend(
        self,
        values: list[bytes | None],
        keys: list[bytes | None] | None,
        headers: list[Any] | None,
        times: list[int] | None,
    ) -> None:
        before, count = len(self.values), len(values)
        if before == 0:
            self.values, self.keys, self.headers, self.times = values, keys, headers, times
            return
        self.values += values
        self.keys = _joined(self.keys, before, keys, count, None)
        self.headers = _joined(self.headers, before, headers, count, None)
        if self.times is not None or times is not None:
            self.times = _joined(self.times, before, times, count, _native.wall_us())

    def cut(self, count: int) -> None:
        """Have so many rows again."""
        for column in (self.values, self.keys, self.headers, self.times):
            if column is not None:
                del column[count:]

    def finished(self, place: int, partition: int) -> Share:
        """As the journal has it."""
        times: Any = _native.wall_us() if self.times is None else self.times
        return Share(place, partition, times, self.values, self.keys, self.headers)


def _joined(
    first: list[Any] | None, before: int, second: list[Any] | None, count: int, missing: Any
) -> list[Any] | None:
    if first is None:
        if second is None:
            return None
        first = [missing] * before
    first += second or [missing] * count
    return first


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Transaction.__module__ = "millstream"
