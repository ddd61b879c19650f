"""Consumer groups: shares, positions, fences, what a member that hangs loses."""

import asyncio
import contextlib
import gc
import pickle
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_copy import copy_open
from timing import SOON

import millstream
import millstream.groups.group
from millstream import (
    Closed,
    CorruptBatch,
    Fenced,
    InvalidArgument,
    InvalidType,
    LimitExceeded,
    NotFound,
    OffsetOutOfRange,
    Position,
    Unsupported,
)
from millstream.log.segments import Segments
from millstream.testing import clock


@pytest.fixture
def stream(store):
    """Four partitions with ten records each, in one batch."""
    stream = store.stream("s", partitions=4)
    fill(stream)
    return stream


def fill(stream, count=10):
    for partition in range(stream.partitions):
        values = [b"%d.%d" % (partition, i) for i in range(count)]
        stream.append_many(values, partition=partition)


def taken(consumer, timeout=0.0):
    """Values that come until none did for `timeout` seconds."""
    found = []
    while (batch := consumer.poll(timeout)) is not None:
        found += batch.values
    return found


def at(stream, name="g"):
    """The committed offsets of a group; 0 where there is none."""
    return [0 if p is None else p.offset for p in stream.group(name).positions().values()]


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
                await asyncio.sleep(0.005)
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


# --- shares ---------------------------------------------------------------------------------------


def test_members_share_fairly_and_few_partitions_move(store):
    stream = store.stream("wide", partitions=12)
    fill(stream, 1)
    first = stream.consumer(group="g")
    taken(first)
    second = stream.consumer(group="g")
    assert (len(first.assignment), len(second.assignment)) == (12, 0)  # it has them in hand
    before = set(first.assignment)
    taken(first)
    taken(second)
    assert (len(first.assignment), len(second.assignment)) == (6, 6)
    assert set(first.assignment) < before
    third = stream.consumer(group="g")
    kept = set(first.assignment), set(second.assignment)
    taken(first), taken(second), taken(third)
    assert [len(one.assignment) for one in (first, second, third)] == [4, 4, 4]
    assert set(first.assignment) < kept[0]
    assert set(second.assignment) < kept[1]
    kept = set(first.assignment), set(third.assignment)
    second.close()
    assert set(first.assignment) > kept[0]
    assert set(third.assignment) > kept[1]
    assert sorted(first.assignment + third.assignment) == list(range(12))
    first.close(), third.close()
    stream.group("g")._check()


def test_more_members_than_partitions_wait_for_one(stream):
    consumers = [stream.consumer(group="g") for _ in range(6)]
    assert sorted(len(one.assignment) for one in consumers) == [0, 0, 1, 1, 1, 1]
    idle = next(one for one in consumers if not one.assignment)
    assert idle.poll() is None
    busy = next(one for one in consumers if one.assignment)
    busy.close()
    assert sum(len(one.assignment) for one in consumers) == 4
    for one in consumers:
        one.close()


def test_callbacks_hear_of_partitions_and_may_commit(stream):
    heard = []
    first = stream.consumer(
        group="g",
        on_assign=lambda new: heard.append(("+", new)),
        on_revoke=lambda gone: (heard.append(("-", gone)), first.commit()),
    )
    while first.poll() is not None:
        pass
    assert heard == [("+", [0, 1, 2, 3])]
    second = stream.consumer(group="g")
    first.poll()
    assert heard[1:] == [("-", second.assignment)]
    assert at(stream) == [10] * 4  # nothing is delivered twice
    assert taken(second) == []
    second.close()
    first.poll()
    assert heard[2:] == [("+", heard[1][1])]
    first.close()
    assert heard[-1] == ("-", [0, 1, 2, 3])


def test_commit_keeps_all_partitions_though_a_batch_of_the_last_one_was_committed(stream):
    with stream.consumer(group="g") as consumer:
        first, last = consumer.poll(), consumer.poll()
        consumer.commit(last)
        consumer.commit()
        assert consumer.committed[first.partition].offset == 10
        assert at(stream).count(10) == 2


def test_on_assign_is_told_of_partitions_that_were_sought_in_before(stream):
    """`seek` takes partitions up; the callback comes when the next batch is asked for."""
    heard = []
    with stream.consumer(group="g", on_assign=heard.append) as consumer:
        consumer.seek("latest")
        assert heard == []
        assert consumer.poll() is None
        assert heard == [[0, 1, 2, 3]]


