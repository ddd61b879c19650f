"""One batch: its header, its buffers, and the rules that make it valid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from millstream.inspect.layout import (
    ALIGN64,
    BATCH,
    BATCH_BYTES_MAX,
    FILLER,
    FIXED,
    FLAGS_KNOWN,
    HEADER_BYTES_MAX,
    HEADER_COUNT_MAX,
    HEADERS,
    KEY_BYTES_MAX,
    KEY_NULLS,
    KEYS,
    LOW,
    NAME_BYTES_MAX,
    OFFSETS,
    TIMESTAMPS,
    VALUE_BYTES_MAX,
    VALUE_NULLS,
    Array,
    File,
    Invalid,
    hash64,
)

if TYPE_CHECKING:
    from millstream.inspect.catalog import SegmentInfo


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
        if column is None or not self.count:
            return self.base_offset + self.count
        return int(column.max()) + 1

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


def decode(file: File, segment: SegmentInfo, position: int, end: int) -> Batch:
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
    if count if filler else not count and not flags & OFFSETS:
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
