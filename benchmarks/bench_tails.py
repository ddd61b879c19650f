"""How long does the slowest call of a thousand take?

Every call is timed by itself, one process, durability "process" unless said; the share of the clock
that is in each, about 50 ns, is not taken off. The limit is the same loop around an empty function.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import millstream
from benchmarks import harness
from benchmarks.harness import Bench

SHARES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999, "largest": 1.0}


def timed(call: Callable[[bytes], object], count: int) -> list[float]:
    """Seconds of one call, at each of SHARES."""
    values = harness.values(harness.BATCH)
    for value in values:
        call(value)
    taken = []
    for at in range(count):
        value = values[at % len(values)]
        began = perf_counter_ns()
        call(value)
        taken.append(perf_counter_ns() - began)
    taken.sort()
    return [taken[min(count - 1, int(count * share))] / 1e9 for share in SHARES.values()]


def stream_of(path: str, durability: Any) -> millstream.Stream:
    """A stream of a new store."""
    return millstream.open(path).stream("s", durability=durability)


def append(path: str, count: int, durability: str) -> list[float]:
    """Of appends."""
    return timed(stream_of(path, durability).append, count)


def message(path: str, count: int) -> list[float]:
    """Of a put, a get and an acknowledgement."""
    queue = millstream.open(path, durability="process").queue("q")

    def call(value: bytes) -> None:
        queue.put(value)
        queue.get().ack()

    return timed(call, count)


def nothing(path: str, count: int) -> list[float]:
    """Of a call of Python that does nothing."""
    return timed(lambda value: None, count)


def tails(bench: Bench, name: str, count: int, function: Any, **arguments: Any) -> None:
    """A row a share."""
    rounds = [
        (bench.run_fresh(function, count=count, **arguments),
         bench.run_fresh(nothing, count=count))
        for _ in range(bench.scale.rounds)
    ]  # fmt: skip
    for index, share in enumerate(SHARES):
        measured = ([ours[index] for ours, _ in rounds], [none[index] for _, none in rounds])
        bench.row(f"{name}, {share}", measured, unit="µs", limit_is="an empty function",
                  series=name, at=index)  # fmt: skip


def test_append(bench: Bench) -> None:
    tails(bench, "append", bench.scale.singles // 4, append, durability="process")


def test_append_at_interval(bench: Bench) -> None:
    tails(bench, "append, level interval", bench.scale.singles // 4, append, durability="interval")


def test_message(bench: Bench) -> None:
    tails(bench, "put, get and ack", bench.scale.singles // 8, message)


def test_append_synced(bench: Bench) -> None:
    tails(bench, "append, level sync", bench.scale.syncs, append, durability="sync")
