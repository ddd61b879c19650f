"""What the processes of the crash tests do, and how they are started, killed and judged.

Run as a program it is one worker: `python crash_workers.py FUNCTION JSON-ARGUMENTS`. A worker says
what it did with `write(2)` to a history file, before and after each operation, so that a SIGKILL
leaves a true account: `? value` was tried, `= value partition epoch offset` was acknowledged.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import millstream

DEADLINE_S = 60.0
WORK_S = 1500.0
"""For a worker that has much to do: only ends what hangs, however slow the machine is."""


# --- starting and killing -------------------------------------------------------------------------


def start(
    function: str, *arguments: object, prefix: tuple[str, ...] = (), **options: object
) -> subprocess.Popen:
    """Start a worker; its standard output is a pipe."""
    command = [*prefix, sys.executable, __file__, function, json.dumps(arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


def run(function: str, *arguments: object, prefix: tuple[str, ...] = (), **options: object) -> str:
    """Run a worker to its end; what it printed. It must succeed."""
    worker = start(function, *arguments, prefix=prefix, **options)
    text, _ = worker.communicate(timeout=WORK_S)
    assert worker.returncode == 0, f"{function} ended with {worker.returncode}: {text}"
    return text


def kill(worker: subprocess.Popen) -> None:
    """SIGKILL, and wait until the kernel has let go of all it held."""
    worker.kill()
    worker.wait(DEADLINE_S)
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def stop(worker: subprocess.Popen) -> int:
    """Ask a worker to end in good order: the end of its standard input is the sign."""
    with contextlib.suppress(OSError):
        worker.stdin.close()
    code = worker.wait(DEADLINE_S)
    worker.stdout.close()
    return code


def line(worker: subprocess.Popen) -> str:
    """The next line that a worker prints."""
    text = worker.stdout.readline()
    assert text, f"the worker ended with {worker.wait(DEADLINE_S)}"
    return text.strip()


def until(condition, what: str, seconds: float = DEADLINE_S):
    """Poll for an event, with a deadline; what the condition gave."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        os.sched_yield()


def report(ops: int, faults: int, seed: int, lost: int = 0, dup: int = 0) -> None:
    """The line that each fault test prints."""
    print(f"ops={ops} faults={faults} lost={lost} dup={dup} seed={seed}")


def seed_of(name: str) -> int:
    """The seed of a test: the same in each run, or MILLSTREAM_SEED; printed, to be given again.

    The suite fails because of what was changed, not because of the day. The nightly lane gives
    another one each night.
    """
    seed = int(os.environ.get("MILLSTREAM_SEED") or 1)
    print(f"{name}: MILLSTREAM_SEED={seed}")
    return seed


def need(*tools: str, root: bool = False) -> None:
    """Skip where a tool or the right is missing; in CI that is a failure."""
    import shutil

    import pytest

    missing = [tool for tool in tools if shutil.which(tool) is None]
    missing += ["root"] if root and os.geteuid() != 0 else []
    if missing:
        reason = f"this test needs {', '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


# --- judging --------------------------------------------------------------------------------------


def histories(directory: Path) -> tuple[dict[bytes, tuple[int, int, int]], set[bytes]]:
    """(acknowledged: value -> position, all that was tried) of every history in a directory."""
    acknowledged: dict[bytes, tuple[int, int, int]] = {}
    tried: set[bytes] = set()
    for path in sorted(directory.glob("*.history")):
        for text in path.read_bytes().split(b"\n")[:-1]:
            parts = text.split()
            if parts[0] == b"?":
                tried.add(parts[1])
            else:
                acknowledged[parts[1]] = (int(parts[2]), int(parts[3]), int(parts[4]))
    return acknowledged, tried


def judge(
    path: Path | str, history: Path, stream: str = "s", *, may_lose: bool = False
) -> tuple[int, int]:
    """Hold a quiet store to its history: nothing lost, invented, double or out of order.

    Returns: (records, how many of the acknowledged ones were not there; 0 unless `may_lose`).
    """
    acknowledged, tried = histories(history)
    seen: dict[bytes, tuple[int, int, int]] = {}
    last: dict[tuple[int, bytes], int] = {}
    with millstream.open(path) as store:
        opened = store.stream(stream)
        for partition in range(opened.partitions):
            following = 0
            for batch in opened.read(partition=partition):
                for offset, value in zip(batch.offsets, batch.values, strict=True):
                    value = bytes(value).split(b" ")[0]
                    assert offset == following, (
                        f"partition {partition}: offset {offset} after {following - 1}"
                    )
                    following += 1
                    assert value in tried, f"never appended: {value!r}"
                    assert value not in seen, f"twice: {value!r}"
                    seen[value] = (partition, int(batch.epoch), int(offset))
                    producer, _, number = value.partition(b":")
                    before = last.get((partition, producer), -1)
                    assert int(number) > before, f"{value!r} after {before} of its producer"
                    last[partition, producer] = int(number)
            assert opened.next_offset(partition) == following
    lost = [value for value in acknowledged if value not in seen]
    assert may_lose or not lost, f"{len(lost)} lost, the first {lost[:3]}"
    for value, position in acknowledged.items():
        if value in seen:
            assert seen[value][0] == position[0] and seen[value][2] == position[2], (
                value,
                seen[value],
                position,
            )
    return len(seen), len(lost)


