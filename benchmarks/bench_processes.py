"""What does it cost when several processes append to one partition?

Values of 100 bytes, durability "process". Four processes append together as many records as one
does alone, to a store of their own each round. The limit is ours with one process.
"""

from __future__ import annotations

import time

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
