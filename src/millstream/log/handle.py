"""A stream as one process has it open: its control file, its settings, its partitions."""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial

from millstream import _native, timestamps
from millstream._native import Batch
from millstream.disk import files, reserve
from millstream.disk.session import LOCK_SECONDS
from millstream.errors import Closed, MillstreamError, NotFound, StorageError, each_of
from millstream.log import control, eras, reader, settings
from millstream.log.partition import PartitionLog
from millstream.options import Retention, check_timeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from typing import Any, Literal, TypeAlias

    from millstream.disk.session import Session
    from millstream.log.cache import SegmentCache
    from millstream.log.producer_ids import ProducerIds
    from millstream.options import Compaction, Durability, Start

    Figures: TypeAlias = (
        "tuple[PartitionLog, tuple[int, int, int, int], int, int, int, int, int, bool]"
    )
    """A partition and of its control block: (first segment, active one, structure, compacted), by
    which one knows whether its files are the same still; tail; first, next and durable offset;
    poison; has something waited too long for a sync?"""

__all__ = ["StreamHandle"]

PREPARE, UNSYNCED, WANT_SYNC = (
    _native.EVENTS[name] for name in ("prepare", "unsynced", "want_sync")
)
STATUS = {value: name for name, (value, _, _) in _native.status_table().items()}
UNSYNCED_BYTES = 256 << 20
"""Of a partition, at level "interval": with more than that not synced, appends wait."""
INTERVAL = _native.LEVELS["interval"]


