"""What a transaction puts and appends is as if it had been put and appended by itself:
the same order, delays, ids, sizes and durability.
"""

import os
import threading
import time

import pytest
from timing import SOON, until
from transaction_steps import log_of

import millstream
from millstream import QueueFull


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
