"""Members of a group: fair shares, few moves, callbacks, and what one that hangs or fails loses."""

import threading
import time

import pytest
from group_steps import at, fill, filled, taken
from hypothesis import given, settings
from hypothesis import strategies as st

import millstream
import millstream.groups.group
from millstream import (
    Closed,
    CorruptBatch,
    Fenced,
    InvalidArgument,
)
from millstream.testing import clock


@pytest.fixture
def stream(store):
    return filled(store)


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
        first._member.applied(first._member.prepare(5))
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
