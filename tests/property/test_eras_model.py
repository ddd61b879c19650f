"""Views and compaction of a stream whose partitions are added to, against a dictionary.

Keys go where their hash says, which `add_partitions` changes; the latest value of each key is that
of the latest append all the same, whatever compaction took away.
"""

import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import millstream
from millstream import inspect

SIZES = st.sampled_from([None, None, 0, 20_000])  # segments are of 64 KiB
ROWS = st.lists(st.tuples(st.integers(0, 5), SIZES), min_size=1, max_size=8)


class Eras(RuleBasedStateMachine):
    @initialize(partitions=st.integers(1, 2), age=st.sampled_from((0, 0, 3600)))
    def open(self, partitions, age):
        root = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.path = tempfile.mkdtemp(prefix="millstream-eras-", dir=root)
        self.store = millstream.open(self.path, durability="process")
        self.stream = self.store.stream(
            "s",
            partitions=partitions,
            segment_bytes=1 << 16,
            compact=millstream.Compaction(tombstone_age=age, min_dirty=1.0),
        )
        self.model, self.number, self.last, self.view = {}, 0, {}, None

    @rule(rows=ROWS, single=st.booleans())
    def append(self, rows, single):
        records = []
        for key, size in rows:
            self.number += 1
            value = None if size is None else b"%d " % self.number + b"v" * size
            records.append((b"%d" % key, value))
        if single:
            for key, value in records:
                position = self.stream.append(value, key=key)
                self.last[position.partition] = position
        else:
            spans = self.stream.append_many(
                [value for _, value in records], keys=[key for key, _ in records]
            )
            self.last.update({span.partition: span for span in spans})
        self.model.update(records)

    @rule(count=st.integers(1, 2))
    def add_partitions(self, count):
        if self.stream.partitions < 5:
            self.stream.add_partitions(count)

    @rule(keys=st.sampled_from((1, 2, 1 << 16)), runs=st.sampled_from((1, 2, 2)))
    def compact(self, keys, runs):
        """All but what fills: a second run takes the tombstones that the first one covered."""
        for partition in range(self.stream.partitions):
            self.last[partition] = self.stream.append(b"v" * 60_000, partition=partition)
        for _ in range(runs):
            self.stream.compact(memory=32 * keys)
        self.look(anew=True)

    @rule()
    def reopen(self):
        self.close_view()
        self.store.close()
        self.store = millstream.open(self.path, durability="process")
        self.stream = self.store.stream("s")

    @rule()
    def close_view(self):
        if self.view is not None:
            self.view.close()
            self.view = None

    @rule(anew=st.booleans())
    def look(self, anew):
        if anew:
            self.close_view()
            snapshot = os.path.join(self.stream.path, "view")
            if os.path.exists(snapshot):
                os.unlink(snapshot)
        if self.view is None:
            self.view = self.stream.view()
        self.agree()

    @invariant()
    def agree(self):
        if self.view is not None:
            for position in self.last.values():
                self.view.wait_for(position, timeout=60)
            wanted = {key: value for key, value in self.model.items() if value is not None}
            assert dict(self.view.items()) == wanted

    def teardown(self):
        if hasattr(self, "store"):
            self.look(anew=True)
            self.close_view()
            self.store.close()
            assert inspect.verify(self.path).problems == []
            shutil.rmtree(self.path)


TestEras = Eras.TestCase
TestEras.settings = settings(
    max_examples=2000 if os.environ.get("MILLSTREAM_FULL") else 80,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
