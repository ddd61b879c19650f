"""The snapshot of a view on disk: its values, and how far in each partition they go.

A cache (docs/format.md, `view`): a damaged one, or one of another state of the log, is ignored.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from itertools import accumulate, pairwise

from millstream import _native
from millstream.disk import files
from millstream.errors import MillstreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing_extensions import Buffer

    from millstream._native import Latest
    from millstream.log.partition import PartitionLog
    from millstream.streams.stream import Stream

MAGIC = b"MSVIEW01"
HEADER = struct.Struct("<8sII16sQQQQ")  # then the checksum
VERSION = 2


@dataclass(frozen=True)
class Place:
    """What goes with the values of a view: `following` and `epochs` by partition."""

    following: list[int]
    epochs: list[int]
    """Epoch of the last record read, for each partition; 0: none was."""


def path_of(stream: Stream) -> files.Path:
    """Where the snapshot of a stream lies."""
    return stream.path / "view"


def save(stream: Stream, values: Latest, place: Place) -> None:
    """Put it in the place of the one before."""
    key_ends, value_ends, keys, contents, origins = values._dump()
    header = HEADER.pack(
        MAGIC, VERSION, len(place.following), stream.session.id, stream._stream_id,
        len(origins), len(keys), len(contents),
    )  # fmt: skip
    body = b"".join(
        [
            array("Q", place.following).tobytes(),
            array("Q", place.epochs).tobytes(),
            key_ends,
            value_ends,
            keys,
            contents,
            origins,
        ]
    )
    checksum = struct.pack("<Q", _native.xxh3_64(body, _native.xxh3_64(header)))
    files.replace(path_of(stream), header + checksum + body)


def load(stream: Stream, values: Latest) -> Place | None:
    """Read it into `values`; None where there is none that fits. Why it does not is in the log."""
    path = path_of(stream)
    if not files.exists(path):
        return None
    try:
        parts = _read(stream, path)
        why = "it is damaged, or of another store" if parts is None else _stale(stream, parts[0])
        if parts is not None and not why:
            values._load(*parts[1])
            return parts[0]
    except (MillstreamError, OSError) as error:
        why = str(error)
    except ValueError as error:  # of what it took over up to there, nothing stays
        values._adopt(_native.Latest())
        why = f"it is damaged: {error}"
    with _native.loading:
        import logging
    logging.getLogger("millstream").info("%s: not used, all is read anew: %s", path, why)
    return None


def _read(stream: Stream, path: files.Path) -> tuple[Place, list[Buffer]] | None:
    descriptor = files.open_file(path, write=False)
    try:
        size = files.size(descriptor)
        if size < HEADER.size + 8:
            return None
        data = memoryview(files.map_file(descriptor, size, path, write=False))
    finally:
        files.close(descriptor)
    head, at = data[: HEADER.size], HEADER.size + 8
    magic, version, partitions, store_id, stream_id, *counts = HEADER.unpack(head)
    found = magic, version, store_id, stream_id
    if found != (MAGIC, VERSION, stream.session.id, stream._stream_id):
        return None
    (checksum,) = struct.unpack("<Q", data[HEADER.size : at])
    if checksum != _native.xxh3_64(data[at:], _native.xxh3_64(head)):
        return None
    keys, key_bytes, value_bytes = counts
    sizes = 8 * partitions, 8 * partitions, 8 * keys, 8 * keys, key_bytes, value_bytes, keys
    ends = list(accumulate(sizes, initial=at))
    if ends[-1] != size:
        return None
    following, epochs, *columns = (data[a:b] for a, b in pairwise(ends))
    return Place(following.cast("Q").tolist(), epochs.cast("Q").tolist()), list(columns)


def _stale(stream: Stream, place: Place) -> str:
    """Why the log does not go on from the snapshot; "" where it does."""
    if len(place.following) != stream.partitions:
        return "partitions were added since"
    for index, (following, epoch) in enumerate(zip(place.following, place.epochs, strict=True)):
        why = _stale_partition(stream._log(index), following, epoch)
        if why:
            return f"partition {index}: {why}"
    return ""


def _stale_partition(log: PartitionLog, following: int, epoch: int) -> str:
    if not log.first_offset <= following <= log.next_offset:
        return f"offset {following} is not there any more"
    if epoch == 0:
        return ""
    found = log.segments.locate_offset(following - 1)
    if found is None or found[0].epoch != epoch:
        return f"the record before offset {following} is another one since a tail was lost"
    numbers = log.segments.current()
    for number in numbers[numbers.index(found[0].number) :]:
        record = log.segments.activated(number).compaction
        if record is not None and record[5] > following:
            return "tombstones behind it were removed"
    return ""
