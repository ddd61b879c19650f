"""Workers consume, process, produce and acknowledge, and are killed at any instant.

`python transaction_storm.py DIRECTORY LEVEL KILLS SEED`: a process of its own, which forks the
workers, so that a hundred kills take seconds. Numbers go through a pipe from the stream `in` to the
stream `out` and the queue `jobs`, from there through a second one to the stream `done`: each has to
be in `out` and in `done` once. Now and then all processes are killed, and the next open is a first
one. A line of counts at the end.
"""

import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter

from transaction_steps import forked

import millstream

BATCH = 7
PER_FEED = 60


def feed(path, level, first):
    """Put numbers in, once also if this is killed and done again."""
    with millstream.open(path, durability=level) as store:
        producer = store.stream("in", partitions=3).producer(id="feeder")
        for number in range(producer.last_sequence + 1, first + PER_FEED):
            producer.append(b"%d" % number, key=b"%d" % (number % 50), sequence=number)
    return 0


def pipes(store):
    out, done = store.stream("out", partitions=2), store.stream("done")
    jobs = store.queue("jobs", capacity=100_000, ordering="key", lease=30.0)

    def divide(record):
        return {
            "out": {"value": record.value, "key": record.key},
            "jobs": millstream.Put(record.value, key=record.key),
        }

    source = store.stream("in", partitions=3)
    return [
        store.pipe(source, divide, {"out": out, "jobs": jobs}, group="g", batch=BATCH),
        store.pipe(jobs, lambda message: message.value, done, batch=BATCH),
    ]


def work(path, level):
    """For ever, or until there is nothing left to do."""
    store = millstream.open(path, durability=level)
    both = pipes(store)
    while True:
        for pipe in both:
            pipe.step(timeout=0.005)


def finish(path, level, total):
    """Do what is left, and look at all of it."""
    with millstream.open(path, durability=level) as store:
        both = pipes(store)
        deadline = time.monotonic() + 120
        idle = 0
        while idle < 5:
            idle = 0 if sum(pipe.step(timeout=0.1) for pipe in both) else idle + 1
            assert time.monotonic() < deadline
        for pipe in both:
            pipe.close()
        jobs = store.queue("jobs")
        jobs._check()
        assert len(jobs) == 0, jobs._counts()
        assert jobs._counts()["dead"] == 0
        store.stream("in").group("g")._check()
        assert store.stream("in").group("g").lag() == 0
        lost = twice = 0
        for name in ("out", "done"):
            stream = store.stream(name)
            found = Counter(
                int(value)
                for partition in range(stream.partitions)
                for batch in stream.read(partition=partition)
                for value in batch.values
            )
            lost += sum(not found[number] for number in range(total))
            twice += sum(count > 1 for count in found.values())
            assert not set(found) - set(range(total))
        print(f"lost={lost} twice={twice}", flush=True)
        assert store._transactions.journal().is_applied
        # The order of a key is kept through both pipes.
        of_key = {}
        for batch in store.stream("done").read(partition=0):
            for value in batch.values:
                of_key.setdefault(int(value) % 50, []).append(int(value))
        for numbers in of_key.values():
            assert numbers == sorted(numbers)
        return 1 if lost or twice else 0


def main(path, level, kills, seed):
    dice = random.Random(seed)
    workers, total, counts = [], 0, Counter()
    assert forked(lambda: feed(path, level, 0)) == 0
    total = PER_FEED

    def start():
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(path, level)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        workers.append(child)

    def kill(child):
        workers.remove(child)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, f"a worker ended by itself: {status}"
        counts["kills"] += 1

    while counts["kills"] < kills:
        while len(workers) < 3:
            start()
        pause = dice.choice((0.0, 0.01, 0.03, 0.06, 0.1)) * (1 + dice.random())
        time.sleep(pause)  # the moment of the kill is what varies
        what = dice.random()
        if what < 0.1:
            for child in workers[:]:
                kill(child)
            counts["of all"] += 1
        else:
            kill(dice.choice(workers))
        if what > 0.8:
            assert forked(lambda first=total: feed(path, level, first)) == 0
            total += PER_FEED
    for child in workers[:]:
        kill(child)
    status = forked(lambda: finish(path, level, total))
    print(f"inputs={total} kills={counts['kills']} of_all_at_once={counts['of all']} seed={seed}")
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
