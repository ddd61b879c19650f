"""The queue as its users see it: each call of the API, and what it does with bad input."""

import asyncio
import copy
import gc
import os
import pickle
import queue as standard
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from timing import SOON, least

import millstream
from millstream import RetryPolicy


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def values(messages):
    return [m.value for m in messages]


# --- putting and taking ---------------------------------------------------------------------------


def test_what_is_put_comes_out_with_all_it_had(q):
    before = datetime.now(UTC)
    number = q.put(b"hello", priority=1, key=b"k", headers={"a": b"1", "b": b""})
    with q.get(timeout=5.0) as m:
        assert (m.id, m.value, m.key, m.priority, m.attempt) == (number, b"hello", b"k", 1, 1)
        assert m.headers == {"a": b"1", "b": b""}
        assert before - timedelta(seconds=1) <= m.put_at <= datetime.now(UTC)
        assert 25 < (m.deadline - datetime.now(UTC)).total_seconds() <= 30.1
        assert m.lost is False
        assert len(q) == 1
    assert len(q) == 0
    assert m.finished == "ack"


@pytest.mark.parametrize(
    "value", [b"", b"x", b"x" * 160, b"x" * 161, b"x" * 5000, b"y" * (3 << 20)]
)
def test_payloads_of_any_size_come_out_as_they_were(q, value):
    q.put(value, key=b"key", headers={"h": b"v"})
    with q.get(timeout=60) as m:
        assert (m.value, m.key, m.headers) == (value, b"key", {"h": b"v"})


@pytest.mark.parametrize("value", [bytearray(b"ab"), memoryview(b"ab"), memoryview(b"aabb")[::2]])
def test_bytes_like_values_are_copied(q, value):
    q.put(value)
    assert q.get(timeout=60).value == bytes(value)


def test_order_is_priority_then_age(q):
    for lane, value in ((3, b"d"), (0, b"a"), (1, b"c"), (0, b"b")):
        q.put(value, priority=lane)
    assert values(q.get_many(10)) == [b"a", b"b", b"c", b"d"]


def test_ids_rise_and_are_not_used_again(store, tmp_path):
    q = store.queue("ids")
    first = q.put(b"1")
    q.get(timeout=0).ack()
    second = q.put(b"2")
    store.close()
    with millstream.open(tmp_path / "store") as again:
        third = again.queue("ids").put(b"3")
    assert first < second < third


def test_put_many_takes_values_and_puts(q):
    ids = q.put_many([b"a", millstream.Put(b"b", priority=3, headers={"x": b"y"}), b"c"])
    assert len(set(ids)) == 3
    got = q.get_many(5)
    assert values(got) == [b"a", b"c", b"b"]
    assert got[2].headers == {"x": b"y"}
    with pytest.raises(TypeError, match="prio"):
        millstream.Put(b"", prio=1)


@pytest.mark.parametrize("payload", [{}, {"value": 5}, {"value": b"x", "priority": 1}, {"a": 1}])
def test_a_dict_is_a_payload_with_a_codec_and_an_error_without(store, payload):
    plain, coded = store.queue("plain"), store.queue("coded", codec="pickle")
    with store.transaction() as tx:
        tx.put(coded, payload)
        calls = (
            plain.put,
            lambda item: plain.put_many([b"1", item]),
            lambda item: tx.put(plain, item),
        )
        for call in calls:
            with pytest.raises(millstream.InvalidType, match=r"millstream\.Put\(.*codec="):
                call(payload)
    coded.put(payload)
    coded.put_many([payload, millstream.Put(payload, priority=3)])
    assert values(coded.get_many(9)) == [payload] * 4
    assert values(plain.get_many(9)) == [b"1"]


@pytest.mark.parametrize("one", [{"value": 5}, {}, "abc", b"abc", bytearray(b"a"), 5, None])
@pytest.mark.parametrize("codec", [None, "json"])
def test_put_many_takes_no_single_value_for_many(store, codec, one):
    """Of a dict it stored the names, of a string each letter."""
    queue = store.queue("q", codec=codec)
    with pytest.raises(millstream.InvalidType, match="items: expected .*found"):
        queue.put_many(one)
    assert len(queue) == 0


