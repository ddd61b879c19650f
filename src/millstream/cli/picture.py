"""A running store as plain data: what `top` draws, `web` serves, and both may do to it.

A `Watch` reads the store once a second or so, read only, and keeps what is needed for rates and
for the history of an hour. All values are what JSON has: numbers, texts, lists and dictionaries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections import deque
from datetime import datetime
from typing import TYPE_CHECKING, Any

from millstream.cli.stores import existing, existing_queue, find_store, opened

if TYPE_CHECKING:
    from collections.abc import Callable

    from millstream import (
        DeadLetter,
        GroupStats,
        QueueStats,
        Record,
        Store,
        StoredMessage,
        StoreProcess,
        StoreStats,
        Stream,
        StreamStats,
    )

__all__ = ["Watch", "act", "decoded"]

HISTORY_SECONDS, STEP_SECONDS = 3600.0, 5.0
RATE_SECONDS = 5.0
"""A rate is that of the last seconds, so that it can be read."""
SHOWN_BYTES = 4096
LISTED = 100
COUNTED = ("ready", "delayed", "held", "leased", "dead", "capacity")
TOTALS = ("put", "done", "failed", "expired")


# --- what bytes say -------------------------------------------------------------------------------


def decoded(data: bytes | None) -> dict[str, Any] | None:
    """Bytes for people: their size, as JSON where they are, as text where they are, else as hex."""
    if data is None:
        return None
    found: dict[str, Any] = {"bytes": len(data)}
    head = data[:SHOWN_BYTES]
    if len(data) > SHOWN_BYTES:
        found["cut"] = True
    try:
        text = head.decode("utf-8", "strict" if len(data) <= SHOWN_BYTES else "ignore")
        if not text.isprintable() and any(ord(one) < 32 and one not in "\n\r\t" for one in text):
            raise ValueError("control characters")
    except ValueError:
        found["hex"] = head.hex()
        return found
    found["text"] = text
    with contextlib.suppress(ValueError, RecursionError):
        if text.lstrip()[:1] in ("{", "[") and len(data) <= SHOWN_BYTES:
            found["json"] = json.loads(text)
    return found


def moment_text(value: datetime | None) -> float | None:
    """A time as seconds since 1970."""
    return None if value is None else value.timestamp()


def message_row(one: StoredMessage) -> dict[str, Any]:
    """A message that waits."""
    return {
        "id": str(one.id),  # more digits than a number of JavaScript has
        "state": one.state,
        "value": decoded(one.value),
        "key": decoded(one.key),
        "headers": {name: decoded(value) for name, value in one.headers.items()},
        "priority": one.priority,
        "attempts": one.attempts,
        "put_at": moment_text(one.put_at),
        "due": moment_text(one.due),
        "expires": moment_text(one.expires),
    }


def letter_row(one: DeadLetter) -> dict[str, Any]:
    """A dead letter."""
    return {
        "id": str(one.id),
        "value": decoded(one.value),
        "key": decoded(one.key),
        "headers": {name: decoded(value) for name, value in one.headers.items()},
        "reason": one.reason,
        "first_error": one.first_error,
        "last_error": one.last_error,
        "first_at": moment_text(one.first_at),
        "last_at": moment_text(one.last_at),
        "attempts": one.attempts,
        "priority": one.priority,
        "put_at": moment_text(one.put_at),
        "traceback": one.traceback,
    }


# --- rates ----------------------------------------------------------------------------------------


def counters_of(stats: StoreStats) -> dict[tuple[str, ...], float]:
    """What only grows: its growth in a second is a rate."""
    found: dict[tuple[str, ...], float] = {}
    for stream in stats.streams:
        found["in", stream.name] = sum(part.next_offset for part in stream.partitions)
    for group in stats.groups:
        done = sum(part.next_offset - part.lag for part in group.partitions)
        found["out", group.stream, group.name] = done
    for queue in stats.queues:
        for total in TOTALS:
            found[total, queue.name] = getattr(queue, total)
    return found


class Rates:
    """How fast counters grow, over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[tuple[str, ...], float]]] = deque()

    def add(self, at: float, counters: dict[tuple[str, ...], float]) -> None:
        """What counters are now; `at` is of the monotonic clock."""
        self._seen.append((at, counters))
        while len(self._seen) > 2 and at - self._seen[1][0] >= RATE_SECONDS:
            self._seen.popleft()

    def of(self, *name: str) -> float | None:
        """Growth in a second; None: it was seen once only."""
        (then, before), (now, after) = self._seen[0], self._seen[-1]
        if name not in before or name not in after or now <= then:
            return None
        return max(0.0, (after[name] - before[name]) / (now - then))