def test_callbacks_come_in_order_where_a_member_that_was_ended_rewinds():
    with clock() as now, millstream.temporary(durability="process") as store:
        stream, heard = store.stream("s", partitions=1), []
        fill(stream)
        consumer = stream.consumer(
            group="g",
            delivery="exactly_once",
            max_processing=60,
            on_assign=lambda new: heard.append(("+", new)),
            on_revoke=lambda gone: heard.append(("-", gone)),
        )
        with consumer:
            consumer.poll()
            now.advance(100)
            stream.group("g")._watch(True)  # as another member does
            consumer.rewind()
            assert consumer.poll().first_offset == 0
            assert heard == [("+", [0]), ("-", [0]), ("+", [0])]


def test_a_callback_may_seek(stream):
    def to_the_end(partitions):
        for partition in partitions:
            consumer.seek("latest", partition=partition)

    consumer = stream.consumer(group="g", on_assign=to_the_end)
    with consumer:
        assert taken(consumer) == []
        consumer.commit()
    assert at(stream) == [10] * 4


def test_added_partitions_are_assigned_and_read_from_their_beginning(stream):
    with stream.consumer(group="g", start="latest") as one, stream.consumer(group="g") as other:
        assert taken(one) == taken(other) == []
        stream.add_partitions(3)
        for partition in range(4, 7):
            stream.append(b"new", partition=partition)
        found = []
        end = time.monotonic() + 10
        while len(found) < 3 and time.monotonic() < end:
            found += taken(one, 0.01) + taken(other, 0.01)
        assert found == [b"new"] * 3
        assert sorted(one.assignment + other.assignment) == list(range(7))
        assert abs(len(one.assignment) - len(other.assignment)) <= 1
    stream.group("g")._check()


steps = st.lists(
    st.one_of(
        st.just(("join", 0)),
        st.tuples(st.sampled_from(["leave", "poll"]), st.integers(0, 7)),
    ),
    max_size=25,
)


