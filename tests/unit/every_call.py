"""Every public call under one condition: `python every_call.py CONDITION DIRECTORY`.

The calls are found in `millstream.__all__`: a method without an entry in `CALLS` fails. An entry
prepares, and returns what is called under the condition. Only documented exceptions may come out,
and afterwards the store has what they say. For test_every_call.py.
"""

import asyncio
import contextlib
import faulthandler
import functools
import gc
import importlib.util
import linecache
import os
import queue
import resource
import signal
import sys
import threading
import traceback

import millstream
from millstream import compat, inspect

try:
    import _testcapi
except ImportError:  # of CPython's own tests; not everyone packs them
    _testcapi = None

FINE = (millstream.MillstreamError, queue.Full, queue.Empty)
PACKAGE = os.path.dirname(millstream.__file__) + os.sep
NO_FILES = {
    "Advice", "Compaction", "CompactionProgress", "CompactionResult", "DeadLetter",
    "PartitionStats", "Position", "Put", "QueueStats", "Retention", "RetryPolicy", "Span",
    "Record", "StoredMessage", "StreamStats", "GroupMember", "GroupPartition",
    "GroupStats", "StoreProcess", "StoreStats",
}  # fmt: skip
"""Values: they touch neither files nor threads."""
ELSEWHERE = {"position_in"}
"""Tried with the database that it needs in a test of its own."""
if importlib.util.find_spec("pyarrow"):
    importlib.import_module("pyarrow")  # before there is no room for it


class World:
    """A store with one of everything."""

    def __init__(self, path, *, mode="rw"):
        self.path = os.fspath(path)
        self.number = 0
        self.store = millstream.open(self.path, mode=mode, durability="sync")
        if mode == "r":  # of one that was made before
            self.stream, self.queue = self.store.stream("s"), self.store.queue("q")
            return
        self.stream = self.store.stream("s", partitions=2, segment_bytes=1 << 16)
        self.queue = self.store.queue("q")
        for _ in range(4):
            self.stream.append(bytes(20_000), partition=0)
        self.stream.append(b"1", key=b"k")
        self.queue.put(b"0", delay=1000)

    @functools.cached_property
    def consumer(self):
        consumer = self.stream.consumer(group="g", timeout=0)
        consumer.poll(0)
        return consumer

    @functools.cached_property
    def producer(self):
        return self.stream.producer(id="p")

    @functools.cached_property
    def view(self):
        return self.stream.view()

    @property
    def group(self):
        assert not self.store.writable or self.consumer.group
        return self.stream.group("g")

    def other_group(self):
        self.stream.consumer(group="other", timeout=0).close()
        return self.stream.group("other")

    @functools.cached_property
    def items(self):
        return compat.Queue(path=self.path, name="c")

    def message(self):
        self.queue.resume()
        self.queue.put(b"m")
        return self.queue.get(timeout=5)

    def dead(self):
        message = self.message()
        message.reject("dead")
        return message.id

    def batch(self):
        return next(self.stream.read())

    def pipe(self):
        return self.store.pipe(self.queue, lambda message: message.value, self.stream)

    def mirror(self):
        with millstream.open(f"{self.path}-mirrored") as far:
            far.stream("far", partitions=self.stream.partitions)
        return self.store.mirror(f"file://{self.path}-mirrored", "far", into=self.stream)

    def relay(self):
        return self.store.relay(self.stream, to=f"file://{self.path}-relayed")

    def next(self):
        self.number += 1
        return self.number

    @contextlib.contextmanager
    def transaction(self, *work):
        with self.store.transaction() as tx:
            for one in work:
                one(tx)
        yield

    def records(self):
        """What is stored: of the stream and of the queue."""
        store = millstream.open(self.path, mode="r")
        with store:
            stream = store.stream("s")
            found = sum(stream.next_offset(i) for i in range(stream.partitions))
            return found, len(store.queue("q"))

    def settle(self):
        """Have done or withdrawn what a transaction left to who comes next."""
        self.queue._decide_undecided()

    def end(self):
        for name in ("view", "consumer"):
            if name in vars(self):
                getattr(self, name).close()
        self.store.close()


