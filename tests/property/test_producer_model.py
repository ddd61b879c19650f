"""Producers against a model of a few lines: of each partition the records, and who sent them.

Steps send, from before what was sent too, through two handles and two openers at once; append
without a producer; remove segments; reopen, cleanly or not; and copy the directory while it is
open.
"""

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from open_copy import copy_open
from stream_model import Log

import millstream
from millstream import Position, inspect

names = st.sampled_from(["p", "q", "é:1"])
sizes = st.sampled_from([0, 10, 3_000, 30_000])
keyed = st.sampled_from([None, b"a", b"b", "each"])


class ProducerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="millstream-producers-"))
        self.path = self.directory / "store"
        self.stores = []

    def open(self):
        store = millstream.open(self.path, durability="process")
        store._background._stopping = True
        self.stores.append(store)

    @initialize(partitions=st.integers(1, 3))
    def create(self, partitions):
        self.open()
        self.stores[0].stream("s", partitions=partitions, segment_bytes=1 << 16)
        self.log = Log(partitions)

    def teardown(self):
        for store in self.stores:
            store.close()
        if self.stores:
            assert inspect.verify(self.path).ok
        shutil.rmtree(self.directory)

    def stream(self, second=False):
        return self.stores[-1 if second else 0].stream("s")

    def target(self, sequence, key):
        return sequence % len(self.log.rows) if key is None else self.log.target(key)

    @rule(
        name=names,
        back=st.integers(-3, 12),
        gaps=st.lists(st.integers(1, 4), min_size=1, max_size=12),
        size=sizes,
        kind=keyed,
        second=st.booleans(),
        level=st.sampled_from([None, "sync"]),
    )
    def send(self, name, back, gaps, size, kind, second, level):
        highest = max(sent.get(name, -1) for sent in self.log.sent)
        sequence = max(0, highest + 1 - back)
        sequences = [sequence + sum(gaps[:i]) for i in range(len(gaps))]
        keys = [b"%d" % (n % 5) if kind == "each" else kind for n in sequences]
        values = [f"{name} {n} ".encode() + bytes(size) for n in sequences]
        rows = zip(sequences, keys, values, strict=True)
        new = self.log.send(name, [(n, self.target(n, key), key, value) for n, key, value in rows])
        final = self.target(sequences[-1], keys[-1])
        producer = self.stream(second).producer(name)
        if len(sequences) == 1:
            found = producer.append(values[0], sequence=sequence, key=keys[0], durability=level)
            assert (found is not None) == bool(new[final])
            if found:
                assert found.offset == len(self.log.rows[final]) - 1
            return
        spans = producer.append_many(
            values, sequences=sequences, keys=keys if kind else None, durability=level
        )
        assert {span.partition: span.count for span in spans} == {
            p: count for p, count in enumerate(new) if count
        }
        for span in spans:
            assert span.first_offset + span.count == len(self.log.rows[span.partition])

    @rule(count=st.integers(1, 400), size=sizes, second=st.booleans(), p=st.integers(0, 2))
    def append_without_producer(self, count, size, second, p):
        p %= len(self.log.rows)
        if size > 100:
            count = 1
        for _ in range(count):
            self.stream(second).append(b"x" * size, partition=p)
            self.log.append(p, None, b"x" * size)

    @rule(p=st.integers(0, 2), part=st.floats(0, 1))
    def remove(self, p, part):
        p %= len(self.log.rows)
        stream = self.stream()
        first, following = stream.first_offset(p), stream.next_offset(p)
        at = first + int(part * (following - first))
        before = Position(p, self.stores[0].session.generation, at)
        self.log.firsts[p] = stream.delete_before(before)

    @rule()
    def second_opener(self):
        if len(self.stores) == 1:
            self.open()

    @rule(clean=st.booleans())
    def reopen(self, clean):
        for store in self.stores:
            if not clean:
                store._set_clean = lambda: None
            store.close()
        self.stores = []
        self.open()

    @rule()
    def copy(self):
        """What a power cut leaves where nothing was lost."""
        copy_open(self.path, self.directory / "copy")
        with millstream.open(self.directory / "copy") as store:
            self.check(store.stream("s"))
        shutil.rmtree(self.directory / "copy")

    @rule()
    def back_up(self):
        self.stores[0].backup(self.directory / "backup")
        with millstream.open(self.directory / "backup") as store:
            self.check(store.stream("s"))
        assert inspect.verify(self.directory / "backup").ok
        shutil.rmtree(self.directory / "backup")

    def check(self, stream):
        self.log.check_all(stream)
        self.log.check_producers(stream)

    @invariant()
    def producers_know_what_they_sent(self):
        for store in self.stores:
            self.log.check_producers(store.stream("s"))

    @rule()
    def read_all(self):
        self.check(self.stream())


def test_producers_behave_as_their_model():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        ProducerMachine,
        settings=settings(
            max_examples=100,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
