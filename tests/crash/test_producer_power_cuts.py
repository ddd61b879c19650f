"""Power cuts over what producers send: a sequence is known exactly if its record was kept."""

import itertools
import os
import random
import shutil

import crash_workers as workers
from page_drop_disk import Disk

import millstream
from millstream.log import sequences
from millstream.store.background import Background

STATES = 1500 if os.environ.get("MILLSTREAM_FULL") else 600
NAMES = ("p", "q", "r")
ALPHABET = ("one", "one", "many", "roll", "roll", "plain", "sync", "one sync", "remove", "save")


class Workload:
    """Records of producers, and for each partition in order who appended what."""

    def __init__(self, store, partitions):
        self.stream = store.stream("s", partitions=partitions, segment_bytes=1 << 16)
        self.log = [[] for _ in range(partitions)]
        self.sent = dict.fromkeys(NAMES, -1)
        self.durable = [0] * partitions

    def send(self, name, count, size, durability):
        producer = self.stream.producer(name)
        first = max(0, self.sent[name] - 2)  # some of it again
        last = self.sent[name] + count
        wanted = {p: len(log) for p, log in enumerate(self.log)}
        for sequence in range(self.sent[name] + 1, last + 1):
            self.log[sequence % len(self.log)].append((name, sequence))
        self.sent[name] = last
        producer.append_many(
            [b"%d " % n + b"v" * size for n in range(first, last + 1)],
            first_sequence=first,
            durability=durability,
        )
        for p, before in wanted.items():
            if durability == "sync" and len(self.log[p]) > before:
                self.durable[p] = len(self.log[p])

    def step(self, letter, dice):
        name = dice.choice(NAMES)
        partition = dice.randrange(len(self.log))
        if letter == "sync":
            self.stream.flush()
            self.durable = [len(log) for log in self.log]
        elif letter == "plain":
            self.log[partition].append((None, 0))
            self.stream.append(b"plain", partition=partition)
        elif letter == "remove":
            end = self.stream.next_offset(partition)
            self.stream.delete_before(millstream.Position(partition, 1, end))
        elif letter == "save":
            log = self.stream._log(partition)
            with log.maintaining:
                sequences.keep(log, log._sealed_end()[0])
        else:
            count, size = {"one": (1, 5), "many": (9, 300), "roll": (2, 25_000)}[letter.split()[0]]
            self.send(name, count, size, "sync" if letter.endswith("sync") else "process")


def judge(path, log, durable):
    """Open what a power cut left, twice: the table is the maximum of the log, and goes on."""
    lost = 0
    for attempt in range(2):
        with millstream.open(path, durability="process") as store:
            stream = store.stream("s")
            for p, records in enumerate(log):
                following = stream.next_offset(p)
                if attempt == 0:
                    assert durable[p] <= following <= len(records), (p, durable, following)
                    lost += len(records) - following
                    del records[following:]
                assert following == len(records)
                wanted = dict.fromkeys(NAMES, -1)
                for name, sequence in records:
                    if name is not None:
                        wanted[name] = max(wanted[name], sequence)
                for name, highest in wanted.items():
                    producer = stream.producer(name)
                    assert producer.last_sequences[p] == highest, (attempt, p, name)
                    if highest >= 0:
                        assert producer.append(b"again", sequence=highest, partition=p) is None
                if attempt == 0:
                    after = wanted["p"] + 1000
                    stream.producer("p").append(b"after", sequence=after, partition=p)
                    records.append(("p", after))
    workers.verified(path)
    return lost


def test_power_cut_leaves_a_sequence_exactly_with_its_record(memory_directory, monkeypatch):
    seed = workers.seed_of("producer_power_cut")
    dice = random.Random(seed)
    monkeypatch.setattr(Background, "notice", lambda *_: None)
    states = lost = ops = saved = 0
    runs = itertools.count()
    while states < STATES:
        run = next(runs)
        cuts = []
        live = memory_directory / f"live{run}"
        with monkeypatch.context() as patch:
            live.mkdir()
            disk = Disk(live, patch)
            store = millstream.open(live, durability="process")
            work = Workload(store, dice.choice((1, 1, 2)))

            def cut(chance, work=work, disk=disk, cuts=cuts, run=run):
                if dice.random() < chance:
                    target = memory_directory / f"cut{run}-{len(cuts)}"
                    disk.cut(target, dice)
                    cuts.append((target, [list(log) for log in work.log], list(work.durable)))

            disk.on_call = lambda cut=cut: cut(0.1)
            for _ in range(dice.randrange(4, 16)):
                work.step(dice.choice(ALPHABET), dice)
                ops += 1
                cut(0.5)
            disk.on_call = lambda: None
            store.close()
        for target, log, durable in cuts:
            saved += any(
                path.stat().st_size > sequences.HEADER_BYTES
                for path in target.glob("streams/s/*/sequences")
            )
            lost += judge(target, log, durable)
            shutil.rmtree(target)
        states += len(cuts)
        shutil.rmtree(live)
    assert lost > 0 and saved > STATES // 20, "nothing was ever at stake"
    workers.report(ops, states, seed)
    print(f"states={states} with_saved_table={saved} records_cut={lost}")
