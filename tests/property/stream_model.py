"""What streams, producers and consumer groups do, in a few lines, for the machines.

A `Log` has all that was ever appended, by partition and offset; what may be missing of it is said
by what was superseded under its key, where the stream is compacted, and by where the log begins.
"""

import xxhash

from millstream import Position
from millstream.groups import group


class Log:
    """A stream: rows (key, value), and the sequences of its producers."""

    def __init__(self, partitions, *, compacted=False, tombstones_stay=True):
        self.rows, self.firsts = [], []
        self.newest, self.removable, self.sent = [], [], []
        self.whole = {}
        self.compacted, self.tombstones_stay = compacted, tombstones_stay
        self.grow(partitions)

    def grow(self, count):
        for _ in range(count):
            self.rows.append([])
            self.firsts.append(0)  # raised by who has segments removed
            self.newest.append({})
            self.removable.append(set())
            self.sent.append({})

    def target(self, key):
        return xxhash.xxh3_64_intdigest(key) % len(self.rows)

    def append(self, p, key, value):
        offset = len(self.rows[p])
        self.rows[p].append((key, value))
        if self.compacted and key is not None:
            if key in self.newest[p]:
                self.removable[p].add(self.newest[p][key])
            if value is None and not self.tombstones_stay:
                self.removable[p].add(offset)
            self.newest[p][key] = offset
        return offset

    def send(self, name, rows):
        """Rows (sequence, partition, key, value) of one call of a producer; how many are new."""
        new = [0] * len(self.rows)
        for sequence, p, key, value in rows:
            if sequence > self.sent[p].get(name, -1):
                self.sent[p][name] = sequence
                self.append(p, key, value)
                new[p] += 1
        if new[rows[-1][1]]:  # otherwise its record was there before, and says what it said
            self.whole[name] = max(self.whole.get(name, -1), rows[-1][0])
        return new

    def check(self, p, begin, end, found):
        """`found`: (offset, key, value) of all that a reader gives from `begin` up to `end`."""
        offsets = [offset for offset, _, _ in found]
        assert offsets == sorted(set(offsets))
        assert not offsets or begin <= offsets[0] <= offsets[-1] < end
        for offset, key, value in found:
            assert (key, value) == self.rows[p][offset], (p, offset)
        missing = set(range(begin, end)).difference(offsets)
        assert missing <= self.removable[p], (p, sorted(missing - self.removable[p]))

    def check_all(self, stream):
        """Compare all that can be read; how many records each partition has."""
        last, counts = {}, []
        for p, rows in enumerate(self.rows):
            assert stream.first_offset(p) == self.firsts[p]
            found = rows_of(stream.read(partition=p))
            self.check(p, self.firsts[p], len(rows), found)
            counts.append(len(found))
            last.update((key, value) for _, key, value in found if key is not None)
        if self.compacted:  # no value comes back
            wanted, _ = self.latest()
            assert {key: value for key, value in last.items() if value is not None} == wanted
        return counts

    def check_producers(self, stream):
        for name in {name for sent in self.sent for name in sent}:
            producer = stream.producer(name)
            assert producer.last_sequences == tuple(sent.get(name, -1) for sent in self.sent)
            assert producer.last_sequence == self.whole.get(name, -1)

    def check_view(self, view):
        """Keys that retention took may stay in it."""
        for p, rows in enumerate(self.rows):
            if rows:
                last = len(rows) - 1
                epoch = group.epoch_at(view.stream, p, last)
                view.wait_for(Position(p, epoch, last), timeout=60)
        wanted, maybe = self.latest()
        found = dict(view.items())
        assert {key: found.get(key) for key in wanted} == wanted
        assert found.items() <= {**maybe, **wanted}.items()

    def latest(self):
        """(keys and values that are there, those that may be in a view: retention took them)."""
        wanted, maybe = {}, {}
        for p, rows in enumerate(self.rows):
            for offset, (key, value) in enumerate(rows):
                if key is None:
                    continue
                wanted.pop(key, None)
                maybe.pop(key, None)
                if value is not None:
                    (wanted if offset >= self.firsts[p] else maybe)[key] = value
        return wanted, maybe


def rows_of(batches):
    """(offset, key, value) of each record."""
    return [
        row
        for batch in batches
        for row in zip(batch.offsets.tolist(), batch.keys, batch.values, strict=True)
    ]


class Group:
    """A consumer group: the committed offset of each partition that has one, and its members."""

    def __init__(self, name, log, committed):
        self.name, self.log, self.committed, self.members = name, log, committed, []

    def lag(self):
        ends = enumerate(len(rows) for rows in self.log.rows)
        return sum(max(0, end - self.committed.get(p, 0)) for p, end in ends)


class Member:
    """A consumer: what comes next in each of its partitions, as its callbacks told of them."""

    def __init__(self, group, side):
        self.group, self.side = group, side
        self.consumer = None
        self.at, self.dirty, self.sought, self.paused = {}, set(), set(), set()
        self.ended = False  # it was taken for hung, and has not asked for a batch since
        self.forfeited = False  # it lost what was handed out to it and not committed
        self.batches = []

    def assigned(self, came):
        self.ended = False
        for p in came:
            others = (one for one in self.group.members if one is not self and not one.ended)
            assert not any(p in one.at for one in others), f"partition {p} has two owners"
            assert p not in self.at, f"partition {p} came twice"
            self.at[p] = self.group.committed.get(p, 0)

    def revoked(self, gone):
        self.ended = False
        for p in gone:
            assert p in self.at, f"partition {p} was not there"
            del self.at[p]
            self.clean(p)
        self.batches = [batch for batch in self.batches if batch.partition in self.at]

    def clean(self, p):
        self.dirty.discard(p)
        self.sought.discard(p)

    def joins_again(self):
        """It is about to ask for a batch, or to rewind."""
        if self.ended:  # until its callbacks have told it
            self.forfeited = self.forfeited or bool(self.dirty)
            self.dirty.clear()
            self.sought.clear()
            self.batches.clear()

    def commit(self):
        for p in list(self.dirty):
            self.group.committed[p] = self.at[p]
            self.clean(p)

    def rewind(self):
        self.forfeited = False
        for p in self.at:
            self.at[p] = self.group.committed.get(p, 0)
            self.clean(p)
