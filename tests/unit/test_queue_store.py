"""A queue and its store: opening, dropping, closing, reading, in one process and others."""

import contextlib
import os
import pickle
import threading
import time
from datetime import UTC, datetime

import pytest
from open_copy import copy_open
from timing import until

import millstream
from millstream import RetryPolicy
from millstream.disk import files
from millstream.testing import clock


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def values(messages):
    return [m.value for m in messages]


# --- the store's side -----------------------------------------------------------------------------


def test_queue_is_opened_as_it_is_stored(store, tmp_path):
    q = store.queue("q3", capacity=10, lease=5, retry=RetryPolicy(max_attempts=2))
    assert store.queue("q3") is q
    assert store.queue("q3", capacity=10) is q
    with pytest.raises(millstream.ConfigMismatch, match="capacity 10, not 11"):
        store.queue("q3", capacity=11)
    store.close()
    with millstream.open(tmp_path / "store") as again:
        q = again.queue("q3")
        assert (q.capacity, q.lease, q.retry) == (10, 5.0, RetryPolicy(max_attempts=2))
        assert again.queues() == ["q3"]
        assert q.durability == "process"


def test_dropped_queue_is_closed(store):
    q = store.queue("q4")
    ended = []

    def wait():
        with pytest.raises(millstream.Closed):
            q.get()
        ended.append(True)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)  # it waits by now; if not, this shows less and is never wrong
    store.drop_queue("q4")
    waiting.join(60)
    assert ended
    with pytest.raises(millstream.Closed):
        q.put(b"x")
    assert store.queues() == []
    with pytest.raises(millstream.NotFound):
        store.drop_queue("q4")
    store.queue("q4").put(b"x")


def test_read_only_store_changes_no_byte(store, tmp_path):
    q = store.queue("q5")
    q.put_many([b"a", b"b"])
    q.get(timeout=0).reject("no")
    with millstream.open(tmp_path / "store", mode="r") as other:
        look(other)
    store.close()
    before = content(tmp_path)
    with millstream.open(tmp_path / "store", mode="r") as other:
        look(other)
    assert content(tmp_path) == before


@pytest.mark.parametrize("beside_a_writer", [False, True])
def test_leases_of_a_dead_process_are_none_for_a_reader(store, tmp_path, beside_a_writer):
    """Opened with mode="r" they were leased for good, and `peek` did not show the messages."""
    q = store.queue("l", retry=RetryPolicy(max_attempts=1), ordering=None)
    q.put(b"d")
    q.put_many([b"a", b"b", b"c"])
    many = store.queue("m", retry=RetryPolicy(max_attempts=2), ordering=None)
    many.put_many([b"a", b"b", b"c"])
    assert q.get(timeout=0).value == b"d"
    assert [message.value for message in many.get_many(2)] == [b"a", b"b"]
    with millstream.open(tmp_path / "store", mode="r") as reader:  # the holder lives
        assert reader.queue("l").stats().leased == 1
        assert reader.queue("m").stats().leased == 2
        assert [seen.value for seen in reader.queue("m").peek(5)] == [b"c"]
    copy_open(tmp_path / "store", tmp_path / "killed")
    with contextlib.ExitStack() as stack:
        if beside_a_writer:
            stack.enter_context(millstream.open(tmp_path / "killed"))
        reader = stack.enter_context(millstream.open(tmp_path / "killed", mode="r"))
        stats = reader.queue("m").stats()
        assert (stats.ready, stats.leased, stats.unfinished) == (3, 0, 3)
        assert stats.by_priority == (3, 0, 0, 0)
        seen = reader.queue("m").peek(5)
        assert [(one.value, one.state) for one in seen] == [
            (value, "ready") for value in (b"a", b"b", b"c")
        ]
        stats = reader.queue("l").stats()  # all attempts of its message are spent
        assert (stats.ready, stats.leased, stats.dead) == (3, 0, 1)
        assert [letter.value for letter in reader.queue("l").dead.list()] == [b"d"]


def test_leases_that_have_run_out_are_none_for_a_reader(tmp_path):
    with clock() as virtual, millstream.open(tmp_path / "store") as store:
        q = store.queue("l", lease=30.0)
        q.put(b"a")
        assert q.get(timeout=0).value == b"a"
        with millstream.open(tmp_path / "store", mode="r") as reader:
            assert reader.queue("l").stats().leased == 1
            virtual.advance(31.0)
            assert reader.queue("l").stats().ready == 1


def look(other):
    q = other.queue("q5")
    assert len(q) == 1
    assert [seen.value for seen in q.peek(5)] == [b"b"]
    assert q.dead.list()[0].reason == "no"
    assert q.stats().dead == 1
    for call in (lambda: q.put(b"x"), lambda: q.get(timeout=0), q.purge, q.pause, q.dead.purge):
        with pytest.raises(millstream.Unsupported):
            call()
    with pytest.raises(millstream.NotFound):
        other.queue("none")


def content(path):
    found = {}
    for directory, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(directory, name), "rb") as file:
                found[name] = hash(file.read())
    return found


def test_queue_pickles(q):
    again = pickle.loads(pickle.dumps(q))
    assert again is q


