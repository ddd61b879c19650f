"""The exactly-once loop, ready-made: from a stream or a queue, through a function, to others."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from millstream._native import Put, records_of
from millstream.errors import (
    Aborted,
    Closed,
    InvalidArgument,
    InvalidType,
    LeaseLost,
    LimitExceeded,
)
from millstream.options import FOREVER, check_timeout, integer
from millstream.queue_errors import QueueFull
from millstream.queues.queue import Queue
from millstream.streams.stream import Stream
from millstream.transactions.transaction import Transaction

if TYPE_CHECKING:
    from millstream.transactions.holdings import Holdings

__all__ = ["Pipe"]

SLICE_SECONDS = 0.2
REFUSED = (InvalidArgument, InvalidType, LimitExceeded)
"""What a commit raises where it cannot store what it was given."""


def _puts_of(tx: Transaction) -> Counter[Queue]:
    return Counter(queue for queue, _ in tx._puts)


class Pipe:
    """A loop of transactions; made by `Store.pipe`. Close it, or use it in a `with`.

    Attributes:
        count: records or messages whose effects were committed through this object.
        aborted: transactions that were aborted: what they had was, or will be, done by others.
    """

    def __init__(
        self,
        holdings: Holdings,
        source: Stream | Queue,
        function: Callable[[Any], Any],
        sink: Stream | Queue | Mapping[str, Stream | Queue],
        *,
        group: str,
        batch: int,
        start: Any,
    ) -> None:
        if not callable(function):
            raise InvalidType(f"function {function!r}: expected something to call")
        sinks = sink if isinstance(sink, Mapping) else {"": sink}
        for one in (source, *sinks.values()):
            if not isinstance(one, (Stream, Queue)):
                raise InvalidType(f"{one!r}: expected a stream or a queue")
            if one.session.directory.identity != holdings.session.directory.identity:
                where = holdings.session.path
                raise InvalidArgument(f"{one!r} is not of {where}: a pipe stays in one store")
        for one in sinks.values():
            if isinstance(one, Stream):
                one._is_surprise = False  # to put something there it was made
        self._holdings = holdings
        self.count = 0
        self.aborted = 0
        self._source, self._function = source, function
        self._sinks = dict(sinks)
        self._named = isinstance(sink, Mapping)
        self._batch = self._most = self._tried = integer("batch", batch, 1)
        self._stopped = self._closed = False
        self._committing: Counter[Queue] | None = None
        """What the transaction puts where, once it comes to its commit."""
        self._consumer = None
        if isinstance(source, Stream):
            self._consumer = source.consumer(
                group, start=start, delivery="exactly_once", max_records=self._batch
            )

    def __repr__(self) -> str:
        kind = "stream" if isinstance(self._source, Stream) else "queue"
        sinks = ", ".join(repr(one.name) for one in self._sinks.values())
        state = "closed, " if self._closed else "stopped, " if self._stopped else ""
        counts = f"{self.count} done, {self.aborted} aborted"
        return f"<Pipe from {kind} {self._source.name!r} to {sinks}: {state}{counts}>"

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def run(self, *, timeout: float | None = None) -> int:
        """Work until `stop`, or until nothing came for `timeout` seconds (None: for ever).

        Returns: how many records or messages were done. An exception of the function rolls the
        transaction back and comes out of here: the message that it failed at goes back to its queue
        with a failure counted, the others of the batch without; records are read again by the next
        `run`.

        Raises: QueueFull where a sink had no room for `timeout` seconds, or never will have; what
        the function raises.
        """
        checked = check_timeout(timeout)
        self._check_open()
        before = self.count
        try:
            self._loop(checked)
        finally:
            self._stopped = False  # not at the start: a stop may come before run has begun
        return self.count - before

    def _loop(self, timeout: float | None) -> None:
        idle = time.monotonic()
        while not self._stopped:
            wait = FOREVER if timeout is None else timeout - (time.monotonic() - idle)
            seconds, aborted = max(min(wait, SLICE_SECONDS), 0.0), self.aborted
            try:
                done = self.step(timeout=seconds)
            except QueueFull:
                if self._committing is None:  # the function's own
                    raise
                if self._tried == 1 and (wait <= 0 or not self._await_room(seconds)):
                    raise
                continue
            if done or self.aborted > aborted:
                idle = time.monotonic()
            elif wait <= 0:
                break

    def stop(self) -> None:
        """Let `run` return after the transaction that is under way; from any thread.

        Called before `run`, it lets the next one return at once.
        """
        self._stopped = True

    def step(self, *, timeout: float | None = 0.0) -> int:
        """One transaction: what is there, up to `batch`; how many records or messages it was.

        Raises: QueueFull where a sink has no room. The next steps take one by one until one fits.
        """
        self._check_open()
        self._committing = None
        self._tried = self._most
        tx = Transaction(self._holdings)
        tx._check_alone()  # before anything is taken that it could not commit
        try:
            if self._consumer is not None:
                done = self._records(tx, timeout)
            else:
                done = self._messages(tx, timeout)
        except Aborted:
            self.aborted += 1
            return 0
        except QueueFull:
            self._take(1)
            raise
        if done and self._most < self._batch:
            self._take(min(2 * self._most, self._batch))
        self.count += done
        return done

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"{self._source.path}: the pipe is closed")

    def _take(self, most: int) -> None:
        """At most so many at once."""
        self._most = most
        if self._consumer is not None:
            self._consumer._most = most

    def _records(self, tx: Transaction, timeout: float | None) -> int:
        consumer = self._consumer
        assert consumer is not None
        with tx:
            tx.commit(consumer)  # first: whatever fails from here on, it reads again
            batch = consumer.poll(timeout)
            if batch is None:
                return 0
            for record in records_of(batch):
                self._emit(tx, self._function(record))
            self._committing = _puts_of(tx)
        return len(batch)

    def _messages(self, tx: Transaction, timeout: float | None) -> int:
        assert isinstance(self._source, Queue)
        messages = self._source.get_many(self._most, timeout=timeout)
        if not messages:
            return 0
        at = None
        try:
            with tx:
                for message in messages:
                    at = message
                    self._emit(tx, self._function(message))
                    tx.ack(message)
                at = None
                self._committing = _puts_of(tx)
        except BaseException as error:
            self._give_back(messages, at, error)
            raise
        return len(messages)

    def _give_back(self, messages: list[Any], failed: Any, error: BaseException) -> None:
        """A failure is counted where the function failed, or of each that may be what is refused.

        These come alone from then on.
        """
        all_may = self._committing is not None and isinstance(error, REFUSED)
        for message in messages:
            if message.finished or message.lost:
                continue
            with contextlib.suppress(LeaseLost):  # another has it by now
                if all_may or (message is failed and isinstance(error, Exception)):
                    message.nack(reason=repr(error))
                else:
                    message.release()

    def _await_room(self, seconds: float) -> bool:
        """Return when a full sink has got room, or after so many seconds; False: it never will."""
        for queue, count in (self._committing or Counter[Queue]()).items():
            if count > queue.capacity:
                return False
            ticket = queue._announce("room")
            queue._upkeep()
            if len(queue) + count > queue.capacity:
                queue._sleep("room", ticket, seconds)
                break
        return True

    def _emit(self, tx: Transaction, result: Any) -> None:
        if not self._named:
            self._put_out(tx, "", result)
            return
        if result is None:
            return
        if not isinstance(result, Mapping):
            raise InvalidType(f"{result!r:.80}: with named sinks, return a dict of names to values")
        for name, part in result.items():
            if name not in self._sinks:
                raise InvalidArgument(f"{name!r}: the pipe has sinks {sorted(self._sinks)}")
            self._put_out(tx, name, part)

    def _put_out(self, tx: Transaction, name: str, result: Any) -> None:
        several = isinstance(result, (list, tuple))
        for one in result if several else (result,):
            if one is not None:
                self._put_one(tx, self._sinks[name], one)

    def _put_one(self, tx: Transaction, sink: Stream | Queue, result: Any) -> None:
        if isinstance(sink, Queue):
            arguments = result._arguments() if isinstance(result, Put) else {}
            tx.put(sink, result.value if isinstance(result, Put) else result, **arguments)
            return
        if isinstance(result, Put):
            raise InvalidType(f"{result!r:.80}: for a stream, return a dict of append's arguments")
        arguments = dict(result) if isinstance(result, Mapping) else {"value": result}
        if "value" not in arguments:
            raise InvalidType(
                f"{result!r:.80}: a dict of arguments needs a value; to null it, None"
            )
        tx.append(sink, arguments.pop("value"), **arguments)

    def close(self) -> None:
        """Leave the group."""
        self.stop()
        self._closed = True
        if self._consumer is not None:
            self._consumer.close()


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Pipe.__module__ = "millstream"
