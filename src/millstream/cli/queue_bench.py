"""`queue bench`: how fast this machine puts and takes; a first look, as `bench` is."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from millstream.cli.bench import describe_machine, positive, size_argument
from millstream.cli.output import (
    Column,
    Output,
    Progress,
    count_text,
    rate_text,
    seconds_text,
)

if TYPE_CHECKING:
    from millstream import Queue, Store

STEP = 1_000  # messages that stand in the queue at most while one process puts and takes
SINGLES_SECONDS = 3.0


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "bench",
        help="measure putting and taking on this machine",
        description="Put messages into a temporary queue and take them, in several ways.",
    )
    parser.add_argument("--messages", type=positive, default=300_000, metavar="N")
    parser.add_argument("--size", type=size_argument, default=100, metavar="B", help="of a payload")
    parser.add_argument("--batch", type=positive, default=100, metavar="N", help="messages a call")
    parser.add_argument(
        "--durability", choices=("process", "interval", "sync"), default="process", metavar="LEVEL"
    )
    parser.add_argument("--dir", metavar="DIR", help="make the temporary store below DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, then print."""
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
                "payload_bytes": args.size,
                "batch_messages": args.batch,
                "machine": machine,
                "results": [
                    {
                        "what": what,
                        "messages": count,
                        "seconds": seconds,
                        "messages_per_second": count / seconds,
                    }
                    for what, count, seconds in results
                ],
            }
        )
        return 0
    output.line(f"Durability level {args.durability}, payloads of {args.size:,} bytes", "bold")
    output.line(
        f"{machine['cpu']}, {machine['cores']} cores; Linux {machine['kernel']}, "
        f"{machine['file_system']}; Python {machine['python']}"
    )
    output.line()
    titles = ("Messages", "Time", "Rate", "Each")
    output.table(
        [Column("Work"), *(Column(title, right=True) for title in titles)],
        [
            (
                what,
                count_text(count),
                seconds_text(seconds),
                rate_text(count, seconds),
                seconds_text(seconds / count),
            )
            for what, count, seconds in results
        ],
    )
    return 0


def measure(
    output: Output, store: Store, path: str, args: argparse.Namespace
) -> Iterator[tuple[str, int, float]]:
    """Yield (what, messages, seconds) of each kind of work."""
    payload = os.urandom(args.size)
    queue = store.queue("bench")

    def timed(what: str, work: Callable[[Progress], int]) -> tuple[str, int, float]:
        with output.progress(what, args.messages, unit="messages") as progress:
            began = time.perf_counter()
            count = work(progress)
            return what, count, time.perf_counter() - began

    yield timed("put, get, ack", lambda p: singles(queue, payload, args.messages, p))
    what = f"put_many, get_many, ack_many of {args.batch:,}"
    yield timed(what, lambda p: batches(queue, payload, args.batch, args.messages, p))
    for title, batch in (
        ("from another process", 1),
        (f"from another process, {args.batch:,} a call", args.batch),
    ):
        with producer(path, args.size, batch, args.messages) as go:
            yield timed(title, partial(taken, queue, batch, go))


def singles(queue: Queue, payload: bytes, count: int, progress: Progress) -> int:
    """Put, take and acknowledge one at a time, for a few seconds at most."""
    put, get = queue.put, queue.get
    done = 0
    end = time.perf_counter() + SINGLES_SECONDS
    while done < count and time.perf_counter() < end:
        step = min(STEP if done else 10, count - done)
        for _ in range(step):
            put(payload)
            get().ack()
        done += step
        progress.advance(step)
    return done


def batches(queue: Queue, payload: bytes, batch: int, count: int, progress: Progress) -> int:
    """Put, take and acknowledge many at a time."""
    done = 0
    while done < count:
        step = min(batch, count - done)
        queue.put_many([payload] * step)
        left = step
        while left:
            messages = queue.get_many(left, timeout=1.0)
            queue.ack_many(messages)
            left -= len(messages)
        done += step
        progress.advance(step)
    return done


def taken(queue: Queue, batch: int, go: Callable[[], int], progress: Progress) -> int:
    """Take and acknowledge all that another process puts."""
    count, done = go(), 0
    while done < count:
        if batch == 1:
            queue.get(timeout=30.0).ack()
            step = 1
        else:
            messages = queue.get_many(batch, timeout=30.0)
            queue.ack_many(messages)
            step = len(messages)
        done += step
        if done % STEP < step:
            progress.advance(STEP)
    return done


@contextlib.contextmanager
def producer(path: str, size: int, batch: int, count: int) -> Iterator[Callable[[], int]]:
    """Start a process that puts once it is told to, and yield what tells it; it returns `count`."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=put_in_process, args=(path, size, batch, count, theirs), daemon=True
    )
    process.start()
    theirs.close()
    try:
        ours.recv()

        def go() -> int:
            ours.send("go")
            return count

        yield go
    finally:
        ours.close()
        process.join(timeout=10)


def put_in_process(path: str, size: int, batch: int, count: int, pipe: Any) -> None:
    """Put in a process of our own, when told to."""
    import millstream

    with contextlib.suppress(KeyboardInterrupt, EOFError), millstream.open(path) as store:
        queue = store.queue("bench")
        payload = os.urandom(size)
        pipe.send("ready")
        pipe.recv()
        for start in range(0, count, batch):
            step = min(batch, count - start)
            if step == 1:
                queue.put(payload)
            else:
                queue.put_many([payload] * step, timeout=None)
