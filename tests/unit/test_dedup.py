"""A dedup_id is stored once within its window: across handles, processes, kills and growth."""

import os
import signal
import subprocess
import sys
import time

import pytest
from open_copy import copy_open

import millstream
from millstream.disk import files
from millstream.testing import clock


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


@pytest.fixture
def q(store):
    made = store.queue("q", capacity=20_000, dedup_window=3600.0, payload_bytes=0)
    yield made
    if not made.closed:
        made._check()


def test_second_put_of_an_id_stores_nothing_and_returns_the_first_one(q):
    first = q.put(b"a", dedup_id="order-1")
    assert q.put(b"b", dedup_id="order-1", priority=2, delay=5) == first
    assert q.put(b"c", dedup_id=b"order-1") == first
    assert q.put(b"d", dedup_id="order-2") != first
    assert q.put_many([millstream.Put(b"e", dedup_id="order-1"), b"f"])[0] == first
    assert [m.value for m in q.get_many(10)] == [b"a", b"d", b"f"]


def test_id_counts_also_when_its_message_is_finished(q):
    for number, finish in enumerate((lambda m: m.ack(), lambda m: m.reject("no"))):
        first = q.put(b"a", dedup_id=f"{number}")
        finish(q.get(timeout=0))
        assert q.put(b"b", dedup_id=f"{number}") == first
    cancelled = q.put(b"c", dedup_id="cancelled")
    assert q.cancel(cancelled)
    assert q.put(b"c", dedup_id="cancelled") == cancelled
    assert len(q) == 0


def test_double_is_told_also_where_the_queue_is_full(store):
    q = store.queue("small", capacity=1, dedup_window=60.0)
    first = q.put(b"a", dedup_id="1")
    assert q.put(b"a", dedup_id="1", timeout=0) == first
    with pytest.raises(millstream.QueueFull):
        q.put(b"b", dedup_id="2", timeout=0)
    q.get(timeout=0).ack()
    assert q.put(b"b", dedup_id="2", timeout=0) != first  # what did not fit has claimed nothing


def test_window_ends(tmp_path):
    with clock() as virtual, millstream.open(tmp_path / "store") as store:
        q = store.queue("q", dedup_window=0.5)
        first = q.put(b"a", dedup_id="1")
        virtual.advance(0.4)
        assert q.put(b"b", dedup_id="1") == first
        virtual.advance(0.2)
        again = q.put(b"c", dedup_id="1")
        assert again != first
        assert q.put(b"d", dedup_id="1") == again
        assert [m.value for m in q.get_many(10)] == [b"a", b"c"]


def test_ids_are_kept_over_closing_and_over_the_death_of_all(tmp_path, store, q):
    done = q.put(b"done", dedup_id="done")
    q.get(timeout=0).ack()
    waiting = q.put(b"waiting", dedup_id="waiting")
    copy_open(store.path, tmp_path / "as killed")  # not closed: as after a kill of all
    for path in (store.path, tmp_path / "as killed"):
        store.close()
        with millstream.open(path) as again:
            q = again.queue("q")
            assert q.put(b"x", dedup_id="done") == done
            assert q.put(b"x", dedup_id="waiting") == waiting
            assert len(q) == 1


def test_table_that_is_gone_is_made_anew_from_the_messages(tmp_path, store, q):
    ids = [q.put(b"x", dedup_id=f"{number}") for number in range(3000)]
    store.close()
    os.remove(tmp_path / "store/queues/q/dedup")
    with millstream.open(tmp_path / "store") as again:
        q = again.queue("q")
        assert [q.put(b"y", dedup_id=f"{number}") for number in range(3000)] == ids


def test_lost_put_may_be_done_again_after_a_power_cut(tmp_path, store, q):
    """The table reached the disk, the slots did not."""
    q.put(b"kept", dedup_id="kept")
    slots = tmp_path / "store/queues/q/slots"
    before = slots.read_bytes()
    first = q.put(b"lost", dedup_id="lost")
    copy_open(store.path, tmp_path / "cut")
    (tmp_path / "cut/queues/q/slots").write_bytes(before)
    with millstream.open(tmp_path / "cut") as again:
        q = again.queue("q")
        assert q.put(b"lost", dedup_id="lost") != first
        assert [m.value for m in q.get_many(10)] == [b"kept", b"lost"]
        q._check()


def test_table_grows_under_other_handles(store, q):
    with millstream.open(store.path) as other:
        theirs = other.queue("q")
        ids = [(q, theirs)[n % 2].put(b"x", dedup_id=f"{n}") for n in range(10_000)]
        assert len(set(ids)) == 10_000
        assert [(theirs, q)[n % 2].put(b"x", dedup_id=f"{n}") for n in range(10_000)] == ids
        for _ in range(100):
            assert theirs.ack_many(theirs.get_many(100)) == []
        assert q.put(b"x", dedup_id="77") == ids[77]


COPIER = """
import os, sys
import millstream
from millstream.disk import files
store = millstream.open(sys.argv[1], durability="process")
q = store.queue("q")
rename = files.rename
files.rename = lambda old, new: os._exit(9) if new.endswith("dedup") else rename(old, new)
for number in range(100_000):
    q.put(b"x", dedup_id=f"{number}", timeout=0)
"""


def test_table_whose_copier_was_killed_is_used_on(store, q):
    first = q.put(b"x", dedup_id="first")
    assert subprocess.run([sys.executable, "-c", COPIER, store.path], check=False).returncode == 9
    assert not q._dedup.is_live
    assert q.put(b"x", dedup_id="first") == first
    assert q._dedup.is_live
    for number in range(10_000):
        q.put(b"x", dedup_id=f"{number}")
    assert len(q) == 10_001


def test_full_disk_while_the_table_grows_changes_nothing(q, monkeypatch):
    real = files.allocate

    def allocate(descriptor, length, path):
        if "dedup" in path:
            raise millstream.StoreFull(28, "no space", path)
        real(descriptor, length, path)

    monkeypatch.setattr(files, "allocate", allocate)
    put = 0
    with pytest.raises(millstream.StoreFull):
        while put < 20_000:
            q.put(b"x", dedup_id=f"{put}", timeout=0)
            put += 1
    monkeypatch.undo()
    assert len(q) == put
    q.put(b"x", dedup_id=f"{put}", timeout=0)
    assert len(q) == put + 1


PRODUCER = """
import os, sys
import millstream
with millstream.open(sys.argv[1], durability="process") as store:
    q = store.queue("q")
    os.write(1, b"ready\\n")
    for number in range(int(sys.argv[2])):
        q.put(b"%d" % number, dedup_id=f"job-{number}", timeout=0)
"""


def start(store, count):
    arguments = [sys.executable, "-c", PRODUCER, store.path, str(count)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_of_many_processes_that_are_killed_and_begin_again_each_id_is_stored_once(store, q):
    count, kills = 15_000, 0
    for turn in range(16):
        processes = [start(store, count) for _ in range(2)]
        time.sleep(0.0007 * turn)  # the moment of the kill is what varies
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            kills += process.wait() == -signal.SIGKILL
            process.stdout.close()
    last = start(store, count)
    assert last.wait(60) == 0
    last.stdout.close()
    found = []
    while messages := q.get_many(500, timeout=0.2):
        found += [int(m.value) for m in messages]
        assert q.ack_many(messages) == []
    print(f"kills={kills} messages={len(found)}")
    assert sorted(found) == list(range(count))
    assert q.put(b"again", dedup_id="job-7") and len(q) == 0
