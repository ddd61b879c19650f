"""Common mistakes, as the files of a store show them: `Store.advice`.

Each check reads figures that are kept anyway, or a sample, and says the figure and what to do. What
cannot be told from the files is not guessed at.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

from millstream import _native
from millstream.disk.clock import DAY
from millstream.errors import Closed, NotFound
from millstream.options import Retention
from millstream.streams import growth

if TYPE_CHECKING:
    from millstream.groups.group import Group
    from millstream.queues.queue import Queue
    from millstream.queues.records import QueueStats
    from millstream.store.store import Store
    from millstream.streams.stream import Stream

__all__ = ["Advice", "Kind"]

Kind: TypeAlias = Literal[
    "queue for everything",
    "stream for simple tasks",
    "ordering ignored",
    "no idempotency",
    "retention never set",
    "back-pressure ignored",
]

SAMPLE = 100  # records of a partition, messages of a queue
SAMPLE_PARTITIONS = 32
FEW = 10  # of so few nothing is concluded
FULL = NEARLY_ALL = 0.9
RUN = 8  # different records in a row that come again: on and off and on are no re-send
LEASE_ENDED = (2, 3)  # the lease ran out, its holder died


@dataclasses.dataclass(frozen=True)
class Advice:
    """A mistake that a store shows.

    Attributes:
        kind: which one; docs/guide/queue_or_stream.md has them all.
        where: the stream, group or queue.
        text: what was seen, and what to do.
        figure: the number behind it.
    """

    kind: Kind
    where: str
    text: str
    figure: float


def of_store(store: Store, large_bytes: int | None) -> list[Advice]:
    """All that is found: of streams, then of queues, each sorted by name."""
    found: list[Advice] = []
    for name in store.streams():
        with contextlib.suppress(NotFound, Closed):  # it was dropped meanwhile
            found += _of_stream(store.stream(name, create=False), large_bytes)
    samples: dict[str, list[Sampled]] = {}
    for name in store.queues():
        with contextlib.suppress(NotFound, Closed):
            queue = store.queue(name, create=False)
            samples[name] = _sample(queue)
            found += _of_queue(queue, samples[name])
    found += _same_messages(samples)
    return found


# --- streams --------------------------------------------------------------------------------------


def _of_stream(stream: Stream, large_bytes: int | None) -> Iterator[Advice]:
    where = f"stream {stream.name}"
    stats = stream.stats()
    if not growth.is_bounded(stream) and growth.is_large(stream, stats.log_bytes, large_bytes):
        text = growth.describe(stats.log_bytes)
        yield Advice("retention never set", where, text, float(stats.log_bytes))
    filled = [part.partition for part in stats.partitions if part.records][:SAMPLE_PARTITIONS]
    samples = [_newest(stream, partition) for partition in filled]
    yield from _without_keys(where, samples)
    if stats.producers == 0:
        yield from _sent_again(where, samples)
    for name in stream.groups():
        yield from _of_group(stream.group(name), f"{where}, group {name}")


Record: TypeAlias = tuple[bytes | None, int]


def _newest(stream: Stream, partition: int) -> list[Record]:
    """Key and hash of the value of the newest records of a partition."""
    start = max(stream.first_offset(partition), stream.next_offset(partition) - SAMPLE)
    batches = stream.read(partition=partition, start=start, max_records=SAMPLE, on_lost="earliest")
    return [
        (key, -1 if value is None else _native.xxh3_64(value))
        for batch in batches
        for key, value in zip(batch.keys, batch.values, strict=True)
    ]


def _without_keys(where: str, samples: list[list[Record]]) -> Iterator[Advice]:
    keys = [key for records in samples for key, _ in records]
    sampled = len(keys)
    if len(samples) < 2 or sampled < FEW or any(key is not None for key in keys):
        return
    text = (
        f"none of the {sampled} newest records, in {len(samples)} partitions, has a key: there is"
        " no order between partitions. Where one record has to come after another, give both the"
        " same key"
    )
    yield Advice("ordering ignored", where, text, float(sampled))


def _sent_again(where: str, samples: list[list[Record]]) -> Iterator[Advice]:
    again, sampled = sum(map(_repeated, samples)), sum(map(len, samples))
    if again:
        text = (
            f"{again} of the {sampled} newest records repeat earlier ones in the same order, key"
            " and value, and no producer has an id. If they were sent again after a failure, append"
            " with stream.producer(id=...): then a re-send adds nothing"
        )
        yield Advice("no idempotency", where, text, float(again))


def _repeated(records: list[Record]) -> int:
    """How many are in a run that was there before."""
    again, last = 0, -RUN
    runs: set[tuple[Record, ...]] = set()
    for i in range(len(records) - RUN + 1):
        run = tuple(records[i : i + RUN])
        if run in runs:
            again += min(RUN, i - last)
            last = i
        elif len(set(run)) == RUN:  # a reading that does not change is no re-send
            runs.add(run)
    return again


def _of_group(group: Group, where: str) -> Iterator[Advice]:
    members, partitions = len(group.members()), group.partitions()
    idle = members - len(partitions)
    if idle > 0:
        text = (
            f"{idle} of {members} members have nothing to read (partitions: {len(partitions)},"
            f" records that wait: {group.lag():,}). A queue gives each worker the next message;"
            " with more partitions (add_partitions) more members read"
        )
        yield Advice("stream for simple tasks", where, text, float(idle))
    if group.stream.retention == Retention():
        return
    lost = close = 0
    for part in partitions:
        first = group.stream.first_offset(part.partition)
        position = first if part.position is None else int(part.position.offset)
        lost += max(0, first - position)
        unread, kept = part.next_offset - max(first, position), part.next_offset - first
        if first > 0 and unread > 0 and unread >= NEARLY_ALL * kept:
            close += unread
    if lost or close:
        text = (
            f"{close:,} records that the group has not read are among the next that retention"
            f" removes, and {lost:,} that it was to go on with are gone. Add members, keep more, or"
            " remove a group that nobody reads for"
        )
        yield Advice("back-pressure ignored", where, text, float(lost + close))


# --- queues ---------------------------------------------------------------------------------------

Sampled: TypeAlias = tuple[bytes | None, int]


def _sample(queue: Queue) -> list[Sampled]:
    """Key, and hash of the value, of some messages."""
    found = queue._scan(("ready", "delayed", "held", "leased"), SAMPLE)
    records = (queue._record(slot, word) for _, _, slot, word in found)
    return [
        (record[7], _native.xxh3_64(record[9]))
        for record in records
        if record is not None and record[9] is not None
    ]


def _of_queue(queue: Queue, sample: list[Sampled]) -> Iterator[Advice]:
    where = f"queue {queue.name}"
    stats = queue.stats()
    yield from _stored(queue, where, stats)
    yield from _keys_without_order(queue, where, sample)
    yield from _delivered_again(queue, where, stats)
    full = stats.unfinished / stats.capacity
    if full >= FULL or stats.refused:
        text = (
            f"{full:.0%} full now; puts that found no room since the store was opened:"
            f" {stats.refused:,}. Messages come faster than they are finished: add workers, let put"
            " wait, or catch QueueFull and shed what can be done without"
        )
        yield Advice("back-pressure ignored", where, text, full)


def _stored(queue: Queue, where: str, stats: QueueStats) -> Iterator[Advice]:
    waiting = queue._never_leased()
    found = None if waiting is None else queue._record(*waiting[1:])
    if waiting is None or found is None:
        return
    _, _, _, _, put_at, due, *_ = found
    waited = _native.wall_us() - max(put_at, due)
    if waited >= DAY:
        text = (
            f"a message waits for {waited / DAY:.1f} days, and {waiting[0]:,} of"
            f" {stats.capacity:,} that there is room for were never taken. If nobody is to take"
            " them, a stream keeps history, and any number of readers read it"
        )
        yield Advice("queue for everything", where, text, waited / DAY)


def _keys_without_order(queue: Queue, where: str, sample: list[Sampled]) -> Iterator[Advice]:
    keys = sum(key is not None for key, _ in sample)
    if keys and queue._config["ordering"] != "key":
        text = (
            f"{keys} of {len(sample)} messages have a key, and the queue was not made with"
            ' ordering="key": two messages of one key may be worked on at once, and in any order'
        )
        yield Advice("ordering ignored", where, text, float(keys))


def _delivered_again(queue: Queue, where: str, stats: QueueStats) -> Iterator[Advice]:
    if queue._config["dedup_window"] or queue.session.undecided.exist():
        return
    letters = queue._scan(("dead",), SAMPLE)
    failures = (queue._failure(slot, number) for _, number, slot, _ in letters)
    dead = sum(one is not None and one[3] in LEASE_ENDED for one in failures)
    if stats.redelivered or dead:
        text = (
            f"messages delivered again since the store was opened: {stats.redelivered:,}; dead"
            f" letters whose last holder died or overran: {dead}. Their work may be done twice, or"
            " in part: acknowledge with tx.ack in a transaction, or make the effects repeatable (a"
            " dedup_id, a producer's sequence)"
        )
        yield Advice("no idempotency", where, text, float(stats.redelivered or dead))


def _same_messages(samples: dict[str, list[Sampled]]) -> Iterator[Advice]:
    values = {name: {value for _, value in sample} for name, sample in samples.items()}
    while values:
        name = next(iter(values))
        ours = values.pop(name)
        shared = {
            other: len(ours & theirs)
            for other, theirs in values.items()
            if len(ours & theirs) >= max(FEW, NEARLY_ALL * min(len(ours), len(theirs)))
        }
        for other in shared:
            del values[other]
        if shared:
            text = (
                f"{min(shared.values())} of the {len(ours)} messages read are in each of these"
                f" {len(shared) + 1} queues: a stream keeps them once, and each consumer group"
                " reads all"
            )
            where = f"queues {', '.join([name, *shared])}"
            yield Advice("queue for everything", where, text, float(min(shared.values())))


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Advice.__module__ = "millstream"
