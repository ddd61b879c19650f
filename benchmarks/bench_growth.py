"""What gets slower when there is more of it?

Each series does the same work at several sizes: bytes of a log, partitions of a stream, messages
that stand in a queue, bytes of a value. Durability "process", values of 100 bytes unless said.
"""

from __future__ import annotations

import itertools
from time import perf_counter
from typing import Any

import millstream
from benchmarks import bench_queue, harness
from benchmarks.bench_append import append_singly, open_stream
from benchmarks.harness import VALUE_BYTES, Bench

GIB = 1 << 30


def sizes(bench: Bench, *full: int) -> tuple[int, ...]:
    """Those of a series: a tenth of the largest ones where it has to be quick."""
    if bench.scale is harness.TINY:
        return full[:1]
    return full if bench.scale is harness.FULL else full[:-1]


def append_all(path: str, marks: list[int]) -> list[float]:
    """Seconds a record of lists of 1,000, from the first to where the log has so many bytes."""
    append, values = open_stream(path).append_many, harness.values(harness.BATCH)
    taken: list[float] = []
    done = 0
    began = perf_counter()
    for size in marks:
        turns = max(1, size // (VALUE_BYTES * len(values)))
        for _ in range(turns - done):
            append(values)
        done = turns
        taken.append((perf_counter() - began) / (turns * len(values)))
    return taken


def append_keyed(path: str, partitions: int, count: int) -> float:
    """Seconds a record appended singly, with keys that go to all partitions."""
    stream = millstream.open(path, durability="process").stream("s", partitions=partitions)
    keys = [b"%d" % key for key in range(max(1_000, 4 * partitions))]
    for key in keys:
        stream.append(b"x" * VALUE_BYTES, key=key)
    turns = itertools.islice(itertools.cycle(keys), count)
    append, value = stream.append, b"x" * VALUE_BYTES
    began = perf_counter()
    for key in turns:
        append(value, key=key)
    return (perf_counter() - began) / count


def append_sized(path: str, size: int, total: int) -> float:
    """Seconds a byte of values of so many bytes, appended singly."""
    append, value = open_stream(path).append, b"x" * size
    turns = max(1_000, total // max(size, VALUE_BYTES))
    for _ in range(min(turns, 1_000)):
        append(value)
    began = perf_counter()
    for _ in range(turns):
        append(value)
    return (perf_counter() - began) / (turns * size)


def series(bench: Bench, name: str, at: int, unit: str, function: Any, **arguments: Any) -> None:
    """One point of a series."""
    ours = [bench.run_fresh(function, **arguments) for _ in range(bench.scale.rounds)]
    bench.row(f"{name}: {at:,}", (ours, []), unit=unit, series=name, at=at)


def test_log(bench: Bench) -> None:
    gib = sizes(bench, 1, 2, 5, 10)
    unit = GIB if bench.scale is not harness.TINY else bench.scale.append_bytes
    marks = [size * unit for size in gib]
    rounds = [bench.run_fresh(append_all, marks=marks) for _ in range(min(2, bench.scale.rounds))]
    name = "lists of 1,000, GiB of the log"
    for index, size in enumerate(gib):
        ours = [taken[index] for taken in rounds]
        bench.row(f"{name}: {size}", (ours, []), unit="M/s", series=name, at=size)


def test_partitions(bench: Bench) -> None:
    count = bench.scale.singles // 8
    for partitions in sizes(bench, 1, 10, 100, 1_000):
        series(bench, "append one with a key, partitions", partitions, "ns", append_keyed,
               partitions=partitions, count=count)  # fmt: skip


def test_standing(bench: Bench) -> None:
    count = bench.scale.singles // 8
    for standing in sizes(bench, 1_000, 10_000, 100_000, 1_000_000):
        series(bench, "put, get and ack, ready messages standing", standing, "ns", stand,
               count=count, standing=standing)  # fmt: skip


def stand(path: str, count: int, standing: int) -> float:
    """Seconds for a put, a get and an acknowledgement, the queue having so many ready ones."""
    store = millstream.open(path, durability="process")
    queue = store.queue("q", capacity=standing + 1_000)
    for _ in range(standing // 1_000):
        queue.put_many(harness.values(1_000))
    bench_queue.one_at_a_time(queue, max(1_000, count // 10))
    return bench_queue.one_at_a_time(queue, count)


def test_value(bench: Bench) -> None:
    total = bench.scale.append_bytes // 4
    for size in sizes(bench, 16, 100, 1_024, 4_096, 16_384):
        series(bench, "append one, bytes of the value", size, "GB/s", append_sized,
               size=size, total=total)  # fmt: skip


def test_short_log(bench: Bench) -> None:
    """How long the segments of a new stream take to be as quick as those of a grown one."""
    for count in sizes(bench, 1_000, 10_000, 100_000, 1_000_000):
        series(bench, "append one, records of the log", count, "ns", append_singly,
               count=count, keyed=False)  # fmt: skip
