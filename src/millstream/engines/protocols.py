"""What every engine gives: typed protocols of store, stream, group and queue.

A store in a directory (`millstream.Store`) is one of them. Which of it an engine can do, its
`capabilities` say; what it cannot do raises `millstream.Unsupported` before a byte is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime
    from typing import Literal, TypeAlias

    import numpy.typing as npt
    from typing_extensions import Buffer

    from millstream import (
        Batch,
        Capability,
        Compaction,
        DeadLetter,
        Durability,
        Position,
        QueueStats,
        Record,
        Retention,
        RetryPolicy,
        Span,
        StoredMessage,
    )

    Headers: TypeAlias = Mapping[str, Buffer]
    Values: TypeAlias = "Iterable[Buffer | None] | npt.NDArray[Any] | ArrowArray | ArrowStream"
    Time: TypeAlias = int | datetime
    OnMismatch: TypeAlias = Literal["raise", "alter", "keep"]
    Start: TypeAlias = int | Position | datetime | Literal["earliest", "latest"]
    Delivery: TypeAlias = Literal["at_least_once", "at_most_once", "exactly_once"]

__all__ = ["Consumer", "DeadLetters", "Group", "Message", "Producer", "Queue", "Store", "Stream"]


class ArrowArray(Protocol):
    """An Arrow array or record batch of any library."""

    def __arrow_c_array__(self, requested_schema: object = None) -> tuple[object, object]: ...


class ArrowStream(Protocol):
    """An Arrow table, chunked array or reader of any library."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


class Consumer(Protocol):
    """A member of a consumer group; see `millstream.Consumer`."""

    def poll(self, timeout: float | None = 0.0) -> Batch | None:
        """The next batch, or None where none came in time."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def commit(self, batch: Batch | None = None, *, allow_backwards: bool = False) -> None:
        """Keep that all up to here was done. Raises Fenced where another member has it now."""
        ...

    def seek(self, to: Any, *, partition: int | None = None) -> None:
        """Read on from somewhere else."""
        ...

    @property
    def assignment(self) -> list[int]:
        """The partitions that are this consumer's now, sorted."""
        ...

    def lag(self, partition: int | None = None) -> int:
        """Records that are not committed."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: object) -> None: ...


class Group(Protocol):
    """A consumer group; see `millstream.Group`."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    def positions(self) -> dict[int, Position | None]:
        """Where the group goes on in each partition; None: nothing was committed."""
        ...

    def lag(self, partition: int | None = None) -> int:
        """Records that are not committed: of one partition, or of all."""
        ...

    def seek(self, to: Any, *, partition: int | None = None) -> dict[int, Position]:
        """Set where the group goes on; it must have no members."""
        ...

    def remove(self) -> None:
        """Forget the group; it must have no members."""
        ...


class Producer(Protocol):
    """A writer with a durable name: what it sends again adds nothing; see `millstream.Producer`."""

    @property
    def last_sequences(self) -> tuple[int, ...]:
        """The last sequence in each partition; -1: none."""
        ...

    def append_many(
        self,
        values: Values,
        *,
        first_sequence: int | None = None,
        sequences: Sequence[int] | None = None,
        keys: Values | None = None,
        headers: Headers | Sequence[Headers | None] | None = None,
        timestamps: Any = None,
        partition: int | None = None,
        durability: Durability | None = None,
        timeout: float | None = None,
    ) -> list[Span]:
        """Append those whose sequence is above the last one of their partition."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Stream(Protocol):
    """A partitioned, retained, replayable log; see `millstream.Stream`."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def partitions(self) -> int:
        """How many there are."""
        ...

    def partition_for(self, key: Buffer, /) -> int:
        """The partition of a key, the same on every engine."""
        ...

    def append(
        self,
        value: Buffer | None,
        *,
        key: Buffer | None = None,
        headers: Headers | None = None,
        timestamp: Time | None = None,
        partition: int | None = None,
        durability: Durability | None = None,
        timeout: float | None = None,
    ) -> Position:
        """Append a record."""
        ...

    def append_many(
        self,
        values: Values,
        *,
        keys: Values | None = None,
        headers: Headers | Sequence[Headers | None] | None = None,
        timestamps: Any = None,
        partition: int | None = None,
        durability: Durability | None = None,
        timeout: float | None = None,
    ) -> list[Span]:
        """Append records; a `Span` for each run of them in a partition."""
        ...

    def append_arrow(
        self,
        data: ArrowArray | ArrowStream,
        *,
        value: str = "value",
        key: str | None = None,
        timestamp: str | None = None,
        partition: int | None = None,
        durability: Durability | None = None,
        timeout: float | None = None,
    ) -> list[Span]:
        """Append Arrow data."""
        ...

    def get(self, partition: int, offset: int, /) -> Record:
        """One record. Raises OffsetOutOfRange."""
        ...

    def read(
        self,
        *,
        partition: int | None = None,
        start: Start = "earliest",
        follow: bool = False,
        timeout: float | None = None,
        max_records: int | None = None,
        on_lost: Literal["raise", "earliest"] = "raise",
    ) -> Iterator[Batch]:
        """Iterate over batches: of one partition in order, or of all, each in order."""
        ...

    def first_offset(self, partition: int) -> int:
        """Offset of the oldest record that there is."""
        ...

    def next_offset(self, partition: int) -> int:
        """Offset that the next record will get."""
        ...

    def offset_at(self, timestamp: Any, partition: int) -> int:
        """Offset of the first record at or after a time."""
        ...

    def producer(self, id: str) -> Producer:
        """The producer of that id."""
        ...

    def consumer(
        self,
        group: str,
        *,
        start: Start = "earliest",
        delivery: Delivery = "at_least_once",
        auto_commit: bool = False,
        max_records: int | None = None,
        timeout: float | None = None,
        session: float = 10.0,
        max_processing: float = 300.0,
        on_lost: Literal["raise", "earliest"] = "raise",
        create: bool = True,
    ) -> Consumer:
        """Join a consumer group, which is made where it is not there."""
        ...

    def groups(self) -> list[str]:
        """Names of the consumer groups, sorted."""
        ...

    def group(self, name: str) -> Group:
        """A consumer group. Raises NotFound."""
        ...

    def flush(self, *, timeout: float | None = None) -> None:
        """Return when all that was appended before is as durable as it can be."""
        ...


