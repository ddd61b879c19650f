"""Runs of workers: what stops them, one among others, and from the middle of another call."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from timing import SOON, until
from worker_steps import JOBS, run, run_script

import millstream
from millstream.worker import Counts, Worker

pytestmark = pytest.mark.usefixtures("nothing_is_renewed")


# --- stopping -------------------------------------------------------------------------------------


def test_stop_waits_for_what_runs(queue):
    queue.put_many([b"1", b"2"])
    begun, seen = threading.Event(), []

    def work(message):
        begun.set()
        until(lambda: worker._running and worker._running._loops[0].stopping.is_set())
        seen.append(message.value)

    worker = Worker(queue, work)
    worker.start()
    assert begun.wait(30)
    assert worker.stop(grace=30) == Counts(done=1)
    assert seen == [b"1"]
    assert not worker.alive
    assert [message.value for message in queue.get_many(5, timeout=0)] == [b"2"]


def test_stop_gives_back_after_the_grace_what_still_runs(queue):
    queue.put(b"x")
    begun, free = threading.Event(), threading.Event()

    def work(message):
        begun.set()
        free.wait(30)

    worker = Worker(queue, work)
    worker.start()
    assert begun.wait(30)
    running = worker._running
    assert worker.stop(grace=0.05) == Counts(released=1)
    with queue.get(timeout=60) as message:
        assert message.attempt == 1
        free.set()  # the old call goes on, and what it does comes to nothing
        until(lambda: not running.alive)
        assert not message.lost
    assert len(queue) == 0


def test_worker_starts_again_after_a_stop(queue):
    seen = []
    worker = Worker(queue, lambda message: seen.append(message.value))
    for value in (b"1", b"2"):
        queue.put(value)
        with worker:
            until(lambda value=value: value in seen)
    assert worker.counts == Counts(done=2)
    assert worker.stop() == Counts(done=2)


def test_closed_store_ends_the_workers_with_an_error():
    store = millstream.temporary(durability="process")
    queue = store.queue("q")
    worker = Worker(queue, print)
    worker.start()
    store.close()
    until(lambda: not worker.alive)
    assert isinstance(worker.error, millstream.Closed)
    worker.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_what_runs_and_keeps_the_rest(tmp_path, number):
    path, ready = str(tmp_path / "store"), tmp_path / "ready"
    with millstream.open(path) as store:
        queue = store.queue("q")
        queue.put_many([b"0.5", b"60", b"0", b"0"])
        process = subprocess.Popen(
            [sys.executable, str(JOBS), path, str(ready)], stdout=subprocess.PIPE, text=True
        )
        until(ready.exists)
        until(lambda: queue.stats().leased == 2)
        process.send_signal(number)
        out, _ = process.communicate(timeout=600)
        assert out == "1 done, 0 failed, 1 released\n"
        assert process.returncode == 0
        assert sorted(m.value for m in queue.get_many(10, timeout=0)) == [b"0", b"0", b"60"]


def test_signal_handlers_are_restored(queue):
    queue.put(b"x")
    before = signal.getsignal(signal.SIGTERM)
    run(queue, lambda message: None)
    assert signal.getsignal(signal.SIGTERM) is before


# --- one run among others -------------------------------------------------------------------------


def test_run_goes_on_after_a_handler_that_outlasts_its_waits(tmp_path):
    """SimpleQueue.get of CPython 3.11 waits for ever once a handler has outlasted its time-out."""
    body = """
