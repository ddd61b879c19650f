"""One loop of a worker: takes messages, calls a function with them, ends their leases.

A lease is renewed from a thread of C while the function runs, and ends as the function ended: it
returned (ack), raised (nack), or raised `Retry`, `Snooze` or `Reject`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from millstream import _native
from millstream.errors import (
    Closed,
    InvalidArgument,
    LeaseLost,
    MillstreamError,
    Reject,
    Retry,
    Snooze,
)
from millstream.options import FOREVER, integer, number
from millstream.queue_errors import Empty

if TYPE_CHECKING:
    from millstream._native import Message
    from millstream.queues.queue import Queue

__all__ = ["Counts", "Loop", "Options", "check_options", "sum_of"]

Mode = Literal["thread", "process"]
Function = TypeVar("Function", bound=Callable[[Any], object])

LOG = logging.getLogger("millstream.worker")
SLICE_SECONDS = 0.25
"""How often a loop that waits for a message checks whether it is to stop."""
TROUBLE_SECONDS = 1.0
"""How long a loop waits after an error of the store."""

OUTCOMES = {
    "ack": {"done": 1},
    "nack": {"failed": 1},
    "dead": {"failed": 1, "dead": 1},
    "release": {"released": 1},
}
"""How a message ended, as counts."""


class Counts(NamedTuple):
    """What became of the messages that workers took.

    Attributes:
        done: acknowledged.
        failed: to be tried again, or given up; also those whose lease was lost.
        dead: of the failed, those that went to the dead letters.
        released: given back uncounted: snoozed, or not finished when the workers stopped.

    >>> print(Counts(done=3, failed=1, dead=1) + Counts(released=2))
    3 done, 1 failed (1 of them dead), 2 released
    """

    done: int = 0
    failed: int = 0
    dead: int = 0
    released: int = 0

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def __str__(self) -> str:
        dead = f" ({self.dead} of them dead)" if self.dead else ""
        return f"{self.done} done, {self.failed} failed{dead}, {self.released} released"


def sum_of(counts: Iterable[Counts]) -> Counts:
    """All together."""
    result = Counts()
    for each in counts:
        result += each
    return result


class Options(NamedTuple):
    """What was given to `queue.worker`; checked."""

    concurrency: int
    mode: Mode
    time_limit: float
    batch: int | None
    linger: float


def check_options(
    concurrency: object, mode: object, time_limit: object, batch: object, linger: object
) -> Options:
    """Check what a caller gave."""
    if mode not in ("thread", "process"):
        raise InvalidArgument(f'mode {mode!r}: expected "thread" or "process"')
    return Options(
        integer("concurrency", concurrency, 1, 1024),
        "thread" if mode == "thread" else "process",
        number("time_limit", time_limit, 0.001, FOREVER),
        None if batch is None else integer("batch", batch, 1, 10_000),
        number("linger", linger, 0.0, 3600.0),
    )


class Held:
    """A message that a loop has, and the renewal of its lease."""

    __slots__ = ("alive", "ended", "lock", "message")

    def __init__(self, message: Message, lease: float, time_limit: float) -> None:
        self.message = message
        self.alive = _native.keep_alive(message, lease, time_limit)
        self.lock = _native.Lock("the end of a lease")
        self.ended = False

    def end_once(self, end: Callable[[], object]) -> bool:
        """End the lease; True: it was this call. The loop and who stops it may both try.

        Raises: LeaseLost, only from the call that it was.
        """
        with self.lock:
            if self.ended:
                return False
            self.ended = True
            self.alive.stop()
            if not self.message.finished:
                end()
            return True

    @property
    def counts(self) -> Counts:
        """What its end comes to."""
        outcome = "nack" if self.message.lost else self.message.finished
        return Counts(**OUTCOMES.get(outcome, {"failed": 1}))


class Loop:
    """Takes messages of one queue and calls one function with them, until it is to stop."""

    def __init__(self, queue: Queue, function: Callable[[Any], object], options: Options) -> None:
        self.queue = queue
        self.function = function
        self.options = options
        self.stopping = _native.Flag()
        self.counts = Counts()
        self.error: BaseException | None = None
        self.begun: float | None = None
        """When the call that is running began."""
        self.held: list[Held] = []
        """The messages that it works on."""
        self._lock = _native.Lock(f"{queue.path}: counting", reentrant=True)

    def run(self) -> None:
        """Work until `stopping` is set, or the queue is closed."""
        self.queue._wait_patiently()
        while not self.stopping.is_set():
            try:
                self._step()
            except Closed as error:
                if not self.stopping.is_set():
                    self.error = error
                return
            except MillstreamError as error:  # the store has a problem: it may pass
                LOG.exception("%s: %s", self.queue.name, type(error).__name__)
                self.stopping.wait(TROUBLE_SECONDS)
            except BaseException as error:  # SystemExit and the like, raised by the function
                self.error = error
                return

    def _step(self) -> None:
        messages = self._take()
        if not messages:
            return
        lease = self.queue.lease
        try:
            held = [Held(each, lease, self.options.time_limit) for each in messages]
        except BaseException:  # no thread can renew leases: others may have the messages
            for message in messages:
                with contextlib.suppress(MillstreamError):
                    message.release()
            raise
        with self._lock:
            self.held = held
            self.begun = time.monotonic()
        try:
            readable = [held for held in self.held if self._decode(held)]
            if readable and not self.stopping.is_set():
                self._call(readable)
        finally:
            self.begun = None
            self.release()

    def _take(self) -> Sequence[Message]:
        batch, linger = self.options.batch, self.options.linger
        if batch is None:
            try:
                return [self.queue.get(timeout=SLICE_SECONDS)]
            except Empty:
                return []
        messages = list(self.queue.get_many(batch, timeout=SLICE_SECONDS))
        end = time.monotonic() + linger
        while messages and len(messages) < batch and not self.stopping.is_set():
            left = end - time.monotonic()
            if left <= 0:
                break
            more = self.queue.get_many(batch - len(messages), timeout=min(left, SLICE_SECONDS))
            messages += more
        return messages

    def _decode(self, held: Held) -> bool:
        """Whether the codec can read the message; if not, it is with the dead letters now."""
        message = held.message
        try:
            _ = message.value
        except Exception as error:
            if not message.finished:
                raise
            LOG.error("%s: message %s cannot be decoded: %r", self.queue.name, message.id, error)
            self._end(held, message.ack)
            return False
        return True

    def _call(self, held: list[Held]) -> None:
        single = self.options.batch is None
        given: Any = held[0].message if single else [each.message for each in held]
        try:
            self.function(given)
        except Snooze as snooze:
            delay = snooze.delay
            self._end_all(held, lambda message: message.release(delay))
        except Reject as reject:
            reason = reject.reason
            self._end_all(held, lambda message: message.reject(reason))
            self._report(held, reject, f"rejected: {reason}")
        except Retry as retry:
            self._fail(held, "Retry", retry, retry.delay)
        except Exception as error:
            self._fail(held, repr(error), error)
        except SystemExit as left:
            if self.options.mode == "process":  # it is replaced, and would take them for ever
                self._fail(held, repr(left), left)
            raise
        else:
            self._end_all(held, lambda message: message.ack())

    def _fail(
        self, held: list[Held], text: str, error: BaseException, delay: float | None = None
    ) -> None:
        """Count a failure for each, and say when it is tried again."""
        for each in held:
            message = each.message
            after = self.queue._retry_delay(message.attempt) if delay is None else delay
            self._end(each, functools.partial(message.nack, after, text))
            self._report([each], error, text, after)

    def _report(
        self, held: list[Held], error: BaseException, text: str, delay: float = 0.0
    ) -> None:
        """Log what became of messages whose function raised; the dead keep its traceback."""
        attempts = self.queue.retry.max_attempts
        for each in held:
            message = each.message
            if message.lost:
                fate = "its lease was lost, so others have it"
            elif message.finished == "dead":
                fate = "a dead letter now"
                self.queue._keep_traceback(message.id, error)
            elif message.finished == "nack":
                at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + delay))
                fate = f"again in {delay:.3g} s, at {at}"
            else:
                fate = f"ended by the function itself: {message.finished}"
            # Expected ones are told, and not as something that is wrong.
            level = logging.INFO if isinstance(error, Retry) else logging.WARNING
            LOG.log(
                level, "%s: message %d, attempt %d of %d: %s; %s",
                self.queue.name, message.id, message.attempt, attempts, text, fate,
                exc_info=None if isinstance(error, Retry | Reject) else error,
            )  # fmt: skip

    def _end_all(self, held: list[Held], end: Callable[[Message], object]) -> None:
        for each in held:
            self._end(each, functools.partial(end, each.message))

    def _end(self, held: Held, end: Callable[[], object]) -> None:
        """End a lease unless the function itself did, and count what it came to."""
        try:
            if not held.end_once(end):
                return
        except LeaseLost:
            LOG.warning("%s: the lease of message %s was lost", self.queue.name, held.message.id)
        self.count(held.counts)

    def count(self, counts: Counts) -> None:
        """Add to what was done."""
        with self._lock:
            self.counts += counts

    def release(self) -> None:
        """Give back what the loop has; called by the loop, or by who waited for it long enough."""
        for held in list(self.held):
            with contextlib.suppress(Closed):
                self._end(held, held.message.release)
        self.held = []

    def fail_overdue(self) -> None:
        """Count a failure for what was worked on for too long: the caller ends the process."""
        reason = f"worked on for longer than {self.options.time_limit:g} s"
        self._end_all(list(self.held), lambda message: message.nack(None, reason))


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Counts.__module__ = "millstream.worker"
