"""The structs of a queue's files by docs/format.md, and where each of them lies."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millstream.inspect.layout import (
    HEADER_BYTES_MAX,
    HEADER_COUNT_MAX,
    NAME_BYTES_MAX,
    Invalid,
    Layout,
    hash64,
)

EXTENT_SLOTS, EXTENT_BLOCKS, PAGE = 1024, 512, 4096
SLOT_COUNT_MAX, BLOCK_COUNT_MAX, SLOT_BYTES_MAX = 1 << 24, (1 << 24) - 1, 1 << 20
FAILURE_BYTES, TEXT_BYTES_MAX, DAMAGED = 256, 108, 6

FREE, WRITING, READY, DELAYED, LEASED, DEAD, SPARE = 0, 3, 5, 6, 9, 10, 12
STATES = {
    FREE: "free",
    WRITING: "writing",
    READY: "ready",
    DELAYED: "delayed",
    LEASED: "leased",
    DEAD: "dead",
    SPARE: "spare",
    15: "held",
    17: "prepared",
    18: "acking",
}
HOLDING = (READY, DELAYED, LEASED, DEAD, 15, 17, 18)
KINDS = {1: "failed", 2: "lease", 3: "death", 4: "rejected", 5: "decode", DAMAGED: "damaged"}

SLOTS = Layout("8sII16sQQQ", "magic version slot_bytes store_id queue_id salt checksum")
SLOTS_LIVE = Layout("III52xQ", "slot_count paused poison next_id")  # at byte 128
BLOCKS = Layout("8sII16sQQ", "magic version block_max store_id queue_id checksum")
HINTS = Layout("8sII16sQIII", "magic version slot_max store_id queue_id lanes cell_bits ordered")
SLOT = Layout(
    "QQqqqQ16sIIIIQIHH",
    "hash id put_at due expires key_hash dedup payload_length key_length headers_length first_block"
    " content_hash slot reuse lane",
)
FAILURE = Layout(
    "QQqqHBBB3x108s108s",
    "hash id first_at last_at attempts kind first_length last_length first last",
)
QUEUE_JSON = {
    "queue_id": str,
    "capacity": int,
    "dead_limit": int,
    "slot_bytes": int,
    "payload_bytes": int,
    "priorities": int,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why attempts failed: the first and the last time, and how many had been made by then."""

    kind: str
    attempts: int
    first_at: int
    last_at: int
    first: str
    last: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message that is not over. Times are in microseconds; `due` and `expires` 0: none.

    `failures`: the valid records, the newest first.
    """

    queue: str
    slot: int
    state: str
    id: int
    lane: int
    attempts: int
    reuse: int
    tick: int
    put_at: int
    due: int
    expires: int
    key: bytes | None
    headers: list[tuple[str, bytes]]
    payload: bytes
    blocks: list[int]
    failures: list[Failure]

    @property
    def content_bytes(self) -> int:
        """Bytes of its payload, key and values of headers."""
        return (
            len(self.payload) + len(self.key or b"") + sum(len(value) for _, value in self.headers)
        )


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """A queue as `queue.json` and the header of `slots` have it."""

    name: str
    path: Path
    queue_id: int
    config: dict[str, Any]
    slot_bytes: int = 0
    salt: int = 0
    slot_count: int = 0
    paused: bool = False
    poison: int = 0
    next_id: int = 0
    block_count: int = 0

    @property
    def extent_bytes(self) -> int:
        """Bytes of 1,024 slots with their words and failure records."""
        return EXTENT_SLOTS * (8 + self.slot_bytes + 2 * FAILURE_BYTES)

    @property
    def slot_max(self) -> int:
        """How many slots there can be."""
        return int(self.config["capacity"] + self.config["dead_limit"])

    @property
    def slots_bytes(self) -> int:
        """Bytes that `slots` has at least: it is made as long as it can become."""
        return PAGE + -(-self.slot_max // EXTENT_SLOTS) * self.extent_bytes

    @property
    def blocks_bytes(self) -> int:
        """The same of `blocks`."""
        extents = -(-self.config["payload_bytes"] // (PAGE * EXTENT_BLOCKS))
        return int(PAGE + extents * EXTENT_BLOCKS * (8 + PAGE))

    def word_at(self, slot: int) -> int:
        """Return the byte of a slot's state word."""
        extent, index = divmod(slot, EXTENT_SLOTS)
        return PAGE + extent * self.extent_bytes + 8 * index

    def slot_at(self, slot: int) -> int:
        """Return the byte of a slot."""
        extent, index = divmod(slot, EXTENT_SLOTS)
        front = PAGE + extent * self.extent_bytes + 8 * EXTENT_SLOTS
        return front + index * self.slot_bytes

    def failure_at(self, slot: int, which: int) -> int:
        """Return the byte of one of a slot's two failure records."""
        extent, index = divmod(slot, EXTENT_SLOTS)
        front = PAGE + extent * self.extent_bytes + EXTENT_SLOTS * (8 + self.slot_bytes)
        return front + (2 * index + which) * FAILURE_BYTES

    def seed(self, slot: int, reuse: int) -> int:
        """Return the seed of the hashes of a slot."""
        return self.salt ^ (slot << 10 | reuse)


