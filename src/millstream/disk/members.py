"""Which members are alive: a locked byte a process, the gate, and the proof that an owner is dead.

The kernel keeps a byte locked as long as the open file description lives, across SIGKILL,
containers and reused process ids. Three descriptors are needed: the one that holds the lock is
never asked about itself (it would answer "free"); the one that probes is another; the directory's
is held with a shared ``flock``, so that a replaced ``members`` file is noticed while members live.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable

from millstream import _native
from millstream.disk import files
from millstream.errors import CorruptBatch, LockTimeout, NotFound, StorageError, VersionMismatch

COUNT = 1024
HEADER = struct.Struct("<8sII16s")
NOTE = struct.Struct("<qqQ")
ENTRY = struct.Struct("<IIqQ40x")
MAGIC = b"MSMEMBR1"
GATE, READERS = 0, 1
DIRECTORY_SECONDS = 2.0
HEADER_BYTES = 64
FILE_BYTES = HEADER_BYTES + COUNT * ENTRY.size


def _entry(index: int) -> int:
    return HEADER_BYTES + index * ENTRY.size


class Members:
    """The ``members`` file of one store, and this process's entry in it."""

    def __init__(self, directory: files.Path, *, write: bool) -> None:
        self.path = directory / "members"
        self.write = write
        self.index = -1
        self.word = 0
        self._descriptors: list[int] = []
        self._gate: _native.Lock | None = None
        try:
            self._directory = self._open_directory(directory)
            if write and not files.exists(self.path):
                with self._of_process("making the file"):
                    self._create(directory)
            self._lock = self._guarded(files.open_file(self.path, write=write))
            self._probe = self._guarded(files.open_file(self.path, write=write))
        except BaseException:
            self.close()
            raise

    def _of_process(self, what: str) -> _native.Lock:
        """What the handles of this process that open or close the same store have in common."""
        found = os.fstat(self._directory)
        return _native.lock_of(f"{what} of store {found.st_dev}:{found.st_ino}")

    def _guarded(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        try:
            _native.fork_guard(descriptor)
        except OSError as error:
            raise StorageError(
                error.errno or 0,
                "this process has as many stores open as it can keep from forked children"
                " (4,096 descriptors); open fewer stores at once",
                self.path,
            ) from error
        return descriptor

    def _open_directory(self, directory: files.Path) -> int:
        return self._guarded(files.open_directory(directory))

    def _create(self, directory: files.Path) -> None:
        # Another creator of the same moment becomes a member, and never lets the directory go.
        if not self._lock_directory(
            "is missing while processes have the store open; close it there first",
            unless=lambda: files.exists(self.path),
        ):
            return
        try:
            if not files.exists(self.path):
                create(directory)
        finally:
            fcntl.flock(self._directory, fcntl.LOCK_UN)

    def _lock_directory(self, why_not: str, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Lock the directory, which members share; False as soon as `unless` holds."""
        deadline = time.monotonic() + DIRECTORY_SECONDS
        while not unless():
            try:
                fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(errno.EBUSY, why_not, self.path) from None
                time.sleep(0.001)
        return False

    def enter_gate(self, timeout: float) -> None:
        """Let nobody else open or close meanwhile.

        Read-only openers share the gate among themselves.
        """
        gate = self._of_process("the gate")
        begun = time.monotonic()
        if not gate.acquire(timeout=timeout):
            raise LockTimeout(
                f"{self.path}: another thread opens or closes the store for {timeout:g} s"
            )
        try:
            left = max(0.0, timeout - (time.monotonic() - begun))
            files.lock(self._lock, GATE, self.path, timeout=left, shared=not self.write)
        except BaseException:
            gate.release()
            raise
        gate.members = self
        self._gate = gate

    def leave_gate(self) -> None:
        """Let others open and close."""
        files.unlock(self._lock, GATE)
        self._release_gate()

    def _release_gate(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.release()

    def anyone(self) -> bool:
        """Is any other process (or store of this process) a member?"""
        return (
            files.is_locked(self._probe, HEADER_BYTES, COUNT * ENTRY.size)
            if self.index < 0
            else self._others()
        )

    def _others(self) -> bool:
        own = _entry(self.index)
        before = own > HEADER_BYTES and files.is_locked(
            self._probe, HEADER_BYTES, own - HEADER_BYTES
        )
        return before or files.is_locked(
            self._probe, own + ENTRY.size, FILE_BYTES - own - ENTRY.size + 1
        )

    def prepare(self, store_id: bytes) -> None:
        """As the first opener: write the header (anew, when the file was damaged).

        Refused where members live who are not in this file: theirs was replaced by it.
        """
        self._lock_directory(
            "is not the file of the processes that have the store open; close it there first"
        )
        files.allocate(self._probe, FILE_BYTES, self.path)
        files.write(self._probe, HEADER.pack(MAGIC, files.FORMAT, COUNT, store_id), 0, self.path)

    def claim(self, store_id: bytes) -> None:
        """Take a free entry: lock its byte, then raise its incarnation. Holder of the gate."""
        self.check(store_id)
        fcntl.flock(self._directory, fcntl.LOCK_SH)
        for index in range(COUNT):
            at = _entry(index)
            if files.is_locked(self._probe, at) or not files.try_lock(self._lock, at):
                continue
            incarnation = self._incarnation(index) + 1 & 0xFFFFFFFF
            namespace = files.pid_namespace()
            now = int(time.time() * 1e6)
            files.write(
                self._probe, ENTRY.pack(incarnation, os.getpid(), now, namespace), at, self.path
            )
            self.index, self.word = index, _native.owner_word(index, incarnation)
            return
        raise StorageError(
            errno.EMFILE,
            f"all {COUNT} entries are taken; close the store in some processes",
            self.path,
        )

    def check(self, store_id: bytes) -> None:
        """Hold the header to the store; a joiner must not go on with another file."""
        data = files.read(self._probe, HEADER.size, 0, self.path)
        if len(data) < HEADER.size or files.size(self._probe) < FILE_BYTES:
            raise CorruptBatch(
                f"{self.path}: too short", path=self.path, expected=FILE_BYTES, found=len(data)
            )
        magic, version, count, found = HEADER.unpack(data)
        if magic == MAGIC and version != files.FORMAT:
            raise VersionMismatch(
                f"{self.path}: format {version}, this version reads {files.FORMAT}"
            )
        if (magic, count, found) != (MAGIC, COUNT, store_id):
            raise CorruptBatch(
                f"{self.path}: not the members file of this store; close the store in all processes"
                " and open it again",
                path=self.path,
                expected=store_id.hex(),
                found=found.hex(),
            )

    def join_readers(self) -> None:
        """As a read-only opener: hold the readers' byte, shared."""
        files.lock(self._lock, READERS, self.path, timeout=1.0, shared=True)

    def note_time(self, time: int, wall: int) -> None:
        """Note the store's clock and the wall's: a later boot goes on from there."""
        note = struct.pack("<qq", time, wall)
        note += struct.pack("<Q", _native.xxh3_64(note))
        files.write(self._probe, note, HEADER.size, self.path)

    def noted_time(self) -> tuple[int, int] | None:
        """What was noted last; None: nothing, or it is torn."""
        found = files.read(self._probe, NOTE.size, HEADER.size, self.path)
        if len(found) < NOTE.size:
            return None
        time, wall, check = NOTE.unpack(found)
        return (time, wall) if check == _native.xxh3_64(found[:16]) else None

    def _incarnation(self, index: int) -> int:
        data = files.read(self._probe, 4, _entry(index), self.path)
        return int.from_bytes(data, "little")

    def is_dead(self, word: int) -> bool:
        """Is the owner that a word names proved dead? Oneself never is."""
        index, incarnation = _native.owner_parts(word)
        if word == 0 or index == self.index:
            return word != 0 and incarnation != _native.owner_parts(self.word)[1]
        if index >= COUNT:
            return True  # no member ever had that number: the word itself is damage
        if self._incarnation(index) & 0xFFFF != incarnation:
            return True
        return not files.is_locked(self._probe, _entry(index))

    def describe(self, word: int) -> str:
        """Say for a message who an owner is."""
        index, _ = _native.owner_parts(word)
        if index == self.index:
            return f"this process (member {index})"
        if index >= COUNT:
            return f"an unknown member ({index})"
        data = files.read(self._probe, ENTRY.size, _entry(index), self.path)
        _, pid, _, namespace = ENTRY.unpack(data)
        same = namespace in (0, files.pid_namespace())
        where = "" if same else " of another PID namespace"
        return f"process {pid}{where} (member {index})"

    def living(self) -> list[tuple[int, int, int, bool, int]]:
        """(index, owner word, pid, is of this PID namespace, claimed) of each member.

        By the file as it was read, and the locks: one that leaves meanwhile may be among them.
        """
        data = files.read(self._probe, FILE_BYTES, 0, self.path)
        found = []
        entries = ENTRY.iter_unpack(data[HEADER_BYTES:])
        for index, (incarnation, pid, claimed, namespace) in enumerate(entries):
            if not incarnation:  # it was never taken
                continue
            if index == self.index or files.is_locked(self._probe, _entry(index)):
                word = _native.owner_word(index, incarnation & 0xFFFF)
                is_here = namespace in (0, files.pid_namespace())
                found.append((index, word, pid, is_here, claimed))
        return found

    def close(self) -> None:
        """Be no member any more. Last of all: others take this for our death."""
        self._lock = self._probe = -1  # the numbers will be those of other files
        while self._descriptors:
            descriptor = self._descriptors.pop()
            _native.fork_release(descriptor)
            files.close(descriptor)
        self._release_gate()

    def abandon(self) -> None:
        """In a forked child: the descriptors are the parent's and were closed by the fork guard."""
        self._descriptors.clear()


def create(directory: files.Path, store_id: bytes = bytes(16)) -> None:
    """Publish a ``members`` file without members, unless there is one."""
    files.make(
        directory / "members",
        FILE_BYTES,
        HEADER.pack(MAGIC, files.FORMAT, COUNT, store_id),
    )


def require(directory: files.Path) -> None:
    """Raise `NotFound` unless there is a store; `StorageError` where one may not even read."""
    if not files.exists(directory / "store.json"):
        raise no_store(directory)


def no_store(directory: str) -> NotFound:
    """The error where a store should be and is none."""
    with _native.loading:
        import difflib
    above, name = os.path.split(directory)
    beside = files.names_with(above, "store.json")
    text = "; mode='rw' with create=True makes one"
    if close := difflib.get_close_matches(name, beside, 3):
        found = (repr(os.path.join(above, one)) for one in close)
        text = f"; did you mean {' or '.join(found)}?"
    elif beside:
        text = f"; stores beside it: {', '.join(map(repr, beside[:10]))}{text}"
    return NotFound(f"{directory}: there is no store{text}")


def refuse_strangers(directory: files.Path, *, force: bool) -> None:
    """Raise where a store is to be made in a directory that holds other things."""
    strangers = [
        name
        for name in files.names(directory)
        if name not in ("members", files.LOST_AND_FOUND)
        and not name.endswith(".tmp")
        and not _is_half_made(directory, name)
    ]
    if strangers and not force:
        raise StorageError(
            errno.ENOTEMPTY,
            f"has no store and is not empty ({sorted(strangers)[0]}, ...); choose an empty"
            " directory",
            directory,
        )


def _is_half_made(directory: files.Path, name: str) -> bool:
    """Is it what a creator left that was killed before the store was there?"""
    return name == "streams" and not files.names(directory / "streams")
