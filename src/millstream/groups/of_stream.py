"""The consumer groups of a stream: the handles that this process has, and its consumers."""

from __future__ import annotations

import contextlib
import weakref
from functools import partial

from millstream import _native
from millstream.disk import files
from millstream.errors import Closed, MillstreamError, NotFound, each_of
from millstream.log import settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from typing import Any, Literal, TypeAlias

    from millstream._native import Position
    from millstream.groups.consumer import Consumer
    from millstream.groups.group import Group
    from millstream.log.handle import StreamHandle

    GroupStart: TypeAlias = (
        int | Position | Sequence[Position] | datetime | Literal["earliest", "latest"]
    )
    Delivery: TypeAlias = Literal["at_most_once", "at_least_once", "exactly_once"]
    Told: TypeAlias = Callable[[list[int]], object]

__all__ = ["Groups"]


class Groups:
    """By name. `group` is imported late: not every stream has one.

    Attributes:
        stream: the stream.
        consumers: those that are open here.
    """

    def __init__(self, stream: StreamHandle) -> None:
        self.stream = stream
        self.consumers: weakref.WeakSet[Consumer] = weakref.WeakSet()
        self._handles: dict[str, Group] = {}

    def names(self) -> list[str]:
        """Names of all that are there, sorted."""
        with _native.loading:
            from millstream.groups import group
        return group.names(self.stream.path)

    def open(self, name: str, *, make: Any = None) -> Group:
        """Open a group; with `make`, where it begins, also one that is not there."""
        with _native.loading:
            from millstream.groups import group
        stream = self.stream
        stream._keep_up()
        known: Group | None = self._handles.get(settings.check_name(name))
        if known is not None and not known.closed and not known.removed:
            with contextlib.suppress(Closed):  # removed between, or the stream is
                known._follow()
                return known
        if known is not None:
            known._dispose()
        while True:
            if make is not None and not files.exists(group.path_of(stream, name)):
                group.create(stream, name, make)
            try:
                known = self._handles[name] = group.Group(stream, name)
                known._decide = stream.session.undecided.decide_position
                known._follow()
                return known
            except NotFound:
                if make is None:
                    raise
            except Closed:
                if known is None or not known.removed:
                    raise
                return self.open(name, make=make)  # removed between

    def tune(self) -> None:
        """The level of the stream is another one."""
        for group in self._handles.values():
            group._tune()

    def close(self) -> list[Exception]:
        """Leave the groups, and sync what was committed here; what failed."""
        failed: list[Exception] = []
        for consumer in list(self.consumers):
            try:
                consumer.close()
            except (MillstreamError, OSError) as error:
                failed.append(error)
        for group in self._handles.values():
            try:
                if not group.closed and group._state == 1 and group._take_changed():
                    group._make_durable()
            except (MillstreamError, OSError) as error:
                failed.append(error)
        return failed

    def flush(self) -> None:
        """Sync the positions of all groups, whoever committed them."""

        def flush(name: str) -> None:
            self.open(name)._make_durable()

        each_of([partial(flush, name) for name in self.names()])

    def dispose(self) -> None:
        """Give up all handles."""
        for consumer in list(self.consumers):
            consumer._abandon()
            consumer._member.ended()
        for group in self._handles.values():
            group._dispose()
        self._handles.clear()
