"""What a queue has on disk: made whole, grown by extents, opened, recovered by the first opener.

`slots` and `blocks` are the truth. They are as long as they may ever become, and sparse behind
what is in use: only what has blocks of the file system behind it is published to the core.
`hints` is made by the first process to open the queue while the store is open; the first opener of
the store removes those of before (docs/format.md).
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Any, NamedTuple, NoReturn

from millstream import _native
from millstream.disk import files
from millstream.disk.files import PAGE
from millstream.disk.publish import published
from millstream.errors import Closed, CorruptBatch, NotFound, VersionMismatch
from millstream.queues import dedup

SLOTS = struct.Struct("<8sII16sQQQ")
BLOCKS = struct.Struct("<8sII16sQQ")
HINTS = struct.Struct("<8sII16sQIIII")
SLOTS_MAGIC, BLOCKS_MAGIC, HINTS_MAGIC = b"MSQSLOT1", b"MSQBLCK1", b"MSQHINT1"
COUNT_AT, POISON_AT, NEXT_ID_AT = 128, 136, 192
STATE_AT = 52
EXTENT_SLOTS, EXTENT_BLOCKS = 1024, 512
BLOCK_BYTES = 4096
FREE, WRITING, SPARE, PREPARED, ACKING = 0, 3, 12, 17, 18
MAKING_SECONDS = 60.0
"""How long the making of hints may take: whoever makes them reads all messages."""


class Sizes(NamedTuple):
    """What the configuration of a queue says about its files."""

    slot_bytes: int
    slot_max: int
    block_max: int
    lanes: int
    ordered: bool

    def bytes_of(self, slot_count: int, block_count: int) -> tuple[int, int, int]:
        """Bytes of `slots` and `blocks` with so many in use, and of `hints`."""
        return _native.queue_sizes(
            self.slot_bytes, slot_count, block_count, self.slot_max, self.lanes, self.ordered
        )


def sizes_of(config: dict[str, Any]) -> Sizes:
    """The sizes that a `queue.json` asks for."""
    return Sizes(
        int(config["slot_bytes"]),
        int(config["capacity"]) + int(config["dead_limit"]),
        -(-int(config["payload_bytes"]) // BLOCK_BYTES),
        int(config["priorities"]),
        config["ordering"] == "key",
    )


class OtherSize(Exception):
    """The hints that are there are for another number of slots: the capacity was or is raised."""

    def __init__(self, slot_max: int) -> None:
        super().__init__(slot_max)
        self.slot_max = slot_max


def fitting(config: dict[str, Any], other: OtherSize) -> dict[str, Any]:
    """A configuration just read, with the capacity that the hints are for, where that is another.

    Those hints will be outgrown.
    """
    if sizes_of(config).slot_max != other.slot_max:
        config["capacity"] = other.slot_max - config["dead_limit"]
    return config


def _with_checksum(header: bytes) -> bytes:
    """A header with its checksum behind it."""
    return header + struct.pack("<Q", _native.xxh3_64(header))


def create(parent: files.Path, name: str, config: dict[str, Any], store_id: bytes) -> None:
    """Make the directory of a new queue and publish it whole; another process's may come first."""
    sizes, queue_id = sizes_of(config), int(config["queue_id"], 16)
    slots_bytes, blocks_bytes, _ = sizes.bytes_of(sizes.slot_max, sizes.block_max)
    salt = int.from_bytes(os.urandom(8), "little")
    slots = SLOTS.pack(SLOTS_MAGIC, files.FORMAT, sizes.slot_bytes, store_id, queue_id, salt, 0)
    blocks = BLOCKS.pack(BLOCKS_MAGIC, files.FORMAT, sizes.block_max, store_id, queue_id, 0)
    with published(parent, name, "queue.json") as making:
        files.write_json(making / "queue.json", config)
        _make(making / "slots", _with_checksum(slots[:-8]), slots_bytes)
        if sizes.block_max:
            _make(making / "blocks", _with_checksum(blocks[:-8]), blocks_bytes)
        if config["dedup_window"]:
            dedup.create(making / "dedup", store_id, queue_id)
        files.sync_directory(making)


