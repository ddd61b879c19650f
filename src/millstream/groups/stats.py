"""What `Group` returns."""

from __future__ import annotations

import dataclasses

from millstream._native import Position


@dataclasses.dataclass(frozen=True)
class GroupMember:
    """A consumer of a group."""

    slot: int
    """Its place among the members, by which `GroupPartition.owner` names it."""
    number: int
    """How often the place was taken before, plus 1."""
    process: str
    joined: int
    """Microseconds since 1970."""
    partitions: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class GroupPartition:
    """Where a group is in one partition."""

    partition: int
    position: Position | None
    """Where it goes on; None: at offset 0, nothing was committed."""
    next_offset: int
    lag: int
    lost: bool
    """A power cut took records that the group had seen: reading there is refused."""
    owner: int | None
    """Slot of the member that reads it; None: nobody, or one that is dead."""
    fence: int
    """Rises with each owner."""


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
GroupMember.__module__ = "millstream"
GroupPartition.__module__ = "millstream"
