"""Verify: every byte that means something, and the sparse index, which is only a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from millstream.errors import StorageError
from millstream.inspect import groups, journals
from millstream.inspect.catalog import (
    SegmentInfo,
    StoreInfo,
    linked_elsewhere,
    open_store,
    open_stream,
    require,
    stream_paths,
    unreadable,
)
from millstream.inspect.columns import Batch
from millstream.inspect.layout import (
    FILLER,
    INDEX_BLOCK_BYTES,
    File,
    Finding,
    Invalid,
    Note,
    Path_,
    Problem,
    staying,
    top_of,
)
from millstream.inspect.producers import Sequences, findings_of_ids
from millstream.inspect.queue_layout import Message
from millstream.inspect.queues import Queue, open_queue, queue_paths
from millstream.inspect.walk import Log


@dataclass(slots=True)
class Report:
    """What `verify` saw. `bytes` are those of valid batches, and of messages."""

    streams: int = 0
    partitions: int = 0
    segments: int = 0
    batches: int = 0
    records: int = 0
    queues: int = 0
    messages: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing that was stored is damaged or missing."""
        return not self.problems

    def add(self, finding: Finding) -> None:
        """Keep a finding; a note that the store or stream already has is kept once."""
        if isinstance(finding, Problem):
            self.problems.append(finding)
        elif finding not in self.notes[-64:]:
            self.notes.append(finding)


def verify(
    path: Path_,
    stream: str | None = None,
    *,
    queue: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check every byte that means something, and change none. Damage never ends it early.

    Beside living writers it checks what they had published when it came to the partition.

    Args:
        path: directory of the store.
        stream: only this one, and no queue.
        queue: only this one, and no stream.
        progress: called with (bytes done, bytes in all of the segments found so far).

    Raises:
        NotFound: no such store, stream or queue.
        StorageError: the directory cannot be read.
    """
    top = top_of(path)
    with staying(top):
        return verified(top, stream, queue, progress)


def verified(
    top: Path,
    stream: str | None,
    queue: str | None,
    progress: Callable[[int, int], None] | None,
) -> Report:
    """Return what `verify` found."""
    report = Report()
    advice = "restore it from a backup; nothing of it can be guessed"
    total = 0
    require(top)
    try:
        info, findings = open_store(top)
        for finding in findings:
            report.add(finding)
    except Invalid as bad:
        report.add(bad.problem("store", top / "store.json", None, advice))
        return report
    if (shared := linked_elsewhere(top)) is not None:
        report.add(shared)
    for where in [] if queue is not None else stream_paths(top, stream):
        if where.name.endswith(".tmp") and not (where / "stream.json").exists():
            report.add(Note("tmp", where, None, "set aside, never read"))
            continue
        try:
            found = open_stream(where)
        except Invalid as bad:
            report.add(bad.problem("stream", where / "stream.json", None, advice))
            continue
        except StorageError as error:
            report.add(unreadable(where / "stream.json", error))
            continue
        report.streams += 1
        for finding in (*groups.verify(info, found), *journals.verify(info, found)):
            report.add(finding)
        report.partitions += found.config["partitions"]  # also those that nothing was written to
        highest = 0  # number of a producer
        for number in range(found.config["partitions"]):
            try:
                log = Log(info, found, number)
            except StorageError as error:
                report.add(unreadable(found.path / f"{number:05}", error))
                continue
            total += sum(
                (s.end_position or s.base_position) - s.base_position for s in log.segments
            )
            sequences = Sequences(info, log)
            for event in checked(log):
                if isinstance(event, SegmentInfo):
                    report.segments += 1
                elif isinstance(event, Batch):
                    report.batches += 1
                    report.records += event.count
                    report.bytes += event.length
                    sequences.pass_over(event)
                    if progress is not None and report.batches % 64 == 0:
                        progress(report.bytes, max(total, report.bytes))
                else:
                    report.add(event)
            for finding in sequences.finish():
                report.add(finding)
            highest = max(highest, sequences.highest)
        for finding in findings_of_ids(info, found, highest):  # each was registered before
            report.add(finding)
    for where in [] if stream is not None else queue_paths(top, queue):
        verify_queue(info, where, report, progress)
    if progress is not None:
        progress(report.bytes, report.bytes)
    return report


def verify_queue(
    store: StoreInfo,
    path: Path,
    report: Report,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Check one queue, and add to the report what is found."""
    try:
        info = open_queue(path)
    except Invalid as bad:
        advice = "restore it from a backup; nothing of it can be guessed"
        report.add(bad.problem("queue", path / "queue.json", None, advice))
        return
    except StorageError as error:
        report.add(unreadable(path / "queue.json", error))
        return
    report.queues += 1
    try:
        with Queue(store, info) as queue:
            for event in queue.events():
                if not isinstance(event, Message):
                    report.add(event)
                    continue
                report.messages += 1
                report.bytes += event.content_bytes
                if progress is not None and report.messages % 4096 == 0:
                    progress(report.bytes, report.bytes)
    except StorageError as error:
        report.add(unreadable(path, error))


def checked(log: Log) -> Iterator[SegmentInfo | Batch | Finding]:
    """Yield the events of a log, and what is wrong with batches' contents and the index."""
    index: Index | None = None
    for event in log.events():
        if isinstance(event, SegmentInfo):
            if index is not None:
                yield from index.end()
            index = Index(event)
        elif isinstance(event, Batch) and index is not None:
            for what, expected, found in event.contradictions():
                bad = Invalid(what, expected, found)
                advice = "the hash is right: it was written like this; report it"
                yield bad.problem("content", event.path, event.file_position, advice)
            index.pass_over(event)
        elif isinstance(event, Problem) and event.kind == "batch" and index is not None:
            index.exact = False
        yield event
    if index is not None:
        yield from index.end()


class Index:
    """A segment's sparse index, held against its batches as they come."""

    def __init__(self, segment: SegmentInfo) -> None:
        self.segment, self.exact = segment, True
        self.timestamp_max, self.entry = segment.timestamp_max, 1
        self.wrong: list[int] = []
        try:
            with File(segment.path) as file:
                raw = file.read(8192, 16 * segment.index_count).tobytes()
        except StorageError:
            raw = b""
        kind = [("offset", "<u4"), ("position", "<u4"), ("timestamp_max", "<i8")]
        self.entries = np.frombuffer(raw[: len(raw) // 16 * 16], kind)

    def pass_over(self, batch: Batch) -> None:
        """Check the entries that stand for this batch."""
        at = batch.position - self.segment.base_position
        while self.entry < len(self.entries) and INDEX_BLOCK_BYTES * self.entry <= at:
            offset, position, timestamp = self.entries[self.entry].tolist()
            right = (offset, position) == (batch.base_offset - self.segment.base_offset, at + 1)
            same = timestamp == self.timestamp_max or (
                not self.exact and timestamp > self.timestamp_max
            )
            if position and not (right and same):
                self.wrong.append(self.entry)
            self.entry += 1
        self.exact = self.exact and not batch.flags & FILLER
        if batch.count:
            self.timestamp_max = max(self.timestamp_max, batch.timestamp_max)

    def end(self) -> Iterator[Note]:
        """Yield what was wrong; a writer may be filling the entries behind the last batch."""
        if self.wrong:
            text = f"{len(self.wrong)} entries do not fit the batches; they are only a cache"
            yield Note("index", self.segment.path, 8192 + 16 * self.wrong[0], text)
