"""How many tasks a second does taskiq do over millstream, and over Redis?

`python -m benchmarks.contrib_taskiq`, or with a number of tasks. It wants the packages taskiq-redis
and redis, and Debian's redis-server, which it starts on a port of its own. No-op tasks with 100
bytes, all with default settings, in turn; of Redis its stream, the one that gives tasks of a killed
worker back at all:

- sent: `kiq` one at a time by one process, while no worker runs;
- done: that backlog by `taskiq worker --workers 1`, from the first to the last;
- round trips: `kiq` and `wait_result`, one after the other, with that worker idle.
"""

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

from benchmarks.contrib_celery import redis_server
from millstream.contrib.taskiq import MillstreamBroker, MillstreamResultBackend

ROUNDS, TRIPS = 3, 200
CASES = ("sent", "done", "round trips")


def open_broker(kind, place):
    """The broker and its tasks; `place` is a directory, or a port of Redis."""
    if kind == "millstream":
        broker = MillstreamBroker(place).with_result_backend(MillstreamResultBackend(place))
    else:
        from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

        url = f"redis://127.0.0.1:{place}/0"
        # From the beginning of the stream: by default a worker has only what is sent after it.
        broker = RedisStreamBroker(url, consumer_id="0")
        broker = broker.with_result_backend(RedisAsyncResultBackend(url))

    @broker.task(task_name="nothing")
    async def nothing(payload):
        pass

    @broker.task(task_name="look")
    async def look():
        return time.monotonic()  # of the machine, so of both processes

    return broker, nothing, look


if "BENCH_KIND" in os.environ:
    broker, *_ = open_broker(os.environ["BENCH_KIND"], os.environ["BENCH_PLACE"])


@contextmanager
def worker(kind, place):
    command = [sys.executable, "-m", "taskiq", "worker", "benchmarks.contrib_taskiq:broker"]
    environment = {**os.environ, "BENCH_KIND": kind, "BENCH_PLACE": str(place)}
    null = subprocess.DEVNULL
    with subprocess.Popen(
        [*command, "--workers", "1"], env=environment, stdout=null, stderr=null, process_group=0
    ) as running:
        yield
        os.killpg(running.pid, signal.SIGKILL)  # over Redis it goes on for long after a SIGTERM


async def rates(kind, place, count):
    """Tasks a second, as in `CASES`."""
    broker, nothing, look = open_broker(kind, place)
    await broker.startup()
    payload = "x" * 100

    async def had(task):
        return (await task.wait_result(check_interval=0.001, timeout=600)).return_value

    first = await look.kiq()
    began = time.perf_counter()
    for _ in range(count):
        await nothing.kiq(payload)
    sent = count / (time.perf_counter() - began)
    last = await look.kiq()
    with worker(kind, place):
        began = await had(first)
        done = count / (await had(last) - began)
        await had(await look.kiq())
        began = time.perf_counter()
        for _ in range(TRIPS):
            await had(await look.kiq())
        trips = TRIPS / (time.perf_counter() - began)
    await broker.shutdown()
    return sent, done, trips


def measure(kind, count):
    with tempfile.TemporaryDirectory() as directory:
        if kind == "millstream":
            return asyncio.run(rates(kind, directory, count))
        with redis_server(directory) as port:
            return asyncio.run(rates(kind, port, count))


def main(count):
    figures = {"millstream": [], "redis": []}
    for _ in range(ROUNDS):
        for kind, rounds in figures.items():
            rounds.append(measure(kind, count))
            print(kind, *(f"{one:,.0f}" for one in rounds[-1]), file=sys.stderr)
    print(f"{'tasks a second':16}", *(f"{case:>12}" for case in CASES))
    medians = {}
    for kind, rounds in figures.items():
        medians[kind] = [statistics.median(one) for one in zip(*rounds, strict=True)]
        print(f"{kind:16}", *(f"{one:12,.0f}" for one in medians[kind]))
    both = zip(medians["millstream"], medians["redis"], strict=True)
    print(f"{'ours over redis':16}", *(f"{ours / theirs:11.2f}x" for ours, theirs in both))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3_000)
