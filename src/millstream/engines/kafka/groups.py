"""Consumer groups on Kafka: its own groups, of the same name."""

from __future__ import annotations

import threading
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, TopicPartition

from millstream import GroupMember, GroupPartition, GroupStats
from millstream._native import Position
from millstream.engines.kafka import records
from millstream.engines.kafka.capabilities import LAG_MOST
from millstream.engines.kafka.connection import STEP_SECONDS
from millstream.errors import (
    Closed,
    Fenced,
    InvalidArgument,
    InvalidType,
    MillstreamError,
    NotFound,
    OffsetOutOfRange,
    StorageError,
    Unsupported,
)
from millstream.options import FOREVER, as_index, boolean, check_timeout, integer, number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from millstream import Batch
    from millstream.engines.kafka.streams import KafkaStream

__all__ = ["KafkaConsumer", "KafkaGroup"]

MISSING = {KafkaError.GROUP_ID_NOT_FOUND, KafkaError._UNKNOWN_GROUP}
BUSY = {
    KafkaError.UNKNOWN_MEMBER_ID, KafkaError.NON_EMPTY_GROUP, KafkaError.GROUP_SUBSCRIBED_TO_TOPIC,
    KafkaError.REBALANCE_IN_PROGRESS,
}  # fmt: skip


def check_name(name: object) -> str:
    """The name of a group: what Kafka takes, which is nearly all."""
    if not isinstance(name, str):
        raise InvalidType(f"group {name!r}: expected str")
    if not 1 <= len(name) <= 128 or not name.isprintable():
        raise InvalidArgument(f"group {name!r:.80}: expected 1 to 128 printable characters")
    return name


def committed(stream: KafkaStream, group: str) -> dict[int, int]:
    """The positions that a group has committed in a stream."""
    return _committed(stream, [group])[group]


def _committed(stream: KafkaStream, names: list[str]) -> dict[str, dict[int, int]]:
    admin = stream.store.connection.admin
    places = [TopicPartition(stream.name, index) for index in range(stream.partitions)]

    def request(**patience: float) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name in names:  # the client takes one at a time; the answers come side by side
            asked = [ConsumerGroupTopicPartitions(name, places)]
            made |= admin.list_consumer_group_offsets(asked, require_stable=True, **patience)
        return made

    found = stream.store.connection.ask(request, "groups")
    return {
        name: {one.partition: one.offset for one in answer.topic_partitions if one.offset >= 0}
        for name, answer in found.items()
    }


def names(stream: KafkaStream) -> list[str]:
    """Names of the groups that have a position in a stream, sorted."""
    connection = stream.store.connection
    answer = connection.ask(
        lambda **patience: {0: connection.admin.list_consumer_groups(**patience)}, "groups"
    )
    listed = [one.group_id for one in answer[0].valid]
    return sorted(name for name, found in _committed(stream, listed).items() if found)


