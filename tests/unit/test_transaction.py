"""Transactions as their users see them: all or nothing, over streams, queues and positions."""

import asyncio
import contextlib
import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from random import Random
from types import ModuleType

import pytest
from timing import SOON, until

import millstream
from millstream import (
    Aborted,
    Closed,
    Indeterminate,
    InvalidArgument,
    InvalidType,
    LeaseLost,
    LimitExceeded,
    QueueFull,
    StoreFull,
    Unsupported,
    inspect,
    testing,
)
from millstream.disk import files
from millstream.disk.session import State
from millstream.log import compacted

LEVELS = ("process", "interval", "sync")


@pytest.fixture(params=LEVELS)
def any_store(tmp_path, request):
    with millstream.open(tmp_path / "store", durability=request.param) as opened:
        yield opened


def log_of(stream):
    return [
        value
        for partition in range(stream.partitions)
        for batch in stream.read(partition=partition)
        for value in batch.values
    ]


def run(code, *arguments):
    """Another process; what it printed."""
    command = [sys.executable, "-c", "import millstream, sys\n" + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


# --- all or nothing -------------------------------------------------------------------------------


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
    assert not store._transactions.exist() or store._transactions.journal().is_settled


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


# --- what a message keeps -------------------------------------------------------------------------


def test_prepared_message_keeps_the_place_of_its_key(any_store):
    q = any_store.queue("q", ordering="key")
    q.put(b"1", key=b"k")
    first = q.get()
    with any_store.transaction() as tx:
        tx.put(q, b"2", key=b"k")
        tx.put(q, b"other", key=b"z")
    q.put(b"3", key=b"k")
    assert [m.value for m in q.get_many(9, timeout=0)] == [b"other"]
    with any_store.transaction() as tx:
        tx.ack(first)
        tx.put(q, b"4", key=b"k")
    q._check()
    order = []
    while True:
        try:
            with q.get(timeout=0) as m:
                order.append(m.value)
        except millstream.Empty:
            break
    assert order == [b"2", b"3", b"4"]


def test_rolled_back_put_lets_its_key_go_on(store):
    q, full = store.queue("q", ordering="key"), store.queue("full", capacity=1)
    full.put(b"x")
    seen = []
    prepare = full._prepare_put

    def meanwhile(*arguments, **named):
        q.put(b"behind", key=b"k")
        seen.append(q._counts()["held"])
        return prepare(*arguments, **named)

    full._prepare_put = meanwhile
    with pytest.raises(QueueFull), store.transaction() as tx:
        tx.put(q, b"first", key=b"k")
        tx.put(full, b"y")
    assert seen == [1]
    assert q.get(timeout=0).value == b"behind"
    q._check()


def test_delay_and_time_to_live_count_from_the_put(now, any_store):
    q = any_store.queue("q")
    with any_store.transaction() as tx:
        tx.put(q, b"late", delay=1500)
        tx.put(q, b"gone", ttl=100)
        tx.put(q, b"at", at=int((now.now + 1000) * 1e6))
        now.advance(200)
    assert q.get_many(9, timeout=0) == []
    now.advance(900)
    [at] = q.get_many(9, timeout=60)
    assert at.value == b"at"
    at.ack()
    now.advance(300)
    assert q.get_many(9, timeout=0) == []
    now.advance(300)
    assert [m.value for m in q.get_many(9, timeout=60)] == [b"late"]


def test_codec_encodes_what_is_put(any_store):
    q = any_store.queue("q", codec="json")
    with any_store.transaction() as tx:
        tx.put(q, {"a": [1, 2]})
    assert q.get(timeout=0).value == {"a": [1, 2]}


def test_dedup_ids_hold_within_and_between_transactions(any_store):
    q = any_store.queue("q", dedup_window=60.0)
    q.put(b"plain", dedup_id="p")
    began = time.monotonic()
    with any_store.transaction() as tx:
        tx.put(q, b"not again", dedup_id="p")
        tx.put(q, b"once", dedup_id="t")
        tx.put(q, b"twice", dedup_id="t")
    with any_store.transaction() as tx:
        tx.put(q, b"thrice", dedup_id="t")
    q.put(b"and plainly", dedup_id="t")
    assert time.monotonic() - began < SOON  # of the minute of the window
    assert [m.value for m in q.get_many(9)] == [b"plain", b"once"]


def test_dedup_id_of_a_transaction_that_did_nothing_is_free(any_store):
    q, full = any_store.queue("q", dedup_window=60.0), any_store.queue("full", capacity=1)
    full.put(b"x")
    with pytest.raises(QueueFull), any_store.transaction() as tx:
        tx.put(q, b"undone", dedup_id="t")
        tx.put(full, b"y")
    q.put(b"done", dedup_id="t")
    assert [m.value for m in q.get_many(9)] == [b"done"]


def test_dedup_ids_of_transactions_at_once_wait_for_each_other(any_store):
    q = any_store.queue("q", dedup_window=60.0)
    failed = []

    def work(n):
        try:
            for i in range(20):
                with any_store.transaction() as tx:
                    tx.put(q, b"%d" % n, dedup_id=str(i))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert len(q) == 20
    assert time.monotonic() - began < 60 * SOON / 20


def test_large_payloads_go_through_blocks_and_segments(any_store):
    q, s = any_store.queue("q"), any_store.stream("s", segment_bytes=1 << 16)
    large = os.urandom(3 << 20)
    with any_store.transaction() as tx:
        tx.put(q, large)
        tx.append(s, large)
    assert q.get().value == large
    assert log_of(s) == [large]


def test_what_was_given_may_be_changed_before_the_commit(any_store):
    q, s = any_store.queue("q"), any_store.stream("s")
    headers, value, key, header = {}, bytearray(b"v0"), bytearray(b"k0"), bytearray(b"h0")
    with any_store.transaction() as tx:
        for digit in b"012":
            value[1] = key[1] = header[1] = digit
            headers["h"] = header
            tx.append(s, value, key=key, headers=headers)
            tx.append_many(s, [value], keys=[key], headers=[headers])
            tx.put(q, value, key=key, headers=headers)
    [rows] = list(s.read())
    expected = [b"%d" % (i // 2) for i in range(6)]
    assert list(rows.values) == [b"v" + one for one in expected]
    assert list(rows.keys) == [b"k" + one for one in expected]
    assert [dict(one) for one in rows.headers] == [{"h": b"h" + one} for one in expected]
    found = [(m.value, m.key, m.headers) for m in q.get_many(9)]
    assert found == [(b"v%d" % i, b"k%d" % i, {"h": b"h%d" % i}) for i in range(3)]


def test_records_without_key_go_round_and_with_key_to_their_partition(store):
    s, plain = store.stream("s", partitions=4), store.stream("plain", partitions=4)
    keys = [b"%d" % i for i in range(100)]
    plain.append_many([b"v"] * 100, keys=keys)
    with store.transaction() as tx:
        tx.append_many(s, [b"v"] * 100, keys=keys)
    assert [s.next_offset(p) for p in range(4)] == [plain.next_offset(p) for p in range(4)]
    other = store.stream("other", partitions=4)
    for _ in range(4):
        with store.transaction() as tx:
            tx.append(other, b"x")
    assert [other.next_offset(p) for p in range(4)] == [1, 1, 1, 1]


# --- bad input ------------------------------------------------------------------------------------


def test_nested_and_reused_transactions_are_refused(store):
    s = store.stream("s")
    with store.transaction() as tx:
        tx.append(s, b"a")
        with pytest.raises(InvalidArgument, match="nest"), store.transaction():
            pass
        with pytest.raises(InvalidArgument, match="used once"), tx:
            pass
    with pytest.raises(InvalidArgument, match="used once"), tx:
        pass
    with pytest.raises(InvalidArgument, match="within its `with`"):
        tx.append(s, b"b")
    with pytest.raises(InvalidArgument, match="within its `with`"):
        store.transaction().append(s, b"b")
    assert log_of(s) == [b"a"]


def test_tasks_of_one_thread_have_a_transaction_each(store):
    s = store.stream("s")

    async def work(n, others):
        with store.transaction() as tx:
            tx.append(s, b"%d" % n)
            with pytest.raises(InvalidArgument, match="nest"), store.transaction():
                pass
            await asyncio.gather(*others)  # begun within, but not this task's
        with store.transaction() as tx:
            tx.append(s, b"%d again" % n)

    async def main():
        await asyncio.gather(*(work(n, [work(n + 10, [])]) for n in range(3)))

    asyncio.run(main())
    numbers = [*range(3), *range(10, 13)]
    assert sorted(log_of(s)) == sorted(
        [b"%d" % n for n in numbers] + [b"%d again" % n for n in numbers]
    )
    with store.transaction(), pytest.raises(InvalidArgument, match="nest"), store.transaction():
        pass


def test_too_large_a_transaction_is_refused_and_what_fits_goes_on(store):
    s, q = store.stream("s"), store.queue("q")
    with store.transaction(max_bytes="10KiB") as tx:
        tx.append(s, b"x" * 5000)
        with pytest.raises(LimitExceeded, match="max_bytes of 10240"):
            tx.append(s, b"y" * 5200)
        with pytest.raises(LimitExceeded):
            tx.put(q, b"y" * 5200)
        tx.append(s, b"fits")
    assert log_of(s) == [b"x" * 5000, b"fits"]
    assert len(q) == 0


@pytest.mark.parametrize("what", ["key", "headers"])
def test_bound_counts_keys_and_headers(store, what):
    s, q = store.stream("s"), store.queue("q")
    large = {"key": bytes(6000)} if what == "key" else {"headers": {"h": bytes(6000)}}
    with store.transaction(max_bytes="10KiB") as tx:
        tx.append(s, b"1", **large)
        for refused in (
            lambda: tx.append(s, b"2", **large),
            lambda: tx.append_many(s, [b"2"], **{f"{what}s".replace("ss", "s"): [large[what]]}),
            lambda: tx.put(q, b"2", **large),
        ):
            with pytest.raises(LimitExceeded, match="max_bytes"):
                refused()
    assert log_of(s) == [b"1"]
    assert len(q) == 0
    with pytest.raises(LimitExceeded, match="max_bytes"), store.transaction(max_bytes=9000) as tx:
        tx.append_many(s, [b"x", b"y"], headers={"h": bytes(6000)})  # of each of them


@pytest.mark.parametrize("size", [0, -1, "1 parsec", 1.5, True])
def test_bad_max_bytes_is_refused(store, size):
    with pytest.raises((InvalidArgument, InvalidType)):
        store.transaction(max_bytes=size)


def test_strangers_and_wrong_types_are_refused(store, tmp_path):
    s, q = store.stream("s"), store.queue("q")
    with millstream.open(tmp_path / "other") as other:
        theirs, their_queue = other.stream("s"), other.queue("q")
        theirs.append(b"x")
        their_queue.put(b"x")
        message = their_queue.get()
        with theirs.consumer("g", delivery="exactly_once") as consumer, store.transaction() as tx:
            for call in (
                lambda: tx.append(theirs, b"x"),
                lambda: tx.put(their_queue, b"x"),
                lambda: tx.ack(message),
                lambda: tx.commit(consumer),
                lambda: tx.append(s, b"x", partition=1),
                lambda: tx.append_many(s, [b"x"], keys=[b"a", b"b"]),
                lambda: tx.append_many(s, [b"x"], headers=[{}, {}]),
                lambda: tx.put(q, b"x", priority=9),
                lambda: tx.put(q, b"x", dedup_id="d"),
                lambda: tx.put(q, b"x", delay=1, at=5),
            ):
                with pytest.raises(InvalidArgument):
                    call()
            for call in (
                lambda: tx.append(q, b"x"),
                lambda: tx.put(s, b"x"),
                lambda: tx.ack(b"x"),
                lambda: tx.commit(s),
                lambda: tx.append(s, 7),
                lambda: tx.put(q, None),
                lambda: tx.put(q, 7),
            ):
                with pytest.raises(InvalidType):
                    call()
        message.ack()
    assert log_of(s) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"value": b"v", "timestamp": "yesterday"},
        {"value": b"v", "key": b"k" * (1 << 17)},
        {"value": b"v", "headers": {"h": 7}},
        {"value": b"v", "headers": {7: b"h"}},
        {"value": b"v", "headers": {"h" * 70000: b""}},
    ],
)
def test_what_a_stream_would_refuse_is_refused_before_the_commit(any_store, bad):
    s, q = any_store.stream("s"), any_store.queue("q")
    refused = pytest.raises((InvalidArgument, InvalidType, LimitExceeded))
    with refused, any_store.transaction() as tx:
        tx.put(q, b"x")
        tx.append(s, **bad)
    with any_store.transaction() as tx:
        tx.append(s, b"well")
    assert (log_of(s), len(q)) == ([b"well"], 0)