def test_a_put_is_an_item_of_put_many_alone(store):
    plain, coded = store.queue("plain"), store.queue("coded", codec="pickle")
    with store.transaction() as tx:
        for queue in (plain, coded):
            for call in (queue.put, lambda item, queue=queue: tx.put(queue, item)):
                with pytest.raises(millstream.InvalidType, match="Put"):
                    call(millstream.Put(b"x"))
    assert len(plain) == len(coded) == 0


def test_a_put_is_compared_printed_pickled_and_not_changed():
    put = millstream.Put(b"x", priority=2, headers={"a": b"1"})
    for again in (pickle.loads(pickle.dumps(put)), copy.copy(put), copy.deepcopy(put)):
        assert again == put
    assert put != millstream.Put(b"x")
    assert put != b"x"
    assert repr(put) == "Put(b'x', priority=2, headers={'a': b'1'})"
    assert eval(repr(put), {"Put": millstream.Put}) == put
    with pytest.raises(AttributeError):
        put.priority = 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(put)


def test_full_queue_refuses_times_out_and_goes_on_when_there_is_room(store):
    q = store.queue("small", capacity=3, dead_limit=2)
    assert len(q.put_many([b"1", b"2", b"3", b"4"])) == 3
    with pytest.raises(millstream.QueueFull) as caught:
        q.put(b"x", timeout=0)
    assert isinstance(caught.value, standard.Full)
    began = time.monotonic()
    with pytest.raises(millstream.QueueFull):
        q.put(b"x", timeout=0.1)
    assert time.monotonic() - began >= 0.1

    def put_when_one_is_taken():
        taker = threading.Timer(0.1, lambda: q.get(timeout=0).ack())
        taker.start()
        q.put(b"4", timeout=60)
        taker.join()

    assert least(put_when_one_is_taken) < SOON
    assert len(q) == 3


def test_dead_letters_do_not_take_the_room_of_others(store):
    q = store.queue("small", capacity=2, dead_limit=2)
    for i in range(5):
        q.put(b"%d" % i, timeout=0)
        q.get(timeout=0).reject("no")
    assert len(q.put_many([b"a", b"b", b"c"])) == 2
    assert [letter.value for letter in q.dead.list()] == [b"3", b"4"]
    assert q.stats().evicted == 3
    q._check()


def test_queue_grows_to_its_capacity(store):
    q = store.queue("grown", capacity=5000)
    assert len(q.put_many([b"x"] * 6000)) == 5000
    assert q.stats().slots == 8192 or q.stats().slots == 6144
    assert len(q.ack_many(q.get_many(6000))) == 0
    assert len(q) == 0


def test_get_waits_until_something_comes(q):
    def get_late():
        threading.Timer(0.1, q.put, [b"late"]).start()
        m = q.get(timeout=60)
        assert m.value == b"late"
        m.ack()

    assert 0.09 < least(get_late) < SOON


def test_get_times_out_with_empty(q):
    with pytest.raises(millstream.Empty) as caught:
        q.get(timeout=0)
    assert isinstance(caught.value, standard.Empty)
    began = time.monotonic()
    with pytest.raises(millstream.Empty):
        q.get(timeout=0.05)
    assert time.monotonic() - began >= 0.05
    assert q.get_many(3, timeout=0) == []


def test_waiting_costs_no_cpu(q):
    before = time.process_time()
    q.get_many(1, timeout=0.6)
    assert time.process_time() - before < 0.03


# --- ends of a lease ------------------------------------------------------------------------------


def test_exception_counts_and_is_delivered_again(q):
    q.put(b"x")
    with pytest.raises(KeyError), q.get(timeout=60):
        raise KeyError("why")
    with q.get(timeout=60) as m:
        assert m.attempt == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, SystemExit])
def test_interruption_releases_and_does_not_count(q, error):
    q.put(b"x")
    with pytest.raises(error), q.get(timeout=60):
        raise error
    with q.get(timeout=60) as m:
        assert m.attempt == 1


def test_control_exceptions_do_what_they_say(q):
    q.put(b"x")
    with q.get(timeout=60):
        raise millstream.Retry(0)
    with q.get(timeout=60) as m:
        assert m.attempt == 2
        raise millstream.Snooze(0)
    with q.get(timeout=60) as m:
        assert m.attempt == 2
        raise millstream.Reject("bad address")
    [letter] = q.dead.list()
    assert (letter.reason, letter.last_error) == ("bad address", "bad address")


