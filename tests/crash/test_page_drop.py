"""Power cuts over appends, rolls and syncs: a prefix survives, with all that was called durable."""

import itertools
import random
import shutil

import crash_workers as workers
from page_drop_disk import Disk

import millstream
from millstream.disk import files
from millstream.store.background import Background

STATES = 1200
ALPHABET = (
    "small",
    "page",
    "roll",
    "large",
    "sync",
    "small sync",
    "batch sync",
    "spare",
    "small",
    "page",
)


class Workload:
    """Appends whose values count up in each partition, and what must survive."""

    def __init__(self, store, partitions):
        self.stream = store.stream("s", partitions=partitions, segment_bytes=1 << 16)
        self.tried = [0] * partitions
        self.durable = [0] * partitions

    def append(self, partition, count, size, durability):
        first = self.tried[partition]
        self.tried[partition] += count
        values = [b"%d " % (first + i) + b"v" * size for i in range(count)]
        self.stream.append_many(values, partition=partition, durability=durability)
        if durability == "sync":
            self.durable[partition] = self.tried[partition]

    def step(self, letter, partition):
        if letter == "sync":
            self.stream.flush()
            self.durable = list(self.tried)
        elif letter == "spare":
            self.stream._partition(partition).provide_next()
        else:
            count, size = {
                "small": (1, 5),
                "page": (3, 1500),
                "roll": (1, 25_000),
                "large": (2, 60_000),
                "batch": (9, 400),
            }[letter.split()[0]]
            self.append(partition, count, size, "sync" if letter.endswith("sync") else "process")


def judge(path, tried, durable):
    """Open what a power cut left, twice, and go on; how many records each partition kept."""
    kept = []
    for attempt in range(2):
        with millstream.open(path) as store:
            stream = store.stream("s")
            for partition, most in enumerate(tried):
                numbers = []
                for batch in stream.read(partition=partition):
                    assert list(batch.offsets) == list(
                        range(len(numbers), len(numbers) + len(batch))
                    )
                    numbers += [bytes(value).split(b" ")[0] for value in batch.values]
                wanted = [b"%d" % i for i in range(len(numbers))]
                if attempt == 0:
                    assert numbers == wanted, f"not a prefix: {numbers}"
                    assert durable[partition] <= len(numbers) <= most, (
                        durable,
                        len(numbers),
                        tried,
                    )
                    kept.append(len(numbers))
                    if partition == 0:
                        stream.append(b"%d after" % len(numbers), partition=partition)
                else:
                    assert numbers == wanted, "recovered differently the second time"
                    assert len(numbers) == kept[partition] + (partition == 0)
    return kept


def cut_and_judge(memory_directory, monkeypatch, dice, make, alphabet, steps, chance, wanted):
    """Cut the power of workloads until there are as many states as wanted: (operations, states).

    `make` makes one in a store; one takes as many of the steps as the dice say of two numbers, and
    after each, and at calls to the disk, the power is cut by a chance.
    """
    # What is synced when is up to the workload
    monkeypatch.setattr(Background, "notice", lambda *_: None)
    states = lost = ops = 0
    numbers = itertools.count()
    while states < wanted:
        run = next(numbers)
        cuts = []
        live = memory_directory / f"live{run}"
        with monkeypatch.context() as patch:
            live.mkdir()
            disk = Disk(live, patch)
            store = millstream.open(live, durability="process")
            work = make(store)

            def cut(chance, work=work, disk=disk, cuts=cuts, run=run):
                if dice.random() < chance:
                    target = memory_directory / f"cut{run}-{len(cuts)}"
                    disk.cut(target, dice)
                    cuts.append((target, list(work.tried), list(work.durable)))

            disk.on_call = lambda cut=cut: cut(chance / 5)
            for _ in range(dice.randrange(*steps)):
                work.step(dice.choice(alphabet), dice.randrange(len(work.tried)))
                ops += 1
                cut(chance)
            disk.on_call = lambda: None
            store.close()
        for target, tried, durable in cuts:
            kept = judge(target, tried, durable)
            lost += sum(tried) - sum(kept)
            shutil.rmtree(target)
        states += len(cuts)
        shutil.rmtree(live)
    assert lost > 0, "nothing was ever at stake"
    return ops, states


