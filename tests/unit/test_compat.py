"""millstream.compat: CPython's own cases for `queue`, and what only queues between processes do.

The cases of CPython are run as they are, on our classes; those that cannot hold are in `SKIPPED`.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import unittest

import pytest
from timing import SOON

import millstream
from millstream import compat
from millstream.store.store import _all_open as open_stores

try:
    from test import test_queue as standard
except ImportError:  # some distributions keep `test` in a package of its own
    standard = None

SKIPPED = {
    "test_references": "items are copied by pickle, and a class local to a function has no name",
}
"""Case of CPython, and why it cannot hold."""

MANY = "65,536 items, of which `get` of a PriorityQueue reads all: it is meant for hundreds"
SKIPPED_BY_PRIORITY = {
    "test_shutdown_all_methods_in_many_threads": MANY,
    "test_shutdown_immediate_all_methods_in_many_threads": MANY,
}

LEFT_OUT = {
    "LifoQueueTest": "there is no LifoQueue",
    "FailingQueueTest": "overrides _put and _get, which there are not: the core has no hooks",
    "CSimpleQueueTest": "tests of the C type: identity of the module's names, re-entrancy of put",
}
"""Classes of cases that are not for us, and why."""


@pytest.fixture(autouse=True)
def closed(tmp_path):
    """A queue of the standard library has no owner who closes its store: here the test does."""
    before = set(open_stores())
    yield
    for store in set(open_stores()) - before:
        store.close()


def adapt(name, base, kind):
    """CPython's cases over one of our classes, by subclassing only."""

    def set_up(self):
        self.type2test = kind
        super(made, self).setUp()

    body = {"queue": compat, "type2test": kind, "__module__": __name__}
    skipped = SKIPPED | (SKIPPED_BY_PRIORITY if kind is compat.PriorityQueue else {})
    for case, reason in skipped.items():
        if hasattr(base, case):
            body[case] = unittest.skip(reason)(getattr(base, case))
    made = type(name, (base, unittest.TestCase), body)
    if base is standard.BaseSimpleQueueTest:
        made.setUp = set_up
    return made


if standard is not None:
    QueueTest = adapt("QueueTest", standard.QueueTest, compat.Queue)
    PriorityQueueTest = adapt("PriorityQueueTest", standard.PriorityQueueTest, compat.PriorityQueue)
    SimpleQueueTest = adapt("SimpleQueueTest", standard.BaseSimpleQueueTest, compat.SimpleQueue)


def test_every_class_of_cpython_is_run_or_left_out():
    if standard is None:
        pytest.skip("the package `test` is not installed")
    ours = {"QueueTest", "PriorityQueueTest", "BaseSimpleQueueTest", *LEFT_OUT}
    plain = {
        name
        for name, value in vars(standard).items()
        if isinstance(value, type)
        and name.endswith("Test")
        and not name.startswith(("Py", "CQueue", "CPriority", "CLifo", "CFailing"))
    }
    assert plain == ours


# --- the interface --------------------------------------------------------------------------------


def test_exceptions_are_those_of_the_standard_library():
    assert compat.Empty is queue.Empty
    assert compat.Full is queue.Full
    assert compat.ShutDown is getattr(queue, "ShutDown", compat.ShutDown)


@pytest.mark.parametrize("kind", [compat.Queue, compat.SimpleQueue, compat.PriorityQueue])
def test_items_are_copies(kind):
    item = [1, {"a": 2}]
    q = kind()
    q.put(item)
    got = q.get(timeout=60)
    assert got == item
    assert got is not item
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        q.put(threading.Lock())
    assert q.empty()


def test_priority_queue_takes_any_order_of_things():
    q = compat.PriorityQueue()
    items = [(3, "c"), (1, "z"), (1, "a"), (2, "b")]
    for item in items:
        q.put(item)
    assert [q.get() for _ in items] == sorted(items)
    q.put(1)
    q.put("one")
    with pytest.raises(TypeError):
        q.get()
    assert q.qsize() == 2


def test_maxsize_may_grow():
    q = compat.Queue(1)
    q.put(1)
    with pytest.raises(queue.Full):
        q.put_nowait(2)
    q.maxsize = 2
    q.put_nowait(2)
    with pytest.raises(queue.Full):
        q.put_nowait(3)
    assert q.full()


def test_shut_down_queue_gives_what_is_there_and_no_more():
    q = compat.Queue()
    q.put(1)
    q.shutdown()
    assert q.is_shutdown
    with pytest.raises(compat.ShutDown):
        q.put(2)
    assert q.get() == 1
    for block in (True, False):
        with pytest.raises(compat.ShutDown):
            q.get(block)


def test_immediate_shutdown_throws_away_and_lets_join_go():
    q = compat.Queue()
    q.put(1)
    q.shutdown(immediate=True)
    with pytest.raises(compat.ShutDown):
        q.get()
    q.join()


@pytest.mark.parametrize("blocked", ["get", "put"])
def test_shutdown_wakes_who_waits(blocked):
    q = compat.Queue(1)
    if blocked == "put":
        q.put(1)
    raised = []

    def wait():
        try:
            q.put(2) if blocked == "put" else q.get()
        except compat.ShutDown:
            raised.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)  # it waits by now; if not, this shows less and is never wrong
    start = time.monotonic()
    q.shutdown()
    thread.join(30)
    assert raised[0] - start < SOON


def test_join_waits_for_what_is_not_done():
    q = compat.Queue()
    q.put(1)
    joined = threading.Event()
    thread = threading.Thread(target=lambda: (q.join(), joined.set()))
    thread.start()
    q.get()
    assert not joined.wait(0.3)
    q.task_done()
    assert joined.wait(30)
    thread.join()


