"""A store: one directory that any number of processes open at once.

A third of this file is what its methods promise; most of what they do is in the files beside it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import stat
import warnings
import weakref
from functools import partial

from millstream import _native, address
from millstream.disk import files, reserve
from millstream.disk.clock import StoreClock
from millstream.disk.members import Members, no_store, refuse_strangers, require
from millstream.disk.session import Session, State
from millstream.errors import (
    Closed,
    CorruptBatch,
    InvalidArgument,
    NotFound,
    Reentered,
    StorageError,
    StoreFull,
    Unsupported,
    each_of,
)
from millstream.log import settings
from millstream.log.settings import JOURNAL
from millstream.options import boolean, check_timeout, parse_bytes
from millstream.store.background import Background
from millstream.store.queues import Queues
from millstream.store.streams import Streams
from millstream.store.transactions import Transactions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Any, Literal, TypeAlias

    from millstream.capabilities import Capabilities
    from millstream.log.settings import OnMismatch
    from millstream.options import Compaction, Durability, Retention, RetryPolicy
    from millstream.queues.queue import Queue
    from millstream.store.advice import Advice
    from millstream.store.mirror import Mirror
    from millstream.store.relay import Relay
    from millstream.store.stats import StoreProcess, StoreStats
    from millstream.streams.stream import Stream
    from millstream.transactions.pipe import Pipe
    from millstream.transactions.transaction import Transaction

    Mode: TypeAlias = Literal["rw", "r"]
    Place: TypeAlias = tuple[str, int, int, str]
    """Boot, device, inode and id of the store."""

__all__ = ["Store", "open", "temporary"]

GATE_SECONDS = 30.0
CLOSE_TRIES, CLOSE_PAUSE = 20, 0.05  # a second in all: what a finalizer of ours may take


class Store:
    """A directory of streams and queues, shared with every other process that has it open.

    Made by `millstream.open`.

    Use it in a `with`: the end of the block closes it. Thread-safe. After a fork the child must
    open it again.

    Attributes:
        path: the directory.
        durability: the stored level, what an append has survived when it returns, where stream or
            call say nothing else.
    """

    def __init__(
        self,
        directory: files.Directory,
        mode: Mode,
        durability: Durability | None,
        force: bool,
        timeout: float,
        create: bool = True,
    ) -> None:
        _native.see_greenlets()
        self.path = directory.text
        self.writable = mode == "rw"
        self._mode = mode
        self._force = force
        self._gate_seconds = GATE_SECONDS
        self.needs_recovery = False
        """A read-only store was not closed cleanly, nor opened to write since."""
        session = Session(directory, durability or "interval", writable=self.writable)
        self.session = session  # while it is not open, close() finds nothing to do
        try:
            self._check_place(create)
            session.layered = files.check_file_system(session.root, force=force) == "overlay"
            ours = (session.root / "members", session.config_path)
            if self.writable and not any(map(files.exists, ours)):
                refuse_strangers(session.root, force=force)  # before we make one of ours
            if session.layered and self.writable and not force:
                reserve.lend(session.root, files.check_upper_layer, session.root)
            session.members = Members(session.root, write=self.writable)
        except BaseException:
            session.close()
            raise
        self._lock = _native.Lock(f"{self.path}: the store", session.members, reentrant=True)
        self._streams = Streams(self, session, self._lock)
        self._queues = Queues(self, session, self._lock)
        session.undecided = self._transactions = Transactions(self, session, self._lock)
        session.notices = self._background = Background(self)
        try:
            session.members.enter_gate(timeout)
            try:
                if self.writable:
                    self._open_writable(durability)
                else:
                    self._open_readable(durability)
            finally:
                session.members.leave_gate()
        except BaseException:
            session.state = State.CLOSED
            self._background.stop()  # which the replay of a journal may have begun
            self._let_go()
            raise
        session.state = State.OPEN
        OPEN[id(self)] = weakref.ref(self)

    @property
    def durability(self) -> Durability:
        """The stored level."""
        return self.session.durability

    def _check_place(self, create: bool) -> None:
        if not self.writable or not create:
            require(self.session.root)
        if not self.writable:
            return
        bits = files.mode(self.session.root)
        if bits & stat.S_IWOTH and not bits & stat.S_ISVTX and not self._force:
            raise Unsupported(
                f"{self.path}: every user of this machine can write there; take that right away"
                " (chmod o-w), or pass force=True"
            )

    def _open_writable(self, durability: Durability | None) -> None:
        first = not self.session.members.anyone()
        if not files.exists(self.session.config_path):
            if not first:
                raise StorageError(
                    2, "is missing while processes have the store open", self.session.config_path
                )
            self._create(durability)
        else:
            self._load(durability, first=first)
            if first:
                reserve.lend(self.session.root, self.session.members.prepare, self.session.id)
                self._open_first()
        self.session.members.claim(self.session.id)
        if first:
            reserve.make(self.session.root)
            self.session.state = State.REPLAYING
            self._transactions.replay()

    def _create(self, durability: Durability | None) -> None:
        refuse_strangers(self.session.root, force=self._force)
        self.session.id = os.urandom(16)
        self.session.generation = 1
        self.session.clean = True
        self.session.clock = StoreClock()
        self.session.members.prepare(self.session.id)
        files.make_directory(self.session.root / "streams")
        self._save(clean=False)

    def _load(self, durability: Durability | None, *, first: bool) -> None:
        body = files.read_json(self.session.config_path)
        try:
            self.session.id = bytes.fromhex(body["store_id"])
            self.session.generation = int(body["generation"])
            self.session.clean = bool(body["clean"])
            self.session.durability = settings.check_durability(body["durability"]) or "interval"
            noted = self.session.members.noted_time()
            self.session.clock = StoreClock(
                body.get("clock"), noted, joins=not first, clean=self.session.clean
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptBatch(
                f"{self.session.config_path}: not the configuration of a store: {error!r}",
                path=self.session.config_path,
            ) from error
        self.session.asked = durability

    def _save(self, *, clean: bool) -> None:
        body = {
            "format": files.FORMAT,
            "store_id": self.session.id.hex(),
            "generation": self.session.generation,
            "clean": clean,
            "durability": self.session.durability,
            "clock": self.session.clock.state(),
        }
        reserve.lend(self.session.root, files.write_json, self.session.config_path, body)

    def _open_first(self) -> None:
        """Nobody else has the store open: after an unclean end, begin a new generation."""
        closed_cleanly = self.session.clean
        self.session.clean = closed_cleanly and self._streams.hold()
        if not self.session.clean:
            self.session.generation += 1
        self._save(clean=False)
        self._streams.open_first(closed_cleanly=closed_cleanly)
        self._queues.open_first()

    def _open_readable(self, durability: Durability | None) -> None:
        require(self.session.root)
        self._load(durability, first=not self.session.members.anyone())
        self.session.members.join_readers()
        if self.session.members.anyone():
            self.session.members.check(self.session.id)
        elif not self.session.clean or not self._streams.hold():
            self.needs_recovery = self.session.private = True

    def close(self) -> None:
        """Sync what this process wrote, and leave.

        Batches stay valid; calls on the handles raise `Closed`. Threads may be in calls of the
        store, and so may this one where it runs what a user gave: a function, a codec, an iterator.

        The last process to close sets the store clean, so that the next open recovers nothing.

        Raises: Reentered in a signal handler, finalizer or callback, where the call of this thread
        that it interrupted is at a place where it holds what closing needs; the error names it.
        Then the store is open still, and is to be closed when that call has returned. Calls on
        other stores do not matter. What could not be synced: StorageError, Poisoned, LockTimeout;
        the store is closed.
        """
        if self.session.inherited:
            self.session.state = State.CLOSED
            OPEN.pop(id(self), None)
            self.session.members.abandon()
            return
        self._check_may_close()
        failed = self._transactions.apply()
        refuse_reentered(failed)
        for tries_left in reversed(range(CLOSE_TRIES)):
            try:
                self._close(list(failed))
                return
            except Reentered:
                # With nothing that an outer call has, it is a finalizer in one of our own threads
                # that waited for our lock. It goes first.
                if _native.held() or _native.loading.mine or not tries_left:
                    raise
                _native.Flag().wait(CLOSE_PAUSE)

    def _close(self, failed: list[Exception]) -> None:
        """Close once nothing is left to apply; what applying has raised is raised in the end."""
        with self._lock:
            if self.session.closed:
                return
            if not self.session.temporary:
                self._recover_the_rest()
            self.session.state = State.CLOSED
            OPEN.pop(id(self), None)
            try:
                self._background.stop()
                well = self._sync_all(failed)
            except Reentered:
                self.session.state = State.OPEN
                OPEN[id(self)] = weakref.ref(self)
                self._background.go_on()
                raise
            except BaseException:
                self._let_go()
                raise
            warned = self._transactions.abandon()
            try:
                if self.writable and not self.session.temporary:
                    self._leave(well and not failed)
            finally:
                self._let_go()
            if failed or warned:
                raise (failed + warned)[0]

    def _check_may_close(self) -> None:
        """Raise in the middle of a call of this thread that would go on with what is closed."""
        if self.session.closed:
            return
        held = _native.held(self.session.members)
        if _native.loading.mine:  # closing imports, too
            held.append(_native.loading.name)
        if held:
            raise Reentered(
                f"{self.path}: closed in the middle of a call of this thread, by a signal handler,"
                f" finalizer or callback; that call has: {', '.join(held)}. Nothing was done, the"
                " store is open still: close it when that call has returned"
            )

    def _sync_all(self, failed: list[Exception]) -> bool:
        """Before leaving: sync. True: all went well; what failed is added. Reentered: not now."""
        if not self.writable or self.session.temporary:
            return True
        well, errors = self._background.sync_everything()
        refuse_reentered(errors)
        failed += errors + self._queues.sync()  # first: these may find that it cannot be now
        refuse_reentered(failed)
        failed += self._streams.sync_groups()
        refuse_reentered(failed)
        self.session.members.note_time(*self.session.clock.note())
        return well

    def _leave(self, well: bool) -> None:
        """All is synced. As the last, say that the store is clean, else the next open walks."""
        with contextlib.suppress(Reentered, StoreFull):
            self.session.members.enter_gate(self._gate_seconds)
            if well and not self.session.members.anyone():
                self._set_clean()

    def _leave_to_parent(self) -> None:
        """In a forked child: a map kept here would keep the space of what the parent removes."""
        self.session.members.abandon()
        self._streams.cache.clear()

    def _recover_the_rest(self) -> None:
        if self.writable and not self.session.inherited and not self.session.members.anyone():
            self._streams.recover_the_rest(self._handle)

    def _set_clean(self) -> None:
        """As the last: clean, if each partition is sound and synced."""
        if not self._streams.hold(checksums=False):
            return  # the next open begins a new generation, and recovers it
        self._streams.add_checksums()
        if (
            self._transactions.are_decided()
            and self._streams.sync_all()
            and self._queues.sync_all()
        ):
            self._save(clean=True)

    def _let_go(self) -> None:
        """Give up all handles, and leave."""
        self._transactions.dispose()
        self._streams.dispose()
        self._queues.dispose()
        self._background.let_go()
        self._streams.cache.clear()
        self.session.members.close()
        if self.session.temporary:
            files.remove_whole(self.session.directory)
        self.session.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "session") and not self.session.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._gate_seconds = 0.0  # the collector may run in a thread that has the gate
            try:
                self.close()
            except Reentered:  # it may run in the middle of any call
                self.session.state = State.CLOSED
                self._background._stopping = True
                OPEN.pop(id(self), None)
                self._let_go()
            except Exception:  # there is nobody to tell
                return

    def __repr__(self) -> str:
        state = " (closed)" if self.closed else "" if self.writable else " (read-only)"
        return f"<Store {self.path!r}{state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        known = self.path, self._mode, self._force, self.session.asked
        return (Store._reopened, (*known, self._place))

    @staticmethod
    def _reopened(
        path: str,
        mode: Mode,
        force: bool,
        durability: Durability | None,
        place: Place,
    ) -> Store:
        return shared(path, mode, force, durability, place)

    @property
    def _place(self) -> Place:
        """Which directory this is, wherever it lies, within this boot of the machine.

        Two file systems give the same numbers to files, and one that is mounted later may get the
        device number of an earlier one: so it says the store's id as well, which a copy shares.
        """
        return files.boot(), *self.session.directory.identity, self.session.id.hex()

    @property
    def closed(self) -> bool:
        """Is the handle closed?"""
        return self.session.closed

    @property
    def engine(self) -> str:
        """What keeps it: "file", or the name and version of a server."""
        return self.capabilities.engine

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do, by name: a `Capability` with level, note and limits.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     store.capabilities["queue.delay"].level
        'native'
        """
        with _native.loading:
            from millstream.store.capabilities import FILE
        return FILE

    def require(self, *names: str, emulated: bool = True) -> None:
        """Raise `Unsupported` where the engine lacks one of these capabilities.

        Called once at the start, so that a program fails then and not in the middle of its work.

        Args:
            names: as `capabilities` has them.
            emulated: False: what millstream would have to emulate counts as lacking.

        Raises: Unsupported, InvalidArgument for a name that is not known.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     store.require("queue.fenced_ack", "stream.transaction")
        """
        self.session.check_open()
        self.capabilities.require(*names, emulated=emulated)

    @property
    def native(self) -> Any:
        """The client below, for what is not covered here; of a directory the store itself."""
        return self

    def stream(
        self,
        name: str,
        *,
        partitions: int | None = None,
        retention: Retention | None = None,
        segment_bytes: int | str | None = None,
        durability: Durability | None = None,
        compact: Compaction | None = None,
        create: bool | None = None,
        on_mismatch: OnMismatch = "raise",
        emulate: Collection[str] = (),
    ) -> Stream:
        """Open a stream, creating it where it is not there.

        Of a stream that is there only the settings that are named here are compared. So a process
        that names none can be deployed beside one that does, whichever comes first.

        Args:
            name: 1 to 128 characters of ``A-Z a-z 0-9 . _ -``, no leading dot.
            partitions: how many, 1 to 4,096; default 1. They can be added later, never removed.
            retention: how much is kept; default everything.
            segment_bytes: size that segment files grow to, default 128 MiB.
            durability: of a new stream: stored with it; of one that is there: for this handle,
                with on_mismatch="alter" stored as well.
            compact: keep the last record of each key (see `Compaction`); default all of them.
            create: where it is not there: False raises `NotFound`, True makes it. By default it is
                made as well, but where no setting was named either, a reader that finds nothing in
                it gets a `MillstreamWarning`, once: the name may be a mistake.
            on_mismatch: where another setting is stored than named here: "raise" `ConfigMismatch`;
                "alter" it, for every process, as `alter` and `add_partitions` do (fewer partitions
                still raise); "keep" what is stored.
            emulate: capabilities, without their ``stream.``, that millstream may emulate where the
                engine has them not; a directory has all.

        Raises: ConfigMismatch where the stream is there with other settings than given; NotFound
        when it is not there, with create=False or in a read-only store; InvalidArgument,
        StorageError; Unsupported where a read-only store is to be altered.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     _ = store.stream("s", retention=millstream.Retention(age="7d"))
        ...     keep = millstream.Retention(age="30d")
        ...     store.stream("s", retention=keep, on_mismatch="alter").retention.age
        2592000.0
        """
        self.session.check_open()
        if emulate:
            self.capabilities.consent("stream", emulate)
        given = settings.given(partitions, retention, segment_bytes, compact)
        return self._streams.open(name, given, durability, create, on_mismatch)

    def streams(self) -> list[str]:
        """Names of the streams, sorted."""
        self.session.check_open()
        return self._streams.public_names()

    def drop_stream(self, name: str) -> None:
        """Remove a stream and all its records.

        Handles to it, in every process, raise `Closed` from now on.
        """
        self.session.check_writable()
        settings.check_name(name)
        self._streams.drop(name)

    def queue(
        self,
        name: str,
        *,
        capacity: int | None = None,
        priorities: int | None = None,
        slot_bytes: int | str | None = None,
        payload_bytes: int | str | None = None,
        payload_max: int | str | None = None,
        lease: float | None = None,
        ordering: Literal["key"] | None = None,
        retry: RetryPolicy | None = None,
        ttl: float | None = None,
        dedup_window: float | None = None,
        dead_limit: int | None = None,
        on_dead: Literal["skip", "stop"] | None = None,
        ageing: bool | None = None,
        codec: object = None,
        durability: Durability | None = None,
        create: bool | None = None,
        on_mismatch: OnMismatch = "raise",
        emulate: Collection[str] = (),
    ) -> Queue:
        """Open a queue, creating it where it is not there.

        Of a queue that is there only the settings that are named here are compared. So a worker
        that names `retry` can be deployed beside a web process that names nothing.

        Args:
            name: 1 to 128 characters of ``A-Z a-z 0-9 . _ -``, no leading dot.
            capacity: how many messages may be not finished; default 100,000.
            priorities: how many there are, 1 to 8; default 4.
            slot_bytes: what a message takes, with its head of 96 bytes; default 256. Longer ones
                lie in blocks.
            payload_bytes: how much the blocks may take, default 1 GiB.
            payload_max: the longest payload, default 16 MiB.
            lease: seconds for which a message is leased; default 30.
            ordering: "key": messages of one key are done one after the other, in their order.
            retry: how often, and when; default `RetryPolicy()`.
            ttl: seconds after which a message is not delivered any more; default never.
            dedup_window: seconds within which a `dedup_id` is stored once.
            dead_limit: how many dead letters are kept; default 10,000.
            on_dead: with ordering: "skip" a dead message of a key, or "stop" its key.
            ageing: let the longest waiting message come first now and then, whatever its priority.
            codec: "json", "pickle" (only where all writers are trusted), or an object with `encode`
                and `decode`; default: values are bytes. Not stored: each handle has its own.
            durability: of a new queue: stored with it; of one that is there: for this handle, with
                on_mismatch="alter" stored as well.
            create: where it is not there: False raises `NotFound`, True makes it. By default it is
                made as well, but where no setting was named either (a codec is none), whoever finds
                nothing in it gets a `MillstreamWarning`, once: the name may be a mistake.
            on_mismatch: where another setting is stored than named here: "raise" `ConfigMismatch`;
                "alter" it, for every process, as `alter` does (what that cannot change still
                raises); "keep" what is stored.
            emulate: capabilities, without their ``queue.``, that millstream may emulate where the
                engine has them not; a directory has all.

        Raises: ConfigMismatch where the queue is there with other settings than given; NotFound
        when it is not there, with create=False or in a read-only store; InvalidArgument,
        StorageError; Unsupported where a read-only store is to be altered.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     queue = store.queue("mail", capacity=1000)
        ...     _ = queue.put(b"hello")
        ...     with queue.get(timeout=5) as m:
        ...         m.value
        b'hello'
        """
        self.session.check_open()
        if emulate:
            self.capabilities.consent("queue", emulate)
        options = {
            "capacity": capacity, "priorities": priorities, "slot_bytes": slot_bytes,
            "payload_bytes": payload_bytes, "payload_max": payload_max, "lease": lease,
            "ordering": ordering, "retry": retry, "ttl": ttl, "dedup_window": dedup_window,
            "dead_limit": dead_limit, "on_dead": on_dead, "ageing": ageing,
            "durability": durability,
        }  # fmt: skip
        return self._queues.open(name, options, codec, durability, create, on_mismatch)

    def queues(self) -> list[str]:
        """Names of the queues, sorted."""
        self.session.check_open()
        return self._queues.names()

    def drop_queue(self, name: str) -> None:
        """Remove a queue and all its messages.

        Handles to it, in every process, raise `Closed` from now on.
        """
        self.session.check_writable()
        self._queues.drop(name)

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
        self.session.check_open()
        level = settings.check_durability(durability)
        return self._transactions.new(level, max_bytes)

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
        self.session.check_writable()
        holdings = self._transactions
        return Pipe(holdings, source, function, sink, group=group, batch=batch, start=start)

    def relay(self, source: Stream | Queue, *, to: str, topic: str | None = None) -> Relay:
        """Send a stream or a queue of this store to a server, and lose nothing: see `Relay`.

        A stream arrives there exactly once and in the order of its partitions, whoever is killed
        and when: each record has its offset as the sequence of a producer there. Only what survives
        a power cut is sent. A queue arrives at least once, with an id by which the server drops
        what comes twice within its window.

        Args:
            source: the stream, or the queue.
            to: the address, as ``nats://127.0.0.1:4222``; any that `open` takes.
            topic: what it is called there; default: as here. Made where it is not there.

        Returns: a `Relay`: ``run`` it, or ``start`` it in the background; close it, or use it in a
        `with`. ``millstream relay STORE NAME URL`` is one in a process of its own.

        Raises: ConfigMismatch where the target would lose records (a retention, other partitions),
        or has records that this store has not; StorageError where it cannot be reached;
        Unsupported, InvalidType.

        >>> import millstream, tempfile
        >>> with tempfile.TemporaryDirectory() as there, millstream.temporary() as store:
        ...     stream = store.stream("orders")
        ...     _ = stream.append_many([b"a", b"b"])
        ...     with store.relay(stream, to=f"file://{there}/store") as relay:
        ...         relay.run(timeout=0)
        2
        """
        with _native.loading:
            from millstream.store.relay import Relay
        self.session.check_writable()
        Relay.check(source)
        target = open(to)
        try:
            return Relay(source, target, to, topic, self.session.id.hex())
        except BaseException:
            target.close()
            raise

    def mirror(self, address: str, topic: str, *, into: Stream) -> Mirror:
        """Copy a stream of a server into one of this store, exactly once: see `Mirror`.

        Each record is appended with its offset there as the sequence of a producer here, so that a
        record and how far it is are in one batch: who is killed, whenever, goes on where it was.

        Args:
            address: of the server, as ``kafka://127.0.0.1:9092``; any that `open` takes.
            topic: the stream there, which must be there.
            into: the stream of this store, with as many partitions.

        Returns: a `Mirror`: ``run`` it, or ``start`` it in the background; close it, or use it in a
        `with`.

        Raises: ConfigMismatch, NotFound; StorageError where the server cannot be reached;
        Unsupported, InvalidType.

        >>> import millstream, tempfile
        >>> with tempfile.TemporaryDirectory() as there, millstream.temporary() as store:
        ...     with millstream.open(f"{there}/far") as far:
        ...         _ = far.stream("orders").append_many([b"a", b"b"])
        ...     stream = store.stream("orders")
        ...     with store.mirror(f"file://{there}/far", "orders", into=stream) as mirror:
        ...         mirror.run(timeout=0)
        2
        """
        with _native.loading:
            from millstream.store.mirror import Mirror
        self.session.check_writable()
        Mirror.check(into)
        source = open(address)
        try:
            return Mirror(source, address, topic, into)
        except BaseException:
            source.close()
            raise

    def flush(self, *, timeout: float | None = None) -> None:
        """Return when all that was stored here before this call survives a power cut.

        What fails keeps nothing else from being synced: the first error is raised at the end.

        Raises: Indeterminate, Poisoned, StorageError; Unsupported where the store is read-only.
        """
        self.session.check_writable()

        def flush_stream(name: str) -> None:
            with contextlib.suppress(Closed, NotFound):  # dropped meanwhile
                if name in self._streams.names():
                    self._handle(name).flush(timeout=timeout)

        def flush_queue(name: str) -> None:
            with contextlib.suppress(Closed, NotFound):
                if name in self._queues.names():
                    self.queue(name, create=False).flush(timeout=timeout)

        streams = [partial(flush_stream, name) for name in self._streams.names()]
        queues = [partial(flush_queue, name) for name in self._queues.names()]
        each_of([*streams, *queues])
        self.session.check_open()

    def _handle(self, name: str) -> Stream:
        """The handle of a stream, or of the journal."""
        if name == JOURNAL:
            return self._transactions.journal().stream
        return self.stream(name, create=False)

    def stats(self) -> StoreStats:
        """All streams, groups and queues in numbers, as of now: for who asks every second.

        Also in a store that is open to read alone. What is dropped meanwhile is left out. Of a
        thousand partitions and a hundred queues it takes some milliseconds: control blocks and
        state words are read, and files only where they changed. See `StreamStats`, `GroupStats`,
        `QueueStats`.

        Raises: as reading does: StorageError, CorruptBatch, Closed.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     _ = store.stream("flights").append(b"EWR-IAH")
        ...     _ = store.queue("mail").put(b"to ann")
        ...     stats = store.stats()
        ...     stats.health, stats.streams[0].records, stats.queues[0].put
        ('sound', 1, 1)
        """
        self.session.check_open()
        with self.session.spare, _native.loading:
            from millstream.store import stats
        return stats.of_store(self)

    def processes(self) -> list[StoreProcess]:
        """Who has the store open to write, since when, and what each holds.

        Also as a reader; readers (mode="r") themselves leave no trace and are not among them. Who
        was killed is not among them either, whether or not what it held was given to others yet.

        >>> import millstream, os
        >>> with millstream.temporary() as store:
        ...     queue = store.queue("mail")
        ...     _ = queue.put(b"to ann")
        ...     with queue.get(timeout=1):
        ...         us, = store.processes()
        ...     us.pid == os.getpid(), us.leases
        (True, {'mail': 1})
        """
        self.session.check_open()
        with _native.loading:
            from millstream.store import stats
        return stats.processes(self)

    def advice(self, *, large: int | str | None = None) -> list[Advice]:
        """Search for common mistakes in how streams and queues are used, as the files show them.

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
        self.session.check_open()
        return advice.of_store(self, None if large is None else parse_bytes(large))

    def backup(self, target: str | os.PathLike[str]) -> None:
        """Copy the store into a new directory while others go on writing.

        The copy holds, of each partition, all up to one moment, and of each queue what was not
        finished, each message as of a moment of the copying; of a transaction all or nothing (they
        wait while queues are copied). What another process drops meanwhile is left out. Its first
        open verifies it. It is synced when this returns.
        Where it raises it leaves nothing of a copy; a process that is killed leaves no store.

        Raises: StorageError where the target is there and not empty; StoreFull; Unsupported where
        a store with transactions was opened with mode="r", and others have it open to write.
        """
        with _native.loading:
            from millstream.store import backup
        self.session.check_open()
        backup.backup(self, files.absolute(address.directory(target)))


def refuse_reentered(errors: list[Exception]) -> None:
    """Raise what says that nothing can be done in the middle of a call."""
    for error in errors:
        if isinstance(error, Reentered):
            raise error


OPEN: dict[int, weakref.ref[Store]] = {}
"""Every change of it, and `_all_open`, is one call of C: others open and close meanwhile."""
_shared: dict[tuple[str, str, Durability | None], Store] = {}
_sharing = _native.Lock("opening a store that handles share")


def _all_open() -> list[Store]:
    found = (one() for one in list(OPEN.values()))
    return [store for store in found if store is not None]


def _forget_all() -> None:
    """In a forked child: hold nothing of the parent's stores, which are closed here."""
    stores = _all_open()
    OPEN.clear()
    for store in stores:
        store._leave_to_parent()


