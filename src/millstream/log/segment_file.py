"""Making one segment file: how large, and what its header says."""

from __future__ import annotations

import os
import struct
import time

from millstream import _native
from millstream.disk import files
from millstream.errors import StoreFull

FIRST_BYTES = 1 << 20
SMALLEST_BYTES = 1 << 16
LARGEST_BYTES = (4 << 30) - (1 << 20)
HEADER = struct.Struct("<8sII16sQQQQIIq")
MAGIC = b"MSSEGMT1"


def is_segment(name: str) -> bool:
    """Is it the name of a published segment?"""
    return len(name) == 20 and number_of(name) > 0


def number_of(name: str) -> int:
    """The number in the name of a segment, also of one that was set aside; else 0."""
    digits, dot_seg = name[:16], name[16:20]
    numbered = len(digits) == 16 and digits.isascii() and digits.isdigit() and dot_seg == ".seg"
    return int(digits) if numbered and not name.endswith(".tmp") else 0


def make(
    path: files.Path,
    place: tuple[int, bytes, int, int],
    *,
    before_bytes: int,
    segment_bytes: int,
    need_bytes: int,
) -> None:
    """Publish a new file with room for `need_bytes`, where nobody else has published it.

    Twice as large as the one before it, up to the stream's `segment_bytes`; smaller where the disk
    is nearly full, so that what is left of it is used. `place` is the partition's index, the
    store's id, the stream's, and the segment's number.
    """
    size = min(before_bytes * 2 or FIRST_BYTES, segment_bytes)
    overhead = 8192 + 2 * 4096 + (need_bytes + size) // 2048 + 16
    least = need_bytes + overhead + 4095 & ~4095
    size = min(max(size, least), LARGEST_BYTES)
    while True:
        try:
            files.make(path, size, header(place, size))
            return
        except StoreFull:
            if size // 2 < max(least, SMALLEST_BYTES):
                raise
            size = size // 2 + 4095 & ~4095


def header(place: tuple[int, bytes, int, int], size: int) -> bytes:
    """Return the header of a new file, with a salt of its own."""
    index, store_id, stream_id, number = place
    index_count, data_position = _native.segment_geometry(size)
    salt = int.from_bytes(os.urandom(8), "little")
    fields = (
        MAGIC, files.FORMAT, index, store_id, stream_id, number, salt, size, index_count,
        data_position, int(time.time() * 1e6),
    )  # fmt: skip
    packed = HEADER.pack(*fields)
    return packed + struct.pack("<Q", _native.xxh3_64(packed))
