"""Compaction, retention, reopening and views, in any order, against a dictionary."""

import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import millstream
from millstream import files, group, inspect

KEYS = st.integers(0, 12)
ROWS = st.lists(
    st.tuples(st.one_of(st.none(), KEYS), st.one_of(st.none(), st.integers(0, 9000))),
    min_size=1,
    max_size=30,
)


class Compacted(RuleBasedStateMachine):
    """`rows` is all that was appended, by partition and offset; `first` where retention begins."""

    @initialize(partitions=st.integers(1, 2), age=st.sampled_from((0, 3600)))
    def open(self, partitions, age):
        root = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.path = tempfile.mkdtemp(prefix="millstream-compaction-", dir=root)
        self.keep = millstream.Compaction(tombstone_age=age, min_dirty=1.0)
        self.store = millstream.open(self.path, durability="process")
        self.stream = self.store.stream(
            "s", partitions=partitions, segment_bytes=1 << 16, compact=self.keep
        )
        self.rows = [{} for _ in range(partitions)]
        self.view = None

    @rule(rows=ROWS, index=st.integers(0, 1), single=st.booleans())
    def append(self, rows, index, single):
        index %= len(self.rows)
        mine = self.rows[index]
        records = [
            (
                None if key is None else b"%d/%d" % (index, key),
                None if size is None else b"%d " % len(mine) + b"v" * size,
            )
            for key, size in rows
        ]
        first = self.stream.next_offset(index)
        if single:
            for key, value in records:
                self.stream.append(value, key=key, partition=index)
        else:
            self.stream.append_many(
                [value for _, value in records],
                keys=[key for key, _ in records],
                partition=index,
            )
        mine.update({first + i: record for i, record in enumerate(records)})

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
        index %= len(self.rows)
        end = self.stream.next_offset(index)
        offset = int(part * end)
        first = self.stream.delete_before(millstream.Position(index, 1, offset))
        assert first <= max(offset, self.stream.first_offset(index))

    @rule()
    def look_through_a_view(self):
        """One view, kept or taken up from its snapshot; keys that retention took stay in it."""
        if self.view is None:
            self.view = self.stream.view()
        for index, mine in enumerate(self.rows):
            if mine:
                epoch = group.epoch_at(self.stream, index, max(mine))
                last = millstream.Position(index, epoch, max(mine))
                self.view.wait_for(last, timeout=30)
        wanted, maybe = self.latest()
        found = dict(self.view.items())
        assert {key: found.get(key) for key in wanted} == wanted
        assert found.items() <= {**maybe, **wanted}.items()

    @rule()
    def close_view(self):
        if self.view is not None:
            self.view.close()
            self.view = None

    def latest(self):
        """(keys and values that are there, those that may be: retention took them)."""
        wanted, maybe = {}, {}
        for index, mine in enumerate(self.rows):
            first = self.stream.first_offset(index)
            for offset, (key, value) in mine.items():
                if key is None:
                    continue
                wanted.pop(key, None)
                maybe.pop(key, None)
                if value is not None:
                    (wanted if offset >= first else maybe)[key] = value
        return wanted, maybe

    @invariant()
    def every_offset_has_its_record_or_none(self):
        last = {}
        for index, mine in enumerate(self.rows):
            first = self.stream.first_offset(index)
            found = {}
            for batch in self.stream.read(partition=index):
                rows = zip(batch.offsets.tolist(), batch.keys, batch.values, strict=True)
                for offset, key, value in rows:
                    record = tuple(None if part is None else bytes(part) for part in (key, value))
                    assert record == mine[offset]
                    found[offset] = record
                    if record[0] is not None:
                        last[record[0]] = record[1]
            assert list(found) == sorted(found)
            keyless = {at for at, (key, _) in mine.items() if key is None and at >= first}
            assert keyless <= set(found)
            assert self.stream.stats().partitions[index].records == len(found)
        wanted, _ = self.latest()
        assert {key: value for key, value in last.items() if value is not None} == wanted

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
