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

import time
from typing import TYPE_CHECKING

from millstream import GroupPartition, InvalidType
from millstream.contrib import require

require("prometheus_client", "prometheus", (0, 20), (1,))

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Sample  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from millstream import PartitionStats, Store

__all__ = ["Collector"]

STATES = ("ready", "delayed", "held", "leased", "dead")
COUNTED = (
    *("put", "done", "failed", "expired", "cancelled", "evicted", "redelivered", "corrupt"),
    "refused",
)
OF_PARTITION = ("stream", "partition")
OF_GROUP = ("stream", "group", "partition")
METRICS = {
    "millstream_health": ("1: every stream, queue and group is sound", ()),
    "millstream_members": ("Processes that have the store open to write", ()),
    "millstream_queue_health": ("1: sound", ("queue",)),
    "millstream_queue_messages": ("Messages in that state", ("queue", "state")),
    "millstream_queue_capacity": ("How many messages may be not finished", ("queue",)),
    "millstream_queue_paused": ("1: nothing is leased until it is resumed", ("queue",)),
    "millstream_queue_oldest_age_seconds": ("How long the oldest ready one waits", ("queue",)),
    "millstream_queue_put_total": ("Messages that were put", ("queue",)),
    "millstream_queue_done_total": ("Messages that were acknowledged", ("queue",)),
    "millstream_queue_failed_total": ("Attempts that failed", ("queue",)),
    "millstream_queue_cancelled_total": ("Messages cancelled or purged", ("queue",)),
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

NOTHING_MORE = tuple(Sample("", {}, 0.0))[3:]


def sample_of(name: str, labels: dict[str, str], value: float) -> Sample:
    """A `Sample`, without the call of Python in which a NamedTuple fills in its defaults."""
    return tuple.__new__(Sample, (name, labels, value, *NOTHING_MORE))


class Collector:
    """A collector of prometheus_client: what a store is like whenever it is asked, `Store.stats`.

    Also of a store that was opened to read alone, and in any process. Counters are those of the
    queue's life, see `QueueStats`. What is dropped while it is read is left out.

    Args:
        store: is left open.

    Raises: InvalidType where it is none.
    """

    def __init__(self, store: Store) -> None:
        if not callable(getattr(store, "stats", None)):
            raise InvalidType(f"store {store!r}: expected a Store; `millstream.open` gives one")
        self._store = store
        self._labels: dict[tuple[str, ...], dict[str, str]] = {}
        self._made: dict[tuple[str, ...], tuple[PartitionStats | GroupPartition, list[Sample]]] = {}
        """Samples of what is the same object as at the last call: it says the same."""

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The metrics, as of now."""
        samples: dict[str, list[Sample]] = {name: [] for name in METRICS}
        self._fill({name: found.append for name, found in samples.items()})
        for name, (text, labels) in METRICS.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, text, labels=labels)
            family.samples = samples[name]
            yield family

    def _labelled(self, names: tuple[str, ...], *values: str) -> dict[str, str]:
        """The same ones each time: nobody changes them."""
        found = self._labels.get((*names, *values))
        if found is None:
            found = self._labels[(*names, *values)] = dict(zip(names, values, strict=True))
        return found

    def _fill(self, add: dict[str, Callable[[Sample], None]]) -> None:
        def give(name: str, labels: dict[str, str], value: float) -> None:
            add[name](sample_of(name, labels, value))

        stats, now = self._store.stats(), time.time()
        give("millstream_health", {}, float(stats.health == "sound"))
        give("millstream_members", {}, stats.members)
        for queue in stats.queues:
            labels = self._labelled(("queue",), queue.name)
            give("millstream_queue_health", labels, float(queue.health == "sound"))
            for state in STATES:
                of_state = self._labelled(("queue", "state"), queue.name, state)
                give("millstream_queue_messages", of_state, getattr(queue, state))
            give("millstream_queue_capacity", labels, queue.capacity)
            give("millstream_queue_paused", labels, float(queue.paused))
            give("millstream_queue_oldest_age_seconds", labels, queue.oldest_age or 0.0)
            for what in COUNTED:
                give(f"millstream_queue_{what}_total", labels, getattr(queue, what))
        for stream in stats.streams:
            for part in stream.partitions:
                key = "", stream.name, str(part.partition)
                for sample in self._samples(key, part):
                    add[sample.name](sample)
                age = 0.0 if part.oldest_at is None else max(0.0, now - part.oldest_at)
                give("millstream_stream_oldest_age_seconds", sample.labels, age)
        for group in stats.groups:
            labels = self._labelled(("stream", "group"), group.stream, group.name)
            give("millstream_group_health", labels, float(group.health == "sound"))
            give("millstream_group_members", labels, len(group.members))
            for share in group.partitions:
                key = group.stream, group.name, str(share.partition)
                for sample in self._samples(key, share):
                    add[sample.name](sample)
                age = 0.0 if share.lag_since is None else max(0.0, now - share.lag_since)
                give("millstream_group_lag_seconds", sample.labels, age)

    def _samples(
        self, key: tuple[str, str, str], part: PartitionStats | GroupPartition
    ) -> list[Sample]:
        """Those of a partition that do not pass with time: of a stream, or of one for a group."""
        made = self._made.get(key)
        if made is not None and made[0] is part:
            return made[1]
        if isinstance(part, GroupPartition):
            labels = dict(zip(OF_GROUP, key, strict=True))
            samples = [sample_of("millstream_group_lag_records", labels, part.lag)]
        else:
            labels = dict(zip(OF_PARTITION, key[1:], strict=True))
            samples = [
                sample_of("millstream_stream_health", labels, float(part.health == "sound")),
                sample_of("millstream_stream_records", labels, part.records),
                sample_of("millstream_stream_bytes", labels, part.log_bytes),
                sample_of("millstream_stream_allocated_bytes", labels, part.allocated_bytes),
            ]
        self._made[key] = part, samples
        return samples
