"""Every exception of millstream.

MillstreamError
├── StorageError (OSError)            the file system refused, or a file is not what it must be
│   ├── StoreFull                     no room; what was stored stays, and room makes it work again
│   ├── Indeterminate                 it may or may not have happened: the sync behind it failed
│   ├── Poisoned                      an earlier sync failed: refused until all have closed
│   └── CorruptBatch                  bytes in a file are not what was written
├── VersionMismatch                   a newer format
├── ConfigMismatch (ValueError)       a stream or queue exists with other settings
├── NotFound (LookupError)            no such store, stream or partition
├── InvalidArgument (ValueError)      an argument that makes no sense
├── InvalidType (TypeError)           an argument of a wrong type
├── LimitExceeded (ValueError)        larger than the format allows
├── LockTimeout (TimeoutError)        a wait for another process ended; names the holder
│   └── Reentered                     a signal handler or finalizer called in the middle of a call
├── WaitTimeout (TimeoutError)        a wait for an event ended
├── Closed (ValueError)               the handle is closed, dropped, or from before a fork
├── OffsetOutOfRange (IndexError)     no record there; carries the valid range
├── QueueFull (Full)                  a queue has as many unfinished messages as it may
├── Empty (Empty)                     no message came in time
├── Aborted                           a transaction lost a lease or a partition: nothing was done
├── Fenced                            a partition has another owner now: the commit was refused
├── LeaseLost                         the lease of a message ended before its holder was done
├── WorkerError                       worker processes cannot start; says what the last one said
├── Retry                             raised by workers: count a failure, deliver again later
├── Snooze                            raised by workers: deliver again later, nothing failed
├── Reject                            raised by workers: to the dead letters
└── Unsupported                       not possible on this file system, engine, or with these data
"""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from millstream._native import Span
    from millstream.queue_errors import Empty as Empty
    from millstream.queue_errors import QueueFull as QueueFull

__all__ = [
    "Aborted",
    "Closed",
    "ConfigMismatch",
    "CorruptBatch",
    "Empty",
    "Fenced",
    "Indeterminate",
    "InvalidArgument",
    "InvalidType",
    "LeaseLost",
    "LimitExceeded",
    "LockTimeout",
    "MillstreamError",
    "NotFound",
    "OffsetOutOfRange",
    "Poisoned",
    "QueueFull",
    "Reentered",
    "Reject",
    "Retry",
    "Snooze",
    "StorageError",
    "StoreFull",
    "Unsupported",
    "VersionMismatch",
    "WaitTimeout",
    "WorkerError",
]


class MillstreamError(Exception):
    """Base of all errors of this package.

    ``appended`` lists the spans that an `append_many` or `append_arrow` had stored in other
    partitions before it failed. They are as durable as was asked for.
    """

    appended: tuple[Span, ...] = ()


class StorageError(MillstreamError, OSError):
    """The file system refused, or a file is not what it must be. ``filename`` names the file.

    What to do: as the text says, which names the file: permissions, `ulimit -n`, a planted
    file.
    """


class StoreFull(StorageError):
    """There is no room. Nothing that was stored is lost; append again when there is room.

    What to do: make room (a shorter retention, `delete_before`, another disk) and do it again.
    """


class Indeterminate(StorageError):
    """The records were published, but the sync behind them failed or was not awaited to its end.

    Readers see them now; whether they survive a power cut is not known.

    What to do: do not do it again blindly; see docs/guide/durability.md.

    Attributes:
        committed: of a transaction: it is committed, though not all of it may be seen yet.
        published: of an append: the spans that are stored, and may not survive a power cut.
    """

    committed = False
    published: tuple[Span, ...] = ()


def is_ours(error: BaseException) -> bool:
    """Did a call of ours fail? Else it is a signal's, or what a handler of a signal has raised."""
    if isinstance(error, (MillstreamError, MemoryError)):
        return True
    return isinstance(error, OSError) and not isinstance(error, TimeoutError)


def indeterminate(
    error: BaseException, what: str, path: str, published: tuple[Span, ...] = ()
) -> BaseException:
    """What to raise where `error` came behind something that is stored: `Indeterminate`.

    What is none of ours stays what it is.
    """
    made = error
    if not isinstance(error, Indeterminate):
        if not is_ours(error):
            return error
        number = getattr(error, "errno", None) or errno.EIO
        made = Indeterminate(number, f"{what}: {str(error) or type(error).__name__}", path)
        made.__cause__ = error
    assert isinstance(made, Indeterminate)
    made.published = published + made.published
    return made


