"""The control file of a stream: made with it, mapped, grown, rebuilt, judged at an open.

It is a page of header and a block a partition (docs/format.md). Nothing in it is needed to find
the records: after an unclean end it is rebuilt, and recovery fills it.
"""

from __future__ import annotations

import errno
import struct

from millstream import _native
from millstream.disk import files
from millstream.disk.publish import published
from millstream.errors import NotFound, StorageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from millstream.disk.session import Session

HEADER = struct.Struct("<8sII16sQQII8xII")
CHECKSUM = 56  # its place in the header
MAGIC = b"MSCNTRL1"
BLOCKS = 4096
BLOCK_BYTES = 256
POISON_SYNC, POISON_CORRUPT = 1, 2
Mark = tuple[int, int, int, int]
NOWHERE: Mark = (0, 0, 0, -(1 << 63))
"""The mark at which an empty log ends."""
POSITION_MAX = 1 << 62  # above: no position of a log


def _block(
    durable: int = 0,
    durable_hash: int = 0,
    durable_offset: int = 0,
    first_segment: int = 0,
    synced: tuple[int, int] = (0, 0),
) -> bytes:
    """A block of the control file in which recovery has yet to find the log.

    It begins at the durable mark. `first_segment`, where it is not 0, must be there, and the log
    up to `synced` (position, offset).
    """
    block = bytearray(BLOCK_BYTES)
    struct.pack_into("<q", block, 32, -(1 << 63))
    struct.pack_into("<IQQ", block, 68, durable_hash, durable, durable_offset)
    struct.pack_into("<Q", block, 144, first_segment)
    struct.pack_into("<QQ", block, 176, *synced)
    return bytes(block)


def fresh(config: dict[str, Any], store_id: bytes, generation: int) -> bytes:
    """The control file of a new stream."""
    return _file(config, store_id, generation, [_block()] * int(config["partitions"]))


def _file(config: dict[str, Any], store_id: bytes, generation: int, blocks: list[bytes]) -> bytes:
    header = HEADER.pack(
        MAGIC, files.FORMAT, len(blocks), store_id, int(config["stream_id"], 16), generation,
        files.LIVE, 1, 0, 0,
    )  # fmt: skip
    return header.ljust(BLOCKS, b"\0") + b"".join(blocks)


def _content(directory: files.Path) -> bytes:
    """All bytes of the file; none where there is no file."""
    path = directory / "control"
    if not files.exists(path):
        return b""
    descriptor = files.open_file(path, write=False)
    try:
        return files.read(descriptor, files.size(descriptor), 0, path)
    finally:
        files.close(descriptor)


def create(
    parent: files.Path, name: str, config: dict[str, Any], store_id: bytes, generation: int
) -> None:
    """Make the directory of a new stream and publish it whole; another process's may come first."""
    with published(parent, name, "stream.json") as making:
        files.write_json(making / "stream.json", config)
        data = fresh(config, store_id, generation)
        files.replace(making / "control", data, length=len(data))


def rebuilt(directory: files.Path, store_id: bytes, generation: int, *, clean: bool) -> bytes:
    """A control file for this generation.

    The new one keeps the durable marks of the old one: what lies before a mark was synced, so it is
    damage where it is not there. In a store that was closed cleanly it keeps the oldest segment,
    too. It keeps nothing of a file that is not as the last process to close left it.
    """
    files.require_directory(directory)
    config = files.read_json(directory / "stream.json")
    old = _content(directory)
    if old[:8] != MAGIC or old[16:32] != store_id or (clean and not _checksum_fits(old)):
        old = b""
    blocks = [
        _rebuilt_block(old[BLOCKS + index * BLOCK_BYTES :][:BLOCK_BYTES], clean)
        for index in range(config["partitions"])
    ]
    return _file(config, store_id, generation, blocks)


def _rebuilt_block(old: bytes, clean: bool) -> bytes:
    if len(old) < BLOCK_BYTES:
        return _block()
    poison, tail = struct.unpack_from("<IQ", old, 4)
    durable_hash, durable, durable_offset = struct.unpack_from("<IQQ", old, 68)
    walked, first_segment = struct.unpack_from("<QQ", old, 136)
    synced = max((durable, durable_offset), struct.unpack_from("<QQ", old, 176))
    if synced[0] % 8 or synced[0] > POSITION_MAX:
        synced = (0, 0)
    # Retention raises it before it unlinks, and a power cut may take that. It is known after a
    # clean end, and kept until the log is whole again.
    if not (clean or walked == 0 or (poison and tail == 0)):
        first_segment = 0
    return _block(durable, durable_hash, durable_offset, first_segment, synced)


def rebuild(directory: files.Path, store_id: bytes, generation: int, clean: bool) -> None:
    """Put a rebuilt file in the place of the old one, and say so to those that have that mapped."""
    path = directory / "control"
    data = rebuilt(directory, store_id, generation, clean=clean)
    if files.exists(path):
        # A read-only process may still have the old file mapped: tell it.
        descriptor = files.open_file(path, write=True)
        try:
            if files.size(descriptor) >= BLOCKS:
                files.write(descriptor, struct.pack("<I", files.REPLACED), 48, path)
        finally:
            files.close(descriptor)
    files.replace(path, data, length=len(data))