class KafkaGroup:
    """A consumer group in a topic; made by `KafkaStream.group`."""

    def __init__(self, stream: KafkaStream, name: str) -> None:
        self.stream = stream
        self.name = check_name(name)
        self._connection = stream.store.connection
        if not committed(stream, name) and not self._members():
            raise NotFound(f"stream {stream.name!r}: there is no group {name!r}")

    def __repr__(self) -> str:
        return f"<KafkaGroup {self.name!r} of {self.stream!r}>"

    def _members(self) -> list[Any]:
        """The members that the server knows, of this stream or of others."""
        request = partial(self._connection.admin.describe_consumer_groups, [self.name])
        try:
            return list(self._connection.ask(request, f"group {self.name!r}")[self.name].members)
        except StorageError as error:
            cause = error.__cause__
            if cause is not None and cause.args[0].code() in MISSING:
                return []
            raise

    def positions(self) -> dict[int, Position | None]:
        """Where the group goes on in each partition."""
        found = committed(self.stream, self.name)
        return {
            index: Position(index, 1, found[index]) if index in found else None
            for index in range(self.stream.partitions)
        }

    def lag(self, partition: int | None = None) -> int:
        """Records that are not committed: of one partition, or of all.

        Up to 1,000 offsets behind a position are looked at, beyond that an offset that is none of a
        record (a transaction's mark, what was aborted or compacted) counts as well.
        """
        if partition is not None:
            self.stream.check_partition(partition)
        return sum(
            one.lag for one in self._parts() if partition is None or one.partition == partition
        )

    health = "sound"
    """A position that was answered is kept as the server keeps it."""

    def members(self) -> list[GroupMember]:
        """The members that live, and what of the stream they have."""
        return list(self.stats().members)

    def partitions(self) -> list[GroupPartition]:
        """Position, end, lag and owner of each partition, as of now."""
        return list(self.stats().partitions)

    def _parts(self, owners: dict[int, int] | None = None) -> list[GroupPartition]:
        positions = committed(self.stream, self.name)
        found = []
        for index, (first, end) in self.stream.bounds(range(self.stream.partitions)).items():
            at = positions.get(index, first)
            lag, since = behind(self.stream, index, max(at, first), end)
            owner = (owners or {}).get(index)
            found.append(
                GroupPartition(index, Position(index, 1, at), end, lag, since, False, owner, 0)
            )
        return found

    def stats(self) -> GroupStats:
        """The group in numbers, as of now."""
        owners: dict[int, int] = {}
        members = []
        for slot, member in enumerate(self._members()):
            assigned = member.assignment.topic_partitions if member.assignment else ()
            mine = tuple(sorted(one.partition for one in assigned if one.topic == self.stream.name))
            owners |= dict.fromkeys(mine, slot)
            members.append(GroupMember(slot, 1, f"member {member.member_id}", 0, mine))
        parts = tuple(self._parts(owners))
        return GroupStats(self.stream.name, self.name, "sound", tuple(members), parts)

    def seek(self, to: Any, *, partition: int | None = None) -> dict[int, Position]:
        """Set where the group goes on; it must have no members. Returns what was set."""
        self.stream.store.check_writable()
        if isinstance(to, Position) and partition is None:
            partition = int(to.partition)
        if partition is None and as_index(to) is not None and self.stream.partitions > 1:
            raise InvalidArgument(f"to {to!r}: an offset is of one partition; say which")
        which = list(range(self.stream.partitions)) if partition is None else [partition]
        goals = self.stream.resolve_all([self.stream.check_partition(i) for i in which], to)
        if self._members():
            raise self._has_members()
        places = [TopicPartition(self.stream.name, index, goal) for index, goal in goals.items()]
        asked = [ConsumerGroupTopicPartitions(self.name, places)]
        request = partial(self._connection.admin.alter_consumer_group_offsets, asked)
        what = f"group {self.name!r}"
        try:
            done = self._connection.ask(request, what)[self.name].topic_partitions
        except MillstreamError as error:
            cause = error.__cause__
            if cause is not None and cause.args[0].code() in BUSY:
                raise self._has_members() from error
            raise
        for one in done:
            if one.error is not None:
                raise self._connection.error_of(one.error, what)
        return {index: Position(index, 1, goal) for index, goal in goals.items()}

    def _has_members(self) -> InvalidArgument:
        return InvalidArgument(
            f"group {self.name!r} of stream {self.stream.name!r} has members; close its consumers"
            " first, or let one of them seek"
        )

    def remove(self) -> None:
        """Forget the group and its positions, in other streams too; it must have no members."""
        self.stream.store.check_writable()
        if self._members():
            raise self._has_members()
        request = partial(self._connection.admin.delete_consumer_groups, [self.name])
        try:
            self._connection.ask(request, f"group {self.name!r}")
        except MillstreamError as error:
            cause = error.__cause__
            if cause is not None and cause.args[0].code() in BUSY:
                raise self._has_members() from error
            raise


def behind(stream: KafkaStream, index: int, at: int, end: int) -> tuple[int, float | None]:
    """How many records there are from an offset on, and the time of the first of them."""
    if at >= end:
        return 0, None
    count, since = 0, None
    most = end - at if end - at <= LAG_MOST else 1
    for batch in stream.batches({index: at}, False, None, most):
        offsets = [offset for offset in batch.offsets.tolist() if offset < end]
        if offsets and since is None:
            since = int(batch.timestamps[0]) / 1e6
        count += len(offsets)
    return (count if end - at <= LAG_MOST else end - at), since