def test_what_the_body_finished_stays(q):
    q.put(b"x")
    with q.get(timeout=60) as m:
        m.release()
    with q.get(timeout=60) as m:
        assert m.attempt == 1
        m.nack(0, "no")
    with q.get(timeout=60) as m:
        assert m.attempt == 2
        m.ack()
    assert len(q) == 0


def test_second_ack_is_lease_lost(q):
    q.put(b"x")
    m = q.get(timeout=60)
    m.ack()
    with pytest.raises(millstream.LeaseLost):
        m.ack()
    with pytest.raises(millstream.LeaseLost):
        m.extend(5)


def test_lease_that_ran_out_is_lost_and_delivered_again(store):
    q = store.queue("short", lease=0.1)
    q.put(b"x")
    m = q.get(timeout=60)
    again = q.get(timeout=60)
    assert (again.value, again.attempt) == (b"x", 2)
    assert m.lost
    with pytest.raises(millstream.LeaseLost):
        m.ack()
    again.ack()
    assert q.stats().redelivered == 1


def test_extend_makes_a_longer_lease(store):
    q = store.queue("short", lease=0.15)
    q.put(b"x")
    m = q.get(timeout=60)
    m.extend(60)
    assert q.get_many(1, timeout=0.3) == []
    assert not m.lost
    m.ack()


def test_ack_many_returns_what_was_lost(now, store):
    q = store.queue("short", lease=0.05)
    q.put_many([b"a", b"b", b"c"])
    ms = q.get_many(3)
    ms[0].extend(60)
    now.advance(0.1)
    q._sweep()
    assert q.ack_many(ms) == ms[1:]
    other = store.queue("other")
    other.put(b"x")
    with pytest.raises(millstream.InvalidArgument, match="another queue"):
        q.ack_many(other.get_many(1))
    with pytest.raises(millstream.InvalidType):
        q.ack_many([b"x"])


def test_what_this_handle_acknowledged_itself_is_not_lost_to_ack_many(q):
    """A message that was given twice was called lost, as if it were delivered again."""
    q.put_many([b"a", b"b", b"c"])
    a, b, c = q.get_many(3)
    a.ack()
    c.release()
    assert q.ack_many([a, b, b, c]) == [c]
    assert q.ack_many([a, b, c]) == [c]
    with pytest.raises(millstream.LeaseLost, match="was finished before: ack"):
        b.ack()
    assert not (a.lost or b.lost) and (a.finished, b.finished) == ("ack", "ack")
    assert q.ack_many([b]) == []
    assert values(q.get_many(9)) == [b"c"]
    q._check()


def test_message_that_failed_comes_alone(q):
    q.put_many([b"a", b"b", b"c"])
    q.get(timeout=0).nack(0)
    assert values(q.get_many(5)) == [b"b", b"c"]
    assert values(q.get_many(5)) == [b"a"]


# --- time -----------------------------------------------------------------------------------------


def test_delay_is_never_early_and_ends_without_a_look_from_outside(q):
    def get_delayed(delay):
        q.put(b"x", delay=delay)
        q.get(timeout=60).ack()

    for delay in (0.02, 0.05, 0.001):
        assert delay <= least(lambda delay=delay: get_delayed(delay)) < SOON


def test_waiter_sees_a_delay_that_is_put_meanwhile(q):
    def get_delayed():
        threading.Timer(0.05, lambda: q.put(b"x", delay=0.05)).start()
        q.get(timeout=60).ack()

    assert 0.1 <= least(get_delayed) < SOON


def test_at_takes_datetimes_and_microseconds(q):
    q.put(b"x", at=datetime.now(UTC) + timedelta(seconds=0.05))
    assert q.get_many(1, timeout=0) == []
    assert q.get(timeout=60).value == b"x"
    q.put(b"past", at=1)
    assert q.get(timeout=0).value == b"past"


