"""`bench`: how fast this machine appends and reads, said with all that the figures depend on.

It gives first figures. The project's benchmarks, with rivals and limits, are in benchmarks/.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from millstream.cli.output import (
    Column,
    NoProgress,
    Output,
    Progress,
    count_text,
    rate_text,
    seconds_text,
    size_text,
)
from millstream.cli.records import count_argument

if TYPE_CHECKING:
    from pathlib import Path

    from millstream import Store, Stream
    from millstream.cli.plots import Plot

SINGLES_SECONDS = 3.0  # appends one at a time end then; at level sync a million would take minutes
POINT_SECONDS, POINT_BYTES = 0.5, 64 << 20  # of each size
TIMED_SECONDS, TIMED_CALLS = 1.0, 100_000  # of calls that are timed one by one
SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999, "largest": 1.0}


@dataclass(frozen=True)
class Result:
    """What was done in a round, how often, and in how many seconds."""

    what: str
    count: int
    seconds: float

    @property
    def rate(self) -> float:
        """How often in a second."""
        return self.count / self.seconds


Measure: TypeAlias = "Callable[[Output, Store, str, argparse.Namespace], Iterator[Result]]"
Timed: TypeAlias = "Callable[[Store, argparse.Namespace], list[float]]"
Sized: TypeAlias = "Callable[[Store, argparse.Namespace, int], Iterator[Result]]"


@dataclass
class Work:
    """What a verb measures, and in which words it is said."""

    unit: str
    content: str
    charts: tuple[tuple[str, tuple[str, ...]], ...]
    """The titles of the bars, and how the names of what is in them begin."""
    measure: Measure
    """Yields each kind of work."""
    call: str
    latency: Timed
    """Seconds of each call."""
    sized: Sized
    """Yields kinds of work with contents of some size."""


@dataclass
class Found:
    """What came of all rounds."""

    results: dict[str, list[Result]] = field(default_factory=dict)
    latencies: list[list[float]] = field(default_factory=list)
    growth: dict[str, dict[int, list[Result]]] = field(default_factory=dict)


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "bench",
        help="measure appends and reads on this machine",
        description="Append records to a temporary store and read them back, in several ways.",
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=1,
        metavar="N",
        help="how many append to one partition",
    )
    add_arguments(parser, "records", 1_000_000, "value", 1_000)
    parser.set_defaults(run=run)


def add_arguments(
    parser: argparse.ArgumentParser, unit: str, count: int, content: str, batch: int
) -> None:
    """Add how much is to be done, and where: so many of a unit, each of which has a content."""
    parser.add_argument(
        f"--{unit}", type=positive, default=count, metavar="N", help="how many in all"
    )
    parser.add_argument(
        "--size", type=size_argument, default=100, metavar="B", help=f"of a {content}"
    )
    parser.add_argument("--batch", type=positive, default=batch, metavar="N", help=f"{unit} a call")
    parser.add_argument(
        "--durability",
        choices=("process", "interval", "sync"),
        default="process",
        help="what each call has survived when it returns",
    )
    parser.add_argument(
        "--dir", metavar="DIR", help="make the temporary store below DIR (default: $TMPDIR)"
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=3,
        metavar="N",
        help="do it all so often, each time in a new store; figures are medians",
    )
    parser.add_argument(
        "--svg",
        metavar="DIR",
        help="write plots into DIR as SVG files; needs the extra millstream[plots]",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def positive(text: str) -> int:
    """Read a count of one or more."""
    count = count_argument(text)
    if count == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def size_argument(text: str) -> int:
    """Read a number of bytes such as 100 or 4KiB."""
    from millstream.errors import MillstreamError
    from millstream.options import parse_bytes

    try:
        return parse_bytes(text)
    except MillstreamError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Measure, then print."""
    charts = (("Appends", ("append",)), ("Reads", ("read", "iterate")))
    work = Work("records", "value", charts, measure, "append", time_appends, append_sized)
    return carry_out(args, work, processes=args.processes)


