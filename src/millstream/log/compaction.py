"""Compaction of a partition: the last record of each key stays, at the offset that it has.

A run enters the keys of sealed, synced segments in a table. Then it goes through the segments from
the oldest on, and replaces each that has superseded records by one without them: same base, same
end, one rename. More keys than the table has room for take more rounds. A run keeps no state but
the files: a kill at any instruction leaves a log that the next run goes on with.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from millstream import _native
from millstream.disk import files, reserve
from millstream.errors import CorruptBatch, InvalidArgument, InvalidType, NotFound
from millstream.log import eras, segment_file, sequences
from millstream.options import Compaction, parse_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream.log.handle import StreamHandle
    from millstream.log.partition import PartitionLog

SCAN_BYTES = 8 << 20
MEMORY_BYTES = 64 << 20
BATCH_HEADER_BYTES = 64
FILLER_ROOM = 192  # around the place where a further filler may begin


@dataclass(frozen=True)
class CompactionProgress:
    """How far a `Stream.compact` has come."""

    partition: int
    round: int
    """Number of the round in this partition, from 1."""
    done_bytes: int
    """Bytes of this round: read to learn the keys, and gone through to keep the last of each."""
    total_bytes: int


@dataclass(frozen=True)
class CompactionResult:
    """What a `Stream.compact` did."""

    segments: int
    """Segments that were read."""
    replaced: int
    """Times that a segment was replaced by a smaller one."""
    records_removed: int
    tombstones_removed: int
    bytes_before: int
    """Bytes of log in the segments that were read."""
    bytes_after: int
    rounds: int
    """The most that a partition took: more than 1 where its keys did not fit the memory."""

    def __add__(self, other: CompactionResult) -> CompactionResult:
        """Return the two as one."""
        return CompactionResult(
            self.segments + other.segments,
            self.replaced + other.replaced,
            self.records_removed + other.records_removed,
            self.tombstones_removed + other.tombstones_removed,
            self.bytes_before + other.bytes_before,
            self.bytes_after + other.bytes_after,
            max(self.rounds, other.rounds),
        )


NOTHING = CompactionResult(0, 0, 0, 0, 0, 0, 0)


def compact(
    stream: StreamHandle,
    partition: int | None,
    memory: int | str,
    progress: Callable[[CompactionProgress], None] | None,
    timeout: float,
) -> CompactionResult:
    """`Stream.compact`."""
    size = parse_bytes(memory)
    if size < _native.KEY_BYTES:
        raise InvalidArgument(f"memory {memory!r}: expected at least {_native.KEY_BYTES} bytes")
    if progress is not None and not callable(progress):
        raise InvalidType(f"progress {progress!r}: expected a function, or None")
    keep = stream.compaction or Compaction()
    result = NOTHING
    for index in range(stream.partitions) if partition is None else [partition]:
        log = stream._log(index)
        log.check_poison()
        log.sync()
        with log.native.word("compact", str(log), timeout):
            result += Run(log, keep, size, progress=progress).run()
    return result


def sealed(log: PartitionLog, keep: Compaction) -> list[tuple[int, int]]:
    """(number, end) of the segments that may be compacted.

    They are sealed, old enough, and synced, and so are their successors' activation records.
    """
    found: list[tuple[int, int]] = []
    durable, clock = log.native.durable, log.session.clock
    try:
        for number, following in pairwise(log.segments.current()):
            after = log.segments.activated(following)
            young = clock.age(after.activated_at) < keep.min_age
            if after.base_position >= durable or young:
                break
            found.append((number, after.base_position))
    except NotFound as error:
        if not log.segments.not_found(error):
            raise
        return []  # retention came between: next time
    return found


def dirt(log: PartitionLog, keep: Compaction, found: list[tuple[int, int]]) -> tuple[int, int]:
    """(bytes that were never compacted or have tombstones to go, bytes in all) of segments."""
    dirty = total = 0
    for number, end in found:
        try:
            segment = log.segments.activated(number)
        except NotFound:
            continue
        record = segment.compaction
        size = end - segment.base_position if record is None else record[2]
        total += size
        if record is None or _due(log, record, keep):
            dirty += size
    return dirty, total


def dirty_part(log: PartitionLog, keep: Compaction) -> tuple[float, float | None]:
    """(part of the sealed log that is dirty, when a run last ended) for `Stream.stats`."""
    found = sealed(log, keep)
    dirty, total = dirt(log, keep, found)
    ends = [0]
    for number, _ in found:
        with contextlib.suppress(NotFound):
            record = log.segments.activated(number).compaction
            ends.append(0 if record is None else record[1])
    last = max(ends)
    return dirty / total if total else 0.0, log.session.clock.to_wall(last) / 1e6 if last else None


def _due(log: PartitionLog, record: tuple[int, int, int, int, int, int], keep: Compaction) -> bool:
    """Have tombstones become old enough to go since the last run?"""
    first, last, _, _, tombstones, _ = record
    if tombstones == 0 or first == 0 or last >= first + keep.tombstone_age * 1e6:
        return False
    return log.session.clock.age(first) >= keep.tombstone_age


def _up_to(log: PartitionLog, offset: int, late: int) -> Iterator[tuple[_native.Segment, int]]:
    """(segment, its end) of those with records before an offset, or begun before `late`."""
    tail = log.end()[0]  # first, since the log may go on to another segment
    for number, following in pairwise([*log.segments.current(), None]):
        assert number is not None
        try:
            segment = log.segments.activated(number)
            end = tail if following is None else log.segments.base(following)[0]
        except NotFound as error:
            if not log.segments.not_found(error):
                raise
            continue
        if segment.base_offset >= offset and segment.activated_at > late:
            return
        yield segment, end


class Run:
    """One run over one partition. Holder of its compact word."""

    def __init__(
        self,
        log: PartitionLog,
        keep: Compaction,
        memory: int,
        *,
        pace: Callable[[int], None] | None = None,
        progress: Callable[[CompactionProgress], None] | None = None,
    ) -> None:
        self.log = log
        self.keep = keep
        self.memory = memory
        self.progress = progress
        self._pace = pace
        self._round = self._done = self._total = 0
        self._replaced = self._removed = self._tombstones = 0
        self._counts: dict[int, tuple[int, int]] = {}
        self._keeps_tombstones = False

    def run(self) -> CompactionResult:
        """Compact what may be; its tombstones are as old as this from now on.

        It begins again where retention takes one of its segments.
        """
        while True:
            try:
                return self._run()
            except NotFound as error:
                if not self.log.segments.not_found(error):
                    raise

    def _run(self) -> CompactionResult:
        log = self.log
        self._round = 0
        # Only the holder of the word replaces files: what is mapped now stays the newest.
        log.segments.refresh()
        found = sealed(log, self.keep)
        if not found:
            return NOTHING
        _, before = dirt(log, self.keep, found)
        base = log.segments.base(found[0][0])[1]
        numbers = log.segments.current()
        records = log.segments.base(numbers[bisect_right(numbers, found[-1][0])])[1] - base
        keys = max(1, min(self.memory // _native.KEY_BYTES, records, (1 << 31) - 1))
        table = _native.KeyTable(keys, os.urandom(16))
        begin: int | None = base
        while begin is not None:
            if self._round:
                table.clear()
            self._round, self._done, self._total = self._round + 1, 0, 2 * before
            full = self._scan(table, found, begin)
            self._search_elsewhere(table, found)
            for number, end in found:
                if full is None or log.segments.base(number)[1] < full:
                    self._clean(table, number, end)
            begin = full
        self._stamp(found)
        _, after = dirt(log, self.keep, found)
        return CompactionResult(
            len(found), self._replaced, self._removed, self._tombstones, before, after, self._round
        )

    def _went(self, size: int) -> None:
        self._done += size
        if self._pace is not None:
            self._pace(size)
        if self.progress is not None:
            done = min(self._done, self._total)
            self.progress(CompactionProgress(self.log.index, self._round, done, self._total))

    def _segment(self, number: int) -> _native.Segment | None:
        """The segment; None where it was retired meanwhile."""
        try:
            return self.log.segments.activated(number)
        except NotFound as error:
            if not self.log.segments.not_found(error):
                raise
            return None

    def _scan(
        self, table: _native.KeyTable, found: list[tuple[int, int]], begin: int
    ) -> int | None:
        """Enter the keys from offset `begin` on; the first offset that found no room, or None."""
        for number, end in found:
            segment = self._segment(number)
            if segment is None:
                continue
            position: int | None = segment.base_position
            if segment.base_offset < begin:
                position = segment.find_offset(begin, end)
            while position is not None and position < end:
                reached, full = table.scan(segment, position, end, begin, SCAN_BYTES)
                kept = segment.compaction
                reached_data = reached
                if kept is not None:
                    reached_data = min(reached, segment.base_position + kept[2])
                self._went(max(reached_data - position, 0))
                if full is not None:
                    return full
                position = reached
        return None

    def _search_elsewhere(self, table: _native.KeyTable, found: list[tuple[int, int]]) -> None:
        """Keep the tombstones of keys of which an earlier partition may still have a record."""
        if not any(self._drops(self._segment(number)) for number, _ in found):
            return
        try:
            self._hold_moved(table)
        except CorruptBatch:  # what cannot be read may be of any key: all tombstones stay
            self._keeps_tombstones = True

    def _hold_moved(self, table: _native.KeyTable) -> None:
        stream = self.log.stream
        for index, offset, late in eras.left_elsewhere(stream, self.log.index):
            log = stream._log(index)
            for segment, end in _up_to(log, offset, late):
                position = segment.base_position
                while position < end:
                    reached = table.hold(segment, position, end, SCAN_BYTES)
                    if self._pace is not None:
                        self._pace(reached - position)
                    position = reached

    def _drops(self, segment: _native.Segment | None) -> bool:
        """Has it tombstones that may go?"""
        record = None if segment is None else segment.compaction
        if self._keeps_tombstones or record is None or record[4] == 0 or record[0] == 0:
            return False
        return self.log.session.clock.age(record[0]) >= self.keep.tombstone_age

    def _clean(self, table: _native.KeyTable, number: int, end: int) -> None:
        """Replace a segment that has superseded records by one that has not."""
        segment = self._segment(number)
        if segment is None:
            return
        record = segment.compaction
        survivors = _native.Survivors(table, segment, end, self._drops(segment))
        tombstones = survivors.tombstones + survivors.tombstones_removed
        self._counts[number] = survivors.records + survivors.dead, tombstones
        size = end - segment.base_position if record is None else record[2]
        if survivors.dead:
            kept = None if survivors.damaged else survivors.measure()
            if kept is None or kept >= size:  # offsets of what is left may take more than is saved
                survivors.leave(table)
            elif self._replace(survivors, end, kept):
                size += kept
                self._replaced += 1
                self._removed += survivors.dead
                self._tombstones += survivors.tombstones_removed
                self._counts[number] = survivors.records, survivors.tombstones
        self._went(size)

    def _replace(self, survivors: _native.Survivors, end: int, kept: int) -> bool:
        """Make the new file, sync it, give it the old one's name; False: retired meanwhile."""
        log, segment = self.log, survivors.segment
        path = log.segments.file(segment.number)
        made = path + ".compact.tmp"
        files.remove(made)  # of a run that was killed
        descriptor = files.open_file(made, write=True, create=True)
        try:
            self._fill(descriptor, made, survivors, end, kept)
            with log.maintaining:
                if segment.number < log.native.first_segment:
                    files.remove(made)
                    return False
                sequences.keep(log, end)  # what the headers that go say of producers
                files.rename(made, path)
                log.native.replaced()
                files.sync_directory(log.path)
        except BaseException:
            files.remove(made)
            raise
        finally:
            files.close(descriptor)
        log.segments.refresh()
        return True

    def _fill(
        self, descriptor: int, made: files.Path, survivors: _native.Survivors, end: int, kept: int
    ) -> None:
        log, segment = self.log, survivors.segment
        data = segment.size - segment.data_bytes
        used = min(data + kept + BATCH_HEADER_BYTES + 4095 & ~4095, segment.size)
        reserve.lend(log.session.root, files.allocate, descriptor, used, made)
        place = (log.index, log.session.id, log.stream._stream_id, segment.number)
        files.write(descriptor, segment_file.header(place, segment.size), 0, made)
        files.extend(descriptor, segment.size, made)
        file_end = data + end - segment.base_position
        step = _native.FILLER_BYTES
        for at in range(data + kept + step, file_end, step):
            files.write(descriptor, bytes(FILLER_ROOM), at - 128, made)
        mapping = files.map_file(descriptor, segment.size, made, write=True)
        index, store_id, stream_id, number = place
        target = _native.Segment(mapping, store_id, stream_id, index, number, True, made)
        survivors.copy(target)
        before = segment.compaction or (0, 0, 0, 0, 0, 0)
        gone = max(before[5], survivors.tombstones_end)
        target.set_compaction(
            (before[0], before[1], kept, survivors.records, survivors.tombstones, gone)
        )
        files.sync(descriptor, made)

    def _stamp(self, found: list[tuple[int, int]]) -> None:
        """Say in each segment that a run has ended that began when it was sealed already.

        It need not be synced: without it tombstones only stay longer.
        """
        now = self.log.session.clock.now()
        for number, end in found:
            if self._segment(number) is None or number not in self._counts:
                continue
            segment = self.log.segments.segment(number, write=True)
            before = segment.compaction or (0, 0, end - segment.base_position, 0, 0, 0)
            counts = self._counts[number]
            segment.set_compaction((before[0] or now, now, before[2], *counts, before[5]))


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
CompactionProgress.__module__ = "millstream"
CompactionResult.__module__ = "millstream"