def each_of(calls: Iterable[Callable[[], object]]) -> None:
    """Make all calls, whichever fail; then raise the first error of ours."""
    failed: Exception | None = None
    for call in calls:
        try:
            call()
        except Exception as error:
            if not is_ours(error):
                raise
            failed = failed or error
    if failed is not None:
        raise failed


def _again(kind: type[MillstreamError], message: str, given: dict[str, object]) -> object:
    """What a pickle of an error makes."""
    return kind(message, **given)


class Poisoned(StorageError):
    """A sync of this partition failed earlier, so its page cache can no longer be trusted.

    Reading goes on. Close the store in every process; the next open verifies and syncs anew.

    What to do: close the store in every process, look at the disk, open again.
    """


class CorruptBatch(StorageError):
    """Bytes in a file are not what was written.

    Nothing was changed; ``millstream repair`` is offered.

    What to do: `millstream verify` says what is lost, `millstream repair` keeps the rest.

    Attributes:
        path: the file, or its directory.
        position: a byte of the partition's log (of the file, where the message says so).
        expected: what should be there.
        found: what is there.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] = "",
        position: int = 0,
        expected: object = None,
        found: object = None,
    ) -> None:
        super().__init__(message)
        self.path = os.fspath(path)
        self.position = position
        self.expected = expected
        self.found = found

    def __reduce__(self) -> tuple[object, ...]:
        given = {
            "path": self.path,
            "position": self.position,
            "expected": self.expected,
            "found": self.found,
        }
        return _again, (type(self), self.args[0], given)


class VersionMismatch(MillstreamError):
    """A file was written by a newer version; the message names both.

    What to do: use that version.
    """


class ConfigMismatch(MillstreamError, ValueError):
    """The stream or queue is there with other settings than its opener named: see `on_mismatch`.

    What to do: leave the setting out, `alter` it, or open with `on_mismatch`.
    """


class NotFound(MillstreamError, LookupError):
    """There is no such store, stream or partition.

    What to do: check the path and the name; the text says what there is.

    Attributes:
        path: of the file that is not there; "" where it is no file.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (type(self), self.args[0], {"path": self.path})


class InvalidArgument(MillstreamError, ValueError):
    """An argument makes no sense. Nothing was stored.

    What to do: correct it; it is a mistake of the caller.
    """


class InvalidType(MillstreamError, TypeError):
    """An argument has a wrong type. Nothing was stored.

    What to do: correct it; it is a mistake of the caller.
    """


class LimitExceeded(MillstreamError, ValueError):
    """A key, value, header or batch is larger than the format allows. Nothing was stored.

    What to do: store less in one piece; the limits are in docs/guide/operations.md.
    """


class LockTimeout(MillstreamError, TimeoutError):
    """Another process held what this call needs for too long; the message names it.

    What to do: see whether the named process is stopped; dead ones are not waited for.
    """


class Reentered(LockTimeout):
    """A call in the middle of a call of the same thread, which holds what this one needs.

    So it is where a signal handler, a finalizer (``__del__``, a callback of ``weakref``) or a
    callback of a call (a codec, ``progress``) uses the store at the wrong moment. Waiting would
    never end, so it was not waited for, and nothing was done. Only what the call under way has of
    the same store counts: a handler may open, use and close another one at any time, but for the
    moment in which that call imports what is needed for the first time (import, open and use once
    before, and there is none). `Store.close` raises it where the call under way holds anything of
    the store, which stays open.

    What to do: have the handler set a flag, and do the work where no call is under way.
    """


class WaitTimeout(MillstreamError, TimeoutError):
    """What was waited for did not happen in time.

    What to do: wait again, or give up.
    """


class Closed(MillstreamError, ValueError):
    """The handle is closed, its stream was dropped, or it was inherited through a fork.

    What to do: open the store again, in this process.
    """


class OffsetOutOfRange(MillstreamError, IndexError):
    """There is no record at that position.

    What to do: go on from `first` or `next`, or read with `on_lost="earliest"`.

    Attributes:
        partition: the partition.
        first: offset of the oldest record that there is.
        next: offset that the next record will get.
    """

    def __init__(self, message: str, *, partition: int = 0, first: int = 0, next: int = 0) -> None:
        super().__init__(message)
        self.partition = partition
        self.first = first
        self.next = next

    def __reduce__(self) -> tuple[object, ...]:
        given = {"partition": self.partition, "first": self.first, "next": self.next}
        return _again, (type(self), self.args[0], given)