def committed(world, work, **options):
    """A transaction that does one thing."""

    def commit():
        with world.store.transaction(**options) as tx:
            work(tx)

    return commit


def all_at_once(world, **options):
    """A transaction that does one thing of each kind, one of them twice."""
    message = world.message()
    world.stream.append_many([b"1", b"2"], keys=[b"1", b"2"])
    world.consumer.poll(0)

    def work(tx):
        tx.append_many(world.stream, [b"1", b"2", b"3"], keys=[b"1", b"2", b"3"])
        tx.append_many(world.stream, [b"1", b"2", b"3"], keys=[b"1", b"2", b"3"])
        tx.put(world.queue, b"t")
        tx.put(world.queue, b"t")
        tx.ack(message)
        tx.commit(world.consumer)

    return committed(world, work, **options)


def rolled_back(world):
    def roll_back():
        with world.store.transaction() as tx:
            tx.append(world.stream, b"1")
            tx.rollback()

    return roll_back


def drained(iterator):
    return lambda: [*iterator()]


def work(message):
    """What workers call; their processes import it by its name."""


def queue_of_work(world):
    queue = world.store.queue(f"work{world.next()}")
    queue.put(b"1")
    return queue


def run_workers(world):
    """Told to end after a while: what cannot be done meanwhile is tried again and again."""
    queue = queue_of_work(world)
    queue.worker()(work)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()

    def run():
        try:
            millstream.run(queue, until_empty=True, grace=1)
        finally:
            timer.cancel()

    return run


def started(world, **options):
    """Start a worker, and end it whatever came of that."""
    worker = millstream.Worker(queue_of_work(world), work, **options)

    def start():
        try:
            worker.start()
        finally:
            before = sys.gettrace()
            sys.settrace(None)
            with contextlib.suppress(millstream.WorkerError):  # it is what start has raised
                worker.stop(grace=5)
            sys.settrace(before)

    return start


def stopped(world):
    worker = millstream.Worker(queue_of_work(world), work)
    worker.start()
    return functools.partial(worker.stop, grace=5)


def in_a_loop(make):
    """Call a coroutine function in an event loop, which is there before and ends after."""
    loop = asyncio.new_event_loop()

    def call():
        try:
            loop.run_until_complete(make())
        finally:
            before = sys.gettrace()
            sys.settrace(None)
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
            sys.settrace(before)

    return call


async def awaited(call):
    await call()


async def within(getting):
    async with getting:
        pass


async def drained_by_a_loop(batches):
    async for _ in batches():
        pass


def appended_arrow(world):
    world.stream.append(b"1", partition=1)
    batch = next(world.stream.read(partition=1))
    return functools.partial(world.stream.append_arrow, batch.arrow(("key", "value")))


