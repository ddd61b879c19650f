"""Builds the files of a queue byte by byte from docs/format.md: no code of the package is used.

queue = QueueBuilder(StoreBuilder(path), "mail")
slot = queue.put(b"payload", key=b"k", headers=[("h", b"v")])
queue.write()             # everything is in memory until here; write() may be called again
"""

import struct
from pathlib import Path

from store_builder import StoreBuilder, hash64, json_bytes
from store_builder import put as put_file

FREE, WRITING, READY, DELAYED, LEASED, DEAD, SPARE, HELD, PREPARED, ACKING = (
    0, 3, 5, 6, 9, 10, 12, 15, 17, 18,
)  # fmt: skip
PAGE = 4096


def word(
    state: int,
    *,
    lane: int = 0,
    attempts: int = 0,
    reuse: int = 1,
    grant: int = 0,
    tick: int = 77,
) -> int:
    return state << 59 | lane << 56 | attempts << 50 | reuse << 40 | grant << 34 | tick


class QueueBuilder:
    """One queue in the making."""

    def __init__(
        self,
        store: StoreBuilder,
        name: str = "q",
        *,
        slot_bytes: int = 256,
        extents: int = 1,
        capacity: int = 1000,
        dead_limit: int = 24,
        block_extents: int = 1,
    ) -> None:
        self.store, self.name, self.slot_bytes = store, name, slot_bytes
        self.capacity, self.dead_limit, self.slot_count = capacity, dead_limit, extents * 1024
        self.queue_id, self.salt = hash64(name.encode()), hash64(name.encode(), 9)
        self.extent = 1024 * (8 + slot_bytes + 512)
        self.slots = bytearray(PAGE + extents * self.extent)
        self.block_count = block_extents * 512
        self.blocks = bytearray(PAGE + block_extents * 512 * (8 + PAGE))
        self.next_slot, self.next_block, self.next_id = 0, 0, (1 << 40) + 1
        self.config: dict[str, object] = {}
        for slot in range(capacity, self.slot_count):
            self.set_word(slot, word(SPARE, reuse=0, tick=0))
        self.headers()

    @property
    def path(self) -> Path:
        return self.store.path / "queues" / self.name

    def headers(self, *, slot_count: int | None = None, block_count: int | None = None) -> None:
        """Write both header pages."""
        ids = self.store.store_id, self.queue_id
        head = struct.pack("<8sII16sQQ", b"MSQSLOT1", 1, self.slot_bytes, *ids, self.salt)
        live = struct.pack("<III52xQ", slot_count or self.slot_count, 0, 0, self.next_id)
        head = (head + struct.pack("<Q", hash64(head))).ljust(128, b"\0") + live
        self.slots[:PAGE] = head.ljust(PAGE, b"\0")
        head = struct.pack("<8sII16sQ", b"MSQBLCK1", 1, self.block_count, *ids)
        head = (head + struct.pack("<Q", hash64(head))).ljust(128, b"\0")
        head += struct.pack("<I", block_count or self.block_count)
        self.blocks[:PAGE] = head.ljust(PAGE, b"\0")

    # where things lie

    def word_at(self, slot: int) -> int:
        return PAGE + slot // 1024 * self.extent + slot % 1024 * 8

    def slot_at(self, slot: int) -> int:
        return PAGE + slot // 1024 * self.extent + 8192 + slot % 1024 * self.slot_bytes

    def failure_at(self, slot: int, which: int) -> int:
        front = PAGE + slot // 1024 * self.extent + 1024 * (8 + self.slot_bytes)
        return front + (slot % 1024 * 2 + which) * 256

    def block_word_at(self, block: int) -> int:
        return PAGE + block // 512 * 512 * (8 + PAGE) + block % 512 * 8

    def block_at(self, block: int) -> int:
        return PAGE + block // 512 * 512 * (8 + PAGE) + 4096 + block % 512 * PAGE

    # what lies there

    def seed(self, slot: int, reuse: int) -> int:
        return self.salt ^ (slot << 10 | reuse)

    def set_word(self, slot: int, value: int) -> None:
        struct.pack_into("<Q", self.slots, self.word_at(slot), value)

    def get_word(self, slot: int) -> int:
        found: int = struct.unpack_from("<Q", self.slots, self.word_at(slot))[0]
        return found

    def put(
        self,
        payload: bytes,
        *,
        key: bytes | None = None,
        headers: list[tuple[str, bytes]] | None = None,
        state: int = READY,
        slot: int | None = None,
        reuse: int = 1,
        stored_reuse: int | None = None,
        lane: int = 0,
        attempts: int = 0,
        grant: int = 0,
        message_id: int | None = None,
        put_at: int = 1_700_000_000_000_000,
        due: int = 0,
        expires: int = 0,
        raw_headers: bytes | None = None,
        lengths: tuple[int, int, int] | None = None,
    ) -> int:
        """Add one message; returns its slot."""
        slot = self.next_slot if slot is None else slot
        self.next_slot = slot + 1
        packed = b"".join(
            bytes([len(name.encode())]) + name.encode() + struct.pack("<I", len(value)) + value
            for name, value in headers or []
        )
        packed = packed if raw_headers is None else raw_headers
        text = key or b""
        content = text + packed + payload
        stored = reuse if stored_reuse is None else stored_reuse
        seed = self.seed(slot, stored)
        inline = len(content) <= self.slot_bytes - 96
        first, folded = 0, 0
        if not inline:
            first = self.put_blocks(content, slot, stored) + 1
            folded = hash64(payload, hash64(packed, hash64(text, seed)))
        message_id = self.next_id if message_id is None else message_id
        self.next_id = max(self.next_id, message_id + 1)
        sizes = lengths or (len(payload), len(text), len(packed))
        key_hash = 0 if key is None else hash64(key)
        rest = struct.pack(
            "<QqqqQ16sIIIIQIHH", message_id, put_at, due, expires, key_hash,
            bytes(16), *sizes, first, folded, slot, stored, lane,
        ) + (content if inline else b"")  # fmt: skip
        raw = struct.pack("<Q", hash64(rest, seed)) + rest
        at = self.slot_at(slot)
        self.slots[at : at + len(raw)] = raw
        value = word(state, lane=lane, attempts=attempts, reuse=reuse, grant=grant)
        self.set_word(slot, value)
        return slot

    def put_blocks(self, content: bytes, slot: int, reuse: int) -> int:
        """Lay a content in blocks, each third one left out; returns the first."""
        parts = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
        numbers = [self.next_block + 2 * i for i in range(len(parts))]
        self.next_block = numbers[-1] + 1
        for index, (number, part) in enumerate(zip(numbers, parts, strict=True)):
            following = numbers[index + 1] + 1 if index + 1 < len(numbers) else 0
            value = following | slot + 1 << 24 | reuse << 50 | 3 << 60
            struct.pack_into("<Q", self.blocks, self.block_word_at(number), value)
            at = self.block_at(number)
            self.blocks[at : at + len(part)] = part
        return numbers[0]

    def fail(
        self,
        slot: int,
        which: int,
        last: bytes,
        *,
        first: bytes = b"",
        attempts: int = 1,
        kind: int = 1,
        at: int = 1_700_000_000_000_001,
        reuse: int = 1,
        message_id: int | None = None,
    ) -> None:
        """Write one of a slot's failure records."""
        if message_id is None:
            message_id = struct.unpack_from("<Q", self.slots, self.slot_at(slot) + 8)[0]
        first = first or last
        rest = struct.pack(
            "<QqqHBBB3x108s108s", message_id, at - attempts, at, attempts, kind, len(first),
            len(last), first, last,
        )  # fmt: skip
        raw = struct.pack("<Q", hash64(rest, self.seed(slot, reuse))) + rest
        where = self.failure_at(slot, which)
        self.slots[where : where + 256] = raw

    # the directory

    @property
    def body(self) -> dict[str, object]:
        return {
            "format": 1, "queue_id": f"{self.queue_id:016x}", "capacity": self.capacity,
            "dead_limit": self.dead_limit, "slot_bytes": self.slot_bytes, "priorities": 4,
            "payload_bytes": self.block_count * PAGE, "ordering": None, **self.config,
        }  # fmt: skip

    def hints(self) -> bytes:
        ids = self.store.store_id, self.queue_id
        head = struct.pack("<8sII16sQIIII", b"MSQHINT1", 1, self.slot_count, *ids, 4, 11, 0, 1)
        return head.ljust(PAGE, b"\0")

    def write(self, *, headers: bool = True) -> Path:
        if headers:
            self.headers()
        self.store.write()
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        put_file(self.path / "queue.json", json_bytes(self.body))
        put_file(self.path / "slots", bytes(self.slots))
        put_file(self.path / "blocks", bytes(self.blocks))
        put_file(self.path / "hints", self.hints())
        return self.store.path
