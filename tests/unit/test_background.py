"""The background threads survive what they meet; where they cannot work, callers sync."""

import asyncio
import errno
import json
import logging
import subprocess
import sys
import threading
import warnings

import pytest
from timing import until

import millstream
from millstream import _native
from millstream.errors import Closed, Indeterminate, StorageError
from millstream.groups.group import Group
from millstream.log.partition import PartitionLog
from millstream.queues.handle import QueueHandle
from millstream.queues.queue import Queue
from millstream.store.background import Background
from millstream.store.compactor import Compactor
from millstream.worker import Worker

SECONDS = 30.0
LATE_NS = 10 * 10**9


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="interval") as store:
        yield store


@pytest.fixture
def clock():
    """Go ahead of the machine's clocks, so that nobody waits."""
    ahead = 0

    def advance(nanoseconds):
        nonlocal ahead
        ahead += nanoseconds
        _native.set_clock(True, ahead)

    yield advance
    _native.set_clock(False)


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def refuse_threads(monkeypatch):
    error = RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", failing(error))


class Filter(logging.Filter):
    """Of a program whose filter has a mistake."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.called = threading.Event()

    def filter(self, record):
        self.called.set()
        raise self.error


# --- whatever is raised in the thread -------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("mistake"), SystemExit(), KeyboardInterrupt()])
def test_the_thread_survives_a_failed_sync_that_cannot_even_be_logged(store, monkeypatch, error):
    stream, queue = store.stream("s"), store.queue("q")
    fault = StorageError(errno.EMFILE, "injected", "x")
    log, broken = logging.getLogger("millstream"), Filter(error)
    log.addFilter(broken)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(PartitionLog, "_sync_owned", failing(fault))
            patch.setattr(Queue, "_make_durable", failing(fault))
            stream.append(b"a")
            queue.put(b"a")
            assert broken.called.wait(SECONDS)
            until(lambda: stream.stats().health == "background failing")
            assert "injected" in stream.stats().background
    finally:
        log.removeFilter(broken)
    until(lambda: stream.durable_offset(0) == 1)
    until(lambda: not queue._unsynced_seconds)
    until(lambda: stream.stats().health == queue.stats().health == "sound")


@pytest.mark.parametrize("where", ["_round", "_pause", "_take", "_sync_all", "_retention_due"])
@pytest.mark.parametrize("error", [MemoryError(), SystemExit(), AttributeError("mistake")])
def test_the_thread_survives_whatever_is_raised_in_it(store, monkeypatch, where, error):
    stream = store.stream("s", retention=millstream.Retention(records=10**9))
    stream.append(b"a")
    until(lambda: stream.durable_offset(0) == 1)
    thread, raised = store._background._thread, threading.Event()

    def fail(*_, **__):
        raised.set()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Background, where, fail)
        stream.append(b"b")
        assert raised.wait(SECONDS)
    until(lambda: stream.durable_offset(0) == 2)
    assert store._background._thread is thread


def test_one_partition_that_fails_keeps_no_other_from_being_synced(store, monkeypatch):
    stream = store.stream("s", partitions=3)
    real = PartitionLog._sync_owned

    def sync(self, inherited, mark=None):
        if self.index == 1:
            raise AttributeError("mistake")
        real(self, inherited, mark)

    with monkeypatch.context() as patch:
        patch.setattr(PartitionLog, "_sync_owned", sync)
        for index in range(3):
            stream.append(b"a", partition=index)
        until(lambda: stream.durable_offset(0) == stream.durable_offset(2) == 1)
    until(lambda: stream.durable_offset(1) == 1)


def test_a_dead_thread_is_started_again_by_the_next_that_needs_it(store, monkeypatch, clock):
    stream, queue = store.stream("s"), store.queue("q")
    dead = threading.Thread(target=str)
    dead.start()
    dead.join()
    background = store._background
    for call in (lambda: stream.append(b"a"), lambda: queue.put(b"a")):
        background._stopping = True
        background._wanted.ring()
        if background._thread is not None:
            background._thread.join()
        background._stopping, background._thread = False, dead
        call()
        assert background._thread.is_alive()
    until(lambda: stream.durable_offset(0) == 1)
    # Also where the core had no news to tell: it looks at the clock.
    with monkeypatch.context() as patch:
        patch.setattr(Background, "_round", lambda _: None)
        stream.append(b"b")
        queue.put(b"b")
        background._stopping = True
        background._wanted.ring()
        background._thread.join()
        background._stopping, background._thread = False, dead
    clock(LATE_NS)
    assert stream.append(b"c").offset == 2
    assert background._thread.is_alive()
    until(lambda: stream.durable_offset(0) == 3)


def test_the_compactor_survives_and_is_started_again(store, monkeypatch):
    monkeypatch.setattr("millstream.store.compactor.VISIT_SECONDS", 0.01)
    looked, failed = threading.Event(), threading.Event()

    def fail(_):
        failed.set()
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Compactor, "_visit_all", fail)
        stream = store.stream("s", compact=millstream.Compaction())
        assert failed.wait(SECONDS)
        until(lambda: "MemoryError" in stream.stats().background)
    monkeypatch.setattr(Compactor, "_visit_all", lambda _: looked.set())
    assert looked.wait(SECONDS)
    compactor = store._background._compactor
    ended, compactor._thread = compactor._thread, None  # as if it had died
    ended.join(SECONDS)
    looked.clear()
    stream.append(b"a")  # the other thread looks after it
    assert looked.wait(SECONDS)


# --- no thread can be started ---------------------------------------------------------------------


def test_without_a_thread_who_appends_puts_or_commits_syncs(store, monkeypatch):
    stream, queue = store.stream("s", partitions=2), store.queue("q")
    stream.append(b"0", partition=0)
    consumer = stream.consumer(group="g")
    background = store._background
    background.stop()
    background._stopping = False
    with monkeypatch.context() as patch:
        refuse_threads(patch)
        with pytest.warns(millstream.MillstreamWarning, match="can't start new thread"):
            stream.append(b"a", partition=0)
        for count in range(3):  # each of them, not the first alone
            assert stream.durable_offset(0) == count + 2
            stream.append_many([b"b"], partition=0)
        stream.append(b"c", partition=1)
        assert stream.durable_offset(1) == 1
        assert stream.stats().health == queue.stats().health == "background failing"
        assert "can't start new thread" in stream.stats().background
        for _ in range(2):
            queue.put(b"a")
            assert not queue._unsynced_seconds
        queue.get(timeout=0).ack()
        assert not queue._unsynced_seconds
        while consumer.poll(0.1) is not None:
            consumer.commit()
            assert not consumer.group._unsynced_seconds
        with warnings.catch_warnings():  # opening what it would look after is no error either
            warnings.simplefilter("error")
            kept = store.stream("kept", retention=millstream.Retention(records=1))
            store.stream("compact", compact=millstream.Compaction())
    assert kept.append(b"a").offset == 0
    assert background._thread.is_alive()
    until(lambda: stream.stats().health == "sound")
    consumer.close()


def test_without_a_thread_and_with_filters_that_raise_the_append_is_no_error(store, monkeypatch):
    refuse_threads(monkeypatch)
    stream = store.stream("s")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stream.append(b"a").offset == 0
    assert stream.durable_offset(0) == 1


AT_EXIT = """
import atexit, sys, threading
import millstream

