"""The transactions of a store: what `Store` does for them, its journal among it. Imported late."""

from __future__ import annotations

import contextlib
from functools import partial

from millstream import _native
from millstream.disk import files
from millstream.errors import Closed, NotFound, Reentered, Unsupported, each_of, is_ours
from millstream.log import settings
from millstream.options import parse_bytes
from millstream.store.groups import StoreGroups

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from millstream.disk.members import Members
    from millstream.groups.group import Group
    from millstream.log.cache import SegmentCache
    from millstream.options import Durability
    from millstream.queues.queue import Queue
    from millstream.store.advice import Advice
    from millstream.store.store import Store
    from millstream.streams.stream import Stream
    from millstream.transactions.journal import Journal
    from millstream.transactions.pipe import Pipe
    from millstream.transactions.transaction import Transaction

__all__ = ["StoreTransactions"]

JOURNAL = "@journal"


class StoreTransactions(StoreGroups):
    """Base of `millstream.Store`."""

    _open_journal: Journal | None
    _replaying: bool
    _remove_when_closed: bool
    _transactions: set[Transaction]
    """Those that are open."""
    _cache: SegmentCache
    _members: Members
    _directory: files.Directory
    _gate_seconds: float
    _closed: bool

    def transaction(
        self, *, durability: Durability | None = None, max_bytes: int | str = 64 << 20
    ) -> Transaction:
        """Change streams, queues and positions of consumers all at once, or not at all.

        In its `with`, ``append``, ``append_many``, ``put``, ``ack`` and ``commit`` say what is to
        be done; the end of the block does it, and an exception in the block lets it be. Nobody sees
        anything of it before, nor parts of it after a kill.

        Args:
            durability: "sync" and "interval": when the block ends the transaction survives a power
                cut, as a whole; default: the store's. "process": it survives the death of any
                process; a power cut may leave parts of what was not synced yet.
            max_bytes: bound of what it keeps in memory; default 64 MiB.

        Raises, at the end of the block: Aborted where a lease or an assignment was lost, QueueFull,
        StoreFull (nothing was done); Indeterminate (``committed`` says if it is known to be).

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     jobs, done = store.queue("jobs"), store.stream("done")
        ...     _ = jobs.put(b"7")
        ...     message = jobs.get(timeout=5)
        ...     with store.transaction() as tx:
        ...         tx.append(done, b"49")
        ...         tx.ack(message)
        ...     len(jobs), done.next_offset(0)
        (0, 1)
        """
        with _native.loading:
            from millstream.transactions.transaction import Transaction
        self._check_open()
        store: Store = self  # type: ignore[assignment]
        return Transaction(store, settings.check_durability(durability), max_bytes)

    def pipe(
        self,
        source: Stream | Queue,
        function: Callable[[Any], Any],
        sink: Stream | Queue | dict[str, Stream | Queue],
        *,
        group: str = "pipe",
        batch: int = 100,
        start: Any = "earliest",
    ) -> Pipe:
        """Consume, process, produce and acknowledge exactly once: a loop to run.

        Args:
            source: a stream, whose records ``function`` gets, or a queue, whose messages it gets.
            function: returns what is to be put out: None, a value, or a list of values; where
                `sink` is a dict, a dict of names to these. In place of a value, for a stream, a
                dict of the arguments of `append` (``value``, ``key``, ...); for a queue a `Put`.
            sink: a stream, a queue, or a dict of names to them.
            group: the consumer group, of a source that is a stream.
            batch: at most so many records or messages in one transaction.
            start: where a new group begins.

        Returns: a `Pipe`: ``run`` it, in as many processes as there is work for.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     numbers, squares = store.stream("numbers"), store.queue("squares")
        ...     _ = numbers.append_many([b"2", b"3"])
        ...     with store.pipe(numbers, lambda r: b"%d" % int(r.value) ** 2, squares) as pipe:
        ...         _ = pipe.run(timeout=0)
        ...     [m.value for m in squares.get_many(10)]
        [b'4', b'9']
        """
        with _native.loading:
            from millstream.transactions.pipe import Pipe
        self._check_writable()
        store: Store = self  # type: ignore[assignment]
        return Pipe(store, source, function, sink, group=group, batch=batch, start=start)

    def flush(self, *, timeout: float | None = None) -> None:
        """Return when all that was stored here before this call survives a power cut.

        What fails keeps nothing else from being synced: the first error is raised at the end.
        """

        def flush_stream(name: str) -> None:
            with contextlib.suppress(Closed, NotFound):  # dropped meanwhile
                if name in self._names():
                    self._handle(name).flush(timeout=timeout)

        def flush_queue(name: str) -> None:
            with contextlib.suppress(Closed, NotFound):
                if name in self._queue_names():
                    self.queue(name, create=False).flush(timeout=timeout)

        streams = [partial(flush_stream, name) for name in self._names()]
        queues = [partial(flush_queue, name) for name in self._queue_names()]
        each_of([*streams, *queues])
        self._check_open()

    def advice(self, *, large: int | str | None = None) -> list[Advice]:
        """Look for common mistakes in how streams and queues are used, as the files show them.

        Changes nothing. Reads figures that are kept anyway, and of each stream and queue a sample
        of what is in it: some milliseconds each. Nothing found is no proof that all is well.

        Args:
            large: bytes from which on a stream with neither retention nor compaction is pointed
                out; default 1 GiB. A tenth of the disk that is free is always large.

        Returns: an `Advice` for each, streams first; docs/guide/queue_or_stream.md says more.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     queue = store.queue("small", capacity=10)
        ...     _ = queue.put_many([b"x"] * 12)
        ...     [(one.kind, one.where, one.figure) for one in store.advice()]
        [('back-pressure ignored', 'queue small', 1.0)]
        """
        with _native.loading:
            from millstream.store import advice
        self._check_open()
        store: Store = self  # type: ignore[assignment]
        return advice.of_store(store, None if large is None else parse_bytes(large))

    # --- the journal ------------------------------------------------------------------------------

    def _journal(self) -> Journal:
        """The journal, made by the first transaction."""
        with self._lock:
            if self._open_journal is None:
                with _native.loading:
                    from millstream.transactions.journal import Journal
                made = Journal(self)  # type: ignore[arg-type]
                if self._open_journal is None:  # a handler may have come between
                    self._open_journal = made
            return self._open_journal

    def _check_undecided(self) -> None:
        """Raise where this thread is in the middle of a commit, for which it would wait."""
        if self._open_journal is not None and self._open_journal.holding().mine:
            raise Reentered(
                f"{self.path}: needs what a transaction of this thread is about to commit: a signal"
                " handler, finalizer or callback calls in the middle of it"
            )

    @staticmethod
    def _import_journal() -> None:
        """For the background, which imports nothing: all that applying may take."""
        with _native.loading:
            from millstream import codecs  # noqa: F401
            from millstream.queues import queue, slots  # noqa: F401
            from millstream.queues import settings as queue_settings  # noqa: F401
            from millstream.transactions import journal  # noqa: F401

    def _has_journal(self) -> bool:
        return files.exists(self._stream_path(JOURNAL))

    @contextlib.contextmanager
    def _between_transactions(self) -> Iterator[bool]:
        """All that is committed is applied, and nobody commits meanwhile.

        False: for a reader, of a store that nobody has open, in which there may be something to do.
        """
        if not self._has_journal():
            yield True
            return
        if not self.writable:
            with self._at_rest() as is_done:
                yield is_done
            return
        journal = self._journal()
        with journal.holding():
            journal.apply_pending()
            yield True

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[bool]:
        """For a reader, who cannot apply anything: nobody has the store open, nor comes in.

        Is all done that is committed?
        """
        with _native.loading:
            from millstream.transactions import journal
        self._members.enter_gate(self._gate_seconds)
        try:
            if self._members.anyone():
                raise Unsupported(
                    f"{self.path}: has transactions, which must not commit meanwhile, and other"
                    " processes have it open: open it to write"
                )
            yield journal.is_done(self)  # type: ignore[arg-type]
        finally:
            self._members.leave_gate()

    def _replay_journal(self) -> None:
        """As the first opener, before anybody else can come in."""
        if self._has_journal():
            self._replaying = True
            try:
                self._journal().replay()
            finally:
                self._replaying = False

    def _abandon_transactions(self) -> list[Exception]:
        """Those that are open when the store is closed: nothing of them is done.

        Returns: the warnings of it that are errors.
        """
        raised: list[Exception] = []
        for transaction in list(self._transactions):
            try:
                transaction._abandon()
            except Warning as warning:
                raised.append(warning)
        return raised

    def _settle_journal(self) -> list[Exception]:
        """Before closing: what is committed is applied. What failed.

        Without the lock, which whoever has the journal may wait for to open what he applies to.
        """
        if self._closed or not self.writable or self._remove_when_closed:
            return []
        if not self._has_journal():
            return []
        try:
            with self._lock:
                self._check_open()
                journal = self._journal()
            if not journal.is_settled:  # also where a dead process had committed
                with journal.holding():
                    journal.apply_pending()
        except Exception as error:
            if not is_ours(error):
                raise
            return [error]
        return []

    def _decide_position(self, group: Group, partition: int) -> None:
        """A transaction has marked the position of a partition: is it committed?"""
        self._journal().settle_position(group, partition)

    def _dispose_journal(self) -> None:
        if self._open_journal is not None:
            with contextlib.suppress(Exception):
                self._open_journal.dispose()
            self._open_journal = None

    def _settle_queues(self) -> bool:
        if self._has_journal():
            with _native.loading:
                from millstream.queues import slots
            if not self._journal().is_settled:  # who committed last was killed before it applied
                return False

            if any(slots.has_undecided(self._queue_path(name)) for name in self._queue_names()):
                return False
        return super()._settle_queues()

    def _handle(self, name: str) -> Stream:
        store: Store = self  # type: ignore[assignment]
        return self._journal().stream if name == JOURNAL else store.stream(name, create=False)

    def _let_go(self) -> None:
        """Give up all handles, and leave."""
        store: Store = self  # type: ignore[assignment]
        self._dispose_journal()
        for stream in self._streams.values():
            stream._dispose()
        for queue in self._queues.values():
            queue._dispose()
        self._queues = {}  # their maps go with the last who holds them
        store._background.let_go()
        self._cache.clear()
        self._members.close()
        if self._remove_when_closed:
            files.remove_whole(self._directory)
        self._directory.close()
