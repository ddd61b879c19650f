"""Producers on Kafka: records, and how far the producer is, in one transaction.

How far it is, is a record of the compacted topic ``__millstream.NAME``, which has the partitions of
the stream: key is the producer's id, value its last sequence. A group's offset would be forgotten
when nobody commits for a week. Each partition has a transactional id of its own, so that several
processes share a stream, and who takes a partition over fences the one that had it.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

from millstream.engines.kafka.streams import KafkaStream, Sending, parts_of
from millstream.engines.stream import ServerProducer, sequences_of
from millstream.errors import Fenced, InvalidArgument, MillstreamError
from millstream.options import check_timeout

if TYPE_CHECKING:
    from millstream._native import Span
    from millstream.engines.kafka.records import Row
    from millstream.options import Durability

TRIES = 5


class KafkaProducer(ServerProducer):
    """A producer with a durable name; made by `KafkaStream.producer`. Thread-safe."""

    def __init__(self, stream: KafkaStream, id: str) -> None:
        stream.store.check_writable()
        self.stream = stream
        self.id = id
        self._connection = stream.store.connection
        self._prepare()
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Any, int]] = {}
        """Of each partition that is ours: the client, and the last sequence."""

    def __repr__(self) -> str:
        return f"<KafkaProducer {self.id!r} of stream {self.stream.name!r}>"

    def _prepare(self) -> None:
        """Have the topic of positions, with a partition for each of the stream."""
        self._topic = self.stream.store.positions_topic(self.stream)
        self._positions = KafkaStream(
            self.stream.store, self._topic, self.stream.partitions, {}, "process"
        )

    def _load(self, index: int) -> int:
        """The last sequence that a transaction has stored."""
        if index >= self._positions.partitions:
            self._prepare()
        last, name = -1, self.id.encode()
        for batch in self._positions.read(partition=index):
            for key, value in zip(batch.keys, batch.values, strict=True):
                if key == name and value is not None:
                    last = int(value)
        return last

    def _take(self, index: int) -> tuple[Any, int]:
        """Fence who had the partition as this producer, and see how far that one came."""
        if index not in self._open:
            name = f"millstream.{self.stream.name}.{index}.{self.id}"
            client = self._connection.transacting(name)
            self._open[index] = client, self._load(index)
        return self._open[index]

    @property
    def last_sequences(self) -> tuple[int, ...]:
        """The last sequence in each partition; -1: none."""
        with self._lock:
            return tuple(self._load(index) for index in range(self.stream.partitions))

    def append_many(
        self,
        values: Any,
        *,
        first_sequence: int | None = None,
        sequences: Any = None,
        keys: Any = None,
        headers: Any = None,
        timestamps: Any = None,
        partition: int | None = None,
        durability: Durability | None = None,
        timeout: float | None = None,
    ) -> list[Span]:
        """Append those whose sequence is above the last one of their partition.

        What one partition gets is seen whole or not at all. Records without a key need a
        `partition` where there are several: sent again, they have to come to the same.
        """
        check_timeout(timeout)
        self.stream.check_transacted(durability)
        rows = self.stream.rows_of(values, keys, headers, timestamps, durability)
        numbers = sequences_of(first_sequence, sequences, len(rows))
        spread = partition is None and self.stream.partitions > 1
        if spread and any(row.key is None for row in rows):
            raise InvalidArgument(
                "a record of a producer without a key: say which partition it goes to"
            )
        place = dict(zip(map(id, rows), numbers, strict=True))
        spans: list[Span] = []
        with self._lock:
            for index, share in self.stream.shares_of(rows, partition).items():
                try:
                    spans += self._send(index, [(place[id(row)], row) for row in share])
                except MillstreamError as error:
                    error.appended = tuple(spans)
                    self._open.pop(index, None)  # it may be stored: look before the next one
                    raise
        return spans

    def _send(self, index: int, share: list[tuple[int, Row]]) -> list[Span]:
        for tried in itertools.count(1):
            client, last = self._take(index)
            left = [one for one in share if one[0] > last]
            if not left:
                return []
            try:
                found = self._transact(client, index, left)
            except Fenced:  # another process sends as this producer: what has it stored?
                del self._open[index]
                if tried == TRIES:
                    raise
                continue
            self._open[index] = client, left[-1][0]
            return found
        raise AssertionError

    def _transact(self, client: Any, index: int, left: list[tuple[int, Row]]) -> list[Span]:
        what = f"producer {self.id!r} of stream {self.stream.name!r}, partition {index}"
        sending = Sending(self.stream, client)
        with self._connection.transaction(client, what):
            for part in parts_of([row for _, row in left]):
                sending.hand_over(index, part)
            sending.note(self._topic, self.id.encode(), b"%d" % left[-1][0], index)
            sending.finish()
        self.stream.await_seen(sending.spans())
        return sending.spans()

    def close(self) -> None:
        """Let go of it; nothing is left to send."""
        with self._lock:
            self._open.clear()
