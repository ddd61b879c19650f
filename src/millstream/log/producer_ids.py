"""The ids of a stream's producers: each id has a number, for ever.

A file that is only appended to, under a lock on its first byte. An entry is synced before its
number is used: a batch that survives a power cut never names a number that another id gets later.
An entry that is damaged may look like one that was never whole, so a new id gets a number only when
no batch of the log names it.
"""

from __future__ import annotations

import struct

from millstream import _native
from millstream.disk import files
from millstream.disk.session import LOCK_SECONDS
from millstream.errors import CorruptBatch, InvalidArgument, InvalidType, LimitExceeded, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from millstream.log.handle import StreamHandle

HEADER = struct.Struct("<8sII16sQQQ")
ENTRY = struct.Struct("<QII")  # checksum of what follows, number, bytes of the id; then the id
MAGIC = b"MSPRODU1"
ID_CHARACTERS = 128
ENTRY_BYTES_MAX = ENTRY.size + 4 * ID_CHARACTERS
NUMBER_MAX = (1 << 24) - 1


def check_id(name: object) -> str:
    """Hold an id to its limits."""
    if not isinstance(name, str):
        raise InvalidType(f"producer id {name!r}: expected str")
    if not 1 <= len(name) <= ID_CHARACTERS:
        raise InvalidArgument(
            f"producer id {name[:40]!r}: {len(name)} characters, expected 1 to {ID_CHARACTERS}"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"producer id {name!r}: {error}") from error
    return name


def _entry(number: int, name: str) -> bytes:
    raw = name.encode()
    body = struct.pack("<II", number, len(raw)) + raw + bytes(-len(raw) % 8)
    return struct.pack("<Q", _native.xxh3_64(body)) + body


class ProducerIds:
    """The ids of one stream, as this process knows them. Thread-safe."""

    def __init__(self, stream: StreamHandle) -> None:
        self._stream = stream
        self.path = stream.path / "producers"
        self._identity = (MAGIC, files.FORMAT, 0, stream.session.id, stream._stream_id, 0)
        self._numbers: dict[str, int] = {}
        self._end = HEADER.size  # of the entries that were read
        self._synced = HEADER.size  # of those that this process synced
        self._lock = _native.lock_of(f"{self.path}: registering")

    @property
    def known(self) -> int:
        """The highest number that this process has read."""
        return len(self._numbers)

    def count(self) -> int:
        """How many producers were ever registered."""
        with self._lock:
            try:
                descriptor = files.open_file(self.path, write=False)
            except NotFound:
                return 0
            try:
                self._read(descriptor)
            finally:
                files.close(descriptor)
            return len(self._numbers)

    def number(self, name: str) -> int:
        """The number of an id, durably; registers it where it is new."""
        check_id(name)
        with self._lock:
            found = self._numbers.get(name)
            if found is None or self._synced < self._end:
                found = self._register(name)
            return found

    def _register(self, name: str) -> int:
        if not files.exists(self.path):
            head = HEADER.pack(*self._identity, 0)[:-8]
            files.make(self.path, HEADER.size, head + struct.pack("<Q", _native.xxh3_64(head)))
        descriptor = files.open_file(self.path, write=True)
        is_locked = False
        try:
            files.lock(descriptor, 0, self.path, timeout=LOCK_SECONDS)
            is_locked = True
            self._read(descriptor)
            number = self._numbers.get(name)
            # The writer of what was read may have died before it was synced.
            data = files.read(descriptor, self._end - self._synced, self._synced, self.path)
            if number is None:
                self._check_unused(1 + len(self._numbers))
                data += _entry(1 + len(self._numbers), name)
            if 1 + len(self._numbers) > NUMBER_MAX:
                raise LimitExceeded(f"{self.path}: has {NUMBER_MAX} producers, the limit")
            files.write(descriptor, data, self._synced, self.path)
            files.sync(descriptor, self.path)
            self._synced += len(data)
            self._end = self._synced
            if number is None:
                number = self._numbers[name] = 1 + len(self._numbers)
            return number
        finally:
            try:
                if is_locked:  # a child that was forked meanwhile has it open as well
                    files.unlock(descriptor, 0)
            finally:
                files.close(descriptor)

    def _check_unused(self, number: int) -> None:
        """Raise where a batch names the number: an entry behind those that are valid is lost."""
        where = self._stream._where_producer(number)
        if where is not None:
            raise CorruptBatch(
                f"{self.path}: no valid entry at byte {self._end}, though records in {where} are of"
                f" producer {number}, which it registered; nothing was changed, restore the file"
                " from a backup. Ids whose entries are valid can be used meanwhile",
                path=self.path,
                position=self._end,
                expected=f"the entry of producer {number}",
                found=f"{number - 1} entries",
            )

    def _read(self, descriptor: int) -> None:
        """Read the entries that were added since."""
        self._check_header(files.read(descriptor, HEADER.size, 0, self.path))
        size = files.size(descriptor)
        data = b""
        while len(data) < size - self._end:
            at = self._end + len(data)
            more = files.read(descriptor, size - at, at, self.path)
            if not more:
                break
            data += more
        at = 0
        while (found := self._parse(data, at)) is not None:
            name, length = found
            self._numbers[name] = 1 + len(self._numbers)
            at += length
        self._end += at
        if len(data) - at > ENTRY_BYTES_MAX:
            raise CorruptBatch(
                f"{self.path}: no valid entry at byte {self._end}, though others follow; nothing"
                " was changed, restore the file from a backup",
                path=self.path,
                position=self._end,
            )

    def _parse(self, data: bytes, at: int) -> tuple[str, int] | None:
        """The id of the entry at a byte, and its length; None: the end, or its writer died."""
        if len(data) - at < ENTRY.size:
            return None
        checksum, number, length = ENTRY.unpack_from(data, at)
        begin = at + ENTRY.size
        if number != 1 + len(self._numbers) or not 0 < length <= min(
            4 * ID_CHARACTERS, len(data) - begin
        ):
            return None
        end = begin + length + -length % 8
        if _native.xxh3_64(data[at + 8 : end]) != checksum:
            return None
        return data[begin : begin + length].decode(), end - at

    def _check_header(self, head: bytes) -> None:
        found: tuple[Any, ...] = HEADER.unpack(head) if len(head) == HEADER.size else ()
        if found != (*self._identity, _native.xxh3_64(head[:-8])):
            raise CorruptBatch(
                f"{self.path}: not the producers of this stream, or damaged; restore it from a"
                " backup",
                path=self.path,
                expected=str(self._identity),
                found=str(found),
            )


def ids_of(stream: StreamHandle) -> ProducerIds:
    """The producers of a stream, as this handle knows them."""
    if stream._producer_ids is None:
        stream._producer_ids = ProducerIds(stream)
    return stream._producer_ids
