"""How fast do records get out of a stream?

Warm: everything lies in the page cache. *Checked before*: this process has verified the hash of
what it reads once; it does so the first time, and never again. Values of 100 bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import millstream
from benchmarks import harness
from benchmarks.harness import BATCH_BYTES, VALUE_BYTES, Bench

PASSES = 5
SMALL_SEGMENT = 4 << 20  # little is left behind the tail


# --- in processes of their own --------------------------------------------------------------------


def write_log(
    path: str, size: int, batch: int, close: bool, segment_bytes: int | None = None
) -> int:
    """Append `size` bytes of log in batches (or one at a time); return its bytes."""
    import numpy

    store = millstream.open(path, durability="process")
    stream = store.stream("s", segment_bytes=segment_bytes)
    values = harness.values(batch if batch > 1 else harness.BATCH)
    if batch > 1:
        array = numpy.frombuffer(b"".join(values), f"V{VALUE_BYTES}")
        for _ in range(max(1, size // (batch * (VALUE_BYTES + 4) + 128))):
            stream.append_many(array)
    else:
        for _ in range(max(1, size // (harness.SINGLE_BYTES * len(values)))):
            for value in values:
                stream.append(value)
    written = stream.stats().log_bytes
    if close:
        store.close()
    return written


def check_all(stream: millstream.Stream) -> int:
    """Read everything once; return how many records there are."""
    return sum(len(batch) for batch in stream.read(partition=0))


def as_numpy(batch: millstream.Batch) -> object:
    """View the values as NumPy arrays."""
    values = batch.values
    return values.offsets, values.data


def as_c_structs(batch: millstream.Batch) -> object:
    """View keys (none are stored) and values as structs of the Arrow C data interface."""
    return batch.arrow(("key", "value")).__arrow_c_array__()


VIEWS: dict[str, Callable[[millstream.Batch], object]] = {"numpy": as_numpy, "c": as_c_structs}


def view(path: str, form: str, batch: int, size: int, passes: int) -> list[float]:
    """Seconds to get a stored batch and view it, one number a pass."""
    write_log(path, size, batch, close=True)
    stream = millstream.open(path).stream("s")
    check_all(stream)
    make = VIEWS[form]
    taken = []
    for _ in range(passes):
        count = 0
        batches = stream.read(partition=0)
        began = perf_counter()
        for one in batches:
            make(one)
            count += 1
        taken.append((perf_counter() - began) / count)
    return taken


def first_time(path: str, records: int) -> float:
    """Seconds a byte to get batches that were not checked before."""
    stream = millstream.open(path).stream("s")
    total = stream.stats()
    records = min(records, total.records)
    batches = stream.read(partition=0, max_records=records)
    began = perf_counter()
    for _ in batches:
        pass
    return (perf_counter() - began) / (total.log_bytes / total.records * records)


def recover(path: str, size: int) -> float:
    """Seconds a byte until a stream that nobody closed can be read, all of it being walked."""
    stream = millstream.open(path, mode="r").stream("s")
    began = perf_counter()
    stream.first_offset(0)
    return (perf_counter() - began) / size


def gathered(path: str, passes: int) -> list[float]:
    """Seconds a record of a log written one at a time; the first pass checks."""
    stream = millstream.open(path).stream("s")
    taken = []
    for _ in range(1 + passes):
        began = perf_counter()
        count = check_all(stream)
        taken.append((perf_counter() - began) / count)
    return taken


def iterate(path: str, records: int, passes: int) -> dict[str, list[float]]:
    """Seconds a value as `bytes`: by ourselves, and by Arrow where it is installed."""
    stream = millstream.open(path).stream("s")
    batches = list(stream.read(partition=0, max_records=records))
    count = sum(len(batch) for batch in batches)
    taken: dict[str, list[float]] = {"ours": [], "arrow": []}
    for _ in range(passes):
        began = perf_counter()
        for batch in batches:
            for _ in batch.values:
                pass
        taken["ours"].append((perf_counter() - began) / count)
        try:
            columns = [batch.to_arrow(("value",)).column(0) for batch in batches]
        except ImportError:
            continue
        began = perf_counter()
        for column in columns:
            column.to_pylist()
        taken["arrow"].append((perf_counter() - began) / count)
    return taken


def read_randomly(path: str, reads: int, passes: int) -> list[float]:
    """Seconds to read one value at a random offset."""
    stream = millstream.open(path).stream("s")
    total = check_all(stream)
    choose = random.Random(1)
    taken = []
    for _ in range(passes):
        offsets = [choose.randrange(total) for _ in range(reads)]
        began = perf_counter()
        for offset in offsets:
            for batch in stream.read(partition=0, start=offset, max_records=1):
                batch.values[0]
        taken.append((perf_counter() - began) / reads)
    return taken


# --- the logs that are read -----------------------------------------------------------------------


def big_log(bench: Bench) -> tuple[str, int]:
    """Path and bytes of the log in batches of 1,000, closed cleanly."""

    def make() -> tuple[str, int]:
        path = bench.new_path()
        size = bench.scale.log_bytes
        return path, bench.run(write_log, path=path, size=size, batch=1_000, close=True)

    return bench.once("big log", make)


def single_log(bench: Bench) -> tuple[str, int]:
    """Path and bytes of the log of records appended one at a time, closed cleanly."""

    def make() -> tuple[str, int]:
        path = bench.new_path()
        size = bench.scale.singles * harness.SINGLE_BYTES
        return path, bench.run(write_log, path=path, size=size, batch=1, close=True)

    return bench.once("single log", make)


# --- rows -----------------------------------------------------------------------------------------


def views(bench: Bench, work: str, form: str, batch: int) -> None:
    """One row of views of batches that were checked before."""
    size = min(bench.scale.append_bytes, 256 << 20)
    size = max(size, 4 * batch * VALUE_BYTES)
    ours = bench.run_fresh(view, form=form, batch=batch, size=size, passes=PASSES)
    bench.row(work, (ours, []), unit="µs", most=2e-6, note="a batch, with getting it")


def test_numpy_views_of_1000(bench: Bench) -> None:
    views(bench, "batch of 1,000 as NumPy views, checked before", "numpy", 1_000)


def test_numpy_views_of_100000(bench: Bench) -> None:
    views(bench, "batch of 100,000 as NumPy views, checked before", "numpy", 100_000)


def test_c_structs_of_1000(bench: Bench) -> None:
    views(bench, "batch of 1,000 as C structs, checked before", "c", 1_000)


def test_c_structs_of_100000(bench: Bench) -> None:
    views(bench, "batch of 100,000 as C structs, checked before", "c", 100_000)


def test_first_time(bench: Bench) -> None:
    path, size = big_log(bench)
    share = min(size, bench.scale.walk_bytes)
    records = share * 1_000 // BATCH_BYTES
    measured = bench.in_turn(
        lambda: bench.run(first_time, path=path, records=records),
        lambda: bench.limit("hash", BATCH_BYTES, share, *harness.segment_files(path)),
    )
    limit_is = "C: XXH3 over the same mapped bytes"
    bench.row(
        "batches for the first time, hashes checked",
        measured, unit="GB/s", limit_is=limit_is, ratio=0.6,
    )  # fmt: skip


def recovery(bench: Bench, work: str, segment_bytes: int, ratio: float | None) -> None:
    """One row of a store that nobody closed. Read-only, so that the disk is not measured."""
    with bench.fresh() as path:
        arguments = {"path": path, "batch": 1_000, "segment_bytes": segment_bytes}
        size = bench.run(write_log, size=bench.scale.walk_bytes, close=False, **arguments)
        # Without its hints the partition is walked from its first byte.
        Path(path, "streams", "s", "control").unlink()
        measured = bench.in_turn(
            lambda: bench.run(recover, path=path, size=size),
            lambda: bench.limit("hash", BATCH_BYTES, size, *harness.segment_files(path)),
        )
    limit_is = "C: XXH3 over the same mapped bytes"
    bench.row(work, measured, unit="GB/s", limit_is=limit_is, ratio=ratio)


def test_recovery_walk(bench: Bench) -> None:
    recovery(bench, "recovery's walk", SMALL_SEGMENT, 0.6)


def test_recovery(bench: Bench) -> None:
    work = "recovery with the search behind the tail, segments of 128 MiB"
    recovery(bench, work, 128 << 20, None)


def gathering(bench: Bench) -> list[list[float]]:
    """Passes over the log of single records, one list a process."""
    path, _ = single_log(bench)

    def make() -> list[list[float]]:
        rounds = range(bench.scale.rounds)
        return [bench.run(gathered, path=path, passes=PASSES) for _ in rounds]

    return bench.once("gathered", make)


def copy_limit(bench: Bench) -> list[float]:
    """Copy the records out of the same files."""
    files = harness.segment_files(single_log(bench)[0])
    found = (bench.limit("copy", *files) for _ in range(bench.scale.rounds))
    return [one for one in found if one is not None]


def test_gathered(bench: Bench) -> None:
    ours = [value for one in gathering(bench) for value in one[1:]]
    limit_is = "C: copy them out, no hash"
    work = "records appended one at a time, in gathered batches, checked before"
    bench.row(work, (ours, copy_limit(bench)), unit="M/s", limit_is=limit_is, most=50e-9)


def test_gathered_first_time(bench: Bench) -> None:
    ours = [one[0] for one in gathering(bench)]
    limit_is = "C: copy them out, no hash"
    work = "the same for the first time, hashes checked"
    bench.row(work, (ours, copy_limit(bench)), unit="M/s", limit_is=limit_is, most=50e-9)


def test_iterate_values(bench: Bench) -> None:
    path, _ = big_log(bench)
    found = bench.run(iterate, path=path, records=bench.scale.singles, passes=PASSES)
    measured = (found["ours"], found["arrow"])
    bench.row(
        "iterate values as bytes", measured, unit="ns", limit_is="Arrow's to_pylist", most=25e-9
    )


def random_reads(bench: Bench, work: str, path: str, size: int) -> None:
    """One row of random reads."""
    reads = bench.scale.reads
    ours = bench.run(read_randomly, path=path, reads=reads, passes=PASSES)
    files = harness.segment_files(path)
    limits = [bench.limit("random", size, reads, *files) for _ in range(bench.scale.rounds)]
    measured = (ours, [one for one in limits if one is not None])
    limit_is = "C: 100 bytes from a random place, mapped"
    bench.row(work, measured, unit="µs", limit_is=limit_is, most=3e-6)


def test_random_reads(bench: Bench) -> None:
    path, size = big_log(bench)
    work = f"read at a random offset, {size / (1 << 30):.2g} GiB in batches of 1,000"
    random_reads(bench, work, path, size)


def test_random_reads_of_singles(bench: Bench) -> None:
    path, size = single_log(bench)
    work = f"the same, {size / (1 << 20):.0f} MiB appended one at a time"
    random_reads(bench, work, path, size)
