"""Doing what a committed transaction says, each thing once however often it is asked for.

A place names a stream, queue or group by its id. One that is not there any more was dropped: a
later one of its name gets nothing of the transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from millstream.disk import files
from millstream.errors import Closed, LockTimeout, NotFound
from millstream.groups import group
from millstream.log.producer_ids import ids_of
from millstream.queue_errors import QueueFull

if TYPE_CHECKING:
    from millstream.queues.queue import Queue
    from millstream.streams.stream import Stream
    from millstream.transactions.effects import Ack, Effects, GroupPosition, Place, Put, Share
    from millstream.transactions.holdings import Holdings

__all__ = ["PRODUCER", "Applier"]

PRODUCER = "@transactions"
"""As which transactions append; the sequence is the number of the transaction."""


class Applier:
    """The streams, queues and groups that transactions changed, as this process has them open."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings, self.session = holdings, holdings.session
        self._numbers: dict[int, int] = {}
        self._streams: dict[str, Stream] = {}
        self._queues: dict[str, Queue] = {}
        self._groups: dict[tuple[str, str], group.Group] = {}

    def dispose(self) -> None:
        """Give up the handles."""
        for one in self._groups.values():
            one._dispose()

    def apply(
        self, transaction: int, effects: Effects, *, synced: bool, replay: bool = False
    ) -> None:
        """Do it. Holder of the journal's word.

        `synced`: the journal is, so the background is to sync what is appended, at any level.
        `replay`: after all processes had ended, when what was done may be lost; then all is synced.
        """
        places = effects.places
        for share in effects.shares:
            self._append(transaction, places[share.place], share, synced)
        for put in effects.puts:
            self._show(places[put.place], put, replay)
        for ack in effects.acks:
            self._finish(places[ack.place], ack, replay)
        for position in effects.positions:
            self._go_on(transaction, places[position.place], position)

    def flush(self, places: set[Place]) -> None:
        """Have all that was done in some places survive a power cut; in streams their groups."""
        for place in places:
            stream = self.stream(place)
            if stream is not None:
                stream.flush()
                group.sync_all(stream.path)
                continue
            queue = self.queue(place)
            if queue is not None:
                queue.flush()

    # --- streams ----------------------------------------------------------------------------------

    def stream(self, place: Place) -> Stream | None:
        """The stream of a place; None: it was dropped."""
        known = self._streams.get(place.name)
        if known is None or known.closed or known._state != files.LIVE:
            if place.name not in self._holdings.stream_names():
                return None
            try:
                known = self._holdings.stream(place.name)
            except NotFound:  # just now
                return None
            self._streams[place.name] = known
            if known._state == files.DROPPED:
                return None
        return known if known._stream_id == place.id else None

    def _append(self, transaction: int, place: Place, share: Share, synced: bool) -> None:
        stream = self.stream(place)
        if stream is None:
            return
        try:
            stream._append_share(
                share.partition, self._number(stream), transaction, share.values, share.keys,
                share.headers, share.timestamps, synced,
            )  # fmt: skip
        except (Closed, NotFound):
            if self.stream(place) is not None:  # not dropped: the store was closed meanwhile
                raise

    def _number(self, stream: Stream) -> int:
        """Number of the producer as which transactions append to a stream."""
        known = self._numbers.get(stream._stream_id)
        if known is None:
            known = self._numbers[stream._stream_id] = ids_of(stream).number(PRODUCER)
        return known

    # --- groups -----------------------------------------------------------------------------------

    def _go_on(self, transaction: int, place: Place, position: GroupPosition) -> None:
        one = self._group(place, position)
        if one is None:
            return
        try:
            one._apply(position.partition, transaction, position.epoch, position.offset)
        except (Closed, NotFound):
            if self._group(place, position) is not None:
                raise

    def _group(self, place: Place, position: GroupPosition) -> group.Group | None:
        stream = self.stream(place)
        if stream is None:
            return None
        key = place.name, position.group
        one = self._groups.get(key)
        if one is None or one.closed or one._state != files.LIVE or one.stream is not stream:
            try:
                one = group.Group(stream, position.group)
            except NotFound:
                return None
            one._configure_level("process")  # the journal is what is synced
            self._groups[key] = one
        return one if one._group_id == position.group_id and one._state == files.LIVE else None

    # --- queues -----------------------------------------------------------------------------------

    def queue(self, place: Place) -> Queue | None:
        """The queue of a place; None: it was dropped."""
        queue = self._queues.get(place.name)
        if queue is None or not _is_live(queue):
            queue = self._opened(place.name)
        if queue is not None:
            return queue if queue._queue_id == place.id else None
        if place.name not in self._holdings.queue_names():
            return None
        try:
            queue = self._holdings.queue(place.name)
        except NotFound:  # just now
            return None
        return queue if queue._queue_id == place.id and queue._state != files.DROPPED else None

    def _opened(self, name: str) -> Queue | None:
        """A queue that this process has open."""
        for queue in self._holdings.open_queues():
            if queue.name == name and _is_live(queue):
                self._queues[name] = queue
                return queue
        return None

    def _show(self, place: Place, put: Put, replay: bool) -> None:
        queue = self.queue(place)
        if queue is None:
            return
        try:
            if replay:
                self._put_again(queue, put)
            else:
                queue._decide(put.slot, put.word, True)
        except (Closed, NotFound):
            if self.queue(place) is not None:
                raise

    def _put_again(self, queue: Queue, put: Put) -> None:
        """Put a message that was lost or is torn; only decide a whole one. Alone in the store."""
        slot, fate = put.slot, queue._fate_of(put.slot, put.id, put.word)
        if fate == "never" and (found := queue._find(put.id)) is not None:
            # In another slot, by an earlier replay.
            slot, fate = found[0], queue._fate_of(found[0], put.id, put.word)
        if fate == "whole":
            queue._decide(put.slot, put.word, True)
        if fate in ("whole", "over"):
            return
        if fate == "torn":
            queue._wipe(slot)
            queue.flush()  # else a free word over the old id would say that it is over
            queue._forget(slot)
        if 0 < put.expires <= self.session.clock.now():
            return
        for dedup_id in (put.dedup, None):  # None: a later message has its dedup_id by now
            try:
                made = self._put(queue, put, dedup_id)
            except LockTimeout:  # a claim of a put that is not decided: of none that is committed
                continue
            except QueueFull:
                # An acknowledgement was lost that had made room for it.
                queue.alter(capacity=queue.capacity + 1)
                made = self._put(queue, put, dedup_id)
            if made is None:
                continue
            if made[1] != put.slot:
                # Its own slot does not show that it was there: make it durable before the next one.
                queue.flush()
            return

    def _put(
        self, queue: Queue, put: Put, dedup: tuple[int, int] | None
    ) -> tuple[int, int, int] | None:
        return queue._prepare_put(
            0, put.id, put.value, priority=put.priority, due=put.due, absolute=put.absolute,
            key=put.key, expires=put.expires, dedup_id=dedup, headers=put.headers, slot=put.slot,
        )  # fmt: skip

    def _finish(self, place: Place, ack: Ack, replay: bool) -> None:
        queue = self.queue(place)
        if queue is None:
            return
        try:
            if not queue._decide(ack.slot, ack.word, True) and replay:
                found = queue._find(ack.id)
                if found is not None:
                    queue._cancel(*found)
        except (Closed, NotFound):
            if self.queue(place) is not None:
                raise


def _is_live(queue: Queue) -> bool:
    return not queue.closed and queue._state == files.LIVE