class History:
    """Series of numbers of the last hour, a point every few seconds, in memory."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, dict[str, float]]] = deque(
            maxlen=int(HISTORY_SECONDS / max(STEP_SECONDS, 1.0))
        )

    def add(self, picture: dict[str, Any]) -> None:
        """Keep a point, if it is time for one."""
        at = picture["at"]
        if self._points and at - self._points[-1][0] < STEP_SECONDS:
            return
        point: dict[str, float] = {}
        for stream in picture["streams"]:
            point[f"streams/{stream['name']}/in"] = stream["in_rate"] or 0.0
            point[f"streams/{stream['name']}/log_bytes"] = stream["log_bytes"]
            for group in stream["groups"]:
                base = f"streams/{stream['name']}/groups/{group['name']}"
                point[f"{base}/lag"] = group["lag"]
                point[f"{base}/lag_seconds"] = round(group["lag_seconds"], 3)
                point[f"{base}/out"] = group["out_rate"] or 0.0
        for queue in picture["queues"]:
            base = f"queues/{queue['name']}"
            for name in ("ready", "leased", "dead"):
                point[f"{base}/{name}"] = queue[name]
            point[f"{base}/put"] = queue["put_rate"] or 0.0
            point[f"{base}/done"] = queue["done_rate"] or 0.0
            point[f"{base}/failed"] = queue["failed_rate"] or 0.0
        self._points.append((at, point))

    def of(self, prefix: str) -> dict[str, Any]:
        """Times, and each series below a name; null where there was none yet."""
        points = list(self._points)
        names = sorted({name for _, point in points for name in point if below(name, prefix)})
        return {
            "at": [at for at, _ in points],
            "series": {name: [point.get(name) for _, point in points] for name in names},
        }


def below(name: str, prefix: str) -> bool:
    """Is a series of what the prefix names?"""
    return not prefix or name.startswith(f"{prefix.rstrip('/')}/")


# --- the picture ----------------------------------------------------------------------------------


def group_row(group: GroupStats, rates: Rates) -> dict[str, Any]:
    """A consumer group in a line."""
    return {
        "name": group.name,
        "stream": group.stream,
        "members": len(group.members),
        "lag": group.lag,
        "lag_seconds": group.lag_seconds,
        "out_rate": rates.of("out", group.stream, group.name),
        "health": group.health,
    }


def stream_row(stream: StreamStats, groups: list[dict[str, Any]], rates: Rates) -> dict[str, Any]:
    """A stream in a line; `out_rate` is what its groups commit."""
    ages = [part.oldest_age for part in stream.partitions if part.oldest_age is not None]
    out = [group["out_rate"] for group in groups if group["out_rate"] is not None]
    return {
        "name": stream.name,
        "partitions": len(stream.partitions),
        "records": stream.records,
        "log_bytes": stream.log_bytes,
        "allocated_bytes": stream.allocated_bytes,
        "oldest_age": max(ages, default=None),
        "in_rate": rates.of("in", stream.name),
        "out_rate": sum(out) if out else None,
        "health": stream.health,
        "groups": groups,
    }


def queue_row(queue: QueueStats, workers: int, rates: Rates) -> dict[str, Any]:
    """A queue in a line; `workers` are the processes that have leased messages of it."""
    return {
        "name": queue.name,
        **{name: getattr(queue, name) for name in COUNTED},
        "oldest_age": queue.oldest_age,
        "paused": queue.paused,
        "health": queue.health,
        "workers": workers,
        **{total: getattr(queue, total) for total in TOTALS},
        **{f"{total}_rate": rates.of(total, queue.name) for total in TOTALS},
    }


def process_row(process: StoreProcess) -> dict[str, Any]:
    """A process in a line."""
    groups = [
        {"stream": stream, "group": group, "partitions": list(parts)}
        for (stream, group), parts in process.partitions.items()
    ]
    return {
        "pid": process.pid,
        "member": process.member,
        "here": process.is_here,
        "command": process.command,
        "since": process.since / 1e6,
        "leases": process.leases,
        "groups": groups,
        "queues": list(process.queues),
    }


def picture_of(stats: StoreStats, processes: list[StoreProcess], rates: Rates) -> dict[str, Any]:
    """All of it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for group in stats.groups:
        groups.setdefault(group.stream, []).append(group_row(group, rates))
    workers: dict[str, int] = {}
    for process in processes:
        for name in process.leases:
            workers[name] = workers.get(name, 0) + 1
    return {
        "path": stats.path,
        "at": time.time(),
        "health": stats.health,
        "durability": stats.durability,
        "needs_recovery": stats.needs_recovery,
        "members": stats.members,
        "streams": [
            stream_row(stream, groups.get(stream.name, []), rates) for stream in stats.streams
        ],
        "queues": [queue_row(queue, workers.get(queue.name, 0), rates) for queue in stats.queues],
        "processes": [process_row(process) for process in processes],
    }