def _make(path: files.Path, header: bytes, length: int) -> None:
    """A file with nothing in use: one page behind which all is a hole."""
    descriptor = files.open_file(path, write=True, create=True)
    try:
        files.allocate(descriptor, PAGE, path)
        files.write(descriptor, header, 0, path)
        files.extend(descriptor, length, path)
        files.sync(descriptor, path)
    finally:
        files.close(descriptor)


class Files:
    """The open files of one queue."""

    def __init__(
        self, directory: files.Path, config: dict[str, Any], store_id: bytes, *, write: bool
    ) -> None:
        self.directory = directory
        self.write = write
        self.sizes = sizes_of(config)
        self.store_id = store_id
        self.queue_id = int(config["queue_id"], 16)
        self._descriptors: dict[str, int] = {}
        self.hints_inode = 0
        """Inode of the hints that were mapped last: tells whether they were replaced since."""
        files.require_directory(directory)
        try:
            slots_bytes, blocks_bytes, _ = self.sizes.bytes_of(
                self.sizes.slot_max, self.sizes.block_max
            )
            self.slots = self._map("slots", SLOTS, SLOTS_MAGIC, slots_bytes)
            self.blocks = None
            if self.sizes.block_max:
                self.blocks = self._map("blocks", BLOCKS, BLOCKS_MAGIC, blocks_bytes)
        except BaseException:
            self.close()
            raise

    def path(self, name: str) -> files.Path:
        """Path of one of the files."""
        return self.directory / name

    def _map(self, name: str, layout: struct.Struct, magic: bytes, length: int) -> _native.Map:
        path = self.path(name)
        descriptor = self._descriptors[name] = files.open_file(path, write=self.write)
        head = files.read(descriptor, layout.size, 0, path)
        expected = _native.xxh3_64(head[: layout.size - 8])
        found = int.from_bytes(head[layout.size - 8 :], "little")
        if len(head) < layout.size or head[:8] != magic or expected != found:
            self._refuse(path, "its header is damaged", expected, found)
        _, version, shape, store_id, queue_id, *_ = layout.unpack(head)
        if version != files.FORMAT:
            raise VersionMismatch(
                f"{path}: format {version}, this version of millstream reads format {files.FORMAT}"
            )
        shape = shape if name == "slots" else self.sizes.slot_bytes
        ours = self.store_id.hex(), f"{self.queue_id:016x}", self.sizes.slot_bytes
        if (theirs := (store_id.hex(), f"{queue_id:016x}", shape)) != ours:
            self._refuse(path, "not a file of this queue", ours, theirs)
        return files.map_file(descriptor, length, path, write=self.write)

    def map_again(self, name: str) -> _native.Map:
        """Map a file that is replaced by others, whole, and go on with it."""
        descriptor, memory = self.map_other(self.path(name))
        self.use(name, descriptor)
        return memory

    def map_other(self, path: files.Path) -> tuple[int, _native.Map]:
        """Open and map a file that is to become one of these, whole."""
        descriptor = files.open_file(path, write=self.write)
        try:
            return descriptor, files.map_file(
                descriptor, files.size(descriptor), path, write=self.write
            )
        except BaseException:
            files.close(descriptor)
            raise

    def use(self, name: str, descriptor: int) -> None:
        """From now on this is the file of that name, which never is without one."""
        former = self._descriptors.get(name)
        self._descriptors[name] = descriptor
        if former is not None:  # a sync may be under way on it
            self._descriptors[f"{name} {len(self._descriptors)}"] = former

    def _descriptor(self, name: str) -> int:
        found = self._descriptors.get(name)
        if found is None:
            raise Closed(f"{self.directory}: is closed, or was dropped")
        return found

    def sync_one(self, name: str) -> None:
        """Make what is in one file survive a power cut."""
        files.sync(self._descriptor(name), self.path(name))

    def _refuse(self, path: files.Path, what: str, expected: object, found: object) -> NoReturn:
        raise CorruptBatch(
            f"{path}: {what}: expected {expected}, found {found}; see `millstream verify` and"
            " `millstream repair`",
            path=path,
            position=0,
            expected=expected,
            found=found,
        )

    def close(self) -> None:
        """Close the descriptors; the maps live as long as somebody uses them."""
        with contextlib.suppress(KeyError):  # there is none left; other threads close, too
            while True:
                files.close(self._descriptors.popitem()[1])

    def allocate_slots(self, count: int) -> None:
        """Put blocks of the file system behind the first `count` slots."""
        length, _, _ = self.sizes.bytes_of(count, 0)
        files.allocate(self._descriptor("slots"), length, self.path("slots"))

    def allocate_blocks(self, count: int) -> None:
        """The same for blocks."""
        _, length, _ = self.sizes.bytes_of(0, count)
        files.allocate(self._descriptor("blocks"), length, self.path("blocks"))

    def sync(self) -> None:
        """Make all that is in the files survive a power cut: contents before what names them."""
        for name in ("blocks", "slots", "dedup"):
            if name in self._descriptors:
                self.sync_one(name)

    def go_on_from(self, former: Files) -> None:
        """Sync by the descriptors of the files of a smaller capacity: threads may be doing so."""
        ours, self._descriptors = self._descriptors, former._descriptors
        for name, descriptor in ours.items():
            if self._descriptors.setdefault(name, descriptor) != descriptor:
                files.close(descriptor)

    def counts(self) -> tuple[int, int]:
        """Slots and blocks in use, as the files say."""
        slots = int(struct.unpack_from("<I", self.slots, COUNT_AT)[0])
        blocks = 0
        if self.blocks is not None:
            blocks = int(struct.unpack_from("<I", self.blocks, COUNT_AT)[0])
        for what, found, most in (
            ("slots", slots, self.sizes.slot_max),
            ("blocks", blocks, self.sizes.block_max),
        ):
            if found > most:
                raise CorruptBatch(
                    f"{self.path(what)}: {found} {what} in use, of {most}; see `millstream verify`",
                    path=self.path(what),
                    position=COUNT_AT,
                    expected=most,
                    found=found,
                )
        return slots, blocks

    def extend(self, config: dict[str, Any]) -> None:
        """Make the file of slots as long as a configuration asks for."""
        sizes = sizes_of(config)
        length, _, _ = sizes.bytes_of(sizes.slot_max, sizes.block_max)
        descriptor = self._descriptor("slots")
        if files.size(descriptor) < length:
            files.extend(descriptor, length, self.path("slots"))
            files.sync(descriptor, self.path("slots"))

    # --- hints ------------------------------------------------------------------------------------

    def hints_header(self, slot_max: int | None = None) -> bytes:
        """The header of a new hints file."""
        slot_max = self.sizes.slot_max if slot_max is None else slot_max
        bits = 6
        while 1 << bits < 2 * slot_max:
            bits += 1
        return HINTS.pack(
            HINTS_MAGIC, files.FORMAT, slot_max, self.store_id, self.queue_id,
            self.sizes.lanes, bits, int(self.sizes.ordered), files.LIVE,
        )  # fmt: skip

    def map_hints(self) -> _native.Map | None:
        """The hints in use, or None: nobody has made them yet. Raises OtherSize."""
        path = self.path("hints")
        try:
            descriptor = files.open_file(path, write=self.write)
        except NotFound:
            return None
        try:
            length = self.sizes.bytes_of(0, 0)[2]
            head = files.read(descriptor, HINTS.size, 0, path)
            slot_max = int.from_bytes(head[12:16], "little")
            if head[:STATE_AT] != self.hints_header(slot_max)[:STATE_AT]:
                raise CorruptBatch(
                    f"{path}: not the hints of this queue; close the store in all processes, the"
                    " next open makes them anew",
                    path=path,
                )
            if slot_max != self.sizes.slot_max:
                raise OtherSize(slot_max)
            self.hints_inode = files.inode(descriptor)
            return files.map_file(descriptor, length, path, write=self.write)
        finally:
            files.close(descriptor)

    def private_hints(self) -> _native.Map:
        """Hints of this process alone, and empty: for a reader of the slots."""
        memory = _native.private_memory(self.sizes.bytes_of(0, 0)[2])
        memory[: HINTS.size] = self.hints_header()
        return memory

    @contextlib.contextmanager
    def making_hints(self) -> Any:
        """Let nobody else make the hints meanwhile."""
        path = self.path("slots")
        with _native.lock_of(f"{path}: making hints"):
            descriptor = files.open_file(path, write=True)
            try:
                files.lock(descriptor, 0, path, timeout=MAKING_SECONDS)
                try:
                    yield
                finally:  # a child that was forked meanwhile has it open as well
                    files.unlock(descriptor, 0)
            finally:
                files.close(descriptor)

    def make_hints(self) -> tuple[_native.Map, files.Path]:
        """Zeros behind a header, mapped, under a name that nobody knows yet."""
        for name in files.names(self.directory):
            if name.startswith("hints."):  # of somebody who was killed while making them
                files.remove(self.path(name))
        path = self.path(f"hints.{os.getpid()}-{os.urandom(4).hex()}.tmp")
        length = self.sizes.bytes_of(0, 0)[2]
        descriptor = files.open_file(path, write=True, create=True)
        try:
            files.allocate(descriptor, length, path)
            files.write(descriptor, self.hints_header(), 0, path)
            self.hints_inode = files.inode(descriptor)
            return files.map_file(descriptor, length, path, write=True), path
        except BaseException:
            files.remove(path)
            raise
        finally:
            files.close(descriptor)

    def publish_hints(self, temporary: files.Path) -> None:
        """From now on they are those of the queue."""
        files.rename(temporary, self.path("hints"))


