"""What `Group` returns."""

from __future__ import annotations

import dataclasses
import time

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
    lag_since: float | None
    """Timestamp of the first record that it has not committed, seconds since 1970; None: there is
    none, or it cannot be read."""
    lost: bool
    """A power cut took records that the group had seen: reading there is refused."""
    owner: int | None
    """Slot of the member that reads it; None: nobody, or one that is dead."""
    fence: int
    """Rises with each owner."""

    @property
    def lag_seconds(self) -> float:
        """Seconds from `lag_since` until now; 0: there is no lag."""
        return 0.0 if self.lag_since is None else max(0.0, time.time() - self.lag_since)


@dataclasses.dataclass(frozen=True)
class GroupStats:
    """A consumer group in numbers."""

    stream: str
    name: str
    health: str
    """As `Group.health`; "corrupt": a power cut left no copy of a position."""
    members: tuple[GroupMember, ...]
    partitions: tuple[GroupPartition, ...]
    """None, where it is corrupt."""

    @property
    def lag(self) -> int:
        """Records that are not committed, of all partitions."""
        return sum([part.lag for part in self.partitions])

    @property
    def lag_seconds(self) -> float:
        """That of the partition that is furthest behind in time."""
        behind = [part.lag_since for part in self.partitions if part.lag_since is not None]
        return max(0.0, time.time() - min(behind)) if behind else 0.0


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
GroupMember.__module__ = "millstream"
GroupPartition.__module__ = "millstream"
GroupStats.__module__ = "millstream"
