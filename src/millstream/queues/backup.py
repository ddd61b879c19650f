"""A copy of a queue while others use it: each message as it is at one moment of the copying.

A message that was there before and is not finished meanwhile is in the copy; one that is put or
finished meanwhile may be or not. Deduplication ids are copied first: of a message that is newer
than its id in the copy, or gone, its slot still tells that it was there.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, NamedTuple

from millstream.disk import files
from millstream.disk.files import PAGE
from millstream.errors import NotFound
from millstream.queues import slots, tracebacks
from millstream.queues.slots import FREE, PREPARED, SPARE, WRITING

if TYPE_CHECKING:
    from millstream import _native
    from millstream.queues.queue import Queue

WORD = struct.Struct("<Q")
LENGTHS_AT, SLOT_HEAD_BYTES, FAILURES_BYTES = 64, 96, 512
LENGTHS = struct.Struct("<IIII")
"""Lengths in a slot: bytes of payload, key and headers, and its first block + 1."""
ATTEMPTS = 100
GATHERED_BYTES = 4 << 20


class _Places(NamedTuple):
    """Where things lie in the files of slots and blocks."""

    slot_bytes: int

    def _extent(self, slot: int) -> tuple[int, int]:
        each = 8 + self.slot_bytes + FAILURES_BYTES
        extent, index = divmod(slot, slots.EXTENT_SLOTS)
        return PAGE + extent * slots.EXTENT_SLOTS * each, index

    def word(self, slot: int) -> int:
        start, index = self._extent(slot)
        return start + 8 * index

    def slot(self, slot: int) -> int:
        start, index = self._extent(slot)
        return start + 8 * slots.EXTENT_SLOTS + self.slot_bytes * index

    def failures(self, slot: int) -> int:
        start, index = self._extent(slot)
        return start + (8 + self.slot_bytes) * slots.EXTENT_SLOTS + FAILURES_BYTES * index

    def block(self, block: int) -> tuple[int, int]:
        """File positions of the word and of the data."""
        extent, index = divmod(block, slots.EXTENT_BLOCKS)
        start = PAGE + extent * slots.EXTENT_BLOCKS * (8 + slots.BLOCK_BYTES)
        return start + 8 * index, start + 8 * slots.EXTENT_BLOCKS + slots.BLOCK_BYTES * index


class _Gathered:
    """A file that is written in a few large pieces.

    Each write lets another thread run, and waits until that one lets it go on, some milliseconds:
    with three that put and get, a write a slot made half a minute of a second.
    """

    def __init__(self, path: files.Path, length: int) -> None:
        self.path = path
        self.pieces: dict[int, bytes] = {}
        self.bytes = 0
        self.descriptor = files.open_file(path, write=True, create=True)
        try:
            files.extend(self.descriptor, length, path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        files.close(self.descriptor)

    def write(self, data: bytes, at: int) -> None:
        """What comes later for the same place counts."""
        self.pieces[at] = data
        self.bytes += len(data)
        if self.bytes >= GATHERED_BYTES:
            self.flush()

    def flush(self) -> None:
        run: list[bytes] = []
        start = end = 0
        for at, data in sorted(self.pieces.items()):
            if at != end:
                files.write(self.descriptor, b"".join(run), start, self.path)
                run, start = [], at
            run.append(data)
            end = at + len(data)
        files.write(self.descriptor, b"".join(run), start, self.path)
        self.pieces, self.bytes = {}, 0

    def sync(self) -> None:
        self.flush()
        files.sync(self.descriptor, self.path)


def copy(queue: Queue, target: files.Path) -> None:
    """Copy a queue into a directory to be made."""
    files.make_directory(target)
    if queue._config["dedup_window"]:
        _copy_dedup(queue, target / "dedup")
    config = files.read_json(queue.path / "queue.json")
    queue._keep_up()  # as large as the configuration says, or larger
    config["capacity"] = queue.capacity
    files.write_json(target / "queue.json", config)
    copying = _Copy(queue)
    try:
        copying.make(target)
        copying.run()
    finally:
        copying.close()
    for name in (tracebacks.BEFORE, tracebacks.NAME):
        with contextlib.suppress(NotFound):
            files.replace(target / name, files.content(queue._files.path(name)))
    files.sync_directory(target)


def _copy_dedup(queue: Queue, target: files.Path) -> None:
    files.replace(target, files.content(queue._files.path("dedup")))


class _Copy:
    """The files of slots and blocks of a copy that is being made."""

    def __init__(self, queue: Queue) -> None:
        self.count = queue._slot_count
        self.live: _native.Map = queue._files.slots
        self.live_blocks: _native.Map | None = queue._files.blocks
        self.block_count = queue._block_count
        self.places = _Places(queue._files.sizes.slot_bytes)
        self.lengths = queue._files.sizes.bytes_of(
            queue._files.sizes.slot_max, queue._files.sizes.block_max
        )
        self.files: list[_Gathered] = []

    def make(self, target: files.Path) -> None:
        names = ["slots"] if self.live_blocks is None else ["slots", "blocks"]
        for name, length in zip(names, self.lengths, strict=False):
            self.files.append(_Gathered(target / name, length))

    def close(self) -> None:
        for file in self.files:
            file.close()

    def write(self, which: int, data: bytes, at: int) -> None:
        self.files[which].write(data, at)

    def word(self, slot: int) -> int:
        return int(WORD.unpack_from(self.live, self.places.word(slot))[0])

    def run(self) -> None:
        in_blocks: list[tuple[int, int]] = []
        for slot in range(self.count):
            word, content = self.captured(slot)
            if word is None:
                continue
            first_block = LENGTHS.unpack_from(content, LENGTHS_AT)[3]
            has_message = word >> 59 not in (FREE, SPARE)
            if has_message and first_block:
                self.copy_blocks(slot, word, first_block - 1)
                in_blocks.append((slot, word))
            self.write(0, WORD.pack(word), self.places.word(slot))
            if has_message or any(content[:SLOT_HEAD_BYTES]):  # what was never used stays a hole
                self.write(0, content, self.places.slot(slot))
            if has_message:
                at = self.places.failures(slot)
                self.write(0, self.live[at : at + FAILURES_BYTES], at)
        for slot, word in in_blocks:
            # Finished meanwhile: a later message may have got one of its blocks, here too.
            if self.reuse_of(slot) != word >> 40 & 1023 or self.word(slot) >> 59 == FREE:
                self.write(0, WORD.pack((word >> 40 & 1023) << 40), self.places.word(slot))
        self.write(0, self.live[:PAGE], 0)  # last: its next id is above all that were copied
        if self.live_blocks is not None:
            self.write(1, self.live_blocks[:PAGE], 0)
        for file in self.files:
            file.sync()

    def reuse_of(self, slot: int) -> int:
        return self.word(slot) >> 40 & 1023

    def captured(self, slot: int) -> tuple[int | None, bytes]:
        """The word and the bytes of a slot, as they belong together; None: no message is there."""
        at = self.places.slot(slot)
        for _ in range(ATTEMPTS):
            word = self.word(slot)
            if word >> 59 in (WRITING, PREPARED):
                break
            if word >> 59 in (FREE, SPARE):
                content = self.live[at : at + SLOT_HEAD_BYTES]
                if self.places.slot_bytes <= PAGE:  # or a write for each; so they join
                    content = content.ljust(self.places.slot_bytes, b"\0")
            else:
                content = self.live[at : at + self.places.slot_bytes]
            after = self.word(slot)
            if after >> 40 & 1023 == word >> 40 & 1023 and after >> 59 not in (WRITING, PREPARED):
                return after, content
        return None, b""

    def copy_blocks(self, slot: int, word: int, block: int) -> None:
        assert self.live_blocks is not None
        for _ in range(self.block_count):
            word_at, data_at = self.places.block(block)
            found = int(WORD.unpack_from(self.live_blocks, word_at)[0])
            if found >> 24 & 0x3FFFFFF != slot + 1 or found >> 50 & 1023 != word >> 40 & 1023:
                return  # it was finished meanwhile
            self.write(1, self.live_blocks[data_at : data_at + slots.BLOCK_BYTES], data_at)
            self.write(1, WORD.pack(found), word_at)
            if not found & 0xFFFFFF:
                return
            block = (found & 0xFFFFFF) - 1
            if block >= self.block_count:
                return
