"""All of a store at once, against a model of a few lines.

Streams (plain, compacted with views, with retention, one that is dropped and made anew), consumer
groups, idempotent producers, two queues, and transactions and pipes over all of them; through two
openers, over reopening, backups and the death of all processes. A transaction changes the model
when it commits, and not before. Time is virtual. MILLSTREAM_FULL=1 runs many more examples, and
prints how often each step was done.
"""

import contextlib
import copy
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import initialize, invariant, precondition, rule
from open_copy import copy_open
from queue_model import ATTEMPTS, BACKOFF, BLOCKS, QueueModel
from stream_model import Group
from whole_queues import WINDOW, QueueSteps, puts, queues
from whole_streams import GROUPS, StreamSteps, done, drawn_rows, some, streams

import millstream
from millstream import Aborted, Compaction, QueueFull, RetryPolicy, inspect
from millstream.testing import clock

effects = st.one_of(
    st.tuples(st.just("append"), streams, drawn_rows, some, st.booleans()),
    st.tuples(st.just("put"), queues, puts),
    st.tuples(st.just("ack"), some),
    st.tuples(st.just("consume"), some),
)
levels = st.sampled_from(["process", "interval", "sync"])


class Failed(Exception):
    def __repr__(self):
        return "by policy"  # which the model has as reason


class Tx:
    """What a transaction will do to the model."""

    def __init__(self, real):
        self.real, self.shares, self.puts, self.acks, self.members = real, [], [], {}, []
        self.spread = []  # streams with keys in it, and over how many partitions these went


