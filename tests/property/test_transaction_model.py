"""Transactions over streams, queues and a group, against a model of a few lines.

The model has, of each stream, queue and position, what is committed. A transaction changes a copy;
its commit puts the copy in the place of the model, everything else throws it away. Besides, plain
appends, puts and takes go on; now and then all processes are gone at once, as by SIGKILL.
"""

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from open_copy import copy_open

import millstream
from millstream import Aborted, QueueFull, inspect

FULL = bool(os.environ.get("MILLSTREAM_FULL"))
CAPACITY = 6
sizes = st.sampled_from([1, 1, 40, 300, 9000])
streams = st.sampled_from(["a", "b"])
levels = st.sampled_from(["process", "interval", "sync"])


class TransactionMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="millstream-tx-", dir="/dev/shm"))
        self.path = self.directory / "store"
        self.logs = {"a": [], "b": []}
        self.waiting = []  # values of messages that nobody has leased
        self.leased = {}  # the others, with their values
        self.position = 0
        self.tx = None
        self.numbers = 0
        self.store = None

    @initialize()
    def start(self):
        self.open()

    def open(self):
        self.store = millstream.open(self.path, durability="process")
        self.store._background._stopping = True
        self.q = self.store.queue("q", capacity=CAPACITY, dead_limit=4, lease=3600.0,
                                  payload_bytes="256KiB")  # fmt: skip
        self.consumer = self.store.stream("a").consumer(
            "g", delivery="exactly_once", max_records=3, timeout=0
        )
        self.given = self.position

    def teardown(self):
        if self.store is not None:
            self.end_transaction(False)
            self.consumer.close()
            self.store.close()
            assert inspect.verify(self.path).ok
        shutil.rmtree(self.directory)

    def value(self, size):
        self.numbers += 1
        return b"%d " % self.numbers * size

    # --- plain ------------------------------------------------------------------------------------

    @rule(name=streams, size=sizes)
    def append(self, name, size):
        value = self.value(size)
        self.store.stream(name).append(value)
        self.logs[name].append(value)

    @rule(size=sizes)
    def put(self, size):
        value = self.value(size)
        full = len(self.waiting) + len(self.leased) == CAPACITY
        try:
            self.q.put(value, timeout=0)
            assert not full
            self.waiting.append(value)
        except QueueFull:
            assert full

    @rule()
    def take(self):
        try:
            message = self.q.get(timeout=0)
        except millstream.Empty:
            assert not self.waiting
            return
        self.waiting.remove(message.value)
        self.leased[message] = message.value

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), give_back=st.booleans())
    def finish(self, data, give_back):
        message = data.draw(st.sampled_from(list(self.leased)))
        value = self.leased.pop(message)
        if give_back:
            message.release()
            self.waiting.append(value)
        else:
            message.ack()
        if self.tx is not None and message in self.acked:
            self.aborts = True

    # --- transactions -----------------------------------------------------------------------------

    @precondition(lambda self: self.tx is None)
    @rule(level=levels)
    def begin(self, level):
        self.tx = self.store.transaction(durability=level).__enter__()
        self.shares, self.puts, self.acked = [], [], []
        self.aborts = self.marks = False

    @precondition(lambda self: self.tx is not None)
    @rule(name=streams, size=sizes)
    def tx_append(self, name, size):
        value = self.value(size)
        self.tx.append(self.store.stream(name), value)
        self.shares.append((name, value))

    @precondition(lambda self: self.tx is not None)
    @rule(size=sizes)
    def tx_put(self, size):
        value = self.value(size)
        self.tx.put(self.q, value)
        self.puts.append(value)

    @precondition(lambda self: self.tx is not None and self.leased)
    @rule(data=st.data())
    def tx_ack(self, data):
        message = data.draw(st.sampled_from(list(self.leased)))
        self.tx.ack(message)
        if message not in self.acked:
            self.acked.append(message)

    @precondition(lambda self: self.tx is not None)
    @rule()
    def tx_consume(self):
        batch = self.consumer.poll(0)
        expected = self.logs["a"][self.given : self.given + 3]
        assert batch is None or expected[: len(batch)] == list(batch.values)
        assert (batch is None) == (not expected)
        if batch is not None:
            self.given += len(batch)
            self.tx.commit(self.consumer)
            self.marks = True

    @precondition(lambda self: self.tx is not None)
    @rule()
    def commit(self):
        room = CAPACITY - len(self.waiting) - len(self.leased)
        refused = self.aborts or room < len(self.puts)
        try:
            self.end_transaction(True)
            assert not refused
        except Aborted:
            assert self.aborts
        except QueueFull:
            assert room < len(self.puts)
        if refused:
            self.given = self.position if self.marks else self.given
            return
        for name, value in self.shares:
            self.logs[name].append(value)
        self.waiting += self.puts
        for message in self.acked:
            self.leased.pop(message)
        if self.marks:
            self.position = self.given

    @precondition(lambda self: self.tx is not None)
    @rule()
    def roll_back(self):
        self.end_transaction(False)
        self.given = self.position if self.marks else self.given

    def end_transaction(self, commit):
        tx, self.tx = self.tx, None
        if tx is None:
            return
        if not commit:
            tx.rollback()
        tx.__exit__(None, None, None)

    # --- the store --------------------------------------------------------------------------------

    @rule(kill=st.booleans())
    def reopen(self, kill):
        """Close it, or copy what is there, as a kill of all processes leaves it."""
        self.end_transaction(False)
        copy = self.directory / f"copy{self.numbers}"
        self.numbers += 1
        if kill:
            copy_open(self.path, copy)
        self.consumer.close()
        self.store.close()
        if kill:
            shutil.rmtree(self.path)
            copy.rename(self.path)
        self.waiting += self.leased.values()
        self.leased = {}
        self.open()

    @rule()
    def back_up(self):
        copy = self.directory / f"backup{self.numbers}"
        self.numbers += 1
        self.store.backup(copy)
        with millstream.open(copy) as store:
            self.agree(store, self.waiting + list(self.leased.values()))
        shutil.rmtree(copy)

    @invariant()
    def everything_agrees(self):
        if self.store is None:
            return
        self.agree(self.store, self.waiting)
        assert len(self.q) == len(self.waiting) + len(self.leased)
        self.q._check()
        assert self.store.streams() == sorted({*self.store.streams()} - {"@journal"})

    def agree(self, store, messages):
        for name, log in self.logs.items():
            found = [v for batch in store.stream(name).read(partition=0) for v in batch.values]
            assert found == log
        assert sorted(m.value for m in store.queue("q").peek(99)) == sorted(messages)
        position = store.stream("a").group("g").positions()[0]
        assert (0 if position is None else position.offset) == self.position


TestTransactions = TransactionMachine.TestCase
TestTransactions.settings = settings(
    max_examples=1000 if FULL else 120,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
