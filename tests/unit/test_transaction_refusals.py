"""What a transaction refuses is refused before anything is stored, and names the reason."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import warnings

import pytest
from transaction_steps import log_of

import millstream
from millstream import Closed, InvalidArgument, InvalidType, LimitExceeded, Unsupported


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