CALLS = {
    "open": lambda w: lambda: millstream.open(f"{w.path}-{w.next()}").close(),
    "open again": lambda w: lambda: millstream.open(w.path).close(),
    "open to read": lambda w: lambda: millstream.open(w.path, mode="r").close(),
    "temporary": lambda w: lambda: millstream.temporary().close(),
    "run": run_workers,
    "inspect.verify": lambda w: lambda: inspect.verify(w.path),
    "Store.advice": lambda w: w.store.advice,
    "Store.stats": lambda w: w.store.stats,
    "Store.processes": lambda w: w.store.processes,
    "Store.backup": lambda w: lambda: w.store.backup(f"{w.path}-copy-{w.next()}"),
    "Store.close": None,  # a condition of its own
    "Store.drop_queue": lambda w: (w.store.queue("d"), lambda: w.store.drop_queue("d"))[1],
    "Store.drop_stream": lambda w: (w.store.stream("d"), lambda: w.store.drop_stream("d"))[1],
    "Store.flush": lambda w: w.store.flush,
    "Store.pipe": lambda w: w.pipe,
    "Store.queue": lambda w: lambda: w.store.queue(f"q{w.next()}"),
    "Store.queues": lambda w: w.store.queues,
    "Store.mirror": lambda w: w.mirror,
    "Store.relay": lambda w: w.relay,
    "Store.require": lambda w: lambda: w.store.require("queue.delay"),
    "Store.stream": lambda w: lambda: w.store.stream(f"s{w.next()}"),
    "Store.streams": lambda w: w.store.streams,
    "Store.transaction": lambda w: committed(w, lambda tx: None),
    "Stream.add_partitions": lambda w: lambda: w.store.stream(f"s{w.next()}").add_partitions(1),
    "Stream.alter": lambda w: lambda: w.stream.alter(segment_bytes=1 << 16),
    "Stream.append": lambda w: lambda: w.stream.append(b"a"),
    "Stream.append and roll": lambda w: lambda: w.stream.append(bytes(60_000)),
    "Stream.append_arrow": appended_arrow,
    "Stream.aread": lambda w: in_a_loop(
        lambda: drained_by_a_loop(lambda: w.stream.aread(follow=True, timeout=0.05))
    ),
    "Stream.append_many": lambda w: lambda: w.stream.append_many([b"a", b"b"], keys=[b"a", b"b"]),
    "Stream.compact": lambda w: w.stream.compact,
    "Stream.consumer": lambda w: lambda: w.stream.consumer(group="n", timeout=0).close(),
    "Stream.delete_before": lambda w: lambda: w.stream.delete_before(
        millstream.Position(0, 1, 1)
    ),
    "Stream.durable_offset": lambda w: lambda: w.stream.durable_offset(0),
    "Stream.enforce_retention": lambda w: w.stream.enforce_retention,
    "Stream.first_offset": lambda w: lambda: w.stream.first_offset(0),
    "Stream.flush": lambda w: w.stream.flush,
    "Stream.group": lambda w: (w.group, lambda: w.stream.group("g"))[1],
    "Stream.groups": lambda w: w.stream.groups,
    "Stream.next_offset": lambda w: lambda: w.stream.next_offset(0),
    "Stream.get": lambda w: lambda: w.stream.get(0, 0),
    "Stream.get_many": lambda w: lambda: w.stream.get_many(0, [3, 0]),
    "Stream.offset_at": lambda w: lambda: w.stream.offset_at(0, 0),
    "Stream.partition_for": lambda w: lambda: w.stream.partition_for(b"k"),
    "Stream.producer": lambda w: lambda: w.stream.producer(id=f"p{w.next()}"),
    "Stream.read": lambda w: drained(w.stream.read),
    "Stream.stats": lambda w: w.stream.stats,
    "Stream.view": lambda w: lambda: w.stream.view().close(),
    "Stream.wait_durable": lambda w: functools.partial(
        w.stream.wait_durable, w.stream.append(b"1")
    ),
    "Producer.append": lambda w: functools.partial(w.producer.append, b"p", sequence=w.next()),
    "Producer.append_many": lambda w: functools.partial(
        w.producer.append_many, [b"p"], first_sequence=w.next()
    ),
    "Producer.close": lambda w: w.stream.producer(id="q").close,
    "Producer.last_sequence": lambda w: lambda: w.producer.last_sequence,
    "Producer.last_sequences": lambda w: lambda: w.producer.last_sequences,
    "Queue.ack_many": lambda w: functools.partial(w.queue.ack_many, [w.message()]),
    "Queue.alter": lambda w: lambda: w.queue.alter(lease=20),
    "Queue.alter capacity": lambda w: lambda: w.queue.alter(capacity=w.queue.capacity + 1),
    "Queue.aget": lambda w: (w.queue.put(b"1"), in_a_loop(
        lambda: awaited(lambda: w.queue.aget(timeout=0.05))
    ))[1],
    "Queue.aget of none": lambda w: in_a_loop(
        lambda: awaited(lambda: w.store.queue("none").aget(timeout=0.05))
    ),
    "Queue.aput": lambda w: in_a_loop(lambda: awaited(lambda: w.queue.aput(b"1", timeout=0))),
    "Queue.worker": lambda w: lambda: w.store.queue("work").worker()(work),
    "Queue.cancel": lambda w: functools.partial(w.queue.cancel, w.queue.put(b"1")),
    "Queue.flush": lambda w: w.queue.flush,
    "Queue.get": lambda w: (w.queue.put(b"1"), lambda: w.queue.get(timeout=0).ack())[1],
    "Queue.get_many": lambda w: (w.queue.put(b"1"), lambda: w.queue.get_many(5, timeout=0))[1],
    "Queue.join": lambda w: lambda: w.queue.join(timeout=0),
    "Queue.pause": lambda w: (w.queue.resume(), w.queue.pause)[1],
    "Queue.peek": lambda w: w.queue.peek,
    "Queue.purge": lambda w: w.queue.purge,
    "Queue.put": lambda w: lambda: w.queue.put(b"1", timeout=0),
    "Queue.put_many": lambda w: lambda: w.queue.put_many([b"1", b"2"]),
    "Queue.resume": lambda w: w.queue.resume,
    "Queue.stats": lambda w: w.queue.stats,
    "DeadLetters.list": lambda w: (w.dead(), w.queue.dead.list)[1],
    "DeadLetters.peek": lambda w: functools.partial(w.queue.dead.peek, w.dead()),
    "DeadLetters.redrive": lambda w: (w.dead(), lambda: w.queue.dead.redrive())[1],
    "DeadLetters.purge": lambda w: (w.dead(), lambda: w.queue.dead.purge())[1],
    "Message.ack": lambda w: w.message().ack,
    "Message.nack": lambda w: w.message().nack,
    "Message.reject": lambda w: w.message().reject,
    "Message.release": lambda w: w.message().release,
    "Message.extend": lambda w: w.message().extend,
    "Consumer.apoll": lambda w: (
        w.consumer, in_a_loop(lambda: awaited(lambda: w.consumer.apoll(0.05)))
    )[1],
    "Consumer.close": lambda w: w.stream.consumer(group="n", timeout=0).close,
    "Consumer.commit": lambda w: (w.consumer.poll(0), w.consumer.commit)[1],
    "Consumer.lag": lambda w: w.consumer.lag,
    "Consumer.pause": lambda w: w.consumer.pause,
    "Consumer.poll": lambda w: (w.consumer, lambda: w.consumer.poll(0))[1],
    "Consumer.resume": lambda w: w.consumer.resume,
    "Consumer.rewind": lambda w: w.consumer.rewind,
    "Consumer.seek": lambda w: functools.partial(w.consumer.seek, "earliest"),
    "Group.lag": lambda w: w.group.lag,
    "Group.members": lambda w: w.group.members,
    "Group.partitions": lambda w: w.group.partitions,
    "Group.stats": lambda w: w.group.stats,
    "Group.positions": lambda w: w.group.positions,
    "Group.remove": lambda w: w.other_group().remove,
    "Group.seek": lambda w: functools.partial(w.other_group().seek, "earliest"),
    "Transaction.ack": lambda w: committed(
        w, functools.partial(lambda m, tx: tx.ack(m), w.message())
    ),
    "Transaction.append": lambda w: committed(w, lambda tx: tx.append(w.stream, b"t")),
    "Transaction.append_many": lambda w: committed(
        w, lambda tx: tx.append_many(w.stream, [b"1", b"2"], keys=[b"1", b"2"])
    ),
    "Transaction.commit": lambda w: (
        w.consumer.poll(0), committed(w, lambda tx: tx.commit(w.consumer))
    )[1],
    "Transaction.put": lambda w: committed(w, lambda tx: tx.put(w.queue, b"t")),
    "Transaction of all": all_at_once,
    "Transaction of all at process": lambda w: all_at_once(w, durability="process"),
    "Transaction.rollback": rolled_back,
    "View.as_dict": lambda w: w.view.as_dict,
    "View.close": lambda w: w.stream.view().close,
    "View.get": lambda w: functools.partial(w.view.get, b"k"),
    "View.items": lambda w: w.view.items,
    "View.key_list": lambda w: w.view.key_list,
    "View.keys": lambda w: w.view.keys,
    "View.values": lambda w: w.view.values,
    "View.wait_for": lambda w: functools.partial(w.view.wait_for, w.stream.append(b"1"), timeout=5),
    "Mirror.check": lambda w: functools.partial(w.mirror().check, w.stream),
    "Mirror.close": lambda w: w.mirror().close,
    "Mirror.end": lambda w: w.mirror().end,
    "Mirror.run": None,  # tries again for ever, whatever a source lacks
    "Mirror.start": lambda w: w.mirror().start,
    "Mirror.stop": lambda w: w.mirror().stop,
    "Relay.check": lambda w: functools.partial(w.relay().check, w.queue),
    "Relay.close": lambda w: w.relay().close,
    "Relay.end": lambda w: w.relay().end,
    "Relay.run": None,  # tries again for ever, whatever a target lacks
    "Relay.start": lambda w: w.relay().start,
    "Relay.stop": lambda w: w.relay().stop,
    "Pipe.close": lambda w: w.pipe().close,
    "Pipe.run": lambda w: functools.partial(w.pipe().run, timeout=0),
    "Pipe.step": lambda w: w.pipe().step,
    "Pipe.stop": lambda w: w.pipe().stop,
    "Batch.arrow": lambda w: w.batch().arrow().__arrow_c_array__,
    "Batch.to_arrow": (lambda w: w.batch().to_arrow) if "pyarrow" in sys.modules else None,
    "Batch.values_as": lambda w: functools.partial(w.batch().values_as, "S1"),
    "Batch.values": lambda w: functools.partial(list, w.batch().values),
    "Worker.start": started,
    "Worker.start of processes": lambda w: started(w, mode="process"),
    "Worker.stop": stopped,
    "compat.Queue": lambda w: lambda: compat.Queue(path=w.path, name=f"c{w.next()}"),
    "compat.SimpleQueue": lambda w: compat.SimpleQueue,
    "compat.Queue.put": lambda w: functools.partial(w.items.put, 1, timeout=1),
    "compat.Queue.get": lambda w: (w.items.put(1), lambda: w.items.get(timeout=1))[1],
    "compat.Queue.qsize": lambda w: w.items.qsize,
}  # fmt: skip
STORES = {
    "Stream.append": (1, 0), "Stream.append and roll": (1, 0), "Stream.append_many": (2, 0),
    "Producer.append": (1, 0), "Producer.append_many": (1, 0), "Queue.put": (0, 1),
    "Queue.put_many": (0, 2), "Queue.aput": (0, 1), "Transaction.append": (1, 0),
    "Transaction.append_many": (2, 0), "Transaction.put": (0, 1), "Message.ack": (0, -1),
    "Transaction.ack": (0, -1), "Transaction of all": (6, 1),
    "Transaction of all at process": (6, 1),
}  # fmt: skip
"""How many records and messages there are more when it returns; as many as before when it raises
anything but `Indeterminate`."""

