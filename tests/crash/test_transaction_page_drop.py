"""Power cuts over transactions: at level interval and sync they are there whole, or not at all."""

import itertools
import os
import random
import shutil
from collections import Counter

import crash_workers as workers
import pytest
from page_drop_disk import Disk

import millstream
from millstream.store.background import Background
from millstream.transactions import journal as journal_module

STATES = 6000 if os.environ.get("MILLSTREAM_FULL") else 200


def number_of(value):
    return int(bytes(value).split()[0])


class Workload:
    """Numbers: from `in` to `out` and `jobs` in one transaction, from there to `done` in another.

    `moved` and `done` are those whose transaction returned; `tried` of each, whose began.
    """

    def __init__(self, store, dice):
        self.store, self.dice = store, dice
        self.source = store.stream("in")
        self.out, self.done_log = store.stream("out", partitions=2), store.stream("done")
        ordering = dice.choice((None, "key"))
        self.jobs = store.queue("jobs", ordering=ordering, dedup_window=600.0, lease=600.0,
                                payload_bytes=64 * 4096, dead_limit=8,
                                capacity=dice.choice((12, 200)))  # fmt: skip
        self.consumer = self.source.consumer("g", delivery="exactly_once", max_records=2)
        self.count = 0
        self.moved, self.moving = set(), set()
        self.done, self.doing = set(), set()
        self.taken = []

    def facts(self):
        return tuple(map(frozenset, (self.moved, self.moving, self.done, self.doing)))

    def level(self):
        return self.dice.choice(("interval", "sync"))

    def step(self):
        what = self.dice.randrange(10)
        if what < 3 or self.count == 0:
            size = self.dice.choice((1, 1, 30, 500, 2500))
            value = b"%d " % self.count * size
            self.source.append(value, durability=self.dice.choice(("process", "sync")))
            self.count += 1
        elif what < 6:
            self.move()
        elif what < 9:
            self.do()
        elif self.dice.random() < 0.5:
            self.store.flush()
        else:
            with self.store._transactions.journal().holding():
                self.store._transactions.journal().checkpoint()

    def move(self):
        batch = self.consumer.poll()
        if batch is None or len(self.jobs) > 8:
            self.consumer.rewind()
            return
        numbers = {number_of(value) for value in batch.values}
        self.moving = self.moved | numbers
        with self.store.transaction(durability=self.level()) as tx:
            for value in batch.values:
                n = number_of(value)
                key = b"%d" % (n % 3)
                tx.append(self.out, value, key=key)
                tx.put(self.jobs, value, key=key, dedup_id=str(n), headers={"n": b"%d" % n})
            tx.commit(self.consumer)
        self.moved = set(self.moving)

    def do(self):
        self.taken += self.jobs.get_many(self.dice.choice((1, 3)), timeout=0)
        self.dice.shuffle(self.taken)
        some = self.taken[: self.dice.choice((1, 2))]
        if not some:
            return
        del self.taken[: len(some)]
        self.doing = self.done | {number_of(m.value) for m in some}
        with self.store.transaction(durability=self.level()) as tx:
            for m in some:
                tx.ack(m)
                tx.append(self.done_log, m.value)
        self.done = set(self.doing)


def found_in(stream):
    rows = [
        number_of(value)
        for partition in range(stream.partitions)
        for batch in stream.read(partition=partition)
        for value in batch.values
    ]
    assert len(rows) == len(set(rows)), f"twice in {stream}: {Counter(rows).most_common(2)}"
    return set(rows)


