"""How many tasks a second does dramatiq do over millstream, and over Redis?

`python -m benchmarks.contrib_dramatiq`, or with a number of tasks. It wants the package redis, and
Debian's redis-server, which it starts on a port of its own. No-op tasks with 100 bytes, all with
default settings, in turn:

- sent: `send` one at a time by one process, without a worker;
- done, 1 process: that backlog by `dramatiq -p 1`, which has 8 threads, from the first to the last;
- done, 2 processes: another one by `dramatiq -p 2`;
- round trips: `send` and `get_result`, one after the other, with that worker idle.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

import dramatiq
from dramatiq.results import Results

from benchmarks.contrib_celery import redis_server
from millstream.contrib.dramatiq import MillstreamBroker, MillstreamResultBackend

ROUNDS, TRIPS = 3, 300
CASES = ("sent", "done, 1 process", "done, 2 processes", "round trips")


def open_broker(kind, place):
    """The broker and its actors; `place` is a directory, or a port of Redis."""
    if kind == "millstream":
        broker, results = MillstreamBroker(place), MillstreamResultBackend(place)
    else:
        from dramatiq.brokers.redis import RedisBroker
        from dramatiq.results.backends import RedisBackend

        broker, results = (
            one(url=f"redis://127.0.0.1:{place}/0") for one in (RedisBroker, RedisBackend)
        )
    broker.add_middleware(Results(backend=results))

    @dramatiq.actor(broker=broker)
    def nothing(payload):
        pass

    @dramatiq.actor(broker=broker, store_results=True)
    def look():
        return time.monotonic()  # of the machine, so of both processes

    return broker, results, nothing, look


if "BENCH_KIND" in os.environ:
    broker, *_ = open_broker(os.environ["BENCH_KIND"], os.environ["BENCH_PLACE"])


@contextmanager
def worker(kind, place, processes):
    command = [sys.executable, "-m", "dramatiq", "benchmarks.contrib_dramatiq:broker"]
    environment = {**os.environ, "BENCH_KIND": kind, "BENCH_PLACE": str(place)}
    null = subprocess.DEVNULL
    with subprocess.Popen(
        [*command, "-p", str(processes)], env=environment, stdout=null, stderr=null
    ) as running:
        yield
        running.send_signal(signal.SIGTERM)


def rates(kind, place, count):
    """Tasks a second, as in `CASES`."""
    broker, results, nothing, look = open_broker(kind, place)
    payload, found = "x" * 100, []

    def had(message):
        return message.get_result(backend=results, block=True, timeout=600_000)

    for processes in (1, 2):
        first = look.send()
        began = time.perf_counter()
        for _ in range(count):
            nothing.send(payload)
        sent = count / (time.perf_counter() - began)
        last = look.send()
        with worker(kind, place, processes):
            began = had(first)
            found.append(count / (had(last) - began))
            if processes == 2:
                had(look.send())
                began = time.perf_counter()
                for _ in range(TRIPS):
                    had(look.send())
                trips = TRIPS / (time.perf_counter() - began)
    for one in (broker, results):
        getattr(one, "close", int)()
    return sent, *found, trips


def measure(kind, count):
    with tempfile.TemporaryDirectory() as directory:
        if kind == "millstream":
            return rates(kind, directory, count)
        with redis_server(directory) as port:
            return rates(kind, port, count)


def main(count):
    figures = {"millstream": [], "redis": []}
    for _ in range(ROUNDS):
        for kind, rounds in figures.items():
            rounds.append(measure(kind, count))
            print(kind, *(f"{one:,.0f}" for one in rounds[-1]), file=sys.stderr)
    print(f"{'tasks a second':16}", *(f"{case:>18}" for case in CASES))
    medians = {}
    for kind, rounds in figures.items():
        medians[kind] = [statistics.median(one) for one in zip(*rounds, strict=True)]
        print(f"{kind:16}", *(f"{one:18,.0f}" for one in medians[kind]))
    both = zip(medians["millstream"], medians["redis"], strict=True)
    print(f"{'ours over redis':16}", *(f"{ours / theirs:17.2f}x" for ours, theirs in both))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5_000)
