"""Consumer groups over a table of records that change by compare-and-set.

A record says the position of a partition and who holds it; whoever writes it names the version that
it replaces, so that one who lost the partition cannot write any more. Members say from time to time
that they live. Time decides who tries, never who may.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
import warnings
from typing import TYPE_CHECKING, Any, Protocol, Self

from millstream import GroupMember, GroupPartition, GroupStats
from millstream._native import Position
from millstream.errors import (
    Closed,
    Fenced,
    InvalidArgument,
    InvalidType,
    MillstreamError,
    NotFound,
    OffsetOutOfRange,
)
from millstream.options import FOREVER, as_index, boolean, check_timeout, integer, number

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    from millstream import Batch

__all__ = ["Conflict", "Places", "Table", "TableConsumer", "TableGroup", "check_name"]

LOOK_SECONDS = 0.1
"""How often a consumer looks who is there, beside its reading."""
NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")


def check_name(name: object) -> str:
    """The name of a group."""
    if not isinstance(name, str):
        raise InvalidType(f"group {name!r}: expected str")
    if not NAME.fullmatch(name):
        raise InvalidArgument(
            f"group {name!r:.80}: expected 1 to 128 characters of A-Z a-z 0-9 . _ - without a"
            " leading dot"
        )
    return name


class Conflict(Exception):
    """A record was changed by somebody else."""


class Table(Protocol):
    """The records of one group."""

    connection: Any
    group: str

    def make(self) -> None:
        """Make what holds them, where it is not there."""
        ...

    def known(self) -> bool:
        """Has any partition a position?"""
        ...

    def load(self, partition: int) -> tuple[int, dict[str, Any]] | None:
        """Version and content of the record of a partition."""
        ...

    def store(self, partition: int, content: dict[str, Any], expected: int) -> int:
        """Replace the record whose version is `expected` (0: there is none); the new version.

        Raises: Conflict.
        """
        ...

    def members(self) -> set[str]:
        """The members that live."""
        ...

    def live(self, member: str, seconds: float) -> Coroutine[Any, Any, Any]:
        """Say that a member lives, for so long."""
        ...

    def leave(self, member: str) -> Coroutine[Any, Any, Any]:
        """Say that it does not live any more."""
        ...

    def clear(self) -> None:
        """Forget all of them."""
        ...


class Places(Protocol):
    """Where a consumer reads in each partition."""

    def fetch(self, partition: int, offset: int, most: int) -> Sequence[Any]:
        """Records from an offset on, at most `most`; none where there is none yet."""
        ...

    def close(self) -> None:
        """Let go of them."""
        ...


class TableGroup:
    """A consumer group of a stream, whose records are in a `Table`."""

    def __init__(self, stream: Any, name: str) -> None:
        self.stream = stream
        self.name = check_name(name)
        self._table = self.table(stream, name)
        if not self._table.known():
            raise NotFound(f"stream {stream.name!r}: there is no group {name!r}")

    @staticmethod
    def table(stream: Any, name: str) -> Table:
        """The table that the engine keeps a group in."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} of {self.stream!r}>"

    def positions(self) -> dict[int, Position | None]:
        """Where the group goes on in each partition."""
        found: dict[int, Position | None] = {}
        for index in range(self.stream.partitions):
            loaded = self._table.load(index)
            found[index] = None if loaded is None else Position(index, 1, loaded[1]["next"])
        return found

    def lag(self, partition: int | None = None) -> int:
        """Records that are not committed: of one partition, or of all."""
        positions = self.positions()
        which = range(self.stream.partitions) if partition is None else [partition]
        behind = 0
        for index in which:
            position = positions[index]
            at = 0 if position is None else int(position.offset)
            behind += max(0, self.stream.next_offset(index) - at)
        return behind

    health = "sound"
    """A position that was answered is kept as the server keeps it."""

    def members(self) -> list[GroupMember]:
        """The members that live, and what of it they have."""
        return list(self.stats().members)

    def partitions(self) -> list[GroupPartition]:
        """Position, end, lag and owner of each partition, as of now."""
        return list(self.stats().partitions)

    def _since(self, index: int, at: int) -> float | None:
        """Timestamp of the first record that is not committed; None: there is none."""
        found = self.stream.fetch(index, at, 1)
        return found[0].timestamp / 1e6 if found else None

    def stats(self) -> GroupStats:
        """The group in numbers, as of now."""
        living = sorted(self._table.members())
        parts: list[GroupPartition] = []
        held: dict[str, list[int]] = {member: [] for member in living}
        for index in range(self.stream.partitions):
            sequence, content = self._table.load(index) or (0, {"next": 0, "member": ""})
            if content["member"] in held:
                held[content["member"]].append(index)
            owner = living.index(content["member"]) if content["member"] in held else None
            end, at = self.stream.next_offset(index), int(content["next"])
            parts.append(
                GroupPartition(
                    index,
                    Position(index, 1, at),
                    end,
                    max(0, end - at),
                    self._since(index, at),
                    False,
                    owner,
                    sequence,
                )
            )
        members = tuple(
            GroupMember(slot, 1, f"member {member}", 0, tuple(held[member]))
            for slot, member in enumerate(living)
        )
        return GroupStats(self.stream.name, self.name, "sound", members, tuple(parts))

    def seek(self, to: Any, *, partition: int | None = None) -> dict[int, Position]:
        """Set where the group goes on; it must have no members. Returns what was set."""
        self.stream.store.check_writable()
        if isinstance(to, Position) and partition is None:
            partition = int(to.partition)
        if partition is None and as_index(to) is not None and self.stream.partitions > 1:
            raise InvalidArgument(f"to {to!r}: an offset is of one partition; say which")
        which = range(self.stream.partitions) if partition is None else [partition]
        goals = {index: self.stream.resolve(index, to) for index in which}
        living = self._table.members()
        for index, goal in goals.items():
            loaded = self._table.load(index)
            sequence, content = loaded or (0, {"member": ""})
            try:
                if content["member"] in living:
                    raise self._has_members()
                self._table.store(index, {"next": goal, "member": ""}, sequence)
            except Conflict as error:
                raise self._has_members() from error
        return {index: Position(index, 1, goal) for index, goal in goals.items()}

    def _has_members(self) -> InvalidArgument:
        return InvalidArgument(
            f"group {self.name!r} of stream {self.stream.name!r} has members; close its consumers"
            " first, or let one of them seek"
        )

    def remove(self) -> None:
        """Forget the group and its positions; it must have no members."""
        self.stream.store.check_writable()
        if self._table.members():
            raise self._has_members()
        self._table.clear()


