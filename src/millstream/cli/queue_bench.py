"""`queue bench`: how fast this machine puts and takes; a first figure, as `bench` is."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from millstream.cli.bench import (
    POINT_SECONDS,
    SINGLES_SECONDS,
    Result,
    Work,
    add_arguments,
    carry_out,
    step_of,
    time_calls,
    timed,
    turns_of,
)
from millstream.cli.output import NoProgress, Output, Progress

if TYPE_CHECKING:
    from millstream import Queue, Store

STEP = 1_000  # messages that stand in the queue at most while one process puts and takes


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "bench",
        help="measure putting and taking on this machine",
        description="Put messages into a temporary queue and take them, in several ways.",
    )
    add_arguments(parser, "messages", 300_000, "payload", 100)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, then print."""
    charts = (("Messages", ("",)),)
    call = "put, get and ack"
    return carry_out(
        args, Work("messages", "payload", charts, measure, call, time_messages, take_sized)
    )


def measure(output: Output, store: Store, path: str, args: argparse.Namespace) -> Iterator[Result]:
    """Yield each kind of work."""
    count, batch = args.messages, args.batch
    payload = os.urandom(args.size)
    queue = store.queue("bench")

    def each(what: str, work: Callable[[Progress], int]) -> Result:
        return timed(output, what, count, work, "messages")

    yield each("put, get, ack", partial(singles, queue, payload, count))
    what = f"put_many, get_many, ack_many of {batch:,}"
    yield each(what, partial(batches, queue, payload, batch, count))
    for title, step in (
        ("from another process", 1),
        (f"from another process, {batch:,} a call", batch),
    ):
        with producer(path, args.size, step, count) as go:
            yield each(title, partial(taken, queue, step, go))


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


def time_messages(store: Store, args: argparse.Namespace) -> list[float]:
    """Seconds of each message that is put, taken and acknowledged."""
    queue, payload = store.queue("timed"), os.urandom(args.size)

    def call() -> None:
        queue.put(payload)
        queue.get().ack()

    return time_calls(call, args.messages)


def take_sized(store: Store, args: argparse.Namespace, size: int) -> Iterator[Result]:
    """Put, take and acknowledge messages of a size, many at a time."""
    queue, payload = store.queue("sized"), os.urandom(size)
    step = step_of(args, size)
    count, began = 0, time.perf_counter()
    for _ in range(turns_of(args.messages, step, size)):
        count += batches(queue, payload, step, step, NoProgress())
        if time.perf_counter() - began > POINT_SECONDS:
            break
    yield Result("put_many, get_many, ack_many", count, time.perf_counter() - began)


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