# --- stores ---------------------------------------------------------------------------------------


def test_queue_of_a_path_outlives_its_handles(tmp_path):
    first = compat.Queue(5, path=tmp_path, name="mail")
    first.put("hello")
    with millstream.open(tmp_path) as store:
        assert len(store.queue("mail")) == 1
    again = compat.Queue(5, path=tmp_path, name="mail")
    assert again.get(timeout=60) == "hello"


def test_queues_without_a_name_are_apart():
    one, two = compat.SimpleQueue(), compat.SimpleQueue()
    one.put(1)
    assert two.empty()


@pytest.mark.parametrize("kind", [compat.Queue, compat.SimpleQueue, compat.PriorityQueue])
def test_closed_queue_is_closed_in_this_place_alone(kind, tmp_path):
    q, other = (kind(path=tmp_path / "store", name="jobs") for _ in range(2))
    q.put(1)
    q.close()
    q.close()
    for call in (lambda: q.put(2), q.get, lambda: q.put_nowait(2), q.get_nowait):
        with pytest.raises(ValueError, match="is closed"):
            call()
    assert q.qsize() == 1  # what was put is there
    assert other.get(timeout=60) == 1


def test_thread_that_feeds_is_none_to_wait_for():
    """The methods of `multiprocessing.Queue`: its programs call them in this order, or that."""
    q = compat.Queue()
    with pytest.raises(AssertionError, match="not closed"):
        q.join_thread()
    q.put("there at once")
    q.cancel_join_thread()
    q.close()
    q.join_thread()
    assert pickle.loads(pickle.dumps(q)).get(timeout=60) == "there at once"


def test_simple_queue_puts_whatever_the_timeout_is():
    q = compat.SimpleQueue()
    q.put(1, timeout=-1)
    q.put(2, block=False, timeout=-1)
    assert [q.get(block=False, timeout=-1), q.get()] == [1, 2]
    with pytest.raises(ValueError, match="non-negative"):
        q.get(timeout=-1)


# --- processes ------------------------------------------------------------------------------------


def echo(there, back):
    """Give back the double of what comes, until None comes."""
    while (item := there.get(timeout=60)) is not None:
        back.put(2 * item)
        if hasattr(there, "task_done"):
            there.task_done()


def take_and_die(q):
    q.get(timeout=60)
    os.kill(os.getpid(), signal.SIGKILL)


def take_never_done(q, taken):
    taken.put(q.get(timeout=60))
    threading.Event().wait()  # to be killed


def wait_for_shutdown(q, back):
    back.put("ready")
    try:
        q.get(timeout=60)
    except compat.ShutDown:
        back.put("shut down")


@pytest.fixture(params=["spawn", "fork"])
def context(request):
    return multiprocessing.get_context(request.param)


@pytest.fixture
def start(context):
    """Start processes, and end them with the test."""
    processes = []

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join(30)


@pytest.mark.parametrize("kind", [compat.Queue, compat.SimpleQueue, compat.PriorityQueue])
def test_items_go_to_another_process_and_back(start, kind):
    there, back = kind(), compat.SimpleQueue()
    process = start(echo, there, back)
    for number in range(50):
        there.put(number)
    assert sorted(back.get(timeout=60) for _ in range(50)) == [2 * i for i in range(50)]
    there.put(None)
    process.join(60)
    assert process.exitcode == 0


def test_queue_goes_through_a_queue(start):
    there, back = compat.SimpleQueue(), compat.SimpleQueue()
    there.put(back)
    again = there.get(timeout=60)
    again.put("the same")
    assert back.get(timeout=60) == "the same"


def test_full_queue_blocks_across_processes(start):
    there, back = compat.Queue(1), compat.SimpleQueue()
    start(echo, there, back)
    for number in range(20):
        there.put(number, timeout=60)
    assert [back.get(timeout=60) for _ in range(20)] == [2 * i for i in range(20)]


def test_join_waits_for_other_processes(start):
    there, back = compat.Queue(), compat.SimpleQueue()
    start(echo, there, back)
    for number in range(20):
        there.put(number)
    there.join()
    assert back.qsize() == 20


def close_and_tell(there, back):
    there.close()
    there.join_thread()
    back.put("closed")


def test_one_process_closes_for_itself(start):
    there, back = compat.Queue(), compat.SimpleQueue()
    start(close_and_tell, there, back)
    assert back.get(timeout=60) == "closed"
    there.put(1)
    assert there.get(timeout=60) == 1
    there.close()
    start(echo, there, back)  # open there, though it is closed here
    pickle.loads(pickle.dumps(there)).put(2)
    assert back.get(timeout=60) == 4


def test_killed_process_blocks_nobody(start):
    q = compat.Queue()
    q.put(1)
    process = start(take_and_die, q)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    q.put(2)
    assert q.get(timeout=60) == 2
    q.task_done()
    q.join()  # what the dead one had counts as done


def test_join_waits_for_a_live_process_and_not_for_a_dead_one(start):
    q, taken = compat.Queue(), compat.SimpleQueue()
    q.put("task")
    process = start(take_never_done, q, taken)
    assert taken.get(timeout=60) == "task"
    joined = threading.Event()
    thread = threading.Thread(target=lambda: (q.join(), joined.set()))
    thread.start()
    assert not joined.wait(0.5)
    process.kill()
    assert joined.wait(30)
    thread.join()


def test_shutdown_reaches_other_processes(start):
    q, back = compat.Queue(), compat.SimpleQueue()
    start(wait_for_shutdown, q, back)
    assert back.get(timeout=60) == "ready"
    q.shutdown()
    assert back.get(timeout=60) == "shut down"
