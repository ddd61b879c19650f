"""The work that nobody waits for, in one thread a store and process.

Syncing by interval, spare segments, populated pages, the unused ends of sealed segments, retention,
transactions whose committer died; compaction has a thread of its own (`store/compactor.py`).

The thread starts with the first append, stream with a retention, or stream of a store that has
transactions, and sleeps while nothing is due. What it fails at is not lost: the next call that
needs the same raises it. It imports what applying a journal takes, once and under `loading`, for
which a fork waits; where no descriptor is left it tries again. No exception ends it; where it is
not there all the same, or cannot be started, appends sync (`runs`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from millstream import _native
from millstream.disk.session import LATE_SECONDS
from millstream.errors import Closed, MillstreamError, MillstreamWarning, NotFound, is_ours
from millstream.log.ahead import WARM_BYTES
from millstream.log.handle import UNSYNCED_BYTES
from millstream.options import Retention
from millstream.streams import growth

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from millstream.groups.group import Group
    from millstream.log.partition import PartitionLog
    from millstream.queues.handle import QueueHandle
    from millstream.store.compactor import Compactor
    from millstream.store.store import Store
    from millstream.streams.stream import Stream

SYNC_SECONDS = 0.1
RETENTION_SECONDS = 1.0
SEALED_SECONDS = 5.0
NOTE_SECONDS = 1.0
JOURNAL_SECONDS = 0.3  # a committer at "sync" takes less, so what waits for longer is a dead one's
POPULATE_BYTES = 48 << 20
POPULATE_LOW = 33 << 20  # so that a burst of 32 MiB after a pause finds its pages
LATELY_SECONDS = 1.0
NEVER_LATE = (1 << 64) - 1
AGAIN_SECONDS = 1.0
PAUSE_SECONDS = 0.1
"""After a round that raised what it should not."""

WRITTEN, ROLLED, SPARE, PREPARE, UNSYNCED, LATE, WANT_SYNC = (
    _native.EVENTS[name]
    for name in ("written", "rolled", "spare", "prepare", "unsynced", "late", "want_sync")
)
TO_SYNC = WRITTEN | ROLLED | UNSYNCED | LATE | WANT_SYNC


def say(text: str, *, warn: bool = True) -> None:
    """Have a text in the log of the program; without one, a warning on stderr as logging does.

    Imports nothing and raises nothing, whatever filters and handlers do.
    """
    with contextlib.suppress(BaseException):
        logging: Any = sys.modules.get("logging")
        log = getattr(logging, "getLogger", None)  # another thread may be importing it
        if log is not None:
            (log("millstream").warning if warn else log("millstream").debug)("%s", text)
        elif warn and sys.stderr is not None:
            sys.stderr.write(f"millstream: {text}\n")


class Background:
    """The thread, and what it was asked to do."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._wanted = _native.Bell()
        self._answered = self._wanted.rung
        self._asked: dict[PartitionLog, int] = {}
        self._again: dict[PartitionLog, int] = {}
        """What failed of it, and is tried again at `_again_at`."""
        self._again_at = 0.0
        self._unsynced: set[PartitionLog] = set()
        self._queues: set[QueueHandle | Group] = set()
        self._logs: list[PartitionLog] = []
        self._wrote: set[PartitionLog] = set()
        self._stopping = False
        self._starting = _native.Lock(f"{store.path}: starting a thread", store.session.members)
        self._thread: threading.Thread | None = None
        self._troubles: dict[tuple[str, str], str] = {}
        """By what, and at what: why it failed when it was tried last."""
        self._warned = False
        self._sealed_unsynced: set[PartitionLog] = set()
        self._synced_at = 0.0
        self._sealed_at = 0.0
        self._retained_at = 0.0
        self._noted_at = 0.0
        self._has_journal = False
        self._journal_due = 0.0
        """When to search for a journal; when there is one, when to apply what waits in it."""
        self._journal_seen = -1
        self._compactor: Compactor | None = None
        self._tried: set[tuple[Stream, int]] = set()
        self._trimmed: dict[PartitionLog, int] = {}
        self._pace: dict[PartitionLog, tuple[float, int]] = {}

    def adopt(self, log: PartitionLog) -> None:
        """A partition was opened here."""
        self._logs.append(log)
        self.tune(log)

    def tune(self, log: PartitionLog) -> None:
        """Have the core report what the level of the stream needs."""
        log.native.take_written()  # so that the next append reports again
        level = log.stream._durability
        low = log.ahead.low(level)
        if log.ahead.folios is False and level == "process":
            # A populated page is a dirty page: where syncs follow, it would be written twice.
            low = POPULATE_LOW
        if level == "interval":
            log.native.configure(low, UNSYNCED_BYTES, int(LATE_SECONDS * 1e6))
        else:
            log.native.configure(low, 0, NEVER_LATE)

    def forget(self, stream: Stream) -> None:
        """A stream was dropped or closed: hold nothing of it."""
        gone = [log for log in self._logs if log.stream is stream]
        self._logs = [log for log in self._logs if log.stream is not stream]
        for log in gone:
            for some in (self._wrote, self._unsynced, self._sealed_unsynced):
                some.discard(log)
            for counted in (self._asked, self._again, self._trimmed):
                counted.pop(log, None)
            self._pace.pop(log, None)
            for what, where in list(self._troubles):
                if where == str(log):
                    self._well(what, where)
        self._tried = {one for one in self._tried.copy() if one[0] is not stream}
        if self._compactor is not None:
            self._compactor.forget(stream)

    def watch(self, stream: Stream) -> None:
        """A stream was opened or altered: its retention is held also where nobody appends."""
        if not self.store.writable:
            return
        if stream._compaction is not None:
            self._start_compactor()
        if stream._retention != Retention():
            self._wanted.ring()
            self.runs()

    def watch_journal(self) -> None:
        """Asked with each check of a handle: from now on, apply what the dead committed.

        Whoever makes the first transaction may be another process, so this asks again and again.
        """
        if self._has_journal or time.monotonic() < self._journal_due:
            return
        self._journal_due = time.monotonic() + JOURNAL_SECONDS
        if self.store.writable and self.store._transactions.exist():
            try:
                self.store._transactions.load()
            except (ImportError, OSError) as error:  # no descriptor is left, say: at the next call
                say(f"{self.store!r}: the journal is not applied yet: {error}")
                return
            self._has_journal = True
            self._wanted.ring()
            self.runs()

    def notice(self, log: PartitionLog, events: int) -> None:
        """An append asks for something, the first one to a partition always.

        The caller sees to it that the thread `runs`.
        """
        if events & WRITTEN:
            self._wrote.add(log)
        if events & WANT_SYNC or (events & TO_SYNC and log.stream._durability == "interval"):
            self._unsynced.add(log)
        self._asked[log] = self._asked.get(log, 0) | events
        self._wanted.ring()

    def notice_queue(self, one: QueueHandle | Group) -> None:
        """Something was changed in a queue, or a position of a group, of level "interval"."""
        self._queues.add(one)
        self._wanted.ring()

    def runs(self) -> bool:
        """Is the thread there? Starts it where it is not; False where that cannot be."""
        thread = self._thread
        if (thread is not None and thread.is_alive()) or self._stopping or self._starting.mine:
            return True  # mine: a handler in the middle of this very call
        try:
            with self._starting:
                if (self._thread is None or not self._thread.is_alive()) and not self._stopping:
                    self._thread = thread = threading.Thread(
                        target=self._run, name="millstream", daemon=True
                    )
                    thread.start()
        except Exception as error:  # no thread, no memory, or the interpreter is ending
            self._complain("its background thread cannot be started", error)
            return False
        self._well("its background thread cannot be started", "")
        return True

    def _start_compactor(self) -> None:
        """Have the thread that compacts; later, where that cannot be now."""
        if self._starting.mine:
            return
        try:
            compactor = self._compactor
            if compactor is None:  # else it may be the thread
                with _native.loading:
                    from millstream.store.compactor import Compactor
                compactor = Compactor(self.store)
            with self._starting:
                if self._compactor is None:
                    self._compactor = compactor
                if not self._stopping and not self._compactor.is_alive():
                    self._compactor.start()
        except Exception as error:
            self._complain("its thread for compaction cannot be started", error)
            self._wanted.ring()
            self.runs()
        else:
            self._well("its thread for compaction cannot be started", "")

    @property
    def trouble(self) -> str:
        """What the threads fail at now; "": at nothing."""
        for (what, where), why in self._troubles.copy().items():
            return f"{where + ': ' if where else ''}{what}: {why}"
        return ""

    def _well(self, what: str, where: str) -> None:
        if self._troubles:
            self._troubles.pop((what, where), None)

    def _ill(self, what: str, where: str, error: BaseException) -> None:
        """Note why something failed; in the log, when that is news."""
        why = str(error) or type(error).__name__
        if not isinstance(error, MillstreamError):
            why = repr(error)
        before = self._troubles.get((what, where))
        self._troubles[what, where] = why
        if before != why and not self._stopping:
            say(f"{where}: {what} in the background failed: {why}")

    def _complain(self, trouble: str, error: Exception) -> None:
        """Report a thread that cannot be started: to `stats`, and once as a warning."""
        self._troubles[trouble, ""] = str(error) or type(error).__name__
        if self._warned:
            return
        self._warned = True
        text = (
            f"{self.store.path}: {trouble}: {error}; until it can be, whoever appends or puts at"
            " level interval syncs, and retention and compaction stand still"
        )
        try:
            warnings.warn(text, MillstreamWarning, stacklevel=2)
        except Exception:  # the filters say "error", or nothing can be imported to show it
            say(text)

    def stop(self) -> None:
        """End the threads; what they were at is finished, or left for the next run."""
        self._stopping = True
        if self._compactor is not None:
            self._compactor.stop()
        self._wanted.ring()
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            _native.join(thread)
        self._thread = None

    def go_on(self) -> None:
        """The store is not closed after all."""
        self._stopping = False
        self._thread = None  # one that was told to end does
        self._compactor = None
        for stream in self._streams():
            self.watch(stream)
        if self._logs and self.store.writable:
            self._wanted.ring()
            self.runs()

    def let_go(self) -> None:
        """Hold no queue or group any more: the store is closed."""
        self._queues.clear()

    def _run(self) -> None:
        me = threading.current_thread()  # once: each call takes memory
        while not self._stopping and self._thread is me:
            try:
                self._await()
                if not self._stopping:
                    self._round()
                self._well("a round", self.store.path)
            except BaseException as error:  # whatever it is: what is due stays due
                self._recover(error)

    def _await(self) -> None:
        """Sleep until somebody rings, or something is due; not at all where somebody has rung."""
        pause = self._pause()
        if self._wanted.rung == self._answered:
            if pause is None:
                self._wanted.sleep(self._answered)
            else:
                self._wanted.wait(self._answered, pause)
        self._answered = self._wanted.rung

    def _recover(self, error: BaseException) -> None:
        with contextlib.suppress(BaseException):
            time.sleep(PAUSE_SECONDS)
            self._ill("a round", self.store.path, error)

    def _round(self) -> None:
        """Do all that is due."""
        for log, events in self._take():
            if not self._attempt("preparing space", log, self._prepare, log, events):
                self._again[log] = self._again.get(log, 0) | events
                self._again_at = time.monotonic() + AGAIN_SECONDS
            if events & ROLLED:
                self._attempt("checking its size", log, self._check_growth, log)
        now = time.monotonic()
        if (self._unsynced or self._queues) and now - self._synced_at >= SYNC_SECONDS:
            self._synced_at = now
            self._sync_all()
        if self._sealed_unsynced and now - self._sealed_at >= SEALED_SECONDS:
            self._sync_sealed()
        if now - self._noted_at >= NOTE_SECONDS:
            self._noted_at = now
            self._note_time()
        if self._has_journal and now >= self._journal_due:
            self._journal_due = now + JOURNAL_SECONDS
            self._apply_waiting()
        if self._compactor is not None:
            self._start_compactor()
        if self._retention_due(now):
            self._retained_at = now
            for stream in {stream.name: stream for stream in self._streams()}.values():
                self._retain(stream)

    def _take(self) -> list[tuple[PartitionLog, int]]:
        taken = []
        if self._again and time.monotonic() >= self._again_at:
            for log, events in self._again.items():
                self._asked[log] = self._asked.get(log, 0) | events
            self._again.clear()
        while self._asked:
            taken.append(self._asked.popitem())
        return [(log, events) for log, events in taken if not self._is_gone(log)]

    def _pause(self) -> float | None:
        """Seconds until something is due by the clock; None: nothing."""
        now = time.monotonic()
        unsynced = self._unsynced or self._queues
        due = [self._synced_at + SYNC_SECONDS - now] if unsynced else []
        if self._again:
            due.append(self._again_at - now)
        if self._sealed_unsynced:
            due.append(self._sealed_at + SEALED_SECONDS - now)
        if self._has_journal:
            due.append(self._journal_due - now)
        if self._has_retention():
            due.append(self._retained_at + RETENTION_SECONDS - now)
        if self._compactor is not None and not self._compactor.is_alive():
            due.append(RETENTION_SECONDS)
        return max(0.0, min(due)) if due else None

    def _has_retention(self) -> bool:
        return any(
            keep.bytes is not None or keep.age is not None or keep.records is not None
            for keep in (stream._retention for stream in self._streams())
        )

    def _streams(self) -> list[Stream]:
        return list(self.store._streams)

    def _retain(self, stream: Stream) -> None:
        try:
            stream._keep_up()
            for index in range(stream.partitions):
                if (stream, index) not in self._tried:
                    self._tried.add((stream, index))
                    stream._partition(index)
        except Exception as error:
            say(f"{stream!r}: {error}", warn=False)  # the next call that needs it raises the same
        for log in stream._opened():
            self._attempt("retention", log, stream._retire, log)

    def _note_time(self) -> None:
        """Note how late it is, so that the next boot has to ask the wall clock for less.

        This thread has ended when the descriptor is closed.
        """
        try:
            self.store.session.members.note_time(*self.store.session.clock.note())
        except (MillstreamError, OSError) as error:
            say(f"{self.store!r}: noting the time: {error}", warn=False)  # the last one counts

    def _apply_waiting(self) -> None:
        """Apply what has waited since the last time."""
        store = self.store
        # Whoever closes the store has its lock, and waits for this thread.
        if not store._lock.acquire(blocking=False):
            return
        try:
            if not store.closed:
                self._journal_seen = store._transactions.journal().apply_waiting(self._journal_seen)
        except Exception as error:
            say(f"{store!r}: {error}", warn=False)  # the next commit raises the same
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
        except Exception as error:
            if not self._is_gone(log):
                self._ill(what, str(log), error)
            return False
        else:
            self._well(what, str(log))
        finally:
            if self._is_gone(log):  # what was mapped after its handle let go
                self._unsynced.discard(log)
                log.segments.forget()
        return True

    @staticmethod
    def _is_gone(log: PartitionLog) -> bool:
        """Was its stream dropped or closed meanwhile?"""
        return log.stream.closed or log.stream._state != 1

    # --- space ------------------------------------------------------------------------------------

    def _prepare(self, log: PartitionLog, events: int) -> None:
        native = log.native
        if events & ROLLED and log not in self._unsynced:
            if not self._sealed_unsynced:
                self._sealed_at = time.monotonic()
            self._sealed_unsynced.add(log)
        if events & SPARE and native.next is None:
            log.provide_next()
        if events & ROLLED:
            self._trim(log)
        if events & PREPARE and log.ahead.folios is False:
            self._populate(log)

    @staticmethod
    def _check_growth(log: PartitionLog) -> None:
        growth.check(log.stream)

    def _populate(self, log: PartitionLog) -> None:
        """Fault pages in ahead of the tail, where this process appended lately."""
        native = log.native
        segment, tail = native.active, native.tail
        if segment is None or not segment.activated:
            return
        now = time.monotonic()
        asked, populated = self._pace.get(log, (0.0, 0))
        if now - asked > LATELY_SECONDS:
            # Slow so far: a populated page is a dirty page, so wait for some more appends.
            self._pace[log] = (now, 0)
            native.set_ready(tail + POPULATE_LOW + WARM_BYTES)
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
            native.set_ready(end)

    def _trim(self, log: PartitionLog) -> None:
        """Punch out the unused ends of segments that have a successor."""
        numbers = log.segments.current()
        done = self._trimmed.get(log, 0)
        for number, following in pairwise(numbers):
            if number > done:
                with contextlib.suppress(NotFound):  # retired meanwhile
                    log.segments.segment(number, write=True).remove_behind(
                        log.segments.base(following)[0]
                    )
                self._trimmed[log] = number

    # --- syncing ----------------------------------------------------------------------------------

    def _sync_all(self) -> None:
        for one in list(self._queues):
            self._queues.discard(one)
            try:
                one._sync_in_background()
            except Exception as error:
                if not (one.closed or one._state != 1):
                    self._queues.add(one)
                    self._ill("syncing", one.path, error)
                    continue
                # It was dropped or closed meanwhile: nothing of it is left to be synced.
            self._well("syncing", one.path)
        for log in list(self._unsynced):
            log.native.take_written()
            if log.native.durable >= log.native.tail or log.native.poison:
                self._unsynced.discard(log)
                self._well("syncing", str(log))
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
        """Sync all; (whether all went well, what failed of what this process wrote)."""
        well = True
        failed: list[Exception] = []
        for log in self._logs:
            try:
                if log.native.walked == self.store.session.generation and log.stream._state == 1:
                    log.sync()
            except Exception as error:
                if not is_ours(error):
                    raise
                well = False
                if log in self._wrote:
                    failed.append(error)
        return well, failed
