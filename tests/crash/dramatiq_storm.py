"""A storm over dramatiq: producers and workers are killed at any moment, and no task is lost.

`python dramatiq_storm.py DIRECTORY KILLS SEED` runs one and prints what became of it as JSON. Each
worker is the real command `dramatiq`, with two processes; a fork runs it, which spares the start of
an interpreter. What a task did it says with `write(2)`, a line each, which a SIGKILL leaves
standing.
"""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import dramatiq
from dramatiq import cli
from dramatiq.middleware import CurrentMessage
from dramatiq.rate_limits import ConcurrentRateLimiter
from dramatiq.results import Results

from millstream.contrib.dramatiq import (
    MillstreamBroker,
    MillstreamRateLimiterBackend,
    MillstreamResultBackend,
)

WORKERS = 2
ROLES = {"producer": 1, "worker": WORKERS}


def pause(seconds):
    threading.Event().wait(seconds)


def set_up():
    """The broker of this process and its actors; each worker process calls it by its name."""
    directory = Path(os.environ["STORM"])
    broker = MillstreamBroker(directory / "store", durability="process")
    broker.add_middleware(Results(backend=MillstreamResultBackend(directory / "store")))
    limits = MillstreamRateLimiterBackend(directory / "store")
    mutex = ConcurrentRateLimiter(limits, "one at a time", ttl=300)
    dramatiq.set_broker(broker)
    began, ran = (
        os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for name in ("began", "ran")
    )

    @dramatiq.actor(store_results=True, result_ttl=3_600_000)
    def work(number):
        os.write(began, b"%d\n" % number)
        pause(0.03)
        os.write(ran, b"%d\n" % number)
        return number

    @dramatiq.actor(priority=-1, max_retries=None, min_backoff=10, max_backoff=50)
    def fail_at_first(number):
        if "retries" not in CurrentMessage.get_current_message().options:
            raise dramatiq.Retry
        os.write(began, b"%d\n" % number)
        os.write(ran, b"%d\n" % number)

    @dramatiq.actor(priority=7, max_retries=None, min_backoff=10, max_backoff=50)
    def alone(number):
        with mutex.acquire():
            os.write(began, b"%d\n" % number)
            os.write(ran, b"%d\n" % number)

    @dramatiq.actor
    def piped(number):
        return number

    broker.add_middleware(CurrentMessage())
    return broker, work, fail_at_first, alone, piped


def produce(first):
    """Send tasks of growing numbers, and say of each that it is there."""
    _, work, fail_at_first, alone, piped = set_up()
    put = os.open(Path(os.environ["STORM"]) / "put", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(first, first + 1_000_000):
        match number % 10:
            case 0:
                work.send_with_options(args=(number,), delay=100)
            case 1:
                fail_at_first.send(number)
            case 2:
                alone.send(number)
            case 3:
                (piped.message(number) | work.message()).run()
            case _:
                work.send(number)
        os.write(put, b"%d\n" % number)
        pause(0.008)


def work():
    command = ["dramatiq_storm:set_up", "-p", "2", "-t", "2", "--log-file", os.devnull]
    cli.main(cli.make_argument_parser().parse_args(command))


def start(function, *arguments):
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            function(*arguments)
        finally:
            os._exit(0)
    with contextlib.suppress(OSError):  # it did it itself
        os.setpgid(pid, pid)
    return pid


def children_of(pid):
    with contextlib.suppress(OSError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def end(pid):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def lines(path):
    return [int(line) for line in path.read_bytes().split()] if path.exists() else []


def main(directory, kills, seed):
    os.environ["STORM"] = str(directory)
    dice = random.Random(seed)
    running, leaving = {}, []
    killed = {"producer": 0, "worker process": 0, "all of a worker": 0}
    first = 0

    def begin(role):
        nonlocal first
        first += 1_000_000
        running[start(produce, first) if role == "producer" else start(work)] = role

    for role, count in ROLES.items():
        for _ in range(count):
            begin(role)
    while sum(killed.values()) < kills:
        pause(dice.uniform(0.05, 0.4))  # the moment of the kill is what varies
        pid, role = dice.choice(list(running.items()))
        children = children_of(pid)
        if role == "worker" and not children:
            continue
        del running[pid]
        if role == "producer" or dice.random() < 0.5:
            end(pid)
            killed["producer" if role == "producer" else "all of a worker"] += 1
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(children), signal.SIGKILL)
                killed["worker process"] += 1
            leaving.append(pid)  # the other process ends what it has begun
        begin(role)
    for pid, role in list(running.items()):
        if role == "producer":
            end(pid)
            del running[pid]
    put = set(lines(directory / "put"))
    deadline = time.monotonic() + 90
    while not put <= set(lines(directory / "ran")) and time.monotonic() < deadline:
        pause(0.1)
    for pid in (*running, *leaving):
        end(pid)
    began, ran = lines(directory / "began"), lines(directory / "ran")
    broker, *_ = set_up()
    stats = broker.queue("default").stats()
    figures = {
        "killed": killed,
        "put": len(put),
        "ran": len(ran),
        "begun_again": len(began) - len(set(began)),
        "ended_twice": len(ran) - len(set(ran)),
        "lost": len(put - set(ran)),
        "dead": stats.dead,
        "left": stats.unfinished,
    }
    broker.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.modules["dramatiq_storm"] = sys.modules["__main__"]
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
