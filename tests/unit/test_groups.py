"""Consumer groups: which records a group gets, how often, and what its positions are."""

import asyncio
import threading
import time

import pytest
from group_steps import at, fill, filled, taken
from timing import SOON

import millstream
import millstream.groups.group
from millstream import (
    Fenced,
    InvalidArgument,
    OffsetOutOfRange,
    Position,
    Unsupported,
)
from millstream.testing import clock


@pytest.fixture
def stream(store):
    return filled(store)


# --- reading and positions ------------------------------------------------------------------------


def test_each_group_gets_every_record(stream):
    every = sorted(value for batch in stream.read() for value in batch.values)
    for name in ("one", "two"):
        with stream.consumer(group=name, timeout=0) as consumer:
            assert sorted(v for batch in consumer for v in batch.values) == every
            consumer.commit()
    assert stream.groups() == ["one", "two"]
    assert at(stream, "one") == at(stream, "two") == [10] * 4


def test_at_least_once_goes_on_at_the_last_commit(stream):
    with stream.consumer(group="g", max_records=4) as consumer:
        first = consumer.poll()
        consumer.commit()
        assert consumer.poll() is not None  # handed out, not committed
    assert sorted(at(stream)) == [0, 0, 0, 4]
    with stream.consumer(group="g") as consumer:
        assert len(taken(consumer)) == 36
        assert first.partition in consumer.assignment


def test_commit_of_a_batch_keeps_what_came_before_it_alone(stream):
    with stream.consumer(group="g", max_records=3) as consumer:
        consumer.pause(1, 2, 3)
        batches = [consumer.poll() for _ in range(3)]
        consumer.commit(batches[1])
        assert at(stream) == [6, 0, 0, 0]
        assert consumer.committed[0] == Position(0, 1, 6)
        assert consumer.position[0] == Position(0, 1, 9)
        consumer.commit()
        assert at(stream) == [9, 0, 0, 0]


def test_commit_backwards_only_when_asked(stream):
    with stream.consumer(group="g", max_records=3) as consumer:
        consumer.pause(1, 2, 3)
        first, second = consumer.poll(), consumer.poll()
        consumer.commit(second)
        with pytest.raises(InvalidArgument, match="allow_backwards"):
            consumer.commit(first)
        consumer.commit(second)
        consumer.commit(first, allow_backwards=True)
        assert at(stream) == [3, 0, 0, 0]


def test_auto_commit_commits_a_batch_when_the_next_is_asked_for(stream):
    with stream.consumer(group="g", auto_commit=True) as consumer:
        consumer.poll()
        assert sum(at(stream)) == 0
        consumer.poll()
        assert sum(at(stream)) == 10
    assert sum(at(stream)) == 20  # an orderly end


def test_auto_commit_does_not_commit_what_raised(stream):
    with (
        pytest.raises(ZeroDivisionError),
        stream.consumer(group="g", auto_commit=True) as consumer,
    ):
        for _ in consumer:
            raise ZeroDivisionError
    assert sum(at(stream)) == 0


def test_at_most_once_commits_before_it_hands_out(stream):
    with stream.consumer(group="g", delivery="at_most_once", max_records=7) as consumer:
        batch = consumer.poll()
        assert at(stream)[batch.partition] == 7
    with stream.consumer(group="g") as consumer:
        assert len(taken(consumer)) == 33


def test_exactly_once_is_committed_by_a_transaction_alone(stream):
    with stream.consumer(group="g", delivery="exactly_once") as consumer:
        assert len(taken(consumer)) == 40
        with pytest.raises(Unsupported, match=r"tx\.commit\(consumer\)"):
            consumer.commit()
    assert sum(at(stream)) == 0


def test_latest_begins_behind_what_is_there_for_all_members_for_ever(stream):
    stream.consumer(group="g", start="latest").close()
    stream.append(b"new", partition=2)
    with stream.consumer(group="g", start="earliest") as consumer:
        assert taken(consumer) == [b"new"]


def test_start_by_time_and_by_position(store):
    stream = store.stream("t", partitions=2)
    for i in range(10):
        stream.append(b"%d" % i, partition=i % 2, timestamp=1_000_000 * (i + 1))
    numpy = pytest.importorskip("numpy")
    with stream.consumer(group="a", start=numpy.datetime64(7_000_000, "us")) as consumer:
        assert sorted(taken(consumer)) == [b"6", b"7", b"8", b"9"]
    with stream.consumer(group="b", start=Position(1, 1, 4)) as consumer:
        assert sorted(taken(consumer)) == [b"0", b"2", b"4", b"6", b"8", b"9"]
    with pytest.raises(InvalidArgument, match="offset is of one partition"):
        stream.consumer(group="c", start=3)
    with pytest.raises(OffsetOutOfRange):
        stream.consumer(group="c", start=Position(0, 1, 99))
    assert stream.groups() == ["a", "b"]