def test_what_a_queue_would_refuse_is_refused_before_the_commit(any_store):
    s, q = any_store.stream("s"), any_store.queue("q", payload_max="1KiB")
    for bad in ({"value": bytes(2000)}, {"value": b"", "headers": {"h": 7}},
                {"value": b"", "key": bytes(1 << 17)}, {"value": b"", "at": 1 << 62}):  # fmt: skip
        refused = pytest.raises((InvalidArgument, InvalidType, LimitExceeded))
        with refused, any_store.transaction() as tx:
            tx.append(s, b"x")
            tx.put(q, **bad)
    with any_store.transaction() as tx:
        tx.append(s, b"well")
    assert (log_of(s), len(q)) == ([b"well"], 0)


def test_transaction_left_open_when_the_store_closes_is_rolled_back_with_a_warning(tmp_path):
    store = millstream.open(tmp_path / "store")
    s = store.stream("s")
    with pytest.raises(Closed, match="closed within it"), store.transaction() as tx:
        tx.append(s, b"x")
        with pytest.warns(ResourceWarning, match="never ended: rolled back"):
            store.close()
    with millstream.open(tmp_path / "store") as again:
        assert log_of(again.stream("s")) == []


def test_store_is_closed_where_that_warning_is_an_error(tmp_path):
    store = millstream.open(tmp_path / "store")
    s = store.stream("s")
    s.append(b"kept")
    store.transaction().__enter__().append(s, b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ResourceWarning, match="never ended: rolled back"):
            store.close()
    assert store.closed
    with millstream.open(tmp_path / "store") as again:
        assert again.session.clean
        assert log_of(again.stream("s")) == [b"kept"]


