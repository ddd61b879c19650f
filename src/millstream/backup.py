"""A consistent copy of a store while others write: bytes below a tail never change, so copying up to it is enough."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from millstream import files, members
from millstream.errors import StorageError

if TYPE_CHECKING:
    from millstream import _native
    from millstream.store import Store
    from millstream.stream import Stream

CHUNK_BYTES = 4 << 20


def backup(store: Store, target: str) -> None:
    """Copy `store` to the new directory `target`."""
    files.make_directory(target)
    if files.names(target):
        raise StorageError(39, "the target of a backup must be an empty or a new directory", target)
    files.make_directory(os.path.join(target, "streams"))
    # The maps hold what retention may remove while we copy.
    held = [(name, _hold(store.stream(name))) for name in store.streams()]
    for name, parts in held:
        _copy_stream(store, name, parts, os.path.join(target, "streams", name))
    body = files.read_json(store._config_path)
    body["clean"] = False
    members.create(target, store._store_id)
    files.write_json(os.path.join(target, "store.json"), body)
    files.sync_directory(target)


def _hold(stream: Stream) -> list[tuple[int, list[tuple[_native.Segment, int]]]]:
    """Of each partition its segments, each with the position where its log ends now."""
    held = []
    for index in range(stream.partitions):
        log = stream._log(index)
        tail = log.native.tail
        segments = [log.activated(number) for number in log.current()]
        segments = [segment for segment in segments if segment.base_position <= tail]
        ends = [segment.base_position for segment in segments[1:]] + [tail]
        held.append((index, list(zip(segments, ends, strict=True))))
    return held


def _copy_stream(
    store: Store, name: str, parts: list[tuple[int, list[tuple[_native.Segment, int]]]], target: str
) -> None:
    files.make_directory(target)
    config = files.read_json(os.path.join(store._stream_path(name), "stream.json"))
    config["partitions"] = max(len(parts), 1)
    files.write_json(os.path.join(target, "stream.json"), config)
    for index, segments in parts:
        directory = os.path.join(target, f"{index:05d}")
        files.make_directory(directory)
        for segment, end in segments:
            _copy_segment(segment, end, os.path.join(directory, os.path.basename(segment.path)))
        files.sync_directory(directory)
    files.sync_directory(target)


def _copy_segment(segment: _native.Segment, end: int, target: str) -> None:
    """Header, activation record, index and batches below `end`; the rest stays a hole, nothing is stored there."""
    descriptor = files.open_file(target, write=True, create=True)
    try:
        view = segment.contents(end)
        for at in range(0, len(view), CHUNK_BYTES):
            files.write(descriptor, view[at : at + CHUNK_BYTES], at, target)
        files.extend(descriptor, segment.size, target)
        files.sync(descriptor, target)
    finally:
        files.close(descriptor)