def test_delay_and_messages_outlive_the_store(now, store, tmp_path):
    q = store.queue("q2")
    q.put(b"later", delay=100.0)
    q.put(b"now", headers={"a": b"b"})
    q.put(b"z" * 10000, priority=3)
    m = q.get(timeout=60)
    assert m.value == b"now"
    store.close()
    with pytest.raises(millstream.Closed):
        m.ack()
    with pytest.raises(millstream.Closed):
        q.get(timeout=0)
    with pytest.raises(millstream.Closed):
        _ = q.paused
    with millstream.open(tmp_path / "store") as again:
        q = again.queue("q2")
        first = q.get(timeout=0)
        assert (first.value, first.attempt, first.headers) == (b"now", 2, {"a": b"b"})
        assert q.get(timeout=0).value == b"z" * 10000
        assert q.get_many(1, timeout=0) == []
        now.advance(101.0)
        assert q.get(timeout=60).value == b"later"


def test_ttl_ends_a_message(now, q):
    q.put(b"x", ttl=0.05)
    q.put(b"y")
    now.advance(0.06)
    assert values(q.get_many(2)) == [b"y"]
    assert q.stats().expired == 1


def test_pause_and_resume(q):
    q.put(b"x")
    q.pause()
    assert q.paused
    assert q.get_many(1, timeout=0) == []
    threading.Timer(0.1, q.resume).start()
    assert q.get(timeout=60).value == b"x"


# --- looking and removing -------------------------------------------------------------------------


def test_peek_takes_nothing(q):
    q.put(b"later", delay=60)
    q.put_many([millstream.Put(b"b", priority=1), millstream.Put(b"a", headers={"x": b"y"})])
    seen = q.peek(10)
    assert [(s.value, s.state) for s in seen] == [
        (b"a", "ready"), (b"b", "ready"), (b"later", "delayed")
    ]  # fmt: skip
    assert seen[0].headers == {"x": b"y"}
    assert seen[2].due > datetime.now(UTC) + timedelta(seconds=55)
    assert len(q.peek()) == 1
    assert len(q) == 3


def test_cancel_and_purge(q):
    number = q.put(b"x")
    assert q.cancel(number)
    assert not q.cancel(number)
    assert q.get_many(1, timeout=0) == []
    held = q.put(b"held")
    m = q.get(timeout=0)
    assert not q.cancel(held)
    q.put_many([b"a", millstream.Put(b"b", delay=60)])
    assert q.purge() == 2
    assert len(q) == 1
    m.ack()


def test_stats_count_by_state(q):
    q.put_many([b"a", b"b", millstream.Put(b"c", priority=2), millstream.Put(b"d", delay=60)])
    q.get(timeout=0)
    stats = q.stats()
    assert (stats.ready, stats.delayed, stats.leased, stats.dead) == (2, 1, 1, 0)
    assert stats.by_priority == (1, 0, 1, 0)
    assert (stats.unfinished, stats.capacity, stats.health) == (4, 2000, "sound")


def test_join_waits_for_the_last(q):
    q.join(timeout=0)
    q.put(b"x")
    with pytest.raises(millstream.WaitTimeout):
        q.join(timeout=0.05)
    m = q.get(timeout=0)
    threading.Timer(0.1, m.ack).start()
    began = time.monotonic()
    q.join(timeout=60)
    assert time.monotonic() - began < SOON


def test_dead_letters_keep_why_and_can_go_back(q):
    number = q.put(b"x", key=b"k", headers={"h": b"v"})
    for i in range(3):
        q.get(timeout=60).nack(0, f"failure {i}")
    assert q.get_many(1, timeout=0) == []
    [letter] = q.dead.list()
    assert (letter.id, letter.value, letter.reason) == (number, b"x", "failed")
    assert (letter.first_error, letter.last_error, letter.attempts) == ("failure 0", "failure 2", 3)
    assert letter.first_at <= letter.last_at
    assert (letter.key, letter.headers) == (b"k", {"h": b"v"})
    assert q.dead.peek(number) == letter
    with pytest.raises(millstream.NotFound):
        q.dead.peek(number + 1)
    assert q.dead.redrive([number + 1]) == 0
    assert q.dead.redrive([number]) == 1
    m = q.get(timeout=60)
    assert (m.id, m.attempt) == (number, 1)
    m.reject("x" * 300 + "é")
    assert len(q.dead) == 1
    assert q.dead.purge() == 1
    assert q.dead.list() == []


def test_redrive_of_all(q):
    q.put_many([b"a", b"b"])
    for m in q.get_many(2):
        m.reject()
    assert q.dead.redrive() == 2
    assert sorted(values([q.get(timeout=0), q.get(timeout=0)])) == [b"a", b"b"]


