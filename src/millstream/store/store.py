"""A store: one directory that any number of processes open at once."""

from __future__ import annotations

import atexit
import contextlib
import errno
import mmap
import os
import stat
import warnings
import weakref

from millstream import _native, address
from millstream.disk import files, reserve
from millstream.disk.clock import StoreClock
from millstream.disk.members import Members, no_store, refuse_strangers, require
from millstream.errors import (
    Closed,
    CorruptBatch,
    InvalidArgument,
    MillstreamError,
    NotFound,
    Reentered,
    StorageError,
    StoreFull,
    Unsupported,
)
from millstream.log import control, settings
from millstream.log.cache import SegmentCache
from millstream.options import boolean, check_timeout
from millstream.store.background import Background
from millstream.store.transactions import JOURNAL, StoreTransactions
from millstream.streams.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal, TypeAlias

    from millstream.log.settings import OnMismatch
    from millstream.options import Compaction, Durability, Retention

    Mode: TypeAlias = Literal["rw", "r"]

__all__ = ["Store", "open", "temporary"]

GATE_SECONDS = 30.0


class Store(StoreTransactions):
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
        self._override: Durability | None = None
        self.durability: Durability = durability or "interval"
        self.needs_recovery = False
        """Of a read-only store: it was not closed cleanly, nor opened to write since."""
        self._private = False
        self._control_writable = self.writable
        self._streams: dict[tuple[str, Durability | None], Stream] = {}
        """By name and level: a handle with a level of its own is another one."""
        self._queues = {}
        self._open_journal = None
        self._transactions = set()
        self._replaying = False
        self._closed = True  # until it is open: what did not open has nothing to close
        self._fork = _native.fork_count()
        self._remove_when_closed = False
        self._gate_seconds = GATE_SECONDS
        self._directory = directory
        """Held open: what is opened later belongs to it, wherever `path` leads by then."""
        self._root = directory.path
        try:
            self._check_place(create)
            kind = files.check_file_system(self._root, force=force)
            self._layered = kind == "overlay"
            self._follows_layers = self._layered and not self.writable
            ours = (self._root / "members", self._config_path)
            if self.writable and not any(map(files.exists, ours)):
                refuse_strangers(self._root, force=force)  # before a file of ours is among theirs
            self._members = Members(self._root, write=self.writable)
        except BaseException:
            self._directory.close()
            raise
        self._cache = SegmentCache(self._members)
        self._lock = _native.Lock(f"{self.path}: the store", self._members, reentrant=True)
        self._background = Background(self)
        try:
            self._members.enter_gate(timeout)
            try:
                if self.writable:
                    self._open_writable(durability)
                else:
                    self._open_readable(durability)
            finally:
                self._members.leave_gate()
        except BaseException:
            self._background.stop()  # which the replay of a journal may have begun
            self._let_go()
            raise
        self._closed = False
        OPEN[id(self)] = weakref.ref(self)

    def _check_place(self, create: bool) -> None:
        if not self.writable or not create:
            require(self._root)
        if not self.writable:
            return
        bits = files.mode(self._root)
        if bits & stat.S_IWOTH and not bits & stat.S_ISVTX and not self._force:
            raise Unsupported(
                f"{self.path}: every user of this machine can write there; take that right away"
                " (chmod o-w), or pass force=True"
            )

    @property
    def _config_path(self) -> files.Path:
        return self._root / "store.json"

    def _open_writable(self, durability: Durability | None) -> None:
        first = not self._members.anyone()
        if not files.exists(self._config_path):
            if not first:
                raise StorageError(
                    2, "is missing while processes have the store open", self._config_path
                )
            self._create(durability)
        else:
            self._load(durability, first=first)
            if first:
                self._members.prepare(self._store_id)
                self._open_first()
        self._members.claim(self._store_id)
        if first:
            reserve.make(self._root)
            self._closed = False
            try:
                self._replay_journal()
            finally:
                self._closed = True

    def _create(self, durability: Durability | None) -> None:
        refuse_strangers(self._root, force=self._force)
        self._store_id = os.urandom(16)
        self._generation = 1
        self._clean = True
        self._clock = StoreClock()
        self.durability = durability or "interval"
        self._members.prepare(self._store_id)
        files.make_directory(self._root / "streams")
        self._save(clean=False)

    def _load(self, durability: Durability | None, *, first: bool) -> None:
        body = files.read_json(self._config_path)
        try:
            self._store_id = bytes.fromhex(body["store_id"])
            self._generation = int(body["generation"])
            self._clean = bool(body["clean"])
            self.durability = settings.check_durability(body["durability"]) or "interval"
            noted = self._members.noted_time()
            self._clock = StoreClock(body.get("clock"), noted, joins=not first, clean=self._clean)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptBatch(
                f"{self._config_path}: not the configuration of a store: {error!r}",
                path=self._config_path,
            ) from error
        self._override = durability

    def _save(self, *, clean: bool) -> None:
        body = {
            "format": files.FORMAT,
            "store_id": self._store_id.hex(),
            "generation": self._generation,
            "clean": clean,
            "durability": self.durability,
            "clock": self._clock.state(),
        }
        reserve.lend(self._root, files.write_json, self._config_path, body)

    def _open_first(self) -> None:
        """Nobody else lives here: after an unclean end, begin a new generation."""
        closed_cleanly = self._clean
        self._clean = closed_cleanly and self._all_settled()
        if not self._clean:
            self._generation += 1
        self._save(clean=False)
        files.require_directory(self._root / "streams")
        for name in files.names(self._root / "streams"):
            directory = self._root / "streams" / name
            if name.startswith("."):
                files.remove_tree(directory)  # a creation or a drop that did not end
            elif not self._clean:
                known = directory, self._store_id, self._generation, closed_cleanly
                reserve.lend(self._root, control.rebuild, *known)
        self._open_queues_first()

    def _all_settled(self, *, sealed: bool = True) -> bool:
        """Does the clean mark hold? A control file may have been damaged or lost since."""
        return all(
            control.is_settled(path, self._store_id, self._generation)
            and (control.is_sealed(path) or not sealed)
            for path in map(self._stream_path, self._names())
        )

    def _open_readable(self, durability: Durability | None) -> None:
        require(self._root)
        self._load(durability, first=not self._members.anyone())
        self._members.join_readers()
        if self._members.anyone():
            self._members.check(self._store_id)
        elif not self._clean or not self._all_settled():
            self.needs_recovery = self._private = True
            self._control_writable = True  # a private copy in memory

    def close(self) -> None:
        """Sync what this process wrote, and leave.

        Batches stay valid; calls on the handles raise `Closed`. Threads may be in calls of the
        store, and so may this one where it runs what a user gave: a function, a codec, an iterator.

        The last process to close marks the store clean, so that the next open recovers nothing.

        Raises: Reentered in a signal handler, finalizer or callback, where the call of this thread
        that it interrupted is at a place where it holds what closing needs; the error names it.
        Then the store is open still, and is to be closed when that call has returned. Calls on
        other stores do not matter. What could not be synced: StorageError, Poisoned, LockTimeout;
        the store is closed.
        """
        if self._fork != _native.fork_count():
            self._closed = True
            OPEN.pop(id(self), None)
            self._members.abandon()
            return
        self._check_may_close()
        failed = self._settle_journal()
        refuse_reentered(failed)
        with self._lock:
            if self._closed:
                return
            if not self._remove_when_closed:
                self._recover_the_rest()
            self._closed = True
            OPEN.pop(id(self), None)
            try:
                self._background.stop()
                well = self._sync_all(failed)
            except Reentered:
                self._closed = False
                OPEN[id(self)] = weakref.ref(self)
                self._background.go_on()
                raise
            except BaseException:
                self._let_go()
                raise
            warned = self._abandon_transactions()
            try:
                if self.writable and not self._remove_when_closed:
                    self._leave(well and not failed)
            finally:
                self._let_go()
            if failed or warned:
                raise (failed + warned)[0]

    def _check_may_close(self) -> None:
        """Raise in the middle of a call of this thread that would go on with what is closed."""
        if self._closed:
            return
        held = _native.held(self._members)
        if _native.loading.mine:  # closing imports, too
            held.append(_native.loading.name)
        if held:
            raise Reentered(
                f"{self.path}: closed in the middle of a call of this thread, by a signal handler,"
                f" finalizer or callback; that call has: {', '.join(held)}. Nothing was done, the"
                " store is open still: close it when that call has returned"
            )

    def _sync_all(self, failed: list[Exception]) -> bool:
        """Before leaving: did all go well? What failed is added. Reentered: it cannot be now."""
        if not self.writable or self._remove_when_closed:
            return True
        well, errors = self._background.sync_everything()
        refuse_reentered(errors)
        failed += errors + self._sync_queues()
        refuse_reentered(failed)
        self._members.note_time(*self._clock.note())
        return well

    def _leave(self, well: bool) -> None:
        """All is synced. As the last, say that the store is clean, else the next open walks."""
        with contextlib.suppress(Reentered, StoreFull):
            self._members.enter_gate(self._gate_seconds)
            if well and not self._members.anyone():
                self._mark_clean()

    def _leave_to_parent(self) -> None:
        """In a forked child: a map kept here would keep the space of what the parent removes."""
        self._members.abandon()
        self._cache.clear()

    def _recover_the_rest(self) -> None:
        """Walk what nobody used since an unclean end, so that the store can be marked clean."""
        if not self.writable or self._fork != _native.fork_count() or self._members.anyone():
            return
        try:
            names = self._names()
        except MillstreamError:  # no descriptor is left, say
            return
        for name in names:
            # It stays unclean, and the next open says why
            with contextlib.suppress(MillstreamError):
                stream = self._handle(name)
                for index in range(stream.partitions):
                    stream._log(index)

    def _mark_clean(self) -> None:
        """As the last: clean, if each partition is sound and synced."""
        if not self._all_settled(sealed=False):
            return  # the next open begins a new generation, and recovers it
        for name in self._names():
            control.seal(self._stream_path(name))
        if self._settle_queues():
            self._save(clean=True)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._fork == _native.fork_count():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._gate_seconds = 0.0  # the collector may run in a thread that has the gate
            try:
                self.close()
            except Reentered:  # it may run in the middle of any call
                self._closed = self._background._stopping = True
                OPEN.pop(id(self), None)
                self._let_go()
            except Exception:  # there is nobody to tell
                return

    def __repr__(self) -> str:
        state = " (closed)" if self.closed else "" if self.writable else " (read-only)"
        return f"<Store {self.path!r}{state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        known = self.path, self._mode, self._force, self._override
        return (Store._reopened, (*known, self._place))

    @staticmethod
    def _reopened(
        path: str,
        mode: Mode,
        force: bool,
        durability: Durability | None,
        place: tuple[str, int],
    ) -> Store:
        return shared(path, mode, force, durability, place)

    @property
    def _place(self) -> tuple[str, int]:
        """Which directory this is, wherever it lies, within this boot of the machine."""
        return files.boot(), self._directory.identity[1]

    @property
    def closed(self) -> bool:
        """Is the handle closed?"""
        return self._closed or self._fork != _native.fork_count()

    def _check_open(self) -> None:
        if self._fork != _native.fork_count():
            raise Closed(
                f"{self.path}: the store was inherited through a fork; open it again in the child"
            )
        if self._closed:
            raise Closed(f"{self.path}: the store is closed")

    def _check_writable(self) -> None:
        self._check_open()
        if not self.writable:
            raise Unsupported(f"{self.path}: the store was opened read-only (mode='r')")

    def _check_layer(self, path: str, is_behind: Callable[[], bool]) -> None:
        """Refuse a reader whose maps stayed on the lower layer of an overlay."""
        if self._follows_layers and is_behind():
            raise Closed(
                f"{path}: a process that writes has had the file copied to the upper layer of this"
                " overlay, and what is mapped here is the one below: open the store again"
            )

    def _rebuilt(self, directory: files.Path) -> bytes:
        generation, clean = self._generation, self._clean
        return control.rebuilt(directory, self._store_id, generation, clean=clean)

    def _map_control(self, directory: files.Path) -> mmap.mmap:
        if self._private:
            return _native.private_memory(self._rebuilt(directory))
        return control.map_file(directory, self._store_id, write=self.writable)

    def _stream_path(self, name: str) -> files.Path:
        return self._root / "streams" / name

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
    ) -> Stream:
        """Open a stream, creating it where it is not there.

        Of a stream that is there only the settings that are named here are looked at. So a process
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
                made as well, but where no setting was named either, who reads it and finds nothing
                gets a `MillstreamWarning`, once: the name may be a mistake.
            on_mismatch: where another setting is stored than named here: "raise" `ConfigMismatch`;
                "alter" it, for every process, as `alter` and `add_partitions` do (fewer partitions
                still raise); "keep" what is stored.

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
        self._check_open()
        settings.check_name(name)
        given = settings.given(partitions, retention, segment_bytes, compact)
        settings.check_durability(durability)
        settings.check_on_mismatch(on_mismatch)
        may_create = settings.check_create(create)
        alters = on_mismatch == "alter"
        with self._lock:
            path = self._stream_path(name) / "stream.json"
            made = not files.exists(path)
            if made:
                if files.exists(self._stream_path(name)):
                    raise CorruptBatch(
                        f"{path}: is missing, where the stream is; restore it from a backup",
                        path=path,
                    )
                if not self.writable or not may_create:
                    raise settings.missing(self.path, "stream", name, self.streams())
                config = settings.new(given, durability)
                parent = self._root / "streams"
                control.create(parent, name, config, self._store_id, self._generation)
            key = name, None if made or alters else durability
            if (known := self._streams.get(key)) and (known.closed or known._state != control.LIVE):
                self._forget(name)
                known = None
            config = files.read_json(path)
            differing = settings.differing(config, given, durability if alters else None)
            if "partitions" in differing and on_mismatch != "keep":
                settings.require_more(name, config["partitions"], differing["partitions"])
            if differing and on_mismatch == "raise":
                raise settings.mismatch(f"stream {name!r}", config, differing)
            if known is None:
                known = self._streams[key] = Stream(self, name, config, key[1])
                self._background.watch(known)  # among these the thread looks
            named = durability is not None or any(one is not None for one in given.values())
            known._is_surprise = made and create is None and not named
        if differing and alters:
            known._alter(differing)
        return known

    def _forget(self, name: str) -> None:
        """Give up the handles of a stream that was dropped."""
        for key in [key for key in self._streams if key[0] == name]:
            self._streams.pop(key)._dispose()

    def streams(self) -> list[str]:
        """Names of the streams, sorted."""
        self._check_open()
        return [name for name in self._names() if name != JOURNAL]

    def _names(self) -> list[str]:
        """The same, with the journal."""
        directory = self._root / "streams"
        files.require_directory(directory)
        names = files.names(directory)
        return sorted(name for name in names if settings.is_name(name) or name == JOURNAL)

    def drop_stream(self, name: str) -> None:
        """Remove a stream and all its records.

        Handles to it, in every process, raise `Closed` from now on.
        """
        self._check_writable()
        settings.check_name(name)
        with self._lock:
            self.stream(name, create=False)._set_state(control.DROPPED)
            gone = self._root / "streams" / f".{name}-{os.urandom(4).hex()}.dropped"
            try:
                files.rename(self._stream_path(name), gone)
            except StorageError as error:
                if files.exists(self._stream_path(name)):
                    raise
                raise NotFound(f"{self.path}: another process dropped {name!r}") from error
            files.sync_directory(self._root / "streams")
            self._forget(name)
            files.remove_tree(gone)

    def backup(self, target: str | os.PathLike[str]) -> None:
        """Copy the store into a new directory while others go on writing.

        The copy holds, of each partition, all up to one moment, and of each queue what was not
        finished, each message as of a moment of the copying; of a transaction all or nothing (they
        wait while queues are copied). Its first open verifies it. It is synced when this returns.
        Where it raises it leaves nothing of a copy; a process that is killed leaves no store.

        Raises: StorageError where the target is there and not empty; StoreFull; Unsupported where
        a store with transactions was opened with mode="r", and others have it open to write.
        """
        with _native.loading:
            from millstream.store import backup
        self._check_open()
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
    """Open the store in a directory, creating it where there is none.

    Any number of processes at once.

    Args:
        path: the directory, also as ``file:///path``. Created 0700, its files 0600.
        durability: "process", "interval" or "sync": what an append has survived when it returns. A
            new store stores it, "interval" by default; for one that is there it holds for this
            handle.
        mode: "rw", or "r": changes no byte, and needs no right to write.
        force: accept a file system, or a directory, that is refused otherwise.
        create: False: raise `NotFound` where there is no store.
        timeout: seconds to wait for others that are opening or closing; default 30.

    Raises: NotFound (no store, with mode "r" or create=False), Unsupported (file system),
    InvalidArgument (an address with a scheme that is not known), StorageError, LockTimeout,
    CorruptBatch (a damaged configuration file), VersionMismatch.

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
    directory = files.absolute(address.directory(path))
    if mode == "rw" and may_create:
        files.make_directories(directory)
    seconds = GATE_SECONDS if checked is None else checked
    try:
        held = files.Directory(directory, follow=True)
    except NotFound as error:
        raise no_store(directory) from error
    return Store(held, mode, durability, force, seconds, may_create)


