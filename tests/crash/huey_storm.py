"""A storm over huey: producers and consumers are killed at any moment, and no task is lost.

`python huey_storm.py DIRECTORY KILLS SEED` runs one and prints what became of it as JSON. Each
process is a fork. What it did it says with `write(2)`, a line each, which a SIGKILL leaves
standing.
"""

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from huey import signals

from millstream.contrib import huey as ours
from millstream.contrib.huey import MillstreamHuey

ours.CLAIM_SECONDS = 2.0  # what a killed scheduler has claimed comes back in this test's time
PRIORITIES = (None, 1, 7, 9)


def pause(seconds):
    threading.Event().wait(seconds)


def open_huey(directory):
    huey = MillstreamHuey("storm", path=directory / "store", durability="process", max_attempts=62)
    began, ran = (
        os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for name in ("began", "ran")
    )

    @huey.task(name="work")
    def work(number):
        os.write(began, b"%d\n" % number)
        pause(0.003)
        os.write(ran, b"%d\n" % number)
        return number

    return huey, work


def produce(directory, first):
    """Put tasks of growing numbers, and say of each that it is there: now, or in a second."""
    huey, work = open_huey(directory)
    put = os.open(directory / "put", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = first
    while True:
        if number % 5 == 0:
            task = work.s(number, delay=0.05)
            huey.add_schedule(task)
        else:
            huey.enqueue(work.s(number, priority=PRIORITIES[number % 4]))
        os.write(put, b"%d\n" % number)
        number += 1
        pause(0.001)


def consume(directory):
    huey, _ = open_huey(directory)
    huey.signal(signals.SIGNAL_ERROR)(lambda signal, task, error: os._exit(3))
    consumer = huey.create_consumer(workers=2, periodic=False, check_worker_health=False)
    consumer.start()
    while True:
        signal.pause()


def start(function, *arguments):
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
        finally:
            os._exit(2)
    return pid


def lines(path):
    return [int(line) for line in path.read_bytes().split()] if path.exists() else []


def import_all(directory):
    """Before the forks, so that they begin to work at once."""
    huey, work = open_huey(directory)
    work(0)
    huey.execute(huey.dequeue())
    huey.storage.close()


def main(directory, kills, seed):
    dice = random.Random(seed)
    running = {}
    first = 0

    def begin(role):
        nonlocal first
        first += 1_000_000
        pid = start(produce, directory, first) if role == "producer" else start(consume, directory)
        running[pid] = role

    for role in ("producer", "consumer", "consumer", "consumer"):
        begin(role)
    killed = {"producer": 0, "consumer": 0}
    for _ in range(kills):
        pause(dice.uniform(0.02, 0.25))  # the moment of the kill is what varies
        pid, role = dice.choice(list(running.items()))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"{role} ended by itself: {status}"
        del running[pid]
        killed[role] += 1
        begin(role)
    for pid, role in list(running.items()):
        if role == "producer":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            del running[pid]
    put = set(lines(directory / "put"))
    deadline = time.monotonic() + 90
    while not put <= set(lines(directory / "ran")) and time.monotonic() < deadline:
        pause(0.1)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    began, ran = lines(directory / "began"), lines(directory / "ran")
    huey, _ = open_huey(directory)
    queues = huey.storage._open().lanes.by_urgency()
    dead = sum(queue.stats().dead for queue in queues)
    results = {int(huey.serializer.deserialize(row)) for row in huey.all_results().values()}
    huey.storage.close()
    figures = {
        "killed": killed,
        "put": len(put),
        "ran": len(ran),
        "begun_again": len(began) - len(set(began)),
        "ended_twice": len(ran) - len(set(ran)),
        "lost": len(put - set(ran)),
        "dead": dead,
        "without_result": len(put - results),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        import_all(Path(scratch))
    with contextlib.suppress(KeyboardInterrupt):
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
