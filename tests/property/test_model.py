"""A store against a model of a few lines, and against the second reader.

The model is a list of records a partition, and where the log may begin. Steps append, read from
anywhere, alter, retire, reopen, open a second time, and copy the directory while it is open, which
is what a power cut leaves where nothing was lost.
"""

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import xxhash
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from open_copy import copy_open

import millstream
from millstream import OffsetOutOfRange, Position, Retention, inspect

values = st.one_of(st.none(), st.binary(max_size=20), st.integers(1, 30_000).map(bytes))
keys = st.one_of(st.none(), st.binary(max_size=8), st.sampled_from([b"a", b"b", b"c"]))
header_maps = st.dictionaries(st.text(max_size=4), st.binary(max_size=9), max_size=3)
stamps = st.integers(-(1 << 40), 1 << 60)
names = st.sampled_from(["one", "two"])
rows = st.lists(st.tuples(values, keys, header_maps, stamps), min_size=1, max_size=30)
fractions = st.floats(0, 1)


class Stream:
    """The model: of each partition the records, oldest first, and where it begins at the latest."""

    def __init__(self, partitions):
        self.logs = [[] for _ in range(partitions)]
        self.firsts = [0] * partitions

    def target(self, key):
        return xxhash.xxh3_64_intdigest(key) % len(self.logs)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="millstream-model-"))
        self.path = self.directory / "store"
        self.store = self.second = None
        self.model = {}

    @initialize(level=st.sampled_from(["process", "interval"]))
    def create(self, level):
        self.store = millstream.open(self.path, durability=level)
        self.store._background._stopping = True  # retention only where a step asks for it

    def teardown(self):
        for store in (self.second, self.store):
            if store is not None:
                store.close()
        if self.model:
            self.agree_with_second_reader(self.path)
        shutil.rmtree(self.directory)

    # --- helpers ---------------------------------------------------------------------------------

    def stream(self, name, second=False):
        """A handle of the stream, of the first or the second opener."""
        if name not in self.model:
            self.store.stream(name, partitions=2, segment_bytes=1 << 16)
            self.model[name] = Stream(2)
        store = self.second if second and self.second is not None else self.store
        return store.stream(name), self.model[name]

    def check(self, stream, model, partition, start, most=None):
        found = []
        following = start
        for batch in stream.read(partition=partition, start=start, max_records=most):
            assert batch.partition == partition
            assert batch.first_offset == following
            following = batch.next_offset
            assert batch.offsets.tolist() == list(range(batch.first_offset, following))
            found += zip(
                batch.values, batch.keys, batch.headers, batch.timestamps.tolist(), strict=True
            )
        expected = model.logs[partition][start:]
        assert found == (expected if most is None else expected[:most])

    def agree_with_second_reader(self, path):
        report = inspect.verify(path)
        assert report.ok, report.problems
        for name, model in self.model.items():
            for partition, log in enumerate(model.logs):
                found = [
                    (r.offset, r.value, r.key, dict(r.headers), r.timestamp)
                    for r in inspect.records(path, name, partition)
                ]
                expected = [(at, *row) for at, row in enumerate(log)]
                assert found == expected[len(log) - len(found) :]
                assert len(found) >= len(log) - model.firsts[partition]

    # --- steps -----------------------------------------------------------------------------------

    @rule(name=names, row=st.tuples(values, keys, header_maps, stamps), by_hand=st.booleans(),
          second=st.booleans())  # fmt: skip
    def append(self, name, row, by_hand, second):
        stream, model = self.stream(name, second)
        value, key, headers, stamp = row
        partition = len(model.logs) - 1 if by_hand else None
        position = stream.append(
            value, key=key, headers=headers or None, timestamp=stamp, partition=partition
        )
        if by_hand:
            assert position.partition == partition
        elif key is not None:
            assert position.partition == model.target(key)
        log = model.logs[position.partition]
        assert position.offset == len(log)
        log.append(row)

    @rule(name=names, many=rows, repeat=st.integers(1, 40), keyed=st.booleans(),
          second=st.booleans())  # fmt: skip
    def append_many(self, name, many, repeat, keyed, second):
        stream, model = self.stream(name, second)
        many = [row if keyed else (row[0], None, *row[2:]) for row in many * repeat]
        column = [list(column) for column in zip(*many, strict=True)]
        spans = stream.append_many(
            column[0], keys=column[1] if keyed else None, headers=column[2], timestamps=column[3]
        )
        expected = {}
        nowhere = []
        for row in many:
            if row[1] is None:
                nowhere.append(row)
            expected.setdefault(None if row[1] is None else model.target(row[1]), []).append(row)
        shares = {span.partition: span for span in spans}
        assert sum(span.count for span in spans) == len(many)
        assert len(shares) == len(spans)
        home = None
        if nowhere:
            # Those without a key went together to one partition, in their order among its own.
            by_key = {p: len(share) for p, share in expected.items() if p is not None}
            [home] = [p for p, span in shares.items() if span.count != by_key.get(p, 0)]
        for partition, span in shares.items():
            log = model.logs[partition]
            assert span.first_offset == len(log)
            log += [
                row
                for row in many
                if (home if row[1] is None else model.target(row[1])) == partition
            ]
            assert len(log) == span.first_offset + span.count

    @rule(name=names, at=fractions, most=st.one_of(st.none(), st.integers(0, 70)),
          second=st.booleans())  # fmt: skip
    def read(self, name, at, most, second):
        stream, model = self.stream(name, second)
        for partition, log in enumerate(model.logs):
            first = stream.first_offset(partition)
            assert first <= model.firsts[partition]
            assert stream.next_offset(partition) == len(log)
            self.check(stream, model, partition, first + round(at * (len(log) - first)), most)
            if first:
                try:
                    stream.read(partition=partition, start=first - 1)
                except OffsetOutOfRange as error:
                    assert (error.first, error.next) == (first, len(log))
                else:
                    raise AssertionError

    @rule(name=names)
    def read_all(self, name):
        stream, model = self.stream(name)
        found = [[] for _ in model.logs]
        for batch in stream.read():
            found[batch.partition] += batch.values
        for partition, log in enumerate(model.logs):
            first = stream.first_offset(partition)
            assert found[partition] == [row[0] for row in log[first:]]

    @rule(name=names, stamp=stamps)
    def look_up_a_time(self, name, stamp):
        stream, model = self.stream(name)
        for partition, log in enumerate(model.logs):
            first = stream.first_offset(partition)
            later = (at for at in range(first, len(log)) if log[at][3] >= stamp)
            assert stream.offset_at(stamp, partition) == next(later, len(log))

    @rule(name=names, at=fractions)
    def delete_before(self, name, at):
        stream, model = self.stream(name)
        for partition, log in enumerate(model.logs):
            offset = round(at * len(log))
            first = stream.delete_before(Position(partition, 1, offset))
            model.firsts[partition] = max(model.firsts[partition], offset)
            assert first == stream.first_offset(partition) <= model.firsts[partition]

    @rule(name=names, count=st.integers(0, 500))
    def alter_and_enforce(self, name, count):
        stream, model = self.stream(name)
        stream.alter(retention=Retention(records=count))
        assert stream.retention.records == count
        stream.enforce_retention()
        for partition, log in enumerate(model.logs):
            first = stream.first_offset(partition)
            assert first <= max(model.firsts[partition], len(log) - count, 0)
            model.firsts[partition] = max(model.firsts[partition], first)
        stream.alter(retention=None)

    @precondition(lambda self: any(len(model.logs) < 5 for model in self.model.values()))
    @rule(name=names)
    def add_a_partition(self, name):
        stream, model = self.stream(name)
        if len(model.logs) < 5:
            model.logs.append([])
            model.firsts.append(0)
            assert stream.add_partitions(1) == len(model.logs)

    @rule(name=names)
    def drop(self, name):
        if name in self.model:
            self.store.drop_stream(name)
            del self.model[name]

    @rule(name=names)
    def flush(self, name):
        stream, model = self.stream(name)
        stream.flush()
        for partition, log in enumerate(model.logs):
            assert stream.durable_offset(partition) == len(log)
            self.check(stream, model, partition, stream.first_offset(partition))

    @rule()
    def open_a_second_time(self):
        if self.second is None:
            self.second = millstream.open(self.path, durability="process")
        else:
            self.second.close()
            self.second = None

    @rule()
    def reopen(self):
        self.store.close()
        if self.second is not None:
            self.second.close()
            self.second = None
        self.agree_with_second_reader(self.path)
        self.store = millstream.open(self.path)
        self.store._background._stopping = True

    @rule(go_on=st.booleans())
    def crash(self, go_on):
        """Copy what is there, as a cut of the power after a sync would leave it, and look at it."""
        copy = self.directory / "copy"
        copy_open(self.path, copy)
        self.agree_with_second_reader(copy)
        if go_on:
            self.store.close()
            if self.second is not None:
                self.second.close()
                self.second = None
            shutil.rmtree(self.path)
            copy.rename(self.path)
            self.store = millstream.open(self.path)
            self.store._background._stopping = True
            for name in self.model:
                self.read(name, 0.0, None, False)
        else:
            with millstream.open(copy, mode="r") as store:
                assert store.streams() == sorted(self.model)
                for name, model in self.model.items():
                    for partition in range(len(model.logs)):
                        stream = store.stream(name)
                        first = stream.first_offset(partition)
                        self.check(stream, model, partition, first)
            shutil.rmtree(copy)

    @rule()
    def back_up(self):
        target = self.directory / "backup"
        self.store.backup(target)
        self.agree_with_second_reader(target)
        shutil.rmtree(target)

    @invariant()
    def streams_are_known(self):
        if self.store is not None:
            assert self.store.streams() == sorted(self.model)


@pytest.mark.slow
def test_store_behaves_as_its_model():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=200 if os.environ.get("MILLSTREAM_FULL") else 100,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
