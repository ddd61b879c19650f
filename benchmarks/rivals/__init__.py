"""What do others do with the same records? Each work of a rival has its own process and file.

A rival is a module here with a class `Rival`, or with a function `measure` where it is no Python;
it is left out, with a note, where what it needs is not installed. Loops end after a time or 300 MB.
Unsynced loops are rates into the page cache; their files are removed at once. *synced*: each call
returns after fdatasync or the rival's equal.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from benchmarks.harness import Bench

NAMES = (
    "millstream_", "plain_file", "os_write", "sqlite", "lmdb_", "rocks", "arrow_ipc", "chronicle",
)  # fmt: skip
WORKS = (
    "append 1", "by 1,000", "read each", "read batch", "get one", "synced 1", "synced by 1,000",
)  # fmt: skip
BYTES_MOST = 300_000_000


class Log(Protocol):
    """What a rival does. Works that it has no way to do raise NotImplementedError."""

    title: str

    def __init__(self, path: str, synced: bool) -> None:
        """Open a new log."""

    def append(self, value: bytes) -> None:
        """Append one record."""

    def append_many(self, values: list[bytes]) -> None:
        """Append a batch."""

    def finish(self) -> None:
        """Do what makes all of it readable."""

    def read_each(self) -> Iterable[object]:
        """Every record as an object."""

    def read_batches(self) -> Iterable[int]:
        """How many records there are in each batch, as few objects as can be."""

    def getter(self) -> Callable[[int], object]:
        """What returns the value of the record with this number, as bytes."""


def run(name: str, work: str, path: str, seconds: float) -> dict[str, Any]:
    """Do one work in this process: records a second, or why not."""
    from benchmarks import harness

    try:
        module = importlib.import_module(f"benchmarks.rivals.{name}")
        if not hasattr(module, "Rival"):
            found = module.measure(work, path, seconds)
            return {"title": module.TITLE, "rate": found}
        rival: type[Log] = module.Rival
    except ImportError as error:
        return {"title": name, "skipped": str(error)}
    os.mkdir(path)
    values = harness.values(harness.BATCH)
    log = rival(os.path.join(path, "log"), work.startswith("synced"))
    try:
        if work.startswith(("read", "get")):
            turns = 200 if seconds >= 0.1 else 2
            for _ in range(turns):
                log.append_many(values)
            log.finish()
        if work == "get one":
            found = get(log.getter(), turns * len(values), seconds)
        elif work.startswith("read"):
            found = read(log.read_each if work == "read each" else log.read_batches, seconds)
        elif work in ("append 1", "synced 1"):
            found = append(log.append, values, 1, seconds)
        else:
            found = append(log.append_many, itertools.repeat(values), len(values), seconds)
    except NotImplementedError:
        return {"title": rival.title, "rate": None}
    return {"title": rival.title, "rate": found}


def append(call: Callable[[Any], None], given: Iterable[Any], count: int, seconds: float) -> float:
    """Records a second."""
    from benchmarks import harness

    turns = itertools.cycle(given) if count == 1 else iter(given)
    calls_most = BYTES_MOST // (harness.VALUE_BYTES * count)
    step = 1
    done = 0
    call(next(turns))  # what is loaded or made at first use is not counted
    began = time.perf_counter()
    while True:
        for one in itertools.islice(turns, step):
            call(one)
        done += step
        taken = time.perf_counter() - began
        if taken >= seconds or done >= calls_most:
            return done * count / taken
        step = min(max(1, int(done * seconds / taken / 10)), 10_000, calls_most - done)


def read(call: Callable[[], Iterable[Any]], seconds: float) -> float:
    """Records a second, warm: the first pass does not count."""
    passes: list[float] = []
    count = 0
    began = time.perf_counter()
    while len(passes) < 2 or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        count = 0
        for one in call():
            count += one if type(one) is int else 1
        passes.append(time.perf_counter() - started)
    passes = sorted(passes[1:])
    return count / passes[len(passes) // 2]


def get(call: Callable[[int], object], count: int, seconds: float) -> float:
    """Records a second, at random and warm."""
    order = [*range(count)]
    random.Random(count).shuffle(order)
    order = order[:50_000]
    for index in order:
        call(index)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or not done:
        for index in order:
            call(index)
        done += len(order)
    return done / (time.perf_counter() - began)


def is_chosen(name: str, chosen: list[str] | None) -> bool:
    """Is it to be measured? None: all are."""
    return chosen is None or any(text.lower() in name.lower() for text in chosen)


def measure(
    bench: Bench, say: Callable[[str], None], chosen: list[str] | None = None
) -> list[dict[str, Any]]:
    """Measure all, in turn: a dict each with its name, rates by work, or why it was skipped."""
    found: dict[str, dict[str, Any]] = {
        name: {"name": name, "rates": {}, "skipped": ""}
        for name in NAMES
        if is_chosen(name, chosen)
    }
    for work in WORKS if found else ():
        for _ in range(1 if bench.scale.name == "tiny" else bench.scale.rounds):
            for name, one in found.items():
                if not one["skipped"]:
                    measure_one(bench, name, work, one)
        say(f"rivals: {work}")
    for name, one in found.items():
        say(f"rivals.{name}: " + (one["skipped"] or f"{len(one['rates'])} works"))
    return list(found.values())


def measure_one(bench: Bench, name: str, work: str, one: dict[str, Any]) -> None:
    """A round of one work of one rival."""
    path = bench.new_path()
    try:
        seconds = bench.scale.rival_seconds
        result = bench.run(run, path=path, name=name, work=work, seconds=seconds)
    except Exception as error:  # the other rivals are worth having
        one["skipped"] = f"{type(error).__name__}: {error}"
        return
    finally:
        shutil.rmtree(path, ignore_errors=True)
    one["name"] = result["title"]
    one["skipped"] = result.get("skipped", "")
    if result.get("rate"):
        one["rates"].setdefault(work, []).append(result["rate"])