@given(steps, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_any_joins_and_leaves_are_fair_and_move_as_few_as_they_must(steps, partitions):
    with millstream.temporary(durability="process") as store:
        stream = store.stream("s", partitions=partitions)
        members = []
        for step, which in steps:
            before = [set(one.assignment) for one in members]
            if step == "join":
                members.append(stream.consumer(group="g"))
                before.append(set())
            elif members:
                which %= len(members)
                if step == "leave":
                    members.pop(which).close()
                    before.pop(which)
                else:
                    members[which].poll()
            # All give up what another is to have: then it is at rest.
            for one in members:
                one.poll()
            after = [set(one.assignment) for one in members]
            if not members:
                continue
            sizes = sorted(map(len, after))
            assert sizes[-1] - sizes[0] <= 1
            assert sorted(p for share in after for p in share) == list(range(partitions))
            # The fewest: who had more than a fair share loses what is above it, nobody else any.
            base, extra = divmod(partitions, len(members))
            held = sorted(map(len, before), reverse=True)
            must = sum(max(0, n - base - (i < extra)) for i, n in enumerate(held))
            lost = sum(len(b - a) for b, a in zip(before, after, strict=True))
            assert lost == must
        if stream.groups():
            stream.group("g")._check()
        for one in members:
            one.close()


# --- members that hang ----------------------------------------------------------------------------


def test_member_that_does_not_ask_in_time_is_ended_and_its_commit_fenced():
    with clock() as now, millstream.temporary(durability="process") as store:
        stream = store.stream("s", partitions=2)
        fill(stream)
        lost = []
        slow = stream.consumer(group="g", max_processing=60, on_revoke=lost.append)
        other = stream.consumer(group="g", max_processing=60)
        batch = slow.poll()
        mine = slow.assignment
        now.advance(50)
        assert other.poll() is not None
        other.commit()
        now.advance(50)
        taken(other)
        assert other.assignment == [0, 1]
        with pytest.raises(Fenced, match="max_processing") as caught:
            slow.commit(batch)
        assert caught.value.partitions == tuple(mine)
        with pytest.raises(Fenced):
            slow.commit()
        slow.commit()  # it has nothing any more that could be refused
        other.commit()
        assert at(stream) == [10, 10]
        assert slow.poll() is None  # it joins again
        assert lost == [mine]
        other.poll()
        assert (len(slow.assignment), len(other.assignment)) == (1, 1)
        slow.close(), other.close()


def test_member_that_waits_for_records_is_not_hung():
    with clock() as now, millstream.temporary(durability="process") as store:
        stream = store.stream("s")
        waiting = stream.consumer(group="g", max_processing=1)
        found = []
        thread = threading.Thread(target=lambda: found.append(waiting.poll(30)))
        thread.start()
        with stream.consumer(group="g") as other:
            for _ in range(10):
                time.sleep(0.01)  # the thread that waits sees each step, not their sum
                now.advance(0.9)
                other.poll()
            assert len(stream.group("g").members()) == 2
        stream.append(b"x")
        thread.join()
        assert list(found[0].values) == [b"x"]
        waiting.close()


def test_zombie_of_a_partition_that_came_back_to_it_is_fenced_too():
    with clock() as now, millstream.temporary(durability="process") as store:
        stream = store.stream("s")
        fill(stream)
        slow = stream.consumer(group="g", max_processing=1, max_records=2)
        slow.poll()
        now.advance(2)
        with stream.consumer(group="g") as other:
            assert len(other.poll()) == 10
        with pytest.raises(Fenced):
            slow.commit()
        assert len(slow.poll()) == 2
        slow.commit()
        assert at(stream) == [2]
        slow.close()


# --- files ----------------------------------------------------------------------------------------


def test_positions_outlive_the_store_and_memberships_do_not(tmp_path):
    with millstream.open(tmp_path / "store") as store:
        stream = store.stream("s", partitions=2)
        fill(stream)
        consumer = stream.consumer(group="g")
        taken(consumer)
        consumer.commit()
    assert consumer.closed
    with millstream.open(tmp_path / "store", mode="r") as store:
        group = store.stream("s").group("g")
        assert (group.lag(), group.members()) == (0, [])
        with pytest.raises(Unsupported, match="read-only"):
            store.stream("s").consumer(group="g")
        with pytest.raises(Unsupported, match="read-only"):
            group.seek("earliest")
    with millstream.open(tmp_path / "store") as store:
        store.stream("s").append(b"x", partition=1)
        with store.stream("s").consumer(group="g") as consumer:
            assert taken(consumer) == [b"x"]


@pytest.mark.parametrize("beside_a_writer", [False, True])
def test_dead_member_is_no_owner_for_a_reader(tmp_path, beside_a_writer):
    """Opened with mode="r" the group had no members, and one of them owned partition 0."""
    with millstream.open(tmp_path / "store") as store:
        stream = store.stream("s", partitions=2)
        fill(stream)
        with stream.consumer(group="g") as consumer:
            taken(consumer)
            assert [part.owner for part in stream.group("g").partitions()] == [0, 0]
            copy_open(tmp_path / "store", tmp_path / "killed")
    with contextlib.ExitStack() as stack:
        if beside_a_writer:
            stack.enter_context(millstream.open(tmp_path / "killed"))
        reader = stack.enter_context(millstream.open(tmp_path / "killed", mode="r"))
        group = reader.stream("s").group("g")
        assert group.members() == []
        assert [part.owner for part in group.partitions()] == [None, None]


@pytest.mark.parametrize("on_lost", ["earliest", "raise"])
def test_retention_while_a_consumer_looks_for_its_position(store, monkeypatch, on_lost):
    stream = store.stream("r", segment_bytes="64KiB")
    stream.append(b"a")
    with stream.consumer(group="g") as consumer:
        assert taken(consumer) == [b"a"]
        consumer.commit()
    last = [stream.append(b"x" * 60_000) for _ in range(6)][-1]
    log, base, done = stream._log(0), Segments.base, []
    log.segments._bases.clear()
    for number in log.segments.listed():
        log.segments.drop(number)

    def late(self, number):
        if not done:
            done.append(number)
            stream.delete_before(last)
        return base(self, number)

    with stream.consumer(group="g", on_lost=on_lost) as consumer:
        monkeypatch.setattr(Segments, "base", late)
        if on_lost == "raise":
            with pytest.raises(OffsetOutOfRange):
                consumer.poll()
        else:
            assert taken(consumer) == [b"x" * 60_000]
    assert done


def test_what_retention_took_from_a_group_that_never_committed_is_not_passed_over(store):
    stream = store.stream("r", partitions=2, segment_bytes="64KiB")
    stream.append(b"a", partition=0)
    with stream.consumer(group="g") as consumer:
        assert taken(consumer) == [b"a"]
        consumer.commit()
    for _ in range(30):
        stream.append(b"x" * 9000, partition=1)
    first = stream.delete_before(millstream.Position(1, 1, 20))
    assert first > 0
    assert stream.group("g").lag(1) == 30
    with stream.consumer(group="g") as consumer:
        with pytest.raises(OffsetOutOfRange, match="offset 0"):
            consumer.poll()
        consumer.seek("earliest", partition=1)
        assert len(taken(consumer)) == 30 - first
    for name, start in (("new", "earliest"), ("at", millstream.Position(0, 1, 1))):
        with stream.consumer(group=name, start=start) as consumer:  # begins behind that
            assert consumer.lag(1) == 30 - first
            assert taken(consumer).count(b"x" * 9000) == 30 - first


def test_resume_is_held_to_the_partitions_that_there_are(stream):
    with stream.consumer(group="g") as consumer:
        for wrong, error in ((99, InvalidArgument), (-1, InvalidArgument), ("x", InvalidType)):
            with pytest.raises(error, match="partition"):
                consumer.resume(wrong)
        with pytest.raises(InvalidType, match="partition"):
            consumer.resume([0])
    with pytest.raises(Closed):
        consumer.resume()


def crashed(path, tmp_path, cut=None):
    """A copy of an open store, as a power cut would leave it: from byte `cut` of the log zeros."""
    copy = tmp_path / "copy"
    copy_open(path, copy)
    if cut is not None:
        [segment] = (copy / "streams" / "s" / "00000").glob("*1.seg")
        raw = bytearray(segment.read_bytes())
        data = int.from_bytes(raw[68:72], "little")
        raw[data + cut :] = bytes(len(raw) - data - cut)
        segment.write_bytes(raw)
    return copy


def test_after_an_unclean_end_nobody_is_a_member_and_positions_are_kept(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as store:
        stream = store.stream("s")
        fill(stream)
        with stream.consumer(group="g", max_records=4) as consumer:
            consumer.poll()
            consumer.commit()
            fence = stream.group("g").partitions()[0].fence
            copy = crashed(tmp_path / "store", tmp_path)
    with millstream.open(copy) as store:
        group = store.stream("s").group("g")
        assert group.members() == []
        assert at(store.stream("s")) == [4]
        with store.stream("s").consumer(group="g") as consumer:
            assert len(taken(consumer)) == 6
            assert group.partitions()[0].fence > fence


def lost_behind_a_commit(tmp_path):
    """A store whose power failed: of ten records that group `g` committed, it has five."""
    path = tmp_path / "store"
    with millstream.open(path, durability="process") as store:
        stream = store.stream("s")
        for i in range(10):
            if i == 5:
                cut = stream._log(0).native.tail
            stream.append(b"%d" % i)
        with stream.consumer(group="g") as consumer:
            taken(consumer)
            consumer.commit()
            return crashed(path, tmp_path, cut)


def test_position_in_a_lost_tail_is_an_error_and_nothing_is_skipped(tmp_path):
    with millstream.open(lost_behind_a_commit(tmp_path)) as store:
        stream = store.stream("s")
        assert stream.next_offset(0) == 5
        assert stream.group("g").partitions()[0].lost
        with stream.consumer(group="g") as consumer:
            for _ in range(2):
                with pytest.raises(OffsetOutOfRange):
                    consumer.poll()
        for i in range(20):
            stream.append(b"new %d" % i)
        with stream.consumer(group="g") as consumer:
            with pytest.raises(OffsetOutOfRange, match="of epoch 1 was lost") as caught:
                consumer.poll()
            assert (caught.value.first, caught.value.next) == (0, 25)
            consumer.seek(5, partition=0)
            assert taken(consumer) == [b"new %d" % i for i in range(20)]
        with stream.consumer(group="g", on_lost="earliest") as consumer:
            assert taken(consumer) == [b"new %d" % i for i in range(20)]
            consumer.commit()
        assert not stream.group("g").partitions()[0].lost


def test_lost_tail_is_seen_also_where_a_later_epoch_begins_at_the_offset(tmp_path):
    path = lost_behind_a_commit(tmp_path)
    again = tmp_path / "again"
    with millstream.open(path, durability="process") as store:
        for i in range(5):
            store.stream("s").append(b"other %d" % i)
        copy_open(path, again)
    with millstream.open(again, durability="process") as store:
        stream = store.stream("s")
        assert stream.append(b"third") == Position(0, 3, 10)
        with stream.consumer(group="g") as consumer, pytest.raises(OffsetOutOfRange):
            consumer.poll()
        with pytest.raises(OffsetOutOfRange):
            next(stream.read(start=Position(0, 1, 10)))


def test_torn_group_file_goes_back_to_the_copy_before_or_says_so(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as store:
        stream = store.stream("s")
        fill(stream)
        with stream.consumer(group="g", max_records=2) as consumer:
            for _ in range(3):
                consumer.poll()
                consumer.commit()
            copy = crashed(tmp_path / "store", tmp_path)
    path = copy / "streams" / "s" / "groups" / "g.group"
    raw = bytearray(path.read_bytes())
    copies = [20480 + 64, 20480 + 128]
    newest = max(copies, key=lambda at: raw[at + 8])
    raw[newest + 24] ^= 1
    path.write_bytes(raw)
    with millstream.open(copy) as store:
        assert at(store.stream("s")) == [4]
    for where in copies:
        raw[where] ^= 1
    raw[newest + 24] ^= 1
    path.write_bytes(raw)
    with millstream.open(copy) as store:
        stream = store.stream("s")
        with stream.consumer(group="g") as consumer, pytest.raises(CorruptBatch, match="seek"):
            consumer.poll()
        stream.group("g").seek(6, partition=0)
        with stream.consumer(group="g") as consumer:
            assert len(taken(consumer)) == 4


def test_retention_that_overtook_a_group_is_an_error_or_goes_on_when_asked(store):
    stream = store.stream("s", segment_bytes="1MiB")
    with stream.consumer(group="g", max_records=1) as consumer:
        stream.append(b"x")
        consumer.poll()
        consumer.commit()
        for _ in range(4):
            stream.append(b"y" * 700_000)
        stream.alter(retention=millstream.Retention(records=1))
        stream.enforce_retention()  # or the background thread was faster
        assert stream.first_offset(0) > 1
        with pytest.raises(OffsetOutOfRange):
            taken(consumer)
    first = stream.first_offset(0)
    with stream.consumer(group="g", on_lost="earliest") as consumer:
        assert consumer.poll().first_offset == first


def test_seek_and_remove_of_a_group_without_members(stream):
    with stream.consumer(group="g") as consumer:
        taken(consumer)
        consumer.commit()
        for call in (lambda: stream.group("g").seek("earliest"), stream.group("g").remove):
            with pytest.raises(InvalidArgument, match="members"):
                call()
    group = stream.group("g")
    assert group.seek(3, partition=1) == {1: Position(1, 1, 3)}
    assert at(stream) == [10, 3, 10, 10]
    with pytest.raises(OffsetOutOfRange):
        group.seek(11, partition=1)
    with pytest.raises(InvalidArgument, match="say which"):
        group.seek(1)
    group.seek("earliest")
    assert group.lag() == 40
    group.remove()
    assert stream.groups() == []
    with pytest.raises(Closed, match="removed"):
        group.lag()
    with pytest.raises(NotFound, match="no group 'g'"):
        stream.group("g")


def test_whoever_still_has_a_group_that_was_removed_hears_so_and_what_to_do(store, stream):
    removed = r"the group was removed; .*`consumer\(group='g'\)`.* makes it anew"
    with clock() as now, millstream.open(store.path) as elsewhere:
        consumer = stream.consumer(group="g", max_processing=1)
        taken(consumer)
        other = elsewhere.stream("s").group("g")
        now.advance(2)  # taken for hung, so it is no member any more
        group = stream.group("g")
        group.remove()
        again = stream.consumer(group="g")  # another one of this name changes nothing for them
        for use in (
            consumer.poll,
            consumer.commit,
            consumer.rewind,
            consumer.pause,
            lambda: consumer.seek("earliest"),
            lambda: consumer.lag(0),
            group.lag,
            group.positions,
            group.remove,
            lambda: group.seek("latest"),
            other.lag,
            other.remove,
        ):
            with pytest.raises(Closed, match=removed):
                use()
        consumer.close()
        assert len(taken(again)) == 40
        again.close()


def test_a_removal_that_did_not_come_to_its_end_is_finished_by_whoever_asks(stream, monkeypatch):
    stream.consumer(group="g", timeout=0).close()
    remove = millstream.disk.files.remove
    monkeypatch.setattr(millstream.disk.files, "remove", lambda path: 1 / 0)  # a kill, say
    with pytest.raises(ZeroDivisionError):
        stream.group("g").remove()
    monkeypatch.setattr(millstream.disk.files, "remove", remove)
    with pytest.raises(NotFound, match="group 'g'"):
        stream.group("g")
    assert stream.groups() == []
    with stream.consumer(group="g", timeout=0) as consumer:
        assert sum(len(batch) for batch in consumer) == 40


def test_a_slow_removal_leaves_the_group_that_was_made_anew_meanwhile(stream, monkeypatch):
    stream.consumer(group="g", timeout=0).close()
    slow, drop = stream.group("g"), millstream.groups.group.Group._drop

    def dropped(group):
        assert drop(group)
        monkeypatch.setattr(millstream.groups.group.Group, "_drop", drop)
        stream.consumer(group="g", timeout=0).close()
        return True

    monkeypatch.setattr(millstream.groups.group.Group, "_drop", dropped)
    slow.remove()
    assert stream.groups() == ["g"]
    assert stream.group("g").members() == []


def test_a_group_that_was_removed_and_made_anew_is_another(stream):
    with stream.consumer(group="g") as consumer:
        taken(consumer)
        consumer.commit()
    stream.group("g").remove()
    with stream.consumer(group="g") as consumer:
        assert len(taken(consumer)) == 40


def test_closing_the_stream_or_dropping_it_ends_its_consumers(store, stream):
    consumer = stream.consumer(group="g")
    store.drop_stream("s")
    with pytest.raises(Closed):
        consumer.poll()
    consumer.close()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"group": ""}, InvalidArgument),
        ({"group": "../x"}, InvalidArgument),
        ({"group": 3}, InvalidType),
        ({"start": "now"}, InvalidArgument),
        ({"start": None}, InvalidType),
        ({"start": 1.5}, InvalidType),
        ({"delivery": "twice"}, InvalidArgument),
        ({"delivery": "exactly_once", "auto_commit": True}, InvalidArgument),
        ({"on_lost": "skip"}, InvalidArgument),
        ({"max_records": 0}, InvalidArgument),
        ({"max_records": "1"}, InvalidType),
        ({"session": 0}, InvalidArgument),
        ({"session": float("nan")}, InvalidArgument),
        ({"max_processing": "1"}, InvalidType),
        ({"timeout": -1}, InvalidArgument),
    ],
)
def test_bad_arguments_join_nothing(stream, arguments, error):
    with pytest.raises(error):
        stream.consumer(**{"group": "g", **arguments})
    assert stream.groups() == []


