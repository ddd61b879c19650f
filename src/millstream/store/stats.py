"""What `Store.stats` and `Store.processes` return."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from millstream.disk import files
from millstream.errors import Closed, NotFound
from millstream.streams import stats as stream_stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from millstream.groups.stats import GroupStats
    from millstream.options import Durability
    from millstream.queues.queue import Queue
    from millstream.queues.records import QueueStats
    from millstream.store.store import Store
    from millstream.streams.stats import StreamStats
    from millstream.streams.stream import Stream


@dataclasses.dataclass(frozen=True)
class StoreStats:
    """A store in numbers: each of its streams, groups and queues."""

    path: str
    durability: Durability
    needs_recovery: bool
    """As `Store.needs_recovery`."""
    members: int
    """Processes that have it open to write; `Store.processes` says which."""
    streams: tuple[StreamStats, ...]
    groups: tuple[GroupStats, ...]
    queues: tuple[QueueStats, ...]

    @property
    def health(self) -> str:
        """That of the first stream, group or queue that is not sound, else "sound"."""
        every = [one.health for one in self.streams]
        every += [one.health for one in self.groups]
        every += [one.health for one in self.queues]
        return next((health for health in every if health != "sound"), "sound")


@dataclasses.dataclass(frozen=True)
class StoreProcess:
    """A process that has a store open to write, and what it holds."""

    member: int
    """Its number among the members of the store."""
    pid: int
    """In its own PID namespace."""
    is_here: bool
    """Is it of the PID namespace of the one who asks?"""
    command: str
    """Its command line; "": it is not here, or not to be read."""
    since: int
    """When it opened the store, microseconds since 1970."""
    leases: dict[str, int]
    """By queue, how many messages it has leased."""
    partitions: dict[tuple[str, str], tuple[int, ...]]
    """By stream and group, the partitions that its consumers read."""
    queues: tuple[str, ...]
    """Queues in which it has put or taken since it opened the store."""


def of_store(store: Store) -> StoreStats:
    """The store in numbers, as of now."""
    streams: list[StreamStats] = []
    groups: list[GroupStats] = []
    queues: list[QueueStats] = []

    def add_stream(name: str) -> None:
        stream = stream_of(store, name)
        streams.append(stream_stats.of_stream(stream, measured=False))
        figures = None
        for group in stream.groups():
            with contextlib.suppress(Closed, NotFound):
                if figures is None:
                    figures = stream._all_figures()
                groups.append(stream.group(group)._stats_of(figures))

    def add_queue(name: str) -> None:
        queues.append(queue_of(store, name).stats())

    each_there(store.streams(), add_stream)
    each_there(store.queues(), add_queue)
    parts = tuple(streams), tuple(groups), tuple(queues)
    members = len(store.session.members.living())
    return StoreStats(store.path, store.durability, store.needs_recovery, members, *parts)


def each_there(names: list[str], look: Callable[[str], None]) -> None:
    """Look at each; what was dropped meanwhile is left out."""
    for name in names:
        with contextlib.suppress(Closed, NotFound):
            look(name)


def stream_of(store: Store, name: str) -> Stream:
    """The handle, without reading the configuration of one that is open."""
    return store._streams.known(name) or store.stream(name, create=False)


def queue_of(store: Store, name: str) -> Queue:
    """The same of a queue."""
    return store._queues.known(name) or store.queue(name, create=False)


def processes(store: Store) -> list[StoreProcess]:
    """Who has the store open to write."""
    leases: dict[int, dict[str, int]] = {}
    partitions: dict[int, dict[tuple[str, str], tuple[int, ...]]] = {}
    queues: dict[int, list[str]] = {}

    def add_stream(name: str) -> None:
        stream = stream_of(store, name)
        for group in stream.groups():
            with contextlib.suppress(Closed, NotFound):
                for word, parts in stream.group(group)._readers().items():
                    partitions.setdefault(word, {})[name, group] = parts

    def add_queue(name: str) -> None:
        queue = queue_of(store, name)
        for word, count in queue._holders().items():
            leases.setdefault(word, {})[name] = count
        for word in queue._participants():
            queues.setdefault(word, []).append(name)

    each_there(store.streams(), add_stream)
    each_there(store.queues(), add_queue)
    return [
        StoreProcess(
            index, pid, is_here, files.command_of(pid) if is_here else "", claimed,
            leases.get(word, {}), partitions.get(word, {}), tuple(queues.get(word, ())),
        )
        for index, word, pid, is_here, claimed in store.session.members.living()
    ]  # fmt: skip


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
StoreProcess.__module__ = "millstream"
StoreStats.__module__ = "millstream"
