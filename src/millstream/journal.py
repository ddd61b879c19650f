"""The journal of a store: where transactions commit, and from where their effects are applied.

An internal stream of one partition. A transaction is one batch of it: first a manifest that says
what is to be done where, then the values that it needs. Once that batch is in the log, and synced
where the level asks for it, the transaction is committed; what follows is only done, by whoever
comes, any number of times. docs/design.md has the protocol.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from millstream import _native, compacted, control, files, group, settings
from millstream.errors import Closed, CorruptBatch, LockTimeout, NotFound
from millstream.producer_ids import ids_of
from millstream.stream import Stream

if TYPE_CHECKING:
    from millstream.queue import Queue
    from millstream.queue_handle import QueueHandle
    from millstream.store import Store

NAME = "@journal"
"""Of its directory among the streams: no stream of a user can be called that."""
PRODUCER = "@transactions"
HEADER = struct.Struct("<8sII16sQ")
MAGIC = b"MSJOURN1"
PAGE = 4096
OFFSET_BITS = 40
LOCK_SECONDS = 30.0
SEGMENT_BYTES = 16 << 20
CHECKPOINT_BYTES = 64 << 20
CHECKED_RECORDS = 4096
TO_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class Share(NamedTuple):
    """What one partition of a stream gets."""

    stream: str
    partition: int
    timestamps: Any
    values: list[Any]
    keys: list[Any] | None
    headers: list[Any] | None


class Put(NamedTuple):
    """A message for a queue, PREPARED there as `word` in `slot`."""

    queue: str
    slot: int
    word: int
    id: int
    priority: int
    at: int
    expires: int
    dedup: tuple[int, int] | None
    value: bytes
    key: bytes | None
    headers: Any


class Ack(NamedTuple):
    """A message of a queue that is over, ACKING as `word` in `slot`."""

    queue: str
    slot: int
    word: int
    id: int


class Mark(NamedTuple):
    """Where a group goes on in a partition."""

    stream: str
    group: str
    partition: int
    epoch: int
    offset: int


class Effects(NamedTuple):
    """All that a transaction does."""

    shares: list[Share]
    puts: list[Put]
    acks: list[Ack]
    marks: list[Mark]


def path_of(store_path: str) -> str:
    """The directory of the journal."""
    return os.path.join(store_path, "streams", NAME)


# --- a transaction as one batch -------------------------------------------------------------------


def encode(effects: Effects) -> tuple[list[Any], list[Any] | None, list[Any] | None]:
    """Values, keys and headers of the batch; the first value is the manifest."""
    values: list[Any] = [b""]
    keyed = any(share.keys is not None for share in effects.shares)
    keyed = keyed or any(put.key is not None for put in effects.puts)
    headed = any(share.headers is not None for share in effects.shares)
    headed = headed or any(put.headers for put in effects.puts)
    keys: list[Any] | None = [None] if keyed else None
    headers: list[Any] | None = [None] if headed else None
    shares = []
    for share in effects.shares:
        count = len(share.values)
        flags = (share.keys is not None) | (share.headers is not None) << 1
        shares.append((share.stream, share.partition, share.timestamps, count, flags))
        values += share.values
        if keys is not None:
            keys += share.keys or [None] * count
        if headers is not None:
            headers += share.headers or [None] * count
    for put in effects.puts:
        values.append(put.value)
        if keys is not None:
            keys.append(put.key)
        if headers is not None:
            headers.append(put.headers)
    puts = [put[:8] for put in effects.puts]
    values[0] = TO_JSON((len(values) - 1, shares, puts, effects.acks, effects.marks)).encode()
    return values, keys, headers


def decode(manifest: list[Any], values: list[Any], keys: list[Any], headers: list[Any]) -> Effects:
    """What `encode` was given; the lists begin behind the manifest."""
    _, share_rows, put_rows, ack_rows, mark_rows = manifest
    shares, at = [], 0
    for stream, partition, timestamps, count, flags in share_rows:
        rows = slice(at, at + count)
        its_keys = keys[rows] if flags & 1 else None
        its_headers = headers[rows] if flags & 2 else None
        share = Share(stream, partition, timestamps, values[rows], its_keys, its_headers)
        shares.append(share)
        at += count
    puts = []
    for row in put_rows:
        dedup = None if row[7] is None else (row[7][0], row[7][1])
        content = values[at], keys[at], headers[at] or None
        puts.append(Put._make((*row[:7], dedup, *content)))
        at += 1
    return Effects(shares, puts, [Ack(*row) for row in ack_rows], [Mark(*row) for row in mark_rows])


def length_of(effects: Effects) -> int:
    """How many records of the journal it takes."""
    return 1 + sum(len(share.values) for share in effects.shares) + len(effects.puts)


# --- the journal ----------------------------------------------------------------------------------


class Journal:
    """The journal as one process has it open."""

    def __init__(self, store: Store) -> None:
        self.store = store
        directory = path_of(store.path)
        if not os.path.lexists(directory):
            config = settings.new(settings.given(1, None, SEGMENT_BYTES), "process")
            parent = os.path.dirname(directory)
            control.create(parent, NAME, config, store._store_id, store._generation)
        self._page_path = os.path.join(directory, "page")
        self._page = _native.JournalPage(self._map_page())
        config = files.read_json(os.path.join(directory, "stream.json"))
        self.stream = Stream(store, NAME, config, "process")
        self._numbers: dict[str, int] = {}
        self._streams: dict[str, Stream] = {}
        self._groups: dict[tuple[str, str], group.Group] = {}
        self._waiting: dict[int, Effects] = {}
        """By offset: of this process, in the journal, to be applied when it is synced."""
        self._holder = 0
        self._checkpoint = 0
        self.is_stuck = False
        """What is committed could not be applied here: until that is done, nothing is committed."""

    def _map_page(self) -> Any:
        store = self.store
        head = HEADER.pack(MAGIC, files.FORMAT, 0, store._store_id, 0)[:-8]
        head += struct.pack("<Q", _native.xxh3_64(head))
        if not os.path.lexists(self._page_path):
            files.make(self._page_path, PAGE, head)
        descriptor = files.open_file(self._page_path, write=True)
        try:
            found = files.read(descriptor, HEADER.size, 0, self._page_path)
            if found != head:
                raise CorruptBatch(
                    f"{self._page_path}: not the page of this store's journal; close the store in"
                    " all processes, the next open makes it anew",
                    path=self._page_path,
                )
            return files.map_file(descriptor, PAGE, self._page_path, write=True)
        finally:
            files.close(descriptor)

    def dispose(self) -> None:
        """Give up this handle."""
        for one in self._groups.values():
            one._dispose()
        self.stream._dispose()

    @contextlib.contextmanager
    def holding(self, timeout: float = LOCK_SECONDS) -> Iterator[None]:
        """Hold the word: nothing commits or is applied by others meanwhile."""
        what = f"{self.stream.path}: committing"
        with self._page.word(self.store._members, what, timeout):
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = 0

    @property
    def is_held_here(self) -> bool:
        """Does this thread hold the word?"""
        return self._holder == threading.get_ident()

    @property
    def end(self) -> int:
        """Offset of the next record."""
        return int(self.stream.next_offset(0))

    def number_of(self, offset: int) -> int:
        """Of a transaction of this generation: with it and the offset, so it rises for ever."""
        return self.store._generation << OFFSET_BITS | offset

    @property
    def applied(self) -> int:
        """All before this offset is applied."""
        return self._page.applied

    @property
    def is_settled(self) -> bool:
        """Is all that was committed applied?"""
        return self._page.applied == self.end

    # --- committing -------------------------------------------------------------------------------

    def append(self, effects: Effects, *, wait: bool) -> int:
        """The commit point: the record in the log. Its offset. Holder.

        `wait`: its effects are applied when it is synced; until then this keeps them.
        """
        values, keys, headers = encode(effects)
        (span,) = self.stream.append_many(values, keys=keys, headers=headers, partition=0)
        if wait:
            self._waiting[span.first_offset] = effects
        return int(span.first_offset)

    def sync(self, end: int) -> None:
        """Return when the records before an offset survive a power cut: one sync for all."""
        span = _native.Span(0, self.store._generation, end - 1, 1)
        self.stream.wait_durable(span)

    def apply_own(self, offset: int, effects: Effects) -> None:
        """Apply what was appended just now, where all before it is applied. Holder."""
        self._apply(self.number_of(offset), effects)
        following = offset + length_of(effects)
        self._page.set_applied(following)
        if following - self._checkpoint > CHECKED_RECORDS:
            self._check_size()

    def apply_pending(self) -> None:
        """Apply all that is committed, in its order, after a sync. Holder."""
        end = self.end
        if self._page.applied < end:
            self.sync(end)
            self.apply_until(end)

    def apply_until(self, end: int) -> None:
        """Apply what is committed before an offset, and is synced. Holder."""
        for transaction, offset, following, effects in self._committed(self._page.applied, end):
            self._apply(transaction, effects)
            self._page.set_applied(following)
            self._waiting.pop(offset, None)
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
        epoch = offset = 0
        for batch in self.stream.read(partition=0, start=begin):
            keys, headers = list(batch.keys), list(batch.headers)
            for i, value in enumerate(batch.values):
                if not manifest:
                    manifest = json.loads(bytes(value or b"null"))
                    epoch, offset = batch.epoch, batch.first_offset + i
                    rows = []
                else:
                    rows.append((value, keys[i], headers[i]))
                if len(rows) == manifest[0]:
                    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
                    effects = decode(manifest, columns[0], columns[1], columns[2])
                    following = offset + 1 + len(rows)
                    yield epoch << OFFSET_BITS | offset, offset, following, effects
                    manifest = []
                    if following >= end:
                        return

    # --- applying ---------------------------------------------------------------------------------

    def _apply(self, transaction: int, effects: Effects, *, replay: bool = False) -> None:
        """Each effect by itself is done once, however often it is asked for."""
        for share in effects.shares:
            with contextlib.suppress(NotFound, Closed):  # dropped meanwhile, and all in it
                stream = self._stream(share.stream)
                stream._append_share(
                    share.partition, self._number(stream), transaction, share.values, share.keys,
                    share.headers, share.timestamps,
                )  # fmt: skip
        for put in effects.puts:
            with contextlib.suppress(NotFound, Closed):
                queue = self._queue(put.queue)
                if not queue._decide(put.slot, put.word, True) and replay:
                    self._put_again(queue, put)
        for ack in effects.acks:
            with contextlib.suppress(NotFound, Closed):
                queue = self._queue(ack.queue)
                if not queue._decide(ack.slot, ack.word, True) and replay:
                    found = queue._find(ack.id)
                    if found is not None:
                        queue._cancel(*found)
        for mark in effects.marks:
            with contextlib.suppress(NotFound, Closed):
                self._group(mark)._apply(mark.partition, transaction, mark.epoch, mark.offset)

    def _put_again(self, queue: Queue, put: Put) -> None:
        """A message that did not come to the disk."""
        if queue._had(put.slot, put.id):
            return
        left = None
        if put.expires:
            left = (put.expires - _native.wall_us()) / 1e6
            if left <= 0:
                return
        queue._prepare_put(
            0, put.id, put.value, priority=put.priority, at=put.at or None, key=put.key, ttl=left,
            dedup_id=put.dedup, headers=put.headers,
        )  # fmt: skip

    def _stream(self, name: str) -> Stream:
        known = self._streams.get(name)
        if known is not None and known._state == control.LIVE and not known.closed:
            return known
        if name not in self.store._names():
            raise NotFound(f"{self.store.path}: there is no stream {name!r} any more")
        known = self._streams[name] = self.store.stream(name)
        self._numbers.pop(name, None)
        return known

    def _queue(self, name: str) -> Queue:
        for (known, _, _), queue in self.store._queues.items():
            if known == name and not queue.closed:
                return queue
        if name not in self.store._queue_names():
            raise NotFound(f"{self.store.path}: there is no queue {name!r} any more")
        return self.store.queue(name)

    def _number(self, stream: Stream) -> int:
        """Of the producer as which transactions append to a stream."""
        known = self._numbers.get(stream.name)
        if known is None:
            known = self._numbers[stream.name] = ids_of(stream).number(PRODUCER)
        return known

    def _group(self, mark: Mark) -> group.Group:
        key = mark.stream, mark.group
        one = self._groups.get(key)
        if one is None or one.closed or one._state != group.LIVE:
            one = self._groups[key] = group.Group(self._stream(mark.stream), mark.group)
            one._configure_level("process")  # the journal is what is synced
        return one

    # --- what others left undecided ---------------------------------------------------------------

    def settle_queue(self, queue: QueueHandle) -> None:
        """Somebody died: decide what transactions have prepared in a queue."""
        if self.is_held_here:  # in a step of a commit: later
            return
        with contextlib.suppress(LockTimeout), self.holding(0.0):  # busy: at the next look
            queue._set_undecided(0)
            self.apply_pending()
            # All that is committed is applied, and nobody is committing: the rest never will be.
            queue._withdraw_undecided()

    def settle_position(self, one: group.Group, partition: int) -> None:
        """A transaction has marked the position of a partition: apply it, or undo the mark."""
        with self.holding():
            self.apply_pending()
            pending = one._pending(partition)
            if pending is not None:
                one._revert(partition, pending[0])

    def replay(self) -> None:
        """As the first opener, alone: do all that the journal has, unless it was done."""
        begin, end = self.stream._log(0).first_offset, self.end
        if not self.store._clean:
            touched = set()
            if end > begin:
                self.stream.flush()
                for transaction, _, _, effects in self._read(begin, end):
                    self._apply(transaction, effects, replay=True)
                    touched |= {put.queue for put in effects.puts}
                    touched |= {ack.queue for ack in effects.acks}
            for name in touched & set(self.store._queue_names()):
                self.store.queue(name)._withdraw_undecided()
        self._page.set_applied(end)

    def _check_size(self) -> None:
        """Sync what was applied and let go of its records, once they are many. Holder."""
        self._checkpoint = self._page.applied
        if compacted.extent(self.stream._log(0))[0] < CHECKPOINT_BYTES:
            return
        self.checkpoint()

    def checkpoint(self) -> None:
        """Sync all that was applied, and let go of its records. Holder."""
        self.store.flush()
        for one in self._groups.values():
            with contextlib.suppress(Closed):
                one._make_durable()
        end = self._page.applied
        self.stream.delete_before(_native.Position(0, self.store._generation, end))