def test_bad_calls_change_nothing(stream):
    with stream.consumer(group="g") as consumer:
        taken(consumer)
        for call, error in (
            (lambda: consumer.commit(7), InvalidType),
            (lambda: consumer.pause(9), InvalidArgument),
            (lambda: consumer.poll(-1), InvalidArgument),
            (lambda: pickle.dumps(consumer), TypeError),
        ):
            with pytest.raises(error):
                call()
        assert sum(at(stream)) == 0
    for call in (consumer.poll, consumer.commit, consumer.rewind, consumer.pause):
        with pytest.raises(Closed):
            call()
    with pytest.raises(Closed):
        consumer.seek("earliest")
    consumer.close()
    assert consumer.assignment == []


def test_a_group_has_at_most_256_members(store):
    stream = store.stream("s")
    consumers = [stream.consumer(group="g") for _ in range(256)]
    with pytest.raises(LimitExceeded, match="256"):
        stream.consumer(group="g")
    for one in consumers:
        one.close()


def test_a_consumer_that_was_not_closed_warns_and_leaves(stream):
    with pytest.warns(ResourceWarning, match="unclosed"):
        stream.consumer(group="g")
        gc.collect()
    assert stream.group("g").members() == []


def test_fenced_error_pickles():
    error = pickle.loads(pickle.dumps(Fenced("gone", partitions=(1, 2))))
    assert (str(error), error.partitions) == ("gone", (1, 2))


