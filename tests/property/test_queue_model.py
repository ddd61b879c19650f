"""A queue against a model of its state machine, on a virtual clock.

The model knows of each message its state, and of the ready ones in which step they became so; of
what one step readied (time passed, a store opened again) it leaves the order open. All times are
hundreds of seconds apart, leases, delays and lives end half-way between: how long a step really
takes changes nothing. MILLSTREAM_FULL=1 runs many more examples.
"""

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from open_copy import copy_open
from queue_model import (
    ATTEMPTS,
    BACKOFF,
    BLOCKS,
    DAY,
    HORIZON,
    UNFINISHED,
    Known,
    QueueModel,
    finishing,
)  # fmt: skip

import millstream
from millstream import Empty, LeaseLost, Put, QueueFull, RetryPolicy, inspect
from millstream.testing import clock

LEASE = 150

lanes = st.integers(0, 2)
delays = st.sampled_from([0, 0, 0, 50, 350, 40 * DAY + 50])
lives = st.sampled_from([None, None, None, 50, 450, 20 * DAY + 50])
keys = st.sampled_from([None, b"a", b"a", b"b"])
sizes = st.sampled_from([8, 8, 8, 100, 400, 9000, 40_000])
headers = st.sampled_from([None, None, {"h": b"v"}])
puts = st.tuples(lanes, delays, lives, keys, sizes, headers)
some = st.integers(0, 1 << 16)