def verified(path: Path | str) -> None:
    """The second reader finds no problem."""
    from millstream import inspect

    problems = inspect.verify(path).problems
    assert not problems, "\n".join(map(str, problems))


# --- the workers ----------------------------------------------------------------------------------


class History:
    """An account that a kill cannot falsify."""

    def __init__(self, directory: str, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.descriptor = os.open(os.path.join(directory, f"{name}.history"), flags, 0o600)

    def tried(self, *values: bytes) -> None:
        os.write(self.descriptor, b"".join(b"? %s\n" % value for value in values))

    def acknowledged(self, position, *values: bytes) -> None:
        partition, epoch, offset, *_ = position
        lines = (
            b"= %s %d %d %d\n" % (value, partition, epoch, offset + i)
            for i, value in enumerate(values)
        )
        os.write(self.descriptor, b"".join(lines))


def ended() -> bool:
    """Did the parent close our standard input?"""
    import select

    return bool(select.select([sys.stdin], [], [], 0)[0])


def write_for_ever(path: str, history: str, name: str, seed: int, options: dict) -> None:
    """Append until standard input ends: single records, and batches of which some force a roll."""
    dice = random.Random(f"{seed} {name}")
    account = History(history, name)
    number = 0
    with millstream.open(path, durability=options.get("durability", "process")) as store:
        stream = store.stream("s", partitions=options.get("partitions", 1), segment_bytes=1 << 16)
        print("open", flush=True)
        while number < options.get("most", 1 << 60) and not ended():
            partition = dice.randrange(stream.partitions)
            count = dice.choice((1, 1, 1, 3, 20))
            values = [b"%s:%d" % (name.encode(), number + i) for i in range(count)]
            fill = b" " + b"x" * dice.choice((0, 10, 100, 1000, 5000))
            number += count
            account.tried(*values)
            if count == 1:
                position = stream.append(values[0] + fill, partition=partition)
            else:
                (position,) = stream.append_many(
                    [value + fill for value in values], partition=partition
                )
            account.acknowledged(position, *values)


def read_for_ever(path: str, partition: int) -> None:
    """Follow one partition: dense offsets, each producer in order; until standard input ends."""
    following, last = 0, {}
    with millstream.open(path) as store:
        stream = store.stream("s")
        print("open", flush=True)
        while not ended():
            for batch in stream.read(
                partition=partition, start=following, follow=True, timeout=0.05
            ):
                for offset, value in zip(batch.offsets, batch.values, strict=True):
                    assert offset == following, (offset, following)
                    following += 1
                    producer, _, number = bytes(value).split(b" ")[0].partition(b":")
                    assert int(number) > last.get(producer, -1), (value, last[producer])
                    last[producer] = int(number)
        print(following, flush=True)


def append_each_line(path: str, partition: int, durability: str) -> None:
    """Append what standard input asks for, a line a record; answer "ok OFFSET" or the error."""
    store = millstream.open(path)
    stream = store.stream("s")
    print("open", flush=True)
    for text in sys.stdin:
        try:
            position = stream.append(
                text.strip().encode(), partition=partition, durability=durability, timeout=5
            )
            print("ok", position.offset, flush=True)
        except millstream.MillstreamError as error:
            print(type(error).__name__, flush=True)
    store.close()
    print("closed", flush=True)


def ask(worker: subprocess.Popen, text: str) -> str:
    """Let an `append_each_line` worker append a record; its answer."""
    worker.stdin.write(text + "\n")
    worker.stdin.flush()
    return line(worker)


def open_and_recover(path: str) -> None:
    """Open a store, which recovers it, and say how many records each partition has."""
    with millstream.open(path) as store:
        stream = store.stream("s")
        print(
            json.dumps([stream.next_offset(index) for index in range(stream.partitions)]),
            flush=True,
        )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent)]  # as pytest has them
    module = sys.modules[__name__]
    name = sys.argv[1]
    if "." in name:
        import importlib

        module_name, name = name.rsplit(".", 1)
        module = importlib.import_module(module_name)
    getattr(module, name)(*json.loads(sys.argv[2]))
