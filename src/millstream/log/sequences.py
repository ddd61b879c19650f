"""What each partition has of each producer: known from the log, saved before the log loses it.

The truth is the batch header: producer and sequence. Each process reads the headers into a table of
its own (`_native.Sequences`), and the append word sees to it that nothing lies between reading the
last one and appending. Retention and compaction take headers away: before they do, the table as of
the beginning of the active segment is saved, in the file ``sequences`` of the partition. It counts
only what is durable, so a power cut never leaves a sequence whose record is lost.
"""

from __future__ import annotations

import struct

from millstream import _native
from millstream.disk import files, reserve
from millstream.errors import CorruptBatch, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream.log.handle import StreamHandle
    from millstream.log.partition import PartitionLog

HEADER = struct.Struct("<8sII16sQQQII")
MAGIC = b"MSSEQNC1"
HEADER_BYTES = 72  # with the checksum, of the header before it and the entries
ENTRY_BYTES = 24
LOW = 0xFFFFFFFF


class PartitionSequences:
    """The table of one partition in this process."""

    def __init__(self, log: PartitionLog) -> None:
        self.log = log
        self.table = _native.Sequences()
        self.saved_at = 0
        self._lock = _native.Lock(f"{log}: reading sequences", log.session.members)
        with log.maintaining:
            if not files.exists(_file(log)):
                # No producer was ever here, so what is there needs no reading.
                _save(log, _native.Sequences(), sealed_end(log))

    def catch_up(self, producer: int = 0) -> None:
        """Read what was appended since, have an entry for `producer`, and admit by the table."""
        log = self.log
        with self._lock:
            log.native.set_sequences(None)
            self.table.grow(producer)
            self.saved_at = max(self.saved_at, read_to(log, self.table, log.native.tail))
            log.native.set_sequences(self.table)

    def of(self, producer: int) -> tuple[int, int]:
        """(last sequence, last one that ended a call) of a producer; -1: none."""
        self.catch_up(producer)
        with self._lock:
            return self.table.of(producer)

    def save_sealed(self) -> None:
        """Save where that is due, so that the next process has less to read."""
        log = self.log
        base = log._sealed_end()[0]
        if base <= self.saved_at or log.native.durable < base:
            return
        if base - self.saved_at < 4 * len(self.table.saved()):
            return
        if log.maintaining.try_take():
            try:
                self.saved_at = keep(log, base)
            finally:
                log.maintaining.release()


def _file(log: PartitionLog) -> files.Path:
    return log.path / "sequences"


def where(stream: StreamHandle, producer: int) -> PartitionLog | None:
    """A partition that has batches of a producer."""
    for index in range(stream.partitions):
        if files.exists(stream.path / f"{index:05d}" / "sequences"):  # else no producer was there
            log = stream._log(index)
            if sequences_of(log).of(producer) != (-1, -1):
                return log
    return None


def sequences_of(log: PartitionLog) -> PartitionSequences:
    """The table of a partition, made at its first use."""
    if log.sequences is None:
        with log.opening_sequences:
            if log.sequences is None:
                made = PartitionSequences(log)
                if log.sequences is None:  # a handler may have come between
                    log.sequences = made
    return log.sequences


def sealed_end(log: PartitionLog) -> tuple[int, int]:
    """(position, hash) where the active segment begins, made durable."""
    position, _, before, _ = log._sealed_end()
    if log.native.durable < position:
        log.sync(sealed=True)
    return position, before


def keep(log: PartitionLog, position: int) -> int:
    """Save what the headers before `position` say, unless that was done; returns up to where.

    Called, by the holder of the maintenance word, before headers are taken away.

    Raises: Indeterminate where the sync of what is saved failed; StorageError, CorruptBatch.
    """
    if not files.exists(_file(log)):
        return 0  # no producer was ever here
    table = _native.Sequences()
    saved, _ = _load(log, table)
    if saved >= position:
        return saved
    end = sealed_end(log)
    read_to(log, table, end[0])
    _save(log, table, end)
    return end[0]


