"""The work that nobody waits for, in one thread a store and process.

Syncing by interval, spare segments, populated pages, sealed ends, retention, transactions whose
committer died; compaction has a thread of its own (`compactor.py`).

The thread starts with the first append, stream with a retention, or stream of a store that has
transactions, and sleeps while nothing is due. What it fails at is not lost: the next call that
needs the same raises it. It imports nothing: who forks meanwhile would keep the import's lock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from millstream import _native, growth
from millstream.errors import Closed, Indeterminate, MillstreamError, NotFound, StorageError
from millstream.options import Retention

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from millstream.compactor import Compactor
    from millstream.group import Group
    from millstream.queue_handle import QueueHandle
    from millstream.segments import PartitionLog
    from millstream.store import Store
    from millstream.stream import Stream

SYNC_SECONDS = 0.1
RETENTION_SECONDS = 1.0
SEALED_SECONDS = 5.0
JOURNAL_SECONDS = 0.3  # a committer at "sync" takes less, so what waits for longer is a dead one's
POPULATE_BYTES = 48 << 20
POPULATE_LOW = 33 << 20  # so that a burst of 32 MiB after a pause finds its pages
LATELY_SECONDS = 1.0
UNSYNCED_BYTES = 256 << 20
WARM_BYTES = 4 << 20  # a log that grows by so much in LATELY_SECONDS is worth populating ahead

WRITTEN, ROLLED, SPARE, POPULATE, UNSYNCED, WANT_SYNC = (
    _native.EVENTS[name]
    for name in ("written", "rolled", "spare", "populate", "unsynced", "want_sync")
)


def _log() -> Any:
    with _native.loading:
        import logging
    return logging.getLogger("millstream")


class _Bell:
    """Wakes one thread. An Event whose `set` is cut short by Ctrl-C may stay locked for ever.

    Here both ends are one call of C. Rung before it is waited for, it ends that wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            return  # it was rung already

    def wait(self, seconds: float | None) -> None:
        self._lock.acquire(timeout=-1 if seconds is None else seconds)


