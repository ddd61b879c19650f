"""Transactions as their users see them: all or nothing, over streams, queues and positions."""

import contextlib
import sys
import time
from types import ModuleType

import every_call
import pytest
from transaction_steps import log_of, run

import millstream
from millstream import Aborted, InvalidArgument, LeaseLost, QueueFull, testing


def test_everything_of_a_transaction_is_there_after_it_and_nothing_before(any_store):
    store = any_store
    source, out = store.stream("in"), store.stream("out", partitions=3)
    jobs = store.queue("jobs")
    source.append_many([b"a", b"b"])
    jobs.put(b"job")
    consumer = source.consumer("g", delivery="exactly_once", timeout=0)
    batch, message = consumer.poll(0), jobs.get()
    with store.transaction() as tx:
        tx.append(out, b"one", key=b"k", headers={"h": b"v"}, timestamp=17, partition=2)
        tx.append_many(out, [b"two", None], keys=[b"k", None], partition=2)
        tx.put(jobs, b"next", priority=2, key=b"q", headers={"x": b"y"})
        tx.ack(message)
        tx.commit(consumer)
        look = (
            "with millstream.open(sys.argv[1], mode='r') as s:\n"
            "    print(s.stream('out').next_offset(2), len(s.queue('jobs').peek(9)),"
            " s.stream('in').group('g').positions()[0])"
        )
        assert run(look, store.path).strip() == "0 0 None"
        assert log_of(out) == []
        assert len(jobs) == 1
    assert message.finished == "ack"
    [rows] = list(out.read(partition=2))
    assert list(rows.values) == [b"one", b"two", None]
    assert list(rows.keys) == [b"k", b"k", None]
    assert [h or {} for h in rows.headers] == [{"h": b"v"}, {}, {}]
    assert rows.timestamps.tolist()[0] == 17
    with jobs.get(timeout=0) as m:
        assert (m.value, m.priority, m.key, m.headers, m.attempt) == (
            b"next", 2, b"q", {"x": b"y"}, 1,
        )  # fmt: skip
    assert consumer.committed[0].offset == len(batch)
    assert run(look, store.path).split()[:2] == ["3", "0"]
    consumer.close()
    jobs._check()


@pytest.mark.parametrize("how", ["raise", "rollback"])
def test_rolled_back_nothing_was_there_and_consumers_read_again(any_store, how):
    store = any_store
    source, out, jobs = store.stream("in"), store.stream("out"), store.queue("jobs", lease=60)
    source.append_many([b"a", b"b", b"c"])
    jobs.put(b"job")
    with source.consumer("g", delivery="exactly_once", timeout=0, max_records=1) as consumer:
        with store.transaction() as tx:
            consumer.poll()
            tx.commit(consumer)
        message = jobs.get()
        consumer.poll()
        consumer.poll()
        try:
            with store.transaction() as tx:
                tx.append(out, b"x")
                tx.put(jobs, b"y")
                tx.ack(message)
                tx.commit(consumer)
                if how == "raise":
                    raise KeyError
                tx.rollback()
                with pytest.raises(InvalidArgument, match="rolled back"):
                    tx.append(out, b"z")
        except KeyError:
            pass
        assert not message.finished
        assert not message.lost
        assert (log_of(out), len(jobs)) == ([], 1)
        assert consumer.committed[0].offset == 1
        assert list(consumer.poll().values) == [b"b"]
        message.ack()
    assert not store._transactions.exist() or store._transactions.journal().is_applied


def test_commits_while_another_thread_imports_what_it_looks_at(any_store, monkeypatch):
    monkeypatch.setitem(sys.modules, "datetime", ModuleType("datetime"))
    monkeypatch.setitem(sys.modules, "asyncio", ModuleType("asyncio"))
    s = any_store.stream("s")
    with any_store.transaction() as tx:
        tx.append(s, b"x", timestamp=7)
    s.append(b"y", timestamp=8)
    assert log_of(s) == [b"x", b"y"]


def test_empty_transaction_does_nothing(store):
    with store.transaction():
        pass
    assert store.streams() == []


def test_lost_lease_aborts_all_and_consumers_read_again(now, any_store):
    store = any_store
    source, out, jobs = store.stream("in"), store.stream("out"), store.queue("jobs", lease=0.05)
    source.append(b"a")
    ids = jobs.put_many([b"1", b"2"])
    with source.consumer("g", delivery="exactly_once", timeout=0) as consumer:
        consumer.poll()
        good, late = jobs.get_many(2)
        good.extend(60)
        with pytest.raises(Aborted, match="lease was lost"), store.transaction() as tx:
            tx.append(out, b"x")
            tx.put(jobs, b"new")
            tx.ack(good)
            tx.ack(late)
            tx.commit(consumer)
            now.advance(0.06)
            with jobs.get(timeout=60) as again:
                assert again.id == ids[1]
        assert (log_of(out), len(jobs)) == ([], 1)
        assert list(consumer.poll().values) == [b"a"]
        good.ack()
    jobs._check()


