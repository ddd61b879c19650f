"""The file of a group: what outlives stores, crashes, retention and removal, and what is synced."""

import contextlib
import gc
import pickle
import threading

import pytest
from group_steps import at, fill, filled, taken
from open_copy import copy_open

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
    return filled(store)


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


def test_a_call_in_the_middle_of_removing_the_same_group_is_refused_at_once(stream, monkeypatch):
    """A signal handler, say, that flushes: it would wait for the lock that its own thread has."""
    stream.consumer(group="g").close()
    remove = millstream.disk.files.remove
    refused = []

    def interrupted(path):
        monkeypatch.setattr(millstream.disk.files, "remove", remove)
        with pytest.raises(millstream.Reentered, match="removing"):
            stream.flush()
        refused.append(path)
        remove(path)

    monkeypatch.setattr(millstream.disk.files, "remove", interrupted)
    stream.group("g").remove()
    assert len(refused) == 1
    assert stream.groups() == []


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