READING = {
    "run": lambda w: (w.queue.worker()(work), lambda: millstream.run(w.queue, until_empty=True))[1],
    "Store.drop_queue": lambda w: lambda: w.store.drop_queue("q"),
    "Store.drop_stream": lambda w: lambda: w.store.drop_stream("s"),
    "Stream.add_partitions": lambda w: lambda: w.stream.add_partitions(1),
    "Stream.append_arrow": lambda w: functools.partial(
        w.stream.append_arrow, next(w.stream.read(partition=0)).arrow(("key", "value"))
    ),
    "Stream.wait_durable": lambda w: lambda: w.stream.wait_durable(
        millstream.Position(0, 1, 0), timeout=0.05
    ),
    "Queue.ack_many": lambda w: lambda: w.queue.ack_many([]),
    "Queue.aget": lambda w: in_a_loop(lambda: awaited(lambda: w.queue.aget(timeout=0.05))),
    "Queue.aget of none": lambda w: in_a_loop(lambda: within(w.queue.aget(timeout=0.05))),
    "Queue.cancel": lambda w: lambda: w.queue.cancel(1),
    "Queue.get": lambda w: lambda: w.queue.get(timeout=0.05),
    "Queue.get_many": lambda w: lambda: w.queue.get_many(5, timeout=0.05),
    "Queue.pause": lambda w: w.queue.pause,
    "DeadLetters.list": lambda w: w.queue.dead.list,
    "DeadLetters.peek": lambda w: lambda: w.queue.dead.peek(1),
    "DeadLetters.redrive": lambda w: lambda: w.queue.dead.redrive(),
    "DeadLetters.purge": lambda w: lambda: w.queue.dead.purge(),
    "Group.remove": lambda w: w.group.remove,
    "Group.seek": lambda w: functools.partial(w.group.seek, "earliest"),
    "Transaction.ack": lambda w: committed(w, lambda tx: tx.ack(None)),
    "Transaction of all": lambda w: committed(w, lambda tx: tx.put(w.queue, b"t")),
    "Transaction of all at process": lambda w: committed(w, lambda tx: tx.put(w.queue, b"t")),
    "Transaction.commit": lambda w: committed(w, lambda tx: tx.commit(None)),
    "View.wait_for": lambda w: lambda: w.view.wait_for(millstream.Position(0, 1, 0), timeout=5),
    "Worker.start": lambda w: millstream.Worker(w.queue, work).start,
    "Worker.start of processes": lambda w: millstream.Worker(w.queue, work, mode="process").start,
    "Worker.stop": lambda w: millstream.Worker(w.queue, work).stop,
}  # fmt: skip
"""Of calls whose preparation stores something: what a reader can make of them."""
TO_WRITE = {"open again", "compat.Queue", "compat.Queue.put", "compat.Queue.get",
            "compat.Queue.qsize"}  # fmt: skip