def test_lease_that_is_over_aborts_also_where_nobody_has_the_message(any_store):
    with testing.clock() as clock:
        jobs, out = any_store.queue("jobs", lease=30.0), any_store.stream("out")
        jobs.put(b"1")
        message = jobs.get()
        clock.advance(30.1)
        with pytest.raises(Aborted, match="lease was lost"), any_store.transaction() as tx:
            tx.append(out, b"x")
            tx.ack(message)
        assert log_of(out) == []
        assert jobs.get(timeout=0).attempt == 2


@pytest.mark.parametrize("how", ["dropped", "interrupted", "interrupted in between"])
def test_what_is_prepared_is_undone_whatever_fails(any_store, how):
    store = any_store
    first, jobs = store.queue("first"), store.queue("jobs", lease=60)
    source = store.stream("in")
    source.append(b"a")
    ids = jobs.put_many([b"1", b"2"])
    prepare_put, prepare_ack = jobs._prepare_put, jobs._prepare_ack

    def fails(*arguments, **named):
        if how == "dropped":
            store.drop_queue("first")
            raise QueueFull("no room")
        raise KeyboardInterrupt

    def is_interrupted(*arguments):
        prepare_ack(*arguments)
        raise KeyboardInterrupt

    if how == "interrupted in between":
        jobs._prepare_ack = is_interrupted
    jobs._prepare_put = fails
    messages = jobs.get_many(2)
    expected = QueueFull if how == "dropped" else KeyboardInterrupt
    with source.consumer("g", delivery="exactly_once", timeout=0) as consumer:
        consumer.poll()
        with pytest.raises(expected), store.transaction() as tx:
            tx.commit(consumer)
            for message in messages:
                tx.ack(message)
            tx.put(first, b"x")
            tx.put(jobs, b"y")
        assert list(consumer.poll().values) == [b"a"]
        jobs._prepare_put, jobs._prepare_ack = prepare_put, prepare_ack
        for message in messages:
            with contextlib.suppress(LeaseLost):
                message.release()
        found = [jobs.get(timeout=60) for _ in ids]
        assert sorted(m.id for m in found) == ids
        with store.transaction() as tx:
            tx.commit(consumer)
            for message in found:
                tx.ack(message)
        assert consumer.committed[0].offset == 1
    jobs._check()
    assert len(jobs) == 0


def test_lease_that_is_given_back_by_an_abort_still_ends_in_time(store):
    jobs, full = store.queue("jobs", lease=0.3), store.queue("full", capacity=1)
    jobs.put(b"1")
    full.put(b"x")
    message = jobs.get()
    with pytest.raises(QueueFull), store.transaction() as tx:
        tx.ack(message)
        put = full._prepare_put

        def sweeps_first(*arguments, **named):
            jobs._sweep()
            return put(*arguments, **named)

        full._prepare_put = sweeps_first
        tx.put(full, b"y")
    assert jobs._counts()["leased"] == 1
    with jobs.get(timeout=60) as again:
        assert again.id == message.id


def test_finished_message_cannot_be_acknowledged(store):
    jobs = store.queue("jobs")
    jobs.put(b"1")
    message = jobs.get()
    message.ack()
    with store.transaction() as tx:
        with pytest.raises(LeaseLost):
            tx.ack(message)
        tx.append(store.stream("s"), b"goes on")
    assert log_of(store.stream("s")) == [b"goes on"]


def test_message_finished_between_ack_and_commit_aborts(store):
    jobs = store.queue("jobs")
    jobs.put(b"1")
    message = jobs.get()
    with pytest.raises(Aborted), store.transaction() as tx:
        tx.ack(message)
        tx.append(store.stream("s"), b"x")
        message.ack()
    assert log_of(store.stream("s")) == []


def test_consumer_that_lost_its_partition_aborts(now, any_store):
    store = any_store
    source, out = store.stream("in"), store.stream("out")
    source.append(b"a")
    consumer = source.consumer("g", delivery="exactly_once", max_processing=0.05, timeout=0)
    consumer.poll()
    with pytest.raises(Aborted, match="another"), store.transaction() as tx:
        tx.append(out, b"x")
        tx.commit(consumer)
        now.advance(0.08)
        other = source.consumer("g", delivery="exactly_once", timeout=0)
        deadline = time.monotonic() + 10
        while (batch := other.poll(0.05)) is None:
            assert time.monotonic() < deadline
    assert log_of(out) == []
    assert list(batch.values) == [b"a"]
    with store.transaction() as tx:
        tx.append(out, b"y")
        tx.commit(other)
    assert log_of(out) == [b"y"]
    consumer.close()
    other.close()


def test_closed_consumer_aborts(store):
    source = store.stream("in")
    source.append(b"a")
    consumer = source.consumer("g", delivery="exactly_once", timeout=0)
    consumer.poll()
    with pytest.raises(Aborted, match="closed"), store.transaction() as tx:
        tx.append(source, b"b")
        tx.commit(consumer)
        consumer.close()
    assert log_of(source) == [b"a"]