def test_transaction_left_open_at_exit_is_rolled_back_with_a_warning(tmp_path):
    code = (
        "import millstream, sys\n"
        "store = millstream.open(sys.argv[1])\n"
        "tx = store.transaction().__enter__()\n"
        "tx.append(store.stream('s'), b'x')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, str(tmp_path / "store")],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert "never ended: rolled back" in done.stderr
    with millstream.open(tmp_path / "store") as store:
        assert log_of(store.stream("s")) == []


def test_read_only_store_has_no_transactions(tmp_path):
    with millstream.open(tmp_path / "store") as store, store.transaction() as tx:
        tx.append(store.stream("s"), b"x")
    with millstream.open(tmp_path / "store", mode="r") as store:
        with pytest.raises(Unsupported, match="read-only"):
            store.transaction()
        assert store.streams() == ["s"]
        assert log_of(store.stream("s")) == [b"x"]


def test_forked_child_cannot_use_the_transaction(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        s = store.stream("s")
        with store.transaction() as tx, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            tx.append(s, b"mine")
            child = os.fork()
            if child == 0:
                try:
                    tx.append(s, b"theirs")
                except Closed:
                    os._exit(7)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert log_of(s) == [b"mine"]


def test_users_do_not_see_the_journal(store):
    with store.transaction() as tx:
        tx.append(store.stream("s"), b"x")
    assert store.streams() == ["s"]
    for call in (store.stream, store.drop_stream):
        with pytest.raises(InvalidArgument):
            call("@journal")
    with pytest.raises(InvalidArgument):
        store.stream("s").producer(id="@transactions")


# --- what was dropped -----------------------------------------------------------------------------


def pending(store, fill):
    """A transaction that is committed and whose effects wait to be applied."""
    tx = store.transaction(durability="interval")
    with tx:
        fill(tx)
        tx._commit = lambda: None
    from millstream.transactions.commit import Commit

    commit, journal = Commit(tx, store._transactions.journal()), store._transactions.journal()
    with journal.holding():
        offset, _ = commit._record(True)
        commit._recorded()
    journal.forget(offset)  # as if of another process
    assert not journal.is_settled
    return journal


def apply(journal):
    with journal.holding():
        journal.apply_pending()


@pytest.mark.parametrize("anew", [False, True])
def test_what_was_dropped_meanwhile_gets_nothing_and_the_rest_does(store, anew):
    s, q, source, kept = (
        store.stream("s"), store.queue("q"), store.stream("in"), store.stream("kept"),
    )  # fmt: skip
    source.append_many([b"a", b"b"])
    q.put(b"old")
    consumer = source.consumer("g", delivery="exactly_once", timeout=0)
    consumer.poll()
    message = q.get()

    def fill(tx):
        tx.append(s, b"x")
        tx.put(q, b"y")
        tx.ack(message)
        tx.commit(consumer)
        tx.append(kept, b"z")

    journal = pending(store, fill)
    store.drop_stream("s")
    store.drop_queue("q")
    store.drop_stream("in")
    if anew:
        store.stream("s"), store.queue("q").put(b"new"), store.stream("in").append(b"new")
        with store.stream("in").consumer("g"):
            pass
    apply(journal)
    assert log_of(kept) == [b"z"]
    if anew:
        assert log_of(store.stream("s")) == []
        assert [m.value for m in store.queue("q").get_many(9)] == [b"new"]
        assert store.stream("in").group("g").positions()[0] is None


@pytest.mark.parametrize("anew", [False, True])
def test_stream_that_is_dropped_before_the_commit_lets_nothing_happen(any_store, anew):
    store = any_store
    s, q = store.stream("s"), store.queue("q")
    q.put(b"job")
    message = q.get()
    with pytest.raises(Closed), store.transaction() as tx:
        tx.ack(message)
        tx.append(s, b"x")
        store.drop_stream("s")
        if anew:
            store.stream("s").append(b"new")
    assert (q._counts()["leased"], q._counts()["acking"]) == (1, 0)
    message.ack()
    assert log_of(store.stream("s")) == ([b"new"] if anew else [])


def test_effects_are_not_skipped_where_the_store_is_closed_under_the_applier(tmp_path):
    store = millstream.open(tmp_path / "store")
    s = store.stream("s")
    journal = pending(store, lambda tx: tx.append(s, b"x"))
    store.session.state = State.CLOSED
    with pytest.raises(Closed), journal.holding():
        journal.apply_until(journal.end)
    store.session.state = State.OPEN
    assert not journal.is_settled
    store.close()
    with millstream.open(tmp_path / "store") as again:
        assert log_of(again.stream("s")) == [b"x"]


def test_pending_effects_are_applied_before_a_store_closes_clean(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        s, q = store.stream("s"), store.queue("q")

        def fill(tx):
            tx.append(s, b"x")
            tx.put(q, b"y")

        pending(store, fill)
        assert (log_of(s), q.peek(9)) == ([], [])
    with millstream.open(tmp_path / "store") as store:
        assert store.session.clean
        assert log_of(store.stream("s")) == [b"x"]
        assert store.queue("q").get().value == b"y"


def test_last_to_close_does_not_call_a_store_clean_whose_journal_is_not_applied(tmp_path):
    """Its committer was killed between the look of `close` and the gate."""
    store = millstream.open(tmp_path / "store", durability="sync")
    s = store.stream("s")
    store._settle_journal = list
    journal = pending(store, lambda tx: tx.append(s, b"x"))
    journal.sync(journal.end)
    store.close()
    with millstream.open(tmp_path / "store") as again:
        assert log_of(again.stream("s")) == [b"x"]


def test_store_closes_while_threads_commit(tmp_path):
    for turn in range(5):
        store = millstream.open(tmp_path / f"store{turn}")
        s = store.stream("s")
        counts, odd = [0] * 3, []

        def work(n, store=store, s=s, counts=counts, odd=odd):
            try:
                while True:
                    with store.transaction() as tx:
                        tx.append(s, b"%d" % n)
                    counts[n] += 1
            except Closed:
                pass
            except Indeterminate as error:
                counts[n] += error.committed
            except BaseException as error:
                odd.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        until(lambda counts=counts: min(counts) > 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            store.close()
            for thread in threads:
                thread.join(40)
                assert not thread.is_alive()
            gc.collect()
        assert odd == []
        with millstream.open(tmp_path / f"store{turn}") as again:
            found = log_of(again.stream("s"))
        for n in range(3):
            assert counts[n] <= found.count(b"%d" % n) <= counts[n] + 1


# --- faults ---------------------------------------------------------------------------------------


def test_full_disk_after_the_commit_is_indeterminate_and_applied_later(any_store, monkeypatch):
    store = any_store
    s, q = store.stream("s", segment_bytes=1 << 16), store.queue("q")
    s.append(b"first")
    make, full = files.make, [True]

    def no_room(path, *arguments):
        if full[0] and "/streams/s/" in path:
            raise StoreFull(28, "No space left on device", path)
        return make(path, *arguments)

    monkeypatch.setattr(files, "make", no_room)
    large = bytes(3 << 20)
    with pytest.raises(Indeterminate) as caught, store.transaction() as tx:
        tx.append(s, large)
        tx.put(q, b"m")
    assert caught.value.committed
    assert "committed" in repr(tx)
    # While it cannot be applied nothing else is committed.
    with pytest.raises(StoreFull), store.transaction() as tx:
        tx.put(q, b"refused")
    q._look()
    full[0] = False
    with store.transaction() as tx:
        tx.append(s, b"last")
    assert log_of(s) == [b"first", large, b"last"]
    assert [m.value for m in q.get_many(9)] == [b"m"]


def test_full_disk_before_the_commit_undoes_everything(any_store, monkeypatch):
    store = any_store
    s, q = store.stream("s"), store.queue("q")
    q.put(b"1")
    with store.transaction() as tx:
        tx.append(s, b"first")
    message = q.get()
    make = files.make

    def no_room(path, *arguments):
        if "@journal" in path:
            raise StoreFull(28, "No space left on device", path)
        return make(path, *arguments)

    monkeypatch.setattr(files, "make", no_room)
    with pytest.raises(StoreFull), store.transaction() as tx:
        tx.append(s, bytes(17 << 20))
        tx.ack(message)
        tx.put(q, b"2")
    assert log_of(s) == [b"first"]
    assert (q._counts()["leased"], q._counts()["prepared"]) == (1, 0)
    message.ack()


def test_failed_sync_of_the_journal_says_that_it_is_not_known(tmp_path, monkeypatch):
    store = millstream.open(tmp_path / "store", durability="sync")
    s, q = store.stream("s"), store.queue("q")
    with store.transaction() as tx:
        tx.append(s, b"first")
    sync = files.sync

    def fails(descriptor, path):
        if "@journal" in path:
            raise millstream.StorageError(5, "Input/output error", path)
        sync(descriptor, path)

    monkeypatch.setattr(files, "sync", fails)
    with pytest.raises(Indeterminate) as caught, store.transaction() as tx:
        tx.append(s, b"second")
        tx.put(q, b"m")
    assert not caught.value.committed
    with pytest.raises(millstream.StorageError), store.transaction() as tx:
        tx.append(s, b"third")
    monkeypatch.setattr(files, "sync", sync)
    with pytest.raises(millstream.StorageError):
        store.close()
    with millstream.open(tmp_path / "store") as again:
        found = log_of(again.stream("s"))
        assert found == [b"first", b"second"]
        assert again.queue("q").get(timeout=0).value == b"m"
        with again.transaction() as tx:
            tx.append(again.stream("s"), b"fourth")


def test_effects_are_not_kept_in_memory_where_another_process_applied_them(store):
    s = store.stream("s")
    journal = store._transactions.journal()
    apply_until = journal.apply_until

    def by_another(end):
        kept, journal._waiting = journal._waiting, {}
        apply_until(end)
        journal._waiting = kept

    journal.apply_until = by_another
    for _ in range(3):
        with store.transaction(durability="interval") as tx:
            tx.append(s, b"x")
    assert len(log_of(s)) == 3
    assert journal._waiting == {}


def test_checkpoint_keeps_the_journal_short_and_the_effects(tmp_path, monkeypatch):
    from millstream.transactions import journal as module

    monkeypatch.setattr(module, "CHECKPOINT_BYTES", 1 << 20)
    monkeypatch.setattr(module, "CHECKED_RECORDS", 10)
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1 << 18)
    with millstream.open(tmp_path / "store", durability="interval") as store:
        s, q = store.stream("s"), store.queue("q", payload_bytes="64MiB")
        for i in range(60):
            with store.transaction() as tx:
                tx.append_many(s, [b"%d" % i] + [bytes(1 << 15)] * 2)
                tx.put(q, b"%d" % i)
        assert compacted.extent(store._transactions.journal().stream._log(0))[0] < 3 << 20
        assert store._transactions.journal()._page.checkpoint > 0
        assert [v for v in log_of(s) if len(v) < 9] == [b"%d" % i for i in range(60)]
        assert [m.value for m in q.get_many(99)] == [b"%d" % i for i in range(60)]


# --- liveness -------------------------------------------------------------------------------------


def test_plain_put_does_not_wait_for_the_dedup_id_of_a_dead_committer(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as store:
        q = store.queue("q", dedup_window=60.0)
        code = (
            "import os\n"
            "store = millstream.open(sys.argv[1])\n"
            "q = store.queue('q')\n"
            "page = store._transactions.journal()._page\n"
            "page.word(store.session.members, 'x', 1.0).__enter__()\n"
            "q._prepare_put(5, 0, b'never', dedup_id='d')\n"
            "os._exit(0)\n"
        )
        run(code, store.path)
        began = time.monotonic()
        q.put(b"mine", dedup_id="d", timeout=60)
        assert time.monotonic() - began < SOON
        assert [m.value for m in q.get_many(9)] == [b"mine"]
        q._check()


def test_what_a_dead_committer_prepared_is_withdrawn_by_who_waits(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as store:
        q = store.queue("q", ordering="key")
        q.put(b"leased", key=b"a")
        code = (
            "import os\n"
            "store = millstream.open(sys.argv[1])\n"
            "q = store.queue('q')\n"
            "m = q.get()\n"
            "page = store._transactions.journal()._page\n"
            "page.word(store.session.members, 'x', 1.0).__enter__()\n"
            "q._prepare_put(5, 0, b'never', key=b'b')\n"
            "q._prepare_ack(5, m)\n"
            "os._exit(0)\n"
        )
        run(code, store.path)
        q.put(b"behind", key=b"b")
        found = [q.get(timeout=60).value for _ in range(2)]
        assert sorted(found) == [b"behind", b"leased"]
        q._check()


def test_reader_does_not_wait_for_a_committer_that_is_stopped(store):
    source = store.stream("in", partitions=2)
    for partition in range(2):
        source.append(b"%d" % partition, partition=partition)
    journal = store._transactions.journal()
    stopped = source.consumer("g", delivery="exactly_once")
    first = list(stopped.poll().values)
    others = [[value] for value in (b"0", b"1") if value not in first]
    with journal.holding():
        stopped._member.prepare(journal.number_of(journal.end))
        stopped.close()
        with source.consumer("g", delivery="exactly_once") as consumer:
            began = time.monotonic()
            assert [list(consumer.poll().values)] == others
            assert consumer.poll() is None
            assert time.monotonic() - began < SOON
            journal.holding().release()
            assert list(consumer.poll(5).values) == first
            journal.holding().take(1)


def test_position_in_a_database_is_not_committed_by_a_transaction(store):
    source = store.stream("in")
    source.append(b"a")
    with source.consumer("g", delivery="exactly_once", timeout=0) as consumer:
        consumer.position_in(sqlite3.connect(":memory:"))
        consumer.poll()
        refused = pytest.raises(InvalidArgument, match="database")
        with refused, store.transaction() as tx:
            tx.commit(consumer)
        assert store._transactions.exist() is False


def test_stream_that_is_dropped_while_all_is_synced_does_not_fail_the_commit(tmp_path, monkeypatch):
    from millstream.transactions import journal as module

    monkeypatch.setattr(module, "CHECKPOINT_BYTES", 1)
    monkeypatch.setattr(module, "CHECKED_RECORDS", 1)
    with millstream.open(tmp_path / "store", durability="process") as store:
        kept = store.stream("kept")
        streams, waiting = store._streams, store._queues
        names, queues, dropped = streams.names, waiting.names, []

        def meanwhile(found, drop, name):
            """As another process, right behind the look at what there is."""
            if name in found and name not in dropped:
                dropped.append(name)
                drop(name)
            return found

        def commits():
            with store.transaction() as tx:
                tx.append(kept, b"x")

        for work in (commits, store.flush):
            store.stream("going").append(b"x")
            store.queue("gone").put(b"x")
            with monkeypatch.context() as patch:
                patch.setattr(
                    streams, "names", lambda: meanwhile(names(), store.drop_stream, "going")
                )
                patch.setattr(
                    waiting, "names", lambda: meanwhile(queues(), store.drop_queue, "gone")
                )
                work()
            assert sorted(dropped) == ["going", "gone"]
            assert (names(), queues()) == (["@journal", "kept"], [])
            dropped.clear()
        assert log_of(kept) == [b"x"]


def test_closing_does_not_wait_for_a_thread_that_waits_for_it(tmp_path):
    """It has the journal, and opens what its transaction names: the store's lock is next."""
    store = millstream.open(tmp_path / "store", durability="process")
    s, other = store.stream("s"), store.stream("other")
    journal, raised = store._transactions.journal(), []
    at_it, opened = threading.Event(), journal.applier.stream

    def waits(place):
        at_it.set()
        time.sleep(0.3)  # meanwhile the store is being closed
        return opened(place)

    journal.applier.stream = waits

    def work():
        try:
            with store.transaction() as tx:
                tx.append(s, b"1")
                tx.append(other, b"2")
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert at_it.wait(10)
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with contextlib.suppress(millstream.LockTimeout):
            store.close()
    assert time.monotonic() - began < SOON
    thread.join(60)
    assert not thread.is_alive()
    with millstream.open(tmp_path / "store") as again:
        assert [log_of(again.stream(name)) for name in ("s", "other")] == [[b"1"], [b"2"]]


@pytest.mark.parametrize("level", ["interval", "sync"])
def test_interrupted_behind_its_record_it_is_committed_and_the_next_goes_on(tmp_path, level):
    with millstream.open(tmp_path / "store", durability=level) as store:
        source, out = store.stream("in"), store.stream("out")
        source.append_many([b"a", b"b"])
        with source.consumer("g", delivery="exactly_once", timeout=0, max_records=1) as consumer:
            journal = store._transactions.journal()
            sync = journal.sync

            def interrupted(end):
                journal.sync = sync
                raise KeyboardInterrupt

            journal.sync = interrupted
            for expected in (KeyboardInterrupt, None):
                refused = pytest.raises(expected) if expected else contextlib.nullcontext()
                with refused, store.transaction() as tx:
                    tx.commit(consumer)
                    tx.append_many(out, consumer.poll().values)
            assert consumer.committed[0].offset == 2
        assert log_of(out) == [b"a", b"b"]


DIES_BEHIND_ITS_RECORD = """
import os
from millstream.transactions import journal
store = millstream.open(sys.argv[1], durability=sys.argv[2])
s = store.stream('s', partitions=2)
def dies(*arguments):
    os._exit(0)
for name in ('apply_own', 'apply_synced', *(['sync'] if sys.argv[3] == 'unsynced' else [])):
    setattr(journal.Journal, name, dies)
with store.transaction() as tx:
    tx.append_many(s, [b'0', b'1'], partition=0)
    tx.append(s, b'2', partition=1)
"""


@pytest.mark.parametrize("way", ["follow", "poll", "consumer"])
@pytest.mark.parametrize("death", ["process unsynced", "sync unsynced", "sync synced"])
def test_readers_see_soon_what_a_dead_committer_had_committed(tmp_path, way, death):
    """Nobody commits, opens or closes: a process that has the store open applies it."""
    level, when = death.split()
    with millstream.open(tmp_path / "store", durability=level) as store:
        s = store.stream("s", partitions=2)
        assert log_of(s) == []
        run(DIES_BEHIND_ITS_RECORD, store.path, level, when)
        began = time.monotonic()
        found = []
        if way == "follow":
            for batch in s.read(follow=True, timeout=60):
                found += batch.values
                if len(found) == 3:
                    break
        elif way == "poll":
            until(lambda: len(log_of(s)) == 3)
            found = log_of(s)
        else:
            with s.consumer("g", timeout=60) as consumer:
                for batch in consumer:
                    found += batch.values
                    if len(found) == 3:
                        break
        assert sorted(found) == [b"0", b"1", b"2"]
        assert time.monotonic() - began < SOON
        assert store._transactions.journal().is_settled


def test_interrupts_leave_neither_words_nor_halves(tmp_path):
    """Ctrl-C at any moment of many commits: all or nothing, and the next one goes on."""
    store = millstream.open(tmp_path / "store", durability="process")
    s, q, other = store.stream("s"), store.queue("q"), store.stream("other")
    random, interrupts, tried = Random(7), 0, 0

    def commit(number):
        with store.transaction() as tx:
            tx.append(s, b"%d" % number)
            tx.put(q, b"%d" % number)
            tx.append(other, b"%d" % number)

    commit(0)  # imports what is imported late, which an interrupt may not hit
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    until = time.monotonic() + 2.0
    try:
        while time.monotonic() < until:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))
                for _ in range(20):
                    tried += 1
                    commit(tried)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            assert store._transactions.journal().holding().value == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    commit(tried + 1)
    q._settle_undecided()
    found = [m.value for m in q.get_many(1 << 20)]
    lists = [log_of(s), log_of(other), found]
    lost = set(lists[0]) ^ set(lists[1]) | set(lists[0]) ^ set(found)
    twice = [len(one) - len(set(one)) for one in lists]
    print(
        f"transactions tried={tried} interrupted={interrupts} lost={len(lost)} twice={twice} seed=7"
    )
    assert (lost, twice, q._counts()["prepared"]) == (set(), [0, 0, 0], 0)
    assert interrupts > 50
    q._check()
    store.close()


# --- the files ------------------------------------------------------------------------------------


def test_second_reader_knows_the_journal_and_a_damaged_page_is_made_anew(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path) as store, store.transaction() as tx:
        tx.append(store.stream("s"), b"x")
    report = inspect.verify(path)
    assert report.ok
    assert (report.streams, report.records) == (2, 3)
    page = path / "streams" / "@journal" / "page"
    page.write_bytes(b"rubbish".ljust(4096, b"\0"))
    report = inspect.verify(path)
    assert report.ok
    assert any(note.path == page for note in report.notes)
    with millstream.open(path) as store, store.transaction() as tx:
        tx.append(store.stream("s"), b"y")
    with millstream.open(path) as store:
        assert log_of(store.stream("s")) == [b"x", b"y"]
    assert not inspect.verify(path).notes


def test_damaged_journal_is_named_and_repaired(tmp_path):
    path = tmp_path / "store"
    with millstream.open(path) as store:
        for i in range(3):
            with store.transaction() as tx:
                tx.append(store.stream("s"), b"%d" % i * 100)
    segment = path / "streams" / "@journal" / "00000" / "0000000000000001.seg"
    raw = segment.read_bytes()
    at = raw.rindex(b"1" * 100)
    segment.write_bytes(raw[:at] + b"?" + raw[at + 1 :])
    report = inspect.verify(path)
    assert [problem.path for problem in report.problems] == [segment]
    inspect.repair(path)
    assert inspect.verify(path).ok
    with millstream.open(path) as store:
        with store.transaction() as tx:
            tx.append(store.stream("s"), b"goes on")
        assert log_of(store.stream("s"))[-1] == b"goes on"


def test_pipe_says_what_it_cannot_put_out_and_when_it_is_closed(store):
    queue, out = store.queue("jobs"), store.stream("out")
    queue.put(b"1")
    pipe = store.pipe(queue, lambda message: {"key": b"k"}, out)
    with pipe, pytest.raises(millstream.InvalidType, match="value"):
        pipe.step()
    with pytest.raises(millstream.Closed, match="pipe"):
        pipe.step()
    with pytest.raises(millstream.Closed, match="pipe"):
        pipe.run(timeout=0)
    assert queue.stats().leased == 0


def test_pipe_takes_nothing_within_another_transaction(store):
    """Its own would not begin, and what it had read would be committed with the next step."""
    source, jobs, out = store.stream("source"), store.queue("jobs"), store.stream("out")
    source.append_many([b"1", b"2", b"3"])
    jobs.put(b"4")
    records = store.pipe(source, lambda record: record.value, out, batch=2)
    messages = store.pipe(jobs, lambda message: message.value, out)
    with records, messages:
        with store.transaction():
            for pipe in (records, messages):
                with pytest.raises(InvalidArgument, match="nest"):
                    pipe.step()
        assert [m.attempts for m in jobs.peek()] == [0]
        assert records.run(timeout=0) + messages.run(timeout=0) == 4
    assert log_of(out) == [b"1", b"2", b"3", b"4"]


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


# --- what is durable of its effects ---------------------------------------------------------------


@pytest.mark.parametrize("level", ["interval", "sync"])
@pytest.mark.parametrize("stored", ["process", "interval", "sync"])
def test_records_of_a_transaction_that_waits_are_durable_in_their_streams(tmp_path, level, stored):
    """A reader of what is durable gets them without anybody else's sync."""
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", partitions=2, durability=stored)
        for round_ in (1, 2):
            with store.transaction(durability=level) as tx:
                for partition in range(2):
                    tx.append(stream, b"x", partition=partition)
            for partition in range(2):
                until(lambda p=partition, n=round_: stream.durable_offset(p) == n, seconds=SOON)
        read = stream.read(durable=True)
        assert sum(len(batch) for batch in read) == 4


def test_records_of_a_transaction_that_does_not_wait_are_left_to_who_syncs(tmp_path):
    with millstream.open(tmp_path / "s", durability="process") as store:
        first, marker = (store.stream(name, partitions=1) for name in ("first", "marker"))
        with store.transaction() as tx:
            tx.append(first, b"x")
        # The background syncs all that it was told of in one go: the marker came later.
        marker.append(b"x", durability="interval")
        until(lambda: marker.durable_offset(0) == 1, seconds=SOON)
        assert first.durable_offset(0) == 0


@pytest.mark.parametrize("stored", ["process", "interval", "sync"])
def test_append_at_interval_is_synced_whatever_the_level_of_its_stream(tmp_path, stored):
    with millstream.open(tmp_path / "s", durability="process") as store:
        stream = store.stream("s", partitions=1, durability=stored)
        for offset in range(2):
            stream.append(b"x", durability="interval")
            until(lambda n=offset + 1: stream.durable_offset(0) == n, seconds=SOON)