class Aborted(MillstreamError):
    """A transaction was given up, since a lease or an assignment that it needs was lost meanwhile.

    Nothing of it was done. Whoever has the message or the partition now does the work again. Also
    where partitions were added to a stream to which it appends by key: begin it again.

    What to do: begin the transaction again.
    """


class Fenced(MillstreamError):
    """A consumer is not the owner of a partition any more, so its commit was refused.

    It was taken for hung or dead, and another member of the group goes on from the position that
    was committed last. Nothing was changed; the next batch comes from the partitions that are left.

    What to do: undo what was done for the batch, or make it repeatable, and go on asking for
    batches; a longer `max_processing` or smaller batches keep it from happening.

    Attributes:
        partitions: those that were refused.
    """

    def __init__(self, message: str, *, partitions: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.partitions = partitions

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (type(self), self.args[0], {"partitions": self.partitions})


class LeaseLost(MillstreamError):
    """The lease of a message ended before this call; somebody else may have the message now.

    What to do: undo what was done, or make it repeatable; `extend` the lease or open with a
    longer one.
    """


class WorkerError(MillstreamError):
    """Worker processes cannot start, or the workers of a `run` were stopped by somebody else.

    No message is lost.

    What to do: mend what the last one said: what it imports, the codec, the `__main__` guard.

    Attributes:
        kind: the type of the exception that ended the last one; "": it left none.
        traceback: the text of its traceback, or "".
    """

    def __init__(self, message: str, *, kind: str = "", traceback: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.traceback = traceback

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (type(self), self.args[0], {"kind": self.kind, "traceback": self.traceback})


def _delay(seconds: float) -> float:
    """Check a delay where it is named: its caller is told, and the message fails with that."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise InvalidType(f"delay {seconds!r}: expected a number of seconds")
    if not 0 <= seconds <= 100 * 365 * 86400:
        raise InvalidArgument(f"delay {seconds!r}: expected from 0 seconds to 100 years")
    return seconds


class Retry(MillstreamError):
    """Raised by a worker: the attempt failed and counts; deliver the message again later.

    What to do: raise it in a worker, or within `with message:`; nobody else meets it.

    Attributes:
        delay: seconds until then; None: as the retry policy of the queue says.
    """

    def __init__(self, delay: float | None = None) -> None:
        super().__init__(delay)
        self.delay = None if delay is None else _delay(delay)


class Snooze(MillstreamError):
    """Raised by a worker: nothing failed, but deliver the message again later; it is not counted.

    What to do: raise it in a worker, or within `with message:`; nobody else meets it.

    Attributes:
        delay: seconds until then.
    """

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__(delay)
        self.delay = _delay(delay)


class Reject(MillstreamError):
    """Raised by a worker: the message will never succeed; put it with the dead letters.

    What to do: raise it in a worker, or within `with message:`; nobody else meets it.

    Attributes:
        reason: text kept with it.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class Unsupported(MillstreamError):
    """Not possible on this file system or machine, with these data, or on this engine.

    An engine raises it before it sends anything.

    What to do: use another directory or mode; `force=True` where the text offers it, at your
    own risk. Of an engine: as `instead` says.

    Attributes:
        capability: what an engine was asked for, as `Store.capabilities` names it; "": not of one.
        engine: the engine and its version.
        instead: what to do.

    >>> str(Unsupported(capability="queue.release", engine="kafka 4.4.0", instead="use nack"))
    'kafka 4.4.0: queue.release is not supported; use nack'
    """

    def __init__(
        self, message: str = "", *, capability: str = "", engine: str = "", instead: str = ""
    ) -> None:
        made = f"{engine}: {capability} is not supported" + (f"; {instead}" if instead else "")
        super().__init__(message or made)
        self.capability = capability
        self.engine = engine
        self.instead = instead

    def __reduce__(self) -> tuple[object, ...]:
        given = {"capability": self.capability, "engine": self.engine, "instead": self.instead}
        return _again, (type(self), self.args[0], given)


class MillstreamWarning(UserWarning):
    """Something that works now and will hurt later. The text says what to do."""


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
for _one in [*globals().values()]:
    if isinstance(_one, type):
        _one.__module__ = "millstream"
del _one


def __getattr__(name: str) -> object:
    """`QueueFull` and `Empty` are imported when they are asked for, as `millstream` has them."""
    if name not in __all__:
        raise AttributeError(f"module 'millstream.errors' has no attribute {name!r}")
    globals()[name] = found = getattr(sys.modules["millstream"], name)
    return found
