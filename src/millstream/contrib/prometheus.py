"""A store in Prometheus: `Collector(store)` for prometheus_client; `millstream metrics` prints it.

>>> import millstream
>>> from prometheus_client import CollectorRegistry, generate_latest
>>> from millstream.contrib.prometheus import Collector
>>> with millstream.temporary() as store:
...     _ = store.queue("mail").put(b"to ann")
...     registry = CollectorRegistry()
...     registry.register(Collector(store))
...     text = generate_latest(registry).decode()
>>> [line for line in text.splitlines() if 'state="ready"' in line]
['millstream_queue_messages{queue="mail",state="ready"} 1.0']
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from millstream import Closed, NotFound
from millstream.contrib import require

require("prometheus_client", "prometheus", (0, 20), (1,))

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from millstream import Queue, Store, Stream

    Sample: TypeAlias = tuple[str, tuple[str, ...], float]

__all__ = ["Collector"]

STATES = ("ready", "delayed", "held", "leased", "dead")
COUNTED = ("redelivered", "expired", "evicted", "corrupt", "refused")
OF_PARTITION = ("stream", "partition")
OF_GROUP = ("stream", "group", "partition")
METRICS = {
    "millstream_health": ("1: every stream, queue and group is sound", ()),
    "millstream_queue_health": ("1: sound", ("queue",)),
    "millstream_queue_messages": ("Messages in that state", ("queue", "state")),
    "millstream_queue_capacity": ("How many messages may be not finished", ("queue",)),
    "millstream_queue_paused": ("1: nothing is leased until it is resumed", ("queue",)),
    "millstream_queue_redelivered_total": ("Leases that ended without their holder", ("queue",)),
    "millstream_queue_expired_total": ("Messages that outlived their time", ("queue",)),
    "millstream_queue_evicted_total": ("Dead letters that gave way to newer ones", ("queue",)),
    "millstream_queue_corrupt_total": ("Messages that were found damaged", ("queue",)),
    "millstream_queue_refused_total": ("Puts that found the queue full", ("queue",)),
    "millstream_stream_health": ("1: sound", OF_PARTITION),
    "millstream_stream_records": ("Records that are kept", OF_PARTITION),
    "millstream_stream_bytes": ("Bytes of log that can be read", OF_PARTITION),
    "millstream_stream_allocated_bytes": ("Bytes of disk that its files take", OF_PARTITION),
    "millstream_stream_oldest_age_seconds": ("Age of the oldest record", OF_PARTITION),
    "millstream_group_health": ("1: sound", ("stream", "group")),
    "millstream_group_members": ("Consumers of the group", ("stream", "group")),
    "millstream_group_lag_records": ("Records that the group has not committed", OF_GROUP),
    "millstream_group_lag_seconds": ("Age of the first of them; 0: there is none", OF_GROUP),
}
"""Name: what it says, its labels."""


class Collector:
    """A collector of prometheus_client: what a store is like whenever it is asked.

    Also of a store that was opened to read alone, and in any process. Counters begin at 0 when a
    process opens the store as its only one. What is dropped while it is read is left out.

    Args:
        store: is left open.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The metrics, as of now."""
        samples: dict[str, list[tuple[tuple[str, ...], float]]] = {name: [] for name in METRICS}
        for name, labels, value in self._samples():
            samples[name].append((labels, value))
        sound = [value for name in METRICS if "health" in name for _, value in samples[name]]
        samples["millstream_health"] = [((), float(all(sound)))]
        for name, (text, labels) in METRICS.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, text, labels=labels)
            for labelled, value in samples[name]:
                family.add_metric(labelled, value)
            yield family

    def _samples(self) -> Iterator[Sample]:
        for name in self._store.queues():
            with contextlib.suppress(Closed, NotFound):
                yield from _of_queue(self._store.queue(name, create=False))
        for name in self._store.streams():
            with contextlib.suppress(Closed, NotFound):
                stream = self._store.stream(name, create=False)
                yield from _of_stream(stream)
                for group in stream.groups():
                    with contextlib.suppress(Closed, NotFound):
                        yield from _of_group(stream, group)


def _of_queue(queue: Queue) -> Iterator[Sample]:
    stats, labels = queue.stats(), (queue.name,)
    yield "millstream_queue_health", labels, float(stats.health == "sound")
    for state in STATES:
        yield "millstream_queue_messages", (*labels, state), getattr(stats, state)
    yield "millstream_queue_capacity", labels, stats.capacity
    yield "millstream_queue_paused", labels, float(stats.paused)
    for what in COUNTED:
        yield f"millstream_queue_{what}_total", labels, getattr(stats, what)


def _of_stream(stream: Stream) -> Iterator[Sample]:
    for part in stream.stats().partitions:
        labels = (stream.name, str(part.partition))
        yield "millstream_stream_health", labels, float(part.health == "sound")
        yield "millstream_stream_records", labels, part.records
        yield "millstream_stream_bytes", labels, part.log_bytes
        yield "millstream_stream_allocated_bytes", labels, part.allocated_bytes
        age = _age(stream, part.partition, part.first_offset) if part.records else 0.0
        yield "millstream_stream_oldest_age_seconds", labels, age


def _of_group(stream: Stream, name: str) -> Iterator[Sample]:
    group = stream.group(name)
    labels = (stream.name, name)
    yield "millstream_group_health", labels, float(group.health == "sound")
    yield "millstream_group_members", labels, len(group.members())
    for part in group.partitions():
        of_partition = (*labels, str(part.partition))
        begin = 0 if part.position is None else part.position.offset
        yield "millstream_group_lag_records", of_partition, part.lag
        age = _age(stream, part.partition, begin) if part.lag else 0.0
        yield "millstream_group_lag_seconds", of_partition, age


def _age(stream: Stream, partition: int, offset: int) -> float:
    """How long ago the first record from an offset on was appended, by its timestamp."""
    found = stream.read(partition=partition, start=offset, max_records=1, on_lost="earliest")
    for batch in found:
        return max(0.0, time.time() - int(batch.timestamps[0]) / 1e6)
    return 0.0  # compaction has left none
