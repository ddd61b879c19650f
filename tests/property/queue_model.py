"""What a queue does, in a few lines: the model that the machines hold queues to.

It knows of each message its state, and of the ready ones in which step they became so; of what one
step readied (time passed, a store opened again) it leaves the order open.
"""

from dataclasses import dataclass, field

BACKOFF, DAY = 250, 86400
HORIZON = 80 * DAY  # ticks of state words tell instants within 99 days apart
INLINE = 256 - 96
BLOCKS = 16
ATTEMPTS = 3
UNFINISHED = ("ready", "delayed", "held", "leased")


def finishing(message, how):
    """The call that finishes a message, or gives it back, in one of the ways of `ended`."""
    return {
        "ack": message.ack,
        "nack": lambda: message.nack(reason="by policy"),
        "nack now": lambda: message.nack(delay=0, reason="now"),
        "nack later": lambda: message.nack(delay=450, reason="later"),
        "release": message.release,
        "release later": lambda: message.release(delay=350),
        "reject": lambda: message.reject("bad"),
        "extend": lambda: message.extend(650),
    }[how]


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


class QueueModel:
    """The state of a queue; `options` are those that it was made with, `now` is in seconds."""

    def __init__(self, options):
        self.options = options
        self.messages, self.order = {}, {}
        self.now, self.step, self.last_id = 0, 0, 0
        self.counters = {"expired": 0, "evicted": 0}
        self.puts = self.failures = 0

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
        self.failures += 1
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

    def fits(self, *new):
        used = sum(other.blocks for other in self.messages.values())
        needed = sum(m.blocks for m in new)
        return len(self.those(*UNFINISHED)) + len(new) <= self.options["capacity"] and (
            used + needed <= BLOCKS or not needed
        )

    def line_of(self, m):
        """Those of its key, in order; of a message without a key nobody."""
        return self.order.setdefault(m.key, []) if self.ordered and m.key is not None else []

    def add(self, m, number):
        assert number > self.last_id
        self.puts += 1
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
        """A message came to a holder: was it the one? What is known of it."""
        assert m.id in self.messages, "never put, or finished"
        known = self.messages[m.id]
        assert known in self.next_ones(), (known, self.next_ones())
        known.attempts += 1
        known.lease += 1
        known.state, known.holder = "leased", name
        known.lease_end = self.now + self.options["lease"]
        found = (m.value, m.key, m.headers, m.priority, m.attempt)
        assert found == (known.value, known.key, known.headers, known.lane, known.attempts)
        return known

    def ended(self, known, how):
        """A message whose lease was live was given back, or finished, as `finishing` says."""
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
            self.failures += 1
            self.die(known, "bad")
        else:
            known.lease_end = self.now + 650

    def redriven(self, m):
        m.attempts, m.due = 0, 0
        line = self.line_of(m)
        if not self.stops:
            line.append(m.id)
        if not self.stops and len(line) > 1:
            m.state = "held"
        else:
            self.make_ready(m)
        self.step += 1

    def holder_died(self, name):
        for m in self.those("leased"):
            if m.holder == name:
                self.end_lease(m, "its holder died")

    def recover(self):
        """All processes ended, and one has opened the store again."""
        self.step += 1
        for m in self.those("leased"):
            if m.attempts >= ATTEMPTS:
                m.errors.append("all processes ended")
                self.failures += 1
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

    def check(self, q):
        """Let time pass in the model, as it did in `q`, and compare the two."""
        for _ in range(3):
            q._upkeep()
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
        assert (stats.corrupt, stats.put, stats.failed) == (0, self.puts, self.failures)
        ended = self.puts - len(self.messages) - stats.expired - stats.evicted
        assert stats.done + stats.cancelled == ended
        assert (stats.oldest_age is None) is (not self.those("ready"))
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