class StreamHandle(_native.StreamCore):
    """What this process has of a stream. The extension's `StreamCore` appends through it.

    Attributes:
        name: the name.
        session: the store that it is in, as this process has it open.
        path: the directory, which is held open: a stream of the same name that is made later is
            another one.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        config: dict[str, Any],
        durability: Durability | None,
        cache: SegmentCache,
    ) -> None:
        self.session = session
        self.name = name
        self._cache = cache
        self._directory = files.Directory(session.stream_path(name))
        self.path = self._directory.path
        self._stream_id = int(config["stream_id"], 16)
        self._override = durability
        self._durability: Durability = "interval"
        self._producer_ids: ProducerIds | None = None
        self._was_dropped = False
        self._is_surprise = False
        """It was made by its name alone, in this process, and nobody has read it yet."""
        try:
            self._map_control()
            self._reload()
        except BaseException:
            self._directory.close()
            raise

    # --- configuration ----------------------------------------------------------------------------

    def _map_control(self) -> None:
        session, mapped = self.session, control.map_for(self.session, self.path)
        self._below = mapped if session.follows_layers and not session.private else None
        self._set_layered(self._below is not None)
        # Processes begin their turns at different partitions, so that they spread.
        turn = os.getpid() & 0xFFFF
        writable = session.writable or session.private
        self._attach(mapped, writable, self._durability, turn)

    def _reload(self) -> None:
        """Take over what is stored now."""
        number = self._config_number  # before reading
        config = files.read_json(self.path / "stream.json")
        self._config_seen = number  # before, since what follows asks for the settings
        self._configure(config)
        if number % 2 == 0:  # it is being altered: read again at the next call
            self._config_seen = number - 1

    def _configure(self, config: dict[str, Any]) -> None:
        before = self._durability
        self._segment_bytes = int(config["segment_bytes"])
        kept = config["retention"]
        self._retention = Retention(bytes=kept["bytes"], age=kept["age"], records=kept["records"])
        self._compaction = settings.compaction_of(config)
        self._eras = eras.of(config)
        self._durability = self._override or config["durability"] or self.session.level
        self._set_level(self._durability)
        if self._durability != before:
            for log in self._opened():
                self.session.notices.tune(log)
        self.session.notices.watch(self)

    def _refresh(self) -> None:
        """Follow the control file: more partitions, another configuration, or a dropped stream."""
        self._check_live()
        self._map_control()
        self._reload()

    def _keep_up(self) -> None:
        """As a call begins, or has met the end: check, and do what others left to whoever comes."""
        self._check_live()
        self._follow()
        self.session.notices.watch_journal()

    def _check_live(self) -> None:
        """Raise `Closed` where the stream is not there any more, or not for this handle."""
        if self._state != 1:
            self._let_go()
            why = (
                "dropped"
                if self._state == 2
                else "recovered by another process; open the store again"
            )
            raise Closed(f"{self.path}: the stream was {why}")
        if self.closed:
            what = "was dropped" if self._was_dropped else "is closed; open the store again"
            raise Closed(f"{self.path}: the stream {what}")
        if self.session.layered:
            self.session.check_layer(self.path, self._is_behind)

    def _is_behind(self) -> bool:
        return self._below is not None and control.is_behind(self.path, self._below)

    def _follow(self) -> None:
        """Take over the configuration where another process, or another handle, altered it."""
        number = self._config_number
        if number == self._config_seen:
            return
        self._reload()
        if number % 2 == 0 and self.session.writable:
            native = self._new_partition(
                0, self.session.members, self.session.generation, self.session.clock.offset
            )
            word = native.word("maintenance", self.path, LOCK_SECONDS)
            if word.try_take():  # who altered it was killed
                try:
                    self._end_config()
                finally:
                    word.release()

    def _current(self) -> StreamHandle:
        """Itself, with the settings as they are stored now; a closed one keeps what it had."""
        if not self.closed and self._state == files.LIVE:
            self.session.check_layer(self.path, self._is_behind)
            self._follow()
        return self

    @property
    def retention(self) -> Retention:
        """How much is kept."""
        return self._current()._retention

    @property
    def compaction(self) -> Compaction | None:
        """How it is compacted; None: not at all."""
        return self._current()._compaction

    @property
    def durability(self) -> Durability:
        """What an append through this handle has survived when it returns."""
        return self._current()._durability

    @property
    def segment_bytes(self) -> int:
        """Size that segments grow to."""
        return self._current()._segment_bytes

    # --- hooks of the core ------------------------------------------------------------------------

    def _where(self, index: int) -> str:
        return self.path / f"{index:05d}"

    def _deadline(self, timeout: float | None) -> float:
        checked = check_timeout(timeout)
        return time.monotonic() + (LOCK_SECONDS if checked is None else checked)

    def _timestamp(self, value: Any) -> int:
        return timestamps.microseconds(value)

    def _timestamps(self, values: Any, count: int) -> Any:
        return timestamps.column(values, count)

    def _open_partition(self, index: int) -> PartitionLog:
        self._check_live()
        log = PartitionLog(self, index)
        self.session.notices.adopt(log)
        return log

    def _resolve(
        self, index: int, status: int, owner: int, need_bytes: int, deadline: float
    ) -> None:
        """Do what the core could not: its status says what."""
        self.session.check_writable()
        log: PartitionLog = self._partition(index)
        kind = STATUS[status]
        if kind == "BUSY":
            log.wait_for_word(owner, deadline)
        elif kind == "ROLL":
            log.provide_next(need_bytes)
        elif kind == "MOVED":
            log.follow_active()
        elif kind == "BEHIND":
            with _native.loading:
                from millstream.log import producer_ids, sequences
            sequences.sequences_of(log).catch_up(producer_ids.ids_of(self).known)
        else:
            log.ensure_walked()

    def _where_producer(self, number: int) -> PartitionLog | None:
        """A partition that has batches of a producer."""
        with _native.loading:
            from millstream.log import sequences
        return sequences.where(self, number)

    def _after_append(
        self, log: PartitionLog, events: int, end: int, level: int, timeout: float | None
    ) -> None:
        """The batch is there. What fails here is said only where it breaks what was promised."""
        with contextlib.suppress(MillstreamError):  # the next call raises the same
            self._follow()
        background = self.session.notices
        if events & PREPARE and self._prepares(log):
            events &= ~PREPARE
            if not events:
                return
        background.notice(log, events)
        late = not background.runs() or log.is_overdue
        if late:
            log.native.take_written()  # the next append is news again
        if late and level == INTERVAL:
            log.wait_durable(end, self._deadline(timeout))
        elif events & UNSYNCED and level and self._durability == "interval":
            log.wait_durable(end - UNSYNCED_BYTES // 2, self._deadline(timeout))

    def _prepares(self, log: PartitionLog) -> bool:
        """Make pages ready ahead of the tail; False: it is the background that does."""
        try:
            if log.ahead.go_on(log, self._durability):
                return True
        except MillstreamError:  # it is slower without; a sync says what is wrong with the disk
            return True
        self.session.notices.tune(log)
        return False

    def _leave_to_background(self, log: PartitionLog) -> None:
        """An append ends before what it stored is as durable as it should be."""
        with contextlib.suppress(Exception):
            self.session.notices.notice(log, WANT_SYNC)
            self.session.notices.runs()

    def _make_durable(self, index: int, end: int, timeout: float | None) -> None:
        self._partition(index).wait_durable(end, self._deadline(timeout))

    def _point_out(self, since: float | None = None) -> None:
        """Somebody finds nothing here; `since`: when it began to wait."""

    # --- partitions -------------------------------------------------------------------------------

    def _log(self, partition: int) -> PartitionLog:
        log: PartitionLog = self._partition(partition)
        self._keep_up()
        log.ensure_walked()
        if log.private:
            reader.extend_private(log)
        return log

    def _all_figures(self) -> list[Figures]:
        """Of each partition what its control block says, as of now: some 100 ns each."""
        self._keep_up()
        _ = self.partitions  # follows those that were added
        found = self._figures()
        for index, one in enumerate(found):
            if one is None:
                log = self._log(index)
                native, end = log.native, log.end()
                key = native.first_segment, native.active_number, native.structure, native.compacted
                found[index] = (
                    *(log, key, end[0], log.first_offset, end[1], native.durable_offset),
                    *(native.poison, log.is_overdue),
                )
        return found  # type: ignore[return-value]  # none is None any more

    def _time_at(self, partition: int, offset: int) -> float | None:
        """When the first record from an offset on was appended, by its timestamp.

        Seconds since 1970. None: there is none, or it cannot be read; `verify` says more.
        """
        timestamp: int | None
        try:
            try:
                timestamp = self.get(partition, offset).timestamp
            except NotFound:  # compaction removed it, or retention came between
                found = self.read(
                    partition=partition, start=offset, max_records=1, on_lost="earliest"
                )
                timestamp = next((int(batch.timestamps[0]) for batch in found), None)
        except (MillstreamError, StorageError):
            return None
        return None if timestamp is None else timestamp / 1e6

    def _place(self, index: int, epoch: int | None, offset: int) -> tuple[_native.Segment, int]:
        """The segment that has a record, and where its batches end."""
        return reader.place(self._log(index), epoch, offset)

    def first_offset(self, partition: int) -> int:
        """Offset of the oldest record that is kept (the next one, where there is none)."""
        return self._log(partition).first_offset

    def next_offset(self, partition: int) -> int:
        """Offset that the next record will get."""
        return self._log(partition).next_offset

    def durable_offset(self, partition: int) -> int:
        """Offset of the first record that a power cut may take."""
        return int(self._log(partition).native.durable_offset)

    def flush(self, *, timeout: float | None = None) -> None:
        """Return when all records that were appended before this call survive a power cut."""
        self.session.check_writable()
        deadline = self._deadline(timeout)

        def flush(index: int) -> None:
            log = self._log(index)
            log.wait_durable(log.native.tail, deadline)

        each_of([partial(flush, index) for index in range(self.partitions)])

    # --- reading ----------------------------------------------------------------------------------

    def read(
        self,
        *,
        partition: int | None = None,
        start: Start = "earliest",
        follow: bool = False,
        timeout: float | None = None,
        max_records: int | None = None,
        durable: bool = False,
        on_lost: Literal["raise", "earliest"] = "raise",
    ) -> Iterator[Batch]:
        """Iterate over batches: of one partition in order, or of all, each in order, interleaved.

        Takes no lock and moves nothing: any number of readers read the same records. Only what was
        published when a batch is made is in it; batches of a transaction or an `append_many` are
        seen whole.

        Args:
            partition: one of them; None: all.
            start: an offset (of each partition), a `Position` (its partition alone), a datetime
                (the first record at or after it), "earliest" or "latest".
            follow: wait for more at the tail instead of ending there.
            timeout: with `follow`, end after so many seconds without a record. None: wait for ever.
            max_records: end after so many records.
            durable: only what survives a power cut.
            on_lost: where retention was faster than this reader: "raise" `OffsetOutOfRange`, or go
                on at the "earliest" record.

        Raises: OffsetOutOfRange (carries the valid range), CorruptBatch, NotFound, InvalidArgument,
            Closed.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     stream = store.stream("s")
        ...     _ = stream.append_many([b"a", b"b", b"c"])
        ...     [list(batch.values) for batch in stream.read(start=1)]
        [[b'b', b'c']]
        """
        asked = reader.asked(self, partition, start, follow, timeout, max_records, durable, on_lost)
        batches = reader.read(self, asked, follow, timeout)
        return self._pointing_out(batches) if self._is_surprise else batches

    def aread(
        self,
        *,
        partition: int | None = None,
        start: Start = "earliest",
        follow: bool = False,
        timeout: float | None = None,
        max_records: int | None = None,
        durable: bool = False,
        on_lost: Literal["raise", "earliest"] = "raise",
    ) -> AsyncIterator[Batch]:
        """`read` for asyncio: waits without blocking the loop; cancelling it loses nothing."""
        asked = reader.asked(self, partition, start, follow, timeout, max_records, durable, on_lost)
        batches = reader.aread(self, asked, follow, timeout)
        return self._apointing_out(batches) if self._is_surprise else batches

    def _pointing_out(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        some = False
        for batch in batches:
            some = True
            yield batch
        if not some:
            self._point_out()

    async def _apointing_out(self, batches: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
        some = False
        try:
            async for batch in batches:
                some = True
                yield batch
        finally:
            await batches.aclose()  # type: ignore[attr-defined]
        if not some:
            self._point_out()

    def offset_at(self, timestamp: Any, partition: int) -> int:
        """Offset of the first record at or after a time; `next_offset` where there is none.

        Args:
            timestamp: as for `append`.
            partition: one partition.
        """
        return reader.offset_at(self._log(partition), timestamps.microseconds(timestamp))

    # --- changing ---------------------------------------------------------------------------------

    def _alter(self, asked: dict[str, Any]) -> None:
        """Have settings stored, and partitions added up to the number that is asked for."""
        self.session.check_writable()
        self._keep_up()
        partitions = asked.pop("partitions", None)
        if partitions is not None:
            settings.require_more(self.name, self.partitions, partitions)
        with self._log(0).maintaining:
            path = self.path / "stream.json"
            config = files.read_json(path)
            if any(config.get(field) != value for field, value in asked.items()):
                config.update(asked)
                with settings.changing(self):
                    reserve.lend(self.session.root, files.write_json, path, config)
        if partitions is not None:
            self._grow(lambda before: partitions)
        self._follow()

    def _grow(self, wanted: Callable[[int], int]) -> int:
        """Have as many partitions as `wanted` makes of how many there are; how many it is."""
        found = eras.begin(self, wanted)
        self._refresh()
        self._wake()
        return found

    def _let_go(self) -> None:
        """Hold no map any more, so that the space of a dropped stream becomes free."""
        for log in self._opened():
            log.segments.forget()

    def _dispose(self) -> None:
        """Give up this handle; batches that were made from it stay valid."""
        self._was_dropped = self._was_dropped or self._state == files.DROPPED
        self._let_go()
        for log in self._opened():
            log.sequences = None  # which has the log: the two would wait for the collector
        self._close()
        self._below = None
        self.session.notices.forget(self)
        self._directory.close()