def map_file(directory: files.Path, store_id: bytes, *, write: bool) -> _native.Map:
    """Map the file, which must be one of this store."""
    files.require_directory(directory)
    path = directory / "control"
    descriptor = files.open_file(path, write=write)
    try:
        size = files.size(descriptor)
        head = files.read(descriptor, 48, 0, path)
        if size < BLOCKS + BLOCK_BYTES or head[:8] != MAGIC or head[16:32] != store_id:
            raise StorageError(
                errno.EINVAL,
                "is damaged; close the store in all processes, the next open makes it anew",
                path,
            )
        return files.map_file(descriptor, size, path, write=write)
    finally:
        files.close(descriptor)


def private_map(session: Session, directory: files.Path) -> _native.Map:
    """What a recovery would make of the file, in memory of this process alone."""
    store_id, generation, clean = session.id, session.generation, session.clean
    return _native.private_copy(rebuilt(directory, store_id, generation, clean=clean))


def map_for(session: Session, directory: files.Path) -> _native.Map:
    """Map the file, for a reader of a store that needs recovery what is in its own memory."""
    if session.private:
        return private_map(session, directory)
    return map_file(directory, session.id, write=session.writable)


def is_behind(directory: files.Path, mapped: _native.Map) -> bool:
    """Does a reader's map miss what the file of that name says?

    On an overlay a file is copied up when somebody opens it to write, and maps that were made
    before stay with the one below, whose device and inode are the same. What is compared only
    rises, and the map is read last: where both are one file, it can only be ahead.
    """
    try:
        stored = _content(directory)
    except NotFound:
        stored = b""
    if len(stored) < BLOCKS + BLOCK_BYTES:
        return True  # it was dropped
    generation, state, config = struct.unpack_from("<QII", stored, 40)
    shown_generation, shown_state, shown_config = struct.unpack_from("<QII", mapped, 40)
    if generation > shown_generation or (state != files.LIVE and shown_state == files.LIVE):
        return True
    if 0 < (config - shown_config & 0xFFFFFFFF) < 1 << 31:
        return True
    for at in range(BLOCKS, min(len(stored), len(mapped)), BLOCK_BYTES):
        tail = struct.unpack_from("<Q", stored, at + 8)[0]
        walked, first = struct.unpack_from("<QQ", stored, at + 136)
        shown = struct.unpack_from("<QQ", mapped, at + 136)
        if tail > struct.unpack_from("<Q", mapped, at + 8)[0] or walked > shown[0]:
            return True
        if first > shown[1]:
            return True
    return False


def grow(directory: files.Path, partitions: int) -> None:
    """Add blocks behind those that others have mapped."""
    path = directory / "control"
    descriptor = files.open_file(path, write=True)
    try:
        before = (files.size(descriptor) - BLOCKS) // BLOCK_BYTES
        files.allocate(descriptor, BLOCKS + partitions * BLOCK_BYTES, path)
        for index in range(before, partitions):
            files.write(descriptor, _block(), BLOCKS + index * BLOCK_BYTES, path)
    finally:
        files.close(descriptor)


def add_checksum(directory: files.Path) -> None:
    """As the last to close: put a checksum over the file, and make it survive a power cut."""
    path = directory / "control"
    descriptor = files.open_file(path, write=True)
    try:
        data = files.read(descriptor, files.size(descriptor), 0, path)
        files.write(descriptor, struct.pack("<Q", _checksum(data)), CHECKSUM, path)
        files.sync(descriptor, path)
    finally:
        files.close(descriptor)


def _checksum(data: bytes) -> int:
    """Over what a reader does not change: the header up to this, and the blocks."""
    return _native.xxh3_64(data[:CHECKSUM] + data[BLOCKS:])


def has_checksum(directory: files.Path) -> bool:
    """Is the file, byte for byte, what the last to close left?"""
    return _checksum_fits(_content(directory))


def _checksum_fits(data: bytes) -> bool:
    return len(data) >= BLOCKS and data[CHECKSUM : CHECKSUM + 8] == struct.pack(
        "<Q", _checksum(data)
    )


def is_sound(directory: files.Path, store_id: bytes, generation: int) -> bool:
    """Is the control file whole, with each partition recovered, synced and at rest?"""
    files.require_directory(directory)
    config = files.read_json(directory / "stream.json")
    data = _content(directory)
    count = int(config["partitions"])
    if len(data) < BLOCKS + count * BLOCK_BYTES:
        return False
    *found, _, state, _, _, _ = HEADER.unpack_from(data)
    stream_id = int(config["stream_id"], 16)
    if [*found, state] != [MAGIC, files.FORMAT, count, store_id, stream_id, files.LIVE]:
        return False
    return all(_block_is_sound(directory, data, index, generation) for index in range(count))


def _block_is_sound(directory: files.Path, data: bytes, index: int, generation: int) -> bool:
    at = BLOCKS + index * BLOCK_BYTES
    poison, tail, hint_tail, offset, _, hint_hash, active = struct.unpack_from(
        "<IQQQqQQ", data, at + 4
    )
    durable_hash, durable, durable_offset = struct.unpack_from("<IQQ", data, at + 68)
    walked, first_segment, first_offset = struct.unpack_from("<QQQ", data, at + 136)
    if poison or walked != generation or not tail == hint_tail == durable:
        return False
    if durable_offset != offset or first_offset > offset or durable_hash != hint_hash & 0xFFFFFFFF:
        return False
    if active == 0:
        return bool(tail == first_segment == 0)
    segments = (
        directory / f"{index:05d}" / f"{number:016d}.seg"
        for number in {first_segment or active, active}  # 0: retention removed none so far
    )
    return bool(first_segment <= active and all(files.exists(segment) for segment in segments))