store = millstream.open(sys.argv[1], durability="interval")
stream, queue = store.stream("s"), store.queue("q")
consumer = stream.consumer(group="g")

def refuse(*_):
    raise RuntimeError("can't start new thread at interpreter shutdown")

@atexit.register
def late():
    threading.Thread.start = refuse
    position = stream.append(b"late")
    queue.put(b"late")
    print(stream.durable_offset(0), len(queue), consumer.poll(0).values[0])
    consumer.commit()
    consumer.close()
"""


def test_at_exit_where_no_thread_can_be_started_all_is_stored(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", AT_EXIT, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("1 1 b'late'\n", "")


NO_MEMORY_FOR_THREADS = """
import resource, sys, threading
import millstream
from millstream import _native

threading.stack_size(1 << 30)  # of Python's threads
with millstream.open(sys.argv[1], durability="interval") as store:
    stream, queue = store.stream("s"), store.queue("q")
    stream.append(b"a")
    queue.put(b"a")
    message = queue.get(timeout=0)
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    before = resource.getrlimit(resource.RLIMIT_AS)
    # Less than a stack of the C library's threads, 8 MiB, and some for Python
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), before[1]))
    for call in (
        lambda: stream.consumer(group="g"),
        lambda: _native.keep_alive(message, 30.0, 60.0),
    ):
        try:
            call()
        except millstream.StorageError as error:
            print(type(error).__name__, error.errno, "could not be started" in str(error))
    resource.setrlimit(resource.RLIMIT_AS, before)
    print(stream.group("g").members())
    with stream.consumer(group="g") as consumer:
        print(consumer.poll(10.0).values[0], message.lost)
    message.ack()
