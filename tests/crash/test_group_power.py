"""Power cuts over groups: a position goes back to what was synced at most, and never on."""

import random
import shutil

import crash_workers as workers
import pytest
from page_drop_disk import Disk

import millstream
from millstream import OffsetOutOfRange
from millstream.store.background import Background

STATES = 400


class Workload:
    """Records that count up, a group that reads them, and what must survive of its position."""

    def __init__(self, store, dice, level):
        self.level = level
        self.dice = dice
        self.stream = store.stream("s", durability=level)
        self.records = self.durable_records = 0
        self.tried = self.durable = 0
        self.made = False
        self.consumer = None

    def step(self):
        what = self.dice.randrange(5)
        if what == 0 or self.records == 0:
            level = self.dice.choice(("process", "sync"))
            self.stream.append(b"%d" % self.records, durability=level)
            self.records += 1
            if level == "sync":
                self.durable_records = self.records
        elif self.consumer is None:
            self.consumer = self.stream.consumer(group="g", max_records=self.dice.randrange(1, 3))
            self.made = True
        elif what == 1:
            self.stream.flush()
            self.durable, self.durable_records = self.tried, self.records
        elif what == 2:
            self.consumer.close()
            self.consumer = None
        elif self.consumer.poll() is not None:
            self.tried = self.consumer.position[0].offset
            self.consumer.commit()
            if self.level == "sync":
                self.durable = self.tried
                self.durable_records = max(self.durable_records, self.tried)

    def facts(self):
        return self.records, self.durable_records, self.tried, self.durable, self.made


def judge(path, records, durable_records, tried, durable, made):
    """Open what a power cut left: (offset of the group, was its position lost with the tail)."""
    with millstream.open(path) as store:
        stream = store.stream("s")
        end = stream.next_offset(0)
        assert durable_records <= end <= records
        if not made:
            return 0, False
        assert stream.groups() == ["g"]
        position = stream.group("g").positions()[0]
        offset = 0 if position is None else position.offset
        assert durable <= offset <= tried
        for i in range(3):
            stream.append(b"new %d" % i)
        with stream.consumer(group="g", timeout=0) as consumer:
            try:
                found = [value for batch in consumer for value in batch.values]
            except OffsetOutOfRange:
                assert offset > end
                return offset, True
            assert offset <= end
            assert found == [b"%d" % i for i in range(offset, end)] + [b"new 0", b"new 1", b"new 2"]
            return offset, False


@pytest.mark.parametrize("level", ["process", "sync"])
def test_power_cut_at_any_moment_takes_positions_back_and_never_on(
    memory_directory, monkeypatch, level
):
    seed = workers.seed_of(f"power_cut_groups_{level}")
    dice = random.Random(seed)
    for name in ("notice", "notice_queue"):
        monkeypatch.setattr(Background, name, lambda *_: None)
    states = back = lost = ops = run = 0
    while states < STATES:
        run += 1
        cuts = []
        live = memory_directory / f"live{run}"
        with monkeypatch.context() as patch:
            live.mkdir()
            disk = Disk(live, patch)
            store = millstream.open(live, durability="process")
            work = Workload(store, dice, level)

            def cut(work=work, disk=disk, cuts=cuts, run=run):
                target = memory_directory / f"cut{run}-{len(cuts)}"
                disk.cut(target, dice)
                cuts.append((target, work.facts()))

            for _ in range(dice.randrange(4, 16)):
                work.step()
                ops += 1
                if dice.random() < 0.4:
                    cut()
            store.close()
        for target, facts in cuts:
            if not facts[0]:
                shutil.rmtree(target)
                continue
            offset, gone = judge(target, *facts)
            back += facts[2] - offset
            lost += gone
            states += 1
            shutil.rmtree(target)
        shutil.rmtree(live)
    print(f"back={back} lost_tails={lost}")
    assert (back > 0) == (level == "process")
    assert (lost > 0) == (level == "process")
    workers.report(ops, states, seed)
