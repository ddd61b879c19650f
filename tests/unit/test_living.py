"""Threads and processes that all live: nobody waits in vain, and nothing is undone by another.

A kill makes much anew, and so hides what the living do to each other.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

import millstream
from millstream.errors import StoreFull
from millstream.queues import dedup

LATE = 0.8  # seconds: a sleeper that nobody wakes looks again after one


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def asleep(thread):
    """Return when the thread has slept for a while: it waits for a message."""
    seen = 0
    while seen < 20:
        with open(f"/proc/self/task/{thread.native_id}/stat") as file:
            seen = seen + 1 if file.read().rpartition(") ")[2][0] == "S" else 0
        thread.join(0.001)


def waiting(q, begun, timeout=8.0):
    """A thread that takes one message, and when it had it."""
    found = []

    def take():
        with q.get(timeout=timeout):
            found.append(time.monotonic() - begun)

    thread = threading.Thread(target=take)
    thread.start()
    asleep(thread)
    return thread, found


def test_wake_that_comes_to_one_whose_time_is_over_goes_on_to_the_next(store):
    q = store.queue("q")

    def in_vain():
        with contextlib.suppress(millstream.Empty):
            q.get(timeout=0.2)

    first = threading.Thread(target=in_vain)
    first.start()
    asleep(first)  # and so is woken first
    begun = time.monotonic()
    second, found = waiting(q, begun)
    q.put(b"x", delay=0.2)
    first.join()
    second.join()
    assert found[0] < LATE


@pytest.mark.parametrize("case", ["next of its key", "expired before it", "shorter lease"])
def test_who_sleeps_wakes_for_what_became_due_sooner(store, case):
    q = store.queue("q", ordering="key", lease=30)
    q.put(b"first", key=b"k", delay=60 if case == "expired before it" else 0,
          ttl=0.2 if case == "expired before it" else None)  # fmt: skip
    begun = time.monotonic()
    m = None if case == "expired before it" else q.get(timeout=0)
    if case != "shorter lease":
        q.put(b"second", key=b"k", delay=0.3 if case == "next of its key" else 0)
    thread, found = waiting(q, begun)
    if case == "next of its key":
        m.ack()
    elif case == "shorter lease":
        m.extend(0.2)
    thread.join()
    assert found[0] < LATE


RAISING = """
import sys, threading, time
import millstream
store = millstream.open(sys.argv[1], durability="process")
q = store.queue("q", create=False)
until = time.monotonic() + float(sys.argv[2])
slow = []
def work():
    while time.monotonic() < until:
        for call in (lambda: q.put(b"1", timeout=0.1), lambda: q.get(timeout=0).ack()):
            begun = time.monotonic()
            try:
                call()
            except (millstream.Empty, millstream.QueueFull):
                pass
            if time.monotonic() - begun > 5:
                slow.append(time.monotonic() - begun)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not slow, slow
store.close()
"""


def test_capacity_is_raised_beside_threads_of_another_process(store):
    """Two threads there went on to other hints, with the word of those before."""
    q = store.queue("q", capacity=50)
    child = subprocess.Popen([sys.executable, "-c", RAISING, store.path, "3"])
    raised = 0
    while child.poll() is None:
        if raised < 400:
            q.alter(capacity=q.capacity + 1)
            raised += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.005)
    assert child.returncode == 0
    print(f"raised {raised} times")
    assert q.capacity == 50 + raised > 60
    q._check()


def test_two_threads_that_alter_lose_nothing_of_each_other(store):
    q = store.queue("q", capacity=50)
    wrong = []

    def leases():
        for number in range(1, 400):
            q.alter(lease=float(number))
            if q.lease != number:
                wrong.append(number)

    thread = threading.Thread(target=leases)
    thread.start()
    raised = 0
    while thread.is_alive() and raised < 300:
        q.alter(capacity=q.capacity + 1)
        raised += 1
        assert q.capacity == 50 + raised
    thread.join()
    print(f"{raised} raises beside 399 leases")
    assert wrong == []
    with millstream.open(store.path) as other:
        assert (other.queue("q").capacity, other.queue("q").lease) == (50 + raised, 399.0)


def dedup_file(q):
    return os.readlink(f"/proc/self/fd/{q._files._descriptors['dedup']}")


def test_backups_beside_growing_dedup_keep_the_file_that_is_synced(store, tmp_path):
    q = store.queue("q", dedup_window=3600.0, capacity=50)
    over = threading.Event()

    def backups():
        while not over.is_set():
            store.backup(tmp_path / "copy")
            shutil.rmtree(tmp_path / "copy")

    thread = threading.Thread(target=backups)
    thread.start()
    for number in range(6000):
        q.put(b"1", dedup_id=b"%d" % number)
        q.get(timeout=0).ack()
    over.set()
    thread.join()
    assert dedup_file(q) == str(q.path / "dedup")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        store.backup(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")
    assert len(os.listdir("/proc/self/fd")) == before


def test_dedup_that_cannot_grow_goes_on_with_the_file_it_has(store, monkeypatch):
    q = store.queue("q", dedup_window=3600.0, capacity=50)

    rename = dedup.files.rename

    def full(source, target):
        if target == q.path / "dedup":
            raise StoreFull(28, "No space left on device", "dedup")
        rename(source, target)

    monkeypatch.setattr(dedup.files, "rename", full)
    with pytest.raises(StoreFull):
        for number in range(3000):
            q.put(b"1", dedup_id=b"%d" % number)
            q.get(timeout=0).ack()
    assert dedup_file(q) == str(q.path / "dedup")
    q.flush()


def test_consumers_come_while_others_remove_their_group(store):
    stream = store.stream("s", partitions=2)
    stream.append(b"x")
    ended, seen, wrong = threading.Event(), [], []

    def remove():
        while not ended.is_set():
            try:
                stream.group("g").remove()
                seen.append("removed")
            except (millstream.NotFound, millstream.InvalidArgument, millstream.Closed):
                pass
            except Exception as error:  # a descriptor was closed twice
                wrong.append(error)

    threads = [threading.Thread(target=remove) for _ in range(4)]
    for thread in threads:
        thread.start()
    joined = 0
    try:
        while joined < 2_000 or (len(seen) < 5 and joined < 100_000):
            stream.consumer("g").close()  # `Closed` came of a group that was removed between
            joined += 1
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    print(f"{joined} joined, {len(seen)} removed")
    assert not wrong
    assert len(seen) >= 5