def test_redrive_takes_the_oldest_for_which_there_is_room(store):
    q = store.queue("small", capacity=3)
    ids = q.put_many([b"a", b"b", b"c"])
    for m in q.get_many(3):
        m.reject()
    q.put_many([b"d", b"e"])
    assert q.dead.redrive() == 1
    assert [one.id for one in q.dead.list()] == ids[1:]
    q._check()
    for which in (None, ids[1], ids[1:]):  # full: refused, and nothing is changed
        before = q.stats()
        with pytest.raises(millstream.QueueFull, match="3 messages are not finished"):
            q.dead.redrive(which)
        assert q.stats().unfinished == before.unfinished == 3
        assert [one.id for one in q.dead.list()] == ids[1:]
    q._check()
    assert q.dead.redrive([]) == q.dead.redrive(ids[0]) == 0  # none of them is a dead letter
    for m in q.get_many(3):
        m.ack()
    assert q.dead.redrive(ids) == 2
    assert sorted(m.value for m in q.get_many(3)) == [b"b", b"c"]


# --- order by key ---------------------------------------------------------------------------------


def test_one_message_of_a_key_is_in_flight(store):
    q = store.queue("ordered", ordering="key", retry=RetryPolicy(backoff=0.0))
    q.put_many([millstream.Put(b"a1", key=b"a"), millstream.Put(b"a2", key=b"a")])
    q.put(b"b1", key=b"b")
    first, other = q.get(timeout=0), q.get(timeout=0)
    assert (first.value, other.value) == (b"a1", b"b1")
    assert q.get_many(1, timeout=0) == []
    first.nack(0)
    first = q.get(timeout=0)
    assert first.value == b"a1"
    first.ack()
    assert q.get(timeout=60).value == b"a2"


@pytest.mark.parametrize("on_dead", ["skip", "stop"])
def test_messages_without_a_key_wait_for_none(tmp_path, on_dead):
    with millstream.open(tmp_path / "store") as store:
        q = store.queue("q", ordering="key", on_dead=on_dead, capacity=10)
        q.put_many([b"1", b"2", millstream.Put(b"later", delay=3600), b"3", b"dead", b"4"])
        assert [m.value for m in q.get_many(2, timeout=0)] == [b"1", b"2"]
        third, dead = q.get_many(2, timeout=0)
        dead.reject("no")
        third.nack(3600)
        assert q.get(timeout=0).value == b"4"
        q.alter(capacity=20)
        q.dead.redrive()
        q.put(b"5")
        assert [m.value for m in q.get_many(5, timeout=0)] == [b"dead", b"5"]
        assert q.cancel(q.peek()[0].id)
        q._check()
    with millstream.open(tmp_path / "store") as store:  # recovered
        q = store.queue("q")
        while q.stats().ready:
            q.get(timeout=0)
        assert q.stats().held == 0
        assert q.stats().leased == 5


# --- codecs ---------------------------------------------------------------------------------------


def test_codec_encodes_and_decodes(store):
    q = store.queue("json", codec="json")
    q.put({"a": [1, None]})
    q.put_many([[1], millstream.Put({"b": 2})])
    assert q.peek()[0].value == {"a": [1, None]}
    with q.get(timeout=60) as m:
        assert m.value == {"a": [1, None]}
    assert values(q.get_many(2)) == [[1], {"b": 2}]


