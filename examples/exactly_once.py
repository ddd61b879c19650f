"""Consume, process, produce and acknowledge once: kill the workers at random, and count.

Numbers go from the stream `numbers` through a first pipe to the stream `squares` and the queue
`checks`, and from there through a second one to the stream `checked`. Three workers run both pipes;
again and again one of them is killed with SIGKILL. At the end each number is in `squares` and in
`checked` once. The second run does the same without transactions, committing and acknowledging
after the work, and counts what the kills did.

Run it: `python examples/exactly_once.py [KILLS]`.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter

import millstream

NUMBERS = 3000
BATCH = 20


def streams(store: millstream.Store) -> tuple[millstream.Stream, ...]:
    """The streams and their partitions."""
    return tuple(store.stream(n, partitions=3) for n in ("numbers", "squares", "checked"))


def work_once(store: millstream.Store) -> None:
    """Each input with its effects in one transaction."""
    numbers, squares, checked = streams(store)
    checks = store.queue("checks")

    def square(record):
        slowly()
        value = b"%d" % int(record.value) ** 2
        return {"squares": {"value": value, "key": record.key}, "checks": value}

    def check(message):
        slowly()
        return message.value

    sinks = {"squares": squares, "checks": checks}
    with (
        store.pipe(numbers, square, sinks, batch=BATCH) as first,
        store.pipe(checks, check, checked, batch=BATCH) as second,
    ):
        while True:
            first.step(timeout=0.02)
            second.step(timeout=0.02)


def work_at_least_once(store: millstream.Store) -> None:
    """The same by hand: effects first, then position and acknowledgement."""
    numbers, squares, checked = streams(store)
    checks = store.queue("checks")
    with numbers.consumer(group="pipe", max_records=BATCH) as consumer:
        while True:
            batch = consumer.poll(0.02)
            for value in batch.values if batch is not None else ():
                slowly()
                square = b"%d" % int(value) ** 2
                squares.append(square)
                checks.put(square)
            consumer.commit()
            messages = checks.get_many(BATCH, timeout=0.02)
            for message in messages:
                slowly()
                checked.append(message.value)
            checks.ack_many(messages)


def slowly() -> None:
    """Work that takes a moment, so that kills come in the middle of it."""
    time.sleep(0.0002)


def start(how: str, path: str) -> subprocess.Popen[bytes]:
    """A worker in a process of its own."""
    return subprocess.Popen([sys.executable, __file__, how, path])


def count(stream: millstream.Stream) -> Counter[int]:
    """How often each value is there."""
    return Counter(
        int(value)
        for partition in range(stream.partitions)
        for batch in stream.read(partition=partition)
        for value in batch.values
    )


def run(how: str, kills: int) -> bool:
    """Kill workers of one kind; is every effect there once?"""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        millstream.open(os.path.join(directory, "store"), durability="process") as store,
    ):
        numbers, squares, checked = streams(store)
        numbers.append_many(
            [b"%d" % n for n in range(NUMBERS)], keys=[b"%d" % n for n in range(NUMBERS)]
        )
        checks = store.queue("checks")
        workers = [start(how, store.path) for _ in range(3)]
        for _ in range(kills):
            time.sleep(random.uniform(0.1, 0.3))
            victim = workers.pop(random.randrange(len(workers)))
            victim.kill()
            victim.wait()
            workers.append(start(how, store.path))
        while "pipe" not in numbers.groups():  # no worker has come so far before it was killed
            time.sleep(0.05)
        while numbers.group("pipe").lag() or len(checks) or len(count(checked)) < NUMBERS:
            time.sleep(0.05)
        for worker in workers:
            worker.kill()
            worker.wait()
        right = True
        for stream in (squares, checked):
            found = count(stream)
            missing = NUMBERS - len(found)
            twice = sum(found.values()) - len(found)
            right = right and not missing and not twice
            print(f"{how}: {stream.name}: {kills} kills, {missing} missing, {twice} twice")
        return right


def main() -> None:
    """Run both kinds, or be a worker of one."""
    kinds = {"exactly_once": work_once, "at_least_once": work_at_least_once}
    if len(sys.argv) > 2:
        with millstream.open(sys.argv[2], durability="process") as store:
            kinds[sys.argv[1]](store)
        return
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    right = run("exactly_once", kills)
    run("at_least_once", kills)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
