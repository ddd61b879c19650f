"""What `Stream.stats` returns."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from millstream import _native
from millstream.log import compacted
from millstream.log.control import POISON_SYNC
from millstream.log.producer_ids import ids_of
from millstream.options import Compaction, Durability, Retention

if TYPE_CHECKING:
    from millstream.log.partition import PartitionLog
    from millstream.streams.stream import Stream


def dirt_of(log: PartitionLog) -> tuple[float, float | None]:
    """`dirty` and `compacted_at` of a partition."""
    if log.stream.compaction is None and not log.native.compacted:
        return 0.0, None
    with _native.loading:
        from millstream.log import compaction
    return compaction.dirty_part(log, log.stream.compaction or Compaction())


@dataclasses.dataclass(frozen=True)
class PartitionStats:
    """One partition: offsets, bytes and health."""

    partition: int
    first_offset: int
    next_offset: int
    durable_offset: int
    records: int
    """Offsets from first to next, less those that compaction left without a record."""
    log_bytes: int
    """Bytes of log that can be read."""
    allocated_bytes: int
    """Bytes of disk that its files take."""
    segments: int
    health: Literal["sound", "sync overdue", "sync failed", "corrupt"]
    """"sync overdue": what was appended at level "interval" has waited for a sync for seconds."""
    dirty: float = 0.0
    """Part of the sealed log that compaction has not gone through; 0 without compaction."""
    compacted_at: float | None = None
    """When a compaction last went through it, seconds since 1970."""


@dataclasses.dataclass(frozen=True)
class StreamStats:
    """A stream: the sums, and each partition."""

    name: str
    durability: Durability
    """What an append through this handle has survived when it returns."""
    retention: Retention
    segment_bytes: int
    records: int
    log_bytes: int
    allocated_bytes: int
    partitions: tuple[PartitionStats, ...]
    producers: int = 0
    """Ids of idempotent producers that were ever registered."""
    compaction: Compaction | None = None
    background: str = ""
    """What the background threads of this process fail at now; "": nothing."""

    @property
    def health(self) -> str:
        """That of the worst partition; "background failing" where `background` says of what."""
        worst = max((part.health for part in self.partitions), key=WORSE.index)
        return "background failing" if worst == "sound" and self.background else worst


WORSE = ("sound", "sync overdue", "sync failed", "corrupt")


def of_stream(stream: Stream) -> StreamStats:
    """The stream in numbers, as of now."""
    found = tuple(_of_partition(stream, index) for index in range(stream.partitions))
    return StreamStats(
        stream.name,
        stream.durability,
        stream.retention,
        stream.segment_bytes,
        sum(part.records for part in found),
        sum(part.log_bytes for part in found),
        sum(part.allocated_bytes for part in found),
        found,
        ids_of(stream).count(),
        stream.compaction,
        stream.session.notices.trouble,
    )


def _of_partition(stream: Stream, index: int) -> PartitionStats:
    log = stream._log(index)
    size, records = compacted.extent(log)
    return PartitionStats(
        index,
        log.first_offset,
        log.next_offset,
        log.native.durable_offset,
        records,
        size,
        log.segments.allocated_bytes(),
        len(log.segments.current()),
        _health(log),
        *dirt_of(log),
    )


def _health(log: PartitionLog) -> Literal["sound", "sync overdue", "sync failed", "corrupt"]:
    if log.native.poison:
        return "sync failed" if log.native.poison == POISON_SYNC else "corrupt"
    overdue = log.stream.durability == "interval" and log.is_overdue
    return "sync overdue" if overdue else "sound"


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
PartitionStats.__module__ = "millstream"
StreamStats.__module__ = "millstream"