def test_level_sync_syncs_the_group_before_a_commit_returns(tmp_path, monkeypatch):
    synced = []
    real = millstream.disk.files.sync
    monkeypatch.setattr(
        millstream.disk.files, "sync", lambda fd, path: (synced.append(path), real(fd, path))[1]
    )
    with millstream.open(tmp_path / "store", durability="sync") as store:
        stream = store.stream("s")
        stream.append(b"x")
        with stream.consumer(group="g") as consumer:
            consumer.poll()
            synced.clear()
            consumer.commit()
            assert [path for path in synced if path.endswith("g.group")] == synced
            assert len(synced) == 1
        stream.append(b"y")
        with stream.consumer(group="g", delivery="at_most_once") as consumer:
            synced.clear()
            assert consumer.poll() is not None
            assert len(synced) == 1


def test_failed_sync_of_a_group_poisons_its_commits(tmp_path, monkeypatch):
    with millstream.open(tmp_path / "store", durability="sync") as store:
        stream = store.stream("s")
        stream.append(b"x")
        consumer = stream.consumer(group="g")
        consumer.poll()

        def fail(fd, path):
            raise millstream.StorageError(5, "injected", path)

        with monkeypatch.context() as patch:
            patch.setattr(millstream.disk.files, "sync", fail)
            with pytest.raises(millstream.Indeterminate, match="injected"):
                consumer.commit()
        with pytest.raises(millstream.Poisoned):
            consumer.commit()
    with (
        millstream.open(tmp_path / "store") as store,
        store.stream("s").consumer(group="g") as consumer,
    ):
        assert consumer.poll() is None
        consumer.commit()


