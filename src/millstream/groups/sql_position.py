"""A group's position in the user's own SQLite database: effects and position commit once."""

from __future__ import annotations

from millstream import _native
from millstream._native import Batch, Position
from millstream.errors import Fenced, InvalidArgument, InvalidType

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3

    from millstream.groups.consumer import Consumer

__all__ = ["SqlPosition"]

TABLE = """
CREATE TABLE IF NOT EXISTS millstream_positions (
    stream_id TEXT NOT NULL, group_id TEXT NOT NULL, partition INTEGER NOT NULL,
    fence INTEGER NOT NULL, epoch INTEGER NOT NULL, next_offset INTEGER NOT NULL,
    PRIMARY KEY (stream_id, group_id, partition)
)
"""
ROW = " WHERE stream_id = ? AND group_id = ? AND partition = ?"
READ = f"SELECT fence, epoch, next_offset FROM millstream_positions{ROW}"
CLAIM = """
INSERT INTO millstream_positions VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET fence = excluded.fence WHERE fence <= excluded.fence
"""
WRITE = f"UPDATE millstream_positions SET epoch = ?, next_offset = ?{ROW} AND fence = ?"


class SqlPosition:
    """Keeps the position of a consumer in a SQLite database; `Consumer.position_in` gives it.

    The table ``millstream_positions`` is made there. Each owner of a partition writes its fence
    there before it reads the position, in a transaction of its own; from then on `commit` of an
    earlier owner is refused, within the very transaction that would have had the effects.
    """

    def __init__(self, consumer: Consumer, connection: sqlite3.Connection) -> None:
        if not hasattr(connection, "in_transaction"):
            raise InvalidType(f"connection {connection!r}: expected a sqlite3.Connection")
        self._consumer = consumer
        self._connection = connection
        group = consumer.group
        self._row = f"{group.stream._stream_id:016x}", f"{group._group_id:016x}"
        self._written: dict[int, tuple[int, int]] = {}
        """(epoch, offset) that the transaction under way, or the last one, wrote."""
        self._check_outside()
        connection.execute(TABLE)
        connection.commit()

    def __repr__(self) -> str:
        return f"<SqlPosition of {self._consumer!r}>"

    def _check_outside(self) -> None:
        if self._connection.in_transaction:
            raise InvalidArgument(
                f"{self._consumer.group.path}: the connection is within a transaction; commit it or"
                " roll it back before the next batch is asked for"
            )

    def claim(self, partition: int) -> Position:
        """As the new owner: refuse what an earlier one would still write, then read."""
        consumer, connection = self._consumer, self._connection
        self._check_outside()
        fence = consumer._member.fence_of(partition)
        begin = consumer.group._committed(partition)
        if begin is None:
            begin = Position(partition, _epoch(consumer, partition), 0)
        connection.execute("BEGIN IMMEDIATE")
        try:
            key = *self._row, partition
            connection.execute(CLAIM, (*key, fence, begin.epoch, begin.offset))
            found, epoch, offset = connection.execute(READ, key).fetchone()
            connection.commit()
        except BaseException:
            connection.rollback()
            raise
        if found != fence:
            consumer._member.fenced([partition])
        self._written.pop(partition, None)
        if (epoch, offset) != (begin.epoch, begin.offset):
            consumer._member.start(partition, epoch, offset, False)
            self._mirror(partition, epoch, offset)
        return Position(partition, epoch, offset)

    def commit(self, batch: Batch | None = None) -> None:
        """Write the position within the user's transaction: all handed out, or up to a batch's end.

        It counts when that is committed, and not if it is rolled back: then the records are
        delivered again.

        Durability: that of the user's database.

        Raises: Fenced where another owns the partition now: roll back; InvalidArgument where the
            connection commits each statement by itself; what sqlite3 raises.
        """
        consumer, connection = self._consumer, self._connection
        if not (batch is None or isinstance(batch, Batch)):
            raise InvalidType(f"batch {batch!r}: expected a Batch")
        if not connection.in_transaction and _commits_by_itself(connection):
            raise InvalidArgument(
                f"{consumer.group.path}: the connection commits each statement by itself: begin a"
                " transaction for effects and position"
            )
        if consumer._member.forfeited:
            consumer._member.fenced(consumer._member.forgive())
        if batch is None:
            goals = consumer._member.handed_out()
        else:
            fence = consumer._member.fence_of(batch.partition)
            goals = [(batch.partition, fence, batch.epoch, int(batch.next_offset))]
        for partition, fence, epoch, offset in goals:
            written = connection.execute(WRITE, (epoch, offset, *self._row, partition, fence))
            if written.rowcount != 1:
                raise Fenced(
                    f"{consumer.group.path}: partition {partition} has another owner now, which"
                    " has claimed it in the database: roll back, the records are delivered again",
                    partitions=(partition,),
                )
            self._written[partition] = epoch, offset

    def follow(self) -> None:
        """After the user's transaction: the group's file follows, or reading goes back."""
        if not self._written or self._connection.in_transaction:
            return
        consumer = self._consumer
        for partition, (epoch, offset) in list(self._written.items()):
            del self._written[partition]
            consumer._member.forget(partition)
            fence = consumer._member.fence_of(partition)
            row = self._connection.execute(READ, (*self._row, partition)).fetchone()
            if row is None or row[0] != fence:
                continue  # another's by now: `take_up` tells so
            if row[1:] == (epoch, offset):
                self._mirror(partition, epoch, offset)
            else:  # rolled back
                consumer._start_reader(partition, Position(partition, *row[1:]), sought=False)
                consumer._choose()

    def _mirror(self, partition: int, epoch: int, offset: int) -> None:
        """For lag and for `positions()`: the truth is in the database."""
        try:
            self._consumer._member.commit_at(partition, epoch, offset, True)
        except Fenced:
            self._consumer._member.begin()  # `take_up` tells so


def _epoch(consumer: Consumer, partition: int) -> int:
    with _native.loading:
        from millstream.groups.group import epoch_at
    return epoch_at(consumer.stream, partition, consumer.stream._log(partition).first_offset)


def _commits_by_itself(connection: sqlite3.Connection) -> bool:
    automatic = getattr(connection, "autocommit", None)
    return automatic is True or (automatic in (None, -1) and connection.isolation_level is None)
