"""The journal of a store: where transactions commit, and from where their effects are applied.

An internal stream of one partition. A transaction is one batch of it: first a manifest that says
what is to be done where, then the values that it needs. Once that batch is in the log, and synced
where the level asks for it, the transaction is committed; the next process to come applies its
effects, any number of times. docs/design.md has the protocol.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from millstream import _native
from millstream.disk import files
from millstream.disk.session import LOCK_SECONDS
from millstream.errors import (
    CorruptBatch,
    LockTimeout,
    MillstreamError,
    NotFound,
    Poisoned,
    StorageError,
)
from millstream.groups import group
from millstream.log import compacted, control, settings
from millstream.log.settings import JOURNAL
from millstream.transactions.applier import Applier
from millstream.transactions.effects import Effects, Place, check_count, decode, encode, length_of

if TYPE_CHECKING:
    from millstream.groups.group import Group
    from millstream.log.partition import PartitionLog
    from millstream.queues.handle import QueueHandle
    from millstream.transactions.holdings import Holdings

HEADER = struct.Struct("<8sII16sQ")
MAGIC = b"MSJOURN1"
CHECKPOINT_AT = 80
OFFSET_BITS = 40
DECIDE_SECONDS = 0.05
SEGMENT_BYTES = 16 << 20
CHECKPOINT_BYTES = 64 << 20
CHECKED_RECORDS = 4096


def path_of(store_path: files.Path) -> files.Path:
    """The directory of the journal."""
    return store_path / "streams" / JOURNAL


def is_done(holdings: Holdings) -> bool:
    """Is nothing of any transaction left to do? For a reader, while nobody has the store open."""
    if files.read_json(holdings.session.config_path)["clean"]:
        return True
    if not holdings.session.private:
        return False  # somebody opened it since, and was killed
    directory = path_of(holdings.session.root)
    page = files.content(directory / "page")
    stream = holdings.journal_stream(files.read_json(directory / "stream.json"))
    try:
        return page[CHECKPOINT_AT : CHECKPOINT_AT + 8] == struct.pack("<Q", stream.next_offset(0))
    finally:
        stream._dispose()


class Journal:
    """The journal as one process has it open."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings, self.session = holdings, holdings.session
        session = self.session
        directory = path_of(session.root)
        if not files.exists(directory):
            config = settings.new(settings.given(1, None, SEGMENT_BYTES), "process")
            control.create(directory.parent, JOURNAL, config, session.id, session.generation)
        self._page_path = directory / "page"
        self._page = _native.JournalPage(self._map_page())
        config = files.read_json(directory / "stream.json")
        self.stream = holdings.journal_stream(config)
        self._what = f"{self.stream.path}: committing"
        self.applier = Applier(holdings)
        self._waiting: dict[int, Effects] = {}
        """By offset: of this process, in the journal, to be applied when it is synced."""
        self._checked = 0
        self.is_stuck = False
        """What is committed could not be applied here: until that is done, nothing is committed."""

    def _map_page(self) -> Any:
        head = HEADER.pack(MAGIC, files.FORMAT, 0, self.session.id, 0)[:-8]
        head += struct.pack("<Q", _native.xxh3_64(head))
        if not files.exists(self._page_path):
            files.make(self._page_path, files.PAGE, head)
        descriptor = files.open_file(self._page_path, write=True)
        try:
            found = files.read(descriptor, HEADER.size, 0, self._page_path)
            if found != head and self.session.replaying:  # alone: nobody else has it mapped
                files.remove(self._page_path)
                return self._map_page()
            if found != head:
                raise CorruptBatch(
                    f"{self._page_path}: not the page of this store's journal; close the store in"
                    " all processes, the next open makes it anew",
                    path=self._page_path,
                )
            return files.map_file(descriptor, files.PAGE, self._page_path, write=True)
        finally:
            files.close(descriptor)

    def dispose(self) -> None:
        """Give up this handle."""
        self.applier.dispose()
        self.stream._dispose()

    def holding(self, timeout: float = LOCK_SECONDS) -> _native.Word:
        """Hold the word in a `with`: nothing commits or is applied by others meanwhile.

        The word itself, whose `with` is C: Ctrl-C comes before it is taken or within the block.
        """
        return self._page.word(self.session.members, self._what, timeout)

    @property
    def log(self) -> PartitionLog:
        """The log of the one partition."""
        return self.stream._log(0)

    @property
    def end(self) -> int:
        """Offset of the next record."""
        return self.log.next_offset

    def number_of(self, offset: int) -> int:
        """Number of a transaction: generation and offset, so it rises for ever."""
        return self.session.generation << OFFSET_BITS | offset

    @property
    def applied(self) -> int:
        """All before this offset is applied."""
        return self._page.applied

    @property
    def is_applied(self) -> bool:
        """Is all that was committed applied?"""
        return self._page.applied == self.end

    # --- committing -------------------------------------------------------------------------------

    def append(self, effects: Effects, *, wait: bool) -> tuple[int, int]:
        """The commit point: the record in the log. Its offset, and the one behind it. Holder.

        `wait`: its effects are applied when it is synced; until then this keeps them.
        """
        values, keys, headers = encode(effects)
        (span,) = self.stream.append_many(values, keys=keys, headers=headers, partition=0)
        if wait:
            self._waiting[span.first_offset] = effects
        return span.first_offset, span.first_offset + span.count

    def sync(self, end: int) -> None:
        """Return when the records before an offset survive a power cut: one sync for all."""
        span = _native.Span(0, self.session.generation, end - 1, 1)
        self.stream.wait_durable(span)

    def apply_synced(self, end: int) -> None:
        """Apply what was committed before an offset; the first one does it for all that wait."""
        if self.applied < end:
            with self.holding():
                if self.applied < end:
                    self.apply_until(end)

    def forget(self, offset: int) -> None:
        """Its effects need not be kept any more; maybe another process has applied them."""
        self._waiting.pop(offset, None)

    def apply_own(self, offset: int, end: int, effects: Effects) -> None:
        """Apply what was appended just now, where all before it is applied. Holder."""
        self.applier.apply(self.number_of(offset), effects, synced=False)
        self._page.set_applied(end)
        self._check_size()

    def apply_pending(self) -> None:
        """Apply all that is committed, in its order, after a sync. Holder."""
        end = self.end
        if self._page.applied < end:
            self.sync(end)
            self.apply_until(end)
        self.is_stuck = False

    def apply_until(self, end: int) -> None:
        """Apply what is committed before an offset, and is synced. Holder."""
        for transaction, offset, following, effects in self._committed(self._page.applied, end):
            self.applier.apply(transaction, effects, synced=True)
            self._page.set_applied(following)
            self.forget(offset)
        self.is_stuck = False
        self._check_size()

    def _committed(self, begin: int, end: int) -> Iterator[tuple[int, int, int, Effects]]:
        """(transaction, offset, offset behind it, effects) of each record from `begin` on."""
        at = begin
        while at in self._waiting and at < end:
            effects = self._waiting[at]
            following = at + length_of(effects)
            yield self.number_of(at), at, following, effects
            at = following
        if at < end:
            yield from self._read(at, end)

    def _read(self, begin: int, end: int) -> Iterator[tuple[int, int, int, Effects]]:
        rows: list[tuple[Any, Any, Any]] = []
        manifest: list[Any] = []
        epoch, offset, count = 0, begin, 0
        for batch in self.stream.read(partition=0, start=begin):
            keys, headers = list(batch.keys), list(batch.headers)
            for i, value in enumerate(batch.values):
                if not manifest:
                    epoch, offset = batch.epoch, batch.first_offset + i
                    try:
                        manifest = json.loads(bytes(value or b"null"))
                        count = check_count(manifest)
                    except (ValueError, RecursionError) as error:
                        raise self._corrupt(offset, error) from error
                    rows = []
                else:
                    rows.append((value, keys[i], headers[i]))
                if len(rows) == count:
                    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
                    try:
                        effects = decode(manifest, columns[0], columns[1], columns[2])
                    except ValueError as error:
                        raise self._corrupt(offset, error) from error
                    following = offset + 1 + len(rows)
                    yield epoch << OFFSET_BITS | offset, offset, following, effects
                    manifest = []
                    if following >= end:
                        return
        if manifest:
            raise self._corrupt(offset, f"{count} records are to follow it, {len(rows)} do")

    def _corrupt(self, offset: int, why: object) -> CorruptBatch:
        """What is there is whole, as its hash says, and no transaction."""
        path = self.stream.path
        return CorruptBatch(
            f"{path}: the record at offset {offset} is no transaction: {why}; restore a backup, or"
            f" move {path} away to open the store without what it says",
            path=path,
            position=offset,
        )

    def apply_waiting(self, seen: int) -> int:
        """Apply what has waited at `seen` since the last call: its committer is dead, or slow.

        What cannot be applied waits for the next call; a commit says why.

        Returns: what to pass as `seen` next time.
        """
        if self.applied == seen < self.end:
            with contextlib.suppress(LockTimeout), self.holding(0.0):  # busy: it does this itself
                self._try_pending()
        return self.applied

    def _try_pending(self) -> bool:
        try:
            self.apply_pending()
        except MillstreamError:
            self.is_stuck = True
        return not self.is_stuck

    # --- what others left undecided ---------------------------------------------------------------

    def decide_queue(self, queue: QueueHandle) -> None:
        """Somebody died: decide what transactions have prepared in a queue.

        What cannot be decided is left for the next upkeep; a commit says why.
        """
        # Busy, maybe with a step of our own commit: at the next upkeep.
        with contextlib.suppress(LockTimeout), self.holding(0.0):
            if not self._try_pending():
                return
            # All that is committed is applied, and nobody is committing: the rest never will be.
            queue._withdraw_undecided()
            # Last, so that a process that is killed in here leaves it to others. Deaths before we
            # held the word are dealt with; later ones are noticed again.
            queue._set_undecided(0)

    def decide_position(self, one: Group, partition: int) -> None:
        """The position of a partition is pending: apply it, or undo it."""
        # Busy, maybe with a process that is stopped: at the next batch.
        with contextlib.suppress(LockTimeout), self.holding(DECIDE_SECONDS):
            self.apply_pending()
            pending = one._pending(partition)
            if pending is not None:
                one._revert(partition, pending[0])

    # --- a store that nobody has open -------------------------------------------------------------

    def replay(self) -> None:
        """As the first opener, alone: do all that the journal has, unless it was done."""
        end = self.end
        if not self.session.clean:
            begin = self.log.first_offset
            if begin <= self._page.checkpoint <= end:
                begin = self._page.checkpoint
            changed: set[Place] = set()
            if end > begin:
                self.stream.flush()
                for transaction, _, _, effects in self._read(begin, end):
                    self.applier.apply(transaction, effects, synced=False, replay=True)
                    changed.update(effects.places)
            for place in changed:
                queue = None if self.applier.stream(place) else self.applier.queue(place)
                if queue is not None:
                    queue._withdraw_undecided()
            # A message that was put again has another slot: once it is over, nothing shows that.
            self.applier.flush(changed)
        self._page.set_applied(end)
        self._page.set_checkpoint(end)
        if not self.session.clean:
            self._sync_page()

    def _sync_page(self) -> None:
        descriptor = files.open_file(self._page_path, write=True)
        try:
            files.sync(descriptor, self._page_path)
        finally:
            files.close(descriptor)

    # --- letting go of records --------------------------------------------------------------------

    def _check_size(self) -> None:
        """Sync what was applied and let go of its records, once they are many. Holder."""
        if self._page.applied - self._checked < CHECKED_RECORDS:
            return
        self._checked = self._page.applied
        if compacted.extent(self.log)[0] < CHECKPOINT_BYTES:
            return
        # Where something is poisoned, or the disk is full, the records stay: all is committed and
        # applied, which is what the caller asked for. Whoever flushes it is told.
        with contextlib.suppress(StorageError):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Sync all that was applied, and let go of its records. Holder."""
        self._holdings.flush()
        for name in self._holdings.stream_names():
            with contextlib.suppress(NotFound):  # dropped meanwhile
                if not group.sync_all(self.session.stream_path(name)):
                    raise Poisoned(5, "a sync of one of its groups failed", name)
        end = self._page.applied
        self._page.set_checkpoint(end)
        self.stream.delete_before(_native.Position(0, self.session.generation, end))