class Message(Protocol):
    """A leased message; see `millstream.Message`."""

    @property
    def id(self) -> int:
        """Its number."""
        ...

    @property
    def value(self) -> Any:
        """The payload."""
        ...

    @property
    def key(self) -> bytes | None:
        """Its key."""
        ...

    @property
    def headers(self) -> dict[str, bytes]:
        """Its headers."""
        ...

    @property
    def priority(self) -> int:
        """0 comes first."""
        ...

    @property
    def attempt(self) -> int:
        """Which lease of it this is, from 1 on."""
        ...

    @property
    def deadline(self) -> datetime:
        """When the lease ends."""
        ...

    def ack(self) -> None:
        """It is done. Raises LeaseLost."""
        ...

    def nack(self, delay: float | None = None, reason: object = "") -> None:
        """It failed: deliver it again, later."""
        ...

    def release(self, delay: float = 0) -> None:
        """Give it back, uncounted."""
        ...

    def reject(self, reason: object = "") -> None:
        """To the dead letters."""
        ...

    def extend(self, seconds: float | None = None) -> None:
        """Lease it for so many seconds from now on."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool: ...


class DeadLetters(Protocol):
    """The messages that are tried no more; see `millstream.DeadLetters`."""

    def __len__(self) -> int: ...

    def list(self, count: int | None = None) -> list[DeadLetter]:
        """Up to so many of them, the oldest first."""
        ...

    def redrive(self, ids: int | Iterable[int] | None = None) -> int:
        """Try these again, or all; how many."""
        ...

    def purge(self, ids: int | Iterable[int] | None = None) -> int:
        """Remove these, or all; how many."""
        ...


class Queue(Protocol):
    """A bounded set of messages, each leased until it is acknowledged; see `millstream.Queue`."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    def put(
        self,
        value: Any,
        *,
        priority: int = 0,
        delay: float = 0.0,
        at: Time | None = None,
        key: Buffer | None = None,
        ttl: float | None = None,
        dedup_id: str | Buffer | None = None,
        headers: Headers | None = None,
        timeout: float | None = None,
    ) -> int:
        """Put a message; its id."""
        ...

    def put_many(self, items: Iterable[Any], timeout: float | None = 0) -> list[int]:
        """Put values or `Put`s; their ids."""
        ...

    def get(self, *, timeout: float | None = None) -> Message:
        """Lease the next message. Raises Empty."""
        ...

    def get_many(self, count: int, *, timeout: float | None = None) -> Sequence[Message]:
        """Lease up to so many."""
        ...

    def __len__(self) -> int: ...

    def peek(self, count: int = 1) -> list[StoredMessage]:
        """The messages that would come next, without taking them."""
        ...

    def cancel(self, id: int) -> bool:
        """Remove a message by its id."""
        ...

    def purge(self) -> int:
        """Remove all messages that are neither leased nor dead; how many."""
        ...

    def stats(self) -> QueueStats:
        """The queue in numbers, as of now."""
        ...

    @property
    def dead(self) -> DeadLetters:
        """The dead letters."""
        ...


class Store(Protocol):
    """Streams and queues of one engine; `millstream.open` gives it."""

    @property
    def engine(self) -> str:
        """The engine and its version."""
        ...

    @property
    def capabilities(self) -> Mapping[str, Capability]:
        """What the engine can do, by name."""
        ...

    @property
    def native(self) -> Any:
        """The client below, for what is not covered here."""
        ...

    def require(self, *names: str, emulated: bool = True) -> None:
        """Raise Unsupported where the engine lacks one of these capabilities."""
        ...

    def stream(
        self,
        name: str,
        *,
        partitions: int | None = None,
        retention: Retention | None = None,
        durability: Durability | None = None,
        compact: Compaction | None = None,
        create: bool | None = None,
        on_mismatch: OnMismatch = "raise",
        emulate: Collection[str] = (),
    ) -> Stream:
        """Open a stream, creating it where it is not there."""
        ...

    def streams(self) -> list[str]:
        """Names of the streams, sorted."""
        ...

    def drop_stream(self, name: str) -> None:
        """Remove a stream and all its records."""
        ...

    def queue(
        self,
        name: str,
        *,
        capacity: int | None = None,
        priorities: int | None = None,
        lease: float | None = None,
        ordering: Literal["key"] | None = None,
        retry: RetryPolicy | None = None,
        ttl: float | None = None,
        dedup_window: float | None = None,
        codec: object = None,
        durability: Durability | None = None,
        create: bool | None = None,
        on_mismatch: OnMismatch = "raise",
        emulate: Collection[str] = (),
    ) -> Queue:
        """Open a queue, creating it where it is not there."""
        ...

    def queues(self) -> list[str]:
        """Names of the queues, sorted."""
        ...

    def drop_queue(self, name: str) -> None:
        """Remove a queue and all its messages."""
        ...

    @property
    def closed(self) -> bool:
        """Is it closed?"""
        ...

    def close(self) -> None:
        """Close it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: object) -> None: ...
