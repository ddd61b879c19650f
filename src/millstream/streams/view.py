"""A view: the latest value of each key of a stream, in memory, loaded once and kept current."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView

from millstream import _native
from millstream._native import Latest, Position, Span
from millstream.errors import (
    Closed,
    InvalidType,
    NotFound,
    OffsetOutOfRange,
    StorageError,
    WaitTimeout,
)
from millstream.log import eras
from millstream.log.reader import KEEP_MAPS, PartitionReader, Rotation, check_record
from millstream.options import check_timeout
from millstream.streams import view_snapshot
from millstream.streams.view_snapshot import Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream.log.partition import PartitionLog
    from millstream.streams.stream import Stream

__all__ = ["View"]

STEP_RECORDS = 8192  # between two runs of other threads
WAIT_SECONDS = 1.0
SNAPSHOT_SECONDS = 60.0
SNAPSHOT_RECORDS = 10_000


class View(Latest):
    """The latest value of each key of a stream: a read-only mapping that is kept current.

    Made by `Stream.view`. A thread follows the stream; what it has not come to yet is not there, so
    whoever wants to see what was just appended calls `wait_for`. A null value takes its key out;
    records without a key are left out. Iterating goes over what was there when it began.

    Keys and values are in memory: about 50 bytes a key and what they are long. What retention
    removes from the stream stays in a view that is open. Thread-safe; ends with `close`, or the
    end of its `with`, which writes a snapshot, so that the next view reads only what is new.
    `len`, `in`, ``view[key]`` and `get` are the extension's own.

    >>> import millstream
    >>> with millstream.temporary() as store:
    ...     stream = store.stream("s")
    ...     _ = stream.append(b"0", key=b"a")
    ...     with stream.view() as view:
    ...         position = stream.append(b"1", key=b"a")
    ...         view.wait_for(position)
    ...         view[b"a"], view.get(b"b"), len(view)
    (b'1', None, 1)
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._changed = _native.Bell()
        self._stopping = False
        self._saved_at = time.monotonic()
        replay = self._loaded(self, view_snapshot.load(stream, self))
        if replay is None:
            self._begin_anew()
        else:
            self._replay = replay
        self._thread = threading.Thread(target=self._run, name="millstream-view", daemon=True)
        _native.start(self._thread, stream.path)

    # --- a mapping --------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[bytes]:
        """Iterate over the keys that there are now."""
        return iter(self.key_list())

    def keys(self) -> KeysView[bytes]:
        """Keys as of now."""
        return self.as_dict().keys()

    def values(self) -> ValuesView[bytes]:
        """Values as of now."""
        return self.as_dict().values()

    def items(self) -> ItemsView[bytes, bytes]:
        """Pairs as of now, all of one moment."""
        return self.as_dict().items()

    def __eq__(self, other: object) -> bool:
        """Whether a mapping has the same keys and values now."""
        return self.as_dict() == other if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} keys"
        return f"<View of {self.stream.name!r}: {state}>"

    # --- keeping current --------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Has it ended?"""
        return self.ended is not None

    @property
    def positions(self) -> list[int]:
        """For each partition the offset up to which its records are in the view."""
        return list(self._replay.following)

    def wait_for(self, position: Position | Span, *, timeout: float | None = None) -> None:
        """Return when the record, or all of the span, is in the view.

        Args:
            position: what `append` returned, or one of what `append_many` did.
            timeout: seconds; None: for ever.

        Raises: WaitTimeout; OffsetOutOfRange where there is no such record; Closed.
        """
        if isinstance(position, Span):
            index, last = position.partition, position.first_offset + position.count - 1
        elif isinstance(position, Position):
            index, last = position.partition, position.offset
        else:
            raise InvalidType(f"position {position!r}: expected a Position or a Span")
        seconds = check_timeout(timeout)
        if not self.closed and not self._has(index, last):
            log = self.stream._log(index)
            if last >= log.next_offset:
                raise log.out_of_range(last, " was not appended")
        if not self.closed:
            check_record(self.stream._log(index), position.epoch, last)
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        while True:
            seen = self._changed.rung
            if self.ended is not None:
                raise self.ended.with_traceback(None)
            if self._has(index, last):
                return
            if (left := deadline - time.monotonic()) <= 0:
                break
            self._changed.wait(seen, left)
        raise WaitTimeout(f"{self!r}: offset {last} of partition {index} did not come in time")

    def _has(self, index: int, offset: int) -> bool:
        following = self._replay.following
        return index < len(following) and offset < following[index]

    def close(self) -> None:
        """Stop following, and write a snapshot; lookups raise `Closed` from now on."""
        self._stopping = True
        if not self.stream.closed:
            self.stream._wake()
        _native.join(self._thread)
        if not self.closed:
            if not self.stream.closed:
                self._save()
            self._finish(Closed(f"{self.stream.path}: the view is closed"))
        self._replay.end()

    def __enter__(self) -> View:
        """Return itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close it."""
        self.close()

    # --- what the thread does ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                with contextlib.suppress(OffsetOutOfRange):
                    self._follow()
                if not self._stopping:
                    self._begin_anew()
        except Exception as error:  # the next lookup raises it
            self._finish(error)
        except BaseException as error:
            ended = Closed(f"{self.stream.path}: the thread of the view was ended: {error!r}")
            ended.__cause__ = error
            self._finish(ended)

    def _loaded(self, values: Latest, place: Place | None) -> Replay | None:
        """A replay that is at the end; None: retention, compaction or partitions came between."""
        try:
            replay = Replay(self.stream, values, place, lambda: self._stopping)
            while not self._stopping and replay.step():
                pass
        except OffsetOutOfRange:
            return None
        return replay if replay.lasts else None

    def _begin_anew(self) -> None:
        """Load all, since retention or compaction was faster, or there are more partitions.

        What was there can be looked up until then.
        """
        while not self._stopping:
            replay = self._loaded(Latest(), None)
            if replay is not None and not self._stopping:
                self._adopt(replay.values)
                replay.values = self
                self._replay = replay
                return

    def _follow(self) -> None:
        """Apply what comes until the view is closed, or has to begin anew."""
        replay = self._replay
        while not self._stopping and replay.lasts:
            some = replay.step()
            self._changed.ring()
            if not some:
                self._save_now_and_then()
                replay.wait()

    def _finish(self, error: Exception) -> None:
        self._end(error)
        self._changed.ring()

    def _save_now_and_then(self) -> None:
        enough = max(SNAPSHOT_RECORDS, len(self))
        if self._replay.applied >= enough and time.monotonic() - self._saved_at > SNAPSHOT_SECONDS:
            self._save()

    def _save(self) -> None:
        """Write the snapshot, if there is anything new; without it the next view reads more."""
        session, replay = self.stream.session, self._replay
        if not session.writable or session.temporary or not replay.applied:
            return
        self._saved_at = time.monotonic()
        try:
            view_snapshot.save(self.stream, self, replay.place())
            replay.applied = 0
        except StorageError as error:
            with _native.loading:
                import logging
            text = "%r: its snapshot could not be written: %s"
            logging.getLogger("millstream").warning(text, self, error)


