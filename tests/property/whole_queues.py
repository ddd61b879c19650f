"""The steps of the whole machine that are of queues, and of time."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from queue_model import UNFINISHED, Known, finishing
from whole_streams import done, some

from millstream import Empty, LeaseLost, QueueFull

WINDOW = 1050

queues = st.sampled_from(["jobs", "lines"])
puts = st.tuples(
    st.integers(0, 1), st.sampled_from([0, 0, 50, 350]), st.sampled_from([None, b"a", b"b"]),
    st.sampled_from([8, 8, 400, 9000]), st.sampled_from([None, "d1", "d2"]),
)  # fmt: skip


class QueueSteps(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.queues, self.taken, self.claims = {}, [], {}
        """By dedup_id: the first message, and until when it counts."""

    def queue(self, name, second=False):
        return self.stores[self.side(second)].queue(name)

    # --- queues -----------------------------------------------------------------------------------

    def new_message(self, name, lane, delay, key, size, dedup):
        self.count += 1
        value = b"%08d" % self.count * (size // 8)
        m = Known(0, value, key, {}, lane, None)
        m.due = self.queues[name].now + delay if delay else 0
        dedup = dedup if name == "jobs" else None
        named = {"value": value, "priority": lane, "delay": delay, "key": key, "dedup_id": dedup}
        return m, named

    def first_of(self, dedup):
        """The message that has this dedup_id, if its window is not over."""
        number, until = self.claims.get(dedup, (None, 0))
        return number if until > self.queues["jobs"].now else None

    def add(self, name, m, number, dedup):
        self.queues[name].add(m, number)
        if dedup is not None:
            self.claims[dedup] = number, self.queues[name].now + WINDOW

    @rule(name=queues, put=puts, second=st.booleans())
    def put(self, name, put, second):
        done["put"] += 1
        q, (m, named) = self.queue(name, second), self.new_message(name, *put)
        first = self.first_of(named["dedup_id"])
        if first is not None:
            assert q.put(**named, timeout=0) == first
            done["put of a known id"] += 1
        elif self.queues[name].fits(m):
            self.add(name, m, q.put(**named, timeout=0), named["dedup_id"])
        else:
            with pytest.raises(QueueFull):
                q.put(**named, timeout=0)

    @rule(name=queues, times=st.integers(1, 3), second=st.booleans())
    def get(self, name, times, second):
        for _ in range(times):
            if self.queues[name].next_ones():
                done["get"] += 1
                self.take(name, self.queue(name, second).get(timeout=0), self.side(second))
            else:
                with pytest.raises(Empty):
                    self.queue(name, second).get(timeout=0)

    def take(self, name, message, side):
        known = self.queues[name].take(message, side)
        self.taken.append((name, message, known, known.lease, side))
        return known

    def is_live(self, name, known, lease):
        there = self.queues[name].messages.get(known.id) is known
        return there and known.state == "leased" and known.lease == lease

    @precondition(lambda self: self.taken)
    @rule(which=some, how=st.sampled_from(["ack", "ack", "nack", "nack now", "nack later", "reject",
          "release", "release later", "extend"]))  # fmt: skip
    def finish(self, which, how):
        name, message, known, lease, _ = self.pick(which)
        if self.is_live(name, known, lease):
            done[how] += 1
            finishing(message, how)()
            self.queues[name].ended(known, how)
        else:
            done["late"] += 1
            with pytest.raises(LeaseLost):
                finishing(message, how)()

    def pick(self, which):
        """One that was taken and, more often than not, is so still."""
        live = [one for one in self.taken if self.is_live(one[0], *one[2:4])]
        found = live if live and which % 8 else self.taken
        return found[which % len(found)]

    @rule(name=queues, which=some, dead=st.booleans(), second=st.booleans())
    def cancel_or_redrive(self, name, which, dead, second):
        model, q = self.queues[name], self.queue(name, second)
        found = model.those("dead") or list(model.messages.values())
        if not found:
            return
        m = found[which % len(found)]
        if m.state == "dead" and dead:
            done["redrive"] += 1
            if len(model.those(*UNFINISHED)) < model.options["capacity"]:
                assert q.dead.redrive(m.id) == 1
                model.redriven(m)
            else:
                with pytest.raises(QueueFull):
                    q.dead.redrive(m.id)
        else:
            done["cancel"] += 1
            assert q.cancel(m.id) is (m.state != "leased")
            if m.state != "leased":
                model.finish(m)

    @rule(seconds=st.sampled_from([100, 200, 400, 700]))
    def advance(self, seconds):
        self.time.advance(seconds)
        for model in self.queues.values():
            model.now += seconds
