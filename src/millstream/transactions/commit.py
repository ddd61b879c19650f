"""The way of one transaction from memory through the journal to its effects."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from millstream.disk.files import LIVE
from millstream.errors import Aborted, Fenced, Indeterminate, MillstreamError, is_ours
from millstream.log.handle import StreamHandle
from millstream.transactions.effects import Ack, Effects, GroupPosition, Place, Put

if TYPE_CHECKING:
    from millstream.groups.consumer import Consumer
    from millstream.queues.queue import Queue
    from millstream.transactions.journal import Journal
    from millstream.transactions.transaction import Transaction

__all__ = ["Commit"]


class Commit:
    """One commit: what is prepared, whether it is recorded, and what is done where it fails."""

    def __init__(self, transaction: Transaction, journal: Journal) -> None:
        self.transaction = transaction
        self.journal = journal
        self.is_recorded = self.survives = False
        self.pending: list[tuple[Consumer, list[Any]]] = []
        self.places: dict[Place, int] = {}
        self.undo: list[Any] = []

    def run(self) -> None:
        """Commit, and do what was committed.

        Raises: Indeterminate where anything fails behind the record, be it for want of memory.
        """
        try:
            self._run()
        except BaseException as error:
            if not self.is_recorded:
                raise
            self.journal.is_stuck = True  # until it is applied: the next commit begins there
            self._recorded()  # again, since it may be what was cut short
            if not is_ours(error):
                raise
            raise self._uncertain(error) from error

    def _run(self) -> None:
        tx, journal = self.transaction, self.journal
        waits = tx._level != "process"
        if waits:
            self._await_sources()
        with journal.holding():
            # Of two puts with one dedup_id the second needs to know what became of the first.
            if not waits or journal.is_stuck or any(asked.dedup for _, asked in tx._puts):
                journal.apply_pending()  # or raise why it cannot be
            self.survives = not waits
            offset, end, effects = self._record(waits)
            self._recorded()
            if not waits:
                journal.apply_own(offset, end, effects)
        if waits:
            try:
                journal.sync(end)
                self.survives = True
                journal.apply_synced(end)
            finally:
                journal.forget(offset)

    def _await_sources(self) -> None:
        """No position is to be ahead of the log that survives a power cut."""
        for consumer in self.transaction._consumers:
            for partition, _, _, offset in consumer._member.handed_out():
                consumer.group._await_log(partition, offset)

    def _recorded(self) -> None:
        """From here on it is committed, whatever happens."""
        for message in self.transaction._messages.values():
            message.queue._acked(message)
        for consumer, pending in self.pending:
            consumer._member.applied(pending)

    def _uncertain(self, error: BaseException) -> Indeterminate:
        """What to raise where `error` came behind the record."""
        what = "the transaction is committed, but not all of it is applied yet"
        if not self.survives:
            what = "the transaction is recorded; whether it survives a power cut is not known"
        raised = Indeterminate(
            getattr(error, "errno", None) or errno.EIO,
            f"{what}: {str(error) or type(error).__name__}",
            self.journal.stream.path,
        )
        raised.committed = self.survives
        return raised

    def _record(self, waits: bool) -> tuple[int, int, Effects]:
        """Prepare, then append the record (its offset, and that behind it); or undo that."""
        log = self.journal.log
        tail, following = log.native.tail, log.next_offset
        try:
            effects = self._prepare(self.journal.number_of(following))
            offset, end = self.journal.append(effects, wait=waits)
            self.is_recorded = True
            return offset, end, effects
        except BaseException as error:
            self.is_recorded = log.native.is_beyond(tail)  # which takes no memory
            if not self.is_recorded:
                self._undo(isinstance(error, MillstreamError))
            raise

    def _undo(self, knows_all: bool) -> None:
        """Let what was prepared be as before.

        `knows_all`: no signal came between a step and the note of it.
        """
        if not knows_all:
            self._leave_to_others()
        while self.undo:
            try:
                self.undo.pop()()
            except MillstreamError:  # dropped, and all in it; or poisoned
                self._leave_to_others()

    def _leave_to_others(self) -> None:
        """The next upkeep of a queue withdraws what is prepared there and not recorded."""
        tx = self.transaction
        for queue in {*(m.queue for m in tx._messages.values()), *(queue for queue, _ in tx._puts)}:
            if not queue.closed:
                queue._set_undecided(1)

    def _place(self, one: StreamHandle | Queue) -> int:
        number = one._stream_id if isinstance(one, StreamHandle) else one._queue_id
        return self.places.setdefault(Place(one.name, number), len(self.places))

    def _prepare(self, transaction: int) -> Effects:
        tx = self.transaction
        for stream, partitions in tx._routed.items():
            if stream.partitions != partitions:
                raise Aborted(
                    f"{stream.path}: partitions were added, so its keys belong elsewhere; nothing"
                    " of the transaction is done, begin it again"
                )
        acks = []
        for message in tx._messages.values():
            queue = message.queue
            found = queue._prepare_ack(transaction, message)
            if found is None:
                raise Aborted(
                    f"{message!r}: its lease was lost, so nothing of the transaction is done"
                )
            self.undo.append(lambda q=queue, m=message, w=found[2]: q._undo_ack(m, w))
            acks.append(Ack(self._place(queue), found[1], found[2], found[0]))
        puts = []
        claimed = set()
        for queue, asked in tx._puts:
            if asked.dedup is not None:
                claim = queue.path, asked.dedup
                if claim in claimed:
                    continue
                claimed.add(claim)
            made = queue._prepare_put(
                transaction, 0, asked.value, priority=asked.priority, due=asked.due,
                absolute=asked.absolute, key=asked.key, expires=asked.expires,
                dedup_id=asked.dedup, headers=asked.headers,
            )  # fmt: skip
            if made is None:
                continue  # one with its dedup_id is there
            number_, slot, word = made
            self.undo.append(lambda q=queue, s=slot, w=word: q._decide(s, w, False))
            puts.append(Put(self._place(queue), slot, word, number_, *asked))
        positions = []
        for consumer in tx._consumers:
            if consumer.closed:
                raise Aborted(f"{consumer!r} is closed, so nothing of the transaction is done")
            group = consumer.group
            try:
                pending = consumer._member.prepare(transaction)
            except Fenced as error:
                raise Aborted(
                    f"{error}; nothing of the transaction is done, another member reads it again"
                ) from error
            for partition, _, epoch, offset in pending:
                self.undo.append(lambda g=group, p=partition: g._revert(p, transaction))
                place = self._place(consumer.stream)
                positions.append(
                    GroupPosition(place, group.name, group._group_id, partition, epoch, offset)
                )
            self.pending.append((consumer, pending))
        for stream, _ in tx._shares:
            if stream.closed or stream._state != LIVE:
                stream._check_live()
        shares = [
            share.finished(self._place(stream), partition)
            for (stream, partition), share in tx._shares.items()
            if share.values  # what was cut short left none
        ]
        return Effects(list(self.places), shares, puts, acks, positions)