class Watch:
    """A store that is looked at again and again, read only; thread-safe.

    It is opened anew where the one who was first to open it to write has recovered it meanwhile.
    """

    def __init__(self, path: str) -> None:
        import millstream

        find_store(path)
        self.path = path
        self.history = History()
        self._rates = Rates()
        self._lock = threading.Lock()
        self._store: Store = millstream.open(path, mode="r")
        self._picture: dict[str, Any] | None = None

    def close(self) -> None:
        """Close the store."""
        with self._lock:
            self._store.close()

    def picture(self, *, max_age: float = 0.0) -> dict[str, Any]:
        """The store as it is now, or was at most `max_age` seconds ago."""
        with self._lock:
            if self._picture is not None and time.time() - self._picture["at"] <= max_age:
                return self._picture
            stats, processes = self._looked(lambda store: (store.stats(), store.processes()))
            self._rates.add(time.monotonic(), counters_of(stats))
            self._picture = picture_of(stats, processes, self._rates)
            self.history.add(self._picture)
            return self._picture

    def look(self, at: Callable[[Store], Any]) -> Any:
        """What a function sees in the store."""
        with self._lock:
            return self._looked(at)

    def _looked(self, at: Callable[[Store], Any]) -> Any:
        from millstream import Closed

        try:
            found = at(self._store)
        except Closed:
            self._open_again()
            return at(self._store)
        # Walked for itself, when nobody had it open: others do by now.
        if self._store.needs_recovery and self._store.stats().members:
            self._open_again()
            return at(self._store)
        return found

    def _open_again(self) -> None:
        import millstream

        before, self._store = self._store, millstream.open(self.path, mode="r")
        before.close()

    # --- looking closer ---------------------------------------------------------------------------

    def stream(self, name: str) -> dict[str, Any]:
        """Each partition of a stream, and its settings."""

        def at(store: Store) -> dict[str, Any]:
            stats = existing(store, name).stats()
            fields = dataclasses.asdict(dataclasses.replace(stats, partitions=()))
            return {
                **fields,
                "retention": stats.retention.as_dict(),
                "compaction": None if stats.compaction is None else stats.compaction.as_dict(),
                "health": stats.health,
                "partitions": [
                    {**dataclasses.asdict(part), "oldest_age": part.oldest_age}
                    for part in stats.partitions
                ],
                "groups": existing(store, name).groups(),
            }

        found: dict[str, Any] = self.look(at)
        return found

    def records(self, name: str, partition: int, start: int | None) -> dict[str, Any]:
        """Records of a partition from an offset on; by default the last ones."""

        def at(store: Store) -> dict[str, Any]:
            stream = existing(store, name)
            first, following = stream.first_offset(partition), stream.next_offset(partition)
            begin = max(first, following - LISTED if start is None else start)
            found = records_of(stream, partition, begin) if begin < following else []
            rows = [record_row(record) for record in found]
            return {"first_offset": first, "next_offset": following, "records": rows}

        found: dict[str, Any] = self.look(at)
        return found

    def group(self, name: str, group: str) -> dict[str, Any]:
        """Members and partitions of a consumer group."""

        def at(store: Store) -> dict[str, Any]:
            from millstream.cli.groups import named_group

            stats = named_group(existing(store, name), group).stats()
            return {
                "name": stats.name,
                "stream": stats.stream,
                "health": stats.health,
                "lag": stats.lag,
                "lag_seconds": stats.lag_seconds,
                "members": [dataclasses.asdict(member) for member in stats.members],
                "partitions": [
                    {
                        "partition": part.partition,
                        "position": None if part.position is None else part.position.offset,
                        "next_offset": part.next_offset,
                        "lag": part.lag,
                        "lag_seconds": part.lag_seconds,
                        "lost": part.lost,
                        "owner": part.owner,
                    }
                    for part in stats.partitions
                ],
            }

        found: dict[str, Any] = self.look(at)
        return found

    def queue(self, name: str) -> dict[str, Any]:
        """A queue with its settings."""

        def at(store: Store) -> dict[str, Any]:
            stats = existing_queue(store, name).stats()
            fields = {one.name: getattr(stats, one.name) for one in dataclasses.fields(stats)}
            return {**fields, "retry": stats.retry.as_dict()}

        found: dict[str, Any] = self.look(at)
        return found

    def messages(self, name: str, count: int = LISTED) -> list[dict[str, Any]]:
        """The messages of a queue that would come next."""

        def at(store: Store) -> list[dict[str, Any]]:
            return [message_row(one) for one in existing_queue(store, name).peek(count)]

        found: list[dict[str, Any]] = self.look(at)
        return found

    def letters(self, name: str, count: int = LISTED) -> list[dict[str, Any]]:
        """The dead letters of a queue."""

        def at(store: Store) -> list[dict[str, Any]]:
            return [letter_row(one) for one in existing_queue(store, name).dead.list(count)]

        found: list[dict[str, Any]] = self.look(at)
        return found


