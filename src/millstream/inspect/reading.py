"""What is stored, for those who only read: store, batches, records, and a dump line by line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from millstream.errors import CorruptBatch, NotFound, VersionMismatch
from millstream.inspect import producers
from millstream.inspect.catalog import (
    SegmentInfo,
    StoreInfo,
    StreamInfo,
    open_store,
    open_stream,
    partition_numbers,
    require,
    stream_paths,
)
from millstream.inspect.columns import Batch
from millstream.inspect.layout import Finding, Invalid, Path_, Problem, staying, top_of
from millstream.inspect.queue_layout import Message, QueueInfo
from millstream.inspect.queues import Queue, open_queue, queue_paths
from millstream.inspect.walk import Log

SHOWN_OF_SEGMENT = (
    "number size data_position base_offset base_position end_position epoch predecessor"
    " timestamp_max active"
)
SHOWN_OF_BATCH = (
    "segment position file_position length count base_offset next_offset timestamp_min"
    " timestamp_max producer sequence synced_distance"
)


SHOWN_OF_QUEUE = "slot_count block_count paused poison next_id slot_bytes"
SHOWN_OF_MESSAGE = "slot state id lane attempts reuse tick put_at due expires"


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
    """Raise Invalid as the exception of errors.py."""
    try:
        yield
    except Invalid as bad:
        raise damaged(bad.problem("file", path, None, "restore it from a backup")) from None


def strict_store(top: Path) -> StoreInfo:
    """Return what `store.json` says."""
    require(top)
    with strict(top / "store.json"):
        return open_store(top)[0]


def strict_stream(where: Path) -> StreamInfo:
    """Return what the `stream.json` of a stream says."""
    with strict(where / "stream.json"):
        return open_stream(where)


def logs(path: Path_, stream: str | None = None, partition: int | None = None) -> Iterator[Log]:
    """Yield the partitions of a store; raises what `store` raises."""
    top = top_of(path)
    with staying(top):
        info = strict_store(top)
        for where in stream_paths(top, stream):
            found = strict_stream(where)
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
        NotFound: no store.
        StorageError: a file cannot be read.
    """
    top = top_of(path)
    info = strict_store(top)
    for where in stream_paths(top, None):
        info.streams[where.name] = strict_stream(where)
    for log in logs(top):
        for finding in log.findings:
            if isinstance(finding, Problem):
                raise damaged(finding)
        gone = log.active_gone(log.segments[-1].base_offset if log.segments else 0)
        if gone is not None:
            raise damaged(gone)
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
        NotFound: no such store, stream or partition.
        StorageError: a file cannot be read.
    """
    for log in logs(path, stream, partition):
        for batch in sound(log):
            if batch.position >= (start_position or 0):
                yield batch


def sound(log: Log) -> Iterator[Batch]:
    """Yield the batches of a log; the first problem is raised, in the order of the segments."""
    known = [finding for finding in log.findings if isinstance(finding, Problem)]
    known.sort(key=lambda problem: problem.path.name)
    for event in log.events():
        if isinstance(event, Problem) and not any(event is problem for problem in known):
            raise damaged(event)
        if isinstance(event, SegmentInfo) and known and known[0].path.name <= event.path.name:
            raise damaged(known[0])
        if isinstance(event, Batch):
            yield event
    if known:
        raise damaged(known[0])


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
    path: Path_,
    stream: str | None = None,
    partition: int | None = None,
    *,
    queue: str | None = None,
    json: bool = False,
) -> Iterator[str | dict[str, object]]:
    """Yield one line for each segment, batch and finding, in the order of the log.

    Then, unless a stream is named, one for each queue, message and finding in the order of slots;
    with `queue`, those of that queue alone.

    Damage does not end it. With `json`, yields dictionaries that json can write instead.
    Raises what `store` raises for the JSON files.
    """
    for item in dumped(top_of(path), stream, partition, queue):
        head, *rest = item.items()
        yield item if json else f"{head[1]} " + " ".join(f"{k}={v}" for k, v in rest)


def dumped(
    path: Path, stream: str | None, partition: int | None, queue: str | None
) -> Iterator[dict[str, object]]:
    """Yield what `dump` shows."""
    if queue is None:
        store = strict_store(path)
        for where in stream_paths(path, stream):
            with strict(where / "stream.json"):
                yield from producers.described_ids(store, open_stream(where))
        for log in logs(path, stream, partition):
            yield from producers.described(store, log)
            for event in log.events():
                yield described(event, log)
    if stream is None:
        for one in queues(path, queue):
            shown = {name: getattr(one.info, name) for name in SHOWN_OF_QUEUE.split()}
            yield {"item": "queue", "queue": one.info.name, **shown}
            for found in one.events():
                yield described_message(found, one.info)


def queues(path: Path_, queue: str | None = None) -> Iterator[Queue]:
    """Yield the queues of a store, each open until the next; raises what `store` raises."""
    top = top_of(path)
    with staying(top):
        info = strict_store(top)
        for where in queue_paths(top, queue):
            with strict(where / "queue.json"):
                found = open_queue(where)
            with Queue(info, found) as one:
                yield one


def messages(path: Path_, queue: str | None = None) -> Iterator[Message]:
    """Yield every message that is not over, queue by queue, in the order of slots.

    Puts that a power cut took, and dead letters that are damaged, are left out.

    Raises:
        CorruptBatch: a damaged message; those before it have been yielded.
        VersionMismatch: a newer format.
        NotFound: no such store or queue.
        StorageError: a file cannot be read.
    """
    for one in queues(path, queue):
        for event in one.events():
            if isinstance(event, Problem):
                raise damaged(event)
            if isinstance(event, Message):
                yield event


def described_message(event: Message | Finding, info: QueueInfo) -> dict[str, object]:
    """Return a message or a finding of a queue as a dictionary of plain values."""
    if not isinstance(event, Message):
        return described_finding(event, {"queue": info.name})
    shown = {name: getattr(event, name) for name in SHOWN_OF_MESSAGE.split()}
    sizes = {
        "key_bytes": None if event.key is None else len(event.key),
        "headers": len(event.headers),
    }
    rest = {"payload_bytes": len(event.payload), "blocks": len(event.blocks)}
    why: dict[str, object] = {"failures": len(event.failures)}
    if event.failures:
        why = {**why, "kind": event.failures[0].kind, "last": event.failures[0].last}
    return {"item": "message", "queue": info.name, **shown, **sizes, **rest, **why}


def described(event: SegmentInfo | Batch | Finding, log: Log) -> dict[str, object]:
    """Return an event as a dictionary of plain values."""
    where: dict[str, object] = {"stream": log.stream.name, "partition": log.number}
    if isinstance(event, SegmentInfo):
        shown = {name: getattr(event, name) for name in SHOWN_OF_SEGMENT.split()}
        hash_ = f"{event.predecessor_hash:016x}"
        return {"item": "segment", **where, **shown, "predecessor_hash": hash_}
    if isinstance(event, Batch):
        shown = {name: getattr(event, name) for name in SHOWN_OF_BATCH.split()}
        if event.producer:
            more = event.sequence & producers.MORE != 0
            shown.update(sequence=event.sequence & ~producers.MORE, more=more)
        ends = {"flags": f"{event.flags:#05x}", "hash": f"{event.hash:016x}"}
        return {"item": "batch", **where, **shown, **ends, "chain": f"{event.chain:08x}"}
    return described_finding(event, where)


def described_finding(event: Finding, where: dict[str, object]) -> dict[str, object]:
    """Return a finding as a dictionary of plain values."""
    word = "problem" if isinstance(event, Problem) else "note"
    plain = {"kind": event.kind, "path": str(event.path), "position": event.position}
    return {"item": word, **where, **plain, "text": str(getattr(event, "text", event))}
