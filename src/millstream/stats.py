"""What `Stream.stats` returns."""

from __future__ import annotations

import dataclasses
from typing import Literal

from millstream.options import Durability, Retention


@dataclasses.dataclass(frozen=True)
class PartitionStats:
    """One partition: offsets, bytes and health."""

    partition: int
    first_offset: int
    next_offset: int
    durable_offset: int
    records: int
    """Offsets from first to next; after compaction or repair some of them have no record."""
    log_bytes: int
    """Bytes of log that can be read."""
    allocated_bytes: int
    """Bytes of disk that its files take."""
    segments: int
    health: Literal["sound", "sync failed", "corrupt"]


@dataclasses.dataclass(frozen=True)
class StreamStats:
    """A stream: the sums, and each partition."""

    name: str
    durability: Durability
    """What an append through this handle has survived when it returns."""
    retention: Retention
    segment_bytes: int
    records: int
    log_bytes: int
    allocated_bytes: int
    partitions: tuple[PartitionStats, ...]
    producers: int = 0
    """Ids of idempotent producers that were ever registered."""