class WholeMachine(StreamSteps, QueueSteps):
    def __init__(self):
        super().__init__()
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.directory = Path(tempfile.mkdtemp(prefix="millstream-whole-", dir=memory))
        self.path = self.directory / "store"
        self.txs = {}
        self.clock = clock()
        self.time = self.clock.__enter__()

    @initialize(
        stay=st.booleans(), on_dead=st.sampled_from(["skip", "stop"]), room=st.integers(4, 12)
    )
    def create(self, stay, on_dead, room):
        common = {
            "capacity": room, "priorities": 2, "payload_bytes": BLOCKS * 4096, "lease": 550,
            "dead_limit": 3, "ageing": False,
            "retry": RetryPolicy(max_attempts=ATTEMPTS, backoff=BACKOFF, factor=1.0, jitter=0.0),
        }  # fmt: skip
        self.options = {
            "jobs": {**common, "ordering": None, "on_dead": "skip", "dedup_window": WINDOW},
            "lines": {**common, "ordering": "key", "on_dead": on_dead},
        }
        # Tombstones that stay do so through all steps: some of the 50 go on by days (retention).
        self.stay, self.compaction = stay, Compaction(tombstone_age="30000d" if stay else 0)
        self.queues = {name: QueueModel(options) for name, options in self.options.items()}
        self.open()
        for name in ("plain", "keyed", "kept", "brief"):
            self.make(name)
        self.groups["pipe"] = Group("pipe", self.logs["plain"], {})
        for name in GROUPS:
            self.join(name)
        for name in self.logs:
            size = 12_000 if name in ("keyed", "kept") else 40  # two or three segments
            drawn = [(n % 7, size) for n in range(24)]
            drawn[2:11:4] = (8, size), (8, None), (9, None)  # tombstones that stay the last
            for at in range(0, 24, 4):
                self.send(name, "p", 0, drawn[at : at + 4], 0, True, False)
        for name in self.queues:
            for key in (None, b"a", b"a"):
                self.put(name, (0, 0, key, 8, None), False)

    def teardown(self):
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory)
            stack.callback(self.clock.__exit__, None, None, None)
            for store in self.stores:
                stack.callback(store.close)
            self.close()
            if self.logs and sys.exc_info()[0] is None:  # else the model is behind
                self.second_reader(self.path)

    def open(self):
        store = millstream.open(self.path, durability="process")
        store._background._stopping = True  # retention and compaction only where a step asks
        self.stores.append(store)
        for name, options in self.options.items():
            store.queue(name, **options)

    def close(self):
        for side in list(self.txs):
            self.roll_back(side)
        self.close_view()
        while self.stores:
            self.stores[-1].close()
            self.stores.pop()
        for one in self.groups.values():
            one.members.clear()
        self.taken.clear()

    # --- transactions and pipes -------------------------------------------------------------------

    @rule(first=st.lists(effects, min_size=1, max_size=5), second=st.booleans(),
          at_once=st.booleans(), level=levels)  # fmt: skip
    def begin(self, first, second, at_once, level):
        side = self.side(second)
        if side not in self.txs:
            self.txs[side] = Tx(self.stores[side].transaction(durability=level).__enter__())
        for effect in first:
            self.do_within(self.txs[side], effect, second)
        if at_once:
            self.commit([], second)

    def do_within(self, tx, effect, second):
        kind, *given = effect
        done[f"{kind} in a transaction"] += 1
        if kind == "append":
            name, drawn, which, keyed = given
            log = self.logs[name]
            made, p = self.new_rows(log, drawn, which, keyed)
            keys = [row[1] for row in made] if keyed else None
            values = [row[2] for row in made]
            tx.real.append_many(self.stream(name, second), values, keys=keys, partition=p)
            tx.shares += [(log, *row) for row in made]
            if keyed:
                tx.spread.append((log, len(log.rows)))
        elif kind == "put":
            name, put = given
            m, named = self.new_message(name, *put)
            tx.real.put(self.queue(name, second), **named)
            tx.puts.append((name, m, named["dedup_id"]))
        elif kind == "ack" and self.taken:
            one = self.pick(given[0])
            if not one[1].finished:
                tx.real.ack(one[1])
                tx.acks[id(one[1])] = one
        elif kind == "consume":
            name, member = self.member(given[0], "exactly_once")
            if member is not None:
                self.poll(member, name)
                tx.real.commit(member.consumer)
                tx.members.append(member)

    def expected(self, tx):
        """What its commit raises, if anything, and which of its puts are no double."""
        fresh, claimed = [], set()
        for name, m, dedup in tx.puts:
            if dedup is None or (self.first_of(dedup) is None and dedup not in claimed):
                fresh.append((name, m, dedup))
            claimed.add(dedup)
        if any(len(log.rows) != count for log, count in tx.spread):
            return Aborted, fresh
        if not all(
            self.is_live(name, known, lease) for name, _, known, lease, _ in tx.acks.values()
        ):
            return Aborted, fresh
        for name, model in self.queues.items():
            if not model.fits(*(m for of, m, _ in fresh if of == name)):
                return QueueFull, fresh
        for member in tx.members:
            if member.consumer.closed or member.forfeited or (member.ended and member.dirty):
                return Aborted, fresh
        return None, fresh

    @precondition(lambda self: self.txs)
    @rule(more=st.lists(effects, max_size=2), second=st.booleans())
    def commit(self, more, second):
        side = self.side(second)
        if side not in self.txs:
            return
        for effect in more:
            self.do_within(self.txs[side], effect, second)
        tx = self.txs.pop(side)
        error, fresh = self.expected(tx)
        if error is not None:
            done[f"transaction: {error.__name__}"] += 1
            self.before_rewind(tx)
            with pytest.raises(error):
                tx.real.__exit__(None, None, None)
            self.rewound(tx)
            return
        done["transaction committed"] += 1
        tx.real.__exit__(None, None, None)
        for log, *row in tx.shares:
            log.append(*row)
        self.added(fresh)
        for name, _, known, _, _ in tx.acks.values():
            self.queues[name].finish(known)
        for member in tx.members:
            member.commit()

    def added(self, fresh):
        """Puts of a transaction: nobody has told their ids, so they are looked up."""
        for name, m, dedup in fresh:
            numbers = [found.id for found in self.queue(name).peek(100) if found.value == m.value]
            assert len(numbers) == 1, "it is not there, or not once"
            self.add(name, m, numbers[0], dedup)

    @precondition(lambda self: self.txs)
    @rule(second=st.booleans())
    def give_up(self, second):
        done["transaction rolled back"] += 1
        self.roll_back(self.side(second))

    def roll_back(self, side):
        if side in self.txs:
            tx = self.txs.pop(side)
            self.before_rewind(tx)
            tx.real.rollback()
            tx.real.__exit__(None, None, None)
            self.rewound(tx)

    def before_rewind(self, tx):
        for member in tx.members:
            member.joins_again()

    def rewound(self, tx):
        for member in tx.members:
            member.rewind()

    @rule(put=puts, second=st.booleans())
    def pipe_records(self, put, second):
        """One step from a stream to a queue."""
        if self.side(second) in self.txs:
            return
        seen, log, committed = [], self.logs["plain"], self.groups["pipe"].committed

        def function(record):
            m, named = self.new_message("lines", *put)
            seen.append((record.position, (record.key, record.value), m))
            return millstream.Put(**named)

        before = dict(committed)
        source, sink = self.stream("plain", second), self.queue("lines", second)
        try:
            with self.stores[self.side(second)].pipe(source, function, sink, batch=3) as pipe:
                assert pipe.step() == len(seen)
        except QueueFull:
            assert not self.queues["lines"].fits(*(m for _, _, m in seen))
            return
        done["piped to a queue"] += len(seen)
        for position, row, _ in seen:
            p = position.partition
            assert position.offset == committed.get(p, 0) and row == log.rows[p][position.offset]
            committed[p] = position.offset + 1
        assert seen or committed == before == {
            p: len(rows) for p, rows in enumerate(log.rows) if rows
        }
        self.added([("lines", m, None) for _, _, m in seen])

    @rule(name=queues, count=st.integers(1, 3), fails=st.booleans(), second=st.booleans())
    def pipe_messages(self, name, count, fails, second):
        """One step from a queue to a stream."""
        if self.side(second) in self.txs:
            return
        log, model, seen = self.logs["kept"], self.queues[name], []
        side, some_ready = self.side(second), bool(model.next_ones())

        def function(message):
            seen.append(message)
            if fails and len(seen) == count:
                raise Failed
            return {"value": message.value, "key": message.key, "partition": 1}

        source, sink = self.queue(name, second), self.stream("kept", second)
        failed = False
        with self.stores[side].pipe(source, function, sink, batch=count) as pipe:
            try:
                assert pipe.step() == len(seen)
            except Failed:
                failed = True
        assert bool(seen) is some_ready and failed is (fails and len(seen) == count)
        done["piped from a queue"] += len(seen)
        for m in [model.take(message, side) for message in seen]:
            if failed:
                model.ended(m, "nack" if m.id == seen[-1].id else "release")
            else:
                log.append(1, m.key, m.value)
                model.finish(m)

    # --- the store --------------------------------------------------------------------------------

    @rule(what=st.sampled_from(["reopen", "kill", "backup", "copy", "second", "hang", "drop",
          "partition"]), second=st.booleans())  # fmt: skip
    def disturb(self, what, second):
        {
            "reopen": lambda: self.reopen(kill=False),
            "kill": lambda: self.reopen(kill=True),
            "backup": lambda: self.look_at_a_copy(False, second),
            "copy": lambda: self.look_at_a_copy(True, second),
            "second": self.open_or_close_a_second_time,
            "hang": lambda: self.hang(commit=second),
            "drop": lambda: self.drop_and_make_anew(second),
            "partition": lambda: self.add_a_partition(second),
        }[what]()

    def open_or_close_a_second_time(self):
        if len(self.stores) == 1:
            self.open()
            return
        self.roll_back(1)
        self.stores.pop().close()
        self.time.advance(0.2)  # the dead are looked for every 50 ms
        for name, model in self.queues.items():
            self.queue(name)._upkeep()
            model.holder_died(1)
        self.taken = [one for one in self.taken if one[-1] == 0]
        for one in self.groups.values():
            one.members = [member for member in one.members if member.side == 0]

    def reopen(self, kill):
        """Close the store, or go on in a copy of it, as the death of all processes leaves it."""
        done["death of all" if kill else "reopened"] += 1
        if kill:
            copy_open(self.path, self.directory / "copy")
        joined = [name for name, one in self.groups.items() if one.members]
        self.close()
        if kill:
            shutil.rmtree(self.path)
            (self.directory / "copy").rename(self.path)
        self.second_reader(self.path)
        self.open()
        for model in self.queues.values():
            model.recover()
        self.check_all(self.stores[0], self.queues)
        for name in joined:
            self.join(name)

    def look_at_a_copy(self, kill, second):
        """A backup, or what the death of all processes would leave now."""
        done["copy" if kill else "backup"] += 1
        target = self.directory / "aside"
        if kill:
            copy_open(self.path, target)
        else:
            self.stores[self.side(second)].backup(target)
        self.second_reader(target)
        queues = copy.deepcopy(self.queues)
        with millstream.open(target, durability="process") as store:
            for model in queues.values():
                model.recover()
            self.check_all(store, queues)
            for dedup in self.claims:
                if (first := self.first_of(dedup)) is not None:
                    assert store.queue("jobs").put(b"again", dedup_id=dedup, timeout=0) == first
        shutil.rmtree(target)

    def second_reader(self, path):
        assert inspect.verify(path).problems == []
        for name, log in self.logs.items():
            for p, rows in enumerate(log.rows):
                found = [(r.offset, r.key, r.value) for r in inspect.records(path, name, p)]
                log.check(p, log.firsts[p], len(rows), found)
        for name, model in self.queues.items():
            found = sorted((m.id, m.payload, m.attempts) for m in inspect.messages(path, name))
            wanted = ((m.id, m.value, m.attempts) for m in model.messages.values())
            assert found == sorted(wanted)

    def check_all(self, store, queues):
        self.check(store, queues)
        for name, log in self.logs.items():
            log.check_all(store.stream(name))
            log.check_producers(store.stream(name))

    def check(self, store, queues):
        assert store.streams() == sorted(self.logs)
        for name, log in self.logs.items():
            stream = store.stream(name)
            ends = [stream.next_offset(p) for p in range(stream.partitions)]
            assert ends == [len(rows) for rows in log.rows]
        for name, one in self.groups.items():
            stream = store.stream(GROUPS.get(name, ("plain",))[0])
            if name == "pipe" and name not in stream.groups():  # it has not begun
                continue
            found = stream.group(name)
            positions = {p: at and at.offset for p, at in found.positions().items()}
            assert positions == {p: one.committed.get(p) for p in positions}
            assert found.lag() == one.lag()
        for name, model in queues.items():
            model.check(store.queue(name))

    @invariant()
    def store_is_as_its_model(self):
        done["step"] += 1
        if self.logs and self.stores:
            self.check(self.stores[-1], self.queues)
            for one in self.groups.values():
                for member in one.members:
                    for p, position in member.consumer.position.items():
                        assert member.ended or position.offset == member.at[p]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_store_behaves_as_its_model():
    from hypothesis.stateful import run_state_machine_as_test

    full = bool(os.environ.get("MILLSTREAM_FULL"))
    try:
        run_state_machine_as_test(
            WholeMachine,
            settings=settings(
                max_examples=1000 if full else 60,
                stateful_step_count=50,
                deadline=None,
                database=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        print(*(f"{name}: {count}" for name, count in sorted(done.items())), sep=", ")
