"""The structs of docs/format.md, what can be found wrong with bytes, and a file read in windows."""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy.typing as npt
import xxhash

from millstream import address
from millstream.errors import InvalidArgument, StorageError

ALIGN64, FILLER, FLAGS_KNOWN = 1 << 7, 1 << 8, (1 << 9) - 1
TIMESTAMPS, OFFSETS, KEYS, KEY_NULLS, VALUE_NULLS, HEADERS, FIXED = (1 << bit for bit in range(7))
BATCH_BYTES_MAX = 1 << 30
VALUE_BYTES_MAX, KEY_BYTES_MAX = 256 << 20, 64 << 10
HEADER_COUNT_MAX, NAME_BYTES_MAX, HEADER_BYTES_MAX = 1024, 255, 1 << 20
JSON_BYTES_MAX = 1 << 20
INDEX_BLOCK_BYTES = 32768
WINDOW_BYTES = 1 << 18
LOW = 0xFFFF_FFFF
JOURNAL = "@journal"  # the stream of what transactions do
LEFT = "dropped"  # what the configuration is called of what was dropped and has not gone yet
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")

Path_: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def top_of(path: Path_) -> Path:
    """Check a path that a caller gave, or an address."""
    text = address.directory(path)
    if not text or "\0" in text:
        raise InvalidArgument(f"path {text!r}: is empty, or has a NUL character")
    return Path(text)


Array: TypeAlias = npt.NDArray[Any]


class Layout:
    """A struct by its fields in order; a field named `_` is reserved."""

    def __init__(self, pattern: str, names: str) -> None:
        self.pack = struct.Struct("<" + pattern)
        self.names = names.split()
        self.size = self.pack.size

    def read(self, data: bytes | memoryview) -> dict[str, Any]:
        """Return the fields at the front of the data, which is long enough."""
        return dict(zip(self.names, self.pack.unpack_from(data), strict=True))


MEMBERS = Layout("8sII16s", "magic version count store_id")
MEMBER = Layout("IIqQ", "incarnation pid claimed pid_namespace")
CONTROL = Layout("8sII16sQQI", "magic version partitions store_id stream_id generation state")
BLOCK = Layout(
    "IIQQQqQQ8xIIQQ48xQQQ16xQQ",
    "append poison tail hint_tail hint_offset hint_timestamp hint_hash active sync durable_hash"
    " durable durable_offset walked first_segment first_offset synced_to synced_offset",
)
SEGMENT = Layout(
    "8sII16sQQQQIIqQ",
    "magic version partition store_id stream_id number salt size index_count data_position created"
    " checksum",
)
ACTIVATION = Layout(
    "QQQQQQQqq",
    "checksum number base_offset base_position epoch predecessor predecessor_hash activated"
    " timestamp_max",
)
BATCH = Layout(
    "QIHHQIIqqIIQ",
    "hash length format flags base_offset count chain timestamp_min timestamp_max producer"
    " synced_distance sequence",
)


def hash64(data: bytes | memoryview, seed: int = 0) -> int:
    """Return the hash of docs/format.md."""
    return xxhash.xxh3_64_intdigest(data, seed & 0xFFFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it was written.

    `position` is a byte of the file at `path`, None for the whole file; `offset_range` the first
    offset lost and the one after the last (None: not known).
    """

    kind: str
    path: Path
    position: int | None
    offset_range: tuple[int, int | None] | None
    expected: object
    found: object
    advice: str

    def __str__(self) -> str:
        """Return one line that says what, where and what to do."""
        at = "" if self.position is None else f" at byte {self.position}"
        first, after = self.offset_range or (None, None)
        end = "the end" if after is None else f"before {after}"
        lost = "" if first is None else f" (offsets {first} to {end})"
        text = f"{self.kind}: {self.path}{at}{lost}: expected {self.expected}, found {self.found}"
        return f"{text}; {self.advice}"


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing that harms nothing; fields as in `Problem`."""

    kind: str
    path: Path
    position: int | None
    text: str


Finding: TypeAlias = Problem | Note


class Invalid(Exception):
    """Bytes break a rule of docs/format.md; `newer`: only a version or a flag is unknown."""

    def __init__(self, what: str, expected: object, found: object, *, newer: bool = False) -> None:
        super().__init__(f"expected {what} {expected}, found {found}")
        self.expected, self.found, self.newer = f"{what} {expected}", found, newer

    def problem(self, kind: str, path: Path, position: int | None, advice: str = "") -> Problem:
        """Return this as a finding."""
        if self.newer:
            kind, advice = "version", "read it with the version of millstream that wrote it"
        return Problem(kind, path, position, None, self.expected, self.found, advice)


class Place:
    """The directory that a run began in, as long as its path leads there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = self._identity()

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def check(self) -> None:
        """Raise StorageError where it is another by now: what was read belongs to two stores."""
        if self._identity() != self.identity:
            text = "the directory was moved or replaced meanwhile; begin again where it is now"
            raise StorageError(errno.ESTALE, text, str(self.path))


@contextmanager
def staying(path: Path) -> Iterator[None]:
    """Raise StorageError at the end of the block, or for what it raised, unless it stayed."""
    place = Place(path)
    try:
        yield
    except Exception:
        place.check()
        raise
    place.check()


class File:
    """One file read in windows; what is not there comes back short."""

    def __init__(self, path: Path, folder: int | None = None) -> None:
        """Open by its path; with a `folder`, a descriptor, by its name in that directory."""
        self.path = path
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self.fd = os.open(path if folder is None else path.name, flags, dir_fd=folder)
        except OSError as error:
            raise StorageError(error.errno, error.strerror, str(path)) from None
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(self.fd)
            raise StorageError(errno.EINVAL, "not a regular file", str(path))
        self.size = found.st_size
        self.search_bytes = 16 * self.size  # what a search may hash before it gives up
        self._start, self._window = 0, b""

    def read(self, position: int, size: int) -> memoryview:
        """Return up to `size` bytes; an EIO is a StorageError that names the file."""
        begin = position - self._start
        if begin < 0 or begin + size > len(self._window):
            wanted = max(size, WINDOW_BYTES)
            parts: list[bytes] = []
            try:
                while wanted and (
                    part := os.pread(self.fd, wanted, position + sum(map(len, parts)))
                ):
                    parts.append(part)
                    wanted -= len(part)
            except (OSError, OverflowError) as error:
                code = getattr(error, "errno", errno.EINVAL)
                raise StorageError(code, f"byte {position}: {error}", str(self.path)) from None
            self._window, self._start, begin = b"".join(parts), position, 0
        return memoryview(self._window)[begin : begin + size]

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
