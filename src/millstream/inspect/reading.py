"""What is stored, for those who only read: store, batches, records, and a dump line by line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from millstream.errors import CorruptBatch, NotFound, VersionMismatch
from millstream.inspect.catalog import (
    SegmentInfo,
    StoreInfo,
    open_store,
    open_stream,
    partition_numbers,
    stream_paths,
)
from millstream.inspect.columns import Batch
from millstream.inspect.layout import (
    Finding,
    Invalid,
    Path_,
    Problem,
)
from millstream.inspect.walk import Log

SHOWN_OF_SEGMENT = (
    "number size data_position base_offset base_position end_position epoch predecessor"
    " timestamp_max active"
)
SHOWN_OF_BATCH = (
    "segment position file_position length count base_offset next_offset timestamp_min"
    " timestamp_max producer sequence synced_distance"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One record with all that is known of it."""

    stream: str
    partition: int
    epoch: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


def damaged(problem: Problem) -> CorruptBatch | VersionMismatch:
    """Return the exception that says what a finding says."""
    if problem.kind == "version":
        return VersionMismatch(str(problem))
    return CorruptBatch(
        str(problem),
        path=problem.path,
        position=problem.position or 0,
        expected=problem.expected,
        found=problem.found,
    )


@contextmanager
def strict(path: Path) -> Iterator[None]:
    """Turn Invalid into the exception of errors.py."""
    try:
        yield
    except Invalid as bad:
        raise damaged(bad.problem("file", path, None, "restore it from a backup")) from None


def logs(path: Path_, stream: str | None = None, partition: int | None = None) -> Iterator[Log]:
    """Yield the partitions of a store; raises what `store` raises."""
    top = Path(path)
    with strict(top / "store.json"):
        info, _ = open_store(top)
    for where in stream_paths(top, stream):
        with strict(where / "stream.json"):
            found = open_stream(where)
        numbers = partition_numbers(found)
        if partition is not None:
            if not 0 <= partition < found.config["partitions"]:
                raise NotFound(f"no partition {partition} in stream {found.name!r}")
            numbers = [number for number in numbers if number == partition]
        for number in numbers:
            yield Log(info, found, number)


def store(path: Path_) -> StoreInfo:
    """Read what a store says of itself: identity, streams, segments. Batches are not read.

    Raises:
        CorruptBatch: a JSON file, a segment header or an activation record is damaged.
        VersionMismatch: a newer format.
        StorageError: a file cannot be read.
    """
    top = Path(path)
    with strict(top / "store.json"):
        info, _ = open_store(top)
    for where in stream_paths(top, None):
        with strict(where / "stream.json"):
            info.streams[where.name] = open_stream(where)
    for log in logs(top):
        for finding in log.findings:
            if isinstance(finding, Problem):
                raise damaged(finding)
        info.streams[log.stream.name].partitions[log.number] = log.segments
    return info


def batches(
    path: Path_, stream: str, partition: int, *, start_position: int | None = None
) -> Iterator[Batch]:
    """Yield the batches of a partition that are valid and continue the log, to its end.

    Ends quietly at a torn tail and at the tail of a live writer.

    Args:
        path: directory of the store.
        stream: name.
        partition: number.
        start_position: batches that begin before it are verified and left out.

    Raises:
        CorruptBatch: damaged bytes; what came before them has been yielded.
        VersionMismatch: a newer format.
        NotFound: no such stream or partition.
        StorageError: a file cannot be read.
    """
    for log in logs(path, stream, partition):
        for batch in sound(log):
            if batch.position >= (start_position or 0):
                yield batch


def sound(log: Log) -> Iterator[Batch]:
    """Yield the batches of a log; the first problem is raised."""
    for event in log.events():
        if isinstance(event, Problem):
            raise damaged(event)
        if isinstance(event, Batch):
            yield event


def records(
    path: Path_, stream: str | None = None, partition: int | None = None
) -> Iterator[Record]:
    """Yield every record, partition by partition, in order. Raises what `batches` raises."""
    for log in logs(path, stream, partition):
        for batch in sound(log):
            columns = (batch.offsets.tolist(), batch.timestamps.tolist(), batch.keys, batch.values)
            where = (batch.stream, batch.partition, batch.epoch)
            for offset, time, key, value, headers in zip(*columns, batch.headers, strict=True):
                yield Record(*where, offset, time, key, value, headers)


def dump(
    path: Path_, stream: str | None = None, partition: int | None = None, *, json: bool = False
) -> Iterator[str | dict[str, object]]:
    """Yield one line for each segment, batch and finding, in the order of the log.

    Damage does not end it. With `json`, yields dictionaries that json can write instead.
    Raises what `store` raises for the JSON files.
    """
    for log in logs(path, stream, partition):
        for event in log.events():
            item = described(event, log)
            head, *rest = item.items()
            yield item if json else f"{head[1]} " + " ".join(f"{k}={v}" for k, v in rest)


def described(event: SegmentInfo | Batch | Finding, log: Log) -> dict[str, object]:
    """Return an event as a dictionary of plain values."""
    where: dict[str, object] = {"stream": log.stream.name, "partition": log.number}
    if isinstance(event, SegmentInfo):
        shown = {name: getattr(event, name) for name in SHOWN_OF_SEGMENT.split()}
        hash_ = f"{event.predecessor_hash:016x}"
        return {"item": "segment", **where, **shown, "predecessor_hash": hash_}
    if isinstance(event, Batch):
        shown = {name: getattr(event, name) for name in SHOWN_OF_BATCH.split()}
        ends = {"flags": f"{event.flags:#05x}", "hash": f"{event.hash:016x}"}
        return {"item": "batch", **where, **shown, **ends, "chain": f"{event.chain:08x}"}
    word = "problem" if isinstance(event, Problem) else "note"
    plain = {"kind": event.kind, "path": str(event.path), "position": event.position}
    return {"item": word, **where, **plain, "text": str(getattr(event, "text", event))}
