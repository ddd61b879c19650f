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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from millstream.errors import CorruptBatch, NotFound, StorageError, VersionMismatch

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
        lost = "" if self.offset_range is None else " (offsets {} to {})".format(*self.offset_range)
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
        super().__init__(what)
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
                while wanted and (part := os.pread(self.fd, wanted, position + sum(map(len, parts)))):
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
        return [pairs[a:b] for a, b in zip(ends, ends[1:], strict=False)]

    def _items(self, name: str) -> list[bytes | None]:
        raw = self.columns[name + "s"].tobytes()
        ends = self.columns[name + "_offsets"].tolist()
        items: list[bytes | None]
        items = [raw[a:b] for a, b in zip(ends, ends[1:], strict=False)]
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
            rising = bool((offsets[1:] > offsets[:-1]).all()) and int(offsets[0]) >= self.base_offset
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
        body, checksum = whole["body"], whole["checksum"]
        text = jsonlib.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"[:200]
        raise Invalid("a JSON object with", "body and checksum", found) from None
    if checksum != (right := f"{hash64(text.encode()):016x}"):
        raise Invalid("checksum", right, checksum)
    version = body.get("format") if isinstance(body, dict) else None
    if version != 1:
        raise Invalid("format", 1, version, newer=isinstance(version, int) and version > 1)
    for name, kind in kinds.items():
        value = body.get(name)
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
            raise Invalid(f"{name} of type", getattr(kind, "__name__", kind), value)
    for name, digits in (("store_id", 32), ("stream_id", 16)):
        if name in kinds and not re.fullmatch(f"[0-9a-f]{{{digits}}}", body[name]):
            raise Invalid(name, f"{digits} hex digits", body[name])
    return body


STORE_JSON = {"store_id": str, "generation": int, "clean": bool, "durability": str}
STREAM_JSON = {"stream_id": str, "partitions": int, "segment_bytes": int}


def probe(fd: int, start: int, length: int) -> int | None:
    """Return the first byte in a range that another opener holds a lock on, or None."""
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))
    return None if answer[0] == fcntl.F_UNLCK else int(answer[2])


def check_members(path: Path, store_id: bytes) -> bool:
    """Return whether any process has the store open; raise Invalid or StorageError if unreadable."""
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
        why = "a process has it open" if alive else "the next open raises the generation and walks it"
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
        expected = dict(zip(("store_id", "stream_id", "partition", "number"), identity, strict=True))
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