def test_interval_syncs_groups_in_the_background(tmp_path, monkeypatch):
    synced = threading.Event()
    real = millstream.disk.files.sync

    def sync(fd, path):
        real(fd, path)
        if path.endswith(".group"):
            synced.set()

    with millstream.open(tmp_path / "store", durability="interval") as store:
        stream = store.stream("s")
        stream.append(b"x")
        with stream.consumer(group="g") as consumer:
            consumer.poll()
            monkeypatch.setattr(millstream.disk.files, "sync", sync)
            consumer.commit()
            assert synced.wait(10)


# --- what transactions build on -------------------------------------------------------------------


def test_positions_of_a_transaction_are_applied_or_reverted(stream):
    with stream.consumer(group="g", delivery="exactly_once") as consumer:
        consumer.pause(2, 3)
        taken(consumer)
        marked = consumer._member.prepare(7)
        group = consumer.group
        assert [(p, e, o) for p, _, e, o in marked] == [(0, 1, 10), (1, 1, 10)]
        assert group._pending(0) == (7, marked[0][1], 1, 10)
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


# --- what goes wrong in between -------------------------------------------------------------------


def test_a_callback_that_raises_stops_nobody(stream):
    def raise_once(partitions):
        if not raised:
            raised.append(partitions)
            raise ZeroDivisionError

    raised = []
    first = stream.consumer(group="g", on_revoke=raise_once)
    first.poll()
    with stream.consumer(group="g") as second:
        with pytest.raises(ZeroDivisionError):
            taken(first)
        assert len(second.assignment) == len(first.assignment) == 2
        assert raised == [second.assignment]
    raised.clear()
    assert first.poll() is not None
    raised.append("close quietly")
    first.close()