import select, signal
with millstream.open(sys.argv[1]) as store:
    queue = store.queue("q")
    queue.put(b"later", delay=0.6)
    queue.worker()(lambda message: None)
    calls = []
    def handler(*_):
        calls.append(1)
        select.select([], [], [], 0.15)
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.2)
    counts = millstream.run(queue, until_empty=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(counts, bool(calls))
"""
    out, err = run_script(tmp_path, body)
    assert out == "1 done, 0 failed, 0 released True\n", err


def test_second_signal_ends_the_grace_at_once(queue):
    begun, free = threading.Event(), threading.Event()
    queue.put(b"x")

    def work(message):
        begun.set()
        free.wait(60)

    def interrupt():
        begun.wait(60)
        (loop,) = queue._workers[0]._running._loops
        os.kill(os.getpid(), signal.SIGTERM)
        until(loop.stopping.is_set)  # two signals at once are one
        os.kill(os.getpid(), signal.SIGTERM)

    queue.worker()(work)
    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    counts = millstream.run(queue, grace=60)
    thread.join()
    free.set()
    assert counts == Counts(released=1)
    assert time.monotonic() - began < 30


@contextlib.contextmanager
def signal_after(seconds, handler):
    """Have SIGALRM come once, for a handler of its own."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_run_in_a_handler_of_a_run_leaves_its_workers_alone(queue):
    done, raised = [], []

    def handler(*_):
        try:
            millstream.run(queue, until_empty=True)
        except millstream.Reentered as error:
            raised.append(error)

    def other():
        until(lambda: raised)
        queue.put(b"after")
        until(lambda: done)
        os.kill(os.getpid(), signal.SIGTERM)

    queue.worker()(lambda message: done.append(message.value))
    thread = threading.Thread(target=other)
    thread.start()
    with signal_after(0.2, handler):
        assert millstream.run(queue) == Counts(done=1)
    thread.join()
    assert done == [b"after"]
    assert "q: its workers run already" in str(raised[0])


def test_run_in_another_thread_is_refused_and_ends_nothing(queue):
    done, ended = [], []
    queue.worker()(lambda message: done.append(message.value))
    thread = threading.Thread(target=lambda: ended.append(millstream.run(queue, until_empty=True)))
    queue.put(b"late", delay=1.0)  # keeps the first one
    thread.start()
    until(lambda: queue._workers[0].alive)
    with pytest.raises(millstream.InvalidArgument, match="its workers run already"):
        millstream.run(queue, until_empty=True)
    assert queue._workers[0].alive
    thread.join()
    assert (done, ended) == ([b"late"], [Counts(done=1)])
    queue.put(b"again")
    assert millstream.run(queue, until_empty=True) == Counts(done=1)


def test_refused_run_ends_what_it_had_begun_of_other_queues(store, queue):
    free = store.queue("free")
    for one in (free, queue):
        one.worker()(lambda message: None)
    queue.put(b"late", delay=1.0)
    thread = threading.Thread(target=millstream.run, args=(queue,), kwargs={"until_empty": True})
    thread.start()
    until(lambda: queue._workers[0].alive)
    with pytest.raises(millstream.InvalidArgument, match="q: its workers run already"):
        millstream.run(free, queue)
    assert not free._workers[0].alive
    thread.join()


def test_queue_that_is_named_twice_is_counted_once(queue):
    queue.put(b"x")
    queue.worker()(lambda message: None)
    assert millstream.run(queue, queue, until_empty=True) == Counts(done=1)


def test_run_whose_workers_are_stopped_by_others_says_so(queue):
    queue.put(b"later", delay=3600)
    queue.worker()(lambda message: None)
    (worker,) = queue._workers

    def stop():
        until(lambda: worker.alive)
        worker.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(millstream.WorkerError, match="q: its workers were stopped"):
        millstream.run(queue, until_empty=True)
    thread.join()


def test_signal_that_comes_in_a_run_of_a_handler_ends_the_run_under_it_too(store, queue):
    other = store.queue("other")
    for one in (queue, other):
        one.worker()(lambda message: None)
    inner = []

    def handler(*_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        inner.append(millstream.run(other))

    with signal_after(0.2, handler):
        assert millstream.run(queue) == Counts()
    assert inner == [Counts()]


# --- bad input ------------------------------------------------------------------------------------


def test_stop_in_the_middle_of_a_sync_says_so(tmp_path, monkeypatch):
    """As from a signal handler: the worker's thread waits for the sync word of this very thread."""
    with millstream.open(tmp_path / "store", durability="sync") as store:
        queue = store.queue("q")
        sync = queue._sync_now
        stopped = []

        def interrupted():
            if not stopped:
                stopped.append(None)
                worker = Worker(queue, lambda message: None)
                worker.start()
                with pytest.raises(millstream.errors.Reentered):
                    worker.stop()
                stopped.append(worker)
            sync()

        monkeypatch.setattr(queue, "_sync_now", interrupted)
        queue.put(b"x")
        stopped[1].stop()
        assert not stopped[1].alive


# --- in the middle of a call of the same thread, as from a signal handler -------------------------


def test_threads_start_in_the_middle_of_a_call_and_wait_for_its_end(store):
    queue = store.queue("q")
    queue.put(b"1")
    seen = []
    worker = Worker(queue, lambda message: seen.append(store.stream("made")))
    with store._lock:
        worker.start()
        until(lambda: worker.held)
        with pytest.raises(millstream.Reentered):  # its function waits for this thread
            worker.stop()
        assert worker.alive
    until(lambda: seen)
    assert worker.stop() == Counts(done=1)


def test_run_in_the_middle_of_a_call_it_waits_for_says_so(store):
    queue = store.queue("q")
    queue.put(b"1")
    queue.worker()(lambda message: store.stream("made"))
    with store._lock, pytest.raises(millstream.Reentered):
        millstream.run(queue, until_empty=True)
    assert millstream.run(queue, until_empty=True).done <= 1  # the first may have finished it
    assert len(queue) == 0


def test_run_in_the_middle_of_a_call_it_does_not_wait_for_works(store, tmp_path):
    queue = store.queue("q")
    queue.put(b"1")
    queue.worker()(lambda message: None)
    with millstream.open(tmp_path / "other") as other, other._lock:
        assert millstream.run(queue, until_empty=True) == Counts(done=1)


@pytest.mark.parametrize("call", ["start", "stop", "counts"])
def test_handlers_call_a_worker_at_lines_of_its_own_calls(store, call):
    """Calls of a worker in the middle of calls of the same one, in its main thread."""
    queue = store.queue("q")
    package = os.path.dirname(millstream.__file__)
    at, count = 0, 1
    while at < count:
        at += 1 + count // 12
        worker = Worker(queue, lambda message: None)
        count = 0

        def trace(frame, event, _, worker=worker, at=at):
            nonlocal count
            if not frame.f_code.co_filename.startswith(package):
                return None
            if event == "line":
                count += 1
                if count == at:
                    sys.settrace(None)
                    with contextlib.suppress(millstream.Reentered):
                        found = getattr(worker, call)
                        _ = found() if callable(found) else found
                    sys.settrace(trace)
            return trace

        begun = time.monotonic()
        sys.settrace(trace)
        try:
            worker.start()
            worker.stop(grace=5)
        finally:
            sys.settrace(None)
        worker.stop(grace=5)
        assert time.monotonic() - begun < SOON
        assert not worker.alive


def test_a_forked_child_starts_a_worker_of_its_own(tmp_path):
    """What it inherited does not run in it, and a closed queue is said to be closed."""
    with millstream.open(tmp_path / "s") as store:
        worker = Worker(store.queue("q"), lambda message: None)
        with worker:
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    assert not worker.alive
                    assert not worker.pids
                    try:
                        worker.start()
                    except millstream.Closed:
                        status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0


def test_a_worker_of_a_closed_queue_does_not_start(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        worker = Worker(store.queue("q"), lambda message: None)
    with pytest.raises(millstream.Closed):
        worker.start()