class TableConsumer:
    """A member of such a group. For one thread."""

    def __init__(
        self,
        stream: Any,
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
        if delivery not in ("at_least_once", "at_most_once"):
            raise InvalidArgument(f"delivery {delivery!r}: expected at_least_once or at_most_once")
        if on_lost not in ("raise", "earliest"):
            raise InvalidArgument(f'on_lost {on_lost!r}: expected "raise" or "earliest"')
        stream.store.check_writable()
        self.stream = stream
        self.delivery = delivery
        self._auto = boolean("auto_commit", auto_commit)
        self._most = 1000 if max_records is None else integer("max_records", max_records, 1)
        self._timeout = check_timeout(timeout)
        self._session = number("session", session, 0.01, 86400.0)
        self._processing = number("max_processing", max_processing, 0.01, 86400.0)
        self._on_lost = on_lost
        self._table = self.table(stream, check_name(group))
        self._member = os.urandom(8).hex()
        self._held: dict[int, int] = {}
        """Of each partition that is ours: the sequence of our record."""
        self._next: dict[int, int] = {}
        """Where it reads on."""
        self._committed: dict[int, int] = {}
        self._asked = time.monotonic()
        self._looked = 0.0
        self._turn = 0
        self._places: Places = stream.places()
        self._working = False
        if not boolean("create", create):
            self.group_of(stream, group)
        self._table.make()
        self._begin(start)
        self._table.connection.call(self._table.live(self._member, self._session))
        self._closed = False
        self._heart = asyncio.run_coroutine_threadsafe(self._beat(), stream.store.loop)
        self.group = self.group_of(stream, group)
        self._look()

    @staticmethod
    def table(stream: Any, name: str) -> Table:
        """The table that the engine keeps a group in."""
        raise NotImplementedError

    @staticmethod
    def group_of(stream: Any, name: str) -> TableGroup:
        """The group."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of group {self.group.name!r}: partitions {self.assignment}>"

    def _begin(self, start: Any) -> None:
        """Write the first position of each partition that has none."""
        for index in range(self.stream.partitions):
            if self._table.load(index) is None:
                goal = self.stream.resolve(index, start)
                with contextlib.suppress(Conflict):  # another member was first
                    self._table.store(index, {"next": goal, "member": ""}, 0)

    # --- who has what -----------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Say that we live, as long as batches are asked for; else let go of everything."""
        while True:  # until close() cancels it
            await asyncio.sleep(min(self._session / 3, self._processing / 2))
            if time.monotonic() - self._asked > self._processing and not self._working:
                with contextlib.suppress(Exception):  # the server is away: the time to live ends
                    await self._table.leave(self._member)
                continue
            with contextlib.suppress(Exception):  # the server is away: the next beat, or the end
                await self._table.live(self._member, self._session)

    def _look(self) -> None:
        """Take up what is free and ours by turn, and give back what is another one's."""
        self._looked = time.monotonic()
        living = self._table.members()
        if self._member not in living:
            self._table.connection.call(self._table.live(self._member, self._session))
            living.add(self._member)
        order = sorted(living)
        mine = order.index(self._member)
        for index in range(self.stream.partitions):
            wanted = index % len(order) == mine
            if index in self._held and not wanted:
                self._release(index)
            elif wanted and index not in self._held:
                self._claim(index, living)

    def _claim(self, index: int, living: set[str]) -> None:
        loaded = self._table.load(index)
        if loaded is None:
            return
        sequence, content = loaded
        if content["member"] in living and content["member"] != self._member:
            return
        try:
            taken = {"next": content["next"], "member": self._member}
            self._held[index] = self._table.store(index, taken, sequence)
        except Conflict:
            return  # another one was first
        self._next[index] = self._committed[index] = int(content["next"])

    def _release(self, index: int) -> None:
        sequence = self._held.pop(index)
        self._next.pop(index, None)
        with contextlib.suppress(Conflict):  # it is another one's already
            content = {"next": self._committed.pop(index), "member": ""}
            self._table.store(index, content, sequence)

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"group {self._table.group!r}: the consumer is closed; join with another")
        self._table.connection.check_open()

    # --- batches ----------------------------------------------------------------------------------

    def poll(self, timeout: float | None = 0.0) -> Batch | None:
        """The next batch, or None where none came in `timeout` seconds (None: wait for ever)."""
        checked = check_timeout(timeout)
        self._check_open()
        if self._auto:
            self.commit()
        deadline = time.monotonic() + (FOREVER if checked is None else checked)
        self._working = True
        try:
            while True:
                if time.monotonic() - self._looked > LOOK_SECONDS:
                    self._look()
                found = self._fetch()
                if found is not None or time.monotonic() >= deadline:
                    return found
                time.sleep(min(0.02, max(0.0, deadline - time.monotonic())))
        finally:
            self._asked = time.monotonic()
            self._working = False

    def _fetch(self) -> Batch | None:
        order = sorted(self._held)
        for step in range(len(order)):
            index = order[(self._turn + step) % len(order)]
            found = self._places.fetch(index, self._next[index], self._most)
            if not found:
                continue
            at = self._next[index]
            if found[0].sequence - 1 > at:
                first = self.stream.first_offset(index)
                if at < first and self._on_lost == "raise":
                    raise OffsetOutOfRange(
                        f"group {self._table.group!r}: offset {at} of partition {index} is gone;"
                        f" the first is {first}",
                        partition=index, first=first, next=self.stream.next_offset(index),
                    )  # fmt: skip
            self._turn = (self._turn + step + 1) % len(order)
            self._next[index] = found[-1].sequence
            if self.delivery == "at_most_once":
                self._commit(index, found[-1].sequence, False)
            made: Batch = self.stream.batch(index, found)
            return made
        return None

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.poll(self._timeout)) is not None:
            yield batch

    # --- positions --------------------------------------------------------------------------------

    def commit(self, batch: Batch | None = None, *, allow_backwards: bool = False) -> None:
        """Keep that all up to here was done. Raises Fenced where another member has it now."""
        self._check_open()
        if batch is None:
            for index, offset in list(self._next.items()):
                if index in self._held and self._committed[index] != offset:
                    self._commit(index, offset, True)
            return
        index = int(batch.partition)
        if index in self._held and not allow_backwards:
            at = self._committed[index]
            if int(batch.next_offset) < at:
                raise InvalidArgument(
                    f"group {self._table.group!r}: partition {index} is at {at} already;"
                    " allow_backwards=True goes back"
                )
        self._commit(index, int(batch.next_offset), True)

    def _commit(self, index: int, offset: int, told: bool) -> None:
        sequence = self._held.get(index)
        if sequence is not None:
            try:
                content = {"next": offset, "member": self._member}
                self._held[index] = self._table.store(index, content, sequence)
                self._committed[index] = offset
                return
            except Conflict:
                self._held.pop(index)
                self._next.pop(index, None)
        raise Fenced(
            f"group {self._table.group!r}: partition {index} has another holder now, or this one"
            f" was silent for {self._processing:g} s; nothing was committed",
            partitions=(index,),
        )

    def seek(self, to: Any, *, partition: int | None = None) -> None:
        """Read on from somewhere else; the next commit keeps it, also backwards."""
        self._check_open()
        if isinstance(to, Position) and partition is None:
            partition = int(to.partition)
        if partition is None and as_index(to) is not None and len(self._held) > 1:
            raise InvalidArgument(f"to {to!r}: an offset is of one partition; say which")
        which = sorted(self._held) if partition is None else [partition]
        for index in which:
            if index not in self._held:
                raise InvalidArgument(f"partition {index} is not assigned to this consumer")
        for index, goal in [(index, self.stream.resolve(index, to)) for index in which]:
            self._next[index] = goal

    def rewind(self) -> None:
        """Read on from the committed positions."""
        self._check_open()
        self._next.update({index: self._committed[index] for index in self._held})

    @property
    def assignment(self) -> list[int]:
        """The partitions that are this consumer's now, sorted."""
        return [] if self._closed else sorted(self._held)

    def lag(self, partition: int | None = None) -> int:
        """Records that are not committed: of one partition, or of all that are assigned."""
        which = self.assignment if partition is None else [partition]
        return sum(
            max(0, self.stream.next_offset(index) - self._committed.get(index, 0))
            for index in which
        )

    @property
    def closed(self) -> bool:
        """Is it closed?"""
        return self._closed

    def close(self) -> None:
        """Leave the group; the others have its partitions at once. Commits nothing."""
        if self._closed:
            return
        self._closed = True
        self._heart.cancel()
        with contextlib.suppress(MillstreamError):  # the server is away: the time to live ends
            for index in list(self._held):
                self._release(index)
            self._table.connection.call(self._table.leave(self._member))
        self._places.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            if self._auto and raised[0] is None and not self._closed:
                self.commit()
        finally:
            self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self.stream.store.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()
