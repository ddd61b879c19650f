"""Calls that interrupt calls: `python reentry_calls.py OUTER POINTS`, for test_reentry.py.

A handler of a signal runs between two lines of what the main thread is at. Here it does so at
chosen lines: each point is a forked child, in which a line of OUTER is reached, all other calls are
made, and OUTER goes on. Nothing of the package but its face is imported before, so that lines of
the imports that a call does are among them.
"""

import contextlib
import faulthandler
import importlib
import os
import pickle
import queue
import shutil
import signal
import sys
import tempfile
import time
import traceback

import millstream

SECONDS = 5.0  # what waits for its own caller waits for ever, or 10 s and more
PACKAGE = os.path.dirname(millstream.__file__) + os.sep
FINE = (millstream.MillstreamError, queue.Full, queue.Empty)


class World:
    """A store, and what the calls need of it, made when it is needed."""

    def __init__(self, path):
        self.path = os.path.join(path, "store")
        self.other = os.path.join(path, "other")
        self.store = millstream.open(self.path, durability="sync")
        self.stored = []
        self.number = 0
        self.made = {}

    def next(self):
        self.number += 1
        return self.number

    def have(self, name, make):
        """What is made once, also where making it is interrupted."""
        if name not in self.made:
            found = make()
            self.made.setdefault(name, found)
        return self.made[name]

    def stream(self):
        return self.have("stream", lambda: self.store.stream("s", partitions=2))

    def queue(self):
        return self.have("queue", lambda: self.store.queue("q", dedup_window=60.0))

    def message(self):
        self.queue().put(b"m", timeout=0)
        return self.queue().get(timeout=0)

    def consumer(self):
        return self.have("consumer", lambda: self.stream().consumer(group="g", timeout=0))

    def producer(self):
        return self.have("producer", lambda: self.stream().producer(id="p"))

    def view(self):
        return self.have("view", lambda: self.stream().view())

    def compat(self):
        from millstream import compat

        return self.have("compat", lambda: compat.Queue(path=self.path, name="c"))

    def append(self):
        value = b"a%d" % self.next()
        self.stream().append(value, key=value)
        self.stored.append(value)

    def append_many(self):
        values = [b"b%d" % self.next() for _ in range(8)]
        self.stream().append_many(values, keys=values)
        self.stored += values

    def produce(self):
        value = b"p%d" % self.next()
        if self.producer().append(value, sequence=self.number) is not None:
            self.stored.append(value)

    def put(self):
        self.queue().put(b"x", dedup_id=b"%d" % self.next(), timeout=0)

    def get(self):
        self.queue().put_many([b"1", b"2"])
        self.queue().get(timeout=0)

    def ack(self):
        self.message().ack()

    def read(self):
        for _ in self.stream().read():
            pass

    def poll(self):
        self.consumer().poll(0)

    def commit(self):
        self.consumer().poll(0)
        self.consumer().commit()

    def transaction(self):
        value = b"t%d" % self.next()
        taken = self.message()
        with self.store.transaction() as tx:
            tx.append(self.stream(), value)
            tx.put(self.queue(), b"t", dedup_id=value)
            tx.ack(taken)
        self.stored.append(value)

    def make_stream(self):
        self.store.stream(f"s{self.next()}").append(b"1")

    def make_queue(self):
        self.store.queue(f"q{self.next()}").put(b"1", timeout=0)

    def open(self):
        with millstream.open(self.other) as store:
            store.stream("s").append(b"1")

    def open_again(self):
        with millstream.open(self.path) as store:
            store.stream("s", partitions=2).append(b"1")

    def unpickle(self):
        pickle.loads(pickle.dumps(self.stream())).append(b"1")

    def look_up(self):
        with contextlib.suppress(KeyError):
            self.view()[b"a1"]

    def compat_put(self):
        self.compat().put({"a": 1}, timeout=1)

    def compat_get(self):
        self.compat().put({"a": 1}, timeout=1)
        self.compat().get(timeout=1)
        self.compat().task_done()

    def flush(self):
        self.store.flush()

    def stats(self):
        self.stream().stats()
        self.queue().stats()

    def close(self):
        self.store.close()


NEEDS = ("next", "have", "stream", "queue", "message", "consumer", "producer", "view", "compat")
CALLS = [name for name in vars(World) if not name.startswith("_") and name not in NEEDS]


class Interrupt:
    """Calls `handler` at one line of the package; 0: counts them."""

    def __init__(self, at, handler):
        self.at, self.handler, self.count = at, handler, 0
        self.where = ""

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno}"
                self.handler()
        return self


def prepare(world, outer):
    """What makes the lines of OUTER its own, not those of what it needs."""
    needs = {
        "append_many": "stream",
        "get": "queue",
        "ack": "queue",
        "commit": "consumer",
        "compat_get": "compat",
        "transaction": "queue",
    }
    if outer in needs:
        getattr(world, needs[outer])()
    if outer.startswith("compat"):  # by the user: what interrupts their own imports is theirs
        importlib.import_module("millstream.compat")
    if outer in ("close", "flush"):
        world.append()
        world.put()


def interrupted(path, outer, at, inner):
    """One point; how many lines there were, and where it was."""
    world = World(path)
    prepare(world, outer)

    def handler():
        for name in inner:
            begun = time.monotonic()
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                getattr(world, name)()
            except FINE:
                pass
            finally:
                faulthandler.cancel_dump_traceback_later()
            took = time.monotonic() - begun
            assert took < SECONDS, f"{name} took {took:.1f} s"

    trace = Interrupt(at, handler)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)
    sys.settrace(trace)
    try:
        getattr(world, outer)()
    except FINE:
        if not at:
            raise
    finally:
        sys.settrace(None)
        if at:
            print(f"{outer} at line {at}, {trace.where}: {' '.join(inner)}", file=sys.stderr)
    world.store.close()
    faulthandler.cancel_dump_traceback_later()
    check(world)
    return trace.count


def check(world):
    """What was acknowledged is there, and nothing is damaged."""
    from millstream import inspect

    report = inspect.verify(world.path)
    assert report.ok, report.findings
    with millstream.open(world.path) as store:
        batches = store.stream("s", partitions=2).read()
        found = {value for batch in batches for value in batch.values}
        assert found.issuperset(world.stored), set(world.stored) - found


def forked(work):
    """What a child that does it has to say; None: it hung, or failed, and has said why."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            os.write(write, b"%d" % work())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        said = answer.read()
    return int(said) if os.waitpid(child, 0)[1] == 0 else None


def main(outer, points, seed):
    directory = tempfile.mkdtemp(prefix="reentry-")
    try:
        lines = forked(lambda: interrupted(os.path.join(directory, "count"), outer, 0, []))
        assert lines, "the call itself failed"
        print(outer, "has", lines, "lines")
        others = [name for name in CALLS if name != "close"]
        step = max(1, lines // points)
        for turn, at in enumerate(range(1 + seed % step, lines + 1, step)):
            first = (turn + seed) % len(others)
            inner = others[first:] + others[:first] if turn % 4 else ["close"]
            path = os.path.join(directory, str(at))
            if forked(lambda: interrupted(path, outer, at, inner)) is None:  # noqa: B023
                return 1
            shutil.rmtree(path)
        return 0
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