def carry_out(args: argparse.Namespace, work: Work, **more: object) -> int:
    """Measure in temporary stores, then print what came of it and what it depends on."""
    import shutil
    import tempfile

    output = Output(args.json)
    svg = None if args.svg is None else svg_directory(args.svg)
    directory = tempfile.mkdtemp(prefix="millstream-bench-", dir=args.dir)
    try:
        found = Found()
        for number in range(args.rounds):
            path = os.path.join(directory, f"store{number}")
            add_round(found, output, path, args, work)
            shutil.rmtree(path)
        machine = describe_machine(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    plots: dict[str, Plot] = {}
    if svg is not None or not args.json:
        plots = plots_of(found, args, work)
    files: list[str] = []
    if svg is not None:
        from millstream.cli.plots import write

        files = [str(file) for file in write(plots, svg)]
    if args.json:
        output.json({**document(found, args, work), **more, "machine": machine, "svg": files})
        return 0
    output.line(
        f"Durability level {args.durability}, {work.content}s of {args.size:,} bytes, "
        f"{args.batch:,} a batch"
        + (f", medians of {args.rounds} rounds" if args.rounds > 1 else ""),
        "bold",
    )
    output.line(
        f"{machine['cpu']}, {machine['cores']} cores; Linux {machine['kernel']}, "
        f"{machine['file_system']}; Python {machine['python']}"
    )
    output.gap()
    print_table(output, found, args, work)
    from millstream.cli.plots import show

    show(output, list(plots.values()))
    for file in files:
        output.say(f"wrote {file}")
    return 0


def svg_directory(name: str) -> Path:
    """The directory for plots, made; said before an hour of measuring, not behind it."""
    from importlib.util import find_spec
    from pathlib import Path

    from millstream import Unsupported

    if find_spec("matplotlib") is None:
        raise Unsupported("--svg draws with matplotlib; pip install 'millstream[plots]'")
    found = Path(name)
    found.mkdir(parents=True, exist_ok=True)
    return found


def add_round(
    found: Found, output: Output, path: str, args: argparse.Namespace, work: Work
) -> None:
    """Measure everything once, in a new store."""
    import millstream

    with millstream.open(path, durability=args.durability) as store:
        for result in work.measure(output, store, path, args):
            found.results.setdefault(result.what, []).append(result)
        taken = sorted(work.latency(store, args))
        found.latencies.append(taken)
        for size in SIZES:
            for result in work.sized(store, args, size):
                found.growth.setdefault(result.what, {}).setdefault(size, []).append(result)


def middle(rounds: list[Result]) -> Result:
    """The round in the middle, or the slower of the two in it."""
    return sorted(rounds, key=lambda one: one.rate)[(len(rounds) - 1) // 2]


def shares_of(taken: list[float]) -> dict[str, float]:
    """How long the call took that so many were not slower than; `taken` is sorted."""
    last = len(taken) - 1
    return {name: taken[min(last, int(len(taken) * share))] for name, share in SHARES.items()}


def document(found: Found, args: argparse.Namespace, work: Work) -> dict[str, object]:
    """What is printed as JSON."""
    import millstream

    unit = work.unit
    return {
        "version": millstream.__version__,
        "durability": args.durability,
        f"{work.content}_bytes": args.size,
        f"batch_{unit}": args.batch,
        "rounds": args.rounds,
        "results": [
            {
                "what": what,
                unit: one.count,
                "seconds": one.seconds,
                f"{unit}_per_second": one.rate,
                "bytes_per_second": one.rate * args.size,
                f"{unit}_per_second_of_rounds": [other.rate for other in rounds],
            }
            for what, rounds in found.results.items()
            for one in [middle(rounds)]
        ],
        "latencies": [
            {"what": work.call, "calls": len(taken), "seconds": shares_of(taken)}
            for taken in found.latencies
        ],
        "growth": [
            {
                "what": what,
                f"{work.content}_bytes": size,
                "bytes_per_second": middle(rounds).rate * size,
                "bytes_per_second_of_rounds": [one.rate * size for one in rounds],
            }
            for what, points in found.growth.items()
            for size, rounds in points.items()
        ],
    }


def print_table(output: Output, found: Found, args: argparse.Namespace, work: Work) -> None:
    """Print a line for each kind of work."""
    titles = [work.unit.capitalize(), "Time", "Rate", "Each", f"{work.content.capitalize()}s"]
    rows = []
    for what, rounds in found.results.items():
        one = middle(rounds)
        row = [
            what,
            count_text(one.count),
            seconds_text(one.seconds),
            rate_text(one.count, one.seconds),
            seconds_text(1 / one.rate),
            f"{size_text(one.rate * args.size)}/s",
        ]
        rows.append(row + ([spread_text(rounds)] if len(rounds) > 1 else []))
    if args.rounds > 1:
        titles.append("Spread")
    output.table([Column("Work"), *(Column(title, right=True) for title in titles)], rows)


def spread_text(rounds: list[Result]) -> str:
    """How far the rounds lie apart, as a share of the median."""
    rates = [one.rate for one in rounds]
    return f"{(max(rates) - min(rates)) / middle(rounds).rate * 100:.0f} %"


def plots_of(found: Found, args: argparse.Namespace, work: Work) -> dict[str, Plot]:
    """Bars with their spread, the distribution of latencies, growth against size."""
    from millstream.cli.plots import Bar, Bars, Curve, Curves

    plots: dict[str, Plot] = {}
    for title, begins in work.charts:
        bars = [
            Bar(what, [one.rate / 1e6 for one in rounds])
            for what, rounds in found.results.items()
            if what.startswith(begins)
        ]
        about = f"{title}, {work.content}s of {args.size:,} bytes"
        plots[title] = Bars(about, f"million {work.unit} a second", bars)
    shares = [shares_of(taken) for taken in found.latencies]
    curve = Curve(
        work.call, range(len(SHARES)), [[one[name] * 1e6 for one in shares] for name in SHARES]
    )
    title = f"How long one call takes: {work.call}"
    plots["latency"] = Curves(title, "microseconds", [curve], list(SHARES), "y")
    curves = [
        Curve(what, SIZES, [[one.rate * size / 1e6 for one in points[size]] for size in SIZES])
        for what, points in found.growth.items()
    ]
    plots["growth"] = Curves(
        f"Growth with the size of a {work.content}",
        "million bytes a second",
        curves,
        [f"{size:,}" for size in SIZES],
        "x",
        f"bytes of a {work.content}",
    )
    return plots


def timed(
    output: Output, what: str, most: int, work: Callable[[Progress], int], unit: str = "records"
) -> Result:
    """Do one kind of work, under a progress bar."""
    with output.progress(what, most, unit=unit) as progress:
        began = time.perf_counter()
        count = work(progress)
        return Result(what, count, time.perf_counter() - began)


def measure(output: Output, store: Store, path: str, args: argparse.Namespace) -> Iterator[Result]:
    """Yield each kind of work, each on a stream of its own."""
    count = args.records
    value = os.urandom(args.size)
    singles = store.stream("singles", partitions=1)
    what = "append, one at a time"
    yield timed(output, what, count, partial(append_singles, singles, value, count))
    batches = store.stream("batches", partitions=1)
    values = [value] * args.batch
    what = "append_many, lists of bytes"
    yield timed(output, what, count, partial(append_batches, batches, values, count))
    if args.size > 0:
        arrays = store.stream("arrays", partitions=1)
        column = numpy_values(value, args.batch)
        what = "append_many, NumPy"
        yield timed(output, what, count, partial(append_batches, arrays, column, count))
    if args.processes > 1:
        with processes(path, args) as go:
            yield timed(output, f"append_many, {args.processes} processes", count, go)
    for what, stream, work in (
        ("read batches, hashes checked", batches, read_batches),
        ("read batches again", batches, read_batches),
        ("read records appended singly", singles, read_batches),
        ("iterate values as bytes", batches, iterate_values),
    ):
        yield timed(output, what, count, partial(work, stream))


def numpy_values(value: bytes, count: int) -> Any:
    """Return the value `count` times as an array of fixed width."""
    import numpy as np

    return np.full(count, np.void(value))


def append_singles(stream: Stream, value: bytes, count: int, progress: Progress) -> int:
    """Append one record a call, for a few seconds at most."""
    append = stream.append
    done = 0
    end = time.perf_counter() + SINGLES_SECONDS
    while done < count and time.perf_counter() < end:
        step = min(1_000 if done else 10, count - done)
        for _ in range(step):
            append(value)
        done += step
        progress.advance(step)
    return done


def time_appends(store: Store, args: argparse.Namespace) -> list[float]:
    """Seconds of each append."""
    append = store.stream("timed", partitions=1).append
    return time_calls(partial(append, os.urandom(args.size)), args.records)


def time_calls(call: Callable[[], object], most: int) -> list[float]:
    """Seconds of each call, for a second at most."""
    clock = time.perf_counter
    taken: list[float] = []
    end = clock() + TIMED_SECONDS
    while len(taken) < min(most, TIMED_CALLS) and (began := clock()) < end:
        call()
        taken.append(clock() - began)
    return taken


def append_sized(store: Store, args: argparse.Namespace, size: int) -> Iterator[Result]:
    """Append records of a size in batches, and read them."""
    stream = store.stream(f"size{size}", partitions=1)
    step = step_of(args, size)
    values = [os.urandom(size)] * step
    count, began = 0, time.perf_counter()
    for _ in range(turns_of(args.records, step, size)):
        stream.append_many(values)
        count += step
        if time.perf_counter() - began > POINT_SECONDS:
            break
    yield Result("append_many", count, time.perf_counter() - began)
    began = time.perf_counter()
    count = read_batches(stream, NoProgress())
    yield Result("read batches", count, time.perf_counter() - began)
    store.drop_stream(stream.name)


def step_of(args: argparse.Namespace, size: int) -> int:
    """How many of a size are in one call."""
    batch: int = args.batch
    return max(1, min(batch, (1 << 20) // size))


def turns_of(most: int, step: int, size: int) -> int:
    """How many calls there are at most, for a size."""
    return max(1, min(most, min(POINT_BYTES, most * 1_000) // size) // step)


def append_batches(stream: Stream, values: Any, count: int, progress: Progress) -> int:
    """Append records in batches, the last one shorter."""
    for start in range(0, count, len(values)):
        step = min(len(values), count - start)
        stream.append_many(values if step == len(values) else values[:step])
        progress.advance(step)
    return count


def read_batches(stream: Stream, progress: Progress) -> int:
    """Get every batch, as views."""
    count = 0
    for batch in stream.read():
        count += len(batch)
        progress.advance(len(batch))
    return count


def iterate_values(stream: Stream, progress: Progress) -> int:
    """Make every value an object of Python."""
    count = 0
    for batch in stream.read():
        for _ in batch.values:
            count += 1
        progress.advance(len(batch))
    return count


@contextlib.contextmanager
def processes(path: str, args: argparse.Namespace) -> Iterator[Callable[[Progress], int]]:
    """Start processes that wait, and yield what makes them append and waits for their end."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    share: int = max(1, args.records // args.processes)
    members: list[tuple[Any, Any]] = []
    try:
        for _ in range(args.processes):
            ours, theirs = context.Pipe()
            arguments = (path, args.size, args.batch, share, theirs)
            member = context.Process(target=append_in_process, args=arguments, daemon=True)
            member.start()
            theirs.close()
            members.append((member, ours))
        for _, pipe in members:
            pipe.recv()

        def go(progress: Progress) -> int:
            for _, pipe in members:
                pipe.send("go")
            for _, pipe in members:
                progress.advance(pipe.recv())
            return share * len(members)

        yield go
    finally:
        for member, pipe in members:
            pipe.close()
            member.join(timeout=10)


def append_in_process(path: str, size: int, batch: int, count: int, pipe: Any) -> None:
    """Append in a process of our own, when told to."""
    import millstream

    with contextlib.suppress(KeyboardInterrupt, EOFError), millstream.open(path) as store:
        stream = store.stream("shared", partitions=1)
        values = [os.urandom(size)] * batch
        pipe.send("ready")
        pipe.recv()
        pipe.send(append_batches(stream, values, count, NoProgress()))


def describe_machine(directory: str) -> dict[str, object]:
    """Return what the figures depend on."""
    import platform

    from millstream.disk import files

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system": files.file_system(directory),
    }


def cpu_name() -> str:
    """Return the name of the processor as the kernel tells it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return os.uname().machine