os.register_at_fork(after_in_child=_forget_all)


@atexit.register
def _close_all() -> None:
    """At exit: sync and leave, so that an orderly end is a clean one."""
    for store in _all_open():
        with contextlib.suppress(Exception):
            store.close()


def open(
    path: str | os.PathLike[str],
    *,
    durability: Durability | None = None,
    mode: Mode = "rw",
    force: bool = False,
    create: bool = True,
    timeout: float | None = None,
) -> Store:
    """Open the store in a directory, creating it where there is none; or that of a server.

    Any number of processes at once.

    Args:
        path: the directory, also as ``file:///path``. Created 0700, its files 0600. Or the address
            of a server, such as ``nats://127.0.0.1:4222``: see `millstream.engines`, whose `Store`
            it then is, with the capabilities that it says.
        durability: "process", "interval" or "sync": what an append has survived when it returns. A
            new store stores it, "interval" by default; for one that is there it holds for this
            handle.
        mode: "rw", or "r": changes no byte, and needs no right to write.
        force: accept a file system, or a directory, that is refused otherwise.
        create: False: raise `NotFound` where there is no store.
        timeout: seconds to wait for others that are opening or closing; default 30.

    Raises: NotFound (no store, with mode "r" or create=False), Unsupported (file system),
    InvalidArgument (an address with a scheme that is not known), StorageError, LockTimeout,
    CorruptBatch (a damaged configuration file), VersionMismatch. Of a server: StorageError where
    it cannot be reached or refuses, Unsupported where it is too old or its client is not installed.

    >>> import millstream, tempfile
    >>> with tempfile.TemporaryDirectory() as directory, millstream.open(directory) as store:
    ...     store.stream("s").append(b"hello").offset
    0
    """
    given: object = mode
    if not isinstance(given, str) or given not in ("rw", "r"):
        raise InvalidArgument(f'mode {mode!r}: expected "rw" or "r"')
    settings.check_durability(durability)
    checked = check_timeout(timeout)
    may_create = boolean("create", create)
    opener = address.opener(path)
    if opener is not None:
        return cast_store(
            opener(path, durability=durability, mode=mode, create=create, timeout=checked)
        )
    directory = files.absolute(address.directory(path))
    if mode == "rw" and may_create:
        files.make_directories(directory)
    seconds = GATE_SECONDS if checked is None else checked
    try:
        held = files.Directory(directory, follow=True)
    except NotFound as error:
        raise no_store(directory) from error
    return Store(held, mode, durability, force, seconds, may_create)


