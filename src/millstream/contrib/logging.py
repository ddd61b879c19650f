"""Logs in a stream: a `logging.Handler` that neither blocks nor raises into the program.

>>> import logging, millstream
>>> from millstream.contrib.logging import StreamHandler
>>> with millstream.temporary() as store:
...     handler = StreamHandler(store, "logs")
...     logger = logging.Logger("shop")
...     logger.addHandler(handler)
...     logger.warning("order %d is late", 17, extra={"customer": "ann"})
...     _ = handler.flush()
...     record = store.stream("logs").get(0, 0)
...     handler.close()
>>> import json
>>> found = json.loads(record.value)
>>> record.key, found["level"], found["message"], found["customer"]
(b'shop', 'WARNING', 'order 17 is late', 'ann')
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import logging
import math
import os
import queue
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import millstream
from millstream import LimitExceeded, MillstreamError, Retention, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Literal

    from millstream import Stream

__all__ = ["JsonFormatter", "StreamHandler"]

RECORDS_AT_ONCE = 1_000
FLUSH_SECONDS = 30.0
LOOK_SECONDS = 0.05
DEPTH_MAX = 50
ENCODER = json.JSONEncoder(default=repr, ensure_ascii=False, allow_nan=False)
OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; anything else came by `extra`."""


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: what there is of it, exception and `extra` included.

    Values and keys that JSON does not know are written as their `repr`: NaN and infinities, which
    its parsers refuse, as the texts "nan", "inf" and "-inf". What cannot be shown, as a `repr` that
    raises, an object within itself or one nested too deeply, is replaced by a text in <> that
    says why; the rest of the record is as it would be without it.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields: dict[str, Any] = {
            "time": when.isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "file": record.pathname,
            "line": record.lineno,
            "function": record.funcName,
            "process": record.process,
            "thread": record.threadName,
        }
        if record.exc_info and record.exc_info[0] is not None:
            kind, error, _ = record.exc_info
            fields["exception"] = {
                "type": f"{kind.__module__}.{kind.__qualname__}",
                "message": shown(error, str),
                "traceback": shown(record.exc_info, self.formatException),
            }
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        extra = {name: value for name, value in vars(record).items() if name not in OWN}
        fields = {**extra, **fields}
        try:
            return ENCODER.encode(fields)
        except Exception:  # by a value, whose repr may raise anything: look which one it is
            return ENCODER.encode(plain(fields))


def shown(value: object, how: Callable[[Any], str] = repr) -> str:
    """What `how` makes of a value, or why it does not."""
    try:
        return str(how(value))
    except Exception as error:  # of the user's own methods
        return f"<{type(value).__name__}: {how.__name__}() raised {type(error).__name__}>"