@pytest.mark.parametrize("level", ["process", "interval", "sync"])
def test_every_level_puts_and_acks(tmp_path, level):
    with millstream.open(tmp_path / "s", durability=level) as store:
        q = store.queue("q")
        for i in range(5):
            q.put(b"%d" % i)
            q.get(timeout=60).ack()
        q.put(b"left")
        if level == "sync":
            assert q._syncs[1] >= 11
        if level == "interval":
            until(lambda: q._syncs[1] >= 1, "a sync")
    with millstream.open(tmp_path / "s") as store:
        assert store.session.clean
        assert store.queue("q").get(timeout=0).value == b"left"


def test_failed_sync_poisons_until_all_have_closed(tmp_path, monkeypatch):
    def fail(descriptor, path):
        raise millstream.StorageError(5, "no luck", path)

    with millstream.open(tmp_path / "s", durability="sync") as store:
        q = store.queue("q")
        q.put(b"a")
        monkeypatch.setattr(files, "sync", fail)
        with pytest.raises(millstream.Indeterminate):
            q.put(b"b")
        monkeypatch.undo()
        for call in (lambda: q.put(b"c"), lambda: q.get(timeout=0), q.flush):
            with pytest.raises(millstream.Poisoned):
                call()
        assert q.stats().health == "sync failed"
        assert len(q.peek(5)) == 2
    with millstream.open(tmp_path / "s") as store:
        assert not store.session.clean
        q = store.queue("q")
        assert q.stats().health == "sound"
        assert values(q.get_many(5)) == [b"a", b"b"]


def test_flush_of_the_store_syncs_its_queues(store):
    q = store.queue("flushed")
    q.put(b"x")
    store.flush()
    assert q._syncs == (1, 1)
    q.flush()
    assert q._syncs == (2, 2)


def test_what_never_fits_is_refused_at_once(store):
    q = store.queue("tiny", payload_bytes=0)
    q.put(b"x" * 160)
    with pytest.raises(millstream.LimitExceeded):
        q.put(b"x" * 161)
    with q.get(timeout=0) as m:
        assert m.value == b"x" * 160
    q = store.queue("small", payload_bytes=2 << 20)
    q.put(b"x" * (2 << 20))
    with pytest.raises(millstream.QueueFull):
        q.put(b"x" * 5000, timeout=0)
    q.get(timeout=0).ack()
    q.put(b"x" * 5000, timeout=0)


def test_threads_share_a_handle(q):
    seen, lock = [], threading.Lock()

    def work():
        while True:
            with q.get(timeout=60) as m:
                if m.value == b"end":
                    return
                with lock:
                    seen.append(m.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    ids = [q.put(b"x") for _ in range(3000)]
    q.put_many([b"end"] * 4)
    for thread in threads:
        thread.join(30)
    assert sorted(seen) == ids
    assert len(q) == 0


def test_handles_of_one_queue_in_two_stores_of_a_process(q, store, tmp_path):
    with millstream.open(tmp_path / "store") as other:
        other.queue("q").put(b"x")
        m = q.get(timeout=60)
        assert q.get_many(1, timeout=0) == []
        assert other.queue("q").ack_many([m]) == []
        m = other.queue("q").get_many(1, timeout=0)
        assert m == []
        other.queue("q").put(b"y")
        held = other.queue("q").get(timeout=0)
    again = q.get(timeout=60)
    assert (again.value, again.attempt) == (b"y", 2)
    assert not held.lost


def test_dedup_id_is_refused_where_it_would_do_nothing(q):
    with pytest.raises(millstream.InvalidArgument, match="dedup_window"):
        q.put(b"x", dedup_id="a")
    assert len(q) == 0


def test_messages_without_a_key_wait_for_nobody_in_an_ordered_queue(store):
    q = store.queue("some", ordering="key", capacity=100)
    q.put_many([b"1", millstream.Put(b"a", key=b"k"), b"2", millstream.Put(b"b", key=b"k"), b"3"])
    first = q.get_many(10)
    assert values(first) == [b"1", b"a", b"2", b"3"]
    first[0].nack(delay=0)
    assert values(q.get_many(10)) == [b"1"]
    q._check()


def test_late_ack_is_told_also_where_nobody_has_taken_the_message_back(tmp_path):
    with clock() as virtual, millstream.open(tmp_path / "late") as store:
        q = store.queue("q", lease=1.0)
        q.put_many([b"a", b"b"])
        first, second = q.get_many(2)
        virtual.advance(1.1)
        with pytest.raises(millstream.LeaseLost):
            first.ack()
        assert first.lost
        assert q.ack_many([second]) == [second]
        assert sorted(values(q.get_many(1) + q.get_many(1))) == [b"a", b"b"]
        q._check()


def test_ordered_stop_holds_up_the_key_of_a_dead_message(store):
    q = store.queue("stop", ordering="key", on_dead="stop")
    q.put_many([millstream.Put(b"1", key=b"a"), millstream.Put(b"2", key=b"a")])
    q.get(timeout=0).reject("no")
    assert q.get_many(1, timeout=0) == []
    assert q.dead.redrive() == 1
    for expected in (b"1", b"2"):
        with q.get(timeout=60) as m:
            assert m.value == expected


def test_alter_changes_what_can_be(q):
    q.alter(lease=3, retry=RetryPolicy(max_attempts=5))
    assert (q.lease, q.retry.max_attempts) == (3.0, 5)
    q.put(b"x")
    assert (q.get(timeout=0).deadline - datetime.now(UTC)).total_seconds() <= 3.1
