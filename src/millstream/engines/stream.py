"""What every engine over a server does alike: streams and their producers."""

from __future__ import annotations

import array
import itertools
from typing import TYPE_CHECKING, Any

from millstream._native import Position, Span, xxh3_64
from millstream.errors import InvalidArgument
from millstream.options import FOREVER, check_timeout, integer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from millstream import Batch
    from millstream.options import Durability

__all__ = ["ServerProducer", "ServerStream", "joined", "sequences_of"]


class ServerStream:
    """Base of the streams of engines: each brings `append_many`, and how it reads."""

    store: Any
    partitions: int
    append_many: Any
    resolve: Any
    _connection: Any
    _consent: frozenset[str]
    _read: Callable[[dict[int, int], bool, float | None, int], Iterator[Batch]]

    def _refuse(self, name: str) -> None:
        """Raise where a capability is none, or emulated without consent."""
        level = self.store.capabilities[name].level
        if level == "none" or (level == "emulated" and name not in self._consent):
            raise self.store.capabilities.refusal(name)

    def partition_for(self, key: Any, /) -> int:
        """The partition of a key, the same on every engine."""
        return xxh3_64(key) % self.partitions

    def append(
        self,
        value: Any,
        *,
        key: Any = None,
        headers: Any = None,
        timestamp: Any = None,
        partition: int | None = None,
        durability: Durability | None = None,
        timeout: float | None = None,
    ) -> Position:
        """Append a record; see `millstream.Stream`."""
        spans = self.append_many(
            [value], keys=None if key is None else [key], headers=headers,
            timestamps=timestamp, partition=partition, durability=durability, timeout=timeout,
        )  # fmt: skip
        return Position(spans[0].partition, 1, spans[0].first_offset)

    def append_arrow(
        self,
        data: Any,
        *,
        value: str = "value",
        key: str | None = None,
        timestamp: str | None = None,
        partition: int | None = None,
        durability: Durability | None = None,
        timeout: float | None = None,
    ) -> list[Span]:
        """Append Arrow data, chunk after chunk. Needs pyarrow."""
        import pyarrow

        if hasattr(data, "__arrow_c_stream__"):
            chunks: Any = pyarrow.RecordBatchReader.from_stream(data)
        else:
            chunks = [pyarrow.record_batch(data)]
        spans: list[Span] = []
        for chunk in chunks:
            for name in (value, key, timestamp):
                if name is not None and name not in chunk.schema.names:
                    raise InvalidArgument(f"the data has no column {name!r}")
            if len(chunk):
                spans += self.append_many(
                    chunk.column(value),
                    keys=None if key is None else chunk.column(key),
                    timestamps=None if timestamp is None else chunk.column(timestamp),
                    partition=partition, durability=durability, timeout=timeout,
                )  # fmt: skip
        return spans

    def read(
        self,
        *,
        partition: int | None = None,
        start: Any = "earliest",
        follow: bool = False,
        timeout: float | None = None,
        max_records: int | None = None,
        on_lost: Any = "raise",
    ) -> Iterator[Batch]:
        """Iterate over batches: of one partition in order, or of all, each in order."""
        self._connection.check_open()
        if isinstance(start, Position) and partition is None:
            partition = int(start.partition)
        which = range(self.partitions) if partition is None else [partition]
        at = {index: self.resolve(index, start, on_lost) for index in which}
        most = FOREVER if max_records is None else integer("max_records", max_records, 0)
        return self._read(at, follow, check_timeout(timeout), int(most))

    def flush(self, *, timeout: float | None = None) -> None:
        """Return at once: an append that has returned is as durable as the server makes it."""
        self._connection.check_open()

    def view(self) -> Any:
        """Raise Unsupported."""
        raise self.store.capabilities.refusal("stream.view")


class ServerProducer:
    """Base of the producers of engines: each brings `append_many`, `last_sequences`, `close`."""

    if TYPE_CHECKING:

        @property
        def last_sequences(self) -> tuple[int, ...]:
            """Of each partition; -1: none."""

    append_many: Any
    close: Any

    @property
    def last_sequence(self) -> int:
        """The highest of them."""
        return max(self.last_sequences)

    def append(self, value: Any, *, sequence: int, key: Any = None, headers: Any = None,
               timestamp: Any = None, partition: int | None = None,
               durability: Durability | None = None,
               timeout: float | None = None) -> Position | None:  # fmt: skip
        """Append a record; None: it was sent before."""
        spans = self.append_many(
            [value], first_sequence=sequence, keys=None if key is None else [key],
            headers=headers, timestamps=timestamp, partition=partition, durability=durability,
            timeout=timeout,
        )  # fmt: skip
        return Position(spans[0].partition, 1, spans[0].first_offset) if spans else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def joined(spans: list[Span]) -> list[Span]:
    """Spans that follow one another as one."""
    found: list[Span] = []
    for span in spans:
        last = found[-1] if found else None
        if (
            last is not None
            and last.partition == span.partition
            and last.first_offset + last.count == span.first_offset
        ):
            found[-1] = Span(last.partition, 1, last.first_offset, last.count + span.count)
        else:
            found.append(span)
    return found


def sequences_of(first: int | None, given: Any, count: int) -> array.array[int]:
    """The sequences of some values: from a first one on, or as they were given."""
    if (first is None) == (given is None):
        raise InvalidArgument("expected first_sequence or sequences, one of them")
    if first is not None:
        first = integer("first_sequence", first, 0)
        return array.array("q", range(first, first + count))
    found = array.array("q", [integer("sequence", one, 0) for one in given])
    if len(found) != count:
        raise InvalidArgument(f"{len(found)} sequences for {count} values")
    if any(after <= before for before, after in itertools.pairwise(found)):
        raise InvalidArgument("sequences: expected rising ones")
    return found
