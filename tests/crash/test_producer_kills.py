"""Producers killed at random, which send again: each sequence is there once, by content."""

import random
import time
from collections import Counter

import crash_workers as workers
from producer_workers import value

import millstream

KILLS = 160
NAMES = ("a", "b", "shared", "shared")


class Harvest:
    """What was read so far, of a log whose earlier segments are removed all the time."""

    def __init__(self, path):
        self.path = path
        self.found = Counter()
        self.last = {}
        self.next = [0, 0]

    def take(self, *, remove):
        """Read what is new, in order; then remove whole segments. What producers sent is kept."""
        with millstream.open(self.path, durability="process") as store:
            stream = store.stream("s")
            for partition in range(2):
                for batch in stream.read(partition=partition, start=self.next[partition]):
                    assert batch.first_offset == self.next[partition]
                    self.next[partition] = batch.next_offset
                    for found in batch.values:
                        self._count(partition, bytes(found))
                end = self.next[partition]
                if remove and end:
                    epoch = store.session.generation
                    stream.delete_before(millstream.Position(partition, epoch, end))
            return {name: stream.producer(name).last_sequence for name in set(NAMES)}

    def _count(self, partition, found):
        name, _, rest = found.split(b" ")[0].decode().partition(":")
        if name == "plain":
            return
        sequence = int(rest)
        assert found == value(name, sequence)
        self.found[name, sequence] += 1
        before = self.last.get((partition, name), -1)
        assert sequence > before, f"{name}: {sequence} after {before}"
        self.last[partition, name] = sequence


def test_killed_producers_send_again_and_each_sequence_is_there_once(tmp_path):
    seed = workers.seed_of("producer_kills")
    dice = random.Random(seed)
    path = tmp_path / "store"
    running = {}

    def start(index):
        running[index] = workers.start(
            "producer_workers.send_for_ever",
            str(path),
            NAMES[index],
            str(tmp_path / f"{index}.acknowledged"),
            dice.randrange(1 << 30),
        )

    kills = firsts = removed = 0
    harvest = Harvest(path)
    for index in range(len(NAMES)):
        start(index)
    for worker in running.values():
        assert workers.line(worker) == "open"
    while kills < KILLS:
        time.sleep(dice.random() * 0.03)  # the moment of the kill is what varies
        if dice.random() < 0.15:
            for worker in running.values():
                worker.kill()
            for worker in running.values():
                workers.kill(worker)
            kills += len(running)
            firsts += 1
            indexes = list(running)
        else:
            indexes = [dice.randrange(len(NAMES))]
            workers.kill(running[indexes[0]])
            kills += 1
        if dice.random() < 0.4:
            harvest.take(remove=True)
            removed += 1
        for index in indexes:
            start(index)
        for index in indexes:
            assert workers.line(running[index]) == "open"
    for worker in running.values():
        assert workers.stop(worker) == 0
    last = harvest.take(remove=False)
    lost = dup = 0
    for name in set(NAMES):
        for sequence in range(last[name] + 1):
            lost += harvest.found[name, sequence] == 0
            dup += harvest.found[name, sequence] > 1
        assert max(s for n, s in harvest.found if n == name) == last[name]
    for index, name in enumerate(NAMES):
        lines = (tmp_path / f"{index}.acknowledged").read_text().split()
        assert max(map(int, lines)) <= last[name]
    workers.report(sum(harvest.found.values()), kills, seed, lost, dup)
    print(f"kills={kills} first_opens={firsts} harvests={removed} last={last}")
    assert lost == dup == 0
    assert kills >= 150 and firsts > 3 and removed > 10
    with millstream.open(path) as store:
        assert store.stream("s").first_offset(0) > 0
    workers.verified(path)


def test_registering_killed_at_random_gives_each_id_one_number(tmp_path):
    seed = workers.seed_of("producer_registrations")
    dice = random.Random(seed)
    path = tmp_path / "store"

    def start():
        seed = dice.randrange(1 << 30)
        return workers.start("producer_workers.register_for_ever", str(path), seed)

    running = [start() for _ in range(3)]
    kills = 0
    while kills < 45:
        for worker in running:
            assert workers.line(worker) == "open"
        time.sleep(dice.random() * 0.05)  # the moment of the kill is what varies
        for worker in running if dice.random() < 0.3 else dice.sample(running, 1):
            workers.kill(worker)
            kills += 1
        alive = [worker for worker in running if worker.poll() is None]
        for worker in alive:
            assert workers.stop(worker) == 0
        running = [start() for _ in range(3)]
    for worker in running:
        workers.stop(worker)
    with millstream.open(path) as store:
        stream = store.stream("s")
        found = Counter(bytes(v).decode() for batch in stream.read() for v in batch.values)
        registered = stream.stats().producers
        numbers = {name: stream.producer(name)._number for name in found}
        assert stream.stats().producers == registered  # each was there
        assert len(set(numbers.values())) == len(found) <= registered
        again = sum(stream.producer(name).append(b"", sequence=0) is not None for name in found)
    dup = sum(count > 1 for count in found.values()) + again
    workers.report(sum(found.values()), kills, seed, 0, dup)
    print(f"ids={len(found)} registered={registered}")
    assert dup == 0 and len(found) > 100
    workers.verified(path)
