"""`millstream demo --queue`: late flights as jobs of a pool of processes, one of them killed.

Each flight that left over two hours late is a job: the priority follows from its delay, the key is
its carrier. A worker notes a job as done while it has the lease, and as acknowledged after `ack`
returned. The one that is killed may have acknowledged one job that it could not note any more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from millstream.cli import demo_checks, departures
from millstream.cli.demo_checks import Check
from millstream.cli.departures import Source
from millstream.cli.output import Column, Output, count_text, rate_text, seconds_text

if TYPE_CHECKING:
    from millstream import Queue, Store, Stream

QUEUE, DONE, ACKED = "late-flights", "done", "acknowledged"
LATE_MINUTES = 120
LANES = (360, 240, 180)  # minutes from which a job has priority 0, 1, 2; below: 3
WORKERS = 4
AT_ONCE = 1_000  # jobs a call
KILL_AFTER = 0.25  # of all jobs
JOB_SECONDS = 0.0005  # what a job takes, as if it asked somebody
PATIENCE_SECONDS = 120.0
JOB = struct.Struct("<Ii2s")  # number, minutes late, carrier
NOTE = struct.Struct("<IiIII2s2x")  # number, minutes late, priority, attempt, worker, carrier


@dataclass
class Totals:
    """What the text of the CSV file says of late flights; nothing was packed or unpacked."""

    jobs: Counter[str] = field(default_factory=Counter)  # by carrier
    minutes: Counter[str] = field(default_factory=Counter)


@dataclass
class Outcome:
    """What the workers noted, in the order in which they did."""

    done: list[tuple[int, int, int, int, int, str]]
    acked: list[int]
    victim: int
    left: int
    dead: int


def run(args: argparse.Namespace) -> int:
    """Run the pool and return 0, or 1 if a job was not done or was acknowledged twice."""
    output = Output(args.json)
    with departures.begun(args.keep, "queue", QUEUE) as (archive, store):
        output.line("Flights over two hours late, as jobs of four processes, one killed", "bold")
        output.gap()
        totals, source = count_late(archive), load(output, archive)
        queue = store.queue(QUEUE, priorities=len(LANES) + 1, ordering="key")
        began = time.perf_counter()
        count = put_jobs(queue, source)
        put_seconds = time.perf_counter() - began
        began = time.perf_counter()
        outcome = pool(output, store, queue, count)
        work_seconds = time.perf_counter() - began
        checks = compare(totals, outcome)
        if args.json:
            output.json(as_json(outcome, checks, put_seconds, work_seconds))
        else:
            report(output, outcome, count, put_seconds, work_seconds)
    return 0 if demo_checks.conclude(output, checks) else 1


def count_late(archive: str) -> Totals:
    """Count the late flights in the text of the source."""
    import csv
    import io
    import zipfile

    totals = Totals()
    with (
        zipfile.ZipFile(archive) as zipped,
        zipped.open("flights.csv") as raw,
        io.TextIOWrapper(raw, "utf-8", newline="") as text,
    ):
        for row in csv.DictReader(text):
            if row["dep_delay"] != "NA" and int(row["dep_delay"]) > LATE_MINUTES:
                totals.jobs[row["carrier"]] += 1
                totals.minutes[row["carrier"]] += int(row["dep_delay"])
    return totals


def load(output: Output, archive: str) -> Source:
    """Read the source."""
    with output.progress("parse the CSV file", departures.ROWS) as progress:
        return departures.load(archive, progress)


def lane_of(minutes: int) -> int:
    """Return the priority of a delay: the later, the more urgent."""
    return next((lane for lane, least in enumerate(LANES) if minutes >= least), len(LANES))


def put_jobs(queue: Queue, source: Source) -> int:
    """Put a job for each late flight, in the order of scheduled departure."""
    from millstream import Put

    late = source.values[source.values["dep_delay"] > LATE_MINUTES]
    rows = zip(late["dep_delay"].tolist(), late["carrier"].tolist(), strict=True)
    items = [
        Put(JOB.pack(number, minutes, carrier), priority=lane_of(minutes), key=carrier)
        for number, (minutes, carrier) in enumerate(rows)
    ]
    for start in range(0, len(items), AT_ONCE):
        queue.put_many(items[start : start + AT_ONCE])
    return len(items)


# --- the pool -------------------------------------------------------------------------------------


def pool(output: Output, store: Store, queue: Queue, count: int) -> Outcome:
    """Let four processes do the jobs, kill one on the way, and return what they noted."""
    import multiprocessing

    done, acked = (store.stream(name, partitions=1) for name in (DONE, ACKED))
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(WORKERS)
    workers = [
        context.Process(target=work, args=(os.fspath(store.path), number, gate), daemon=True)
        for number in range(WORKERS)
    ]
    victim = 0
    with output.progress("work off the jobs", count, unit="jobs") as progress:
        try:
            for worker in workers:
                worker.start()
            deadline = time.monotonic() + PATIENCE_SECONDS
            while len(queue) and time.monotonic() < deadline:
                at = acked.next_offset(0)
                progress.reach(at, count)
                if not victim and at >= count * KILL_AFTER and workers[0].pid is not None:
                    victim = workers[0].pid
                    os.kill(victim, signal.SIGKILL)
                time.sleep(0.005)
            for worker in workers:
                worker.join(timeout=max(1.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.kill()
        progress.reach(count, count)
    notes = [NOTE.unpack(value) for value in values(done)]
    return Outcome(
        done=[(*note[:5], note[5].decode()) for note in notes],
        acked=[struct.unpack("<I", value)[0] for value in values(acked)],
        victim=victim,
        left=len(queue),
        dead=len(list(queue.dead.list())),
    )


def values(stream: Stream) -> Iterator[bytes]:
    """Yield the values of a stream."""
    for batch in stream.read():
        for value in batch.values:
            yield value or b""


def work(path: str, number: int, gate: Any) -> None:
    """Do jobs, in a process of its own, until none is left; all begin together."""
    import millstream

    with contextlib.suppress(KeyboardInterrupt), millstream.open(path) as store:
        queue = store.queue(QUEUE)
        done, acked = (store.stream(name) for name in (DONE, ACKED))
        gate.wait()
        while True:
            try:
                message = queue.get(timeout=0.25)
            except millstream.Empty:
                if not len(queue):
                    return
                continue
            job, minutes, carrier = JOB.unpack(message.value)
            facts = (job, minutes, message.priority, message.attempt, number, carrier)
            time.sleep(JOB_SECONDS)
            done.append(NOTE.pack(*facts))
            try:
                message.ack()
            except millstream.LeaseLost:
                continue
            acked.append(struct.pack("<I", job))


# --- what came of it ------------------------------------------------------------------------------


def compare(totals: Totals, outcome: Outcome) -> list[Check]:
    """Hold what the workers noted to the source."""
    first: dict[int, tuple[int, str]] = {}
    for job, minutes, *_, carrier in outcome.done:
        first.setdefault(job, (minutes, carrier))
    jobs, delay = Counter[str](), Counter[str]()
    latest: dict[str, int] = {}
    unordered = set()
    for job, (minutes, carrier) in first.items():  # in the order of their first note
        jobs[carrier] += 1
        delay[carrier] += minutes
        if latest.get(carrier, -1) > job:
            unordered.add(carrier)
        latest[carrier] = job
    acks = Counter(outcome.acked)
    silent = totals.jobs.total() - len(acks)
    return [
        Check("jobs done", totals.jobs.total(), len(first)),
        Check("minutes of delay in them", totals.minutes.total(), delay.total()),
        Check("carriers with another count", 0, departures.differing(totals.jobs, jobs)),
        Check(
            "carriers with another sum of delays", 0, departures.differing(totals.minutes, delay)
        ),
        Check("jobs acknowledged twice", 0, sum(count > 1 for count in acks.values())),
        # What the killed one acknowledged in its last moment, it could not note any more.
        Check("acknowledged but not noted, beyond one of the killed", 0, max(0, silent - 1)),
        Check("carriers whose jobs were done out of order", 0, len(unordered)),
        Check("jobs left, or dead", 0, outcome.left + outcome.dead),
        Check("a worker was killed on the way", True, bool(outcome.victim)),
    ]


def report(
    output: Output, outcome: Outcome, count: int, put_seconds: float, work_seconds: float
) -> None:
    """Print the tables."""
    output.table(
        [Column("Work"), Column("Time", right=True), Column("Jobs", right=True, style="cyan")],
        [
            ("put, 1,000 a call", seconds_text(put_seconds), rate_text(count, put_seconds)),
            ("done, with the start of four processes", seconds_text(work_seconds),
             rate_text(count, work_seconds)),
        ],
    )  # fmt: skip
    by_worker = Counter(note[4] for note in outcome.done)
    most = max(by_worker.values(), default=1)
    output.table(
        [Column("Worker"), Column("Jobs", right=True), Column("", style="cyan")],
        [
            (
                f"{number} killed" if number == 0 and outcome.victim else number,
                count_text(by_worker[number]),
                output.bar(by_worker[number] / most),
            )
            for number in range(WORKERS)
        ],
    )
    by_carrier = Counter(note[5] for note in outcome.done).most_common(6)
    output.table(
        [Column("Carrier"), Column("Late flights", right=True), Column("", style="red")],
        [
            (name, count_text(jobs), output.bar(jobs / by_carrier[0][1]))
            for name, jobs in by_carrier
        ],
    )
    again = sum(note[3] > 1 for note in outcome.done)
    output.line(f"Delivered again, after the kill: {count_text(again)}.")
    output.gap()


def as_json(
    outcome: Outcome, checks: list[Check], put_seconds: float, work_seconds: float
) -> dict[str, Any]:
    """Return all that the demo found out as one value."""
    by_worker = Counter(note[4] for note in outcome.done)
    return {
        "jobs": len({note[0] for note in outcome.done}),
        "put_seconds": put_seconds,
        "work_seconds": work_seconds,
        "by_worker": [by_worker[number] for number in range(WORKERS)],
        "killed": outcome.victim,
        "delivered_again": sum(note[3] > 1 for note in outcome.done),
        **demo_checks.as_json(checks),
    }
