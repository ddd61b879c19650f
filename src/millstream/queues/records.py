"""What a queue tells about itself: frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from millstream.frozen import frozen
from millstream.options import RetryPolicy

__all__ = ["DeadLetter", "QueueStats", "StoredMessage"]

REASONS = {
    1: "failed",
    2: "the lease ran out",
    3: "its holder died",
    4: "rejected",
    5: "not decodable",
    6: "torn or corrupt",
}


SHOWN_BYTES = 40
EARLIEST, LATEST = -62_135_596_800_000_000, 253_402_300_799_999_999
"""Microseconds since 1970 of the first and the last datetime that there is."""


def moment(microseconds: int) -> datetime:
    """A time of a file as a datetime; in a damaged message it may be any number."""
    within = min(max(microseconds, EARLIEST), LATEST)
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=within)


@dataclass(frozen=True)
class QueueStats:
    """A queue in numbers, as of one pass over its messages.

    Attributes:
        ready, delayed, held, leased, dead: messages in that state; held ones wait for another
            message of their key. Where a lease is over, or its holder is proved dead, the message
            is ready, or dead after its last attempt, also for a reader. A delay that has ended is
            seen once a process that writes has met it.
        by_priority: the ready ones.
        oldest_age: seconds for which the ready message waits that has waited longest: since it was
            put or due, of one that failed since it was ready again. None: none is ready.
        unfinished: all but the dead: what `capacity` bounds. Where a message's last lease ended
            with its holder it counts, as in `len(queue)`, until a writer makes it a dead letter.
        put, done: messages that were put, and that were acknowledged. These and the next are
            totals since the queue was made (or first opened to write by a version that counts), of
            all processes; they go on over restarts and copies of the store. They cost nothing where
            messages are put and acknowledged: `put` is the ids given, `done` is what was put and
            neither stands nor ended otherwise. Read beside others both may be a few short, and are
            right once those pause; through one handle they never fall. A kill in the middle of a
            put, an acknowledgement or a removal may move one message from one total to another, or
            leave it out; after a power cut messages that were not synced are missing from `put`,
            or count as `done`. `repair` of the header begins anew.
        failed: attempts that failed: given back with an error, rejected, not decodable, a lease
            that ran out or whose holder died. A message may fail often, and be done in the end.
        expired, cancelled, evicted: messages that outlived their time; were cancelled or purged,
            also when dead; dead letters that gave way to newer ones.
        redelivered, corrupt: leases that ended without their holder; messages found damaged.
        refused: puts that found the queue full, and waited or gave up (of `aput` each try).
        priorities, lease, ordering, retry, ttl, dedup_window, dead_limit, on_dead, ageing,
        slot_bytes, payload_bytes, payload_max: settings, as `Store.queue` explains them.
    """

    name: str
    durability: str
    capacity: int
    unfinished: int
    ready: int
    delayed: int
    held: int
    leased: int
    dead: int
    by_priority: tuple[int, ...]
    oldest_age: float | None
    paused: bool
    put: int
    done: int
    failed: int
    expired: int
    cancelled: int
    evicted: int
    redelivered: int
    corrupt: int
    refused: int
    slots: int
    blocks: int
    health: str
    priorities: int
    lease: float
    ordering: str | None
    retry: RetryPolicy
    ttl: float | None
    dedup_window: float
    dead_limit: int
    on_dead: str
    ageing: bool
    slot_bytes: int
    payload_bytes: int
    payload_max: int


def stats_of(fields: dict[str, Any]) -> QueueStats:
    """The stats of all these fields."""
    return frozen(QueueStats, fields)


def shown(value: object) -> str:
    """A value for a repr: whole where it is short, else its beginning and its size."""
    if isinstance(value, bytes) and len(value) > SHOWN_BYTES:
        return f"{value[:SHOWN_BYTES]!r}... of {len(value)} bytes"
    text = repr(value)
    return text if len(text) <= 4 * SHOWN_BYTES else f"{text[: 4 * SHOWN_BYTES]}..."


@dataclass(frozen=True, slots=True, repr=False)
class StoredMessage:
    """A message as `peek` reads it, without taking it. Times are datetimes in UTC."""

    id: int
    state: str
    value: Any
    key: bytes | None
    headers: dict[str, bytes]
    priority: int
    attempts: int
    put_at: datetime
    due: datetime | None
    expires: datetime | None

    def __repr__(self) -> str:
        key = "" if self.key is None else f", key {shown(self.key)}"
        tried = f"priority {self.priority}, {self.attempts} attempts"
        return f"<StoredMessage {self.id}: {shown(self.value)}{key}, {self.state}, {tried}>"


@dataclass(frozen=True, slots=True, repr=False)
class DeadLetter:
    """A message that is not tried any more. Times are datetimes in UTC.

    Attributes:
        value: as the codec reads it; the bytes, where it cannot; None, where they are damaged.
        reason: why it is dead, in a word or two.
        first_error, last_error: what was said at the first and the last failure.
        attempts: how often it was leased.
        traceback: of the exception that it died of, in a `worker` or in a ``with`` of the message:
            at most the last 16 KiB. "": there was none, or it is not kept any more (the last 4 to
            8 MiB of a queue's are).
    """

    id: int
    value: Any
    reason: str
    first_error: str
    last_error: str
    first_at: datetime | None
    last_at: datetime | None
    attempts: int
    key: bytes | None
    headers: dict[str, bytes]
    priority: int
    put_at: datetime
    traceback: str = ""

    def __repr__(self) -> str:
        key = "" if self.key is None else f", key {shown(self.key)}"
        return (
            f"<DeadLetter {self.id}: {shown(self.value)}{key}, {self.reason!r} after "
            f"{self.attempts} attempts>"
        )


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
DeadLetter.__module__ = "millstream"
QueueStats.__module__ = "millstream"
StoredMessage.__module__ = "millstream"
