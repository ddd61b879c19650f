"""How fast is the last record of each key kept, and looked up?

Records of 100 bytes under one key in ten of 8 bytes, at random, appended by 1,000. Compaction is
`Stream.compact` of the whole log, synced before; a view is loaded from the log, and from its
snapshot; keys are looked up at random.
"""

from __future__ import annotations

import random
from time import perf_counter

import millstream
from benchmarks import harness
from benchmarks.harness import Bench

RECORDS = {"full": 10_000_000, "quick": 1_000_000, "tiny": 20_000}
LOOKUPS = 200_000


def append_records(path: str, records: int, keys: int) -> None:
    """Write the log that is compacted."""
    dice = random.Random(1)
    names = [b"%08d" % number for number in range(keys)]
    values = harness.values(harness.BATCH)
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s", segment_bytes=min(128 << 20, 20 * records))
        for _ in range(records // harness.BATCH):
            stream.append_many(values, keys=dice.choices(names, k=harness.BATCH))
        stream.flush()


def compact(path: str) -> float:
    """Seconds a record that is in the segments which are compacted."""
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s")
        began = perf_counter()
        result = stream.compact()
        taken = perf_counter() - began
        left = stream.stats().records
    return taken / (left + result.records_removed)


def append_keys(path: str, keys: int) -> None:
    """Write one record a key."""
    values = harness.values(harness.BATCH)
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s")
        for first in range(0, keys, harness.BATCH):
            names = [b"%08d" % number for number in range(first, first + harness.BATCH)]
            stream.append_many(values, keys=names)


def load_view(path: str, keys: int) -> tuple[float, float, float]:
    """Seconds to load a view, to load it from its snapshot, and to look a key up."""
    with millstream.open(path) as store:
        stream = store.stream("s")
        began = perf_counter()
        view = stream.view()
        loaded = perf_counter() - began
        assert len(view) == keys
        view.close()
        began = perf_counter()
        with stream.view() as view:
            again = perf_counter() - began
            names = [b"%08d" % random.randrange(keys) for _ in range(LOOKUPS)]
            began = perf_counter()
            for name in names:
                view[name]
            looked = perf_counter() - began
    return loaded, again, looked / LOOKUPS


def test_compaction(bench: Bench) -> None:
    records = RECORDS[bench.scale.name]
    measured = []
    for _ in range(min(3, bench.scale.rounds)):
        with bench.fresh() as path:
            bench.run(append_records, path=path, records=records, keys=records // 10)
            measured.append(bench.run(compact, path=path))
    work = f"compact {records:,} records of {records // 10:,} keys"
    bench.row(work, (measured, []), unit="M/s", most=1 / 3e6, note="32 bytes a key")


def views(bench: Bench) -> list[tuple[float, float, float]]:
    """Measure what a view does, once for the three rows."""
    keys = RECORDS[bench.scale.name] // 10

    def measure() -> list[tuple[float, float, float]]:
        with bench.fresh() as path:
            bench.run(append_keys, path=path, keys=keys)
            rounds = range(bench.scale.rounds)
            return [bench.run(load_view, path=path, keys=keys) for _ in rounds]

    return bench.once("views", measure)


def add_row(bench: Bench, which: int, work: str, *, unit: str, most: float) -> None:
    """Add one of the first two rows."""
    measured = [one[which] for one in views(bench)]
    bench.row(work, (measured, []), unit=unit, most=most)


def test_view_load(bench: Bench) -> None:
    keys = RECORDS[bench.scale.name] // 10
    add_row(bench, 0, f"load a view of {keys:,} keys", unit="ms", most=2.0)


def test_view_load_from_snapshot(bench: Bench) -> None:
    keys = RECORDS[bench.scale.name] // 10
    add_row(bench, 1, f"load it from its snapshot, {keys:,} keys", unit="ms", most=2.0)


def test_view_lookup(bench: Bench) -> None:
    keys = RECORDS[bench.scale.name] // 10
    limits = [bench.limit("lookup", keys, LOOKUPS) for _ in range(bench.scale.rounds)]
    measured = [one[2] for one in views(bench)], [limit for limit in limits if limit is not None]
    work = f"look a key up, of {keys:,}, at random"
    limit_is = "C: a hash table that waits for memory twice"
    bench.row(work, measured, unit="ns", limit_is=limit_is, most=300e-9)
