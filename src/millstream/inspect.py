"""The second reader: the formats in plain Python, numpy and xxhash, for verify, dump and repair.

Shares no code with the core and never writes. It trusts no byte: every length is checked before it
is used, at most one batch is in memory, and files are read, not mapped, so that one that shrinks
ends in an error and not in a signal. Names in the structs below are those of docs/format.md.

Threads: every function stands alone; any thread, any process, beside living writers too.
"""

import errno
import fcntl
import json as jsonlib
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from millstream.errors import CorruptBatch, NotFound, StorageError, VersionMismatch

if TYPE_CHECKING:
    from millstream.repair import Action

ALIGN64, FILLER, FLAGS_KNOWN = 1 << 7, 1 << 8, (1 << 9) - 1
TIMESTAMPS, OFFSETS, KEYS, KEY_NULLS, VALUE_NULLS, HEADERS, FIXED = (1 << bit for bit in range(7))
BATCH_BYTES_MAX = 1 << 30
VALUE_BYTES_MAX, KEY_BYTES_MAX = 256 << 20, 64 << 10
HEADER_COUNT_MAX, NAME_BYTES_MAX, HEADER_BYTES_MAX = 1024, 255, 1 << 20
JSON_BYTES_MAX = 1 << 20
INDEX_BLOCK_BYTES = 32768
WINDOW_BYTES = 1 << 18
LOW = 0xFFFF_FFFF
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")

Path_ = str | os.PathLike[str]
Array = npt.NDArray[Any]


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
    "IIQQQqQQ8xIIQQ48xQQQ",
    "append poison tail hint_tail hint_offset hint_timestamp hint_hash active sync durable_hash"
    " durable durable_offset walked first_segment first_offset",
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


