"""Each mistake is made and seen, and done right it is not seen."""

import json
import subprocess
import sys
import threading
import warnings

import pytest
from timing import until

import millstream
from millstream.streams import growth
from millstream.testing import clock

DAY = 86_400
MANY = [b"value %d" % i for i in range(60)]


def found(store, **options):
    """What is advised, as (kind, where)."""
    return [(one.kind, one.where) for one in store.advice(**options)]


def figures(store):
    return {(one.kind, one.where): one.figure for one in store.advice()}


def test_advice_is_a_frozen_value_whose_text_has_the_figure(store):
    store.queue("small", capacity=100).put_many(MANY + MANY, timeout=0)
    [advice] = store.advice()
    assert isinstance(advice, millstream.Advice)
    assert advice == millstream.Advice(
        "back-pressure ignored", "queue small", advice.text, advice.figure
    )
    assert advice.figure == 1.0
    assert "100%" in advice.text
    with pytest.raises(AttributeError):
        advice.figure = 2


def test_an_empty_store_has_nothing_to_advise(store):
    store.stream("s", partitions=4)
    store.queue("q")
    assert store.advice() == []


# --- a queue for everything -----------------------------------------------------------------------


def test_messages_that_nobody_takes_for_a_day_are_storage():
    with clock() as virtual, millstream.temporary() as store:
        queue = store.queue("archive")
        queue.put_many(MANY)
        virtual.advance(DAY - 60)
        assert store.advice() == []
        virtual.advance(120)
        assert found(store) == [("queue for everything", "queue archive")]
        assert "60 of 100,000" in store.advice()[0].text
        for message in queue.get_many(100):
            message.nack(delay=0)
        assert store.advice() == [], "they wait, but to be tried again"


def test_the_oldest_message_counts_and_a_delay_is_no_waiting():
    with clock() as virtual, millstream.temporary() as store:
        queue = store.queue("reminders")
        queue.put(b"later", delay=2 * DAY)
        virtual.advance(1.5 * DAY)
        queue.put(b"now", priority=0)
        assert store.advice() == []
        virtual.advance(DAY)
        queue.ack_many(queue.get_many(1))  # `now`, which was ready first
        assert store.advice() == []
        virtual.advance(DAY)
        [advice] = store.advice()
        assert advice.figure == pytest.approx(1.5, abs=0.01)


def test_the_same_messages_in_several_queues(store):
    for name in ("billing", "mail", "search"):
        store.queue(name).put_many(MANY)
    store.queue("other").put_many([b"other %d" % i for i in range(60)])
    [advice] = store.advice()
    assert (advice.kind, advice.where) == (
        "queue for everything",
        "queues billing, mail, search",
    )
    assert advice.figure == 60


def test_a_stream_for_several_readers_is_right(store):
    stream = store.stream("orders")
    stream.append_many(MANY)
    for group in ("billing", "mail", "search"):
        stream.consumer(group).close()
    assert store.advice() == []


def test_few_equal_messages_are_no_copies(store):
    for name in ("a", "b"):
        store.queue(name).put_many([b"tick"] * 60)
    assert store.advice() == []


# --- a stream for simple tasks --------------------------------------------------------------------


def test_members_without_a_partition_are_idle(store):
    stream = store.stream("tasks", partitions=2)
    stream.append_many(MANY, keys=MANY)
    consumers = [stream.consumer("workers") for _ in range(2)]
    assert store.advice() == []
    consumers += [stream.consumer("workers") for _ in range(3)]
    [advice] = store.advice()
    assert (advice.kind, advice.where) == (
        "stream for simple tasks",
        "stream tasks, group workers",
    )
    assert advice.figure == 3
    assert "3 of 5 members" in advice.text
    for consumer in consumers[2:]:
        consumer.close()
    assert store.advice() == []
    for consumer in consumers[:2]:
        consumer.close()


# --- ordering ignored -----------------------------------------------------------------------------


def test_no_record_has_a_key(store):
    stream = store.stream("moves", partitions=3)
    for value in MANY:
        stream.append(value)
    assert figures(store) == {("ordering ignored", "stream moves"): 60}
    stream.append(b"x", key=b"k")
    assert store.advice() == []


def test_without_keys_one_partition_is_in_order(store):
    store.stream("moves").append_many(MANY)
    store.stream("pinned", partitions=3).append_many(MANY, partition=1)
    assert store.advice() == []


def test_keys_in_a_queue_that_is_not_ordered(store):
    items = [millstream.Put(value, key=b"k") for value in MANY]
    store.queue("ordered", ordering="key").put_many(items)
    assert store.advice() == []
    other = [millstream.Put(b"other " + value, key=b"k") for value in MANY]
    store.queue("plain").put_many([*other, b"without"])
    assert figures(store) == {("ordering ignored", "queue plain"): 60}
    assert "60 of 61" in store.advice()[0].text


# --- no idempotency -------------------------------------------------------------------------------


