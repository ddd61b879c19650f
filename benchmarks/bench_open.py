"""How long does opening a store take?

A store that was closed cleanly, its one partition of 1,000 segments; a new process each time. What
is measured: `open()`, `stream()` and asking for the next offset, so that the partition is open.
"""

from __future__ import annotations

from time import perf_counter

import millstream
from benchmarks import harness
from benchmarks.harness import Bench

SEGMENT_BYTES = 64 << 10


def write_segments(path: str, segments: int) -> int:
    """Make a log of so many segments; return how many there are."""
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=SEGMENT_BYTES)
        values = harness.values(500)  # one such batch a segment
        for _ in range(segments):
            stream.append_many(values)
        return stream.stats().partitions[0].segments


def open_store(path: str) -> float:
    """Seconds until the partition can be used."""
    began = perf_counter()
    store = millstream.open(path)
    store.stream("s").next_offset(0)
    taken = perf_counter() - began
    store.close()
    return taken


def test_opening(bench: Bench) -> None:
    with bench.fresh() as path:
        segments = bench.run(write_segments, path=path, segments=bench.scale.segments)
        rounds = bench.scale.rounds + 2
        measured = bench.in_turn(lambda: bench.run(open_store, path=path), None, rounds)
    work = f"open a cleanly closed store of {segments:,} segments"
    bench.row(work, measured, unit="ms", most=20e-3)
