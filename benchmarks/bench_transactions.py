"""What does a transaction cost over doing the same without one?

A hundred records of 100 bytes in, as many out, and the position committed. The first row is the
difference, durability "process"; the others count fdatasync calls a commit, durability "sync".
"""

from __future__ import annotations

import os
import statistics
import threading
from time import perf_counter

import millstream
from benchmarks import harness
from benchmarks.harness import Bench

RECORDS, THREADS = 100, 16


def with_and_without(path: str, turns: int) -> list[float]:
    """Median seconds of a transaction, and of the same without one."""
    store = millstream.open(path, durability="process")
    source, sink = store.stream("in"), store.stream("out")
    values = harness.values(RECORDS)
    for _ in range(turns):
        source.append_many(values)
    taken: dict[str, list[float]] = {}
    for delivery in ("at_least_once", "exactly_once"):
        consumer = source.consumer(
            delivery,
            delivery=delivery,
            timeout=0,
            max_records=RECORDS,
        )
        seconds = taken[delivery] = []
        for batch in consumer:
            results = list(batch.values)
            began = perf_counter()
            if delivery == "exactly_once":
                with store.transaction() as tx:
                    tx.append_many(sink, results)
                    tx.commit(consumer)
            else:
                sink.append_many(results)
                consumer.commit()
            seconds.append(perf_counter() - began)
        consumer.close()
    store.close()
    return [statistics.median(taken[name]) for name in ("exactly_once", "at_least_once")]


def syncs(path: str, threads: int, turns: int) -> float:
    """Calls of fdatasync a commit, of so many threads at once."""
    store = millstream.open(path, durability="sync")
    sink = store.stream("out")
    with store.transaction() as tx:  # the journal is there
        tx.append(sink, b"first")
    counted = []
    real = os.fdatasync

    def sync(descriptor: int) -> None:
        counted.append(1)
        real(descriptor)

    def work() -> None:
        for _ in range(turns):
            with store.transaction() as tx:
                tx.append_many(sink, [b"x" * 100] * RECORDS)

    os.fdatasync = sync
    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    os.fdatasync = real
    store.close()
    return len(counted) / (threads * turns)


def pairs(bench: Bench) -> list[list[float]]:
    """Rounds of [with, without]."""
    turns = max(20, bench.scale.singles // 100)

    def make() -> list[list[float]]:
        return [bench.run_fresh(with_and_without, turns=turns) for _ in range(bench.scale.rounds)]

    return bench.once("transactions", make)


def test_whole(bench: Bench) -> None:
    with_one, without = zip(*pairs(bench), strict=True)
    measured = list(with_one), list(without)
    bench.row("100 in, 100 out, position", measured, unit="µs", limit_is="without a transaction")


def test_over_plain(bench: Bench) -> None:
    more = [with_one - without for with_one, without in pairs(bench)]
    bench.row("100 in, 100 out, position: more than without", (more, []), unit="µs", most=20e-6)


def test_syncs_alone(bench: Bench) -> None:
    turns = max(5, bench.scale.wakes // 50)
    found = [bench.run_fresh(syncs, threads=1, turns=turns) for _ in range(bench.scale.rounds)]
    bench.row("fdatasync calls a commit at `sync`", (found, []), unit="calls", most=2)


def test_syncs_together(bench: Bench) -> None:
    turns = max(5, bench.scale.wakes // 200)
    found = [
        bench.run_fresh(syncs, threads=THREADS, turns=turns) for _ in range(bench.scale.rounds)
    ]
    bench.row("the same, 16 threads at once", (found, []), unit="calls", most=1)