def overrun(queue, virtual):
    queue.put(b"work")
    lost = queue.get(timeout=60)
    virtual.advance(60)
    again = queue.get(timeout=60)
    assert (lost.lost, again.attempt) == (True, 2)
    again.ack()


def test_a_message_that_was_delivered_again():
    with clock() as virtual, millstream.temporary() as store:
        overrun(store.queue("work", lease=1.0), virtual)
        assert figures(store) == {("no idempotency", "queue work"): 1}


def test_a_dead_letter_whose_holder_overran_is_known_after_a_restart(tmp_path):
    with clock() as virtual, millstream.open(tmp_path) as store:
        once = millstream.RetryPolicy(max_attempts=1)
        queue = store.queue("work", lease=1.0, retry=once)
        failing = store.queue("failing", retry=once)
        failing.put(b"x")
        failing.get(timeout=60).nack()
        queue.put(b"work")
        held = queue.get(timeout=60)
        virtual.advance(60)
        assert queue.get_many(1, timeout=0) == []
        assert held.lost
    with millstream.open(tmp_path, mode="r") as store:
        assert store.queue("failing").stats().dead == 1
        assert figures(store) == {("no idempotency", "queue work"): 1}


def test_with_deduplication_or_transactions_it_is_provided_for():
    with clock() as virtual, millstream.temporary() as store:
        overrun(store.queue("deduplicated", lease=1.0, dedup_window=600.0), virtual)
        assert store.advice() == []
        overrun(store.queue("work", lease=1.0), virtual)
        assert len(store.advice()) == 1
        with store.transaction() as tx:
            tx.append(store.stream("done"), b"work")
        assert store.advice() == []


def test_records_that_were_sent_again(store):
    stream = store.stream("orders")
    stream.append_many(MANY)
    assert store.advice() == []
    stream.append_many(MANY[50:])
    assert figures(store) == {("no idempotency", "stream orders"): 10}
    assert "10 of the 70" in store.advice()[0].text


def test_a_producer_with_an_id_sends_again_and_all_is_well(store):
    producer = store.stream("orders").producer(id="ingest-7")
    producer.append_many(MANY, first_sequence=0)
    producer.append_many(MANY[50:], first_sequence=50)
    assert store.stream("orders").next_offset(0) == 60
    assert store.advice() == []
    producer.append_many(MANY[50:], first_sequence=60)
    assert store.advice() == [], "their source says that these are other ones"


def test_readings_that_do_not_change_are_no_re_sends(store):
    store.stream("celsius").append_many([b"20.5"] * 50 + [b"20.6", b"20.5"] * 20)
    assert store.advice() == []


# --- retention never set --------------------------------------------------------------------------


def test_a_large_stream_without_retention(store):
    stream = store.stream("log")
    stream.append_many([bytes(1000)] * 2000)
    assert store.advice() == []
    [advice] = store.advice(large="1MiB")
    assert (advice.kind, advice.where) == ("retention never set", "stream log")
    assert advice.figure == stream.stats().log_bytes > 2_000_000
    stream.alter(retention=millstream.Retention(bytes="1GiB"))
    assert store.advice(large="1MiB") == []
    stream.alter(retention=None, compact=millstream.Compaction())
    assert store.advice(large="1MiB") == []


def test_a_tenth_of_the_free_disk_is_large(store, monkeypatch):
    stream = store.stream("log")
    stream.append_many(MANY)
    free = 10 * stream.stats().log_bytes
    monkeypatch.setattr(growth.files, "free_bytes", lambda path: free + 10)
    assert store.advice() == []
    monkeypatch.setattr(growth.files, "free_bytes", lambda path: free)
    assert found(store) == [("retention never set", "stream log")]


GROW = """
import sys, warnings, threading, millstream
from millstream.streams import growth
growth.LARGE_BYTES = 3 << 20
shown = threading.Event()
print_warning = warnings.showwarning
def show(*arguments):
    print_warning(*arguments)
    shown.set()
warnings.showwarning = show
with millstream.temporary(durability="process") as store:
    for name in ("first", "second"):
        stream = store.stream(name, retention=RETENTION, segment_bytes="1MiB")
        for _ in range(100):
            stream.append_many([bytes(1000)] * 100)
        if name == "first":
            print(shown.wait(30 if RETENTION is None else 0.2))
"""


@pytest.mark.parametrize("retention", ["None", 'millstream.Retention(bytes="2MiB")'])
def test_a_stream_that_grows_without_bound_warns_once_a_process(retention):
    program = GROW.replace("RETENTION", f"({retention})")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True
    )
    warned = done.stderr.count("MillstreamWarning")
    assert (done.stdout.strip(), warned) == (("True", 1) if retention == "None" else ("False", 0))
    assert ("first: " in done.stderr) == (warned == 1)


def test_where_the_filters_raise_it_the_background_goes_on(store, monkeypatch, caplog):
    monkeypatch.setattr(growth, "LARGE_BYTES", 1)
    monkeypatch.setattr(growth, "_warned", False)
    stream = store.stream("log")
    stream.append_many(MANY)
    with warnings.catch_warnings():
        warnings.simplefilter("error", millstream.MillstreamWarning)
        growth.check(stream)
    assert "neither retention nor compaction" in caplog.text
    assert issubclass(millstream.MillstreamWarning, UserWarning)