class QueueMachine(QueueModel, RuleBasedStateMachine):
    def __init__(self):
        RuleBasedStateMachine.__init__(self)
        QueueModel.__init__(self, {})
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.directory = Path(tempfile.mkdtemp(prefix="millstream-queue-model-", dir=memory))
        self.path = self.directory / "store"
        self.stores, self.queues = {}, {}
        self.taken, self.count, self.paused = [], 0, False
        self.clock = clock()
        self.time = self.clock.__enter__()

    @initialize(capacity=st.sampled_from([2, 5, 12]), dead_limit=st.sampled_from([0, 2, 5]),
                ordering=st.sampled_from([None, "key"]), on_dead=st.sampled_from(["skip", "stop"]),
                ageing=st.booleans())  # fmt: skip
    def create(self, capacity, dead_limit, ordering, on_dead, ageing):
        self.options = {
            "capacity": capacity, "priorities": 3, "payload_bytes": BLOCKS * 4096, "lease": LEASE,
            "dead_limit": dead_limit, "ordering": ordering, "on_dead": on_dead, "ageing": ageing,
            "retry": RetryPolicy(max_attempts=ATTEMPTS, backoff=BACKOFF, factor=1.0, jitter=0.0),
        }  # fmt: skip
        self.open("first")

    def teardown(self):
        try:
            for name in list(self.stores):
                self.stores.pop(name).close()
            if (self.path / "store.json").exists():
                assert inspect.verify(self.path).problems == []
        finally:
            self.clock.__exit__(None, None, None)
            shutil.rmtree(self.directory)

    def open(self, name):
        self.stores[name] = millstream.open(self.path, durability="process")
        self.queues[name] = self.stores[name].queue("q", **self.options)

    def queue(self, second=False):
        return self.queues["second" if second and "second" in self.queues else "first"]

    def new(self, lane, delay, life, key, size, named):
        self.count += 1
        value = b"%08d" % self.count * (size // 8)
        expires = None if life is None else self.now + life
        m = Known(0, value, key, named or {}, lane, expires)
        m.due = self.now + delay if delay else 0
        arguments = {"value": value, "priority": lane, "delay": delay, "key": key, "ttl": life}
        return m, {**arguments, "headers": named}

    def came(self, m, q):
        name = "second" if q is self.queues.get("second") else "first"
        self.taken.append((m, self.take(m, name).lease, name))

    def pick(self, which):
        m, lease, _ = self.taken[which % len(self.taken)]
        known = self.messages.get(m.id)
        live = known is not None and known.state == "leased" and known.lease == lease
        assert m.finished or m.lost is not live
        return m, known, live

    # --- steps -----------------------------------------------------------------------------------

    @rule(put=puts, second=st.booleans())
    def put(self, put, second):
        m, arguments = self.new(*put)
        if self.fits(m):
            self.add(m, self.queue(second).put(**arguments, timeout=0))
        else:
            with pytest.raises(QueueFull):
                self.queue(second).put(**arguments, timeout=0)

    @rule(many=st.lists(puts, min_size=1, max_size=8), second=st.booleans())
    def put_many(self, many, second):
        made = [self.new(*put) for put in many]
        ids = self.queue(second).put_many([Put(**arguments) for _, arguments in made])
        for (m, _), number in zip(made, ids, strict=False):
            assert self.fits(m)
            self.add(m, number)
        assert len(ids) == len(made) or not self.fits(made[len(ids)][0])

    @rule(second=st.booleans())
    def get(self, second):
        q = self.queue(second)
        if self.paused or not self.next_ones():
            with pytest.raises(Empty):
                q.get(timeout=0)
        else:
            self.came(q.get(timeout=0), q)

    @rule(count=st.integers(1, 6), second=st.booleans())
    def get_many(self, count, second):
        q = self.queue(second)
        found = q.get_many(count, timeout=0)
        for m in found:
            assert not self.paused
            assert m.attempt == 1 or len(found) == 1
            self.came(m, q)
        if len(found) < count and not self.paused and not (found and found[0].attempt > 1):
            left = self.next_ones()
            assert not left or (found and any(m.attempts for m in left))

    @rule(which=some, how=st.sampled_from(["ack", "ack", "ack", "nack", "nack now", "nack later",
          "release", "release later", "reject", "extend"]))  # fmt: skip
    def finish_one(self, which, how):
        if not self.taken:
            return
        m, known, live = self.pick(which)
        call = finishing(m, how)
        if not live:
            with pytest.raises(LeaseLost):
                call()
            return
        call()
        self.ended(known, how)
        assert m.finished == "" if how == "extend" else m.finished

    @rule(whiches=st.lists(some, max_size=6))
    def ack_many(self, whiches):
        if not self.taken:
            return
        chosen = {which % len(self.taken): self.pick(which) for which in whiches}
        acked = [m for m, _, _ in chosen.values() if m.finished == "ack" and not m.lost]
        lost = self.queue().ack_many([m for m, _, _ in chosen.values()])
        assert lost == [m for m, _, live in chosen.values() if not live and m not in acked]
        for _, known, live in chosen.values():
            if live:
                self.finish(known)

    @rule(which=some)
    def cancel(self, which):
        known = list(self.messages.values())
        if not known or which % 7 == 0:
            assert self.queue().cancel(self.last_id + 1) is False
            return
        m = known[which % len(known)]
        assert self.queue().cancel(m.id) is (m.state != "leased")
        if m.state != "leased":
            self.finish(m)

    @rule(second=st.booleans())
    def pause_or_resume(self, second):
        self.paused = not self.paused
        (self.queue(second).pause if self.paused else self.queue(second).resume)()

    @rule()
    def purge(self):
        gone = self.those("ready", "delayed", "held")
        assert self.queue().purge() == len(gone)
        for m in gone:
            del self.messages[m.id]
        for line in self.order.values():
            line[:] = [number for number in line if number in self.messages]

    @rule(which=some, all_of_them=st.booleans())
    def redrive(self, which, all_of_them):
        dead = sorted(self.those("dead"), key=lambda m: m.id)
        if not dead:
            assert self.queue().dead.redrive() == 0
            return
        chosen = dead if all_of_them else [dead[which % len(dead)]]
        room = self.options["capacity"] - len(self.those(*UNFINISHED))
        ids = None if all_of_them else chosen[0].id
        if room == 0:
            with pytest.raises(QueueFull):
                self.queue().dead.redrive(ids)
        else:
            assert self.queue().dead.redrive(ids) == min(len(chosen), room)
        for m in chosen[:room]:
            self.redriven(m)

    @rule(which=some, all_of_them=st.booleans())
    def purge_dead(self, which, all_of_them):
        dead = self.those("dead")
        if dead:
            chosen = dead if all_of_them else [dead[which % len(dead)]]
            ids = None if all_of_them else [chosen[0].id]
            assert self.queue().dead.purge(ids) == len(chosen)
            for m in chosen:
                self.finish(m)

    @rule(seconds=st.sampled_from([100, 100, 200, 400, 700, 20 * DAY]))
    def advance(self, seconds):
        if self.now + seconds < HORIZON:
            self.time.advance(seconds)
            self.now += seconds

    @rule(more=st.integers(1, 3))
    def raise_the_capacity(self, more):
        if self.options["capacity"] < 20:
            self.options["capacity"] += more
            self.queue().alter(capacity=self.options["capacity"])
            self.step += 1
            for m in self.those("ready"):  # hints are made anew, as when a store is opened
                m.since = (self.step, m.tick)
            for line in self.order.values():
                line[1:] = sorted(line[1:])

    @rule()
    def open_or_close_a_second_time(self):
        if "second" not in self.stores:
            self.open("second")
            return
        self.stores.pop("second").close()
        del self.queues["second"]
        self.time.advance(0.2)  # the dead are looked for every 50 ms
        self.queue()._upkeep()
        self.taken = [one for one in self.taken if one[2] != "second"]
        self.holder_died("second")

    @rule()
    def reopen(self):
        for store in self.stores.values():
            store.close()
        self.begin_anew()

    @rule()
    def crash(self):
        """Go on with a copy of what is there, as if all processes had been killed."""
        copy = self.directory / "copy"
        copy_open(self.path, copy)
        for store in self.stores.values():
            store.close()
        assert inspect.verify(copy).problems == []
        shutil.rmtree(self.path)
        copy.rename(self.path)
        self.begin_anew()

    def begin_anew(self):
        self.stores.clear()
        self.queues.clear()
        self.taken.clear()
        assert inspect.verify(self.path).problems == []
        self.open("first")
        self.recover()

    # --- what holds after each step ---------------------------------------------------------------

    @invariant()
    def queue_is_as_its_model(self):
        if "first" not in self.queues:
            return
        self.check(self.queue())
        assert self.queue().paused is self.queue().stats().paused is self.paused


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_queue_behaves_as_its_model():
    from hypothesis.stateful import run_state_machine_as_test

    full = bool(os.environ.get("MILLSTREAM_FULL"))
    run_state_machine_as_test(
        QueueMachine,
        settings=settings(
            max_examples=1500 if full else 200,
            stateful_step_count=80 if full else 40,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