def test_power_cut_at_any_moment_leaves_a_prefix(memory_directory, monkeypatch):
    seed = workers.seed_of("power_cut")
    dice = random.Random(seed)
    ops, states = cut_and_judge(
        memory_directory,
        monkeypatch,
        dice,
        lambda store: Workload(store, dice.choice((1, 1, 2))),
        ALPHABET,
        (3, 14),
        0.7,
        STATES,
    )
    workers.report(ops, states, seed)


def test_names_that_a_dead_publisher_did_not_sync_are_synced_before_the_first_ack(
    memory_directory, monkeypatch
):
    monkeypatch.setattr(Background, "notice", lambda *_: None)
    live, target = memory_directory / "live", memory_directory / "cut"
    live.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(live, patch)
        store = millstream.open(live)
        work = Workload(store, 1)
        with monkeypatch.context() as killed:  # before it could sync the directories
            killed.setattr(files, "_sync_directory", lambda path: None)
            work.stream._partition(0).provide_next()
        work.step("small sync", 0)
        disk.cut(target, random.Random(0), keep=0.0)
        store.close()
    assert judge(target, work.tried, work.durable) == [1]
    workers.report(1, 1, 0)


def test_power_cut_during_recovery_leaves_the_same(memory_directory, monkeypatch):
    seed = workers.seed_of("power_cut_in_recovery")
    dice = random.Random(seed)
    monkeypatch.setattr(Background, "notice", lambda *_: None)
    states = ops = 0
    for run in range(12):
        live, first = memory_directory / f"live{run}", memory_directory / f"first{run}"
        with monkeypatch.context() as patch:
            live.mkdir()
            disk = Disk(live, patch)
            store = millstream.open(live, durability="process")
            work = Workload(store, 1)
            work.step("small sync", 0)
            for _ in range(8):
                work.step(dice.choice(ALPHABET), 0)
                ops += 1
            disk.cut(first, dice)
            store.close()
        cuts = []
        with monkeypatch.context() as patch:
            disk = Disk(first, patch)

            def cut(disk=disk, cuts=cuts, run=run):
                target = memory_directory / f"second{run}-{len(cuts)}"
                disk.cut(target, dice)
                cuts.append(target)

            disk.on_call = cut
            with millstream.open(first) as store:
                kept = store.stream("s").next_offset(0)
                disk.on_call = lambda: None
        for target in cuts:
            # What recovery kept it had not synced yet at each of these moments, but it was synced
            # or at stake before.
            judge(target, [max(kept, work.tried[0])], [work.durable[0]])
            shutil.rmtree(target)
        states += len(cuts)
    workers.report(ops, states, seed)


def test_power_cut_after_retention_does_not_begin_the_log_anew(memory_directory, monkeypatch):
    """The record that activated the first segment kept was not synced when the others were gone."""
    monkeypatch.setattr(Background, "notice", lambda *_: None)
    live, target = memory_directory / "live", memory_directory / "cut"
    live.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(live, patch)
        store = millstream.open(live, durability="process")
        stream = store.stream("s", segment_bytes=1 << 16)
        for _ in range(4):
            stream.append(b"v" * 40_000, durability="process")
        removed = stream.delete_before(millstream.Position(0, 1, 4))
        assert removed > 0
        disk.sync_directory(stream.path + "/00000")  # the removal reached the disk
        disk.cut(target, random.Random(0), keep=0.0)
        store.close()
    with millstream.open(target) as store:
        assert store.stream("s").first_offset(0) == removed
        assert store.stream("s").append(b"after").offset >= removed
    workers.report(1, 1, 0)