"""What opens the store to write, whatever handle there is."""

REFUSED = (
    "Stream.append", "Stream.append and roll", "Stream.append_many", "Stream.producer",
    "Producer.append", "Producer.append_many", "Queue.put", "Queue.put_many", "Queue.get",
    "Message.ack", "Group.remove", "Transaction.ack", "Transaction.append",
    "Transaction.append_many", "Transaction.commit", "Transaction.put", "Transaction.rollback",
    "Transaction of all", "Transaction of all at process", "Store.transaction",
)  # fmt: skip
"""What is tried with each of its allocations refused."""


def missing():
    """Public calls without an entry."""
    found = []
    for name in millstream.__all__:
        one = getattr(millstream, name)
        if not isinstance(one, type):
            if callable(one) and name not in CALLS and "typing" not in type(one).__module__:
                found.append(name)
            continue
        if issubclass(one, BaseException) or name in NO_FILES:
            continue
        for method in dir(one):
            if method.startswith("_") or method in ELSEWHERE or f"{name}.{method}" in CALLS:
                continue
            if callable(getattr(one, method)) and not isinstance(getattr(one, method), type):
                found.append(f"{name}.{method}")
    return found


# --- conditions -----------------------------------------------------------------------------------


@contextlib.contextmanager
def no_descriptors():
    """All that the limit of open files allows are taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 2
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


@contextlib.contextmanager
def no_threads():
    """No thread can be started."""

    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    before, threading._start_new_thread = threading._start_new_thread, refuse
    try:
        yield
    finally:
        threading._start_new_thread = before


@contextlib.contextmanager
def no_memory():
    """The address space may not grow."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (64 << 10), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Interrupt:
    """Raises KeyboardInterrupt at one line of the package; 0: counts them."""

    def __init__(self, at):
        self.at, self.count, self.where = at, 0, ""

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            # Behind its block a `with` has a line event before it ends, where no signal comes.
            if 0 < self.at <= self.count and not line.lstrip().startswith("with "):
                sys.settrace(None)
                self.where = f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def refusing(call, number):
    """One allocation of Python fails in the call, behind that many."""

    def limited():
        _testcapi.set_nomemory(number, number + 1)
        try:
            call()
        finally:
            _testcapi.remove_mem_hooks()

    return limited


