"""What does it cost when several processes append to one partition?

Values of 100 bytes, durability "process". Four processes append together as many records as one
does alone, to a store of their own each round. The limit is ours with one process. How often two
fault, sleep and ask the kernel for a futex (where strace is installed) is counted, no target.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import millstream
from benchmarks import harness, worker
from benchmarks.harness import Bench

PROCESSES = 4


def append_share(path: str, count: int, batch: int) -> list[float]:
    """Append, and return when it began and ended."""
    stream = millstream.open(path, durability="process").stream("s")
    values = harness.values(harness.BATCH)
    parts = [values[at : at + batch] for at in range(0, len(values), batch)]
    stream.append_many(values)
    turns = max(1, count // len(values))
    worker.ready()
    began = time.monotonic()
    for _ in range(turns):
        if batch == 1:
            for value in values:
                stream.append(value)
        else:
            for part in parts:
                stream.append_many(part)
    return [began, time.monotonic(), turns * len(values)]


def append_by(bench: Bench, processes: int, batch: int) -> float:
    """Seconds a record of so many processes together."""
    with bench.fresh() as path:
        share = bench.scale.shared * (1 if batch == 1 else 4) // processes
        arguments = {"path": path, "count": share, "batch": batch}
        members = [bench.start(append_share, **arguments) for _ in range(processes)]
        try:
            for member in members:
                member.wait_ready()
            for member in members:
                member.go()
            found = [member.result() for member in members]
        finally:
            for member in members:
                member.kill()
    began, ended = min(one[0] for one in found), max(one[1] for one in found)
    seconds: float = (ended - began) / sum(one[2] for one in found)
    return seconds


def together(bench: Bench, work: str, batch: int, ratio: float) -> None:
    """One row."""
    measured = bench.in_turn(
        lambda: append_by(bench, PROCESSES, batch), lambda: append_by(bench, 1, batch)
    )
    bench.row(work, measured, unit="M/s", limit_is="ours with one process", ratio=ratio)


def test_by_100(bench: Bench) -> None:
    together(bench, "four processes on one partition, by 100", 100, 1.0)


def test_one_at_a_time(bench: Bench) -> None:
    together(bench, "four processes on one partition, one at a time", 1, 0.8)


def append_counted(path: str, count: int) -> list[float]:
    """Append one at a time: pages faulted and sleeps, of one append."""
    stream = millstream.open(path, durability="process").stream("s")
    return counted(stream.append, count)


def put_counted(path: str, count: int) -> list[float]:
    """Put and take one at a time: pages faulted and sleeps, of both."""
    queue = millstream.open(path, durability="process").queue("q", capacity=1 << 16)

    def call(value: bytes) -> None:
        queue.put(value)
        queue.get().ack()

    return counted(call, count)


def counted(call: Callable[[bytes], object], count: int) -> list[float]:
    """Minor faults and voluntary switches of a call."""
    values = harness.values(harness.BATCH)
    for value in values:
        call(value)
    worker.ready()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for at in range(count):
        call(values[at % len(values)])
    after = resource.getrusage(resource.RUSAGE_SELF)
    faults, sleeps = after.ru_minflt - before.ru_minflt, after.ru_nvcsw - before.ru_nvcsw
    return [faults / count, sleeps / count]


def contend(bench: Bench, function: Any, count: int) -> list[list[float]]:
    """Two processes at once, and the futex calls of each while strace looked."""
    with bench.fresh() as path:
        millstream.open(path).close()
        members = [bench.start(function, path=path, count=count) for _ in range(2)]
        strace = None
        try:
            for member in members:
                member.wait_ready()
            if shutil.which("strace"):
                report = f"{path}.strace"
                command = ["strace", "-f", "-c", "-e", "trace=futex", "-o", report]
                strace = subprocess.Popen(
                    [*command, *(f"-p{member.pid}" for member in members)],
                    stderr=subprocess.PIPE, text=True,
                )  # fmt: skip
                assert strace.stderr is not None
                for _ in members:
                    strace.stderr.readline()  # attached
            for member in members:
                member.go()
            found = [member.result() for member in members]
        finally:
            for member in members:
                member.kill()
            if strace is not None:
                strace.communicate()
    columns = [[one[0] for one in found], [one[1] for one in found]]
    if strace is not None:
        calls = re.search(r"(\d+)\s+(?:\d+\s+)?futex$", Path(report).read_text(), re.MULTILINE)
        columns.append([int(calls[1]) / (count * len(members)) if calls else 0.0])
        Path(report).unlink()
    return columns


def counts(bench: Bench, name: str, function: Any) -> None:
    """A row each of faults, sleeps and futex calls."""
    kinds = ("minor faults", "sleeps", "futex calls, under strace")
    for kind, values in zip(kinds, contend(bench, function, bench.scale.shared // 8), strict=False):
        bench.row(f"{name}, two processes: {kind}", (values, []), unit="per 1,000")


def test_counts_of_appends(bench: Bench) -> None:
    counts(bench, "append one at a time", append_counted)


def test_counts_of_messages(bench: Bench) -> None:
    counts(bench, "put, get and ack", put_counted)