def test_on_assign_that_raises_is_heard_and_reading_goes_on(stream):
    calls = []

    def fail(partitions):
        calls.append(partitions)
        raise ZeroDivisionError

    with stream.consumer(group="g", on_assign=fail) as consumer:
        with pytest.raises(ZeroDivisionError):
            consumer.poll()
        assert len(taken(consumer)) == 40
    assert calls == [[0, 1, 2, 3]]


def test_callbacks_that_raise_each_time_lose_no_record(stream):
    """Whoever goes on after each of the errors gets what is theirs; the others get the rest."""

    def fail(partitions):
        failed.append(partitions)
        raise ZeroDivisionError

    failed, seen = [], []

    def some(consumer):
        try:
            batch = consumer.poll()
        except ZeroDivisionError:
            return True
        seen.extend(() if batch is None else batch.values)
        return batch is not None

    first = stream.consumer(group="g", max_records=1, on_assign=fail, on_revoke=fail)
    for _ in range(12):
        some(first)
    first.commit()
    second = stream.consumer(group="g", max_records=1, on_assign=fail, on_revoke=fail)
    while some(first) | some(second):
        pass
    assert len(first.assignment) == len(second.assignment) == 2
    assert len(seen) == 40 and len(set(seen)) == 40
    for consumer in (first, second):
        with pytest.raises(ZeroDivisionError):
            consumer.close()
        assert consumer.closed
    # What came, what went to the second, what the second got, what each gave up at its end.
    moved = second_had = failed[1]
    assert failed == [[0, 1, 2, 3], moved, second_had, [0, 1], failed[-1]]
    assert stream.group("g").members() == []