LIMITS = {"descriptors": no_descriptors, "threads": no_threads, "memory": no_memory}


class Findings:
    """What was wrong, each with the call."""

    def __init__(self):
        self.count = 0

    def note(self, name, what):
        self.count += 1
        print(f"{name}: {what}", file=sys.stderr)

    def run(self, name, call, condition, *others):
        """Call it; None, or the error."""
        with condition:
            try:
                call()
            except (*FINE, *others) as error:
                return error
            except BaseException as error:
                self.raised = error
            else:
                return None
        self.note(name, "".join(traceback.format_exception(self.raised)))
        return self.raised


def under_a_limit(path, limit, findings):
    """Each call of a world under the limit, and once more without."""
    world = World(path)
    for name, entry in CALLS.items():
        if entry is None:
            continue
        faulthandler.dump_traceback_later(60, exit=True)
        call = entry(world)
        before = world.records() if name in STORES else None
        error = findings.run(name, call, LIMITS[limit](), MemoryError)
        if before is not None:
            accounted(world, name, before, error, findings)
        findings.run(f"{name}, once more", entry(world), contextlib.nullcontext())
    world.end()
    verified(world, findings)


def accounted(world, name, before, error, findings):
    """Is there what the end of the call says?"""
    if isinstance(error, millstream.Indeterminate):
        return
    more = STORES[name] if error is None else (0, 0)
    now = world.records()
    if now != (before[0] + more[0], before[1] + more[1]):
        said = "".join(traceback.format_exception(error)) if error else "it returned"
        findings.note(name, f"{before} is {now} after {said}")


