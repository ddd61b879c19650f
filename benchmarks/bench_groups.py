"""What does a consumer group cost over plain reading?

Eight partitions, batches of 1,000 values of 100 bytes, durability "process"; every value is looked
at. The limit of the group is plain `read` doing the same, in the same process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import perf_counter

import millstream
from benchmarks import harness
from benchmarks.harness import Bench

PARTITIONS, MEMBERS = 8, 4
COMMITS = 100_000


def look_at(batches: Iterable[millstream.Batch]) -> int:
    """Iterate over the values; how many there were."""
    count = 0
    for batch in batches:
        for _ in batch.values:
            count += 1
    return count


def in_turn(consumers: list[millstream.Consumer]) -> Iterator[millstream.Batch]:
    """Batches of all, one of each after the other, until there are none."""
    running = [iter(consumer) for consumer in consumers]
    while running:
        for one in list(running):
            batch = next(one, None)
            if batch is None:
                running.remove(one)
            else:
                yield batch


def read_as_group_and_plain(path: str, records: int, passes: int) -> list[list[float]]:
    """Seconds a record of a group of four, and of plain `read`, in turn."""
    store = millstream.open(path, durability="process")
    stream = store.stream("s", partitions=PARTITIONS)
    values = harness.values(harness.BATCH)
    for turn in range(max(PARTITIONS, records // len(values))):
        stream.append_many(values, partition=turn % PARTITIONS)
    count = look_at(stream.read())  # checked from now on
    ours, limit = [], []
    for turn in range(passes):
        began = perf_counter()
        look_at(stream.read())
        limit.append((perf_counter() - began) / count)
        group = f"g{turn}"
        consumers = [stream.consumer(group, timeout=0, auto_commit=True) for _ in range(MEMBERS)]
        began = perf_counter()
        found = look_at(in_turn(consumers))
        ours.append((perf_counter() - began) / count)
        if found != count or stream.group(group).lag():
            raise SystemExit(f"{found} of {count} records, lag {stream.group(group).lag()}")
        for consumer in consumers:
            consumer.close()
    store.close()
    return [ours, limit]


def commit(path: str, passes: int) -> list[float]:
    """Seconds for a commit of what was handed out."""
    store = millstream.open(path, durability="process")
    stream = store.stream("s")
    stream.append_many([b"v"] * COMMITS)
    taken = []
    for turn in range(passes):
        with stream.consumer(f"g{turn}", max_records=1) as consumer:
            handed_out = [consumer.poll() for _ in range(min(COMMITS, 10_000))]
            began = perf_counter()
            for batch in handed_out:
                consumer.commit(batch)
            taken.append((perf_counter() - began) / len(handed_out))
    store.close()
    return taken


def test_group_of_four(bench: Bench) -> None:
    with bench.fresh() as path:
        records = bench.scale.shared * 4
        found = bench.run(read_as_group_and_plain, path=path, records=records, passes=5)
    work = "a group of 4 over 8 partitions, values as bytes"
    bench.row(work, (found[0], found[1]), unit="M/s", limit_is="plain read", ratio=0.9)


def test_commit(bench: Bench) -> None:
    with bench.fresh() as path:
        found = bench.run(commit, path=path, passes=5)
    bench.row("commit of a position", (found, []), unit="µs", most=2e-6)
