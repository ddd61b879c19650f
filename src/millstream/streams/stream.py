"""A stream: a partitioned, retained, replayable log that many processes append to and read."""

from __future__ import annotations

import contextlib
import time
from functools import partial

from millstream import _native
from millstream._native import Position, Span
from millstream.disk.session import LOCK_SECONDS
from millstream.errors import InvalidType, MillstreamError, NotFound, WaitTimeout, each_of
from millstream.groups.of_stream import Groups
from millstream.log import reader, retiring, settings
from millstream.log.handle import StreamHandle
from millstream.options import Retention, check_timeout, integer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    from millstream.disk.open_store import OpenStore
    from millstream.groups.consumer import Consumer
    from millstream.groups.group import Group
    from millstream.groups.of_stream import Delivery, GroupStart, Told
    from millstream.log.cache import SegmentCache
    from millstream.log.compaction import CompactionProgress, CompactionResult
    from millstream.log.partition import PartitionLog
    from millstream.options import Compaction, Durability
    from millstream.streams.producer import Producer
    from millstream.streams.stats import StreamStats
    from millstream.streams.view import View

__all__ = ["Stream"]


class Stream(StreamHandle):
    """A stream of a store; made by `Store.stream`.

    Thread-safe; pickles by the store's path and its name.

    `append`, `append_many`, `append_arrow` and `partition_for` are the extension's own.
    """

    def __init__(
        self,
        store: OpenStore,
        name: str,
        config: dict[str, Any],
        durability: Durability | None,
        cache: SegmentCache,
    ) -> None:
        self.store = store
        self._groups = Groups(self)
        super().__init__(store.session, name, config, durability, cache)

    def __repr__(self) -> str:
        state = "closed"
        with contextlib.suppress(MillstreamError):  # an overlay has left it behind
            if not self.closed:
                count = self.partitions
                state = f"{count} partition{'s' * (count != 1)}"
        return f"<Stream {self.name!r} of {self.session.path!r}: {state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Stream._reopened, (self.store, self.name, self._override))

    @staticmethod
    def _reopened(store: OpenStore, name: str, durability: Durability | None) -> Any:
        if name not in store.streams():
            raise NotFound(f"{store.path}: there is no stream {name!r} any more")
        return store.stream(name, durability=durability, create=False)

    def _configure(self, config: dict[str, Any]) -> None:
        before = self._durability
        super()._configure(config)
        if self._durability != before:
            self._groups.tune()

    # --- appending --------------------------------------------------------------------------------

    def producer(self, id: str) -> Producer:
        """The producer of that id, 1 to 128 characters: what it sends again adds nothing.

        Raises: InvalidArgument, InvalidType, Unsupported where the store is read-only; StoreFull.
        """
        with _native.loading:
            from millstream.streams.producer import Producer
        return Producer(self, id)

    # --- reading ----------------------------------------------------------------------------------

    def view(self) -> View:
        """Load the latest value of each key into memory, and keep it current: see `View`.

        Returns when all that was appended before is in it.
        """
        with _native.loading:
            from millstream.streams.view import View
        self._keep_up()
        self._point_out()
        return View(self)

    def _point_out(self, since: float | None = None) -> None:
        """Warn, once, where a stream that was not there before it was named has nothing.

        Args:
            since: when the wait began; a second later it is time to say so.
        """
        if not self._is_surprise or (
            since and time.monotonic() - since < settings.SURPRISE_SECONDS
        ):
            return
        self._is_surprise = False
        if any(self._log(index).next_offset for index in range(self.partitions)):
            return
        with _native.loading:
            from millstream.log import surprise
        surprise.point_out(self.session.path, "stream", self.name, self.store.streams())

    # --- groups -----------------------------------------------------------------------------------

    def consumer(
        self,
        group: str,
        *,
        start: GroupStart = "earliest",
        delivery: Delivery = "at_least_once",
        auto_commit: bool = False,
        max_records: int | None = None,
        timeout: float | None = None,
        session: float = 10.0,
        max_processing: float = 300.0,
        on_lost: Literal["raise", "earliest"] = "raise",
        on_assign: Told | None = None,
        on_revoke: Told | None = None,
        create: bool = True,
    ) -> Consumer:
        """Join a consumer group, which is made where it is not there.

        No warning says so, as one does of a stream: the first consumer of each group makes it, and
        has every record to read. Where a group must be there, say create=False.

        The members of a group share the partitions out among themselves; each group gets every
        record. Close the consumer, or use it in a `with`: the others get its partitions at once.
        Used by one thread at a time.

        Args:
            group: 1 to 128 characters of ``A-Z a-z 0-9 . _ -``, no leading dot.
            start: where a new group begins: "earliest", "latest", a datetime, a `Position` (or a
                list of them; the other partitions from the earliest on), an offset where there is
                one partition. A group that is there goes on where it is.
            delivery: "at_least_once": a position is committed after the records were handled.
                "at_most_once": before they are handed out. "exactly_once": by a transaction alone.
            auto_commit: commit a batch when the next one is asked for.
            max_records: at most so many records a batch.
            timeout: iterating ends after so many seconds without a record; None: never.
            session: seconds after which a member is ended whose process was stopped. A dead one is
                noticed within 100 ms.
            max_processing: seconds after which a member is ended that does not ask for a batch.
            on_lost: where the group's position is not there any more: "raise" `OffsetOutOfRange`,
                or go on at the "earliest" record that the group has not seen.
            on_assign: called with a list of partitions that came, by `poll` and `rewind`.
            on_revoke: likewise with those that are about to go (it may commit), or are lost. What a
                callback raises comes out of the `poll` or `close` that called it, which has then
                done its part all the same: it is not called again for these partitions, and the
                consumer can be used on.
            create: False: raise `NotFound` where there is no such group.

        Raises: NotFound (create=False), InvalidArgument, InvalidType, OffsetOutOfRange (`start`),
            LimitExceeded (256 members in the group), StoreFull, StorageError; Unsupported where the
            store is read-only.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     stream = store.stream("orders", partitions=2)
        ...     _ = stream.append_many([b"a", b"b"], partition=1)
        ...     with stream.consumer(group="billing", timeout=0) as consumer:
        ...         for batch in consumer:
        ...             print(batch.partition, list(batch.values))
        ...             consumer.commit()
        1 [b'a', b'b']
        """
        with _native.loading:
            from millstream.groups.consumer import Consumer
        if not settings.check_create(create):
            self._groups.open(group)  # raises
        return Consumer(
            self._groups, group, start=start, delivery=delivery, auto_commit=auto_commit,
            max_records=max_records, timeout=timeout, session=session,
            max_processing=max_processing, on_lost=on_lost, on_assign=on_assign,
            on_revoke=on_revoke,
        )  # fmt: skip

    def groups(self) -> list[str]:
        """Names of the consumer groups, sorted."""
        self._check_live()
        return self._groups.names()

    def group(self, name: str) -> Group:
        """A consumer group, to read its positions, lag and members, to set or to remove it.

        Raises: NotFound.
        """
        return self._groups.open(name)

    # --- offsets ----------------------------------------------------------------------------------

    def stats(self) -> StreamStats:
        """Offsets, bytes and health of the stream and each partition, as of now.

        Also where no descriptor is left: two are kept for it.
        """
        with self.session.spare:
            with _native.loading:
                from millstream.streams import stats
            return stats.of_stream(self)

    # --- durability -------------------------------------------------------------------------------

    def flush(self, *, timeout: float | None = None) -> None:
        """Return when all that was appended before this call, by anyone, survives a power cut.

        What fails keeps nothing else from being synced: the first error is raised at the end.

        Raises: Indeterminate, Poisoned, StorageError; Unsupported where the store is read-only (who
        only reads waits with `wait_durable`).
        """
        self.session.check_writable()
        each_of([partial(super().flush, timeout=timeout), self._groups.flush])

    def wait_durable(
        self, position: Position | _native.Span, *, timeout: float | None = None
    ) -> None:
        """Return when the record (or all of the span) survives a power cut.

        Syncs, if nobody else does.

        Raises: OffsetOutOfRange where there is no such record (any more); WaitTimeout.
        """
        if not isinstance(position, (Position, Span)):
            raise InvalidType(f"position {position!r}: expected a Position or a Span")
        log = self._log(position.partition)
        last = (
            position.offset
            if isinstance(position, Position)
            else position.first_offset + position.count - 1
        )
        deadline = self._deadline(timeout)
        if last >= log.next_offset:
            raise log.out_of_range(last, " was not appended")
        reader.check_record(log, position.epoch, last)
        while log.native.durable_offset <= last:
            if time.monotonic() > deadline:
                raise WaitTimeout(f"{log}: offset {last} did not become durable in time")
            if self.session.writable:
                log.wait_durable(log.native.tail, min(deadline, time.monotonic() + 0.1), late=False)
            else:
                log.native.wait_durable(log.native.tail, 0.01)

    # --- retention --------------------------------------------------------------------------------

    def enforce_retention(self) -> int:
        """Remove the segments that `retention` does not keep, now; how many.

        The background does it each second.
        """
        self.session.check_writable()
        return sum(self._retire(self._log(index)) for index in range(self.partitions))

    def _retire(self, log: PartitionLog) -> int:
        return retiring.retire(log, self.retention)

    def delete_before(self, position: Position) -> int:
        """Remove the segments that lie wholly before a position; return the first offset left.

        Whole segments go: records before the position in its own segment stay.
        """
        self.session.check_writable()
        return retiring.delete_before(self, position)

    def compact(
        self,
        *,
        partition: int | None = None,
        memory: int | str = "64MiB",
        progress: Callable[[CompactionProgress], None] | None = None,
        timeout: float | None = None,
    ) -> CompactionResult:
        """Keep of each key the last record, now; the background does it when enough is dirty.

        Only segments that have a successor are compacted, and the log is synced before. Offsets do
        not change; those of records that go stay empty. No reader or writer waits. Killed at any
        moment it has done a part of it. Where the stream has no compaction, that of `Compaction()`
        is done.

        Args:
            partition: one of them; None: all.
            memory: for keys, 32 bytes each; more keys than that take more rounds.
            progress: is called now and then; what it raises ends the run.
            timeout: seconds to wait for another process that compacts; default 30.

        Raises: StoreFull (nothing is harmed), CorruptBatch, Poisoned, LockTimeout, StorageError.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     stream = store.stream("s", compact=millstream.Compaction(), segment_bytes=1 << 16)
        ...     for i in range(100):
        ...         _ = stream.append_many([b"%d" % i * 1000] * 10, keys=[b"k"] * 10)
        ...     stream.compact().records_removed > 500
        True
        """
        with _native.loading:
            from millstream.log import compaction
        self.session.check_writable()
        limit = check_timeout(timeout)
        seconds = LOCK_SECONDS if limit is None else limit
        return compaction.compact(self, partition, memory, progress, seconds)

    def alter(
        self,
        *,
        retention: Retention | Literal["unchanged"] | None = "unchanged",
        segment_bytes: int | str = "unchanged",
        durability: Durability | Literal["unchanged"] | None = "unchanged",
        compact: Compaction | Literal["unchanged"] | None = "unchanged",
    ) -> None:
        """Change the stored configuration.

        Every process that has the stream open follows at its next call. What has not changed when
        this returns, or raises, stays as it was; killed on the way, it is as before or as asked
        for.

        Args:
            retention: how much is kept; None: everything.
            segment_bytes: size that segments grow to.
            durability: the stored level; None: the store's.
            compact: keep the last record of each key; None: all of them.

        Raises: InvalidArgument, InvalidType, StoreFull, StorageError, Unsupported (read-only).

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     stream = store.stream("s")
        ...     stream.alter(retention=millstream.Retention(age="30d"))
        ...     stream.retention.age
        2592000.0
        """
        asked: dict[str, Any] = {}
        if not _unchanged(retention):
            asked["retention"] = settings.retention_config(retention)
        if not _unchanged(segment_bytes):
            asked["segment_bytes"] = settings.check_segment_bytes(segment_bytes)
        if not _unchanged(compact):
            asked["compact"] = settings.compaction_config(compact)
        if not _unchanged(durability):
            asked["durability"] = settings.check_durability(durability)
        self._alter(asked)

    def add_partitions(self, count: int) -> int:
        """Add `count` partitions and return how many there are now. They cannot be removed.

        The partition of most keys changes: records of one key appended before and after are not in
        one order for readers. Views know it by the era, and `compact` keeps what they need.

        Raises: Indeterminate, Poisoned, StoreFull; the partitions are as they were.
        """
        self.session.check_writable()
        self._keep_up()
        more = integer("count", count, 1)
        return self._grow(lambda before: settings.check_partitions(before + more))

    def _dispose(self) -> None:
        self._groups.dispose()
        super()._dispose()


def _unchanged(value: object) -> bool:
    return isinstance(value, str) and value == "unchanged"


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Stream.__module__ = "millstream"
Stream._reopened.__module__ = "millstream"
