"""Every wait with a time-out ends also where a signal handler outlasts it.

A wait that is begun again with what is left of its time has less than nothing then. SimpleQueue.get
of CPython 3.11 takes that for "for ever"; findings/simplequeue_get_after_slow_handler.sh shows it.
"""

import queue
import signal
import threading
import time

import pytest
from timing import SOON, until

import millstream
from millstream import _native, compat
from millstream.disk import files
from millstream.queues.worker import Worker
from millstream.queues.worker_processes import Child
from millstream.store.store import _all_open as open_stores

SECONDS = 0.1
"""Of each wait. The handler comes in the middle, and takes four times as long."""


def outcome(wait):
    """What a wait comes to whose handler outlasts it; a second signal ends one that hangs."""
    calls = []

    def handler(*_):
        calls.append(1)
        assert len(calls) == 1, f"it still waits {SOON} s after its time-out"
        end = time.monotonic() + 4 * SECONDS
        until(lambda: time.monotonic() >= end)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, SECONDS / 2, SOON)
    try:
        found = wait()
    except (queue.Empty, queue.Full, millstream.MillstreamError) as error:
        found = type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls, "the wait was over before the handler came"
    return found


def full(one):
    """A queue that takes no more."""
    with pytest.raises(millstream.QueueFull):
        while True:
            one.put(b"x", timeout=0)
    return one


def put(store, _):
    one = full(store.queue("full", capacity=16))
    return lambda: one.put(b"x", timeout=SECONDS), "QueueFull"


def join(store, _):
    one = store.queue("q")
    one.put(b"x")
    return lambda: one.join(timeout=SECONDS), "WaitTimeout"


def follow(store, _):
    stream = store.stream("s", partitions=1)
    return lambda: list(stream.read(follow=True, timeout=SECONDS)), []


def follow_durable(store, _):
    stream = store.stream("s", partitions=1)
    stream.append(b"x")
    return lambda: list(stream.read(follow=True, timeout=SECONDS, durable=True)), []


def poll(store, _):
    stream = store.stream("s", partitions=1)

    def poll():
        with stream.consumer(group="g") as consumer:
            return consumer.poll(SECONDS)

    return poll, None


def pipe(store, _):
    one = store.pipe(store.queue("from"), lambda messages: [], store.queue("to"))
    return lambda: one.step(timeout=SECONDS), 0


@pytest.fixture(autouse=True)
def closed(tmp_path):
    """A drop-in queue has no owner who closes its store: here the test does."""
    before = set(open_stores())
    yield
    for store in set(open_stores()) - before:
        store.close()


def drop_in_get(_, tmp_path):
    one = compat.Queue(path=tmp_path / "compat")
    return lambda: one.get(timeout=SECONDS), "Empty"


def drop_in_put(_, tmp_path):
    one = compat.Queue(1, path=tmp_path / "compat")
    one.put("x")
    return lambda: one.put("y", timeout=SECONDS), "QueueFull"


def held_by_another(lock):
    """Have another thread hold it, until the end of this process."""
    taken = threading.Event()

    def hold():
        with lock:
            taken.set()
            threading.Event().wait()

    threading.Thread(target=hold, daemon=True).start()
    assert taken.wait(60)


def lock(*_):
    one = _native.Lock("one")
    held_by_another(one)
    return lambda: one.acquire(timeout=SECONDS), False


def thread(*_):
    one = threading.Thread(target=threading.Event().wait, daemon=True)
    one.start()
    return lambda: _native.join(one, SECONDS), False


def flag(*_):
    return lambda: _native.Flag().wait(SECONDS), False


def bell(*_):
    return lambda: _native.Bell().wait(0, SECONDS), None


def file(_, tmp_path):
    path = tmp_path / "locked"
    path.write_bytes(b"x")
    ours, theirs = (files.open_file(str(path), write=True) for _ in range(2))
    files.lock(theirs, 0, str(path), timeout=0)
    return lambda: files.lock(ours, 0, str(path), timeout=SECONDS), "LockTimeout"


def get(store, _):
    one = store.queue("q")
    return lambda: one.get(timeout=SECONDS), "Empty"


def get_many(store, _):
    one = store.queue("q")
    return lambda: list(one.get_many(5, timeout=SECONDS)), []


def child(*_):
    """The socket on which a worker process speaks."""
    import socket

    one = object.__new__(Child)
    one._socket, other = socket.socketpair()
    return lambda: (one.speaks(SECONDS), other.close(), one._socket.close())[0], False


def stop(store, _):
    """The grace of a worker whose function does not return."""
    one = store.queue("q")
    one.put(b"x")
    begun = threading.Event()

    def work(message):
        begun.set()
        threading.Event().wait()

    worker = Worker(one, work)
    worker.start()
    assert begun.wait(60)
    return lambda: worker.stop(SECONDS).released, 1


WAITS = [get, get_many, put, join, follow, follow_durable, poll, pipe, drop_in_get]
WAITS += [drop_in_put, lock, thread, flag, bell, file, child, stop]


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
def test_wait_ends_after_a_handler_that_outlasts_it(store, tmp_path, wait):
    begin, expected = wait(store, tmp_path)
    assert outcome(begin) == expected