def verified(world, findings):
    report = inspect.verify(world.path)
    if not report.ok:
        findings.note("verify", report.problems)
    with millstream.open(world.path) as store:
        store.stream("s").append(b"1")


def closed(path, findings):
    """Each call on handles whose store was closed."""
    for number, (name, entry) in enumerate(CALLS.items()):
        if entry is None:
            continue
        world = World(f"{path}-{number}")
        call = entry(world)
        world.end()
        findings.run(name, call, contextlib.nullcontext())


def closing(path, findings):
    """Each call while another thread closes the store."""
    sys.setswitchinterval(1e-5)
    for number, (name, entry) in enumerate(CALLS.items()):
        if entry is None:
            continue
        faulthandler.dump_traceback_later(60, exit=True)
        world = World(f"{path}-{number}")
        calls = [entry(world) for _ in range(3)]
        begun = threading.Event()

        def work(name=name, calls=calls, begun=begun):
            for call in calls:
                begun.set()
                findings.run(name, call, contextlib.nullcontext())

        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        findings.run("Store.close", world.store.close, contextlib.nullcontext())
        thread.join()
        if "view" in vars(world):
            world.view.close()
        verified(world, findings)


def interrupted(path, findings):
    """Ctrl-C at lines all over each call; then the call works, and the store is whole."""
    world = World(path)
    for name, entry in CALLS.items():
        if entry is None:
            continue
        faulthandler.dump_traceback_later(120, exit=True)
        with Interrupt(0) as lines:
            findings.run(name, entry(world), contextlib.nullcontext())
        step = max(1, lines.count // 4)
        for at in range(1 + len(name) % step, lines.count + 1, step):
            call = entry(world)
            before = world.records() if name in STORES else None
            trace = Interrupt(at)
            gc.disable()  # a store that an interrupted call left is not closed within another one
            error = findings.run(name, call, trace, KeyboardInterrupt)
            gc.enable()
            if before is not None and not isinstance(error, KeyboardInterrupt):
                accounted(world, name, before, error, findings)
        findings.run(f"{name}, once more", entry(world), contextlib.nullcontext())
    world.end()
    verified(world, findings)


def allocations(path, findings):
    """Each allocation of some calls is refused once, or every few where a call makes hundreds."""
    # The interpreter's own, where it has no memory for a frame, and for a lock.
    of_python = MemoryError, SystemError, RuntimeError
    world = World(path)
    for name in REFUSED:
        faulthandler.dump_traceback_later(120, exit=True)
        number = fine = 0
        while fine < 6:  # what comes behind the last one refuses nothing
            call = refusing(CALLS[name](world), number)
            world.settle()
            before = world.records() if name in STORES else None
            error = findings.run(f"{name}, {number}", call, contextlib.nullcontext(), *of_python)
            world.settle()
            if before is not None and not (error and name == "Queue.put_many"):  # some may be there
                accounted(world, name, before, error, findings)
            refused = isinstance(error, (*of_python, millstream.StorageError))
            fine = 0 if refused else fine + 1
            number += 1 + number // 20
        findings.run(f"{name}, once more", CALLS[name](world), contextlib.nullcontext())
    world.end()
    verified(world, findings)


def forked(path, findings):
    """Each call in a child, on what it inherited."""
    world = World(path)
    for name, entry in CALLS.items():
        if entry is None:
            continue
        call = entry(world)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            findings.count = 0
            findings.run(name, call, contextlib.nullcontext())
            os._exit(findings.count)
        if status := os.waitpid(child, 0)[1]:
            findings.note(name, f"the child ended with {status}")
    world.end()
    verified(world, findings)


def made_elsewhere(path, end):
    """A world that another process made, and how it ended: (its id, what to close to end it)."""
    ours, theirs = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os.close(theirs[1])
        world = World(path)
        assert world.consumer.group
        world.dead()
        if end == "closed":
            world.end()
        os.write(ours[1], b"1")
        if end == "open":
            os.read(theirs[0], 1)
            world.end()
        os._exit(0)
    os.close(ours[1])
    os.close(theirs[0])
    made = os.read(ours[0], 1)
    os.close(ours[0])
    if end != "open":
        os.waitpid(child, 0)
    assert made
    return child, theirs[1]


def content(path):
    """All files of a store, with their bytes."""
    found = {}
    for directory, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(directory, name), "rb") as file:
                found[os.path.join(directory, name)] = file.read()
    return found