def read_to(log: PartitionLog, table: _native.Sequences, until: int) -> int:
    """Read the headers from where the table is to a position; up to where they were saved.

    Where they may have been taken away, or rewritten, what was saved is merged in before and
    after: sequences only rise, so that twice is as good as once.
    """
    saved = 0
    while table.position < until:
        begin = table.position
        behind = begin < log._sealed_end()[0] or begin == 0
        if behind:
            saved, _ = _load(log, table)
        failed: Exception | None = None
        try:
            for segment, first, end in log.segments.between(table.position, until):
                if first > table.position:
                    break  # retired meanwhile
                table.walk(segment, end)
        except (NotFound, CorruptBatch) as error:
            failed = error  # or retired, or rewritten
        if not behind and failed is None:
            continue  # if it is not there yet, a roll and retention came between
        again, _ = _load(log, table)
        if table.position < until and again <= saved:
            raise failed or _damaged(log, f"saved up to {saved}, behind which the log has a gap")
        saved = again
    return saved


def _load(log: PartitionLog, table: _native.Sequences) -> tuple[int, int]:
    """Merge in what is saved; (position, hash) up to where."""
    path = _file(log)
    try:
        data = files.content(path)
    except NotFound:
        return 0, 0
    if len(data) < HEADER_BYTES:
        raise _damaged(log, f"{len(data)} bytes, the header has {HEADER_BYTES}")
    magic, version, partition, store_id, stream_id, position, before, count, _ = HEADER.unpack_from(
        data
    )
    expected = (MAGIC, files.FORMAT, log.index, log.session.id, log.stream._stream_id)
    entries = data[HEADER_BYTES : HEADER_BYTES + count * ENTRY_BYTES]
    if (magic, version, partition, store_id, stream_id) != expected:
        raise _damaged(log, "not of this partition")
    checksum = struct.pack("<Q", _native.xxh3_64(data[: HEADER.size] + entries))
    if len(entries) != count * ENTRY_BYTES or checksum != data[HEADER.size : HEADER_BYTES]:
        raise _damaged(log, "its checksum is wrong")
    if position > table.position:
        if not _is_in_log(log, position, before):
            raise _damaged(log, f"position {position} is not where a segment begins")
        table.move(position)
    table.merge(entries)
    return position, before


def _is_in_log(log: PartitionLog, position: int, before: int) -> bool:
    """Does a segment of the log begin there, behind that batch, or will the next one?"""
    end = log.end()
    if position == end[0] and before & LOW == end[2] & LOW:
        return True
    found = log.segments.locate(position)
    if found is None or found[0].base_position != position:
        return False
    return before & LOW == found[0].predecessor_hash & LOW


def snapshot(log: PartitionLog) -> tuple[int, bytes]:
    """(the tail, what a copy of the log up to it has to have in its file; b"": none)."""
    position, _, before, _ = log.end()
    if not files.exists(_file(log)):
        return position, b""
    table = _native.Sequences()
    read_to(log, table, position)
    return position, _encode(log, table, (position, before))


def _save(log: PartitionLog, table: _native.Sequences, end: tuple[int, int]) -> None:
    files.make_directory(log.path)
    # Retention comes here on a full disk, too.
    reserve.lend(log.session.root, files.replace, _file(log), _encode(log, table, end))


def _encode(log: PartitionLog, table: _native.Sequences, end: tuple[int, int]) -> bytes:
    entries = table.saved()
    head = HEADER.pack(
        MAGIC, files.FORMAT, log.index, log.session.id, log.stream._stream_id, *end,
        len(entries) // ENTRY_BYTES, 0,
    )  # fmt: skip
    checksum = struct.pack("<Q", _native.xxh3_64(head + entries))
    return head + checksum + entries


def _damaged(log: PartitionLog, why: str) -> CorruptBatch:
    return CorruptBatch(
        f"{_file(log)}: {why}; what producers re-send could not be told from what is new. Restore"
        " the file from a backup, or let `millstream repair` make one from the headers there are",
        path=_file(log),
        position=0,
    )