class _Reader(PartitionReader):
    """Raises `OffsetOutOfRange` where compaction removed tombstones that it has not read.

    What they delete may have been read before, unless they had `gone` before anything was: by
    segment the offset behind the last one.
    """

    def __init__(self, log: PartitionLog, start: int, gone: dict[int, int]) -> None:
        self._gone = gone
        super().__init__(log, start, durable=False, on_lost="raise")
        self._check_tombstones()

    def _enter(self, position: int) -> bool:
        entered = super()._enter(position)
        self._check_tombstones()
        return entered

    def _check_tombstones(self) -> None:
        segment, offset = self._segment, self.cursor.offset
        record = None if segment is None else segment.compaction
        if record is not None and record[5] > max(offset, self._gone.get(segment.number, 0)):
            raise self.log.out_of_range(offset, " is before a tombstone that compaction removed")


class _ReplayRotation(Rotation):
    """The readers of a replay, which is `stopped` before the stream is woken."""

    def __init__(
        self, stream: Stream, readers: list[PartitionReader], stopped: Callable[[], bool]
    ) -> None:
        super().__init__(stream, readers, grows=False)
        self._stopped = stopped

    def over(self) -> bool:
        return self._stopped() or super().over()


def _tombstones_ends(log: PartitionLog) -> dict[int, int]:
    """For each segment that lost tombstones, the offset behind the last one that was removed."""
    found = {}
    for number in log.segments.current():
        with contextlib.suppress(NotFound):  # retention came between
            record = log.segments.activated(number).compaction
            if record is not None:
                found[number] = record[5]
    return found


