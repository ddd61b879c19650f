"""How fast are appends that survive a power cut when they return?

Durability "sync", values of 100 bytes, one partition. The limit is a C loop of pwrite and fdatasync
of the same bytes into an allocated file.
"""

from __future__ import annotations

import threading
from time import perf_counter

import millstream
from benchmarks import harness
from benchmarks.harness import BATCH_BYTES, SINGLE_BYTES, Bench

CALLERS = 64


def append_synced(path: str, calls: int, batch: int) -> float:
    """Seconds a call of one caller."""
    stream = millstream.open(path).stream("s", durability="sync")
    values = harness.values(harness.BATCH)
    stream.append(values[0])
    if batch > 1:
        stream.append_many(values[:batch])
        began = perf_counter()
        for _ in range(calls):
            stream.append_many(values[:batch])
    else:
        began = perf_counter()
        for call in range(calls):
            stream.append(values[call % len(values)])
    return (perf_counter() - began) / calls


def append_together(path: str, calls: int, callers: int) -> float:
    """Seconds a call of all callers, threads of one process."""
    stream = millstream.open(path).stream("s", durability="sync")
    values = harness.values(harness.BATCH)
    stream.append(values[0])
    start = threading.Barrier(callers + 1)
    each = max(1, calls // callers)

    def caller() -> None:
        start.wait()
        for call in range(each):
            stream.append(values[call % len(values)])

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    start.wait()
    began = perf_counter()
    for thread in threads:
        thread.join()
    return (perf_counter() - began) / (each * callers)


def loop(bench: Bench, work: str, batch: int, size: int, ratio: float) -> None:
    """One row of one caller."""
    calls = bench.scale.syncs if batch == 1 else max(5, bench.scale.syncs // 3)
    measured = bench.in_turn(
        lambda: bench.run_fresh(append_synced, calls=calls, batch=batch),
        lambda: bench.limit("sync", bench.directory, size, calls),
    )
    limit_is = f"C: pwrite of {size:,} bytes and fdatasync"
    bench.row(work, measured, unit="µs", limit_is=limit_is, ratio=ratio, note="a call")


def test_one_caller(bench: Bench) -> None:
    loop(bench, "sync append, one caller", 1, SINGLE_BYTES, 0.8)


def test_64_callers(bench: Bench) -> None:
    calls = bench.scale.syncs
    many = max(calls * 10, CALLERS)
    measured = bench.in_turn(
        lambda: bench.run_fresh(append_together, calls=many, callers=CALLERS),
        lambda: bench.run_fresh(append_synced, calls=calls, batch=1),
    )
    work = f"sync append, {CALLERS} callers (threads)"
    bench.row(work, measured, unit="k/s", limit_is="ours with one caller", ratio=10)


def test_by_1000(bench: Bench) -> None:
    loop(bench, "sync append_many of 1,000, one caller", 1_000, BATCH_BYTES, 0.9)