"""


def test_the_thread_of_the_heartbeat_that_cannot_be_started_is_a_storage_error(tmp_path):
    command = [sys.executable, "-c", NO_MEMORY_FOR_THREADS, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        f"StorageError {errno.EAGAIN} True", f"StorageError {errno.EAGAIN} True", "[]",
        "b'a' False",
    ], done.stderr  # fmt: skip


# --- the thread is there, and nothing is synced ---------------------------------------------------


@pytest.fixture
def hung(monkeypatch):
    """The thread is in a call that does not come back, until the test lets it."""
    let_go, inside = threading.Event(), threading.Event()
    real = Background._round

    def hang(self):
        inside.set()
        let_go.wait()
        real(self)

    monkeypatch.setattr(Background, "_round", hang)
    yield inside
    let_go.set()


def test_where_nothing_is_synced_for_seconds_an_append_syncs(store, clock, hung):
    stream = store.stream("s")
    stream.append(b"a")
    stream.append(b"a")
    assert hung.wait(SECONDS)
    assert stream.durable_offset(0) == 0
    for round_ in range(3):
        clock(LATE_NS)
        assert stream.stats().health == "sync overdue"
        stream.append_many([b"b"])
        assert stream.durable_offset(0) == 3 + 2 * round_
        assert stream.stats().health == "sound"
        stream.append(b"c", timestamp=1)


def test_where_nothing_is_synced_for_seconds_an_append_says_so(store, clock, hung, monkeypatch):
    stream = store.stream("s")
    stream.append(b"a")
    assert hung.wait(SECONDS)
    clock(LATE_NS)
    with monkeypatch.context() as patch:
        fault = StorageError(errno.EMFILE, "injected", "x")
        patch.setattr(PartitionLog, "_sync_owned", failing(fault))
        for count in range(3):  # each of them, until one is synced
            with pytest.raises(Indeterminate, match="injected") as raised:
                stream.append(b"b", timestamp=5 * count)
            assert [span.first_offset for span in raised.value.published] == [count + 1]
        stream.append(b"process", durability="process")  # asks for no more than it has
        assert stream.stats().health == "sync overdue"
    stream.append(b"c")
    assert stream.durable_offset(0) == stream.next_offset(0) == 6


def test_where_nothing_is_synced_for_seconds_a_put_and_an_ack_sync_or_say_so(
    store, clock, hung, monkeypatch
):
    queue = store.queue("q")
    queue.put(b"a")
    assert hung.wait(SECONDS)
    clock(LATE_NS)
    assert queue.stats().health == "sync overdue"
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "_make_durable", failing(StorageError(errno.EIO, "injected", "x")))
        for _ in range(3):
            with pytest.raises(Indeterminate, match="injected"):
                queue.put(b"b")
        message = queue.get(timeout=0)
        with pytest.raises(Indeterminate, match="injected"):
            message.ack()
    assert len(queue) == 3
    queue.put(b"c")
    assert not queue._unsynced_seconds
    assert queue.stats().health == "sound"
    queue.get(timeout=0).ack()
    clock(LATE_NS)
    queue.get(timeout=0).ack()
    assert not queue._unsynced_seconds


def test_where_nothing_is_synced_for_seconds_a_commit_syncs_or_says_so(
    store, clock, hung, monkeypatch
):
    stream = store.stream("s")
    stream.append_many([b"a", b"b", b"c", b"d"])
    consumer = stream.consumer(group="g", max_records=1)
    consumer.poll(1.0)
    consumer.commit()
    assert hung.wait(SECONDS)
    clock(2 * LATE_NS // 5)
    consumer.poll(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Group, "_make_durable", failing(StorageError(errno.EIO, "injected", "x")))
        with pytest.raises(Indeterminate, match="injected"):
            consumer.commit()
        assert consumer.group.lag() == 2
    consumer.poll(1.0)
    consumer.commit()
    assert not consumer.group._unsynced_seconds
    consumer.close()


def test_a_wall_clock_that_is_set_makes_no_append_late(store, monkeypatch):
    """The core looks at the wall clock, which may jump; that it is late another clock says."""
    stream = store.stream("s")
    native = store.stream("s")._partition(0).native
    asked = []
    monkeypatch.setattr(PartitionLog, "wait_durable", lambda *_, **__: asked.append(1))
    monkeypatch.setattr(Background, "_round", lambda _: None)
    stream.append(b"a")
    native.configure(0, 0, 0)  # each append says that it is late, as after a jump
    for _ in range(10):
        stream.append(b"b")
    assert not asked


def test_what_is_overdue_is_seen_from_another_process(store, hung, tmp_path):
    _native.set_clock(True, -LATE_NS)  # what is appended now was appended a while ago
    try:
        store.stream("s").append(b"a")
        store.queue("q").put(b"a")
    finally:
        _native.set_clock(False)
    for verb, path in (("info", []), ("queue", ["info"])):
        names = [str(tmp_path / "store"), *(["q"] if verb == "queue" else [])]
        command = [sys.executable, "-m", "millstream", verb, *path, *names, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        shown = json.loads(done.stdout)
        parts = shown["streams"][0]["partitions"] if verb == "info" else [shown]
        assert [part["health"] for part in parts] == ["sync overdue"], shown


def test_an_idle_stream_and_one_of_level_process_are_never_overdue(store, clock):
    stream = store.stream("s")
    stream.append(b"a")
    until(lambda: stream.durable_offset(0) == 1)
    unsynced = store.stream("p", durability="process")
    unsynced.append(b"a")
    clock(LATE_NS)
    assert stream.stats().health == unsynced.stats().health == "sound"
    stream.append(b"b")
    assert stream.stats().health == "sound"


# --- what it imports ------------------------------------------------------------------------------

IMPORTS = """
import builtins, sys, threading, time
import millstream

