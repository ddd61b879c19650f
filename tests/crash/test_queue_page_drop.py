"""Power cuts over the files of a queue: what returned at level sync stands, whatever is kept."""

import itertools
import os
import random
import shutil
from dataclasses import dataclass, replace

import crash_workers as workers
import pytest
from page_drop_disk import Disk

import millstream
from millstream import QueueFull, RetryPolicy

STATES = 1500 if os.environ.get("MILLSTREAM_FULL") else 600
SECTOR = 512  # a slot may be torn, too
ALPHABET = ("put", "put", "put", "many", "large", "get", "get", "ack", "ack", "nack", "release",
            "reject", "cancel", "redrive", "purge dead", "flush")  # fmt: skip


@dataclass
class Fate:
    """What must have become of a message."""

    value: bytes
    put: bool = False  # it must be there,
    ending: bool = False  # unless this began,
    ended: bool = False  # and must not after this
    id: int = 0
    taken: bool = False  # so it may have died of something else before it was torn


class Workload:
    """Operations of random level, and the fates of messages so far."""

    def __init__(self, store, dice, large):
        capacity = 3000 if large else 40
        options = {"capacity": capacity, "dead_limit": 8, "payload_bytes": 64 * 4096}
        options["retry"] = RetryPolicy(max_attempts=3, backoff=0.0)
        plain = store.queue("q", durability="process", **options)
        self.handles = (plain, store.queue("q", durability="sync"))
        self.dice, self.large = dice, large
        self.fates, self.trying = {}, []
        self.numbers = itertools.count()
        self.taken = []

    def snapshot(self):
        """Fates now, by value: what is in flight may have happened."""
        return {fate.value: replace(fate) for fate in (*self.fates.values(), *self.trying)}

    def settle(self):
        """All that was done is durable."""
        for fate in self.fates.values():
            fate.put = True
            fate.ended = fate.ending

    def step(self, letter):
        """One operation; one that synced covers all before it."""
        synced = self.handles[1]._syncs[1]
        self.act(letter)
        if self.handles[1]._syncs[1] > synced:
            self.settle()

    def act(self, letter):
        q = self.handles[self.dice.random() < 0.5]
        if letter in ("put", "many", "large"):
            count = {"put": 1, "many": 1100 if self.large else 9, "large": 1}[letter]
            size = 20_000 if letter == "large" else self.dice.choice((10, 150))
            values = [b"%d " % next(self.numbers) * (size // 5) for _ in range(count)]
            self.trying = [Fate(value) for value in values]
            ids = q.put_many(values)
            for id, fate in zip(ids, self.trying, strict=False):
                fate.id = id
                self.fates[id] = fate
            self.trying = []
        elif letter == "get":
            got = self.handles[0].get_many(self.dice.choice((1, 3)), timeout=0)
            self.taken += got
            for m in got:
                self.fates[m.id].taken = True
        elif letter in ("ack", "nack", "release", "reject"):
            if not self.taken:
                return
            m = self.taken.pop(self.dice.randrange(len(self.taken)))
            self.fates[m.id].ending |= letter == "ack"
            if letter == "ack":
                q.ack_many([m])
            elif letter == "nack":
                m.nack(0)
            elif letter == "release":
                m.release()
            else:
                for letter_ in q.dead.list():  # which of them gives way is not ours to say
                    self.fates[letter_.id].ending |= len(q.dead) == 8
                m.reject("no")
        elif letter == "cancel":
            id = self.dice.choice([*self.fates, 5])
            state = {m.id: m.state for m in q.peek(10_000)}.get(id)
            if state is None:
                return
            self.fates[id].ending = True
            assert q.cancel(id)
        elif letter == "redrive":
            self.redrive(q, self.dice.choice([letter.id for letter in q.dead.list()] or [5]))
        elif letter == "purge dead":
            for one in q.dead.list():
                self.fates[one.id].ending = True
            q.dead.purge()
        else:
            q.flush()

    def redrive(self, q, id):
        """A dead letter back into the queue, which is refused if and only if there is no room."""
        letters, room = [letter.id for letter in q.dead.list()], q.capacity - len(q)
        if id in letters and not room:
            with pytest.raises(QueueFull):
                q.dead.redrive(id)
            assert [letter.id for letter in q.dead.list()] == letters, "refused, yet changed"
        else:
            assert q.dead.redrive(id) == (id in letters)


def judge(path, fates, capacity, last):
    """Open what a power cut left, twice; how much of what could be lost was."""
    lost = torn = 0
    kept = None
    for attempt in range(2):
        with millstream.open(path) as store:
            q = store.queue("q")
            q._check()
            counts = q._counts()
            assert counts["writing"] == counts["invalid"] == counts["leased"] == 0
            standing, letters = q.peek(10_000), q.dead.list()
            assert len(standing) == len(q)
            # Whose blocks were torn is found out when it is taken, or looked at.
            torn += sum(one.value is None for one in (*standing, *letters))
            there = {one.value: one.id for one in (*standing, *letters) if one.value is not None}
            if attempt == 0:
                taken = {fate.id for fate in fates.values() if fate.taken}
                for letter in letters:  # one that died of something else keeps that as its reason
                    assert letter.value is not None or (
                        letter.reason == "torn or corrupt"
                        or (letter.id in taken and letter.reason in ("no", "failed"))
                    ), letter
                assert there.keys() <= fates.keys(), "never put"
                for value, fate in fates.items():
                    assert value not in there or not fate.ended, "an acknowledged one is back"
                    assert value in there or not fate.put or fate.ending, "a put is lost"
                    lost += value not in there and not fate.ending
                kept = there
                ids = q.put_many([b"after"])
                assert ids > [last] or len(q) == capacity, "an id that had been given"
            else:
                assert there.keys() - {b"after"} == kept.keys(), "recovered differently"
                room = capacity - len(q)
                assert len(q.put_many([b"fill"] * (room + 5))) == room, "a slot is gone"
                while ms := q.get_many(1000, timeout=0):
                    assert q.ack_many(ms) == []
                q._check()
    return lost, torn


@pytest.mark.slow
def test_power_cut_at_any_moment_keeps_what_returned(memory_directory, monkeypatch):
    seed = workers.seed_of("queue_power_cut")
    dice = random.Random(seed)
    states = lost = torn = ops = 0
    for run in itertools.count():
        if states >= STATES:
            break
        cuts = []
        live = memory_directory / f"live{run}"
        large = run % 12 == 5
        with monkeypatch.context() as patch:
            live.mkdir()
            disk = Disk(live, patch)
            store = millstream.open(live, durability="process")
            work = Workload(store, dice, large)
            work.handles[1].flush()

            def cut(chance, work=work, disk=disk, cuts=cuts, run=run):
                if dice.random() < chance:
                    target = memory_directory / f"cut{run}-{len(cuts)}"
                    disk.unit = dice.choice((4096, SECTOR))
                    disk.cut(target, dice)
                    cuts.append((target, work.snapshot(), max(work.fates, default=0)))

            disk.on_call = lambda cut=cut: cut(0.15)
            for _ in range(dice.randrange(5, 30)):
                work.step(dice.choice(ALPHABET))
                ops += 1
                cut(0.2)
            disk.on_call = lambda: None
            store.close()
        for target, fates, last in cuts:
            more = judge(target, fates, work.handles[0].capacity, last)
            lost, torn = lost + more[0], torn + more[1]
            shutil.rmtree(target)
        states += len(cuts)
        shutil.rmtree(live)
    assert lost > 0, "nothing was ever at stake"
    assert torn > 0, "nothing was ever torn"
    print(f"put and lost, never called durable: {lost}; torn: {torn}")
    workers.report(ops, states, seed)
