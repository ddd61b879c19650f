"""How fast do messages go through a queue, in one process and between processes?

Payloads of 100 bytes, durability "process". The targets are times, those of a native rival without
leases or persistence among them; the wake-up's limit is limit.c doing the same with a bare futex.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import millstream
from benchmarks import harness, worker
from benchmarks.bench_wake import STAMP, WARM
from benchmarks.harness import WAKE_INTERVAL, Bench

STANDING = 100_000
BATCH = 100


def queue_of(path: str) -> Any:
    """The queue that all rows use."""
    capacity = 2 * STANDING
    return millstream.open(path, durability="process").queue("q", capacity=capacity)


def make_queue(path: str) -> None:
    """For processes that open it together: nothing of it stays open here."""
    with millstream.open(path, durability="process") as store:
        store.queue("q", capacity=2 * STANDING)


def one_at_a_time(queue: Any, count: int) -> float:
    """Seconds for a put, a get and an acknowledgement."""
    put, get = queue.put, queue.get
    payloads = harness.values(1_000)
    began = time.perf_counter()
    for _ in range(max(1, count // len(payloads))):
        for payload in payloads:
            put(payload)
            get().ack()
    return (time.perf_counter() - began) / (max(1, count // len(payloads)) * len(payloads))


def by_the_batch(queue: Any, count: int) -> float:
    """Seconds a message, a hundred at a time."""
    payloads = harness.values(BATCH)
    turns = max(1, count // BATCH)
    began = time.perf_counter()
    for _ in range(turns):
        queue.put_many(payloads)
        queue.ack_many(queue.get_many(BATCH))
    return (time.perf_counter() - began) / (turns * BATCH)


WORK: dict[str, Callable[[Any, int], float]] = {"one": one_at_a_time, "many": by_the_batch}


def alone(path: str, work: str, count: int, standing: int) -> float:
    """Seconds a message in one process, with so many delayed ones standing."""
    queue = queue_of(path)
    for at in range(0, standing, 1_000):
        queue.put_many([millstream.Put(b"later", delay=86_400.0)] * min(1_000, standing - at))
    WORK[work](queue, max(1_000, count // 10))
    return WORK[work](queue, count)


def produce(path: str, count: int, batch: int) -> list[float]:
    """Put; when it began and ended."""
    queue = queue_of(path)
    payloads = harness.values(batch)
    worker.ready()
    began = time.monotonic()
    left = count
    while left > 0:
        if batch == 1:
            queue.put(payloads[0])
            left -= 1
        else:
            left -= len(queue.put_many(payloads[:left], timeout=10))
    return [began, time.monotonic()]


def consume(path: str, total: int, batch: int) -> list[float]:
    """Take until all are finished; when it began and ended, and how many it had."""
    queue = queue_of(path)
    worker.ready()
    began = ended = time.monotonic()
    taken = 0
    while True:
        if batch == 1:
            try:
                queue.get(timeout=0.3).ack()
            except millstream.Empty:
                break
            taken += 1
        else:
            messages = queue.get_many(batch, timeout=0.3)
            if not messages:
                break
            queue.ack_many(messages)
            taken += len(messages)
        ended = time.monotonic()
    return [began, ended, taken]


def between(bench: Bench, pairs: int, batch: int) -> float:
    """Seconds a message from so many producers to as many consumers."""
    total = bench.scale.shared * (1 if batch == 1 else 4)
    with bench.fresh() as path:
        make_queue(path)
        makers = [
            bench.start(produce, path=path, count=total // pairs, batch=batch) for _ in range(pairs)
        ]
        takers = [bench.start(consume, path=path, total=total, batch=batch) for _ in range(pairs)]
        try:
            for member in makers + takers:
                member.wait_ready()
            for member in takers + makers:
                member.go()
            began = min(member.result()[0] for member in makers)
            found = [member.result() for member in takers]
        finally:
            for member in makers + takers:
                member.kill()
    taken = sum(one[2] for one in found)
    if taken != total // pairs * pairs:
        raise harness.WorkerFailed(f"{taken} messages of {total} were taken")
    seconds: float = (max(one[1] for one in found) - began) / taken
    return seconds


def rounds(bench: Bench, measure: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Ours, without a limit."""
    return [measure() for _ in range(bench.scale.rounds)], []


