"""The consumer groups of a store: what closing does for them."""

from __future__ import annotations

from millstream import _native
from millstream.disk import files
from millstream.store.queues import StoreQueues

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream.options import Durability
    from millstream.streams.stream import Stream

__all__ = ["StoreGroups"]


class StoreGroups(StoreQueues):
    """Base of `millstream.Store`: the hooks of its opening and closing, for groups as well."""

    _streams: dict[tuple[str, Durability | None], Stream]

    def _names(self) -> list[str]:
        raise NotImplementedError

    def _stream_path(self, name: str) -> files.Path:
        raise NotImplementedError

    def _sync_queues(self) -> list[Exception]:
        failed = super()._sync_queues()  # first: these may find that it cannot be done now
        return [*failed, *(e for stream in self._streams.values() for e in stream._close_groups())]

    def _settle_queues(self) -> bool:
        with _native.loading:
            from millstream.groups import group
        settled = [group.settle(self._stream_path(name)) for name in self._names()]
        return all(settled) and super()._settle_queues()
