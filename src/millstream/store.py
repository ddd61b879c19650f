"""A store: one directory that any number of processes open at once."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import stat
import struct
import tempfile
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal

from millstream import _native, files
from millstream import stream as streams_module
from millstream.background import Background
from millstream.errors import (
    Closed,
    InvalidArgument,
    InvalidType,
    MillstreamError,
    NotFound,
    StorageError,
    Unsupported,
)
from millstream.members import Members, require
from millstream.options import Durability, Retention, parse_bytes
from millstream.segments import SegmentCache
from millstream.stream import Stream

__all__ = ["Store", "open", "temporary"]

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
CONTROL_HEADER = struct.Struct("<8sII16sQQII8xII")
CONTROL_MAGIC = b"MSCNTRL1"
BLOCKS = 4096
BLOCK_BYTES = 256
LIVE, DROPPED, REPLACED = 1, 2, 3
SEGMENT_BYTES = 128 << 20
GATE_SECONDS = 30.0

Mode = Literal["rw", "r"]


def check_name(name: str) -> str:
    """Names never become paths: a short list of characters, no leading dot."""
    if not isinstance(name, str):
        raise InvalidType(f"name {name!r}: expected str")
    if NAME.fullmatch(name) is None:
        raise InvalidArgument(
            f"name {name!r:.80}: expected 1 to 128 characters of A-Z a-z 0-9 . _ - without a"
            " leading dot"
        )
    return name


def _block(durable: int = 0, durable_hash: int = 0, durable_offset: int = 0) -> bytes:
    """A block of the control file in which recovery has yet to find the log.

    It begins at the durable mark.
    """
    block = bytearray(BLOCK_BYTES)
    struct.pack_into("<q", block, 32, -(1 << 63))
    struct.pack_into("<IQQ", block, 68, durable_hash, durable, durable_offset)
    return bytes(block)


class Store:
    """A directory of streams, shared with every other process that has it open.

    Made by `millstream.open`.

    Use it in a `with`: the end of the block closes it. Thread-safe. After a fork the child must
    open it again.

    Attributes:
        path: the directory.
        durability: the stored level, what an append has survived when it returns, where stream or
            call say nothing else.
    """

    def __init__(
        self, path: str, mode: Mode, durability: Durability | None, force: bool, timeout: float
    ) -> None:
        self.path = path
        self.writable = mode == "rw"
        self._mode = mode
        self._force = force
        self._override: Durability | None = None
        self.durability: Durability = durability or "interval"
        self.needs_recovery = False
        """Of a read-only store: it was not closed cleanly, nor opened to write since."""
        self._private = False
        self._control_writable = self.writable
        self._streams: dict[str, Stream] = {}
        self._cache = SegmentCache()
        self._lock = threading.RLock()
        self._closed = False
        self._fork = _native.fork_count()
        self._background = Background(self)
        self._remove_when_closed = False
        self._members = Members(path, write=self.writable)
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
            self._members.close()
            raise
        OPEN.add(self)

    # --- opening and closing ----------------------------------------------------------------------

    @property
    def _config_path(self) -> str:
        return os.path.join(self.path, "store.json")

    def _open_writable(self, durability: Durability | None) -> None:
        first = not self._members.anyone()
        if not os.path.lexists(self._config_path):
            if not first:
                raise StorageError(
                    2, "is missing while processes have the store open", self._config_path
                )
            self._create(durability)
        else:
            self._load(durability)
            if first:
                self._members.prepare(self._store_id)
                self._open_first()
        self._members.claim(self._store_id)

    def _create(self, durability: Durability | None) -> None:
        strangers = [
            name
            for name in files.names(self.path)
            if name != "members" and not name.endswith(".tmp")
        ]
        if strangers and not self._force:
            raise StorageError(
                39,
                f"has no store and is not empty ({sorted(strangers)[0]}, ...); choose an empty"
                " directory",
                self.path,
            )
        self._store_id = os.urandom(16)
        self._generation = 1
        self.durability = durability or "interval"
        self._members.prepare(self._store_id)
        files.make_directory(os.path.join(self.path, "streams"))
        self._save(clean=False)

    def _load(self, durability: Durability | None) -> None:
        body = files.read_json(self._config_path)
        self._store_id = bytes.fromhex(body["store_id"])
        self._generation = int(body["generation"])
        self._clean = bool(body["clean"])
        self.durability = body["durability"]
        self._override = durability

    def _save(self, *, clean: bool) -> None:
        body = {
            "format": files.FORMAT,
            "store_id": self._store_id.hex(),
            "generation": self._generation,
            "clean": clean,
            "durability": self.durability,
        }
        files.write_json(self._config_path, body)

    def _open_first(self) -> None:
        """Nobody else lives here: after an unclean end, begin a new generation."""
        self._clean = self._clean and self._all_settled()
        if not self._clean:
            self._generation += 1
        self._save(clean=False)
        for name in files.names(os.path.join(self.path, "streams")):
            directory = os.path.join(self.path, "streams", name)
            if name.startswith("."):
                files.remove_tree(directory)  # a creation or a drop that did not end
            elif not self._clean:
                self._rebuild_control(directory)

    def _all_settled(self) -> bool:
        """Does what the clean mark says hold? A control file may have been damaged or lost since."""
        return all(self._is_settled(self._stream_path(name)) for name in self.streams())

    def _open_readable(self, durability: Durability | None) -> None:
        require(self.path)
        self._load(durability)
        self._members.join_readers()
        if self._members.anyone():
            self._members.check(self._store_id)
        elif not self._clean or not self._all_settled():
            self.needs_recovery = self._private = True
            self._control_writable = True  # a private copy in memory

    def close(self) -> None:
        """Sync what this process wrote, and leave.

        Batches stay valid; calls on the handles raise `Closed`.

        The last process to close marks the store clean, so that the next open recovers nothing.
        """
        with self._lock:
            if self._closed:
                return
            self._recover_the_rest()
            self._closed = True
            OPEN.discard(self)
            if self._fork != _native.fork_count():
                self._members.abandon()
                return
            self._background.stop()
            failed: list[Exception] = []
            try:
                if self.writable:
                    failed = self._background.sync_everything()
                    self._members.enter_gate(GATE_SECONDS)
                    if not failed and not self._members.anyone():
                        self._mark_clean()
            finally:
                for stream in self._streams.values():
                    stream._dispose()
                self._cache.clear()
                self._members.close()
            if self._remove_when_closed:
                files.remove_tree(self.path)
            elif failed:
                raise failed[0]

    def _recover_the_rest(self) -> None:
        """Walk what nobody used since an unclean end, so that the store can be marked clean."""
        if not self.writable or self._fork != _native.fork_count() or self._members.anyone():
            return
        for name in self.streams():
            # It stays unclean, and the next open says why
            with contextlib.suppress(MillstreamError):
                stream = self.stream(name)
                for index in range(stream.partitions):
                    stream._log(index)

    def _mark_clean(self) -> None:
        """As the last: clean, if each partition is sound and synced."""
        for name in self.streams():
            if not self._is_settled(self._stream_path(name)):
                return  # the next open begins a new generation, and recovers it
            path = os.path.join(self._stream_path(name), "control")
            descriptor = files.open_file(path, write=True)
            try:
                files.sync(descriptor, path)
            finally:
                files.close(descriptor)
        self._save(clean=True)

    def _is_settled(self, directory: str) -> bool:
        """Is the control file whole, with each partition recovered, synced and at rest?"""
        config = files.read_json(os.path.join(directory, "stream.json"))
        path = os.path.join(directory, "control")
        if not os.path.lexists(path):
            return False
        descriptor = files.open_file(path, write=False)
        try:
            data = files.read(descriptor, files.size(descriptor), 0, path)
        finally:
            files.close(descriptor)
        count = int(config["partitions"])
        if len(data) < BLOCKS + count * BLOCK_BYTES:
            return False
        magic, version, blocks, store_id, stream_id, _, state, *_ = CONTROL_HEADER.unpack_from(data)
        expected = (
            CONTROL_MAGIC,
            files.FORMAT,
            count,
            self._store_id,
            int(config["stream_id"], 16),
            LIVE,
        )
        if (magic, version, blocks, store_id, stream_id, state) != expected:
            return False
        return all(self._block_is_settled(directory, data, index) for index in range(count))

    def _block_is_settled(self, directory: str, data: bytes, index: int) -> bool:
        at = BLOCKS + index * BLOCK_BYTES
        poison, tail, hint_tail, offset, _, hint_hash, active = struct.unpack_from(
            "<IQQQqQQ", data, at + 4
        )
        durable_hash, durable, durable_offset = struct.unpack_from("<IQQ", data, at + 68)
        walked, first_segment, first_offset = struct.unpack_from("<QQQ", data, at + 136)
        if poison or walked != self._generation or not tail == hint_tail == durable:
            return False
        if (
            durable_offset != offset
            or first_offset > offset
            or durable_hash != hint_hash & 0xFFFFFFFF
        ):
            return False
        if active == 0:
            return bool(tail == first_segment == 0)
        segments = (
            os.path.join(directory, f"{index:05d}", f"{number:016d}.seg")
            for number in (first_segment, active)
        )
        return bool(
            first_segment <= active and all(os.path.lexists(segment) for segment in segments)
        )

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            with contextlib.suppress(Exception):
                self.close()

    def __repr__(self) -> str:
        return f"<Store {self.path!r}{' (closed)' if self._closed else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (shared, (self.path, self._mode, self._force))

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

    # --- control files ----------------------------------------------------------------------------

    def _control_bytes(self, config: dict[str, Any], blocks: list[bytes]) -> bytes:
        header = CONTROL_HEADER.pack(
            CONTROL_MAGIC, files.FORMAT, len(blocks), self._store_id,
            int(config["stream_id"], 16), self._generation, LIVE, 1, 0, 0,
        )  # fmt: skip
        return header.ljust(BLOCKS, b"\0") + b"".join(blocks)

    def _rebuilt(self, directory: str) -> bytes:
        """A control file for this generation.

        Of the old one only the durable marks are kept, as hints.
        """
        config = files.read_json(os.path.join(directory, "stream.json"))
        old = b""
        path = os.path.join(directory, "control")
        if os.path.lexists(path):
            descriptor = files.open_file(path, write=False)
            try:
                old = files.read(descriptor, files.size(descriptor), 0, path)
            finally:
                files.close(descriptor)
        if old[:8] != CONTROL_MAGIC or old[16:32] != self._store_id:
            old = b""
        blocks = []
        for index in range(config["partitions"]):
            at = BLOCKS + index * BLOCK_BYTES + 68
            blocks.append(_block(*_durable_hint(old, at)))
        return self._control_bytes(config, blocks)

    def _rebuild_control(self, directory: str) -> None:
        path = os.path.join(directory, "control")
        data = self._rebuilt(directory)
        if os.path.lexists(path):
            # A read-only process may still have the old file mapped: tell it.
            descriptor = files.open_file(path, write=True)
            try:
                if files.size(descriptor) >= BLOCKS:
                    files.write(descriptor, struct.pack("<I", REPLACED), 48, path)
            finally:
                files.close(descriptor)
        files.replace(path, data, length=len(data))

    def _map_control(self, directory: str) -> Any:
        path = os.path.join(directory, "control")
        if self._private:
            return _native.private_memory(self._rebuilt(directory))
        descriptor = files.open_file(path, write=self.writable)
        try:
            size = files.size(descriptor)
            head = files.read(descriptor, 48, 0, path)
            if (
                size < BLOCKS + BLOCK_BYTES
                or head[:8] != CONTROL_MAGIC
                or head[16:32] != self._store_id
            ):
                raise StorageError(
                    22,
                    "is damaged; close the store in all processes, the next open makes it anew",
                    path,
                )
            return files.map_file(descriptor, size, path, write=self.writable)
        finally:
            files.close(descriptor)

    def _grow_control(self, directory: str, partitions: int) -> None:
        """Add blocks behind those that others have mapped."""
        path = os.path.join(directory, "control")
        descriptor = files.open_file(path, write=True)
        try:
            before = (files.size(descriptor) - BLOCKS) // BLOCK_BYTES
            files.allocate(descriptor, BLOCKS + partitions * BLOCK_BYTES, path)
            for index in range(before, partitions):
                files.write(descriptor, _block(), BLOCKS + index * BLOCK_BYTES, path)
        finally:
            files.close(descriptor)

    # --- streams ----------------------------------------------------------------------------------

    def _stream_path(self, name: str) -> str:
        return os.path.join(self.path, "streams", name)

    def stream(
        self,
        name: str,
        *,
        partitions: int | None = None,
        retention: Retention | None = None,
        segment_bytes: int | str | None = None,
        durability: Durability | None = None,
    ) -> Stream:
        """Open a stream, creating it where it is not there.

        Args:
            name: 1 to 128 characters of ``A-Z a-z 0-9 . _ -``, no leading dot.
            partitions: how many, 1 to 4,096; default 1. They can be added later, never removed.
            retention: how much is kept; default everything.
            segment_bytes: size that segment files grow to, default 128 MiB.
            durability: of a new stream: stored with it; of one that is there: for this handle.

        Raises: ConfigMismatch where the stream is there with other settings than given; NotFound
        when it is not there and the store is read-only; InvalidArgument, StorageError.
        """
        self._check_open()
        check_name(name)
        given = {
            "partitions": (
                None if partitions is None else streams_module.check_partitions(partitions)
            ),
            "segment_bytes": (
                None
                if segment_bytes is None
                else streams_module.check_segment_bytes(parse_bytes(segment_bytes))
            ),
            "retention": None if retention is None else streams_module.retention_config(retention),
        }
        streams_module.check_durability(durability)
        with self._lock:
            path = os.path.join(self._stream_path(name), "stream.json")
            made = not os.path.lexists(path)
            if made:
                if not self.writable:
                    raise NotFound(f"{self.path}: there is no stream {name!r}")
                self._create_stream(name, given, durability)
            known = self._streams.get(name)
            if known is not None and (known.closed or known._state != LIVE):
                known = None
                del self._streams[name]
            config = files.read_json(path)
            streams_module.check_config(name, config, given)
            if known is None or (durability is not None and durability != known.durability):
                known = Stream(self, name, config, None if made else durability)
                self._streams[name] = known
            return known

    def _create_stream(
        self, name: str, given: dict[str, Any], durability: Durability | None
    ) -> None:
        config: dict[str, Any] = {
            "format": files.FORMAT,
            "stream_id": os.urandom(8).hex(),
            "partitions": given["partitions"] or 1,
            "hash": "xxh3-64",
            "segment_bytes": given["segment_bytes"] or SEGMENT_BYTES,
            "retention": given["retention"] or streams_module.retention_config(None),
            "durability": durability,
        }
        parent = os.path.join(self.path, "streams")
        making = os.path.join(parent, f".{name}-{os.urandom(4).hex()}.tmp")
        files.make_directory(making)
        try:
            files.write_json(os.path.join(making, "stream.json"), config)
            data = self._control_bytes(config, [_block()] * config["partitions"])
            files.replace(os.path.join(making, "control"), data, length=len(data))
            try:
                files.rename(making, self._stream_path(name))
            except StorageError:
                if not os.path.lexists(os.path.join(self._stream_path(name), "stream.json")):
                    raise
                # Another process created it at the same moment: theirs it is.
        finally:
            if os.path.lexists(making):
                files.remove_tree(making)
        files.sync_directory(parent)

    def streams(self) -> list[str]:
        """Names of the streams, sorted."""
        if self._fork != _native.fork_count():
            self._check_open()
        names = files.names(os.path.join(self.path, "streams"))
        return sorted(name for name in names if NAME.fullmatch(name))

    def drop_stream(self, name: str) -> None:
        """Remove a stream and all its records.

        Handles to it, in every process, raise `Closed` from now on.
        """
        self._check_writable()
        with self._lock:
            stream = self.stream(check_name(name)) if name in self.streams() else None
            if stream is None:
                raise NotFound(f"{self.path}: there is no stream {name!r}")
            stream._set_state(DROPPED)
            gone = os.path.join(self.path, "streams", f".{name}-{os.urandom(4).hex()}.dropped")
            files.rename(self._stream_path(name), gone)
            files.sync_directory(os.path.join(self.path, "streams"))
            self._streams.pop(name, None)
            stream._dispose()
            files.remove_tree(gone)

    def flush(self, *, timeout: float | None = None) -> None:
        """Return when all that was appended to any stream before this call survives a power cut."""
        for name in self.streams():
            self.stream(name).flush(timeout=timeout)

    def backup(self, target: str | os.PathLike[str]) -> None:
        """Copy the store into a new directory while others go on writing.

        The copy holds, of each partition, all up to one moment; its first open recovers and so
        verifies it. It is synced when this returns.

        Raises: StorageError where the target is there and not empty; StoreFull.
        """
        from millstream import backup

        self._check_open()
        backup.backup(self, os.path.abspath(os.fspath(target)))


def _durable_hint(old: bytes, at: int) -> tuple[int, int, int]:
    """(durable, its hash, its offset) of a block of an old control file."""
    if len(old) < at + 20:
        return 0, 0, 0
    durable_hash, durable, durable_offset = struct.unpack_from("<IQQ", old, at)
    return durable, durable_hash, durable_offset


OPEN: weakref.WeakSet[Store] = weakref.WeakSet()
_shared: dict[tuple[str, str], Store] = {}


@atexit.register
def _close_all() -> None:
    """At exit: sync and leave, so that an orderly end is a clean one."""
    for store in list(OPEN):
        with contextlib.suppress(Exception):
            store.close()


def open(
    path: str | os.PathLike[str],
    *,
    durability: Durability | None = None,
    mode: Mode = "rw",
    force: bool = False,
    timeout: float = GATE_SECONDS,
) -> Store:
    """Open the store in a directory, creating it where there is none.

    Any number of processes at once.

    Args:
        path: the directory. Created 0700, its files 0600.
        durability: "process", "interval" or "sync": what an append has survived when it returns. A
            new store stores it, "interval" by default; for one that is there it holds for this
            handle.
        mode: "rw", or "r": changes no byte, and needs no right to write.
        force: accept a file system, or a directory, that is refused otherwise.
        timeout: seconds to wait for others that are opening or closing.

    Raises: NotFound (mode "r" without a store), Unsupported (file system), StorageError,
    LockTimeout, CorruptBatch (a damaged configuration file), VersionMismatch.

    >>> import millstream, tempfile
    >>> with tempfile.TemporaryDirectory() as directory, millstream.open(directory) as store:
    ...     store.stream("s").append(b"hello").offset
    0
    """
    if mode not in ("rw", "r"):
        raise InvalidArgument(f'mode {mode!r}: expected "rw" or "r"')
    streams_module.check_durability(durability)
    try:
        directory = os.path.abspath(os.fsdecode(os.fspath(path)))
    except TypeError as error:
        raise InvalidType(f"path {path!r}: expected str or os.PathLike") from error
    if "\0" in directory:
        raise InvalidArgument(f"path {directory!r}: has a NUL character")
    if mode == "r":
        require(directory)
    else:
        with files.reporting(directory, "creating the directory"):
            os.makedirs(os.path.dirname(directory), exist_ok=True)
        files.make_directory(directory)
        with files.reporting(directory, "opening the directory"):
            bits = os.stat(directory).st_mode
        if bits & stat.S_IWOTH and not bits & stat.S_ISVTX and not force:
            raise Unsupported(
                f"{directory}: every user of this machine can write there; take that right away"
                " (chmod o-w), or pass force=True"
            )
    files.check_file_system(directory, force=force)
    return Store(directory, mode, durability, force, timeout)


def shared(path: str, mode: Mode, force: bool) -> Store:
    """The store behind handles that were unpickled in this process: one for each path."""
    store = _shared.get((path, mode))
    if store is None or store.closed:
        for known in list(OPEN):
            if known.path == path and known._mode == mode and not known.closed:
                return known
        store = _shared[path, mode] = open(path, mode=mode, force=force)
    return store


@contextlib.contextmanager
def temporary(*, durability: Durability | None = None) -> Iterator[Store]:
    """A store in a temporary directory that goes when it is closed.

    >>> import millstream
    >>> with millstream.temporary() as store:
    ...     store.streams()
    []
    """
    directory = tempfile.mkdtemp(prefix="millstream-")
    store = open(directory, durability=durability)
    store._remove_when_closed = True
    try:
        yield store
    finally:
        store.close()