def row_alone(bench: Bench, text: str, work: str, most: float, standing: int = 0) -> None:
    """One row of one process."""
    arguments = {"work": work, "count": bench.scale.singles, "standing": standing}
    ours = rounds(bench, lambda: bench.run_fresh(alone, **arguments))
    bench.row(text, ours, unit="ns", most=most)


def test_one(bench: Bench) -> None:
    row_alone(bench, "put, get and ack one at a time, one process", "one", 350e-9)


def test_many(bench: Bench) -> None:
    row_alone(bench, "the same by 100, a message", "many", 150e-9)


def test_one_with_delayed_standing(bench: Bench) -> None:
    standing = STANDING if bench.scale is not harness.TINY else 1_000
    row_alone(bench, "one at a time, 100,000 delayed standing", "one", 350e-9, standing)


def test_one_to_one(bench: Bench) -> None:
    ours = rounds(bench, lambda: between(bench, 1, 1))
    bench.row("1 producer and 1 consumer process, one at a time", ours, unit="M/s", most=1 / 1.5e6)


def test_one_to_one_by_100(bench: Bench) -> None:
    ours = rounds(bench, lambda: between(bench, 1, BATCH))
    bench.row("1 producer and 1 consumer process, by 100", ours, unit="M/s", most=1 / 4e6)


def test_two_to_two(bench: Bench) -> None:
    measured = bench.in_turn(lambda: between(bench, 2, 1), lambda: between(bench, 1, 1))
    bench.row("2 and 2, one at a time", measured, unit="M/s", limit_is="1 and 1", ratio=0.8)


def put_stamps(path: str, count: int) -> None:
    """Put what the consumer waits for."""
    queue = queue_of(path)
    worker.ready()
    time.sleep(0.1)
    for _ in range(count + WARM):
        time.sleep(WAKE_INTERVAL)
        queue.put(STAMP.pack(time.monotonic()))


def take_stamps(path: str, count: int) -> list[float]:
    """Seconds from each stamp until the consumer has it, the median and the 99th percentile."""
    queue = queue_of(path)
    worker.ready()
    taken = []
    for _ in range(count + WARM):
        message = queue.get(timeout=30)
        taken.append(time.monotonic() - STAMP.unpack(message.value)[0])
        message.ack()
    taken = sorted(taken[WARM:])
    return [taken[len(taken) // 2], taken[len(taken) * 99 // 100]]


def exchange(bench: Bench) -> dict[str, list[list[float]]]:
    """Rounds of [p50, p99], ours and the limit's."""

    def make() -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {"ours": [], "limit": []}
        count = bench.scale.wakes
        for _ in range(bench.scale.rounds):
            with bench.fresh() as path:
                make_queue(path)
                members = [
                    bench.start(f, path=path, count=count) for f in (put_stamps, take_stamps)
                ]
                try:
                    for member in members:
                        member.wait_ready()
                    for member in reversed(members):
                        member.go()
                    members[0].result()
                    found["ours"].append(members[1].result())
                finally:
                    for member in members:
                        member.kill()
            limit = bench.limits("futex", count, round(WAKE_INTERVAL * 1e6))
            if limit:
                found["limit"].append(limit)
        return found

    return bench.once("queue exchange", make)


def percentile(bench: Bench, work: str, index: int) -> None:
    """One row of the exchange."""
    found = exchange(bench)
    measured = tuple([one[index] for one in found[whose]] for whose in ("ours", "limit"))
    limit_is = "C: a futex and a stamp"
    bench.row(work, measured, unit="µs", limit_is=limit_is, ratio=0.5)  # type: ignore[arg-type]


def test_p50(bench: Bench) -> None:
    percentile(bench, "put to waiting consumer, two processes, p50", 0)


def test_p99(bench: Bench) -> None:
    percentile(bench, "put to waiting consumer, two processes, p99", 1)