@pytest.mark.parametrize("ends", ["a poll", "close"])
def test_a_callback_may_close_its_consumer(stream, ends):
    heard = []
    first = stream.consumer(
        group="g", on_revoke=lambda gone: (heard.append(gone), first.commit(), first.close())
    )
    taken(first)
    if ends == "close":
        first.close()
        assert heard == [[0, 1, 2, 3]]
    else:
        second = stream.consumer(group="g")
        with pytest.raises(Closed, match="the consumer is closed"):
            first.poll()
        assert heard == [second.assignment[2:], [0, 1, 2, 3]]
        assert second.assignment == [0, 1, 2, 3] and taken(second) == []
        second.close()
    assert first.closed and at(stream) == [10] * 4
    assert stream.group("g").members() == []


def test_what_is_to_leave_can_be_committed_until_the_next_batch(stream):
    first = stream.consumer(group="g")
    batch = first.poll()
    with stream.consumer(group="g") as second:
        assert second.poll() is None
        first.pause(first.assignment[0])  # looks at the group, and gives nothing up
        assert second.assignment == []
        first.commit(batch)
        taken(first)
        assert len(second.assignment) == 2
    first.close()


def test_batch_of_another_reader_is_not_committed(stream):
    with stream.consumer(group="g", max_records=2) as consumer:
        consumer.poll()
        for batch in stream.read(partition=0):
            with pytest.raises(InvalidArgument, match="not of this consumer"):
                consumer.commit(batch)
    assert sum(at(stream)) == 0


def test_a_forked_child_is_no_member(stream):
    import os

    with stream.consumer(group="g") as consumer:
        consumer.poll()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                consumer.commit()
            except Closed:
                code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        consumer.commit()
    assert sum(at(stream)) == 10


def test_closing_the_store_wakes_a_consumer_that_waits(tmp_path):
    store = millstream.open(tmp_path / "store", durability="process")
    consumer = store.stream("s").consumer(group="g")
    ended = []

    def wait():
        try:
            consumer.poll(None)
        except Closed as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)  # it waits by now; if not, this shows less and is never wrong
    store.close()
    thread.join(10)
    assert len(ended) == 1


def test_flush_and_alter_reach_the_groups(tmp_path, monkeypatch):
    synced = []
    real = millstream.disk.files.sync
    monkeypatch.setattr(
        millstream.disk.files, "sync", lambda fd, path: (synced.append(path), real(fd, path))[1]
    )
    with millstream.open(tmp_path / "store", durability="process") as store:
        stream = store.stream("s")
        stream.append_many([b"a", b"b"])
        with stream.consumer(group="g", max_records=1) as consumer:
            consumer.poll()
            synced.clear()
            consumer.commit()
            assert not any(path.endswith(".group") for path in synced)
            store.flush()
            assert any(path.endswith(".group") for path in synced)
            stream.alter(durability="sync")
            consumer.poll()
            synced.clear()
            consumer.commit()
            assert any(path.endswith(".group") for path in synced)


def test_a_header_with_more_partitions_than_the_file_has_is_damage(stream):
    with stream.consumer(group="g") as consumer:
        path = consumer.group.path
        with open(path, "r+b") as file:
            file.seek(80)
            file.write((1 << 30).to_bytes(4, "little"))
        with pytest.raises(CorruptBatch, match="shorter"):
            consumer.poll()
        with open(path, "r+b") as file:
            file.seek(80)
            file.write((4).to_bytes(4, "little"))


def test_what_a_transaction_has_read_stays_until_it_ends(stream):
    with (
        stream.consumer(group="g", delivery="exactly_once") as first,
        stream.consumer(group="g", delivery="exactly_once") as second,
    ):
        assert first.assignment == [0, 1]
        second.close()
        taken(first)
        third = stream.consumer(group="g", delivery="exactly_once")
        first.poll()
        assert third.assignment == []
        first._member.settled(first._member.prepare(5))
        first.poll()
        assert len(third.assignment) == 2
        third.close()


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_commit_after_a_partition_was_lost_unseen_is_fenced(delivery):
    with clock() as now, millstream.temporary(durability="process") as store:
        stream = store.stream("s", partitions=2)
        fill(stream)
        slow = stream.consumer(group="g", delivery=delivery, max_processing=1)
        slow.poll()
        now.advance(2)
        with stream.consumer(group="g") as other:
            other.poll()
        slow.poll()  # joins again: the loss came before this batch
        commit = slow.commit if delivery == "at_least_once" else lambda: slow._member.prepare(1)
        with pytest.raises(Fenced) as caught:
            commit()
        assert len(caught.value.partitions) == 1
        commit()
        slow.close()
