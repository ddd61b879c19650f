"""Builds store directories byte by byte from docs/format.md: no code of the package is used.

    builder = StoreBuilder(path)
    log = builder.stream("s").log(0)
    log.append([b"a", None], keys=[b"k", None])
    log.roll()
    builder.write()          # everything is in memory until here; write() may be called again

What `append` returns says where the bytes lie, so that a test can damage them: `flip`, `poke`.
"""

import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

TIMESTAMPS, OFFSETS, KEYS, KEY_NULLS, VALUE_NULLS, HEADERS, FIXED, ALIGN64, FILLER = (
    1 << bit for bit in range(9)
)
MASK = (1 << 64) - 1
NONE = -(1 << 63)
HEADER = struct.Struct("<QIHHQIIqqIIQ")


def hash64(data: bytes, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(data, seed & MASK)


def json_bytes(body: dict, checksum: str | None = None) -> bytes:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    checksum = checksum or f"{hash64(text.encode()):016x}"
    return json.dumps({"body": body, "checksum": checksum}).encode()


def offsets_and_bytes(items: list) -> list[bytes]:
    ends = [0]
    for item in items:
        ends.append(ends[-1] + len(item or b""))
    return [struct.pack(f"<{len(ends)}i", *ends), b"".join(item or b"" for item in items)]


def bitmap(items: list) -> bytes:
    bits = bytearray(-(-len(items) // 8))
    for i, item in enumerate(items):
        if item is not None:
            bits[i // 8] |= 1 << i % 8
    return bytes(bits)


def encode_body(
    values: list,
    keys: list | None = None,
    headers: list | None = None,
    timestamps: list | None = None,
    offsets: list | None = None,
) -> tuple[int, list[bytes]]:
    """Return flags (without ALIGN64) and the buffers in order."""
    flags, buffers, count = 0, [], len(values)
    if timestamps is not None and len(set(timestamps)) > 1:
        flags |= TIMESTAMPS
        buffers.append(struct.pack(f"<{count}q", *timestamps))
    if offsets is not None:
        flags |= OFFSETS
        buffers.append(struct.pack(f"<{count}q", *offsets))
    if keys is not None and any(key is not None for key in keys):
        flags |= KEYS
        if None in keys:
            flags |= KEY_NULLS
            buffers.append(bitmap(keys))
        buffers += offsets_and_bytes(keys)
    if None in values:
        flags |= VALUE_NULLS
        buffers.append(bitmap(values))
    elif len({len(value) for value in values}) == 1:
        flags |= FIXED
    buffers += offsets_and_bytes(values)
    if headers is not None and any(headers):
        flags |= HEADERS
        pairs = [pair for row in headers for pair in row]
        buffers.append(offsets_and_bytes([bytes(len(row)) for row in headers])[0])
        buffers += offsets_and_bytes([name.encode() for name, _ in pairs])
        buffers += offsets_and_bytes([value for _, value in pairs])
    return flags, buffers


def lay_out(buffers: list[bytes], file_position: int, alignment: int) -> bytes:
    """Return the body (behind the header), padded at both ends as the format wants it."""
    at = file_position + 64
    body = b""
    for buffer in buffers:
        padding = bytes(-(at + len(body)) % alignment)
        body += padding + buffer
    return body + bytes(-(at + len(body)) % 8)


def seal(raw: bytes, salt: int, position: int, *, filler: bool = False) -> bytes:
    """Return the batch with the hash that belongs to it."""
    covered = raw[8:64] if filler else raw[8:]
    return struct.pack("<Q", hash64(covered, salt + position)) + raw[8:]


@dataclass
class Placed:
    """Where a batch lies and what it holds."""

    segment: "Segment"
    position: int
    length: int
    base_offset: int
    count: int
    values: list = field(default_factory=list)

    @property
    def at(self) -> int:
        """Its byte of the file."""
        return self.segment.file_position(self.position)

    @property
    def end(self) -> int:
        return self.at + self.length


@dataclass
class Segment:
    number: int
    salt: int
    base_offset: int
    base_position: int
    epoch: int
    predecessor: int
    predecessor_hash: int
    timestamp_max: int
    size: int
    data_position: int
    data: bytearray = field(repr=False, default_factory=bytearray)
    activated: bool = True

    def file_position(self, position: int) -> int:
        return position - self.base_position + self.data_position

    @property
    def index_count(self) -> int:
        return (self.size - self.data_position) // 32768 + 1


class Log:
    """One partition in the making."""

    def __init__(self, stream: "Stream", number: int) -> None:
        self.stream, self.number = stream, number
        self.segments: list[Segment] = []
        self.position, self.offset, self.hash, self.chain = 0, 0, 0, 0
        self.timestamp_max = NONE
        self.durable = 0
        self.control: dict[str, int] = {}  # overrides of the control block

    @property
    def path(self) -> Path:
        return self.stream.path / f"{self.number:05}"

    @property
    def segment(self) -> Segment:
        return self.segments[-1]

    def file(self, segment: Segment | None = None) -> Path:
        return self.path / f"{(segment or self.segment).number:016}.seg"

    def roll(
        self,
        *,
        epoch: int | None = None,
        number: int | None = None,
        size: int = 65536,
        cut: Placed | None = None,
        base_position: int | None = None,
    ) -> Segment:
        """Activate a new segment; `cut` continues the log behind that batch, as recovery does."""
        last = self.segments[-1] if self.segments else None
        if cut is not None:
            self.position, self.offset = cut.position + cut.length, cut.base_offset + cut.count
            start = cut.at
            (self.hash,) = struct.unpack_from("<Q", cut.segment.data, start)
            self.chain = self.hash & 0xFFFFFFFF
        elif base_position is not None:
            self.position = base_position
        data_position = 12288
        while 8192 + 16 * ((size - data_position) // 32768 + 1) > data_position:
            data_position += 4096
        segment = Segment(
            number=number or (last.number + 1 if last else 1),
            salt=hash64(f"{self.number}/{len(self.segments)}".encode()),
            base_offset=self.offset,
            base_position=self.position,
            epoch=epoch or (last.epoch if last else self.stream.store.generation),
            predecessor=last.number if last else 0,
            predecessor_hash=self.hash,
            timestamp_max=self.timestamp_max,
            size=size,
            data_position=data_position,
        )
        segment.data = bytearray(size)
        self._write_header(segment)
        self.write_activation(segment)
        self.chain = self.hash & 0xFFFFFFFF
        self.segments.append(segment)
        return segment

    def _write_header(self, segment: Segment) -> None:
        store = self.stream.store
        head = struct.pack(
            "<8sII16sQQQQIIq", b"MSSEGMT1", 1, self.number, store.store_id, self.stream.stream_id,
            segment.number, segment.salt, segment.size, segment.index_count, segment.data_position,
            1_700_000_000_000_000,
        )  # fmt: skip
        segment.data[:88] = head + struct.pack("<Q", hash64(head))

    def write_activation(self, segment: Segment) -> None:
        record = struct.pack(
            "<QQQQQQqq", segment.number, segment.base_offset, segment.base_position, segment.epoch,
            segment.predecessor, segment.predecessor_hash, 1_700_000_000_000_001,
            segment.timestamp_max,
        )  # fmt: skip
        segment.data[4096:4168] = struct.pack("<Q", hash64(record, segment.salt)) + record

    def append(
        self,
        values: list,
        *,
        keys: list | None = None,
        headers: list | None = None,
        timestamps: list | int = 0,
        offsets: list | None = None,
        align64: bool | None = None,
        synced: int | None = None,
        base_offset: int | None = None,
        flags_or: int = 0,
        format: int = 1,
        producer: int = 0,
        sequence: int = 0,
        chain: int | None = None,
    ) -> Placed:
        """Add one batch; `synced` is the durable position that its header tells."""
        if not self.segments:
            self.roll()
        segment, position = self.segment, self.position
        at = segment.file_position(position)
        times = [timestamps] * len(values) if isinstance(timestamps, int) else timestamps
        flags, buffers = encode_body(values, keys, headers, times, offsets)
        if align64 is None:
            align64 = len(lay_out(buffers, at, 8)) >= 4096
        if align64:
            flags |= ALIGN64
        body = lay_out(buffers, at, 64 if align64 else 8)
        base = self.offset if base_offset is None else base_offset
        if offsets is not None and base_offset is None:
            base = offsets[0]
        length = 64 + len(body)
        durable = self.durable if synced is None else synced
        raw = HEADER.pack(
            0, length, format, flags | flags_or, base, len(values),
            self.chain if chain is None else chain, min(times), max(times), producer,
            min((position - durable) // 8, 0xFFFFFFFF), sequence,
        ) + body  # fmt: skip
        self.write_index(segment, position, base)
        following = offsets[-1] + 1 if offsets is not None else base + len(values)
        placed = Placed(segment, position, length, base, len(values), list(values))
        self._place(placed, seal(raw, segment.salt, position))
        self.offset = following
        self.timestamp_max = max(self.timestamp_max, *times)
        return placed

    def filler(self, length: int, *, next_chain: int = 0x1234) -> Placed:
        if not self.segments:
            self.roll()
        position = self.position
        raw = HEADER.pack(
            0, length, 1, FILLER, self.offset, 0, self.chain, 0, 0, 0, 0, next_chain
        ) + b"\xdb" * (length - 64)  # fmt: skip
        self.write_index(self.segment, position, self.offset)
        placed = Placed(self.segment, position, length, self.offset, 0)
        self._place(placed, seal(raw, self.segment.salt, position, filler=True))
        self.chain = next_chain
        return placed

    def write_index(self, segment: Segment, position: int, base_offset: int) -> None:
        """Fill the index entries that stand for the batch that begins here."""
        relative = position - segment.base_position
        for k in range(1, segment.index_count):
            at = 8192 + 16 * k
            empty = not any(segment.data[at : at + 16])
            if 32768 * k <= relative and empty:
                entry = struct.pack(
                    "<IIq", base_offset - segment.base_offset, relative + 1, self.timestamp_max
                )
                segment.data[at : at + 16] = entry

    def _place(self, placed: Placed, raw: bytes) -> None:
        assert placed.end <= placed.segment.size, "the batch does not fit the segment"
        placed.segment.data[placed.at : placed.end] = raw
        self.hash = struct.unpack_from("<Q", raw)[0]
        self.chain = self.hash & 0xFFFFFFFF
        self.position = placed.position + placed.length

    def poke(self, segment: Segment, at: int, raw: bytes) -> None:
        segment.data[at : at + len(raw)] = raw

    def block(self) -> bytes:
        active = self.segments[-1].number if self.segments else 0
        values = {
            "append": 0, "poison": 0, "tail": self.position, "hint_tail": self.position,
            "hint_offset": self.offset, "hint_timestamp": self.timestamp_max,
            "hint_hash": self.hash, "active": active, "sync": 0, "durable_hash": 0,
            "durable": self.position if self.stream.store.clean else self.durable,
            "durable_offset": self.offset,
            "walked": self.stream.store.generation,
            "first_segment": self.segments[0].number if self.segments else 0,
            "first_offset": self.segments[0].base_offset if self.segments else 0,
            **self.control,
        }  # fmt: skip
        return struct.pack("<IIQQQqQQ8xIIQQ48xQQQ", *values.values()).ljust(256, b"\0")

    def write(self) -> None:
        self.path.mkdir(mode=0o700, exist_ok=True)
        for segment in self.segments:
            put(self.file(segment), bytes(segment.data))


class Stream:
    """One stream in the making."""

    def __init__(self, store: "StoreBuilder", name: str, partitions: int) -> None:
        self.store, self.name, self.partitions = store, name, partitions
        self.stream_id = hash64(name.encode())
        self.logs: dict[int, Log] = {}
        self.control = True  # whether a control file is written

    @property
    def path(self) -> Path:
        return self.store.path / "streams" / self.name

    def log(self, number: int) -> Log:
        return self.logs.setdefault(number, Log(self, number))

    @property
    def body(self) -> dict:
        return {
            "format": 1, "stream_id": f"{self.stream_id:016x}", "partitions": self.partitions,
            "hash": "xxh3-64", "segment_bytes": 1 << 20,
            "retention": {"bytes": None, "age": None, "records": None}, "durability": None,
        }  # fmt: skip

    def control_bytes(self) -> bytes:
        head = struct.pack(
            "<8sII16sQQII", b"MSCNTRL1", 1, self.partitions, self.store.store_id, self.stream_id,
            self.store.generation, 1, 0,
        )  # fmt: skip
        blocks = (self.log(number).block() for number in range(self.partitions))
        return head.ljust(4096, b"\0") + b"".join(blocks)

    def write(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        put(self.path / "stream.json", json_bytes(self.body))
        if self.control:
            put(self.path / "control", self.control_bytes())
        for log in list(self.logs.values()):
            log.write()


class StoreBuilder:
    """One store in the making; `write` puts all of it into the directory."""

    def __init__(self, path: Path, *, generation: int = 1, clean: bool = True) -> None:
        self.path, self.generation, self.clean = Path(path), generation, clean
        self.store_id = bytes(range(16))
        self.streams: dict[str, Stream] = {}

    def stream(self, name: str = "s", partitions: int = 1) -> Stream:
        return self.streams.setdefault(name, Stream(self, name, partitions))

    @property
    def body(self) -> dict:
        return {
            "format": 1, "store_id": self.store_id.hex(), "generation": self.generation,
            "clean": self.clean, "durability": "interval",
        }  # fmt: skip

    def write(self) -> Path:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.path / "streams").mkdir(mode=0o700, exist_ok=True)
        put(self.path / "store.json", json_bytes(self.body))
        members = struct.pack("<8sII16s", b"MSMEMBR1", 1, 1024, self.store_id).ljust(64, b"\0")
        put(self.path / "members", members + bytes(64 * 1024))
        for stream in self.streams.values():
            stream.write()
        return self.path


def put(path: Path, raw: bytes) -> None:
    """Write a file with the mode that files of a store have."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(raw)


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Turn over one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def poke(path: Path, at: int, raw: bytes) -> None:
    """Overwrite bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(raw)