def shared(
    path: str,
    mode: Mode,
    force: bool,
    durability: Durability | None = None,
    place: tuple[str, int] | None = None,
) -> Store:
    """The store behind handles that were unpickled in this process: one for each directory.

    `place` says which directory that was, in this boot: another one that has its name by now is
    refused, and none is made.
    """
    key = mode, durability
    with _sharing:
        for known in [*_shared.values(), *_all_open()]:
            same = known.path == path if place is None else known._place == place
            if same and not known.closed and (known._mode, known._override) == key:
                return known
        store = _shared[path, mode, durability] = _reopen(path, mode, force, durability, place)
        return store


def _reopen(
    path: str, mode: Mode, force: bool, durability: Durability | None, place: tuple[str, int] | None
) -> Store:
    if place is None or place[0] != files.boot():
        return open(path, mode=mode, force=force, durability=durability)
    with contextlib.suppress(NotFound):
        directory = files.Directory(path, follow=True)
        if directory.identity[1] == place[1]:
            return Store(directory, mode, durability, force, GATE_SECONDS)
        directory.close()
    raise StorageError(
        errno.ESTALE,
        "is not there any more: the directory of the store that was pickled was moved or replaced;"
        " open the store where it is now, and make the handle anew",
        path,
    )


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
    store._remove_when_closed = True
    return store


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Store.__module__ = "millstream"
open.__module__ = "millstream"
temporary.__module__ = "millstream"
Store._reopened.__module__ = "millstream"