def reading(path, findings):
    """Each call on a store that is open to read: with a writer there, after one, after a kill."""
    faulthandler.enable()
    for end in ("open", "closed", "killed"):
        place = f"{path}-{end}"
        child, until = made_elsewhere(place, end)
        before = content(place)
        for name, entry in CALLS.items():
            if entry is None or name in TO_WRITE:
                continue
            faulthandler.dump_traceback_later(60, exit=True)
            world = World(place, mode="r")
            try:
                call = READING.get(name, entry)(world)
            except millstream.Unsupported:
                call = None  # what it is a method of, a reader cannot get
            if call is not None:
                findings.run(f"{name}, {end}", call, contextlib.nullcontext())
            findings.run(f"end after {name}, {end}", world.end, contextlib.nullcontext())
        if end != "open":
            now = content(place)
            for file in {**before, **now}:
                if before.get(file) != now.get(file):
                    findings.note(end, f"{file} was changed by a reader")
        os.close(until)
        if end == "open":
            os.waitpid(child, 0)
        verified(world, findings)


def main(condition, path):
    path = os.path.join(path, "store")
    findings = Findings()
    for name in missing():
        findings.note(name, "is a public call without an entry here")
    if condition in LIMITS:
        under_a_limit(path, condition, findings)
    else:
        globals()[condition](path, findings)
    faulthandler.cancel_dump_traceback_later()
    return min(findings.count, 100)


# 3.12 and 3.13 end by SIGSEGV themselves where a closure or a traceback is refused its memory, in
# programs without millstream (seen with 3.12.1, 3.13.0 and 3.13.15; not with 3.11, 3.14 and 3.15).
REFUSES_ALLOCATIONS = _testcapi is not None and sys.version_info[:2] not in ((3, 12), (3, 13))

CONDITIONS = (
    *LIMITS,
    *(["allocations"] if REFUSES_ALLOCATIONS else []),
    "closed",
    "closing",
    "interrupted",
    "forked",
    "reading",
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