def plain(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A value as JSON can have it, with a text in the place of each part that it cannot."""
    if isinstance(value, dict | list | tuple):
        if id(value) in within:
            return f"<{type(value).__name__}: within itself>"
        if len(within) > DEPTH_MAX:
            return f"<{type(value).__name__}: more than {DEPTH_MAX} levels deep>"
        deeper = (*within, id(value))
        if isinstance(value, dict):
            return {plain_key(key): plain(one, deeper) for key, one in value.items()}
        return [plain(one, deeper) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return shown(value, float.__repr__)
    if value is None or isinstance(value, str | int | float):
        with contextlib.suppress(ValueError):  # an int of thousands of digits
            ENCODER.encode(value)
            return value
    return shown(value)


def plain_key(key: Any) -> Any:
    """A key as JSON can have it."""
    if key is None or isinstance(key, str | int) or (isinstance(key, float) and math.isfinite(key)):
        return key
    return shown(key)


class StreamHandler(logging.Handler):
    """A handler that appends each record to a stream: its value the text, its key the logger.

    The program formats a record and puts it into memory; a thread appends what is there. A record
    that finds `capacity` others waiting is dropped, as is one that cannot be formatted or stored:
    `dropped` counts them, and `error` is why the store took the last one that it did not take.
    Nothing is raised. A forked process has a thread of its own, and what waited in its parent is
    its parent's to append. At the end of the process what waits is appended.

    Durability: what was logged before `flush` was called survives a kill when it returns True, and
    a power cut as `durability` says. Without `flush` a kill takes what the thread has not come to.

    Args:
        store: a store, or the path of one, which is made where it is not there.
        stream: the name of the stream.
        level: of records that are handled.
        capacity: how many records may wait.
        retention: how much the stream keeps, a `Retention` or a dict of its arguments; default: as
            it is, everything in a new one.
        durability: "process", "interval" or "sync"; default: the stream's.

    Raises: what `millstream.open` and `Store.stream` raise, so ConfigMismatch where the stream is
        there with another retention.
    """

    _closed = True  # until it is begun: logging closes at the end what was refused as well
    _process = 0

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        stream: str = "logs",
        level: int | str = logging.NOTSET,
        *,
        capacity: int = 10_000,
        retention: Retention | Mapping[str, Any] | None = None,
        durability: Literal["process", "interval", "sync"] | None = None,
    ) -> None:
        super().__init__(level)
        self.formatter = JsonFormatter()
        self.error: Exception | None = None
        self._capacity = capacity
        self._options: dict[str, Any] = {
            "retention": Retention(**retention) if isinstance(retention, dict) else retention,
            "durability": durability,
            "create": True,
        }
        self._name = stream
        opened = store if isinstance(store, Store) else millstream.open(store)
        self._mine = None if opened is store else opened
        self._path = opened.path
        self._closed = False
        try:
            self._begin(opened.stream(stream, **self._options))
        except BaseException:
            if self._mine is not None:
                self._mine.close()
            raise
        # Later than the store's own, so that it is called before.
        atexit.register(_close, weakref.ref(self))

    def _begin(self, stream: Stream | None) -> None:
        """As the handler of this process, which opens the store where it has no stream."""
        self._stream = stream
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._counting = threading.RLock()
        self._refused = self._failed = 0
        self._thread = threading.Thread(target=self._run, name="millstream-logging", daemon=True)
        self._thread.start()
        processes = sys.modules.get("multiprocessing.util")
        if processes is not None:  # whose children leave without calling what atexit has
            processes.Finalize(None, _close, (weakref.ref(self),), exitpriority=0)
        self._process = os.getpid()  # the last: from now on other threads use all this

    @property
    def dropped(self) -> int:
        """How many records this process has dropped."""
        return self._refused + self._failed

    # --- the program ------------------------------------------------------------------------------

    def handle(self, record: logging.LogRecord) -> bool:
        """Emit a record that the filters let pass.

        Without the handler's lock, as others do: who ends logging holds it while the thread ends.
        """
        passed: Any = self.filter(record)
        if passed:  # since Python 3.12 it may be another record
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return bool(passed)

    def emit(self, record: logging.LogRecord) -> None:
        """Put a record where the thread takes it; never waits, never raises."""
        try:
            if self._process != os.getpid():
                self._begin_in_child()
            # What the thread itself logs, or the store in it, would have no end.
            mine = threading.current_thread() is self._thread
            if mine or self._closed or self._waiting.qsize() >= self._capacity:
                self._refuse()
                return
            value = self.format(record).encode("utf-8", "backslashreplace")
            key = str(record.name).encode("utf-8", "backslashreplace")
            self._waiting.put((value, key, int(record.created * 1e6)))
        except Exception:  # as the other handlers: on stderr, where logging.raiseExceptions is set
            self._refuse()
            self.handleError(record)

    def _refuse(self) -> None:
        with self._counting:
            self._refused += 1

    def _begin_in_child(self) -> None:
        assert self.lock is not None
        with self.lock:
            if self._process != os.getpid():
                self._mine = None
                self._begin(None)

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:  # type: ignore[override]
        """Return when the thread has come to all that was logged before: True; False: not in time.

        Args:
            timeout: seconds.
        """
        if self._process != os.getpid():
            return True  # nothing was logged here yet
        if not self._thread.is_alive() or self._thread is threading.current_thread():
            return False
        done = threading.Event()
        self._waiting.put(done)
        left = timeout
        while not done.wait(min(LOOK_SECONDS, left)):
            left -= LOOK_SECONDS
            if left <= 0 or not self._thread.is_alive():
                return False
        return True

    def close(self) -> None:
        """Append what waits, and end the thread; records that come later are dropped."""
        if not self._closed and self._process == os.getpid():
            self._closed = True
            self.flush()
            self._waiting.put(None)
            self._thread.join(LOOK_SECONDS)
            if self._mine is not None:
                with contextlib.suppress(MillstreamError):  # what was not synced then is, later
                    self._mine.close()
        super().close()

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        waiting = self._waiting
        while True:
            found = [waiting.get()]
            with contextlib.suppress(queue.Empty):
                while len(found) < RECORDS_AT_ONCE:
                    found.append(waiting.get_nowait())
            records = [one for one in found if isinstance(one, tuple)]
            if records:
                self._append(records)
            for one in found:
                if isinstance(one, threading.Event):
                    one.set()
            if None in found:
                return

    def _append(self, records: list[tuple[bytes, bytes, int]]) -> None:
        values, keys, times = zip(*records, strict=True)
        try:
            if self._stream is None:
                self._mine = millstream.open(self._path)
                self._stream = self._mine.stream(self._name, **self._options)
            self._stream.append_many(values, keys=keys, timestamps=times)
        except Exception as error:
            if isinstance(error, LimitExceeded) and len(records) > 1:
                for one in records:  # one of them is too long
                    self._append([one])
                return
            self.error = error
            self._failed += len(records)


def _close(reference: weakref.ref[StreamHandler]) -> None:
    handler = reference()
    if handler is not None:
        handler.close()
