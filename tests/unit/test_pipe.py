"""Pipes: the exactly-once loop, what fails in it, and what waits."""

import threading
import time

import pytest

import millstream
import millstream.testing
from millstream import InvalidArgument, LimitExceeded, QueueFull


def log_of(stream):
    return [value for batch in stream.read(partition=0) for value in batch.values]


def attempts_of(queue):
    """How often each message was tried, by its value."""
    return {stored.value: stored.attempts for stored in queue.peek(99)}


def test_only_the_message_that_failed_is_charged(store):
    jobs, out = store.queue("jobs"), store.stream("out")
    jobs.put_many([b"1", b"2", b"bad", b"3"])

    def work(message):
        if message.value == b"bad":
            raise KeyError("bad")
        return message.value

    with store.pipe(jobs, work, out) as pipe:
        with pytest.raises(KeyError):
            pipe.run(timeout=0)
        assert attempts_of(jobs) == {b"1": 0, b"2": 0, b"bad": 1, b"3": 0}
        assert log_of(out) == []
        assert (pipe.run(timeout=0), log_of(out)) == (3, [b"1", b"2", b"3"])
    [stored] = jobs.peek(9)
    assert stored.value == b"bad"


def test_what_cannot_be_stored_is_found_out_one_by_one(store):
    jobs, out = store.queue("jobs"), store.queue("out", payload_max="1KiB")
    jobs.put_many([b"1", b"large", b"2"])
    sizes = {b"large": 2000}
    pipe = store.pipe(jobs, lambda m: bytes(sizes.get(m.value, 1)), out)
    with millstream.testing.clock() as clock, pipe:
        for _ in range(9):
            try:
                pipe.run(timeout=0)
            except LimitExceeded:
                clock.advance(3600)
        assert len(out) == 2
        assert [m.value for m in jobs.peek(9)] == [b"large"]


def test_goes_on_after_a_transaction_was_aborted(now, store):
    jobs, out = store.queue("jobs", lease=0.05), store.stream("out")
    jobs.put_many([b"1", b"2", b"3"])
    taken = []

    def work(message):
        if not taken:
            now.advance(0.06)
            taken.extend(jobs.get_many(1))
            taken[0].extend(60)
        return message.value

    with store.pipe(jobs, work, out, batch=1) as pipe:
        assert pipe.run(timeout=0) == 2
        assert pipe.aborted == 1
        taken[0].release()
        assert pipe.run(timeout=0) == 1
    assert sorted(log_of(out)) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("source", ["stream", "queue"])
def test_what_fails_before_the_transaction_loses_nothing(store, source):
    out = store.stream("out")
    if source == "stream":
        numbers = store.stream("in")
        numbers.append_many([b"1", b"2", b"3", b"4"])
    else:
        numbers = store.queue("in")
        numbers.put_many([b"1", b"2", b"3", b"4"])
    with store.pipe(numbers, lambda one: one.value, out, batch=2) as pipe:
        with pytest.raises(InvalidArgument, match="nest"), store.transaction():
            pipe.run(timeout=0)
        assert pipe.run(timeout=0) == 4
    found = log_of(out)
    if source == "queue":  # what is given back goes behind the others
        found.sort()
    assert found == [b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("source", ["stream", "queue"])
def test_full_sink_is_waited_for_and_nobody_is_charged(store, source):
    sink = store.queue("sink", capacity=3)
    values = [b"%d" % i for i in range(20)]
    if source == "stream":
        numbers = store.stream("in")
        numbers.append_many(values)
    else:
        numbers = store.queue("in")
        numbers.put_many(values)
    with store.pipe(numbers, lambda one: one.value, sink, batch=5) as pipe:
        with pytest.raises(QueueFull):
            pipe.run(timeout=0)
        assert len(sink) == pipe.count == 3
        began = time.monotonic()
        with pytest.raises(QueueFull):
            pipe.run(timeout=0.1)
        assert time.monotonic() - began >= 0.1
        if source == "queue":
            assert set(attempts_of(numbers).values()) == {0}
        running = threading.Thread(target=pipe.run, daemon=True)
        running.start()
        found = []
        while len(found) < len(values):
            with sink.get(timeout=10) as message:
                found.append(message.value)
        pipe.stop()
        running.join(10)
        assert not running.is_alive()
    assert sorted(found, key=int) == values
    if source == "stream":
        assert found == values


def test_sink_that_can_never_hold_it_is_an_error_at_once(store):
    numbers, sink = store.stream("in"), store.queue("sink", capacity=3)
    numbers.append_many([b"1", b"2"])
    pipe = store.pipe(numbers, lambda record: [record.value] * 4, sink)
    with pipe, pytest.raises(QueueFull):
        pipe.run()
    assert numbers.group("pipe").lag() == 2


def test_queue_full_of_the_function_itself_comes_out(store):
    numbers, sink = store.queue("in"), store.queue("sink", capacity=1)
    numbers.put(b"1")
    sink.put(b"x")
    pipe = store.pipe(numbers, lambda m: sink.put(m.value, timeout=0), store.stream("out"))
    with pipe, pytest.raises(QueueFull):
        pipe.run()
    assert attempts_of(numbers) == {b"1": 1}


def test_idle_pipe_writes_nothing(store):
    numbers, out = store.stream("in", create=True), store.stream("out")
    with store.pipe(numbers, lambda record: record.value, out) as pipe:
        for _ in range(5):
            assert pipe.step() == 0
        assert not store._transactions.exist()
        numbers.append(b"1")
        assert pipe.run(timeout=0) == 1
        end = store._transactions.journal().end
        for _ in range(5):
            assert pipe.step() == 0
        assert store._transactions.journal().end == end


def test_what_is_put_into_a_queue_is_a_payload_or_a_put(store):
    jobs, out = store.queue("jobs"), store.queue("out", codec="json")
    results = [{"value": 5}, [1, [2, {"value": 3}]], millstream.Put({"key": 6}, priority=0)]
    jobs.put_many([b"%d" % number for number in range(len(results))])
    with store.pipe(jobs, lambda message: results[int(message.value)], out) as pipe:
        assert pipe.run(timeout=0) == 3
    assert [m.value for m in out.get_many(9)] == [{"value": 5}, 1, [2, {"value": 3}], {"key": 6}]


@pytest.mark.parametrize("sink", ["queue", "stream"])
def test_what_belongs_to_the_other_kind_of_sink_is_refused(store, sink):
    jobs, out = store.queue("jobs"), getattr(store, sink)("out")
    jobs.put(b"1")
    wrong = {"value": b"x", "key": b"k"} if sink == "queue" else millstream.Put(b"x", key=b"k")
    refused = pytest.raises(millstream.InvalidType, match="millstream.Put|dict of append's")
    with store.pipe(jobs, lambda message: wrong, out) as pipe, refused:
        pipe.run(timeout=0)
    assert (len(jobs), len(out) if sink == "queue" else out.next_offset(0)) == (1, 0)


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


def test_stop_before_run_has_begun_is_not_forgotten(store):
    numbers, sink = store.stream("in"), store.queue("sink")
    numbers.append(b"1")
    with store.pipe(numbers, lambda record: record.value, sink) as pipe:
        pipe.stop()
        assert pipe.run(timeout=60) == 0 == len(sink)
        assert pipe.run(timeout=0) == 1 == len(sink)  # it was for one run
