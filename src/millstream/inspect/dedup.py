"""The table of deduplication keys of a queue: what is wrong with it; a header page made anew."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from millstream.inspect.layout import File, Finding, Invalid, Layout, Note, hash64
from millstream.inspect.queue_layout import PAGE, check

DEDUP = Layout("8sII16sQQI", "magic version stripes store_id queue_id checksum state")
STRIPES_MAX, STRIPE_ENTRIES, ENTRY_BYTES = 1 << 20, 64, 40
EMPTY, PENDING, DONE = 0, 1, 2
CHECKED_BYTES = 32  # of an entry


def entries_at(stripes: int) -> int:
    """Return the byte at which the entries begin, behind an owner word a stripe."""
    return PAGE + -(-4 * stripes // PAGE) * PAGE


def table_bytes(stripes: int) -> int:
    """Return the size of a table."""
    return entries_at(stripes) + stripes * STRIPE_ENTRIES * ENTRY_BYTES


def read_header(file: File, store_id: bytes, queue_id: int) -> int:
    """Return the number of stripes; raises Invalid."""
    raw = file.read(0, PAGE).tobytes()
    if len(raw) < PAGE:
        raise Invalid("size of at least", PAGE, file.size)
    ids = {"store_id": store_id, "queue_id": queue_id}
    fields = DEDUP.read(raw)
    check(fields, {"magic": b"MSQDEDU1", "version": 1, "checksum": hash64(raw[:40]), **ids})
    stripes: int = fields["stripes"]
    if not 1 <= stripes <= STRIPES_MAX or stripes & (stripes - 1):
        raise Invalid("stripes", f"a power of two to {STRIPES_MAX}", stripes)
    if table_bytes(stripes) > file.size:
        raise Invalid("size of at least", table_bytes(stripes), file.size)
    return stripes


def findings(path: Path, store_id: bytes, queue_id: int) -> Iterator[Finding]:
    """Yield what is wrong with a table. Entries that do not fit their check count as empty."""
    with File(path) as file:
        try:
            stripes = read_header(file, store_id, queue_id)
        except Invalid as bad:
            advice = "millstream repair makes the header page anew"
            yield bad.problem("dedup", path, 0, advice)
            return
        torn = 0
        step = STRIPE_ENTRIES * ENTRY_BYTES
        for stripe in range(stripes):
            raw = file.read(entries_at(stripes) + stripe * step, step).tobytes()
            states = np.frombuffer(raw, "<u4")[9::10]
            for index in np.flatnonzero(states).tolist():
                entry = raw[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES]
                found, place = struct.unpack_from("<II", entry, CHECKED_BYTES)
                right = hash64(entry[:CHECKED_BYTES], place >> 2) & 0xFFFF_FFFF
                torn += found != right or place & 3 not in (PENDING, DONE)
        if torn:
            yield Note("dedup", path, None, f"{torn} entries are torn; they count as empty")


def page(file: File, store_id: bytes, queue_id: int) -> tuple[int, bytes]:
    """Return the number of stripes that a file must have had, and the header page for it."""
    stripes = 1
    while stripes < STRIPES_MAX and table_bytes(2 * stripes) <= file.size:
        stripes *= 2
    head = struct.pack("<8sII16sQ", b"MSQDEDU1", 1, stripes, store_id, queue_id)
    head += struct.pack("<QI", hash64(head), 1)
    return stripes, head.ljust(PAGE, b"\0")
