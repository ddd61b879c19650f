"""Compaction, retention, reopening and views, in any order, against a dictionary."""

import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from stream_model import Log

import millstream
from millstream import inspect
from millstream.disk import files

KEYS = st.integers(0, 12)
ROWS = st.lists(
    st.tuples(st.one_of(st.none(), KEYS), st.one_of(st.none(), st.integers(0, 9000))),
    min_size=1,
    max_size=30,
)


class Compacted(RuleBasedStateMachine):
    @initialize(partitions=st.integers(1, 2), age=st.sampled_from((0, 3600)))
    def open(self, partitions, age):
        root = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.path = tempfile.mkdtemp(prefix="millstream-compaction-", dir=root)
        self.keep = millstream.Compaction(tombstone_age=age, min_dirty=1.0)
        self.store = millstream.open(self.path, durability="process")
        self.stream = self.store.stream(
            "s", partitions=partitions, segment_bytes=1 << 16, compact=self.keep
        )
        self.log = Log(partitions, compacted=True, tombstones_stay=age > 0)
        self.view = None

    @rule(rows=ROWS, index=st.integers(0, 1), single=st.booleans())
    def append(self, rows, index, single):
        index %= len(self.log.rows)
        mine = self.log.rows[index]
        records = [
            (
                None if key is None else b"%d/%d" % (index, key),
                None if size is None else b"%d " % len(mine) + b"v" * size,
            )
            for key, size in rows
        ]
        if single:
            for key, value in records:
                self.stream.append(value, key=key, partition=index)
        else:
            self.stream.append_many(
                [value for _, value in records],
                keys=[key for key, _ in records],
                partition=index,
            )
        for key, value in records:
            self.log.append(index, key, value)

    @rule(keys=st.sampled_from((1, 5, 1 << 16)))
    def compact(self, keys):
        result = self.stream.compact(memory=32 * keys)
        assert result.bytes_after <= result.bytes_before

    @rule(clean=st.booleans())
    def reopen(self, clean):
        self.close_view()
        self.store.close()
        if not clean:
            path = os.path.join(self.path, "store.json")
            files.write_json(path, {**files.read_json(path), "clean": False})
        self.store = millstream.open(self.path, durability="process")
        self.stream = self.store.stream("s")
        assert self.stream.compaction == self.keep

    @rule(index=st.integers(0, 1), part=st.floats(0, 1))
    def delete_before(self, index, part):
        index %= len(self.log.rows)
        end = self.stream.next_offset(index)
        offset = int(part * end)
        first = self.stream.delete_before(millstream.Position(index, 1, offset))
        assert first <= max(offset, self.log.firsts[index])
        self.log.firsts[index] = first

    @rule()
    def look_through_a_view(self):
        """One view, kept or taken up from its snapshot; keys that retention took stay in it."""
        if self.view is None:
            self.view = self.stream.view()
        self.log.check_view(self.view)

    @rule()
    def close_view(self):
        if self.view is not None:
            self.view.close()
            self.view = None

    @invariant()
    def every_offset_has_its_record_or_none(self):
        counts = self.log.check_all(self.stream)
        assert [one.records for one in self.stream.stats().partitions] == counts

    def teardown(self):
        if hasattr(self, "store"):
            self.close_view()
            self.store.close()
            assert inspect.verify(self.path).problems == []
            shutil.rmtree(self.path)


TestCompacted = Compacted.TestCase
TestCompacted.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
