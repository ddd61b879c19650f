"""How fast do records get into a stream?

Values of 100 bytes, 1,000 different ones in turn, durability "process", one partition, one thread.
Each round is a new process and a new store, removed afterwards. The limit is limit.c: the same
batches into one allocated file.
"""

from __future__ import annotations

import itertools
import time
from time import perf_counter
from typing import Any

import millstream
from benchmarks import harness
from benchmarks.harness import BURST_BYTES, VALUE_BYTES, Bench

ARROW_BATCH = 10_000
PAUSE = 0.1


def open_stream(path: str) -> millstream.Stream:
    """Make the store of a round."""
    return millstream.open(path, durability="process").stream("s")


def make_values(form: str) -> Any:
    """Return what is appended: a list, a NumPy array or an Arrow table."""
    if form == "list":
        return harness.values(harness.BATCH)
    values = harness.values(ARROW_BATCH)
    if form == "numpy":
        import numpy

        return numpy.frombuffer(b"".join(values), f"V{VALUE_BYTES}")
    import pyarrow

    return pyarrow.table({"value": pyarrow.array(values, pyarrow.binary())})


def append_batches(path: str, form: str, size: int) -> float:
    """Seconds a record, of `size` bytes of values."""
    stream, values = open_stream(path), make_values(form)
    append = stream.append_arrow if form == "arrow" else stream.append_many
    append(values)
    times = max(1, size // (VALUE_BYTES * len(values)))
    began = perf_counter()
    for _ in range(times):
        append(values)
    return (perf_counter() - began) / (times * len(values))


def append_bursts(path: str, form: str, count: int, warm: int) -> list[float]:
    """Seconds a record of bursts with pauses between them, after some that are not counted."""
    stream, values = open_stream(path), make_values(form)
    append = stream.append_arrow if form == "arrow" else stream.append_many
    times = max(1, BURST_BYTES // (VALUE_BYTES * len(values)))
    taken = []
    for _ in range(warm + count):
        began = perf_counter()
        for _ in range(times):
            append(values)
        taken.append((perf_counter() - began) / (times * len(values)))
        time.sleep(PAUSE)
    return taken[warm:]


def append_singly(path: str, count: int, keyed: bool) -> float:
    """Seconds a record."""
    append = open_stream(path).append
    values, keys = harness.values(harness.BATCH), harness.keys(harness.BATCH)
    for value, key in zip(values, keys, strict=True):
        append(value, key=key)
    turns = max(1, count // len(values))
    pairs = list(zip(values, keys, strict=True))
    began = perf_counter()
    if keyed:
        for _ in range(turns):
            for value, key in pairs:
                append(value, key=key)
    else:
        for value in itertools.chain.from_iterable(itertools.repeat(values, turns)):
            append(value)
    return (perf_counter() - began) / (turns * len(values))


def batches(bench: Bench, work: str, form: str, count: int, source: str, ratio: float) -> None:
    """One row of batches."""
    size = bench.scale.append_bytes
    measured = bench.in_turn(
        lambda: bench.run_fresh(append_batches, form=form, size=size),
        bench.append_limit(count, source),
    )
    limit_is = f"C: {source}, {count:,} a batch, fresh pages"
    bench.row(work, measured, unit="M/s", limit_is=limit_is, ratio=ratio)


def test_append_many_lists(bench: Bench) -> None:
    batches(bench, "append_many, lists of 1,000 bytes", "list", 1_000, "pointers", 0.75)


def test_append_many_numpy(bench: Bench) -> None:
    batches(bench, "append_many, NumPy, 10,000 a batch", "numpy", 10_000, "column", 1.0)


def test_append_arrow(bench: Bench) -> None:
    batches(bench, "append_arrow, 10,000 a batch", "arrow", 10_000, "column", 1.0)


def bursts(bench: Bench, work: str, form: str, count: int, source: str, ratio: float) -> None:
    """One row of bursts; held to twice the target of sustained appends."""
    warm = 1 if bench.scale.bursts == 1 else 5  # 160 MiB: segments have grown to their size
    fresh, populated = (
        bench.append_limit(count, source),
        bench.append_limit(count, source, "populated"),
    )
    limits = [found for found in (fresh() for _ in range(bench.scale.rounds)) if found is not None]
    best = populated()
    ours = bench.run_fresh(append_bursts, form=form, count=bench.scale.bursts, warm=warm)
    note = f"pauses of {PAUSE * 1e3:.0f} ms"
    if best is not None:
        note += f"; C on populated pages {harness.number(1e-6 / best)} M/s"
    limit_is = f"C: {source}, {count:,} a batch, fresh pages"
    bench.row(work, (ours, limits), unit="M/s", limit_is=limit_is, ratio=ratio, note=note)


def test_burst_lists(bench: Bench) -> None:
    bursts(bench, "bursts of 32 MiB, lists of 1,000 bytes", "list", 1_000, "pointers", 1.5)


def test_burst_arrow(bench: Bench) -> None:
    bursts(bench, "bursts of 32 MiB, Arrow, 10,000 a batch", "arrow", 10_000, "column", 2.0)


def singly(bench: Bench, work: str, keyed: bool, most: float) -> None:
    """One row of single appends."""
    measured = bench.in_turn(
        lambda: bench.run_fresh(append_singly, count=bench.scale.singles, keyed=keyed),
        bench.append_limit(1),
    )
    bench.row(work, measured, unit="ns", limit_is="C: 1 a batch, no key, fresh pages", most=most)


def test_append_one(bench: Bench) -> None:
    singly(bench, "append, one at a time", False, 160e-9)


def test_append_one_with_key(bench: Bench) -> None:
    singly(bench, "append, one at a time, with a key", True, 200e-9)
