"""Consumer groups on RabbitMQ: records of a stream of their own for each stream.

``GROUP/PARTITION`` says the position and who holds the partition, ``GROUP/m/MEMBER`` that a member
lives, and for how long; the server's own clock says since when. RabbitMQ's own stored offsets would
each take an offset of the stream themselves, and any member could overwrite them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from millstream.engines.groups import TableConsumer, TableGroup
from millstream.engines.rabbitmq.table import Table

if TYPE_CHECKING:
    from millstream.engines.rabbitmq.streams import RabbitStream

__all__ = ["RabbitConsumer", "RabbitGroup"]


class GroupTable:
    """The records of one group."""

    def __init__(self, stream: RabbitStream, group: str) -> None:
        self.group = group
        self.connection = stream.store.connection
        self._table = stream.store.table(f"millstream.groups.{stream.name}")

    def make(self) -> None:
        """Make the stream that holds them, where it is not there."""
        self.connection.call(self._table.make())

    def _refresh(self) -> None:
        self.connection.call(self._table.refresh())

    def known(self) -> bool:
        """Has any partition a position?"""
        self._refresh()
        return any(name.startswith(f"{self.group}/") and name.rpartition("/")[2].isdigit()
                   and "/m/" not in name for name in list(self._table.content))  # fmt: skip

    def load(self, partition: int) -> tuple[int, dict[str, Any]] | None:
        """Version and content of the record of a partition."""
        self._refresh()
        key = f"{self.group}/{partition}"
        content = self._table.content.get(key)
        return None if content is None else (self._table.version[key], content)

    def store(self, partition: int, content: dict[str, Any], expected: int) -> int:
        """Replace the record whose version is `expected`; the new one's. Raises Conflict."""
        key = f"{self.group}/{partition}"
        return self.connection.call(self._table.store(key, content, expected))

    def members(self) -> set[str]:
        """The members that live, by the server's clock."""
        self._refresh()
        prefix = f"{self.group}/m/"
        now = self._table.clock()
        return {
            key.removeprefix(prefix)
            for key, seconds in list(self._table.content.items())
            if key.startswith(prefix) and now - self._table.time[key] < seconds * 1000
        }

    async def live(self, member: str, seconds: float) -> None:
        """Say that a member lives, for so long."""
        await self._table.store(f"{self.group}/m/{member}", seconds, None)

    async def leave(self, member: str) -> None:
        """Say that it does not live any more."""
        await self._table.store(f"{self.group}/m/{member}", None, None)

    def clear(self) -> None:
        """Forget all of them."""
        for key in [key for key in self._table.content if key.startswith(f"{self.group}/")]:
            self.connection.call(self._table.store(key, None, None))


def names(stream: RabbitStream) -> list[str]:
    """Names of the groups of a stream, sorted."""
    table: Table = stream.store.table(f"millstream.groups.{stream.name}")
    stream.store.connection.call(table.refresh())
    return sorted({key.partition("/")[0] for key in table.content if "/m/" not in key})


class RabbitGroup(TableGroup):
    """A consumer group of a stream on RabbitMQ; made by `RabbitStream.group`."""

    @staticmethod
    def table(stream: RabbitStream, name: str) -> GroupTable:
        """The table that the engine keeps a group in."""
        return GroupTable(stream, name)


class RabbitConsumer(TableConsumer):
    """A member of a consumer group on RabbitMQ; made by `RabbitStream.consumer`. For one thread."""

    @staticmethod
    def table(stream: RabbitStream, name: str) -> GroupTable:
        """The table that the engine keeps a group in."""
        return GroupTable(stream, name)

    @staticmethod
    def group_of(stream: RabbitStream, name: str) -> RabbitGroup:
        """The group."""
        return RabbitGroup(stream, name)