def test_value_that_does_not_decode_goes_to_the_dead_letters(store):
    store.queue("json").put(b"{")
    q = store.queue("json", codec="json")
    with pytest.raises(ValueError), q.get(timeout=60) as m:
        print(m.value)
    [letter] = q.dead.list()
    assert (letter.value, letter.reason) == (b"{", "not decodable")
    assert "JSONDecodeError" in letter.last_error


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"value": "text"}, millstream.InvalidType),
        ({"value": 5}, millstream.InvalidType),
        ({"value": b"", "priority": 4}, millstream.InvalidArgument),
        ({"value": b"", "priority": -1}, millstream.InvalidArgument),
        ({"value": b"", "priority": "high"}, millstream.InvalidType),
        ({"value": b"", "priority": True}, millstream.InvalidType),
        ({"value": b"", "delay": -1}, millstream.InvalidArgument),
        ({"value": b"", "delay": float("nan")}, millstream.InvalidArgument),
        ({"value": b"", "delay": float("inf")}, millstream.InvalidArgument),
        ({"value": b"", "delay": "1"}, millstream.InvalidType),
        ({"value": b"", "delay": 1, "at": 5}, millstream.InvalidArgument),
        ({"value": b"", "ttl": -1}, millstream.InvalidArgument),
        ({"value": b"", "key": "k"}, millstream.InvalidType),
        ({"value": b"", "key": b"k" * 65537}, millstream.LimitExceeded),
        ({"value": b"", "headers": [1]}, millstream.InvalidType),
        ({"value": b"", "headers": {1: b""}}, millstream.InvalidType),
        ({"value": b"", "headers": {"a": "b"}}, millstream.InvalidType),
        ({"value": b"", "headers": {"a" * 256: b""}}, millstream.LimitExceeded),
        ({"value": b"", "headers": {"\ud800": b""}}, millstream.InvalidArgument),
        ({"value": b"", "timeout": -1}, millstream.InvalidArgument),
        ({"value": b"", "timeout": "1"}, millstream.InvalidType),
        ({"value": bytes((16 << 20) + 1)}, millstream.LimitExceeded),
    ],
)
def test_bad_puts_store_nothing(q, arguments, error):
    value = arguments.pop("value")
    with pytest.raises(error):
        q.put(value, **arguments)
    assert len(q) == 0


def test_counts_of_messages_are_ints(q):
    q.put_many([b"1", b"2"])
    for count, error in ((True, millstream.InvalidType), (0, millstream.InvalidArgument)):
        with pytest.raises(error):
            q.get_many(count, timeout=0)
    assert [m.value for m in q.get_many(1 << 70, timeout=0)] == [b"1", b"2"]


def test_dedup_id_that_is_no_text_is_refused(store):
    q = store.queue("dedup", dedup_window=60)
    with pytest.raises(millstream.InvalidArgument, match="dedup_id"):
        q.put(b"x", dedup_id="\ud800")
    assert len(q) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 0}, {"priorities": 0}, {"priorities": 9}, {"slot_bytes": 10}, {"lease": 0},
        {"ordering": "fifo"}, {"ttl": -1}, {"dead_limit": -1}, {"on_dead": "x"}, {"ageing": 1},
        {"durability": "x"}, {"capacity": 1 << 24}, {"payload_max": -1},
    ],
)  # fmt: skip
def test_bad_options_make_no_queue(store, options):
    with pytest.raises(millstream.InvalidArgument):
        store.queue("bad", **options)
    assert store.queues() == []


def test_damaged_header_is_refused(store, tmp_path):
    store.queue("q6").put(b"x")
    store.close()
    path = tmp_path / "store" / "queues" / "q6" / "slots"
    with open(path, "r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    with millstream.open(tmp_path / "store") as again, pytest.raises(millstream.CorruptBatch):
        again.queue("q6")


def test_damaged_message_goes_to_the_dead_letters(store, tmp_path):
    q = store.queue("q7")
    q.put_many([b"needle" * 10, b"fine"])
    store.close()
    path = tmp_path / "store" / "queues" / "q7" / "slots"
    data = path.read_bytes()
    at = data.index(b"needle")
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"N")
    with millstream.open(tmp_path / "store") as again:
        q = again.queue("q7")
        assert values(q.get_many(5)) == [b"fine"]
        [letter] = q.dead.list()
        assert (letter.value, letter.reason) == (None, "torn or corrupt")


def test_word_of_a_queue_is_named_by_its_path(store):
    queue = store.queue("q")
    word = queue._word("maintenance", queue.path, 1.0)
    assert queue.path in word.name
    with word:
        assert word.value


def test_closed_queue_that_nobody_holds_keeps_no_file(tmp_path):
    """A cycle kept its maps, and so four descriptors, until the collector ran, which may be never:
    servers freeze it or turn it off."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        for number in range(3):
            with millstream.open(tmp_path / "store") as store:
                queue = store.queue("q", codec=None, dedup_window=60.0)
                queue.put_many([b"x"])
                queue.put(b"x", dedup_id=str(number))
                message = queue.get(timeout=0)
                message.ack()
                assert len(queue.dead) == 0
            del store, queue, message
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