def cast_store(found: Any) -> Store:
    """The store of another engine, typed as that of a directory: programs change the address."""
    store: Store = found
    return store


def shared(
    path: str,
    mode: Mode,
    force: bool,
    durability: Durability | None = None,
    place: Place | None = None,
) -> Store:
    """The store behind handles that were unpickled in this process: one for each directory.

    `place` says which directory that was, in this boot: another one that has its name by now is
    refused, and none is made.
    """
    key = mode, durability
    with _sharing:
        for known in [*_shared.values(), *_all_open()]:
            same = known.path == path if place is None else known._place == place
            if same and not known.closed and (known._mode, known.session.asked) == key:
                return known
        store = _shared[path, mode, durability] = _reopen(path, mode, force, durability, place)
        return store


def _reopen(
    path: str, mode: Mode, force: bool, durability: Durability | None, place: Place | None
) -> Store:
    if place is None or place[0] != files.boot():
        return open(path, mode=mode, force=force, durability=durability)
    with contextlib.suppress(NotFound):
        directory = files.Directory(path, follow=True)
        if (*directory.identity, _id_in(directory)) == place[1:]:
            return Store(directory, mode, durability, force, GATE_SECONDS)
        directory.close()
    raise StorageError(
        errno.ESTALE,
        "is not there any more: the directory of the store that was pickled was moved or replaced;"
        " open the store where it is now, and make the handle anew",
        path,
    )


def _id_in(directory: files.Directory) -> str | None:
    try:
        return str(files.read_json(directory.path / "store.json").get("store_id"))
    except NotFound:
        return None


def temporary(*, durability: Durability | None = None) -> Store:
    """A store in a temporary directory that goes when it is closed. Nothing in it is ever synced.

    >>> import millstream
    >>> with millstream.temporary() as store:
    ...     store.streams()
    []
    """
    settings.check_durability(durability)
    # Within the lock: a fork waits for it, since `tempfile` has one that a child would keep.
    with _native.loading, files.reporting("a temporary directory", "making it"):
        import tempfile

        directory = tempfile.mkdtemp(prefix="millstream-")
    try:
        store = open(directory, durability=durability)
    except BaseException:
        files.remove_whole(files.Directory(directory))
        raise
    store.session.temporary = True
    return store


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Store.__module__ = "millstream"
open.__module__ = "millstream"
temporary.__module__ = "millstream"
Store._reopened.__module__ = "millstream"
