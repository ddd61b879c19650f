"""The consumer groups of a stream: what `Stream` does for them. All imported late."""

from __future__ import annotations

from functools import partial

from millstream import _native
from millstream.disk import files
from millstream.errors import MillstreamError, NotFound, each_of
from millstream.log import settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from typing import Any, Literal, TypeAlias

    from millstream._native import Position
    from millstream.groups.consumer import Consumer
    from millstream.groups.group import Group
    from millstream.streams.stream import Stream

    GroupStart: TypeAlias = (
        int | Position | Sequence[Position] | datetime | Literal["earliest", "latest"]
    )
    Delivery: TypeAlias = Literal["at_most_once", "at_least_once", "exactly_once"]
    Told: TypeAlias = Callable[[list[int]], object]

__all__ = ["StreamGroups"]


class StreamGroups(_native.StreamCore):
    """Base of `millstream.Stream`."""

    name: str
    path: files.Path
    _groups: dict[str, Group]
    _consumers: weakref.WeakSet[Consumer]

    def _check_live(self) -> None:
        raise NotImplementedError

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
        stream: Stream = self  # type: ignore[assignment]
        if not settings.check_create(create):
            self._group(group)  # raises
        return Consumer(
            stream, group, start=start, delivery=delivery, auto_commit=auto_commit,
            max_records=max_records, timeout=timeout, session=session,
            max_processing=max_processing, on_lost=on_lost, on_assign=on_assign,
            on_revoke=on_revoke,
        )  # fmt: skip

    def groups(self) -> list[str]:
        """Names of the consumer groups, sorted."""
        with _native.loading:
            from millstream.groups import group
        self._check_live()
        return group.names(self.path)

    def group(self, name: str) -> Group:
        """A consumer group, to look at its positions, lag and members, to set or to remove it.

        Raises: NotFound.
        """
        return self._group(name)

    def _group(self, name: str, *, make: Any = None) -> Group:
        """Open a group; with `make`, where it begins, also one that is not there."""
        with _native.loading:
            from millstream.groups import group
        self._check_live()
        stream: Stream = self  # type: ignore[assignment]
        known: Group | None = self._groups.get(settings.check_name(name))
        if known is not None and not known.closed and known._state == group.LIVE:
            known._follow()
            return known
        if known is not None:
            known._dispose()
        while True:
            if make is not None and not files.exists(group.path_of(stream, name)):
                group.create(stream, name, make)
            try:
                known = self._groups[name] = group.Group(stream, name)
                known._decide = stream.session.undecided.settle_position
            except NotFound:
                if make is None:
                    raise
            else:
                known._follow()
                return known

    def _close_groups(self) -> list[Exception]:
        """Leave the groups, and sync what was committed here; what failed."""
        failed: list[Exception] = []
        for consumer in list(self._consumers):
            try:
                consumer.close()
            except (MillstreamError, OSError) as error:
                failed.append(error)
        for group in self._groups.values():
            try:
                if not group.closed and group._state == 1 and group._take_changed():
                    group._make_durable()
            except (MillstreamError, OSError) as error:
                failed.append(error)
        return failed

    def _flush_groups(self) -> None:
        def flush(name: str) -> None:
            self._group(name)._make_durable()

        each_of([partial(flush, name) for name in self.groups()])

    def _dispose_groups(self) -> None:
        for consumer in list(self._consumers):
            consumer._abandon()
            consumer._member.ended()
        for group in self._groups.values():
            group._dispose()
        self._groups.clear()