class File:
    """One file read in windows; what is not there comes back short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self.fd = os.open(path, flags)
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

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


# One batch ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One stored batch that is valid. Its columns are read-only views of one copy of its bytes.

    `position` is that of the log, `file_position` the byte of the file at `path`. Lists are made
    anew at each access.
    """

    stream: str
    partition: int
    epoch: int
    segment: int
    path: Path
    position: int
    file_position: int
    hash: int
    length: int
    format: int
    flags: int
    base_offset: int
    count: int
    chain: int
    timestamp_min: int
    timestamp_max: int
    producer: int
    synced_distance: int
    sequence: int
    columns: dict[str, Array] = field(repr=False)

    @property
    def next_offset(self) -> int:
        """Offset of the record after it, at least."""
        column = self.columns.get("offsets")
        return self.base_offset + self.count if column is None else int(column.max()) + 1

    @property
    def synced_position(self) -> int:
        """Position up to which the log was durable when it was written."""
        return self.position - 8 * self.synced_distance

    @property
    def link(self) -> int:
        """The chain value that the next batch must have."""
        return (self.sequence if self.flags & FILLER else self.hash) & LOW

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Offset of each record."""
        if "offsets" in self.columns:
            return self.columns["offsets"]
        return np.arange(self.base_offset, self.base_offset + self.count, dtype=np.int64)

    @property
    def timestamps(self) -> npt.NDArray[np.int64]:
        """Timestamp of each record, microseconds since 1970."""
        if "timestamps" in self.columns:
            return self.columns["timestamps"]
        return np.full(self.count, self.timestamp_min, dtype=np.int64)

    @property
    def keys(self) -> list[bytes | None]:
        """Key of each record."""
        return self._items("key") if self.flags & KEYS else [None] * self.count

    @property
    def values(self) -> list[bytes | None]:
        """Value of each record."""
        return self._items("value") if self.count else []

    @property
    def headers(self) -> list[list[tuple[str, bytes]]]:
        """(name, value) pairs of each record; bytes that are not UTF-8 become lone surrogates."""
        if not self.flags & HEADERS:
            return [[] for _ in range(self.count)]
        names = [(name or b"").decode("utf-8", "surrogateescape") for name in self._items("name")]
        pairs = [(n, v or b"") for n, v in zip(names, self._items("header_value"), strict=True)]
        ends = self.columns["header_offsets"].tolist()
        return [pairs[a:b] for a, b in pairwise(ends)]

    def _items(self, name: str) -> list[bytes | None]:
        raw = self.columns[name + "s"].tobytes()
        ends = self.columns[name + "_offsets"].tolist()
        items: list[bytes | None]
        items = [raw[a:b] for a, b in pairwise(ends)]
        for i in np.flatnonzero(~self._present(name)) if name in ("key", "value") else ():
            items[i] = None
        return items

    def _present(self, name: str) -> npt.NDArray[np.bool_]:
        bits = self.columns.get(name + "_validity")
        if bits is None:
            return np.ones(self.count, dtype=bool)
        return np.unpackbits(bits, count=self.count, bitorder="little").astype(bool)

    def contradictions(self) -> Iterator[tuple[str, object, object]]:
        """Yield (what, expected, found) where valid bytes do not hold what their flags say."""
        if not self.count:
            return
        low, high = self.timestamp_min, self.timestamp_max
        times = self.columns.get("timestamps")
        found = (low, low) if times is None else (int(times.min()), int(times.max()))
        if found != (low, high):
            yield "smallest and largest timestamp", found, (low, high)
        offsets = self.columns.get("offsets")
        if offsets is not None:
            span = int(offsets[-1]) - self.base_offset
            rising = (
                bool((offsets[1:] > offsets[:-1]).all()) and int(offsets[0]) >= self.base_offset
            )
            if not rising or not 0 <= span <= LOW:
                yield "offsets", "rising, less than 2**32 above the base", offsets[[0, -1]].tolist()
        sizes = np.diff(self.columns["value_offsets"])
        if self.flags & FIXED and (self.flags & VALUE_NULLS or (sizes != sizes[0]).any()):
            yield "values", "one length and none null", f"{sizes.min()} to {sizes.max()} bytes"
        for name in ("key", "value"):
            if name + "s" in self.columns:
                nulls = np.diff(self.columns[name + "_offsets"])[~self._present(name)]
                if nulls.any():
                    yield f"null {name}s", "no bytes", f"{nulls.max()} bytes"
        if self.flags & HEADERS:
            raw, starts = self.columns["names"], self.columns["name_offsets"]
            try:
                raw.tobytes().decode()
                cut = raw[starts[starts < len(raw)]] & 0xC0 == 0x80
            except UnicodeDecodeError:
                cut = np.ones(1, dtype=bool)
            if cut.any():
                yield "names of headers", "UTF-8", "other bytes"


def decode(file: File, segment: "SegmentInfo", position: int, end: int) -> Batch:
    """Return the batch at a position by rules (1) to (6) of docs/format.md, or raise Invalid.

    `end` is the position at which the segment ends.
    """
    at = segment.file_position(position)
    head = file.read(at, BATCH.size)
    room = min(end - position, file.size - at)
    if room < BATCH.size or len(head) < BATCH.size:
        raise Invalid("room for a header:", BATCH.size, max(room, 0))
    fields = BATCH.read(head)
    length, flags, count = fields["length"], fields["flags"], fields["count"]
    if length % 8 or not BATCH.size <= length <= min(room, BATCH_BYTES_MAX):
        rule = f"a multiple of 8 from 64 to {min(room, BATCH_BYTES_MAX)}"
        raise Invalid("length", rule, length)
    known = fields["format"] == 1 and flags <= FLAGS_KNOWN
    filler = known and bool(flags & FILLER)
    data = head if filler else file.read(at, length)
    if len(data) < (BATCH.size if filler else length):
        raise Invalid("bytes that are there:", length, len(data))
    if not known:
        right = fields["hash"] == hash64(data[8:], segment.salt + position)
        found = f"format {fields['format']}, flags {flags:#x}"
        raise Invalid("batch", f"of format 1, flags within {FLAGS_KNOWN:#x}", found, newer=right)
    if filler != (count == 0):
        raise Invalid("count", 0 if filler else "at least 1", count)
    columns = {} if filler else columns_of(data, at, flags, count)
    if fields["base_offset"] + count > 1 << 63:
        raise Invalid("base offset", "below 2**63", fields["base_offset"])
    right = hash64(data[8:], segment.salt + position)
    if fields["hash"] != right:
        raise Invalid("hash", f"{right:016x}", f"{fields['hash']:016x}")
    where = (segment.stream, segment.partition, segment.epoch, segment.number, segment.path)
    return Batch(*where, position, at, **fields, columns=columns)


def columns_of(data: memoryview, at: int, flags: int, count: int) -> dict[str, Array]:
    """Return the buffers of a batch that begins at byte `at` of its file, by rules (3) to (5)."""
    align = 64 if flags & ALIGN64 else 8
    cursor = BATCH.size
    columns: dict[str, Array] = {}

    def take(name: str, kind: str, items: int) -> Array:
        nonlocal cursor
        begin = cursor + -(at + cursor) % align
        cursor = begin + items * np.dtype(kind).itemsize
        if cursor > len(data):
            raise Invalid(f"end of {name}", f"at most {len(data)}", cursor)
        columns[name] = np.frombuffer(data, kind, items, begin)
        return columns[name]

    def rising(name: str, items: int, limit: int) -> int:
        ends = take(name + "_offsets", "<i4", items + 1)
        if ends[0] != 0 or (ends[1:] < ends[:-1]).any():
            raise Invalid(f"{name}_offsets", "from 0, never falling", "other numbers")
        if items and (largest := int(np.diff(ends).max())) > limit:
            raise Invalid(f"{name} of at most", limit, largest)
        return int(ends[-1])

    if flags & TIMESTAMPS:
        take("timestamps", "<i8", count)
    if flags & OFFSETS:
        take("offsets", "<i8", count)
    if flags & KEY_NULLS:
        if not flags & KEYS:
            raise Invalid("flags", "KEY_NULLS only with KEYS", f"{flags:#x}")
        take("key_validity", "u1", -(-count // 8))
    if flags & KEYS:
        take("keys", "u1", rising("key", count, KEY_BYTES_MAX))
    if flags & VALUE_NULLS:
        take("value_validity", "u1", -(-count // 8))
    take("values", "u1", rising("value", count, VALUE_BYTES_MAX))
    if flags & HEADERS:
        headers = rising("header", count, HEADER_COUNT_MAX)
        take("names", "u1", rising("name", headers, NAME_BYTES_MAX))
        take("header_values", "u1", rising("header_value", headers, HEADER_BYTES_MAX))
    if (exact := cursor + -(at + cursor) % 8) != len(data):
        raise Invalid("length that its buffers measure:", exact, len(data))
    return columns


# Store, streams, segments -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A segment with its activation record. `end_position`: None in the active one without a tail.

    `link_broken`: its predecessor is not there though older segments are.
    """

    stream: str
    partition: int
    path: Path
    number: int
    size: int
    data_position: int
    index_count: int
    created: int
    salt: int
    base_offset: int
    base_position: int
    epoch: int
    predecessor: int
    predecessor_hash: int
    activated: int
    timestamp_max: int
    active: bool = False
    end_position: int | None = None
    link_broken: bool = False

    @property
    def limit_position(self) -> int:
        """The position at which its file ends."""
        return self.base_position + self.size - self.data_position

    def file_position(self, position: int) -> int:
        """Return the byte of the file that holds a position of the log."""
        return position - self.base_position + self.data_position


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """A stream as `stream.json` has it, and its activated segments by partition, oldest first."""

    name: str
    path: Path
    stream_id: int
    config: dict[str, Any]
    partitions: dict[int, list[SegmentInfo]]


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """A store as `store.json` has it. `alive`: some process has it open now."""

    path: Path
    store_id: bytes
    generation: int
    clean: bool
    durability: str
    alive: bool
    streams: dict[str, StreamInfo]