def test_the_journal_is_nobodys_stream(store, monkeypatch):
    monkeypatch.setattr(growth, "LARGE_BYTES", 1)
    monkeypatch.setattr(growth, "_warned", False)
    with store.transaction() as tx:
        tx.append(store.stream("s"), b"x")
    growth.check(store._transactions.journal().stream)  # a warning would raise
    assert not growth._warned


# --- back-pressure ignored ------------------------------------------------------------------------


def test_a_queue_that_is_nearly_full(store):
    queue = store.queue("jobs", capacity=50)
    queue.put_many(MANY[:44])
    assert store.advice() == []
    queue.put(b"one more")
    assert figures(store) == {("back-pressure ignored", "queue jobs"): 0.9}
    queue.ack_many(queue.get_many(10))
    assert store.advice() == []


def test_puts_that_found_it_full_are_counted_once_each(store):
    queue = store.queue("jobs", capacity=2)
    queue.put_many([b"a", b"b"])
    assert queue.stats().refused == 0
    for timeout in (0, 0.12):
        with pytest.raises(millstream.QueueFull):
            queue.put(b"c", timeout=timeout)
    assert queue.stats().refused == 2
    assert queue.put_many([b"c", b"d"], timeout=0) == []
    assert queue.stats().refused == 3
    waiting = threading.Thread(target=queue.put, args=(b"c",))
    waiting.start()
    until(lambda: queue.stats().refused == 4)
    queue.ack_many(queue.get_many(2))
    waiting.join()
    assert (queue.stats().refused, len(queue)) == (4, 1)
    [advice] = store.advice()
    assert "was opened: 4." in advice.text


def test_a_transaction_that_found_it_full_is_counted(store):
    queue = store.queue("jobs", capacity=1)
    queue.put(b"a")
    with pytest.raises(millstream.QueueFull), store.transaction() as tx:
        tx.put(queue, b"b")
    assert queue.stats().refused == 1


def test_the_count_outlives_a_larger_capacity(store):
    queue = store.queue("jobs", capacity=1)
    queue.put_many([b"a", b"b"])
    queue.alter(capacity=1000)
    assert queue.stats().refused == 1


def fill(stream):
    for _ in range(5):
        stream.append_many([bytes(20_000)] * 60)


def test_a_group_whose_unread_records_go_next(store):
    stream = store.stream("clicks", segment_bytes="1MiB")
    with stream.consumer("slow", max_records=10) as slow:
        fill(stream)
        slow.poll()
        slow.commit()
        assert store.advice() == [], "nothing is ever removed"
        stream.alter(retention=millstream.Retention(bytes="1GiB"))
        assert store.advice() == [], "nothing was removed so far"
        stream.alter(retention=millstream.Retention(bytes="1MiB"))
        stream.enforce_retention()  # or the background has done so
        first = stream.first_offset(0)
        assert first > 10
        [advice] = store.advice()
        assert (advice.kind, advice.where) == (
            "back-pressure ignored",
            "stream clicks, group slow",
        )
        assert advice.figure == 300 - 10
        assert f"and {first - 10} that it was to go on with" in advice.text
        slow.seek("latest")
        slow.commit()
        assert store.advice() == []


# --- looking from outside -------------------------------------------------------------------------


def test_looking_changes_no_byte(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        store.queue("jobs", capacity=50).put_many(MANY)
        store.stream("moves", partitions=3).append_many(MANY, partition=0)
        store.stream("moves").append_many(MANY[:20], partition=1)
    before = snapshot(tmp_path)
    with millstream.open(tmp_path / "store", mode="r") as store:
        assert found(store) == [
            ("ordering ignored", "stream moves"),
            ("back-pressure ignored", "queue jobs"),
        ]
    assert snapshot(tmp_path) == before


def snapshot(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def advise(*words, code=0):
    command = [sys.executable, "-m", "millstream", "advise", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_command_line_says_the_same(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        store.stream("log").append_many([bytes(1000)] * 2000)
        done = advise(tmp_path / "store")
        assert done.stdout == ""
        assert "no proof" in done.stderr
        text = advise(tmp_path / "store", "--large", "1MiB").stdout
        assert "stream log: retention never set\n  1.9 MiB of log" in text
        [one] = json.loads(advise(tmp_path / "store", "--large", "1MiB", "--json").stdout)
        assert millstream.Advice(**one) == store.advice(large="1MiB")[0]
    advise(tmp_path / "nothing", code=3)
    advise(tmp_path / "store", "--large", "much", code=2)


def test_bad_arguments(store):
    for wrong, error in (("much", millstream.InvalidArgument), (1.5, millstream.InvalidType)):
        with pytest.raises(error):
            store.advice(large=wrong)
    store.close()
    with pytest.raises(millstream.Closed):
        store.advice()
