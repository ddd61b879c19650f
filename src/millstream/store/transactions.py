"""The transactions of a store: the open ones, and their journal. Imported late, like queues."""

from __future__ import annotations

import contextlib

from millstream import _native
from millstream.disk import files
from millstream.errors import Reentered, Unsupported, is_ours
from millstream.log.settings import JOURNAL
from millstream.streams.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from millstream.disk.session import Session
    from millstream.groups.group import Group
    from millstream.options import Durability
    from millstream.queues.handle import QueueHandle
    from millstream.queues.queue import Queue
    from millstream.store.store import Store
    from millstream.transactions.journal import Journal
    from millstream.transactions.transaction import Transaction

__all__ = ["Transactions"]


class Transactions:
    """What is under way; for queues and groups the `Undecided`, for these the `Holdings`."""

    def __init__(self, store: Store, session: Session, lock: _native.Lock) -> None:
        self._store, self.session, self._lock = store, session, lock
        self.under_way: set[Transaction] = set()
        self._journal: Journal | None = None
        self._kind: type[Transaction] | None = None

    def new(self, level: Durability | None, max_bytes: int | str) -> Transaction:
        """One more of them."""
        if self._kind is None:
            with _native.loading:
                from millstream.transactions.transaction import Transaction
            self._kind = Transaction
        return self._kind(self, level, max_bytes)

    # --- what transactions ask of the store -------------------------------------------------------

    def stream(self, name: str) -> Stream:
        """A stream that is there."""
        return self._store.stream(name, create=False)

    def queue(self, name: str) -> Queue:
        """A queue that is there."""
        return self._store.queue(name, create=False)

    def stream_names(self) -> list[str]:
        """Names of all streams, the journal among them."""
        return self._store._streams.names()

    def queue_names(self) -> list[str]:
        """Names of all queues."""
        return self._store._queues.names()

    def open_queues(self) -> Iterator[Queue]:
        """The handles that are there."""
        return iter(self._store._queues)

    def flush(self) -> None:
        """Sync all."""
        self._store.flush()

    def journal_stream(self, config: dict[str, Any]) -> Stream:
        """A handle to the stream in which the journal is."""
        return Stream(self._store, JOURNAL, config, "process", self._store._streams.cache)

    # --- the journal ------------------------------------------------------------------------------

    def exist(self) -> bool:
        """Was there ever one in this store?"""
        return files.exists(self.session.stream_path(JOURNAL))

    def journal(self) -> Journal:
        """The journal, made by the first transaction."""
        with self._lock:
            if self._journal is None:
                with _native.loading:
                    from millstream.transactions.journal import Journal
                made = Journal(self)
                if self._journal is None:  # a handler may have come between
                    self._journal = made
            return self._journal

    @staticmethod
    def load() -> None:
        """Import all that applying may take, in one go, before the background begins with it."""
        with _native.loading:
            from millstream import codecs  # noqa: F401
            from millstream.queues import queue, slots  # noqa: F401
            from millstream.queues import settings as queue_settings  # noqa: F401
            from millstream.transactions import journal  # noqa: F401

    # --- what they have prepared ------------------------------------------------------------------

    def check(self) -> None:
        """Raise where this thread is in the middle of a commit, for which it would wait."""
        if self._journal is not None and self._journal.holding().mine:
            raise Reentered(
                f"{self.session.path}: needs what a transaction of this thread is about to commit:"
                " a signal handler, finalizer or callback calls in the middle of it"
            )

    def decide_queue(self, queue: QueueHandle) -> None:
        """Decide what one whose process died has prepared in a queue."""
        self.journal().decide_queue(queue)

    def decide_position(self, group: Group, partition: int) -> None:
        """The position of a partition is pending: is its transaction committed?"""
        self.journal().decide_position(group, partition)

    @contextlib.contextmanager
    def none_commits(self) -> Iterator[bool]:
        """All that is committed is applied, and nobody commits meanwhile.

        False: for a reader, of a store that nobody has open, in which there may be something to do.
        """
        if not self.exist():
            yield True
            return
        if not self.session.writable:
            with self._at_rest() as is_done:
                yield is_done
            return
        journal = self.journal()
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
        members = self.session.members
        members.enter_gate(self._store._gate_seconds)
        try:
            if members.anyone():
                raise Unsupported(
                    f"{self.session.path}: has transactions, which must not commit meanwhile, and"
                    " other processes have it open: open it to write"
                )
            yield journal.is_done(self)
        finally:
            members.leave_gate()

    # --- opening and closing ----------------------------------------------------------------------

    def replay(self) -> None:
        """As the first opener, before anybody else can come in."""
        if self.exist():
            self.journal().replay()

    def abandon(self) -> list[Exception]:
        """Those that are open when the store is closed: nothing of them is done.

        Returns: the warnings of it that are errors.
        """
        raised: list[Exception] = []
        for transaction in list(self.under_way):
            try:
                transaction._abandon()
            except Warning as warning:
                raised.append(warning)
        return raised

    def apply(self) -> list[Exception]:
        """Before closing: what is committed is applied. What failed.

        Without the lock, which whoever has the journal may wait for to open what he applies to.
        """
        session = self.session
        if session.closed or not session.writable or session.temporary or not self.exist():
            return []
        try:
            with self._lock:
                session.check_open()
                journal = self.journal()
            if not journal.is_applied:  # also where a dead process had committed
                with journal.holding():
                    journal.apply_pending()
        except Exception as error:
            if not is_ours(error):
                raise
            return [error]
        return []

    def are_decided(self) -> bool:
        """As the last: is each of them decided? A killed process may not have applied its own."""
        if not self.exist():
            return True
        return self.journal().is_applied and not self._store._queues.have_undecided()

    def dispose(self) -> None:
        """Give up the journal."""
        if self._journal is not None:
            with contextlib.suppress(Exception):
                self._journal.dispose()
            self._journal = None