def block_word_at(block: int) -> int:
    """Return the byte of a block's word."""
    extent, index = divmod(block, EXTENT_BLOCKS)
    return PAGE + extent * EXTENT_BLOCKS * (8 + PAGE) + 8 * index


def block_at(block: int) -> int:
    """Return the byte of a block."""
    extent, index = divmod(block, EXTENT_BLOCKS)
    return PAGE + extent * EXTENT_BLOCKS * (8 + PAGE) + EXTENT_BLOCKS * 8 + index * PAGE


@dataclass(frozen=True, slots=True)
class Word:
    """A state word, taken apart."""

    value: int
    state: int = field(init=False)
    lane: int = field(init=False)
    attempts: int = field(init=False)
    reuse: int = field(init=False)
    tick: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", self.value >> 59)
        object.__setattr__(self, "lane", self.value >> 56 & 7)
        object.__setattr__(self, "attempts", self.value >> 50 & 63)
        object.__setattr__(self, "reuse", self.value >> 40 & 1023)
        object.__setattr__(self, "tick", self.value & (1 << 34) - 1)


def check(fields: dict[str, Any], expected: dict[str, object]) -> None:
    """Raise Invalid at the first field that is not as expected, a newer version as such."""
    newer = fields["magic"] == expected["magic"] and fields["version"] > 1
    newer = newer and fields.get("checksum") == expected.get("checksum")
    for name, value in expected.items():
        if fields[name] != value:
            raise Invalid(name, value, fields[name], newer=newer and name == "version")


def content_hash(content: bytes, lengths: list[int], seed: int) -> int:
    """Return the hash of a content in blocks: each part's is the seed of the next."""
    at = 0
    for length in lengths:
        seed = hash64(content[at : at + length], seed)
        at += length
    return seed


def headers_of(raw: bytes) -> list[tuple[str, bytes]]:
    """Return the headers of a message; Invalid where they do not fill their length."""
    found: list[tuple[str, bytes]] = []
    at = 0
    while at < len(raw):
        end = at + 1 + raw[at]
        if end + 4 > len(raw) or len(found) == HEADER_COUNT_MAX or raw[at] > NAME_BYTES_MAX:
            raise Invalid("headers that fill", f"{len(raw)} bytes", f"{len(found)} and a part")
        name = raw[at + 1 : end].decode(errors="replace")
        size: int = struct.unpack_from("<I", raw, end)[0]
        if size > min(HEADER_BYTES_MAX, len(raw) - end - 4):
            raise Invalid("headers that fill", f"{len(raw)} bytes", f"a value of {size}")
        found.append((name, raw[end + 4 : end + 4 + size]))
        at = end + 4 + size
    return found