def test_seek_is_kept_by_the_next_commit_also_backwards(stream):
    with stream.consumer(group="g") as consumer:
        taken(consumer)
        consumer.commit()
        consumer.seek(4, partition=3)
        assert consumer.position[3].offset == 4
        assert at(stream)[3] == 10
        consumer.commit()
        assert at(stream) == [10, 10, 10, 4]
        assert taken(consumer) == [b"3.%d" % i for i in range(4, 10)]
        consumer.commit()
        consumer.seek("earliest")
        assert len(taken(consumer)) == 40
        consumer.seek("latest")
        assert taken(consumer) == []
        consumer.seek(Position(2, 1, 9))
        assert taken(consumer) == [b"2.9"]
        for bad in (11, -1):
            with pytest.raises(OffsetOutOfRange):
                consumer.seek(bad, partition=0)
        with pytest.raises(InvalidArgument, match="say which"):
            consumer.seek(3)
        with pytest.raises(InvalidArgument, match="not assigned"):
            consumer.seek(3, partition=7)


def test_rewind_gives_again_what_was_not_committed(stream):
    with stream.consumer(group="g", max_records=5) as consumer:
        consumer.poll()
        consumer.commit()
        rest = sorted(taken(consumer))
        consumer.rewind()
        assert sorted(taken(consumer)) == rest
        assert len(rest) == 35


def test_lag_counts_what_is_not_committed(stream):
    with stream.consumer(group="g") as consumer:
        assert consumer.lag() == stream.group("g").lag() == 40
        batch = consumer.poll()
        assert consumer.lag() == 40
        consumer.commit()
        assert consumer.lag() == 30
        assert consumer.lag(batch.partition) == 0
        stream.append(b"more", partition=batch.partition)
        assert stream.group("g").lag(batch.partition) == 1


def test_pause_and_resume(stream):
    with stream.consumer(group="g") as consumer:
        consumer.pause(0, 1)
        assert consumer.paused == [0, 1]
        assert {value[:1] for value in taken(consumer)} == {b"2", b"3"}
        consumer.resume(1)
        assert {value[:1] for value in taken(consumer)} == {b"1"}
        consumer.resume()
        assert len(taken(consumer)) == 10
        consumer.pause()
        stream.append(b"x", partition=0)
        assert consumer.poll() is None
        assert consumer.assignment == [0, 1, 2, 3]


def test_records_that_come_wake_a_consumer_that_waits(stream):
    with stream.consumer(group="g", start="latest") as consumer:
        timer = threading.Timer(0.05, stream.append, [b"woken"], {"partition": 3})
        timer.start()
        began = time.monotonic()
        assert list(consumer.poll(60).values) == [b"woken"]
        assert time.monotonic() - began < SOON
        timer.join()


def test_async_for_and_apoll(stream):
    async def main():
        found, ticks = [], 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)  # the loop ticks, while something else waits
                ticks += 1
                if ticks == 10:
                    stream.append(b"late", partition=1)

        ticking = asyncio.create_task(tick())
        with stream.consumer(group="g", timeout=1.0) as consumer:
            async for batch in consumer:
                found += batch.values
                consumer.commit()
                if b"late" in batch.values:
                    break
            assert await consumer.apoll() is None
        ticking.cancel()
        assert len(found) == 41
        assert ticks >= 10

    asyncio.run(main())
    assert sum(at(stream)) == 41


# --- what transactions build on -------------------------------------------------------------------


def test_positions_of_a_transaction_are_applied_or_reverted(stream):
    with stream.consumer(group="g", delivery="exactly_once") as consumer:
        consumer.pause(2, 3)
        taken(consumer)
        pending = consumer._member.prepare(7)
        group = consumer.group
        assert [(p, e, o) for p, _, e, o in pending] == [(0, 1, 10), (1, 1, 10)]
        assert group._pending(0) == (7, pending[0][1], 1, 10)
        group._apply(0, 7, 1, 10)
        group._revert(1, 7)
        assert at(stream) == [10, 0, 0, 0]
        assert group._pending(0) is group._pending(1) is None
        group._apply(0, 7, 1, 99)  # replayed: applied once
        assert at(stream) == [10, 0, 0, 0]


def test_new_owner_does_not_read_before_a_mark_is_decided():
    with clock() as now, millstream.temporary(durability="process") as store:
        stream = store.stream("s")
        fill(stream)
        slow = stream.consumer(group="g", delivery="exactly_once", max_processing=1)
        slow.poll()
        [(partition, _, epoch, offset)] = slow._member.prepare(9)
        now.advance(2)
        with stream.consumer(group="g") as other:
            other.group._decide = lambda group, which: None  # the journal is busy
            assert other.poll() is None
            assert other.assignment == [0]
            asked = []

            def decide(group, which):
                asked.append(which)
                if len(asked) == 2:
                    group._apply(which, 9, epoch, offset)

            other.group._decide = decide
            assert other.poll() is None
            assert other.poll() is None
            assert asked == [partition, partition]
            stream.append(b"new")
            assert taken(other) == [b"new"]
        with pytest.raises(Fenced):
            slow._member.prepare(10)
        slow.close()