real = builtins.__import__
def traced(name, *rest, **named):
    if threading.current_thread().name == "millstream" and name not in sys.modules:
        print("imported", name, flush=True)
    return real(name, *rest, **named)

with millstream.open(sys.argv[1], durability="interval") as store:
    stream = store.stream("s", segment_bytes=1 << 16, retention=millstream.Retention(records=50))
    with store.transaction() as tx:
        tx.append(stream, b"a")
    builtins.__import__ = traced
    from millstream.transactions.journal import Journal
    done, apply_waiting = threading.Event(), Journal.apply_waiting
    def looked(self, seen):
        found = apply_waiting(self, seen)
        done.set()
        return found
    Journal.apply_waiting = looked
    list(stream.read())
    files, failed = millstream.disk.files, threading.Event()
    def fail(path):
        failed.set()
        raise files.storage_error(OSError(24, "injected"), path, "listing")
    names, files.names = files.names, fail
    for _ in range(20):  # more than half of a segment: the thread is to make a spare
        stream.append(b"x" * 2000)
    assert failed.wait(30)
    files.names = names
    assert done.wait(30)
print("logging" in sys.modules)
"""


def test_the_thread_imports_nothing_also_where_it_fails_or_applies_a_journal(tmp_path):
    command = [sys.executable, "-c", IMPORTS, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "imported" not in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    if done.stdout == "False\n":
        assert "preparing space in the background failed" in done.stderr


EXHAUSTED = """
import os, resource, sys, time, timing
import millstream

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
with millstream.open(sys.argv[1], durability="interval") as store:
    stream = store.stream("s")
    stream.append(b"a")
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        stream.append(b"b")
        time.sleep(0.005)  # the thread fails meanwhile, on its own clock
    for one in taken:
        os.close(one)
    stream.append(b"c")
    timing.until(lambda: stream.stats().health == "sound")
    timing.until(lambda: stream.durable_offset(0) == stream.next_offset(0))