def records_of(stream: Stream, partition: int, begin: int) -> list[Record]:
    """The records of a partition from an offset on, at most as many as are listed."""
    from millstream.errors import NotFound, OffsetOutOfRange

    found = []
    for offset in range(begin, min(begin + LISTED, stream.next_offset(partition))):
        with contextlib.suppress(NotFound, OffsetOutOfRange):  # compacted, or retired meanwhile
            found.append(stream.get(partition, offset))
    return found


def record_row(record: Record) -> dict[str, Any]:
    """A record of a stream."""
    return {
        "offset": record.offset,
        "at": record.timestamp / 1e6,
        "key": decoded(record.key),
        "value": decoded(record.value),
        "headers": {name: decoded(value) for name, value in record.headers.items()},
    }


# --- acting ---------------------------------------------------------------------------------------


def act(path: str, what: str, **named: Any) -> dict[str, Any]:
    """Do one thing to a store, opened to write for it; what came of it.

    Args:
        path: the store.
        what: one of ACTIONS.
        named: what it is done to.
    """
    with opened(path, "rw") as store:
        return ACTIONS[what](store, **named)


def _redrive(store: Store, queue: str, ids: list[int] | None = None) -> dict[str, Any]:
    return {"redriven": existing_queue(store, queue).dead.redrive(ids)}


def _purge_dead(store: Store, queue: str, ids: list[int] | None = None) -> dict[str, Any]:
    return {"purged": existing_queue(store, queue).dead.purge(ids)}


def _purge(store: Store, queue: str) -> dict[str, Any]:
    return {"purged": existing_queue(store, queue).purge()}


def _pause(store: Store, queue: str) -> dict[str, Any]:
    existing_queue(store, queue).pause()
    return {"paused": True}


def _resume(store: Store, queue: str) -> dict[str, Any]:
    existing_queue(store, queue).resume()
    return {"paused": False}


def _seek(
    store: Store, stream: str, group: str, to: str, partition: int | None = None
) -> dict[str, Any]:
    from millstream.cli.groups import named_group, seek
    from millstream.cli.stores import parse_start
    from millstream.errors import InvalidArgument

    try:
        goal = parse_start(to)
    except ValueError as error:
        raise InvalidArgument(
            f"to {to!r}: expected an offset, -N for the last N, earliest, latest or a time"
        ) from error
    found = seek(named_group(existing(store, stream), group), goal, partition)
    return {"positions": {str(number): offset for number, offset in found.items()}}


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "redrive": _redrive,
    "purge dead": _purge_dead,
    "purge": _purge,
    "pause": _pause,
    "resume": _resume,
    "seek": _seek,
}
