"""`bench`: how fast this machine appends and reads, said with all that the figures depend on.

It gives first figures. The project's benchmarks, with rivals and limits, are in benchmarks/.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from millstream.cli.output import (
    Column,
    Output,
    Progress,
    count_text,
    rate_text,
    seconds_text,
    size_text,
)
from millstream.cli.records import count_argument

if TYPE_CHECKING:
    from millstream import Store, Stream

    Result: TypeAlias = tuple[str, int, float]
    """What was done, how often, and in how many seconds."""
    Measure: TypeAlias = Callable[[Output, Store, str, argparse.Namespace], Iterator[Result]]

SINGLES_SECONDS = 3.0  # appends one at a time end then; at level sync a million would take minutes


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
    return carry_out(args, measure, "records", "value", processes=args.processes)


def carry_out(
    args: argparse.Namespace, measure: Measure, unit: str, content: str, **more: object
) -> int:
    """Measure in a temporary store, then print what came of it and what it depends on."""
    import shutil
    import tempfile

    import millstream

    output = Output(args.json)
    directory = tempfile.mkdtemp(prefix="millstream-bench-", dir=args.dir)
    try:
        path = os.path.join(directory, "store")
        with millstream.open(path, durability=args.durability) as store:
            results = list(measure(output, store, path, args))
        machine = describe_machine(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if args.json:
        output.json(
            {
                "version": millstream.__version__,
                "durability": args.durability,
                f"{content}_bytes": args.size,
                f"batch_{unit}": args.batch,
                **more,
                "machine": machine,
                "results": [
                    {
                        "what": what,
                        unit: count,
                        "seconds": seconds,
                        f"{unit}_per_second": count / seconds,
                        "bytes_per_second": count * args.size / seconds,
                    }
                    for what, count, seconds in results
                ],
            }
        )
        return 0
    output.line(
        f"Durability level {args.durability}, {content}s of {args.size:,} bytes, "
        f"{args.batch:,} a batch",
        "bold",
    )
    output.line(
        f"{machine['cpu']}, {machine['cores']} cores; Linux {machine['kernel']}, "
        f"{machine['file_system']}; Python {machine['python']}"
    )
    output.gap()
    titles = (unit.capitalize(), "Time", "Rate", "Each", f"{content.capitalize()}s")
    output.table(
        [Column("Work"), *(Column(title, right=True) for title in titles)],
        [
            (
                what,
                count_text(count),
                seconds_text(seconds),
                rate_text(count, seconds),
                seconds_text(seconds / count),
                f"{size_text(count * args.size / seconds)}/s",
            )
            for what, count, seconds in results
        ],
    )
    return 0


def timed(
    output: Output, what: str, most: int, work: Callable[[Progress], int], unit: str = "records"
) -> Result:
    """Do one kind of work, under a progress bar."""
    with output.progress(what, most, unit=unit) as progress:
        began = time.perf_counter()
        count = work(progress)
        return what, count, time.perf_counter() - began


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
    from millstream.cli.output import NoProgress

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
