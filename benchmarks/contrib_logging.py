"""How many records a second do processes log into a stream, and into a file that they share?

`python -m benchmarks.contrib_logging`, or with a number of records. Messages of 100 bytes, one
process and four at once, each until all is flushed, in turn: our handler; `logging.FileHandler`,
which has no rotation that processes may share; and `ConcurrentRotatingFileHandler` of the package
concurrent-log-handler, which has, by a lock.
"""

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS, PROCESSES = 3, 4
KINDS = ("millstream", "file", "concurrent-log-handler")
CASES = ("1 process", f"{PROCESSES} processes")


def log(kind, directory, count):
    """In a process: prints how long it took, and what was dropped."""
    if kind == "millstream":
        from millstream.contrib.logging import StreamHandler

        handler = StreamHandler(f"{directory}/store", "logs")
    elif kind == "file":
        handler = logging.FileHandler(f"{directory}/log")
    else:
        from concurrent_log_handler import ConcurrentRotatingFileHandler

        handler = ConcurrentRotatingFileHandler(f"{directory}/log", maxBytes=1 << 30)
    if kind != "millstream":
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("bench")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    text = "x" * 100
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    for number in range(count):
        logger.info(text)
        if kind == "millstream" and number % 5_000 == 4_999:
            handler.flush()  # so that nothing is dropped: it never waits by itself
    handler.flush()
    print(time.perf_counter() - began, getattr(handler, "dropped", 0), flush=True)


def measure(kind, processes, count):
    """Records a second."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.contrib_logging", "log", kind, directory]
        pipe = subprocess.PIPE
        running = [
            subprocess.Popen(
                [*command, str(count // processes)], stdin=pipe, stdout=pipe, text=True
            )
            for _ in range(processes)
        ]
        for one in running:
            one.stdout.readline()
        began = time.perf_counter()
        for one in running:
            one.stdin.write("\n")
            one.stdin.flush()
        said = [one.stdout.readline().split() for one in running]
        seconds = time.perf_counter() - began
        for one in running:
            one.communicate()
        assert not any(int(dropped) for _, dropped in said), said
        return count // processes * processes / seconds


def main(count):
    figures = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS):
        for kind, rounds in figures.items():
            rounds.append([measure(kind, processes, count) for processes in (1, PROCESSES)])
            print(kind, *(f"{one:,.0f}" for one in rounds[-1]), file=sys.stderr)
    print(f"{'records a second':24}", *(f"{case:>12}" for case in CASES))
    for kind, rounds in figures.items():
        medians = [statistics.median(one) for one in zip(*rounds, strict=True)]
        print(f"{kind:24}", *(f"{one:12,.0f}" for one in medians))


if __name__ == "__main__":
    if sys.argv[1:2] == ["log"]:
        log(*sys.argv[2:4], int(sys.argv[4]))
        os._exit(0)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
