"""What `Stream.stats` returns."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

from millstream import _native
from millstream.errors import NotFound
from millstream.frozen import frozen
from millstream.log import compacted
from millstream.log.control import POISON_SYNC
from millstream.log.producer_ids import ids_of
from millstream.options import Compaction, Durability, Retention

if TYPE_CHECKING:
    from millstream.log.handle import Figures
    from millstream.log.partition import PartitionLog
    from millstream.streams.stream import Stream

Health = Literal["sound", "sync overdue", "sync failed", "corrupt"]
TURNS = 128


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
    """Bytes of disk that its files take; in `Store.stats` as measured within the last 128 calls."""
    segments: int
    health: Health
    """"sync overdue": what was appended at level "interval" has waited for a sync for seconds."""
    dirty: float = 0.0
    """Part of the sealed log that compaction has not gone through; 0 without compaction."""
    compacted_at: float | None = None
    """When a compaction last went through it, seconds since 1970."""
    oldest_at: float | None = None
    """Timestamp of the oldest record, seconds since 1970; None: there is none that can be read."""

    @property
    def oldest_age(self) -> float | None:
        """Seconds from then until now; 0 where it lies ahead."""
        return None if self.oldest_at is None else max(0.0, time.time() - self.oldest_at)


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


def of_stream(stream: Stream, *, measured: bool = True) -> StreamStats:
    """The stream in numbers, as of now.

    Where not all files are to be `measured`, those that should not have changed are in turns.
    """
    settings = stream.durability == "interval", stream.compaction is not None
    found = []
    for index, figures in enumerate(stream._all_figures()):
        told = figures[0].told
        if told is None or measured or told.turn[0] <= 0:
            found.append(_of_partition(stream, index, figures, settings, True))
            continue
        told.turn[0] -= 1
        if told.figures == figures and told.settings == settings:
            found.append(told.stats)
        else:
            found.append(_of_partition(stream, index, figures, settings, False))
    return StreamStats(
        stream.name,
        stream.durability,
        stream.retention,
        stream.segment_bytes,
        sum([part.records for part in found]),
        sum([part.log_bytes for part in found]),
        sum([part.allocated_bytes for part in found]),
        tuple(found),
        ids_of(stream).count(),
        stream.compaction,
        stream.session.notices.trouble,
    )


class Told(NamedTuple):
    """What was said of a partition: true while its control block, and the settings, are the same.

    `turn` counts down to the call that measures the files anew, of each partition at another one.
    """

    figures: Figures
    settings: tuple[bool, bool]
    base: tuple[int, int]
    stats: PartitionStats
    turn: list[int]


def _of_partition(
    stream: Stream, index: int, figures: Figures, settings: tuple[bool, bool], measured: bool
) -> PartitionStats:
    log, key, tail, first, following, durable, poison, overdue = figures
    told: Told | None = log.told
    if measured or told is None or told.figures[1] != key:
        base, segments, allocated = _look_at(log)
        turn = [TURNS + (index % TURNS if told is None else 0)]
    else:
        base, turn = told.base, told.turn
        segments, allocated = told.stats.segments, told.stats.allocated_bytes
    size, records = (tail - base[0], following - base[1]) if segments else (0, 0)
    dirt: tuple[float, float | None] = 0.0, None
    interval, compacts = settings
    if compacts or key[3]:
        size, records = compacted.extent(log)
        dirt = dirt_of(log)
    health: Health = "sound"
    if poison:
        health = "sync failed" if poison == POISON_SYNC else "corrupt"
    elif interval and overdue:
        health = "sync overdue"
    if told is None or told.figures[1] != key or not told.stats.records or told.figures[3] != first:
        since = stream._time_at(index, first) if records else None
    else:
        since = told.stats.oldest_at if records else None
    stats = frozen(
        PartitionStats,
        {
            "partition": index,
            "first_offset": first,
            "next_offset": following,
            "durable_offset": durable,
            "records": records,
            "log_bytes": size,
            "allocated_bytes": allocated,
            "segments": segments,
            "health": health,
            "dirty": dirt[0],
            "compacted_at": dirt[1],
            "oldest_at": since,
        },
    )
    lasting = not (compacts or key[3] or poison)
    log.told = Told(figures, settings, base, stats, turn) if lasting else None
    return stats


def _look_at(log: PartitionLog) -> tuple[tuple[int, int], int, int]:
    """Position and offset at which the log begins; segments; bytes of disk of all its files."""
    while True:
        numbers = log.segments.current()
        try:
            base = log.segments.base(numbers[0]) if numbers else (0, 0)
            return base, len(numbers), log.segments.allocated_bytes()
        except NotFound as error:
            if not log.segments.not_found(error):
                raise


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
PartitionStats.__module__ = "millstream"
StreamStats.__module__ = "millstream"