def judge(store, facts):
    """What is there is whole; the numbers that were moved."""
    moved, moving, done, doing = facts
    out, finished = found_in(store.stream("out")), found_in(store.stream("done"))
    jobs = store.queue("jobs")
    jobs._check()
    counts = jobs._counts()
    assert counts["prepared"] == counts["acking"] == counts["dead"] == 0, counts
    waiting = [number_of(m.value) for m in jobs.peek(10_000)]
    assert len(waiting) == len(set(waiting)), "a message is there twice"
    assert not set(waiting) & finished
    assert set(waiting) | finished == out, (waiting, finished, out)
    position = store.stream("in").group("g").positions()[0]
    offset = 0 if position is None else position.offset
    assert offset <= store.stream("in").next_offset(0)
    assert out == set(range(offset))
    assert moved <= out, "a committed transaction is lost"
    assert done <= finished
    assert out in (moved, moving)
    assert finished in (done, doing)
    return out


def go_on(store):
    """Everything that is left can be done, once."""
    out, done, jobs = store.stream("out"), store.stream("done"), store.queue("jobs")

    def move(record):
        n = number_of(record.value)
        key = b"%d" % (n % 3)
        return {
            "out": {"value": record.value, "key": key},
            "jobs": millstream.Put(record.value, key=key, dedup_id=str(n)),
        }

    source = store.stream("in")
    with (
        store.pipe(source, move, {"out": out, "jobs": jobs}, group="g", batch=3) as first,
        store.pipe(jobs, lambda m: m.value, done, batch=3) as second,
    ):
        while first.step() + second.step():
            pass
    everything = set(range(source.next_offset(0)))
    assert found_in(out) == everything
    assert found_in(done) == everything
    assert len(jobs) == 0
    jobs._check()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_power_cut_leaves_whole_transactions(memory_directory, monkeypatch):
    seed = workers.seed_of("transaction_power_cut")
    dice = random.Random(seed)
    for name in ("notice", "notice_queue"):
        monkeypatch.setattr(Background, name, lambda *_: None)
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 1 << 16)
    states = ops = unsure = kept = again = 0
    for run in itertools.count():
        if states >= STATES:
            break
        cuts = []
        live = memory_directory / f"live{run}"
        with monkeypatch.context() as patch:
            live.mkdir()
            disk = Disk(live, patch)
            store = millstream.open(live, durability="process")
            work = Workload(store, dice)
            store.flush()

            def cut(chance, work=work, disk=disk, cuts=cuts, run=run):
                if dice.random() < chance:
                    target = memory_directory / f"cut{run}-{len(cuts)}"
                    disk.unit = dice.choice((4096, 512))
                    disk.cut(target, dice)
                    cuts.append((target, work.facts()))

            disk.on_call = lambda cut=cut: cut(0.15)
            for _ in range(dice.randrange(10, 40)):
                work.step()
                ops += 1
                cut(0.15)
            disk.on_call = lambda: None
            store.close()
        for target, facts in cuts:
            unsure += facts[0] != facts[1] or facts[2] != facts[3]
            # A second power cut, while the first opener mends what the first one left.
            more = []
            if dice.random() < 0.15:
                copy = target.with_name(target.name + "-copy")
                shutil.copytree(target, copy)
                with monkeypatch.context() as patch:
                    disk = Disk(copy, patch)

                    def cut_again(disk=disk, more=more, target=target):
                        if dice.random() < 0.06:
                            more.append(target.with_name(f"{target.name}-{len(more)}"))
                            disk.unit = dice.choice((4096, 512))
                            disk.cut(more[-1], dice)

                    disk.on_call = cut_again
                    millstream.open(copy, durability="process").close()
                shutil.rmtree(copy)
            again += len(more)
            for path in (target, *more):
                with millstream.open(path, durability="process") as store:
                    out = judge(store, facts)
                    kept += facts[0] != facts[1] and out == facts[1]
                with millstream.open(path, durability="process") as store:
                    assert judge(store, facts) == out
                    go_on(store)
                states += 1
                shutil.rmtree(path)
        shutil.rmtree(live)
    print(f"cut within a transaction: {unsure}, kept then: {kept}; second cuts: {again}")
    assert unsure > 10
    assert kept > 0
    workers.report(ops, states, seed)