class KafkaConsumer:
    """A member of a consumer group; made by `KafkaStream.consumer`. For one thread."""

    def __init__(
        self,
        stream: KafkaStream,
        group: str,
        start: Any,
        delivery: str,
        auto_commit: bool,
        max_records: int | None,
        timeout: float | None,
        session: float,
        max_processing: float,
        on_lost: str,
        create: bool,
    ) -> None:
        self._closed = True
        if delivery not in ("at_least_once", "at_most_once", "exactly_once"):
            raise InvalidArgument(
                f"delivery {delivery!r}: expected at_least_once, at_most_once or exactly_once"
            )
        if on_lost not in ("raise", "earliest"):
            raise InvalidArgument(f'on_lost {on_lost!r}: expected "raise" or "earliest"')
        stream.store.connection.check_open()
        stream.store.check_writable()
        self.stream = stream
        self.delivery = delivery
        self._auto = boolean("auto_commit", auto_commit)
        if self._auto and delivery == "exactly_once":
            raise InvalidArgument(
                'auto_commit: with delivery="exactly_once" the position is committed by a'
                " transaction"
            )
        self._most = 1000 if max_records is None else integer("max_records", max_records, 1)
        self._timeout = check_timeout(timeout)
        self._session = number("session", session, 0.01, 86400.0)
        self._processing = number("max_processing", max_processing, 0.01, 86400.0)
        self._on_lost = on_lost
        self._start = start
        self._name = check_name(group)
        stream.resolve_all(range(stream.partitions), start)  # what it raises, it raises now
        if not boolean("create", create):
            KafkaGroup(stream, group)
        self._connection = stream.store.connection
        self._next: dict[int, int] = {}
        """Of each partition that is ours: where it reads on."""
        self._committed: dict[int, int] = {}
        self._gone: set[int] = set()
        """Partitions that were lost with records that were handed out and not committed."""
        self._pending: list[tuple[int, list[Any]]] = []
        self._failed: MillstreamError | None = None
        self._lock = threading.RLock()
        self._left = False
        self._due = float(FOREVER)
        """When it has been silent for too long."""
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._watching, name="millstream-kafka", daemon=True)
        self._closed = False
        self._join()
        self._due = time.monotonic() + self._processing
        self._watch.start()

    def __repr__(self) -> str:
        return f"<KafkaConsumer of group {self._name!r}: partitions {self.assignment}>"

    @property
    def group(self) -> KafkaGroup:
        """Its group."""
        return KafkaGroup(self.stream, self._name)

    # --- who has what -----------------------------------------------------------------------------

    def _join(self) -> None:
        milliseconds = max(1, int(self._session * 1000))
        self._client = self._connection.new_consumer(
            {
                "group.id": self._name, "session.timeout.ms": milliseconds,
                "heartbeat.interval.ms": max(1, min(1000, milliseconds // 3)),
                "max.poll.interval.ms": 86_400_000,  # we look after it ourselves
                "partition.assignment.strategy": "cooperative-sticky",
            }
        )  # fmt: skip
        self._left = False
        self._client.subscribe(
            [self.stream.name], on_assign=self._assigned, on_revoke=self._revoked,
            on_lost=self._revoked,
        )  # fmt: skip

    def _watching(self) -> None:
        """Leave the group, so that others go on, when nobody has polled for `max_processing`.

        The client's own max.poll.interval.ms cannot be below the session.
        """
        while not self._ended.wait(min(self._processing, max(0.01, self._due - time.monotonic()))):
            if time.monotonic() >= self._due:
                self._leave()

    def _leave(self) -> None:
        with self._lock:
            if not self._closed and time.monotonic() >= self._due:
                self._left, self._due = True, FOREVER
                self._gone |= {one.partition for one in self.uncommitted()}
                self._next.clear()
                self._committed.clear()
                self._pending.clear()
                self._client.close()  # nobody polls: only this has the group answered for us

    def _assigned(self, client: Any, places: list[Any]) -> None:
        """The group gives us partitions: read on where it stands, or begin where we were told."""
        try:
            which = [one.partition for one in places]
            known = {
                one.partition: one.offset
                for one in client.committed(places, self._connection.timeout)
                if one.offset >= 0
            }
            fresh = [index for index in which if index not in known]
            if fresh:
                known |= self.stream.resolve_all(fresh, self._start)
                begin = [TopicPartition(self.stream.name, i, known[i]) for i in fresh]
                client.commit(offsets=begin, asynchronous=False)
            self._next.update(known)
            self._committed.update(known)
            client.incremental_assign(
                [TopicPartition(self.stream.name, index, known[index]) for index in which]
            )
        except MillstreamError as error:
            self._failed = error
        except Exception as error:  # of the client: poll() raises it
            if not error.args or not isinstance(error.args[0], KafkaError):
                raise
            self._failed = self._connection.error_of(error.args[0], f"group {self._name!r}")

    def _revoked(self, client: Any, places: list[Any]) -> None:
        gone = {one.partition for one in places}
        self._gone |= gone & {one.partition for one in self.uncommitted()}
        for index in gone:
            self._next.pop(index, None)
            self._committed.pop(index, None)
        self._pending = [one for one in self._pending if one[0] not in gone]
        client.incremental_unassign(places)

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"group {self._name!r}: the consumer is closed; join with another")
        self._connection.check_open()

    # --- batches ----------------------------------------------------------------------------------

    def poll(self, timeout: float | None = 0.0) -> Batch | None:
        """The next batch, or None where none came in `timeout` seconds (None: wait for ever)."""
        checked = check_timeout(timeout)
        self._check_open()
        if self._auto and not self._left:
            self.commit()
        deadline = time.monotonic() + (FOREVER if checked is None else checked)
        with self._lock:
            self._due = FOREVER
            if self._left:
                self._join()
            try:
                while True:
                    found = self._take(min(STEP_SECONDS, max(0.0, deadline - time.monotonic())))
                    if found is not None or time.monotonic() >= deadline:
                        return found
            finally:
                self._due = time.monotonic() + self._processing

    def _take(self, wait: float) -> Batch | None:
        if not self._pending:
            self._fetch(wait)
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        if not self._pending:
            return None
        index, found = self._pending[0]
        part, rest = found[: self._most], found[self._most :]
        if rest:
            self._pending[0] = index, rest
        else:
            del self._pending[0]
        self._next[index] = part[-1].offset() + 1
        if self.delivery == "at_most_once":
            self._commit({index: self._next[index]})
        return records.batch(index, part)

    def _fetch(self, wait: float) -> None:
        shares: dict[int, list[Any]] = {}
        for message in self.stream.consume(self._client, max(self._most, 1000), wait):
            error, index = message.error(), message.partition()
            if error is None:
                if message.offset() >= self._next.get(index, FOREVER):
                    shares.setdefault(index, []).append(message)
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                self._lost(index)
            elif error.code() == KafkaError._PARTITION_EOF:
                # What is behind the last record is no record: it is done as soon as that one is.
                if index in self._next and index not in shares:
                    self._next[index] = max(self._next[index], message.offset())
            elif not error.retriable() and error.code() != KafkaError._MAX_POLL_EXCEEDED:
                raise self._connection.error_of(error, f"group {self._name!r}")
        self._pending += list(shares.items())

    def _lost(self, index: int) -> None:
        """The position is in no record that there is."""
        first, end = self.stream.bounds([index])[index]
        at = self._next.get(index, first)
        if at < first and self._on_lost == "earliest":
            self._go({index: first})
            return
        raise OffsetOutOfRange(
            f"group {self._name!r}: offset {at} of partition {index} is not there; there are"
            f" {first} to {end - 1}",
            partition=index, first=first, next=end,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.poll(self._timeout)) is not None:
            yield batch

    # --- positions --------------------------------------------------------------------------------

    def commit(self, batch: Batch | None = None, *, allow_backwards: bool = False) -> None:
        """Keep that all up to here was done. Raises Fenced where another member has it now."""
        self._check_open()
        if self.delivery == "exactly_once":
            raise Unsupported(
                f'group {self._name!r}: delivery is "exactly_once": the position is committed by a'
                " transaction, tx.commit(consumer)"
            )
        if batch is None:
            self._commit({one.partition: one.offset for one in self.uncommitted()})
            return
        index, following = int(batch.partition), int(batch.next_offset)
        at = self._committed.get(index, 0)
        if index in self._next and not allow_backwards and following < at:
            raise InvalidArgument(
                f"group {self._name!r}: partition {index} is at {at} already;"
                " allow_backwards=True goes back"
            )
        self._commit({index: following})

    def _commit(self, goals: dict[int, int]) -> None:
        if not goals:
            return
        lost = tuple(index for index in goals if index not in self._next)
        if lost or self._left or not self._client.memberid():
            raise self._fenced(lost or tuple(goals))
        places = [TopicPartition(self.stream.name, index, goal) for index, goal in goals.items()]
        try:
            done = self._connection.call(
                lambda: self._client.commit(offsets=places, asynchronous=False),
                f"group {self._name!r}",
            )
        except Fenced as error:
            raise self._fenced(tuple(goals)) from error
        for one in done:
            if one.error is not None:
                raise self._connection.error_of(one.error, f"group {self._name!r}")
        self._committed.update(goals)

    def _fenced(self, lost: tuple[int, ...]) -> Fenced:
        return Fenced(
            f"group {self._name!r}: partitions {list(lost)} have another holder now, or this one"
            f" was silent for {self._processing:g} s; nothing was committed",
            partitions=lost,
        )

    def uncommitted(self) -> list[Any]:
        """Where it is beyond what is committed, as the client takes it."""
        return [
            TopicPartition(self.stream.name, index, offset)
            for index, offset in self._next.items()
            if self._committed.get(index) != offset
        ]

    def to_commit(self) -> list[Any]:
        """The same for a transaction. Raises Fenced where it has lost what it handed out."""
        if self._gone:
            raise self._fenced(tuple(sorted(self._gone)))
        return self.uncommitted()

    def was_committed(self, places: list[Any]) -> None:
        """A transaction has committed these."""
        self._committed.update({one.partition: one.offset for one in places})

    def metadata(self) -> Any:
        """Who it is, for a transaction to commit its positions."""
        if self._left:
            raise self._fenced(())
        return self._client.consumer_group_metadata()

    def seek(self, to: Any, *, partition: int | None = None) -> None:
        """Read on from somewhere else; the next commit keeps it, also backwards."""
        self._check_open()
        if isinstance(to, Position) and partition is None:
            partition = int(to.partition)
        if partition is None and as_index(to) is not None and len(self._next) > 1:
            raise InvalidArgument(f"to {to!r}: an offset is of one partition; say which")
        which = sorted(self._next) if partition is None else [partition]
        for index in which:
            if index not in self._next:
                raise InvalidArgument(f"partition {index} is not assigned to this consumer")
        self._go(self.stream.resolve_all(which, to))

    def _go(self, goals: dict[int, int]) -> None:
        """Have the client read on there."""
        if not goals:
            return
        self._pending = [one for one in self._pending if one[0] not in goals]
        places = [TopicPartition(self.stream.name, index, goal) for index, goal in goals.items()]

        def move() -> None:
            self._client.incremental_unassign(places)
            self._client.incremental_assign(places)

        self._connection.call(move, f"group {self._name!r}")
        self._next.update(goals)

    def rewind(self) -> None:
        """Read on from the committed positions."""
        self._check_open()
        self._gone.clear()
        self._go({index: self._committed[index] for index in self._next})

    @property
    def assignment(self) -> list[int]:
        """The partitions that are this consumer's now, sorted."""
        return [] if self._closed else sorted(self._next)

    def lag(self, partition: int | None = None) -> int:
        """Records that are not committed: of one partition, or of all that are assigned."""
        which = self.assignment if partition is None else [self.stream.check_partition(partition)]
        return sum(
            behind(self.stream, index, max(first, self._committed.get(index, first)), end)[0]
            for index, (first, end) in self.stream.bounds(which).items()
        )

    @property
    def closed(self) -> bool:
        """Is it closed?"""
        return self._closed

    def close(self) -> None:
        """Leave the group; the others have its partitions soon. Commits nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._ended.set()
            if not self._left:
                self._client.close()

    def __enter__(self) -> KafkaConsumer:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            if self._auto and raised[0] is None and not self._closed and not self._left:
                self.commit()
        finally:
            self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self.stream.store.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()
