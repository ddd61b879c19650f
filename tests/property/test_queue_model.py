"""A queue against a model of its state machine, on a virtual clock.

The model knows of each message its state, and of the ready ones in which step they became so; of
what one step readied (time passed, a store opened again) it leaves the order open. All times are
hundreds of seconds apart, leases, delays and lives end half-way between: how long a step really
takes changes nothing. MILLSTREAM_FULL=1 runs many more examples.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from open_copy import copy_open

import millstream
from millstream import Empty, LeaseLost, QueueFull, RetryPolicy, inspect
from millstream.testing import clock

LEASE, BACKOFF, DAY = 150, 250, 86400
HORIZON = 80 * DAY  # ticks of state words tell instants within 99 days apart
INLINE = 256 - 96
BLOCKS = 16
ATTEMPTS = 3
UNFINISHED = ("ready", "delayed", "held", "leased")

lanes = st.integers(0, 2)
delays = st.sampled_from([0, 0, 0, 50, 350, 40 * DAY + 50])
lives = st.sampled_from([None, None, None, 50, 450, 20 * DAY + 50])
keys = st.sampled_from([None, b"a", b"a", b"b"])
sizes = st.sampled_from([8, 8, 8, 100, 400, 9000, 40_000])
headers = st.sampled_from([None, None, {"h": b"v"}])
puts = st.tuples(lanes, delays, lives, keys, sizes, headers)
some = st.integers(0, 1 << 16)


@dataclass
class Known:
    """What the model knows of a message."""

    id: int
    value: bytes
    key: bytes | None
    headers: dict
    lane: int
    expires: int | None
    state: str = ""
    due: int = 0
    attempts: int = 0
    lease: int = 0
    lease_end: int = 0
    holder: str = ""
    since: tuple = ()  # of a ready one: when it became so; of a dead one: when it died
    tick: int = 0  # when its word was set, as far as an order hangs on it
    errors: list = field(default_factory=list)
    reason: str = ""

    @property
    def blocks(self):
        size = len(self.value) + len(self.key or b"")
        size += sum(5 + len(name) + len(value) for name, value in self.headers.items())
        return -(-size // 4096) if size > INLINE else 0


class QueueMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.directory = Path(tempfile.mkdtemp(prefix="millstream-queue-model-", dir=memory))
        self.path = self.directory / "store"
        self.stores, self.queues = {}, {}
        self.messages, self.order, self.taken = {}, {}, []
        self.now, self.step, self.count, self.last_id = 0, 0, 0, 0
        self.paused = False
        self.counters = {"expired": 0, "evicted": 0}
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

    # --- the model -------------------------------------------------------------------------------

    def those(self, *states):
        return [m for m in self.messages.values() if m.state in states]

    @property
    def ordered(self):
        return self.options["ordering"] == "key"

    @property
    def stops(self):
        return self.ordered and self.options["on_dead"] == "stop"

    def make_ready(self, m):
        m.state, m.since, m.tick = "ready", (self.step, 0), self.now

    def let_go(self, key):
        line = self.order.get(key)
        head = self.messages[line[0]] if line else None
        if head is not None and head.state == "held":
            self.wait(head, head.due)

    def wait(self, m, due):
        if due > self.now:
            m.state, m.due = "delayed", due
        else:
            self.make_ready(m)

    def leave_line(self, m):
        if self.ordered and m.id in self.order.get(m.key, ()):
            self.order[m.key].remove(m.id)
            self.let_go(m.key)

    def finish(self, m):
        del self.messages[m.id]
        self.leave_line(m)

    def die(self, m, reason):
        m.state, m.reason, m.since = "dead", reason, (self.now,)
        if not self.stops:
            self.leave_line(m)

    def fail(self, m, error, reason):
        m.errors.append(error)
        if m.attempts >= ATTEMPTS:
            self.die(m, reason)
            return True
        return False

    def end_lease(self, m, reason):
        if not self.fail(m, reason, reason):
            self.make_ready(m)

    def pass_time(self):
        """What is due by now."""
        while True:
            before = [(m.id, m.state) for m in self.messages.values()]
            for m in self.those("leased"):
                if m.lease_end <= self.now:
                    self.end_lease(m, "the lease ran out")
            for m in self.those("ready", "delayed", "held"):
                if m.expires is not None and m.expires <= self.now:
                    self.counters["expired"] += 1
                    self.finish(m)
            for m in self.those("delayed"):
                if m.due <= self.now:
                    self.make_ready(m)
            if before == [(m.id, m.state) for m in self.messages.values()]:
                return

    def evict(self, q):
        """The oldest dead letters gave way: of those that died at one time, any."""
        dead = self.those("dead")
        gone = len(dead) - self.options["dead_limit"]
        if gone <= 0:
            return
        left = {letter.id for letter in q.dead.list()}
        evicted = [m for m in dead if m.id not in left]
        assert len(evicted) == gone
        kept = [m.since for m in dead if m.id in left]
        assert not kept or max(m.since for m in evicted) <= min(kept)
        for m in evicted:
            self.counters["evicted"] += 1
            self.finish(m)

    def fits(self, m):
        used = sum(other.blocks for other in self.messages.values())
        return len(self.those(*UNFINISHED)) < self.options["capacity"] and (
            used + m.blocks <= BLOCKS or not m.blocks
        )

    def new(self, lane, delay, life, key, size, named):
        self.count += 1
        value = b"%08d" % self.count * (size // 8)
        expires = None if life is None else self.now + life
        m = Known(0, value, key, named or {}, lane, expires)
        m.due = self.now + delay if delay else 0
        arguments = {"value": value, "priority": lane, "delay": delay, "key": key, "ttl": life}
        return m, {**arguments, "headers": named}

    def line_of(self, m):
        """Those of its key, in order; of a message without a key nobody."""
        return self.order.setdefault(m.key, []) if self.ordered and m.key is not None else []

    def add(self, m, number):
        assert number > self.last_id
        m.id = self.last_id = number
        self.messages[number] = m
        line = self.line_of(m)
        line.append(number)
        if len(line) > 1:
            m.state = "held"
        else:
            self.wait(m, m.due)
        self.step += 1

    def next_ones(self):
        """Those of which one must be what the next get gives."""
        ready = self.those("ready")
        found = []
        for lane in sorted({m.lane for m in ready}):
            of_lane = [m for m in ready if m.lane == lane]
            first = min(m.since for m in of_lane)
            found.append([m for m in of_lane if m.since == first])
        if self.options["ageing"]:
            return [m for of_lane in found for m in of_lane]
        return found[0] if found else []

    def take(self, m, name):
        """A message came: was it the one?"""
        assert m.id in self.messages, "never put, or finished"
        known = self.messages[m.id]
        assert known in self.next_ones(), (known, self.next_ones())
        known.attempts += 1
        known.lease += 1
        known.state, known.holder = "leased", name
        known.lease_end = self.now + LEASE
        found = (m.value, m.key, m.headers, m.priority, m.attempt)
        assert found == (known.value, known.key, known.headers, known.lane, known.attempts)
        self.taken.append((m, known.lease, name))

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
        ids = self.queue(second).put_many([arguments for _, arguments in made])
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
            self.take(q.get(timeout=0), "second" if q is self.queues.get("second") else "first")

    @rule(count=st.integers(1, 6), second=st.booleans())
    def get_many(self, count, second):
        q = self.queue(second)
        found = q.get_many(count, timeout=0)
        for m in found:
            assert not self.paused
            assert m.attempt == 1 or len(found) == 1
            self.take(m, "second" if q is self.queues.get("second") else "first")
        if len(found) < count and not self.paused and not (found and found[0].attempt > 1):
            left = self.next_ones()
            assert not left or (found and any(m.attempts for m in left))

    @rule(which=some, how=st.sampled_from(["ack", "ack", "ack", "nack", "nack now", "nack later",
          "release", "release later", "reject", "extend"]))  # fmt: skip
    def finish_one(self, which, how):
        if not self.taken:
            return
        m, known, live = self.pick(which)
        call = {
            "ack": m.ack,
            "nack": lambda: m.nack(reason="by policy"),
            "nack now": lambda: m.nack(delay=0, reason="now"),
            "nack later": lambda: m.nack(delay=450, reason="later"),
            "release": m.release,
            "release later": lambda: m.release(delay=350),
            "reject": lambda: m.reject("bad"),
            "extend": lambda: m.extend(650),
        }[how]
        if not live:
            with pytest.raises(LeaseLost):
                call()
            return
        call()
        if how == "ack":
            self.finish(known)
        elif how.startswith("nack"):
            reason = {"nack": "by policy", "nack now": "now", "nack later": "later"}[how]
            delay = {"nack": BACKOFF, "nack now": 0, "nack later": 450}[how]
            if not self.fail(known, reason, "failed"):
                self.wait(known, self.now + delay)
        elif how.startswith("release"):
            known.attempts -= 1
            self.wait(known, self.now + (350 if how == "release later" else 0))
        elif how == "reject":
            known.errors.append("bad")
            self.die(known, "bad")
        else:
            known.lease_end = self.now + 650
        assert m.finished == "" if how == "extend" else m.finished

    @rule(whiches=st.lists(some, max_size=6))
    def ack_many(self, whiches):
        if not self.taken:
            return
        chosen = {which % len(self.taken): self.pick(which) for which in whiches}
        lost = self.queue().ack_many([m for m, _, _ in chosen.values()])
        assert lost == [m for m, _, live in chosen.values() if not live]
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
        if len(chosen) > room:
            with pytest.raises(QueueFull):
                self.queue().dead.redrive(ids)
        else:
            assert self.queue().dead.redrive(ids) == len(chosen)
        for m in chosen[:room]:
            m.attempts, m.due = 0, 0
            line = self.line_of(m)
            if not self.stops:
                line.append(m.id)
            if not self.stops and len(line) > 1:
                m.state = "held"
            else:
                self.make_ready(m)
            self.step += 1

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
        self.queue()._look()
        self.taken = [one for one in self.taken if one[2] != "second"]
        for m in self.those("leased"):
            if m.holder == "second":
                self.end_lease(m, "its holder died")

    @rule()
    def reopen(self):
        for store in self.stores.values():
            store.close()
        self.recover()

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
        self.recover()

    def recover(self):
        self.stores.clear()
        self.queues.clear()
        self.taken.clear()
        self.counters = dict.fromkeys(self.counters, 0)
        assert inspect.verify(self.path).problems == []
        self.open("first")
        self.step += 1
        for m in self.those("leased"):
            if m.attempts >= ATTEMPTS:
                m.errors.append("all processes ended")
                self.die(m, "its holder died")
        # What was leased comes first, then by when it was ready.
        for m in self.those("leased", "ready"):
            m.since = (self.step, -1 if m.state == "leased" else m.tick)
            m.state, m.tick = "ready", self.now
        for line in self.order.values():
            if self.ordered:
                line.sort(key=lambda number: (self.messages[number].state != "dead", number))
                first, *others = [self.messages[number] for number in line] or [None]
                for m in others:
                    m.state = "dead" if m.state == "dead" else "held"
                if first is not None and first.state == "held":
                    self.wait(first, first.due)

    # --- what holds after each step ---------------------------------------------------------------

    @invariant()
    def queue_is_as_its_model(self):
        if "first" not in self.queues:
            return
        q = self.queue()
        for _ in range(3):
            q._look()
        self.step += 1
        self.pass_time()
        self.evict(q)
        self.step += 1
        q._check()
        counts, stats = q._counts(), q.stats()
        for state in (*UNFINISHED, "dead"):
            assert counts[state] == getattr(stats, state) == len(self.those(state)), state
        assert counts["writing"] == counts["invalid"] == 0
        dead_limit, capacity = self.options["dead_limit"], self.options["capacity"]
        unused = stats.slots - counts["dead"] - len(self.those(*UNFINISHED))
        assert stats.slots <= capacity + dead_limit
        assert counts["spare"] == max(stats.slots - capacity - counts["dead"], 0)
        assert counts["free"] == unused - counts["spare"]
        assert len(q) == stats.unfinished == len(self.those(*UNFINISHED))
        assert (stats.expired, stats.evicted) == tuple(self.counters.values())
        assert stats.corrupt == 0
        assert q.paused is stats.paused is self.paused
        ready = sorted((m.lane, m.id) for m in self.those("ready"))
        waiting = sorted((m.lane, m.id) for m in self.those("held", "delayed"))
        found = q.peek(100)
        assert [m.id for m in found] == [number for _, number in ready + waiting]
        for m in found:
            known = self.messages[m.id]
            assert (m.state, m.value, m.attempts) == (known.state, known.value, known.attempts)
        letters = q.dead.list()
        assert [letter.id for letter in letters] == sorted(m.id for m in self.those("dead"))
        for letter in letters:
            known = self.messages[letter.id]
            assert (letter.value, letter.attempts) == (known.value, known.attempts)
            assert (letter.first_error, letter.last_error) == (known.errors[0], known.errors[-1])
            assert letter.reason == known.reason


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
