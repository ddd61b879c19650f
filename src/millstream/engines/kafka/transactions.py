"""Transactions on Kafka: appends to streams and positions of consumers, all or nothing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from millstream.engines.kafka.groups import KafkaConsumer
from millstream.engines.kafka.streams import KafkaStream, Sending, parts_of
from millstream.errors import Aborted, Fenced, InvalidArgument, InvalidType, LimitExceeded
from millstream.options import parse_bytes

if TYPE_CHECKING:
    from millstream._native import Span
    from millstream.engines.kafka.records import Row
    from millstream.engines.kafka.store import KafkaStore

__all__ = ["KafkaTransaction"]


class KafkaTransaction:
    """Made by `KafkaStore.transaction`; used in a `with`, once, at whose end all is sent."""

    def __init__(self, store: KafkaStore, max_bytes: int | str) -> None:
        self._store = store
        self._room = parse_bytes(max_bytes)
        self._most = max_bytes
        self._state: Literal["new", "open", "committed", "rolled back"] = "new"
        self._shares: list[tuple[KafkaStream, int, list[Row]]] = []
        self._consumers: list[KafkaConsumer] = []
        self.spans: list[Span] = []
        """Where its records are, once it is committed: of each stream and partition in turn."""

    def __repr__(self) -> str:
        return f"<KafkaTransaction of {self._store.path!r}: {self._state}>"

    def __enter__(self) -> KafkaTransaction:
        if self._state != "new":
            raise InvalidArgument(f"{self!r}: a transaction is used once; make another")
        self._state = "open"
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._state != "open":
            return
        if kind is not None:
            self._roll_back()
            return
        try:
            self._commit()
        except Fenced as fenced:
            self._roll_back()
            raise Aborted(f"{self!r}: {fenced}") from fenced
        except BaseException:
            self._roll_back()
            raise
        self._state = "committed"

    def rollback(self) -> None:
        """Give it up: nothing of it happens, and the consumers it named read again."""
        self._check()
        self._roll_back()

    def _check(self) -> None:
        if self._state != "open":
            raise InvalidArgument(f"{self!r}: use it within its `with`")
        self._store.connection.check_open()

    def append(
        self,
        stream: KafkaStream,
        value: Any,
        *,
        key: Any = None,
        headers: Any = None,
        timestamp: Any = None,
        partition: int | None = None,
    ) -> None:
        """Append a record to a stream; arguments as of its ``append``."""
        self.append_many(
            stream, [value], keys=None if key is None else [key], headers=headers,
            timestamps=timestamp, partition=partition,
        )  # fmt: skip

    def append_many(
        self,
        stream: KafkaStream,
        values: Any,
        *,
        keys: Any = None,
        headers: Any = None,
        timestamps: Any = None,
        partition: int | None = None,
    ) -> None:
        """Append records to a stream; arguments as of its ``append_many``."""
        self._check()
        if getattr(stream, "store", None) is not self._store:
            raise InvalidArgument(f"{stream!r} is not a stream of {self._store!r}")
        stream.check_transacted(None)
        rows = stream.rows_of(values, keys, headers, timestamps, None)
        self.add(stream, stream.shares_of(rows, partition))

    def add(self, stream: KafkaStream, shares: dict[int, list[Row]]) -> None:
        """Append rows that were checked."""
        for index, rows in shares.items():
            self._room -= sum(row.size for row in rows)
            self._shares.append((stream, index, rows))
        if self._room < 0:
            raise LimitExceeded(
                f"{self!r}: more than its max_bytes of {self._most}; commit more often, or pass a"
                " larger max_bytes to transaction()"
            )

    def commit(self, consumer: KafkaConsumer) -> None:
        """Commit the position of a consumer: all that it has handed out by the end of the block.

        Where a partition has another owner by then, the transaction is `Aborted`.
        """
        self._check()
        if not isinstance(consumer, KafkaConsumer):
            raise InvalidType(f"expected a consumer, found {type(consumer).__name__}")
        if consumer.stream.store is not self._store:
            raise InvalidArgument(f"{consumer!r} is not of {self._store!r}")
        if not any(consumer is known for known in self._consumers):
            self._consumers.append(consumer)

    def put(self, *_: object, **__: object) -> None:
        """Raise Unsupported."""
        raise self._store.capabilities.refusal("queue.transaction")

    def ack(self, *_: object) -> None:
        """Raise Unsupported."""
        raise self._store.capabilities.refusal("queue.transaction")

    def _roll_back(self) -> None:
        self._state = "rolled back"
        for consumer in self._consumers:
            if not consumer.closed:
                consumer.rewind()

    def _commit(self) -> None:
        moved = [(one, one.to_commit()) for one in self._consumers]
        if not self._shares and not any(places for _, places in moved):
            return
        connection = self._store.connection
        client, what = self._store.transacting(), repr(self)
        sendings: dict[int, tuple[KafkaStream, Sending]] = {}
        with connection.transaction(client, what):
            for stream, index, rows in self._shares:
                _, sending = sendings.setdefault(id(stream), (stream, Sending(stream, client)))
                for part in parts_of(rows):
                    sending.hand_over(index, part)
            for _, sending in sendings.values():
                sending.finish()
            for consumer, places in moved:
                if places:
                    arguments = places, consumer.metadata(), connection.timeout
                    connection.call(partial(client.send_offsets_to_transaction, *arguments), what)
        for stream, sending in sendings.values():
            stream.await_seen(sending.spans())
            self.spans += sending.spans()
        for consumer, places in moved:
            consumer.was_committed(places)
        self._store.transacted(client)