def state_of(hints: _native.Map) -> int:
    """`files.LIVE`, or what else its state says."""
    return int.from_bytes(hints[STATE_AT : STATE_AT + 4], "little")


# --- a store that nobody has open -----------------------------------------------------------------


def forget_hints(directory: files.Path) -> None:
    """As the first opener: those of before are over, also for readers who kept them."""
    path = directory / "hints"
    if files.exists(path):
        descriptor = files.open_file(path, write=True)
        try:
            if files.size(descriptor) >= PAGE:
                files.write(descriptor, struct.pack("<I", files.REPLACED), STATE_AT, path)
        finally:
            files.close(descriptor)
        files.remove(path)


def is_sound(directory: files.Path) -> bool:
    """Did no sync of the queue fail, and is it there?"""
    path = directory / "slots"
    try:
        descriptor = files.open_file(path, write=False)
    except NotFound:
        return False
    try:
        return files.read(descriptor, 4, POISON_AT, path) == bytes(4)
    finally:
        files.close(descriptor)


def has_undecided(directory: files.Path) -> bool:
    """Is there a message that a transaction has prepared, and that was not decided?"""
    path = directory / "slots"
    descriptor = files.open_file(path, write=False)
    try:
        head = files.read(descriptor, COUNT_AT + 4, 0, path)
        slot_bytes, count = (int.from_bytes(head[at : at + 4], "little") for at in (12, COUNT_AT))
        stride = EXTENT_SLOTS * (8 + slot_bytes + 512)
        for extent in range(-(-count // EXTENT_SLOTS)):
            words = files.read(descriptor, 8 * EXTENT_SLOTS, PAGE + extent * stride, path)
            if any(word >> 59 in (PREPARED, ACKING) for word in memoryview(words).cast("Q")):
                return True
        return False
    finally:
        files.close(descriptor)


def sync(directory: files.Path) -> None:
    """As the last to close: make all survive a power cut that anybody wrote."""
    for name in ("blocks", "slots", "dedup"):
        path = directory / name
        if files.exists(path):
            descriptor = files.open_file(path, write=True)
            try:
                files.sync(descriptor, path)
            finally:
                files.close(descriptor)
