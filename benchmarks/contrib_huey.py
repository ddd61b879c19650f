"""How many tasks a second does huey do over millstream, and over its SQLite storage?

`python -m benchmarks.contrib_huey`, or with a number of tasks. No-op tasks with 100 bytes, sent one
at a time by one process, then done by a consumer in another one (`-w 1 -k thread`), both storages
with default settings, in turn.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from huey import SqliteHuey

from millstream.contrib.huey import MillstreamHuey

ROUNDS = 3


def open_huey(kind, directory):
    if kind == "millstream":
        huey = MillstreamHuey("bench", path=f"{directory}/store")
    else:
        huey = SqliteHuey("bench", filename=f"{directory}/huey.db")

    @huey.task(name="nothing")
    def nothing(payload):
        pass

    @huey.task(name="look")
    def look():
        return time.monotonic()  # of the machine, so of both processes

    return huey, nothing, look


def consume(kind, directory):
    huey, *_ = open_huey(kind, directory)
    huey.create_consumer(workers=1, periodic=False).run()


def measure(kind, count):
    """Tasks a second that are sent, and that are done."""
    with tempfile.TemporaryDirectory() as directory:
        huey, nothing, look = open_huey(kind, directory)
        payload = os.urandom(50).hex()
        first = look()
        began = time.perf_counter()
        for _ in range(count):
            nothing(payload)
        sent = count / (time.perf_counter() - began)
        last = look()
        command = [sys.executable, "-m", "benchmarks.contrib_huey", kind, directory]
        with subprocess.Popen(command) as consumer:
            ended = last.get(blocking=True, timeout=600)
            done = count / (ended - first.get())
            consumer.send_signal(signal.SIGTERM)
        huey.storage.close()
    return sent, done


def main(count):
    figures = {"millstream": [], "sqlite": []}
    for _ in range(ROUNDS):
        for kind, rounds in figures.items():
            rounds.append(measure(kind, count))
    medians = {}
    for kind, rounds in figures.items():
        medians[kind] = [statistics.median(one) for one in zip(*rounds, strict=True)]
        print(f"{kind:10} sent {medians[kind][0]:8,.0f}/s, done {medians[kind][1]:8,.0f}/s")
    ratios = [a / b for a, b in zip(*medians.values(), strict=True)]
    print(f"{'ratio':10} sent {ratios[0]:8.1f}x , done {ratios[1]:8.1f}x")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        consume(*sys.argv[1:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5_000)
