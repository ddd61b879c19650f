"""How many tasks a second does Celery do over millstream, over Redis, over its file transport?

`python -m benchmarks.contrib_celery`, or with a number of tasks. It wants the package redis, and
Debian's redis-server, which it starts on a port of its own. No-op tasks with 100 bytes and their
results, one worker process (prefork, one child), all with default settings, in turn:

- sent: `delay` one at a time by one process, without a worker;
- done: that backlog by a worker, from the result of the first to the result of the last;
- round trips: `delay` and `get`, one after the other, with an idle worker;
- group: `group` of 1,000 sent, and all its results had.
"""

import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager

from celery import Celery, group

import millstream.contrib.celery  # noqa: F401, names the addresses

ROUNDS, TRIPS, GROUP = 3, 300, 1000
CASES = ("sent", "done", "round trips", "group")


def app_of(kind, place):
    """The application with its broker; `place` is a directory, or a port of Redis."""
    urls = {
        "millstream": (f"millstream://{place}/store",) * 2,
        "redis": (f"redis://127.0.0.1:{place}/0",) * 2,
        "filesystem": ("filesystem://", f"file://{place}/results"),
    }
    broker, results = urls[kind]
    app = Celery("bench", broker_url=broker, result_backend=results)
    app.conf.broker_connection_retry_on_startup = True
    if kind == "filesystem":
        for name in ("results", "queue", "control"):
            os.makedirs(f"{place}/{name}", exist_ok=True)
        app.conf.broker_transport_options = {
            "data_folder_in": f"{place}/queue",
            "data_folder_out": f"{place}/queue",
            "control_folder": f"{place}/control",
        }

    @app.task(name="nothing")
    def nothing(payload):
        pass

    return app


if "BENCH_KIND" in os.environ:
    app = app_of(os.environ["BENCH_KIND"], os.environ["BENCH_PLACE"])


@contextmanager
def redis_server(directory):
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", directory]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            while True:
                with closing(socket.socket()) as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield port
        finally:
            server.send_signal(signal.SIGTERM)


def rates(kind, place, count):
    """Tasks a second, as in `CASES`."""
    app = app_of(kind, place)
    nothing, payload = app.tasks["nothing"], "x" * 100
    first = nothing.delay(payload)
    began = time.perf_counter()
    for _ in range(count):
        nothing.delay(payload)
    sent = count / (time.perf_counter() - began)
    last = nothing.delay(payload)
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "ERROR"]
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.contrib_celery"]
    command += ["worker", "-c", "1", *quiet]
    environment = {**os.environ, "BENCH_KIND": kind, "BENCH_PLACE": str(place)}
    null = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=null, stderr=null) as worker:
        first.get(timeout=600)
        began = time.perf_counter()
        last.get(timeout=600)
        done = count / (time.perf_counter() - began)
        if kind == "filesystem":
            done = math.nan  # it has no order: the last may be done first
        began = time.perf_counter()
        trips = TRIPS if kind != "filesystem" else 5  # it looks once a second
        for _ in range(trips):
            nothing.delay(payload).get(timeout=600)
        trips /= time.perf_counter() - began
        began = time.perf_counter()
        group(nothing.s(payload) for _ in range(GROUP))().get(timeout=600)
        grouped = GROUP / (time.perf_counter() - began)
        worker.send_signal(signal.SIGTERM)
    app.close()
    return sent, done, trips, grouped


def measure(kind, count):
    with tempfile.TemporaryDirectory() as directory:
        if kind != "redis":
            return rates(kind, directory, count)
        with redis_server(directory) as port:
            return rates(kind, port, count)


def main(count):
    figures = {"millstream": [], "redis": [], "filesystem": []}
    for _ in range(ROUNDS):
        for kind, rounds in figures.items():
            less = (
                count if kind != "filesystem" else count // 10
            )  # it lists the directory each time
            rounds.append(measure(kind, less))
            print(kind, *(f"{one:,.0f}" for one in rounds[-1]), file=sys.stderr)
    print(f"{'tasks a second':16}", *(f"{case:>12}" for case in CASES))
    medians = {}
    for kind, rounds in figures.items():
        medians[kind] = [statistics.median(one) for one in zip(*rounds, strict=True)]
        print(f"{kind:16}", *(f"{one:12,.0f}" for one in medians[kind]))
    both = zip(medians["millstream"], medians["redis"], strict=True)
    print(f"{'ours over redis':16}", *(f"{ours / theirs:11.2f}x" for ours, theirs in both))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5_000)
