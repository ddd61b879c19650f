"""Consumer groups on NATS: the records of a JetStream stream.

The JetStream stream ``groups~orders`` keeps the last message of each subject: ``GROUP.PARTITION``
says the position and who holds the partition, ``GROUP.m.MEMBER`` that a member lives; the server
removes it when its time to live is over. The version of a record is the sequence of its message.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from millstream.engines.groups import Conflict, TableConsumer, TableGroup, check_name
from millstream.engines.nats import records
from millstream.engines.nats.connection import NOT_FOUND, WRONG_SEQUENCE, ApiError

if TYPE_CHECKING:
    from millstream.engines.nats.streams import NatsStream

__all__ = ["NatsConsumer", "NatsGroup"]


class Table:
    """The records of one group."""

    def __init__(self, stream: NatsStream, group: str) -> None:
        self.stream = stream
        self.group = check_name(group)
        self.name = f"groups~{stream.name}"
        self.prefix = f"{self.name}.{self.group.replace('.', '~')}"
        self.connection = stream.store.connection

    def make(self) -> None:
        """Make the stream that holds them, where it is not there."""
        config = {
            "name": self.name, "subjects": [f"{self.name}.>"], "max_msgs_per_subject": 1,
            "allow_msg_ttl": True, "discard": "old",
        }  # fmt: skip
        self.stream.store.make(config, {"kind": "groups", "name": self.stream.name})

    def subjects(self) -> dict[str, int]:
        """Subjects of the group that have a message, behind its prefix."""
        try:
            found = self.connection.call(
                self.connection.api(
                    f"STREAM.INFO.{self.name}", {"subjects_filter": f"{self.prefix}.>"}
                )
            )
        except ApiError as error:
            if error.err_code in NOT_FOUND:
                return {}
            raise self.connection.refused(error, self.name) from error
        listed = found["state"].get("subjects") or {}
        return {name[len(self.prefix) + 1 :]: count for name, count in listed.items()}

    def load(self, partition: int) -> tuple[int, dict[str, Any]] | None:
        """Sequence and content of the record of a partition."""
        body = {"last_by_subj": f"{self.prefix}.{partition}"}
        work = self.connection.collect(f"$JS.API.DIRECT.GET.{self.name}", body, 10.0, 1)
        try:
            found = self.connection.call(work, 10.0)
        except ApiError as error:
            raise self.connection.refused(error, self.name) from error
        if not found:
            return None
        stored = records.Stored(found[0])
        content: dict[str, Any] = json.loads(stored.data)
        return stored.sequence, content

    def store(self, partition: int, content: dict[str, Any], expected: int) -> int:
        """Replace the record whose sequence is `expected`; the new one's.

        Raises: Conflict where it is another one.
        """
        work = self.connection.publish(
            f"{self.prefix}.{partition}",
            json.dumps(content).encode(),
            {"Nats-Expected-Last-Subject-Sequence": str(expected)},
            f"group {self.group!r}, partition {partition}",
        )
        try:
            return int(self.connection.call(work)["seq"])
        except ApiError as error:
            if error.err_code in WRONG_SEQUENCE:
                raise Conflict(self.prefix) from error
            raise self.connection.refused(error, self.name) from error

    def known(self) -> bool:
        """Has any partition a position?"""
        return any(key.isdigit() for key in self.subjects())

    def members(self) -> set[str]:
        """The members that live."""
        return {name[2:] for name in self.subjects() if name.startswith("m.")}

    async def live(self, member: str, seconds: float) -> None:
        """Say that a member lives, for so long."""
        await self.connection.publish(
            f"{self.prefix}.m.{member}",
            b"",
            {"Nats-TTL": f"{max(1, math.ceil(seconds))}s"},
            f"group {self.group!r}",
        )

    async def leave(self, member: str) -> None:
        """Say that it does not live any more."""
        body = json.dumps({"filter": f"{self.prefix}.m.{member}"}).encode()
        await self.connection.ask(f"$JS.API.STREAM.PURGE.{self.name}", body)

    def clear(self) -> None:
        """Forget all of them."""
        self.connection.do(f"STREAM.PURGE.{self.name}", {"filter": f"{self.prefix}.>"})


def names(stream: NatsStream) -> list[str]:
    """Names of the groups of a stream, sorted."""
    table = Table(stream, "x")
    table.prefix = table.name
    subjects = table.subjects()
    return sorted(
        {name.split(".")[0].replace("~", ".") for name in subjects if name.split(".")[1] != "m"}
    )


class NatsGroup(TableGroup):
    """A consumer group of a stream on NATS; made by `NatsStream.group`."""

    @staticmethod
    def table(stream: NatsStream, name: str) -> Table:
        """The table that the engine keeps a group in."""
        return Table(stream, name)


class NatsConsumer(TableConsumer):
    """A member of a consumer group on NATS; made by `NatsStream.consumer`. For one thread."""

    @staticmethod
    def table(stream: NatsStream, name: str) -> Table:
        """The table that the engine keeps a group in."""
        return Table(stream, name)

    @staticmethod
    def group_of(stream: NatsStream, name: str) -> NatsGroup:
        """The group."""
        return NatsGroup(stream, name)