"""


def test_a_second_without_descriptors_is_over_when_it_is_over(tmp_path):
    command = [sys.executable, "-c", EXHAUSTED, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["queue", "group"])
def test_what_is_dropped_while_it_is_synced_is_no_trouble(tmp_path, monkeypatch, caplog, kind):
    with millstream.open(tmp_path / "s", durability="interval") as store:
        stream, queue = store.stream("s"), store.queue("q")
        stream.append(b"x")
        consumer = stream.consumer(group="g")
        consumer.poll(1.0)
        background = store._background
        background.stop()  # the test does its rounds
        background._stopping = False
        monkeypatch.setattr(Background, "runs", lambda _: True)
        if kind == "queue":
            queue.put(b"x")
        else:
            consumer.commit()
        one = {"queue": QueueHandle, "group": Group}[kind]
        sync = one._make_durable

        def dropped_meanwhile(self, *arguments):
            monkeypatch.setattr(one, "_make_durable", sync)
            if kind == "queue":
                store.drop_queue("q")
            else:
                store.drop_stream("s")
            self._make_durable(*arguments)

        monkeypatch.setattr(one, "_make_durable", dropped_meanwhile)
        assert background._queues
        background._sync_all()
        assert background.trouble == ""
        assert not background._queues
        assert caplog.records == []


def test_a_commit_of_a_group_whose_stream_is_dropped_meanwhile_says_so(tmp_path, monkeypatch):
    with millstream.open(tmp_path / "s", durability="sync") as store:
        stream = store.stream("s")
        stream.append(b"x")
        consumer = stream.consumer(group="g")
        consumer.poll(1.0)
        sync = Group._sync_now

        def dropped_meanwhile(self):
            monkeypatch.setattr(Group, "_sync_now", sync)
            store.drop_stream("s")
            self._sync_now()

        monkeypatch.setattr(Group, "_sync_now", dropped_meanwhile)
        with pytest.raises((Closed, Indeterminate)):
            consumer.commit()


# --- the other threads ----------------------------------------------------------------------------


def test_a_view_whose_thread_cannot_be_started_is_a_storage_error(store, monkeypatch):
    stream = store.stream("s")
    stream.append(b"1", key=b"a")
    with monkeypatch.context() as patch:
        refuse_threads(patch)
        with pytest.raises(StorageError, match="can't start new thread"):
            stream.view()
    with stream.view() as view:
        assert view[b"a"] == b"1"


@pytest.mark.parametrize("error", [SystemExit(), MemoryError(), ValueError("mistake")])
def test_who_looks_into_a_view_whose_thread_has_ended_is_told(store, monkeypatch, error):
    from millstream.streams.view import View

    stream = store.stream("s")
    monkeypatch.setattr(View, "_follow", failing(error))
    view = stream.view()
    position = stream.append(b"1", key=b"a")
    with pytest.raises(Exception) as raised:
        view.wait_for(position, timeout=SECONDS)
    assert not isinstance(raised.value, TimeoutError)
    assert error in (raised.value, raised.value.__cause__)
    view.close()


def test_a_wait_of_asyncio_whose_thread_cannot_be_started_is_a_storage_error(store, monkeypatch):
    stream, queue = store.stream("s"), store.queue("q")

    async def read():
        async for batch in stream.aread(follow=True, timeout=SECONDS):
            return list(batch.values)

    async def get():
        message = await queue.aget(timeout=SECONDS)
        message.ack()
        return message.value

    store.stream("other").append(b"x")  # the store's own thread is there
    for call, give in ((read, lambda: stream.append(b"a")), (get, lambda: queue.put(b"a"))):
        with monkeypatch.context() as patch:
            refuse_threads(patch)
            with pytest.raises(StorageError, match="can't start new thread"):
                asyncio.run(call())
        give()
        assert asyncio.run(call()) in (b"a", [b"a"])


def test_retention_runs_where_the_thread_was_faster_than_the_opening(tmp_path, monkeypatch):
    """It finds no stream with a retention yet, and sleeps until something is asked of it."""
    path = tmp_path / "store"
    with millstream.open(path) as store:
        stream = store.stream("s", segment_bytes="64KiB")
        for _ in range(3):
            stream.append(bytes(60_000))
        stream.alter(retention=millstream.Retention(records=100))
    watch, pause = Background.watch, Background._pause
    looks, asleep = [], threading.Event()

    def watch_and_let_it_sleep(self, stream):
        watch(self, stream)
        assert asleep.wait(SECONDS)

    def note(self):
        due = pause(self)
        looks.append(due)
        if len(looks) > 1:  # the first wait is over at once, since it was rung
            asleep.set()
        return due

    monkeypatch.setattr(Background, "watch", watch_and_let_it_sleep)
    monkeypatch.setattr(Background, "_pause", note)
    retired = threading.Event()
    with millstream.open(path) as store:
        monkeypatch.setattr(Background, "_retain", lambda *_: retired.set())
        store.stream("s")
        assert retired.wait(SECONDS)  # though nobody appends


@pytest.mark.parametrize(("mode", "at_work"), [("thread", 0), ("thread", 1), ("process", 1)])
def test_a_worker_whose_threads_cannot_be_started_is_a_storage_error_and_takes_nothing(
    store, monkeypatch, mode, at_work
):
    queue = store.queue("q")
    queue.put(b"a")
    with queue.get(timeout=0):  # the store's own thread is there
        pass
    worker = Worker(queue, print, concurrency=3, mode=mode)
    start, started = threading.Thread.start, []

    def refuse_after(thread):
        if len(started) == at_work:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_after)
        with pytest.raises(StorageError, match="can't start new thread"):
            worker.start()
    assert not worker.alive
    for thread in started:  # one that went on would take messages for ever
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert sum(worker.stop()) == 0


LEFT_OPEN = """
import os, resource, sys
import millstream

def exhaust():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    return before

store = millstream.open(sys.argv[1], durability="interval")
stream, queue = store.stream("s"), store.queue("q")
stream.append(b"a")
queue.put(b"a")
before = exhaust()
stream.append(b"b")
if sys.argv[2] == "close":
    try:
        store.close()
    except millstream.StorageError as error:
        print(error.strerror)
    print(store.closed)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
"""


@pytest.mark.parametrize("how", ["close", "exit"])
def test_a_store_is_closed_also_without_a_free_descriptor(tmp_path, how):
    path = tmp_path / "store"
    command = [sys.executable, "-c", LEFT_OPEN, str(path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if how == "close":  # it is closed; what could not be done is said
        assert done.stdout.splitlines()[-1] == "True", done.stdout + done.stderr
    with millstream.open(path) as store:
        assert [bytes(value) for batch in store.stream("s").read() for value in batch.values] == [
            b"a",
            b"b",
        ]
        assert len(store.queue("q")) == 1