def test_partitions_that_are_added_meanwhile_abort_what_was_routed_by_key(store):
    stream = store.stream("s")
    with pytest.raises(Aborted, match="partitions were added"), store.transaction() as tx:
        tx.append(stream, b"1", key=b"k")
        stream.add_partitions(1)
        tx.append(stream, b"2", key=b"k")
    with store.transaction() as tx:
        tx.append(stream, b"3", key=b"k")
        tx.append(stream, b"by hand", partition=0)
    with store.transaction() as tx:
        tx.append(stream, b"no key")
        stream.add_partitions(1)
    rows = [value for batch in stream.read() for value in batch.values]
    assert sorted(rows) == [b"3", b"by hand", b"no key"]


def test_full_queue_undoes_all_puts_acks_and_positions(any_store):
    store = any_store
    source, out = store.stream("in"), store.stream("out")
    jobs, full = store.queue("jobs"), store.queue("full", capacity=3)
    source.append(b"a")
    jobs.put(b"1")
    full.put_many([b"x", b"y"])
    with source.consumer("g", delivery="exactly_once", timeout=0) as consumer:
        consumer.poll()
        message = jobs.get()
        with pytest.raises(QueueFull), store.transaction() as tx:
            tx.append(out, b"x")
            tx.commit(consumer)
            tx.ack(message)
            tx.put(full, b"z")
            tx.put(full, b"too many")
        assert full._counts()["prepared"] == jobs._counts()["acking"] == 0
        assert (len(full), len(jobs), log_of(out)) == (2, 1, [])
        assert consumer.committed[0] is None
        assert list(consumer.poll().values) == [b"a"]
        message.ack()
    full.put(b"there is room")
    full._check()


def test_put_and_ack_on_one_queue(any_store):
    jobs = any_store.queue("jobs")
    jobs.put_many([b"%d" % i for i in range(20)])
    done = []
    while messages := jobs.get_many(3, timeout=0):
        with any_store.transaction() as tx:
            for m in messages:
                done.append(m.value)
                tx.ack(m)
                if len(m.value) < 3:
                    tx.put(jobs, m.value + b"+")
    assert len(done) == len(set(done)) == 20 + 20 + 10
    assert len(jobs) == 0
    jobs._check()


@pytest.mark.parametrize("end", ["rollback", "exception", "full"])
def test_roll_back_reaches_all_consumers_though_retention_was_faster_than_one(store, end):
    """The next batch of that one says so; the end of the block says what it has to say."""
    short, long = store.stream("short", segment_bytes=1 << 16), store.stream("long")
    queue = store.queue("q", capacity=1)
    for _ in range(30):
        short.append(bytes(9000))
    long.append_many([b"a", b"b"])
    queue.put(b"x")
    named = {"delivery": "exactly_once", "max_records": 1}
    with short.consumer("g", **named) as behind, long.consumer("g", **named) as other:
        raised = {"exception": ZeroDivisionError, "full": QueueFull}.get(end)
        said = pytest.raises(raised) if raised else contextlib.nullcontext()
        with said, store.transaction() as tx:
            for consumer in (behind, other):
                tx.commit(consumer)
                assert consumer.poll() is not None
            short.delete_before(millstream.Position(0, 1, 20))
            if end == "rollback":
                tx.rollback()
            elif end == "exception":
                raise ZeroDivisionError
            else:
                tx.put(queue, b"y")
        with pytest.raises(millstream.OffsetOutOfRange):
            behind.poll()
        with store.transaction() as tx:
            tx.commit(other)
            assert list(other.poll().values) == [b"a"]


@pytest.mark.skipif(not every_call._testcapi, reason="needs what CPython's own tests are built on")
@pytest.mark.skipif("coverage" in sys.modules, reason="what counts lines needs memory itself")
def test_append_that_memory_cuts_short_adds_all_of_its_records_or_none(store):
    stream = store.stream("s", partitions=3)
    keys = [b"%d" % i for i in range(9)]
    headers = [{"a": b"1"}, None, None] * 3
    times = list(range(9))
    number = raised = 0
    while raised == number:
        before = sum(stream.next_offset(i) for i in range(3))
        with store.transaction() as tx:
            tx.append_many(stream, [b"first"] * 3, keys=[b"0", b"1", b"2"])
            cut_short = every_call.refusing(
                lambda tx=tx: tx.append_many(
                    stream, keys, keys=keys, headers=headers, timestamps=times
                ),
                number,
            )
            count = 3
            try:
                cut_short()
                count += 9
            except MemoryError:
                raised += 1
            tx.append_many(stream, [b"last"] * 3, keys=[b"0", b"1", b"2"])
        number += 1
        assert sum(stream.next_offset(i) for i in range(3)) == before + count + 3
    assert raised > 10
    for batch in stream.read():
        for value, key in zip(batch.values, batch.keys, strict=True):
            assert value in (key, b"first", b"last")