class Background:
    """The thread, and what it was asked to do."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._wanted = _Bell()
        self._asked: dict[PartitionLog, int] = {}
        self._unsynced: set[PartitionLog] = set()
        self._queues: set[QueueHandle | Group] = set()
        self._logs: list[PartitionLog] = []
        self._wrote: set[PartitionLog] = set()
        self._stopping = False
        self._starting = _native.Lock(f"{store.path}: starting a thread")
        self._thread: threading.Thread | None = None
        self._sealed_unsynced: set[PartitionLog] = set()
        self._synced_at = 0.0
        self._sealed_at = 0.0
        self._retained_at = 0.0
        self._has_journal = False
        self._journal_due = 0.0
        """When to look for a journal, then when to look into it."""
        self._journal_seen = -1
        self._compactor: Compactor | None = None
        self._tried: set[tuple[Stream, int]] = set()
        self._sealed: dict[PartitionLog, int] = {}
        self._pace: dict[PartitionLog, tuple[float, int]] = {}

    def adopt(self, log: PartitionLog) -> None:
        """A partition was opened here."""
        self._logs.append(log)
        self.tune(log)

    def tune(self, log: PartitionLog) -> None:
        """Have the core report what the level of the stream needs."""
        log.native.take_written()  # the next append is an event again
        # A populated page is a dirty page: where syncs follow, it would be written twice.
        populate = POPULATE_LOW if log.stream.durability == "process" else 0
        log.native.configure(populate, UNSYNCED_BYTES if log.stream.durability == "interval" else 0)

    def forget(self, stream: Stream) -> None:
        """A stream was dropped or closed: hold nothing of it."""
        gone = [log for log in self._logs if log.stream is stream]
        self._logs = [log for log in self._logs if log.stream is not stream]
        for log in gone:
            for some in (self._wrote, self._unsynced, self._sealed_unsynced):
                some.discard(log)
            for counted in (self._asked, self._sealed):
                counted.pop(log, None)
            self._pace.pop(log, None)
        self._tried = {one for one in self._tried.copy() if one[0] is not stream}
        if self._compactor is not None:
            self._compactor.forget(stream)

    def watch(self, stream: Stream) -> None:
        """A stream was opened or altered: its retention is held also where nobody appends."""
        if self.store.writable and stream.compaction is not None:
            self._start_compactor()
        if self.store.writable and stream.retention != Retention():
            self._wanted.ring()
            if self._thread is None:
                self._start()

    def watch_journal(self) -> None:
        """Called wherever a reader finds nothing more: from now on, apply what the dead committed.

        Whoever makes the first transaction may be another process, so it is looked for.
        """
        if self._has_journal or time.monotonic() < self._journal_due:
            return
        self._journal_due = time.monotonic() + JOURNAL_SECONDS
        if self.store.writable and self.store._has_journal():
            self._has_journal = True
            self._wanted.ring()
            if self._thread is None:
                self._start()

    def notice(self, log: PartitionLog, events: int) -> None:
        """An append asks for something, the first one to a partition always."""
        if events & WRITTEN:
            self._wrote.add(log)
        self._asked[log] = self._asked.get(log, 0) | events
        self._wanted.ring()
        if self._thread is None:
            self._start()

    def notice_queue(self, queue: QueueHandle) -> None:
        """Something was changed in a queue of level "interval"."""
        self._queues.add(queue)
        self._wanted.ring()
        if self._thread is None:
            self._start()

    def notice_group(self, group: Group) -> None:
        """A position was committed at level "interval"."""
        self._queues.add(group)
        self._wanted.ring()
        if self._thread is None:
            self._start()

    def _start(self) -> None:
        if self._starting.mine:
            return  # a handler in the middle of this very call
        with self._starting:
            if self._thread is None and not self._stopping:
                thread = threading.Thread(target=self._run, name="millstream", daemon=True)
                thread.start()
                self._thread = thread

    def _start_compactor(self) -> None:
        if self._starting.mine:
            return
        with _native.loading:
            from millstream.compactor import Compactor
        with self._starting:
            if self._compactor is None and not self._stopping:
                self._compactor = Compactor(self.store)

    def stop(self) -> None:
        """End the threads; what they were at is finished, or left for the next run."""
        with self._starting:
            self._stopping = True
        if self._compactor is not None:
            self._compactor.stop()
        self._wanted.ring()
        if self._thread is not None and self._thread is not threading.current_thread():
            _native.join(self._thread)
        self._thread = None

    def _run(self) -> None:
        while True:
            self._wanted.wait(self._pause())
            if self._stopping:
                return
            for log, events in self._take():
                self._attempt("preparing space", log, self._prepare, log, events)
                if events & ROLLED:
                    self._attempt("looking at its size", log, self._look_after_growth, log)
            now = time.monotonic()
            if (self._unsynced or self._queues) and now - self._synced_at >= SYNC_SECONDS:
                self._synced_at = now
                self._sync_all()
            if self._sealed_unsynced and now - self._sealed_at >= SEALED_SECONDS:
                self._sync_sealed()
            if self._has_journal and now >= self._journal_due:
                self._journal_due = now + JOURNAL_SECONDS
                self._look_at_journal()
            if self._retention_due(now):
                self._retained_at = now
                for stream in {stream.name: stream for stream in self._streams()}.values():
                    self._retain(stream)

    def _take(self) -> list[tuple[PartitionLog, int]]:
        taken = []
        while self._asked:
            taken.append(self._asked.popitem())
        return taken

    def _pause(self) -> float | None:
        """Seconds until something is due by the clock; None: nothing."""
        now = time.monotonic()
        unsynced = self._unsynced or self._queues
        due = [self._synced_at + SYNC_SECONDS - now] if unsynced else []
        if self._sealed_unsynced:
            due.append(self._sealed_at + SEALED_SECONDS - now)
        if self._has_journal:
            due.append(self._journal_due - now)
        if self._has_retention():
            due.append(self._retained_at + RETENTION_SECONDS - now)
        return max(0.0, min(due)) if due else None

    def _has_retention(self) -> bool:
        return any(
            keep.bytes is not None or keep.age is not None or keep.records is not None
            for keep in (stream.retention for stream in self._streams())
        )

    def _streams(self) -> list[Stream]:
        return list(self.store._streams.values())

    def _retain(self, stream: Stream) -> None:
        try:
            stream._check_live()  # follows what others altered
            for index in range(stream.partitions):
                if (stream, index) not in self._tried:
                    self._tried.add((stream, index))
                    stream._partition(index)
        except (MillstreamError, OSError) as error:
            _log().debug("%r: %s", stream, error)  # the next call that needs it raises the same
        for log in stream._opened():
            self._attempt("retention", log, stream._retire, log)

    def _look_at_journal(self) -> None:
        """Apply what waits since the last look."""
        store = self.store
        # Whoever closes the store has its lock, and waits for this thread.
        if not store._lock.acquire(blocking=False):
            return
        try:
            if not store.closed:
                self._journal_seen = store._journal().look(self._journal_seen)
        except (MillstreamError, OSError, ValueError) as error:
            _log().debug("%r: %s", store, error)  # the next commit raises the same
        finally:
            store._lock.release()

    def _retention_due(self, now: float) -> bool:
        return now - self._retained_at >= RETENTION_SECONDS and self._has_retention()

    def _attempt(
        self, what: str, log: PartitionLog, work: Callable[..., object], *arguments: object
    ) -> bool:
        """Do it; say in the log what failed.

        The next call on a hot path that needs it raises the same.
        """
        try:
            work(*arguments)
        except Closed:
            return False
        except (MillstreamError, OSError, ValueError) as error:
            if not self._stopping and not self._is_gone(log):
                _log().warning("%s: %s in the background failed: %s", log, what, error)
            return False
        finally:
            if self._is_gone(log):  # what was mapped after its handle let go
                self._unsynced.discard(log)
                self.store._cache.forget(log)
        return True

    @staticmethod
    def _is_gone(log: PartitionLog) -> bool:
        """Was its stream dropped or closed meanwhile?"""
        return log.stream.closed or log.stream._state != 1

    # --- space ------------------------------------------------------------------------------------

    def _prepare(self, log: PartitionLog, events: int) -> None:
        native = log.native
        if events & (WRITTEN | WANT_SYNC | ROLLED):
            wants = events & WANT_SYNC or log.stream.durability == "interval"
            if wants:
                self._unsynced.add(log)
            elif events & ROLLED:
                if not self._sealed_unsynced:
                    self._sealed_at = time.monotonic()
                self._sealed_unsynced.add(log)
        if events & SPARE and native.next is None:
            log.provide_next()
        if events & ROLLED:
            self._seal(log)
        if events & POPULATE:
            self._populate(log)

    @staticmethod
    def _look_after_growth(log: PartitionLog) -> None:
        growth.look_after(log.stream)

    def _populate(self, log: PartitionLog) -> None:
        """Fault pages in ahead of the tail, where this process appended lately."""
        native = log.native
        segment, tail = native.active, native.tail
        if segment is None or not segment.activated:
            return
        now = time.monotonic()
        asked, populated = self._pace.get(log, (0.0, 0))
        if now - asked > LATELY_SECONDS:
            # Slow so far: a populated page is a dirty page, so look again after some more appends.
            self._pace[log] = (now, 0)
            native.set_populated(tail + POPULATE_LOW + WARM_BYTES)
            return
        begin = max(tail, populated)
        end = min(tail + POPULATE_BYTES, segment.capacity_end)
        # In steps, so that the tail may overtake us without our faulting in what it has passed.
        while begin < end and not self._stopping:
            step = min(begin + (4 << 20), end)
            segment.populate(begin, step)
            begin = max(step, native.tail)
        if native.active is segment:
            self._pace[log] = (now, end)
            native.set_populated(end)

    def _seal(self, log: PartitionLog) -> None:
        """Punch out the unused ends of segments that have a successor."""
        numbers = log.current()
        done = self._sealed.get(log, 0)
        for number, following in pairwise(numbers):
            if number > done:
                with contextlib.suppress(NotFound):  # retired meanwhile
                    log.segment(number, write=True).remove_behind(log.base(following)[0])
                self._sealed[log] = number

    # --- syncing ----------------------------------------------------------------------------------

    def _sync_all(self) -> None:
        while self._queues:
            queue = self._queues.pop()
            try:
                queue._sync_in_background()
            except (MillstreamError, OSError, ValueError) as error:
                if not self._stopping:
                    _log().warning("%r: syncing in the background failed: %s", queue, error)
        for log in list(self._unsynced):
            log.native.take_written()
            if log.native.durable >= log.native.tail or log.native.poison:
                self._unsynced.discard(log)
            else:
                self._attempt("syncing", log, log.sync)
                self._save_sequences(log)

    def _sync_sealed(self) -> None:
        """Sync what is sealed at "process" as well.

        Seldom: a sync stalls page faults of the writers.
        """
        while self._sealed_unsynced:
            log = self._sealed_unsynced.pop()
            self._attempt("syncing", log, partial(log.sync, sealed=True))
            self._save_sequences(log)

    def _save_sequences(self, log: PartitionLog) -> None:
        """What producers sent to segments that are sealed and synced."""
        if log.sequences is not None and not self._is_gone(log):
            self._attempt("saving sequences", log, log.sequences.save_sealed)

    def sync_everything(self) -> tuple[bool, list[Exception]]:
        """Sync what is not: did all of it go well, and what failed of what this process wrote."""
        well = True
        failed: list[Exception] = []
        for log in self._logs:
            try:
                if log.native.walked == self.store._generation and log.stream._state == 1:
                    log.sync()
            except (Indeterminate, StorageError) as error:
                well = False
                if log in self._wrote:
                    failed.append(error)
        return well, failed
