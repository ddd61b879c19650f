"""Compaction in the background: one thread a store and process, where a stream asks for it.

It visits each partition now and then, and compacts one when enough of it is dirty, no faster than
the stream's `max_rate`. One process at a time has the compact word of a partition.
"""

from __future__ import annotations

import contextlib
import threading
import time

from millstream import _native
from millstream.disk.files import LIVE
from millstream.errors import Closed
from millstream.log import compaction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream.log.partition import PartitionLog
    from millstream.store.store import Store
    from millstream.streams.stream import Stream

VISIT_SECONDS = 1.0
CHANGED_SECONDS = 5.0
UNCHANGED_SECONDS = 60.0  # by time alone: tombstones grow old, and so do records


class Stopped(Exception):
    """The store is being closed: the run ends where it is."""


class Compactor:
    """The thread, and when it last visited what."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._stopping = _native.Flag()
        self._tried: set[tuple[Stream, int]] = set()
        self._seen: dict[PartitionLog, tuple[float, tuple[int, int, int]]] = {}
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Have the thread there, again where it has ended."""
        self._thread = thread = threading.Thread(
            target=self._run, name="millstream-compact", daemon=True
        )
        thread.start()

    def is_alive(self) -> bool:
        """Is the thread there?"""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End the thread; a run that it is at ends before its next segment."""
        self._stopping.set()
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            _native.join(thread)

    def forget(self, stream: Stream) -> None:
        """A stream was dropped or closed: hold nothing of it."""
        seen, tried = self._seen.copy(), self._tried.copy()  # to which the thread adds
        self._seen = {log: what for log, what in seen.items() if log.stream is not stream}
        self._tried = {one for one in tried if one[0] is not stream}

    def _run(self) -> None:
        me = threading.current_thread()
        while not self._stopping.is_set() and self._thread is me:
            try:
                if not self._stopping.wait(VISIT_SECONDS):
                    self._visit_all()
            except BaseException as error:  # whatever it is: it is tried again
                with contextlib.suppress(BaseException):
                    time.sleep(VISIT_SECONDS)
                    self._failed(self.store.path, error)

    def _visit_all(self) -> None:
        streams = list(self.store._streams)
        for stream in {stream.name: stream for stream in streams}.values():
            if stream._compaction is not None and not stream.closed:
                self._attempt(stream)

    def _attempt(self, stream: Stream) -> None:
        """Visit it; say in the log what failed. It is tried again."""
        try:
            self._visit(stream)
        except (Stopped, Closed):
            return
        except Exception as error:
            if not self._stopping.is_set() and not self._is_gone(stream):
                self._failed(stream.path, error)
        else:
            self.store._background._well("compaction", stream.path)

    def _failed(self, where: str, error: BaseException) -> None:
        self.store._background._ill("compaction", where, error)

    @staticmethod
    def _is_gone(stream: Stream) -> bool:
        return stream.closed or stream._state != LIVE

    def _visit(self, stream: Stream) -> None:
        stream._keep_up()
        for index in range(stream.partitions):
            if (stream, index) not in self._tried:  # also those that nobody used here
                self._tried.add((stream, index))
                stream._partition(index)
        for log in stream._opened():
            if self._stopping.is_set():
                return
            if self._is_due(log):
                try:
                    self._compact(log)
                finally:
                    if self._is_gone(stream):  # what was mapped after its handle let go
                        log.segments.forget()

    def _is_due(self, log: PartitionLog) -> bool:
        native = log.native
        now = time.monotonic()
        state = native.structure, native.active_number, native.durable
        last, seen = self._seen.get(log, (now - UNCHANGED_SECONDS, state))
        if now - last < (CHANGED_SECONDS if state != seen else UNCHANGED_SECONDS):
            return False
        self._seen[log] = now, state
        return True

    def _compact(self, log: PartitionLog) -> None:
        """Compact a partition of which enough is dirty."""
        keep = log.stream._compaction
        if keep is None or log.native.poison:
            return
        dirty, total = compaction.dirt(log, keep, compaction.sealed(log, keep))
        if not dirty or dirty < keep.min_dirty * total:
            return
        word = log.native.word("compact", str(log), 0.0)
        if not word.try_take():
            return  # another process is at it
        try:
            pace = Pace(self._stopping, keep.max_rate)
            compaction.Run(log, keep, compaction.MEMORY_BYTES, pace=pace).run()
        except Stopped:
            pass  # what is not done yet, the next process does
        finally:
            word.release()


class Pace:
    """Sleeps so that no more than `rate` bytes a second are gone through."""

    def __init__(self, stopping: _native.Flag, rate: int) -> None:
        self._stopping = stopping
        self._rate = rate
        self._next = time.monotonic()

    def __call__(self, size: int) -> None:
        """Say that so many bytes were gone through."""
        now = time.monotonic()
        self._next = max(self._next, now) + size / self._rate
        if self._stopping.wait(max(0.0, self._next - now)):
            raise Stopped
