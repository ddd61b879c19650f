"""One partition of a stream as this process has it open: appending, syncing, rolling, retiring.

Short words are taken in the core. The long ones here: *sync* (one process syncs, the others wait
for its result) and *maintenance* (one process retires segments).
"""

from __future__ import annotations

import errno
import time

from millstream import _native
from millstream.disk import files
from millstream.disk.session import LATE_SECONDS
from millstream.errors import (
    CorruptBatch,
    Indeterminate,
    LockTimeout,
    OffsetOutOfRange,
    Poisoned,
    Reentered,
    StorageError,
)
from millstream.log import control, recovery, segment_file, sequences
from millstream.log.ahead import Ahead
from millstream.log.control import NOWHERE, POISON_SYNC, Mark
from millstream.log.segments import Segments

OWN_SECONDS = 10.0

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from millstream.disk.session import Session
    from millstream.log.handle import StreamHandle
    from millstream.log.sequences import PartitionSequences


class PartitionLog:
    """One partition of one stream, as this process has it open."""

    def __init__(self, stream: StreamHandle, index: int) -> None:
        self.stream = stream
        self.session: Session = stream.session
        self.index = index
        self.path = stream.path / f"{index:05d}"
        files.require_directory(self.path)
        shared = index, self.session.members, self.session.generation, self.session.clock.offset
        self.native = stream._new_partition(*shared)
        self.private = self.session.private
        """Walked by this read-only process for itself: nobody tells it the tail."""
        walked = self.native.walked == self.session.generation
        if not (self.session.writable or self.private or walked):
            private = control.private_map(self.session, stream.path)
            self.native = stream._new_partition(*shared, private)
            self.private = True
        self._names_synced = False
        stream_id, cache = stream._stream_id, stream._cache
        self.segments = Segments(self.session, self.path, index, stream_id, self.native, cache)
        members = self.session.members
        # Between processes `link` lets one of several makers win, and so does a call within a call.
        self._making = _native.Lock(f"{self}: making a segment", members, reentrant=True)
        self.sequences: PartitionSequences | None = None
        self.opening_sequences = _native.Lock(f"{self}: opening sequences", members, reentrant=True)
        self.syncing = self.native.word("sync", str(self), 30.0)
        self.maintaining: _native.Word = self.native.word("maintenance", str(self), 30.0)
        self.ahead = Ahead()
        self.told: Any = None
        """What `Stream.stats` said last of it, and for how often that may be said again."""
        self.ensure_walked()

    def __str__(self) -> str:
        return f"{self.path}"

    def ensure_walked(self) -> None:
        """Recover the partition unless somebody did in this generation."""
        if self.native.walked != self.session.generation:
            recovery.recover(self)

    @property
    def is_open(self) -> bool:
        """Was the partition recovered in this generation?"""
        return bool(self.native.walked == self.session.generation)

    def end(self) -> Mark:
        """The tail as a mark, exact even where a writer died in the middle."""
        while True:
            mark = self.native.end()
            if mark is not None:
                return mark
            tail = self.native.tail
            found = self.segments.locate(tail) if tail else None
            if found is None:
                return NOWHERE
            mark = found[0].mark_at(tail)
            if self.native.tail == tail:
                return mark

    @property
    def first_offset(self) -> int:
        """Offset of the oldest record that is kept."""
        return int(self.native.first_offset)

    @property
    def next_offset(self) -> int:
        """Offset that the next record will get."""
        return self.end()[1]

    def out_of_range(self, offset: int, why: str = "") -> OffsetOutOfRange:
        """The error for an offset that is not there; it carries the valid range."""
        first, following = self.first_offset, self.next_offset
        held = f"are offsets {first} to {following - 1}" if first < following else "is no record"
        return OffsetOutOfRange(
            f"{self}: offset {offset}{why}; there {held}, the next will be {following}",
            partition=self.index,
            first=first,
            next=following,
        )

    def corrupt(self) -> CorruptBatch:
        """The error for what recovery found to be damaged."""
        native = self.native
        tail, synced = native.tail, native.synced_to
        if synced <= tail:
            return CorruptBatch(
                f"{self}: the log is damaged behind offset {self.next_offset - 1}, position"
                f" {tail}; nothing was changed, see `millstream verify` and `millstream repair`",
                path=self.path,
                position=tail,
            )
        path = self.segments.file(
            native.active_number + 1 if native.active_number else max(native.first_segment, 1)
        )
        if native.active_number and files.exists(path):
            path = self.segments.file(native.active_number)
        expected = f"the log up to position {synced}, offset {native.synced_offset}"
        found = f"its end at position {tail}, offset {self.next_offset}"
        return CorruptBatch(
            f"{path}: this segment file, or those behind it, are missing or damaged: expected"
            f" {expected}, all of it synced, found {found}; nothing was changed. Restore the files"
            " from a backup, or let `millstream repair` give up what was in them",
            path=path,
            position=tail,
            expected=expected,
            found=found,
        )

    # --- appending: what the core cannot do itself ------------------------------------------------

    def follow_active(self) -> None:
        """Map the segment that is appended to now."""
        number = self.native.active_number
        segment = self.segments.segment(number, write=True) if number else None
        if segment is not None and segment.epoch == self.session.generation:
            self._fill_holes(segment)
        self.native.set_active(segment)

    @staticmethod
    def _fill_holes(segment: _native.Segment) -> None:
        """Put blocks behind all of a segment to append to: a copied directory may have holes.

        How many blocks it has does not tell: the file system counts its own of the file as well.
        """
        descriptor = files.open_file(segment.path, write=True)
        try:
            files.allocate(descriptor, segment.size, segment.path)
        finally:
            files.close(descriptor)

    def provide_next(self, need_bytes: int = 0) -> None:
        """Have a successor mapped that has room for `need_bytes`; make one where there is none."""
        with self._making:  # another thread may make and drop one in the room that we need
            self._provide_next(need_bytes)

    def _provide_next(self, need_bytes: int) -> None:
        self.follow_active()
        active = self.native.active_number
        # One listing for both: whoever sees the same files makes the same number, and `link` lets
        # one win.
        names = files.names(self.path)
        later = sorted(
            int(name[:16])
            for name in names
            if segment_file.is_segment(name) and int(name[:16]) > active
        )
        if later:
            number = later[0]
        else:
            # Numbers are never used again, also not those of files that were set aside.
            number = 1 + max([*map(segment_file.number_of, names), active])
            files.make_directory(self.path)
            self.make_segment(number, need_bytes)
        segment = self.segments.segment(number, write=True)
        if self._is_stray(segment, active):
            # Left over where an older copy of the other files was put back.
            self.segments.drop(number)
            try:
                files.rename(segment.path, segment.path + ".lost")
            except StorageError as error:
                if error.errno != errno.ENOENT:  # another process may have done so
                    raise
        elif self.native.active_number < number:
            self._fill_holes(segment)
            self.native.set_next(segment)

    def _is_stray(self, segment: _native.Segment, active: int) -> bool:
        """Was the segment behind the active one activated at another place than the tail?

        While somebody rolls, the tail stays where the new segment begins until the segment is
        active.
        """
        if not segment.activated:
            return False
        elsewhere = segment.base_position != self.native.tail or segment.predecessor != active
        return (
            elsewhere
            and self.native.active_number == active
            and segment.base_position != self.native.tail
        )

    def make_segment(self, number: int, need_bytes: int) -> None:
        """Publish a new segment file."""
        active = self.native.active
        segment_file.make(
            self.segments.file(number),
            (self.index, self.session.id, self.stream._stream_id, number),
            before_bytes=0 if active is None else active.size,
            segment_bytes=self.stream._segment_bytes,
            need_bytes=need_bytes,
        )

    def wait_for_word(self, owner: int, deadline: float) -> None:
        """Wait for the append word, take it over from the dead, give up at the deadline.

        That is for other processes: a thread of this one only has it while it writes zeros.
        """
        if _native.owner_parts(owner) == _native.owner_parts(self.session.members.word):
            deadline = max(deadline, time.monotonic() + OWN_SECONDS)
        while True:
            if self.session.members.is_dead(owner):
                self.follow_active()
                later = [
                    number
                    for number in self.segments.listed()
                    if number > self.native.active_number
                ]
                if later and self.native.next is None:
                    self.native.set_next(self.segments.segment(later[0], write=True))
                if self.native.take_over(owner) != "moved":
                    return
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise LockTimeout(
                    f"{self}: the append word is held by {self.session.members.describe(owner)}"
                )
            owner = self.native.wait_append_word(left)
            if owner == 0:
                return

    # --- syncing ----------------------------------------------------------------------------------

    def sync(self, *, sealed: bool = False, timeout: float = 30.0) -> None:
        """Make everything up to the tail, as it is now, survive a power cut.

        With `sealed`, only what has a successor.

        One process at a time does it, under the sync word.
        """
        if self.native.durable >= self.native.tail:
            return
        mark = self._sealed_end() if sealed else None
        self.native.lead(self.syncing, timeout, lambda inherited: self._sync_owned(inherited, mark))

    def _sealed_end(self) -> Mark:
        """The mark at which the active segment begins."""
        number = self.native.active_number
        if number == 0:
            return NOWHERE
        active = self.segments.activated(number)
        return (
            active.base_position,
            active.base_offset,
            active.predecessor_hash,
            active.timestamp_max,
        )

    def _sync_owned(self, inherited: bool, mark: Mark | None = None) -> None:
        """Holder of the sync word."""
        self.check_poison()
        mark = mark or self.end()
        durable = self.native.durable
        if mark[0] <= durable:
            return
        self.native.begin_sync(mark[0])
        for segment, begin, end in self.segments.between(durable, mark[0]):
            if inherited:
                # The dead holder's sync may have failed unseen: the pages must be dirty to be
                # written again.
                self.segments.segment(segment.number, write=True).dirty(begin, end)
            descriptor = segment.take_descriptor()
            if descriptor < 0:
                descriptor = self._open_to_sync(segment)
            try:
                files.sync(descriptor, segment.path)
            except OSError as error:
                self.native.set_poison(POISON_SYNC)
                raise Indeterminate(
                    error.errno or 0,
                    f"a sync failed ({error.strerror or error}); records from offset"
                    f" {self.native.durable_offset} on may not survive a power cut; close the store"
                    " in every process and open it again",
                    self.path,
                ) from error
            finally:
                if not segment.keep_descriptor(descriptor):
                    files.close(descriptor)
        self.native.set_durable(mark)

    def prepare_sync(self) -> None:
        """Have what syncing the next appends will take, a descriptor say, before they are stored.

        Where it cannot be had, they fail, and are not there.
        """
        for segment in (self.native.active, self.native.next):
            if segment is not None and not segment.has_descriptor:
                descriptor = self._open_to_sync(segment)
                if not segment.keep_descriptor(descriptor):
                    files.close(descriptor)

    def _open_to_sync(self, segment: _native.Segment) -> int:
        """A descriptor to sync a segment with, whose name is synced."""
        descriptor = files.open_file(segment.path, write=True)
        try:
            self._sync_names()
        except BaseException:
            files.close(descriptor)
            raise
        return descriptor

    @property
    def is_overdue(self) -> bool:
        """Has something waited for a sync for longer than level "interval" allows?"""
        return self.native.unsynced_seconds > LATE_SECONDS

    def _sync_names(self) -> None:
        """Sync the directory: whoever published a segment may not have done it, or be dead."""
        files.sync_directory(self.path)
        if not self._names_synced:
            files.sync_directory(self.stream.path)
            files.sync_directory(self.session.root / "streams")
            self._names_synced = True

    def check_poison(self) -> None:
        """Refuse where an earlier sync failed."""
        if self.native.poison == POISON_SYNC:
            raise Poisoned(
                0,
                f"an earlier sync failed; records from offset {self.native.durable_offset} on may"
                " not survive a power cut; close the store in every process and open it again",
                self.path,
            )

    def wait_durable(self, position: int, deadline: float, *, late: bool = True) -> None:
        """Return when the log is synced up to a position: sync it, or wait for the one that syncs.

        At the deadline raise `Indeterminate`, or just return when not `late`.
        """
        native = self.native
        while native.durable < position:
            if native.poison == POISON_SYNC:
                raise Indeterminate(
                    0,
                    "the sync behind the record failed; it may not survive a power cut",
                    self.path,
                )
            try:
                step = native.lead_or_wait(position, deadline - time.monotonic(), self._sync_owned)
            except Reentered as error:
                raise Indeterminate(
                    0, f"the record is stored, but not synced: {error}", self.path
                ) from error
            # What a dead leader was at may have failed unseen: its pages are made dirty anew.
            if step != "again" or native.lead(self.syncing, None, self._sync_owned):
                continue
            if time.monotonic() >= deadline:
                if not late:
                    return
                raise Indeterminate(
                    0,
                    f"the record is stored, but its sync did not end in time ({self.syncing.name})",
                    self.path,
                )

    # --- retiring ---------------------------------------------------------------------------------

    def retire_before(self, number: int) -> int:
        """Remove the segments before `number`, whatever reads them; how many.

        Holder of the maintenance word.
        """
        numbers = [known for known in self.segments.current() if known < number]
        if not numbers:
            return 0
        base = self.segments.base(number)[0]
        if self.native.durable <= base:
            # A power cut must not take the activation record that the log now begins with.
            self.sync(sealed=base < self._sealed_end()[0])
            if self.native.durable <= base:
                return 0  # nothing is in it so far
        sequences.keep(self, base)
        self.native.retire(number, self.segments.activated(number).base_offset)
        for gone in numbers:
            self.segments.drop(gone)
            files.remove(self.segments.file(gone))
        self.segments.refresh()
        return len(numbers)
