"""Forks while other threads are inside calls of every kind: `python fork_calls.py DIRECTORY FORKS`.

Each child makes a call of each kind, on what it inherited and on what it opens itself, and ends in
order, which is when the kernel would kill it 30 s after the fork. For test_fork.py.
"""

import contextlib
import os
import pickle
import queue
import random
import signal
import sys
import threading
import time
import traceback

import millstream
from millstream import compat

SECONDS = 30
FINE = (millstream.MillstreamError, queue.Full, queue.Empty)


class Calls:
    """Of every kind, over and over, each kind in a thread of its own."""

    def __init__(self, path):
        self.path = path
        self.store = millstream.open(os.path.join(path, "store"), durability="interval")
        self.stream = self.store.stream("s", partitions=2, segment_bytes=1 << 16)
        self.queue = self.store.queue("q", dedup_window=60.0)
        self.items = compat.Queue(path=self.store.path, name="c")
        self.own = compat.SimpleQueue()
        self.stream.append(b"1", key=b"k")
        self.view = self.stream.view()
        self.consumer = self.stream.consumer(group="g", timeout=0)
        self.producer = self.stream.producer(id="p")
        self.kept = pickle.dumps(self.stream)
        self.number = 0

    def append(self):
        self.stream.append(b"x" * 2000, key=os.urandom(2), durability="sync")

    def produce(self):
        self.number += 1
        self.producer.append(b"p", sequence=self.number)
        self.stream.producer(id=f"p{self.number % 7}")

    def work(self):
        self.queue.put(b"1", dedup_id=os.urandom(4), timeout=0)
        with self.queue.get(timeout=0):
            pass

    def exchange(self):
        for items in (self.items, self.own):
            items.put(b"1", timeout=0) if items is self.items else items.put(b"1")
            items.get(timeout=1)
        self.items.task_done()

    def read(self):
        for _ in self.stream.read(start="latest"):
            pass
        self.consumer.poll(0)
        self.consumer.commit()

    def transact(self):
        with self.store.transaction() as tx:
            tx.append(self.stream, b"t")
            tx.put(self.queue, b"t")

    def open(self):
        with millstream.open(os.path.join(self.path, "other")) as store:
            store.stream("s").append(b"1")

    def make(self):
        name = f"n{random.randrange(8)}"
        self.store.stream(name).append(b"1")
        self.store.queue(name, capacity=64).stats()
        with contextlib.suppress(millstream.NotFound):
            self.store.drop_stream(name)

    def unpickle(self):
        pickle.loads(self.kept).stats()

    def temporary(self):
        with millstream.temporary() as store:
            store.stream("s").append(b"1")

    def flush(self):
        self.store.flush()
        self.stream.enforce_retention()


KINDS = ("append", "produce", "work", "exchange", "read", "transact", "open", "make", "unpickle",
         "temporary", "flush")  # fmt: skip


def repeat(call, ended):
    while not ended.is_set():
        with contextlib.suppress(*FINE):
            call()


def in_child(calls):
    """What was inherited is closed, and what is opened here works."""
    refused = {
        "append": lambda: calls.stream.append(b"1"),
        "produce": lambda: calls.producer.append(b"1", sequence=1 << 40),
        "a producer": lambda: calls.stream.producer(id="new"),
        "put": lambda: calls.queue.put(b"1", timeout=0),
        "get": lambda: calls.queue.get(timeout=0),
        "count": lambda: len(calls.queue),
        "look up": lambda: calls.view[b"k"],
        "keys": lambda: list(calls.view),
        "size": lambda: len(calls.view),
        "wait for": lambda: calls.view.wait_for(millstream.Position(0, 1, 0), timeout=0),
        "poll": lambda: calls.consumer.poll(0),
        "read": lambda: list(calls.stream.read()),
        "flush": lambda: calls.store.flush(),
        "a stream": lambda: calls.store.stream("s"),
        "a queue": lambda: calls.store.queue("q"),
        "a transaction": lambda: calls.store.transaction().__enter__(),
    }
    for name, call in refused.items():
        try:
            found = call()
        except millstream.Closed:
            continue
        raise AssertionError(f"{name} gave {found!r}")
    assert calls.view.closed and calls.store.closed and calls.stream.closed
    calls.items.put(b"child")  # a queue of the standard library's kind goes over a fork
    assert not calls.items.empty()
    compat.SimpleQueue().put(1)
    pickle.loads(calls.kept).append(b"child")
    with millstream.open(os.path.join(calls.path, "store")) as store:
        store.stream("s").append(b"c")
        store.stream("s").producer(id="child").append(b"c", sequence=os.getpid())
        store.queue("q").put(b"c", timeout=0)
        store.queue("q").get(timeout=5).ack()
        store.queue("q").stats()
        with store.transaction() as tx:
            tx.append(store.stream("s"), b"t")
        with store.stream("s").view() as view:
            assert view is not None
    calls.temporary()


def main(path, forks):
    calls = Calls(path)
    ended = threading.Event()
    threads = [
        threading.Thread(target=repeat, args=(getattr(calls, kind), ended), daemon=True)
        for kind in KINDS
    ]
    for thread in threads:
        thread.start()
    chance = random.Random(1)
    failed = 0
    for number in range(forks):
        time.sleep(chance.random() * 0.003)  # the moment of the fork is what varies
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            try:
                in_child(calls)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.exit(0)
        status = os.waitpid(child, 0)[1]
        if status:
            print(f"child {number}: status {status}", file=sys.stderr)
            failed += 1
            if failed == 3:
                break
    ended.set()
    for thread in threads:
        thread.join()
    calls.view.close()
    calls.consumer.close()
    calls.store.close()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
