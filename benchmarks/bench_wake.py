"""How soon does a waiting reader in another process have a record, and does it sleep until then?

A process appends a stamp every 0.5 ms; the other iterates over `read(follow=True)`. The limit is
limit.c doing the same with a bare futex.
"""

from __future__ import annotations

import struct
import time
from typing import Any

import millstream
from benchmarks import harness, worker
from benchmarks.harness import WAKE_INTERVAL, Bench

WARM = 50
STAMP = struct.Struct("<d")


def wait_for_stamps(path: str, count: int) -> list[float]:
    """Seconds from each stamp until the reader has it, the median and the 99th percentile."""
    stream = millstream.open(path, durability="process").stream("s")
    taken = []
    batches = stream.read(partition=0, follow=True, timeout=30, max_records=count + WARM)
    worker.ready()
    for batch in batches:
        now = time.monotonic()
        taken += [now - STAMP.unpack_from(value or b"")[0] for value in batch.values]
    taken = sorted(taken[WARM:])
    return [taken[len(taken) // 2], taken[len(taken) * 99 // 100]]


def append_stamps(path: str, count: int) -> None:
    """Append what the reader waits for."""
    stream = millstream.open(path, durability="process").stream("s")
    stamp = bytearray(harness.VALUE_BYTES)
    worker.ready()
    time.sleep(0.1)
    for _ in range(count + WARM):
        time.sleep(WAKE_INTERVAL)
        STAMP.pack_into(stamp, 0, time.monotonic())
        stream.append(bytes(stamp))


def wait_idle(path: str, seconds: float) -> float:
    """How often a second a reader that nothing comes for wakes up."""
    stream = millstream.open(path, durability="process").stream("s")
    before, began = switches(), time.monotonic()
    for _ in stream.read(follow=True, timeout=seconds):
        pass
    return (switches() - before) / (time.monotonic() - began)


def switches() -> int:
    """How often this thread has gone to sleep."""
    with open("/proc/thread-self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))


def exchange(bench: Bench) -> dict[str, list[list[float]]]:
    """Rounds of [p50, p99], ours and the limit's."""

    def make() -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {"ours": [], "limit": []}
        count = bench.scale.wakes
        for _ in range(bench.scale.rounds):
            found["ours"].append(exchange_once(bench, count))
            limit = bench.limits("futex", count, round(WAKE_INTERVAL * 1e6))
            if limit:
                found["limit"].append(limit)
        return found

    return bench.once("exchange", make)


def exchange_once(bench: Bench, count: int) -> Any:
    """One round of two processes."""
    with bench.fresh() as path:
        members = []
        try:
            for function in (append_stamps, wait_for_stamps):
                member = bench.start(function, path=path, count=count)
                members.append(member)
                member.wait_ready()
            for member in reversed(members):
                member.go()
            members[0].result()
            return members[1].result()
        finally:
            for member in members:
                member.kill()


def percentile(bench: Bench, work: str, index: int) -> None:
    """One row of the exchange."""
    found = exchange(bench)
    measured = tuple([one[index] for one in found[whose]] for whose in ("ours", "limit"))
    limit_is = "C: a futex and a stamp"
    bench.row(work, measured, unit="µs", limit_is=limit_is, ratio=0.5)  # type: ignore[arg-type]


def test_p50(bench: Bench) -> None:
    percentile(bench, "append to waiting reader, two processes, p50", 0)


def test_p99(bench: Bench) -> None:
    percentile(bench, "append to waiting reader, two processes, p99", 1)


def test_idle(bench: Bench) -> None:
    seconds = 0.1 if bench.scale is harness.TINY else 3.0
    ours = [bench.run_fresh(wait_idle, seconds=seconds)]
    work = "wake-ups of a waiting reader for which nothing comes"
    bench.row(work, (ours, []), unit="a second", most=2.0, note="no polling")