class Replay:
    """The values, and how far in each partition they go.

    One era after the other, so that what is later counts. The partitions of an era are gone through
    at once: when it is loaded, what a key's own partition says goes before what others have of it,
    of which the record with the latest timestamp counts.
    """

    def __init__(
        self,
        stream: Stream,
        values: Latest,
        place: Place | None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.stream = stream
        self.values = values
        self._stopped = stopped
        self.partitions = stream.partitions if place is None else len(place.following)
        self.applied = 0
        self._strays: dict[bytes, tuple[int, bytes | None, int]] | None = {}
        self._eras = eras.up_to(stream, self.partitions)
        logs = [stream._log(index) for index in range(self.partitions)]
        self._gone = [_tombstones_ends(log) if place is None else {} for log in logs]
        self.following = [log.first_offset for log in logs]
        self.epochs = [0] * self.partitions
        if place is not None:  # the values are of a snapshot, and have all that came before
            self.following, self.epochs = list(place.following), list(place.epochs)
            self._strays, self._eras = None, self._eras[-1:]
        self._rotation = self._begin()

    def _begin(self) -> Rotation:
        """Stand where the oldest era that is left begins."""
        readers: list[PartitionReader] = []
        for index in range(self._eras[0].partitions):
            log = self.stream._log(index)
            start = self.following[index]
            if self._strays is not None:  # loading: what retention took is not asked for
                start = self.following[index] = max(start, log.first_offset)
            readers.append(_Reader(log, start, self._gone[index]))
        return _ReplayRotation(self.stream, readers, self._stopped)

    def step(self) -> bool:
        """Go one step on in each partition: was there anything?"""
        some = False
        era, readers = self._eras[0], self._rotation.readers
        ends = [min(one.log.next_offset, era.end(one.log.index)) for one in readers]
        for index, one in enumerate(readers):
            if self.following[index] >= era.end(index):
                continue
            batch = one.next(STEP_RECORDS)
            if len(readers) > KEEP_MAPS:
                one.forget()
            if batch is None:
                self.following[index] = max(self.following[index], ends[index])
                continue
            if not self.lasts:  # it may have been appended with other partitions in mind
                return False
            some = True
            self.values._apply(batch, era.partitions, era.end(index), self._strays)
            self.following[index] = min(batch.next_offset, era.end(index))
            self.epochs[index] = batch.epoch
            self.applied += len(batch)
        if not some and self._strays is not None:
            return self._end_era()
        return some

    @property
    def lasts(self) -> bool:
        """Are the partitions those that it began with?"""
        return self.stream.partitions == self.partitions

    def _end_era(self) -> bool:
        """All of an era is loaded: does another one follow?"""
        assert self._strays is not None
        self.values._end_era(self._strays, len(self._eras) > 1)
        if len(self._eras) == 1:
            self._strays = None
            return False
        self._strays = {}
        del self._eras[0]
        self._rotation = self._begin()
        return True

    def wait(self) -> None:
        """Sleep until there may be something."""
        self._rotation.wait(time.monotonic() + WAIT_SECONDS)
        if not self._rotation.ready():
            self._rotation.refresh()

    def end(self) -> None:
        """Hold no values and no files any more, but how far it came."""
        self.values, self._stopped = Latest(), bool
        self._rotation = _ReplayRotation(self.stream, [], bool)

    def place(self) -> Place:
        """Return how far the values go, for a snapshot."""
        return Place(self.following, self.epochs)


Mapping.register(View)

# Public names have one home, whatever file they are in; pickles and tracebacks say it.
View.__module__ = "millstream"