Finding = Problem | Note


def read_json(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a JSON file whose checksum is right and whose fields have these types."""
    with File(path) as file:
        if file.size > JSON_BYTES_MAX:
            raise Invalid("size of at most", JSON_BYTES_MAX, file.size)
        raw = bytes(file.read(0, file.size))
    try:
        whole = jsonlib.loads(raw)
        checksum = whole["checksum"]
        body = whole["body"]
        text = jsonlib.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"[:200]
        raise Invalid("a JSON object with", "body and checksum", found) from None
    if checksum != (right := f"{hash64(text.encode()):016x}"):
        raise Invalid("checksum", right, checksum)
    if not isinstance(body, dict):
        raise Invalid("a body that is", "an object", type(body).__name__)
    fields: dict[str, Any] = body
    version = fields.get("format")
    if version != 1:
        raise Invalid("format", 1, version, newer=isinstance(version, int) and version > 1)
    for name, kind in kinds.items():
        value = fields.get(name)
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
            raise Invalid(f"{name} of type", kind.__name__, value)
    for name, digits in (("store_id", 32), ("stream_id", 16)):
        if name in kinds and not re.fullmatch(f"[0-9a-f]{{{digits}}}", fields[name]):
            raise Invalid(name, f"{digits} hex digits", fields[name])
    return fields


STORE_JSON = {"store_id": str, "generation": int, "clean": bool, "durability": str}
STREAM_JSON = {"stream_id": str, "partitions": int, "segment_bytes": int}


def probe(fd: int, start: int, length: int) -> int | None:
    """Return the first byte in a range that another opener holds a lock on, or None."""
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))
    return None if answer[0] == fcntl.F_UNLCK else int(answer[2])


def check_members(path: Path, store_id: bytes) -> bool:
    """Return whether any process has the store open; raises Invalid or StorageError."""
    with File(path / "members") as file:
        if file.size < 64:
            raise Invalid("size of at least", 64, file.size)
        fields = MEMBERS.read(file.read(0, 64))
        expected = {"magic": b"MSMEMBR1", "version": 1, "count": 1024, "store_id": store_id}
        for name, value in expected.items():
            if fields[name] != value:
                raise Invalid(name, value, fields[name])
        return probe(file.fd, 64, 64 * fields["count"]) is not None


def open_store(path: Path) -> tuple[StoreInfo, list[Finding]]:
    """Read `store.json` and see who is alive; no streams yet. Raises Invalid or StorageError."""
    body = read_json(path / "store.json", STORE_JSON)
    identity = bytes.fromhex(body["store_id"])
    findings: list[Finding] = []
    try:
        alive = check_members(path, identity)
    except (Invalid, StorageError) as error:
        alive = False
        findings.append(Note("members", path / "members", None, f"cannot be used: {error}"))
    if not body["clean"]:
        why = (
            "a process has it open" if alive else "the next open raises the generation and walks it"
        )
        findings.append(Note("unclean", path / "store.json", None, f"not closed cleanly: {why}"))
    found = (body["generation"], body["clean"], body["durability"], alive)
    return StoreInfo(path, identity, *found, {}), findings


def stream_paths(path: Path, only: str | None) -> list[Path]:
    """Return the directories of the streams, sorted by name; NotFound if `only` is not one."""
    top = path / "streams"
    if only is not None:
        if not NAME.fullmatch(only) or not (top / only).is_dir():
            raise NotFound(f"no stream {only!r} in {path}")
        return [top / only]
    return [entry for entry in listing(top) if entry.is_dir() and NAME.fullmatch(entry.name)]


def listing(path: Path) -> list[Path]:
    """Return the entries of a directory by name; none where there is no directory."""
    try:
        return sorted(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(error.errno, error.strerror, str(path)) from None


def read_segment(path: Path, store: StoreInfo, stream: StreamInfo, partition: int) -> Any:
    """Return (SegmentInfo or None for a spare, finding or None); raise Invalid on a bad header."""
    with File(path) as file:
        head = file.read(0, SEGMENT.size)
        if len(head) < SEGMENT.size:
            raise Invalid("size of at least", SEGMENT.size, file.size)
        fields = SEGMENT.read(head)
        right = hash64(head[:80])
        newer = fields["checksum"] == right and fields["magic"] == b"MSSEGMT1"
        identity = (store.store_id, stream.stream_id, partition, int(path.stem))
        expected = dict(
            zip(("store_id", "stream_id", "partition", "number"), identity, strict=True)
        )
        expected = {"magic": b"MSSEGMT1", "version": 1, "checksum": right, **expected}
        for name, value in {**expected, "size": file.size}.items():
            if fields[name] != value:
                raise Invalid(name, value, fields[name], newer=newer and name == "version")
        data = fields["data_position"]
        if data % 4096 or not 8192 + 16 * fields["index_count"] <= data <= file.size:
            raise Invalid("data_position", "a page behind the index, in the file", data)
        raw = file.read(4096, ACTIVATION.size)
    record = ACTIVATION.read(raw)
    names = ("number", "size", "data_position", "index_count", "created", "salt")
    where = {"stream": stream.name, "partition": partition, "path": path}
    segment = {**where, **{name: fields[name] for name in names}}
    if not any(raw):
        return None, Note("spare", path, None, "a segment that was never activated")
    right = hash64(raw[8:], fields["salt"])
    sane = record["number"] == fields["number"] and record["base_position"] % 8 == 0
    if record["checksum"] != right or not sane:
        kind = Note("spare", path, 4096, "its activation was begun and not finished")
        if record["checksum"] != 0:
            bad = Invalid("checksum", f"{right:016x}", f"{record['checksum']:016x}")
            return None, bad.problem("activation", path, 4096, "millstream repair may rebuild it")
        return None, kind
    del record["checksum"]
    return SegmentInfo(**{**segment, **record}), None


# A partition's walk -------------------------------------------------------------------------------


class Log:
    """One partition: its segments in order, where its walk ends, and what is found on the way.

    `tail` is the position that the control block gives, None where it cannot be used. `settled`:
    whatever lies below the tail was published and must be whole (the store is clean or alive).
    """

    def __init__(self, store: StoreInfo, stream: StreamInfo, number: int) -> None:
        self.stream, self.number = stream, number
        self.path = stream.path / f"{number:05}"
        self.tail: int | None = None
        self.block: dict[str, Any] = {}
        self.settled = False
        for _ in range(5):  # the tail is read last; a roll in between is seen as a newer segment
            self.findings: list[Finding] = []
            segments = self._load(store)
            self._read_control(store)
            newest = segments[-1].number if segments else 0
            if not (store.alive and self.block.get("active", 0) > newest):
                break
        self.segments = self._chain(segments)
        self._check_control(store)

    def _load(self, store: StoreInfo) -> list[SegmentInfo]:
        segments = []
        for path in listing(self.path):
            if path.suffix in (".tmp", ".lost", ".corrupt"):
                self.findings.append(Note(path.suffix[1:], path, None, "set aside, never read"))
            elif not re.fullmatch(r"[0-9]{16}\.seg", path.name):
                self.findings.append(Note("foreign", path, None, "not a file of a store"))
            else:
                try:
                    segment, finding = read_segment(path, store, self.stream, self.number)
                except Invalid as bad:
                    advice = "its batches cannot be checked without it; restore it from a backup"
                    segment, finding = None, bad.problem("segment", path, 0, advice)
                except StorageError as error:
                    if error.errno == errno.ENOENT:  # retired since it was listed
                        continue
                    segment, finding = None, unreadable(path, error)
                segments += [segment] if segment else []
                self.findings += [finding] if finding else []
        return segments

    def _read_control(self, store: StoreInfo) -> None:
        path = self.stream.path / "control"
        try:
            with File(path) as file:
                fields = CONTROL.read(file.read(0, 4096).tobytes().ljust(CONTROL.size, b"\0"))
                raw = file.read(4096 + 256 * self.number, 256)
            expected = {"magic": b"MSCNTRL1", "version": 1, "store_id": store.store_id}
            for name, value in {**expected, "stream_id": self.stream.stream_id}.items():
                if fields[name] != value:
                    raise Invalid(name, value, fields[name])
            if len(raw) < 256 or self.number >= fields["partitions"]:
                raise Invalid("block of partition", self.number, f"{fields['partitions']} blocks")
            block = BLOCK.read(raw)
            walked = block["walked"] == store.generation
            if walked and store.clean and block["durable"] != block["tail"]:
                raise Invalid("durable, in a clean store,", block["tail"], block["durable"])
        except (Invalid, StorageError) as error:
            self.block, self.tail, self.settled = {}, None, False
            self.findings.append(Note("control", path, None, f"not used: {error}"))
            return
        self.block = block
        self.tail = self.block["tail"] if walked else None
        self.settled = walked and (store.clean or store.alive)

    def _check_control(self, store: StoreInfo) -> None:
        if not self.settled:
            return
        first, active = self.block["first_segment"], self.block["active"]
        numbers = [segment.number for segment in self.segments]
        for what, number in (("oldest", first), ("active", active)):
            gone = number and number not in numbers and (what == "active" or not store.alive)
            if gone and not (what == "oldest" and numbers and numbers[0] < number):
                path = self.path / f"{number:016}.seg"
                advice = "the segment is gone or unreadable: restore it from a backup"
                found = f"segments {numbers[:1]} to {numbers[-1:]}"
                expected = f"segment {number}, the {what} one"
                problem = Problem("missing", path, None, None, expected, found, advice)
                self.findings.append(problem)

    def _chain(self, segments: list[SegmentInfo]) -> list[SegmentInfo]:
        """Return the segments in order, with their ends; findings say what does not belong."""
        chain = segments[-1:]
        for segment in reversed(segments[:-1]):
            after = chain[0]
            linked = after.predecessor == segment.number
            older = after.predecessor > segment.number or after.predecessor == 0
            if (
                linked
                and not segment.base_position <= after.base_position <= segment.limit_position
            ):
                linked, older = False, True
            if not linked and not older:
                advice = "a later segment continues an earlier one: recovery was cut short"
                found = f"predecessor {after.predecessor} of segment {after.number}"
                expected = f"segment {segment.number} in the chain"
                stray = Problem("stray", segment.path, 4096, None, expected, found, advice)
                self.findings.append(stray)
                continue
            end = after.base_position if linked else None
            chain[0] = replace(after, link_broken=not linked)
            chain.insert(0, replace(segment, end_position=end))
        if chain:
            last = chain[-1]
            usable = (
                self.tail is not None and last.base_position <= self.tail <= last.limit_position
            )
            usable = usable and self.block["active"] <= last.number
            chain[-1] = replace(last, active=True, end_position=self.tail if usable else None)
        return chain

    def events(self) -> Iterator[SegmentInfo | Batch | Finding]:
        """Walk: yield each segment, then its batches, with findings where they are found."""
        yield from self.findings
        walk: Walk | None = None
        for index, segment in enumerate(self.segments):
            if walk is None or segment.link_broken:
                if walk is not None:
                    yield self._gap(walk, segment)
                walk = Walk(segment)
            else:
                yield from walk.enter(segment)
            yield segment
            try:
                with File(segment.path) as file:
                    yield from self.segment_events(file, index, walk)
            except StorageError as error:
                if error.errno == errno.ENOENT and index == 0:
                    yield Note("retired", segment.path, None, "retention took it away just now")
                else:
                    yield unreadable(segment.path, error)
                walk.lost = True
            if walk.ended:
                return

    def _gap(self, walk: "Walk", segment: SegmentInfo) -> Problem:
        lost = (walk.offset, segment.base_offset) if walk.offset < segment.base_offset else None
        expected = f"segment {segment.predecessor} before segment {segment.number}"
        advice = "restore it from a backup, or repair its activation record"
        path = self.path / f"{segment.predecessor:016}.seg"
        return Problem("missing", path, None, lost, expected, "none that is sound", advice)

    def segment_events(self, file: File, index: int, walk: "Walk") -> Iterator[Batch | Finding]:
        """Walk one segment; says in `walk` where and how it ended."""
        segment = self.segments[index]
        ends = segment.end_position
        while walk.position < (segment.limit_position if ends is None else ends):
            stop = segment.limit_position if ends is None else ends
            try:
                batch = decode(file, segment, walk.position, stop)
                walk.check(batch)
            except Invalid as bad:
                if segment.active and ends is not None and self._beyond(file, segment, walk):
                    text = f"its tail {ends} lies within a batch that is valid; not used"
                    yield Note("control", self.stream.path / "control", None, text)
                    ends = None
                    continue
                finding, resume = self._failure(file, index, walk, bad, ends)
                if finding is not None:
                    yield finding
                if not isinstance(finding, Problem) or finding.kind == "version":
                    following = self.segments[index + 1 : index + 2]
                    walk.ended = not (following and following[0].link_broken)
                    return
                walk.lost = True
                if resume is None:
                    walk.ended = index + 1 == len(self.segments)
                    return
                walk.resume(resume)
                continue
            yield batch
            walk.pass_over(batch)

    def _beyond(self, file: File, segment: SegmentInfo, walk: "Walk") -> bool:
        try:
            walk.check(decode(file, segment, walk.position, segment.limit_position))
        except Invalid:
            return False
        return True

    def _failure(
        self, file: File, index: int, walk: "Walk", bad: Invalid, ends: int | None
    ) -> tuple[Finding | None, Batch | None]:
        """Tell corruption from a torn tail at walk.position; the batch where a walk can go on."""
        segment, position = self.segments[index], walk.position
        at = segment.file_position(position)
        if bad.newer:
            return bad.problem("version", segment.path, at), None
        published = self.settled and ends is not None
        stop = ends if ends is not None and (published or not segment.active) else None
        limit = segment.limit_position if stop is None else stop
        resume, proof = self._look_further(file, index, walk, limit)
        if proof is None and not published:
            blank = not any(file.read(at, min(BATCH.size, segment.limit_position - position)))
            if resume is None and (blank or segment.limit_position - position < BATCH.size):
                return None, None
            text = f"from here on nothing is proved to have been durable ({bad})"
            return Note("torn", segment.path, at, text), None
        following = self.segments[index + 1 : index + 2]
        after = resume.base_offset if resume else following[0].base_offset if following else None
        if after is None and self.block.get("hint_tail") == ends and ends is not None:
            after = self.block["hint_offset"]
        advice = f"millstream repair sets the damaged bytes aside ({proof or 'below the tail'})"
        if resume is None:
            advice = (
                f"no valid batch follows in this file: restore it ({proof or 'below the tail'})"
            )
        lost = (walk.offset, after)
        return Problem("batch", segment.path, at, lost, bad.expected, bad.found, advice), resume

    def _look_further(
        self, file: File, index: int, walk: "Walk", limit: int
    ) -> tuple[Batch | None, str | None]:
        """Return the next valid batch in this segment, and what proves the failure corruption."""
        segment, position, resume = self.segments[index], walk.position, None
        for batch in scan(file, segment, position, limit):
            if batch is None:
                return resume, "too many plausible headers to search them all"
            if batch.position > position and batch.base_offset >= walk.offset:
                resume = resume or batch
            if batch.synced_position > position:
                return resume, f"the batch at {batch.position} was written when this was durable"
        for later in self.segments[index + 1 :]:
            at, stop = later.base_position, later.end_position or later.limit_position
            try:
                with File(later.path) as other:
                    while at < stop:
                        batch = decode(other, later, at, stop)
                        if batch.synced_position > position:
                            name = later.path.name
                            return resume, f"a batch of {name} was written when this was durable"
                        at += batch.length
            except (Invalid, StorageError):
                continue
        return resume, None


class Walk:
    """What the log must go on with: position, chain, next offset, largest timestamp."""

    def __init__(self, segment: SegmentInfo) -> None:
        self.ended = False  # no more batches, by a torn tail or for want of a place to go on
        self._begin(segment)

    def _begin(self, segment: SegmentInfo) -> None:
        self.position = segment.base_position
        self.hash, self.chain = segment.predecessor_hash, segment.predecessor_hash & LOW
        self.offset, self.timestamp_max = segment.base_offset, segment.timestamp_max
        self.exact = True  # timestamp_max is known, nothing was lost since
        self.lost = False  # what came last is not known
        self.filler = False
        self.epoch = segment.epoch

    def enter(self, segment: SegmentInfo) -> Iterator[Problem]:
        """Go over to the successor, which must begin with what the predecessor ended with."""
        pairs: list[tuple[str, object, object]] = []
        mine, theirs = self.hash, segment.predecessor_hash
        if self.filler:  # it stands for the batch whose low half it carries
            mine, theirs = self.chain, theirs & LOW
        if not self.lost and mine != theirs:
            pairs.append(("predecessor's hash", f"{mine:x}", f"{theirs:x}"))
        if segment.base_offset < self.offset:
            pairs.append(("base offset of at least", self.offset, segment.base_offset))
        if segment.epoch < self.epoch:
            pairs.append(("epoch of at least", self.epoch, segment.epoch))
        if self.exact and not self.lost and segment.timestamp_max != self.timestamp_max:
            pairs.append(("largest timestamp", self.timestamp_max, segment.timestamp_max))
        for what, expected, found in pairs:
            bad = Invalid(what, expected, found)
            yield bad.problem("activation", segment.path, 4096, "restore it from a backup")
        self._begin(segment)

    def check(self, batch: Batch) -> None:
        """Raise Invalid unless the batch continues the log, by rules (7) and (8)."""
        if batch.chain != self.chain:
            raise Invalid("chain", f"{self.chain:08x}", f"{batch.chain:08x}")
        if batch.base_offset < self.offset:
            raise Invalid("base offset of at least", self.offset, batch.base_offset)

    def resume(self, batch: Batch) -> None:
        """Go on at a batch behind damaged bytes."""
        self.position, self.chain, self.exact, self.lost = batch.position, batch.chain, False, False

    def pass_over(self, batch: Batch) -> None:
        """Go on behind a batch that continued the log."""
        self.position += batch.length
        self.hash, self.chain, self.filler = batch.hash, batch.link, bool(batch.flags & FILLER)
        self.offset = max(self.offset, batch.next_offset)
        self.exact = self.exact and not self.filler
        self.lost = False
        if batch.count:
            self.timestamp_max = max(self.timestamp_max, batch.timestamp_max)


def scan(file: File, segment: SegmentInfo, position: int, end: int) -> Iterator[Batch | None]:
    """Yield valid batches at any multiple of 8 from a position on; None: gave up the search."""
    go_on = position
    for block in range(position, end - BATCH.size + 1, WINDOW_BYTES // 2):
        words = file.read(segment.file_position(block) + 8, WINDOW_BYTES // 2).tobytes()
        word = np.frombuffer(words[: len(words) // 8 * 8], "<u8")
        length = word & LOW
        plausible = (word >> 32 & 0xFFFF == 1) & (word >> 48 <= FLAGS_KNOWN)
        plausible &= (length >= BATCH.size) & (length % 8 == 0)
        for index in np.flatnonzero(plausible):
            at = block + 8 * int(index)
            if at < go_on or at + int(length[index]) > end:
                continue
            file.search_bytes -= min(int(length[index]), BATCH_BYTES_MAX)
            if file.search_bytes < 0:
                yield None
                return
            try:
                batch = decode(file, segment, at, end)
            except Invalid:
                continue
            go_on = at + batch.length
            yield batch


def unreadable(path: Path, error: OSError) -> Problem:
    """Return a file that cannot be read as a finding."""
    advice = "check permissions, the disk and the kernel's log"
    return Problem("unreadable", path, None, None, "a file that can be read", str(error), advice)


# What users call ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """What `verify` saw. `bytes` are those of valid batches."""

    streams: int = 0
    partitions: int = 0
    segments: int = 0
    batches: int = 0
    records: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing that was stored is damaged or missing."""
        return not self.problems

    def add(self, finding: Finding) -> None:
        """Keep a finding; a note that the store or stream already has is kept once."""
        if isinstance(finding, Problem):
            self.problems.append(finding)
        elif finding not in self.notes[-64:]:
            self.notes.append(finding)


@dataclass(frozen=True, slots=True)
class Record:
    """One record with all that is known of it."""

    stream: str
    partition: int
    epoch: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


def open_stream(path: Path) -> StreamInfo:
    """Read `stream.json`, no segments yet. Raises Invalid or StorageError."""
    body = read_json(path / "stream.json", STREAM_JSON)
    return StreamInfo(path.name, path, int(body["stream_id"], 16), body, {})


def partition_numbers(stream: StreamInfo) -> list[int]:
    """Return the partitions that have a directory."""
    names = [entry.name for entry in listing(stream.path) if re.fullmatch(r"\d{5}", entry.name)]
    return [int(name) for name in names if int(name) < stream.config["partitions"]]


def damaged(problem: Problem) -> CorruptBatch | VersionMismatch:
    """Return the exception that says what a finding says."""
    if problem.kind == "version":
        return VersionMismatch(str(problem))
    return CorruptBatch(
        str(problem),
        path=problem.path,
        position=problem.position or 0,
        expected=problem.expected,
        found=problem.found,
    )


@contextmanager
def strict(path: Path) -> Iterator[None]:
    """Turn Invalid into the exception of errors.py."""
    try:
        yield
    except Invalid as bad:
        raise damaged(bad.problem("file", path, None, "restore it from a backup")) from None


def logs(path: Path_, stream: str | None = None, partition: int | None = None) -> Iterator[Log]:
    """Yield the partitions of a store; raises what `store` raises."""
    top = Path(path)
    with strict(top / "store.json"):
        info, _ = open_store(top)
    for where in stream_paths(top, stream):
        with strict(where / "stream.json"):
            found = open_stream(where)
        numbers = partition_numbers(found)
        if partition is not None:
            if not 0 <= partition < found.config["partitions"]:
                raise NotFound(f"no partition {partition} in stream {found.name!r}")
            numbers = [number for number in numbers if number == partition]
        for number in numbers:
            yield Log(info, found, number)


def store(path: Path_) -> StoreInfo:
    """Read what a store says of itself: identity, streams, segments. Batches are not read.

    Raises:
        CorruptBatch: a JSON file, a segment header or an activation record is damaged.
        VersionMismatch: a newer format.
        StorageError: a file cannot be read.
    """
    top = Path(path)
    with strict(top / "store.json"):
        info, _ = open_store(top)
    for where in stream_paths(top, None):
        with strict(where / "stream.json"):
            info.streams[where.name] = open_stream(where)
    for log in logs(top):
        for finding in log.findings:
            if isinstance(finding, Problem):
                raise damaged(finding)
        info.streams[log.stream.name].partitions[log.number] = log.segments
    return info


def batches(
    path: Path_, stream: str, partition: int, *, start_position: int | None = None
) -> Iterator[Batch]:
    """Yield the batches of a partition that are valid and continue the log, to its end.

    Ends quietly at a torn tail and at the tail of a live writer.

    Args:
        path: directory of the store.
        stream: name.
        partition: number.
        start_position: batches that begin before it are verified and left out.

    Raises:
        CorruptBatch: damaged bytes; what came before them has been yielded.
        VersionMismatch: a newer format.
        NotFound: no such stream or partition.
        StorageError: a file cannot be read.
    """
    for log in logs(path, stream, partition):
        for batch in sound(log):
            if batch.position >= (start_position or 0):
                yield batch


def sound(log: Log) -> Iterator[Batch]:
    """Yield the batches of a log; the first problem is raised."""
    for event in log.events():
        if isinstance(event, Problem):
            raise damaged(event)
        if isinstance(event, Batch):
            yield event


def records(
    path: Path_, stream: str | None = None, partition: int | None = None
) -> Iterator[Record]:
    """Yield every record, partition by partition, in order. Raises what `batches` raises."""
    for log in logs(path, stream, partition):
        for batch in sound(log):
            columns = (batch.offsets.tolist(), batch.timestamps.tolist(), batch.keys, batch.values)
            where = (batch.stream, batch.partition, batch.epoch)
            for offset, time, key, value, headers in zip(*columns, batch.headers, strict=True):
                yield Record(*where, offset, time, key, value, headers)


def verify(
    path: Path_,
    stream: str | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check every byte that means something, and change none. Damage never ends it early.

    Beside living writers it checks what they had published when it came to the partition.

    Args:
        path: directory of the store.
        stream: only this one.
        progress: called with (bytes done, bytes in all of the segments found so far).

    Raises:
        NotFound: no such stream.
        StorageError: the directory cannot be read.
    """
    top, report = Path(path), Report()
    advice = "restore it from a backup; nothing of it can be guessed"
    total = 0
    try:
        info, findings = open_store(top)
        for finding in findings:
            report.add(finding)
    except Invalid as bad:
        report.add(bad.problem("store", top / "store.json", None, advice))
        return report
    for where in stream_paths(top, stream):
        if where.name.endswith(".tmp") and not (where / "stream.json").exists():
            report.add(Note("tmp", where, None, "set aside, never read"))
            continue
        try:
            found = open_stream(where)
        except Invalid as bad:
            report.add(bad.problem("stream", where / "stream.json", None, advice))
            continue
        except StorageError as error:
            report.add(unreadable(where / "stream.json", error))
            continue
        report.streams += 1
        for number in partition_numbers(found):
            report.partitions += 1
            try:
                log = Log(info, found, number)
            except StorageError as error:
                report.add(unreadable(found.path / f"{number:05}", error))
                continue
            total += sum(
                (s.end_position or s.base_position) - s.base_position for s in log.segments
            )
            for event in checked(log):
                if isinstance(event, SegmentInfo):
                    report.segments += 1
                elif isinstance(event, Batch):
                    report.batches += 1
                    report.records += event.count
                    report.bytes += event.length
                    if progress is not None and report.batches % 64 == 0:
                        progress(report.bytes, max(total, report.bytes))
                else:
                    report.add(event)
    if progress is not None:
        progress(report.bytes, report.bytes)
    return report


def checked(log: Log) -> Iterator[SegmentInfo | Batch | Finding]:
    """Yield the events of a log, and what is wrong with batches' contents and the index."""
    index: Index | None = None
    for event in log.events():
        if isinstance(event, SegmentInfo):
            if index is not None:
                yield from index.end()
            index = Index(event)
        elif isinstance(event, Batch) and index is not None:
            for what, expected, found in event.contradictions():
                bad = Invalid(what, expected, found)
                advice = "the hash is right: it was written like this; report it"
                yield bad.problem("content", event.path, event.file_position, advice)
            index.pass_over(event)
        elif isinstance(event, Problem) and event.kind == "batch" and index is not None:
            index.exact = False
        yield event
    if index is not None:
        yield from index.end()


class Index:
    """A segment's sparse index, held against its batches as they come."""

    def __init__(self, segment: SegmentInfo) -> None:
        self.segment, self.exact = segment, True
        self.timestamp_max, self.entry = segment.timestamp_max, 1
        self.wrong: list[int] = []
        try:
            with File(segment.path) as file:
                raw = file.read(8192, 16 * segment.index_count).tobytes()
        except StorageError:
            raw = b""
        kind = [("offset", "<u4"), ("position", "<u4"), ("timestamp_max", "<i8")]
        self.entries = np.frombuffer(raw[: len(raw) // 16 * 16], kind)

    def pass_over(self, batch: Batch) -> None:
        """Check the entries that stand for this batch."""
        at = batch.position - self.segment.base_position
        while self.entry < len(self.entries) and INDEX_BLOCK_BYTES * self.entry <= at:
            offset, position, timestamp = self.entries[self.entry].tolist()
            right = (offset, position) == (batch.base_offset - self.segment.base_offset, at + 1)
            same = timestamp == self.timestamp_max or (
                not self.exact and timestamp > self.timestamp_max
            )
            if position and not (right and same):
                self.wrong.append(self.entry)
            self.entry += 1
        self.exact = self.exact and not batch.flags & FILLER
        if batch.count:
            self.timestamp_max = max(self.timestamp_max, batch.timestamp_max)

    def end(self) -> Iterator[Note]:
        """Yield what was wrong; a writer may be filling the entries behind the last batch."""
        if self.wrong:
            text = f"{len(self.wrong)} entries do not fit the batches; they are only a cache"
            yield Note("index", self.segment.path, 8192 + 16 * self.wrong[0], text)


def repair(path: Path_, stream: str | None = None, *, dry_run: bool = False) -> "list[Action]":
    """Set damaged bytes of a closed store aside; as `millstream.repair.repair`."""
    from millstream.repair import repair as run  # it is built on this module

    return run(path, stream, dry_run=dry_run)


def dump(
    path: Path_, stream: str | None = None, partition: int | None = None, *, json: bool = False
) -> Iterator[str | dict[str, object]]:
    """Yield one line for each segment, batch and finding, in the order of the log.

    Damage does not end it. With `json`, yields dictionaries that json can write instead.
    Raises what `store` raises for the JSON files.
    """
    for log in logs(path, stream, partition):
        for event in log.events():
            item = described(event, log)
            head, *rest = item.items()
            yield item if json else f"{head[1]} " + " ".join(f"{k}={v}" for k, v in rest)


SHOWN_OF_SEGMENT = (
    "number size data_position base_offset base_position end_position epoch predecessor"
    " timestamp_max active"
)
SHOWN_OF_BATCH = (
    "segment position file_position length count base_offset next_offset timestamp_min"
    " timestamp_max producer sequence synced_distance"
)


def described(event: SegmentInfo | Batch | Finding, log: Log) -> dict[str, object]:
    """Return an event as a dictionary of plain values."""
    where: dict[str, object] = {"stream": log.stream.name, "partition": log.number}
    if isinstance(event, SegmentInfo):
        shown = {name: getattr(event, name) for name in SHOWN_OF_SEGMENT.split()}
        hash_ = f"{event.predecessor_hash:016x}"
        return {"item": "segment", **where, **shown, "predecessor_hash": hash_}
    if isinstance(event, Batch):
        shown = {name: getattr(event, name) for name in SHOWN_OF_BATCH.split()}
        ends = {"flags": f"{event.flags:#05x}", "hash": f"{event.hash:016x}"}
        return {"item": "batch", **where, **shown, **ends, "chain": f"{event.chain:08x}"}
    word = "problem" if isinstance(event, Problem) else "note"
    plain = {"kind": event.kind, "path": str(event.path), "position": event.position}
    return {"item": word, **where, **plain, "text": str(getattr(event, "text", event))}
