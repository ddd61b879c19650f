"""Views: what a dictionary would have, kept current, in every way of coming to it."""

import itertools
import logging
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

import pytest

import millstream
from millstream import _native
from millstream._native import Latest
from millstream.disk import files
from millstream.log import reader
from millstream.log.partition import PartitionLog
from millstream.streams import view as view_module
from millstream.streams import view_snapshot
from millstream.streams.view import Replay


@pytest.fixture
def store(tmp_path):
    with millstream.open(tmp_path / "store", durability="process") as opened:
        yield opened


def play(stream, model, count, seed, keys=50):
    """Append at random, to the stream and to a dictionary; the last positions of each partition."""
    chance = random.Random(seed)
    positions = {}
    for i in range(count):
        key = b"k%d" % chance.randrange(keys)
        value = None if chance.random() < 0.2 else b"%d " % i * chance.randrange(9)
        position = stream.append(value, key=key)
        positions[position.partition] = position
        if value is None:
            model.pop(key, None)
        else:
            model[key] = value
    return positions.values()


@pytest.mark.parametrize("partitions", [1, 3])
def test_view_is_what_a_dictionary_would_be(store, partitions):
    stream = store.stream("s", partitions=partitions)
    model = {}
    stream.append(b"no key")
    play(stream, model, 500, 1)
    with stream.view() as view:
        assert view == model
        for round in range(20):
            for position in play(stream, model, 37, round):
                view.wait_for(position, timeout=60)
            assert dict(view.items()) == model
            assert sorted(view) == sorted(model) == sorted(view.keys())
            assert sorted(view.values()) == sorted(model.values())
            assert len(view) == len(model)
            for key in [b"k%d" % i for i in range(60)]:
                assert view.get(key) == model.get(key)
                assert (key in view) == (key in model)
        spans = stream.append_many([b"many"] * 9, keys=[b"m%d" % i for i in range(9)])
        for span in spans:
            view.wait_for(span, timeout=60)
        assert view[b"m8"] == b"many"
        assert sum(view.positions) == sum(map(stream.next_offset, range(partitions)))


def test_mapping_and_its_errors(store):
    stream = store.stream("s")
    stream.append(b"1", key=b"a")
    stream.append(b"", key=b"")
    view = stream.view()
    assert isinstance(view, Mapping)
    assert view[bytearray(b"a")] == view[memoryview(b"a")] == b"1"
    assert view[b""] == b""
    assert view.get(b"z", 5) == 5
    with pytest.raises(KeyError):
        view[b"z"]
    for use in (lambda: view["a"], lambda: "a" in view, lambda: view.get(5)):
        with pytest.raises(millstream.InvalidType):
            use()
    with pytest.raises(TypeError):
        view[b"a"] = b"2"
    with pytest.raises(millstream.InvalidType):
        view.wait_for(5)
    with pytest.raises(millstream.OffsetOutOfRange):
        view.wait_for(millstream.Position(0, 1, 77))
    assert "2 keys" in repr(view)
    view.close()
    view.close()
    assert "closed" in repr(view)
    for use in (lambda: view[b"a"], lambda: len(view), lambda: list(view), view.items):
        with pytest.raises(millstream.Closed):
            use()
    with pytest.raises(millstream.Closed):
        view.wait_for(millstream.Position(0, 1, 0))


def test_iterating_goes_over_what_there_was(store):
    stream = store.stream("s")
    for i in range(100):
        stream.append(b"v", key=b"%d" % i)
    with stream.view() as view:
        seen = []
        for key in view:
            view.wait_for(stream.append(None, key=key), timeout=60)
            seen.append(key)
        assert len(seen) == 100
        assert len(view) == 0


def test_time_out_names_what_did_not_come(store, monkeypatch):
    stream = store.stream("s")
    with stream.view() as view:
        monkeypatch.setattr(view._replay, "step", lambda: False)
        position = stream.append(b"v", key=b"k")
        with pytest.raises(millstream.WaitTimeout, match="offset 0 of partition 0"):
            view.wait_for(position, timeout=0.05)


def test_many_threads_read_while_it_is_written(store):
    stream = store.stream("s")
    stop = threading.Event()
    failed = []

    def look(view):
        while not stop.is_set():
            try:
                pairs = dict(view.items())
                assert pairs == {} or pairs[b"a"] <= pairs.get(b"b", b"~")
                assert view.get(b"a", b"") <= view.get(b"b", b"~")
            except Exception as error:
                failed.append(error)
                return

    with stream.view() as view:
        threads = [threading.Thread(target=look, args=(view,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for i in range(2000):
            value = b"%06d" % i
            stream.append_many([value, value], keys=[b"b", b"a"])
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


@pytest.mark.parametrize("compacted", [False, True])
def test_snapshot_leaves_only_what_is_new_to_read(store, compacted):
    keep = millstream.Compaction(tombstone_age="1h")
    stream = store.stream("s", partitions=2, segment_bytes=1 << 16, compact=keep)
    model = {}
    play(stream, model, 3000, 1)
    with stream.view():
        pass
    play(stream, model, 500, 2)
    if compacted:
        stream.compact()
    store.close()
    with millstream.open(store.path) as again:
        stream = again.stream("s")
        with stream.view() as view:
            assert view == model
            assert 0 < view._replay.applied <= 500
        play(stream, model, 10, 3)
    with millstream.open(store.path, mode="r") as readers:
        before = os.stat(os.path.join(stream.path, "view")).st_mtime_ns
        with readers.stream("s").view() as view:
            assert view == model
            assert view._replay.applied == 10
        assert os.stat(os.path.join(stream.path, "view")).st_mtime_ns == before


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign", "directory"])
def test_damaged_snapshot_is_as_none(store, harm, caplog):
    stream = store.stream("s")
    model = {}
    play(stream, model, 300, 1)
    stream.view().close()
    path = os.path.join(stream.path, "view")
    with open(path, "rb") as file:
        data = bytearray(file.read())
    if harm == "cut":
        del data[-1]
    elif harm == "flip":
        data[random.Random(5).randrange(len(data))] ^= 4
    elif harm == "empty":
        data.clear()
    elif harm == "foreign":
        data[20] ^= 1
    os.unlink(path)
    if harm == "directory":
        os.mkdir(path)
    else:
        with open(path, "wb") as file:
            file.write(data)
    with caplog.at_level(logging.INFO, "millstream"):
        view = stream.view()
        assert view == model
        assert view._replay.applied == 300
    assert "all is read anew" in caplog.text
    view.close()


def test_snapshot_whose_numbers_do_not_fit_is_as_none_though_its_checksum_is_right(store, caplog):
    stream = store.stream("s")
    model = {}
    play(stream, model, 300, 1)
    stream.view().close()
    path = os.path.join(stream.path, "view")
    with open(path, "rb") as file:
        data = file.read()
    body = view_snapshot.HEADER.size + 8
    harms = [(40, 1 << 40), (48, 1), (56, 1), (body + 16, 1 << 62), (body + 200, 0)]
    for at, number in harms:  # counts, bytes, ends of a key
        harmed = bytearray(data)
        struct.pack_into("<Q", harmed, at, number)
        head = _native.xxh3_64(bytes(harmed[: body - 8]))
        struct.pack_into("<Q", harmed, body - 8, _native.xxh3_64(bytes(harmed[body:]), head))
        with open(path, "wb") as file:
            file.write(harmed)
        caplog.clear()
        with caplog.at_level(logging.INFO, "millstream"), stream.view() as view:
            assert view == model
            assert view._replay.applied == 300
        assert "it is damaged" in caplog.text


def test_waiting_for_a_record_that_was_lost_is_an_error_also_where_another_has_its_offset(store):
    stream = store.stream("s")
    kept = stream.append(b"1", key=b"a")
    other = millstream.Position(0, kept.epoch + 1, kept.offset)  # of a tail that was lost
    with stream.view() as view:
        view.wait_for(kept)
        with pytest.raises(millstream.OffsetOutOfRange, match="was lost"):
            view.wait_for(other, timeout=1)
    with pytest.raises(millstream.OffsetOutOfRange, match="was lost"):
        stream.wait_durable(other)


def test_snapshot_that_the_log_does_not_continue_is_not_used(store, caplog):
    """Lost tails, removed beginnings and removed tombstones: each is seen."""
    caplog.set_level(logging.INFO, "millstream")
    keep = millstream.Compaction(tombstone_age=0)
    stream = store.stream("s", segment_bytes=1 << 16, compact=keep)
    stream.append(b"1" * 60_000, key=b"gone")
    stream.append(b"1" * 60_000, key=b"kept")
    stream.view().close()
    for key in (b"gone", b"x", b"y", b"z"):
        stream.append(None if key == b"gone" else b"1" * 60_000, key=key)
    for _ in range(2):
        stream.compact()
    with stream.view() as view:
        assert b"gone" not in view
        assert set(view) == {b"kept", b"x", b"y", b"z"}
    assert "tombstones behind it were removed" in caplog.text
    caplog.clear()
    for i in range(5):
        stream.append(b"1" * 60_000, key=b"%d" % i)
    stream.delete_before(millstream.Position(0, 1, stream.next_offset(0) - 1))
    with stream.view() as view:
        assert set(view) == {b"4"}
    assert "is not there any more" in caplog.text
    caplog.clear()
    stream.add_partitions(1)
    stream.view().close()
    assert "partitions were added" in caplog.text


def held_before(monkeypatch, step):
    """Replays stop before that step of theirs; (somebody waits there, let them all go on)."""
    came, go, steps = threading.Event(), threading.Event(), itertools.count(1)
    unheld = view_module.Replay.step

    def held(replay):
        if next(steps) >= step and not go.is_set():
            came.set()
            assert go.wait(30)
        return unheld(replay)

    monkeypatch.setattr(view_module.Replay, "step", held)
    return came, go


def delete_and_compact(stream, count):
    """Delete a key, and compact until nothing is left of that; a record behind all."""
    for i in range(count):
        stream.append(None if i == 0 else b"1" * 60_000, key=b"gone" if i == 0 else b"%d" % (i % 2))
    for _ in range(2):
        result = stream.compact()
    assert result.tombstones_removed == 1
    return stream.append(b"last", key=b"last")


@pytest.mark.parametrize("count", [2, 8])
def test_open_view_that_lags_behind_the_age_of_tombstones_begins_anew(store, monkeypatch, count):
    """It went on behind the place of the tombstone, and kept what that had deleted."""
    keep = millstream.Compaction(tombstone_age=0)
    stream = store.stream("s", segment_bytes=1 << 16, compact=keep)
    stream.append(b"1" * 60_000, key=b"gone")
    stream.append(b"1" * 60_000, key=b"kept")
    with stream.view() as view:
        assert b"gone" in view
        came, go = held_before(monkeypatch, 1)
        stream._wake()
        assert came.wait(30)
        last = delete_and_compact(stream, 2 + count)
        go.set()
        view.wait_for(last, timeout=60)
        assert set(view) == {b"kept", b"0", b"1", b"last"}


def test_view_that_is_overtaken_while_it_loads_begins_anew(store, monkeypatch):
    keep = millstream.Compaction(tombstone_age=0)
    stream = store.stream("s", segment_bytes=1 << 16, compact=keep)
    for i in range(4):
        stream.append(b"1" * 60_000, key=b"gone" if i == 0 else b"kept")
    came, go = held_before(monkeypatch, 2)
    found = []
    loading = threading.Thread(target=lambda: found.append(stream.view()))
    loading.start()
    assert came.wait(30)
    delete_and_compact(stream, 4)
    go.set()
    loading.join(60)
    with found[0] as view:
        assert set(view) == {b"kept", b"0", b"1", b"last"}
        assert view._replay.applied < 8  # a compacted log is no reason to begin anew again


def test_partitions_that_are_added_while_it_is_open(store):
    stream = store.stream("s", partitions=2)
    model = {}
    play(stream, model, 300, 1)
    with stream.view() as view:
        for count in (1, 3):
            stream.add_partitions(count)
            for position in play(stream, model, 200, count):
                view.wait_for(position, timeout=60)
            assert view == model
        with stream.view() as other:
            assert other == model
    with stream.view() as view:
        assert view == model
        assert view._replay.applied == 0


def moving_key(before, after, homes):
    """A key that is in partition homes[0] of `before`, and in homes[1] of `after`."""
    for i in range(10_000):
        key = b"k%d" % i
        digest = _native.xxh3_64(key)
        if (digest % before, digest % after) == homes:
            return key
    raise AssertionError


def test_what_comes_after_partitions_were_added_is_not_taken_as_what_came_before(store):
    """The key is in partition 0 now, where the replay still takes it for a stray."""
    stream = store.stream("s", partitions=2)
    key = moving_key(2, 3, (1, 0))
    stream.append(b"before", key=key)
    replay = Replay(stream, Latest(), None)
    while replay.step():
        pass
    stream.add_partitions(1)
    stream.append(b"after", key=key)
    assert not replay.step()
    assert replay.following == [0, 1]
    replay = Replay(stream, Latest(), None)
    while replay.step():
        pass
    assert replay.values.as_dict() == {key: b"after"}


@pytest.mark.parametrize("value", [b"2" * 60_000, None])
def test_key_that_comes_back_to_a_partition_has_its_latest_value(store, value):
    """In 0, then 1, then 0 again: what 1 has is later, and stays there if it is a tombstone."""
    keep = millstream.Compaction(tombstone_age=0)
    stream = store.stream("s", partitions=1, segment_bytes=1 << 16, compact=keep)
    key = moving_key(2, 3, (1, 0))
    stream.append(b"1" * 60_000, key=key)
    stream.add_partitions(1)
    stream.append(value, key=key)
    stream.add_partitions(1)
    for partition in range(3):
        for i in range(3):
            stream.append(b"1" * 60_000, key=b"fill %d" % i, partition=partition)
    for _ in range(3):
        stream.compact()
        with stream.view() as view:
            assert view.get(key) == value
        os.unlink(os.path.join(stream.path, "view"))


def test_tombstone_stays_while_a_late_record_of_the_old_partition_does_however_far_behind(store):
    """Writers that had not heard of the new partitions yet went on for segments."""
    keep = millstream.Compaction(tombstone_age=0)
    stream = store.stream("s", partitions=1, segment_bytes=1 << 16, compact=keep)
    key = moving_key(1, 2, (0, 1))
    stream.append(b"before", key=b"other")
    stream.add_partitions(1)
    for i in range(3):
        stream.append(b"1" * 60_000, key=b"late %d" % i, partition=0)
    stream.append(b"late", key=key, partition=0)
    stream.append(None, key=key)
    for _ in range(3):
        for partition in range(2):
            stream.append(b"1" * 60_000, partition=partition)
        stream.compact()
        with stream.view() as view:
            assert key not in view
        os.unlink(os.path.join(stream.path, "view"))


def test_partition_that_rolls_while_the_records_of_moved_keys_are_looked_for(store, monkeypatch):
    keep = millstream.Compaction(tombstone_age=0)
    stream = store.stream("s", partitions=1, segment_bytes=1 << 16, compact=keep)
    key = moving_key(1, 2, (0, 1))
    stream.append(b"before", key=key)
    stream.add_partitions(1)
    stream.append(None, key=key)
    stream.append_many([b"1" * 60_000] * 3, partition=1)
    stream.compact()
    end, asked = PartitionLog.end, []

    def rolls(log):
        if log.index == 0 and not asked:
            asked.append(log)
            for _ in range(2):
                stream.append(b"1" * 60_000, partition=0)
        return end(log)

    monkeypatch.setattr(PartitionLog, "end", rolls)
    stream.compact(partition=1)
    assert asked
    with stream.view() as view:
        assert key not in view


def test_damage_in_the_partition_of_before_keeps_tombstones_and_stops_no_compaction(store):
    keep = millstream.Compaction(tombstone_age=0)
    stream = store.stream("s", partitions=1, segment_bytes=1 << 16, compact=keep)
    key = moving_key(1, 2, (0, 1))
    stream.append(b"before", key=key)
    stream.append(b"1" * 60_000, partition=0)
    stream.add_partitions(1)
    stream.append(b"now", key=key)
    stream.append(None, key=key)
    for i in range(2):
        stream.append(b"%d" % i * 60_000, key=b"other", partition=1)
    segment = stream._log(0).segments.activated(1)
    with open(segment.path, "r+b") as file:
        file.seek(segment.size - segment.data_bytes + 80)
        file.write(b"\xff" * 8)
    store._streams.cache.clear()
    with pytest.raises(millstream.CorruptBatch):
        list(stream.read(partition=0))
    removed = [stream.compact(partition=1) for _ in range(3)]
    assert sum(result.records_removed for result in removed) >= 1
    assert sum(result.tombstones_removed for result in removed) == 0


def test_record_put_into_another_partition_by_hand(store):
    stream = store.stream("s", partitions=2)
    home = stream.partition_for(b"k")
    stream.append(b"stray", key=b"k", partition=1 - home)
    with stream.view() as view:
        assert view[b"k"] == b"stray"
        view.wait_for(stream.append(b"stray 2", key=b"k", partition=1 - home), timeout=60)
        assert view[b"k"] == b"stray 2"
        view.wait_for(stream.append(b"home", key=b"k"), timeout=60)
        assert view[b"k"] == b"home"
        view.wait_for(stream.append(b"stray 3", key=b"k", partition=1 - home), timeout=60)
        assert view[b"k"] == b"home"
    stream.append(None, key=b"k")
    os.unlink(os.path.join(stream.path, "view"))
    with stream.view() as view:
        assert b"k" not in view, "its own partition says that it is gone"


def test_snapshot_without_room_is_said_and_harms_nothing(store, monkeypatch, caplog):
    stream = store.stream("s")
    stream.append(b"1", key=b"a")

    def full(path, data, **_):
        raise millstream.StoreFull(28, "injected", path)

    view = stream.view()
    monkeypatch.setattr(files, "replace", full)
    view.close()
    monkeypatch.undo()
    assert "could not be written" in caplog.text
    with stream.view() as view:
        assert view[b"a"] == b"1"


def test_retention_that_overtakes_it_makes_it_begin_anew(store, monkeypatch):
    stream = store.stream("s", segment_bytes=1 << 16)
    stream.append(b"1" * 60_000, key=b"old")
    with stream.view() as view:
        step = view._replay.step
        monkeypatch.setattr(view._replay, "step", lambda: False)
        for i in range(5):
            last = stream.append(b"1" * 60_000, key=b"%d" % i)
        stream.delete_before(last)
        store._streams.cache.clear()
        monkeypatch.setattr(view._replay, "step", step)
        stream._wake()
        view.wait_for(last, timeout=60)
        assert set(view) == {b"4"}


def test_closed_store_ends_the_view(store):
    stream = store.stream("s")
    view = stream.view()
    store.close()
    view._thread.join(10)
    with pytest.raises(millstream.Closed):
        view[b"a"]
    view.close()


def test_close_wakes_the_thread_that_was_about_to_sleep(store, monkeypatch):
    stream, wait = store.stream("s"), reader.Rotation.wait
    about_to, woken, slept = threading.Event(), threading.Event(), []

    def wait_late(turn, *rest):
        about_to.set()
        woken.wait(10)
        began = time.monotonic()
        wait(turn, *rest)
        slept.append(time.monotonic() - began)

    monkeypatch.setattr(reader.Rotation, "wait", wait_late)
    monkeypatch.setattr(_native, "join", lambda thread: (woken.set(), thread.join()))
    view = stream.view()
    assert about_to.wait(10)
    view.close()
    assert len(slept) == 1
    assert slept[0] < view_module.WAIT_SECONDS / 2


def test_other_process_sees_what_is_appended_here(store):
    stream = store.stream("s")
    code = (
        "import millstream, sys\n"
        f"with millstream.open({store.path!r}) as store, store.stream('s').view() as view:\n"
        "    print('open', flush=True)\n"
        "    for line in sys.stdin:\n"
        "        view.wait_for(millstream.Position(0, 1, int(line)), timeout=60)\n"
        "        print(view[b'k'].decode(), flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "open\n"
        for i in range(50):
            position = stream.append(b"%d" % i, key=b"k")
            other.stdin.write(f"{position.offset}\n")
            other.stdin.flush()
            assert other.stdout.readline() == f"{i}\n"
        other.stdin.close()
        assert other.wait(30) == 0


def test_table_against_a_dictionary():
    chance = random.Random(7)
    table, model = Latest(), {}
    with millstream.temporary() as store:
        stream = store.stream("s")
        for _ in range(60):
            keys = [b"%d" % chance.randrange(400) * chance.randrange(3) for _ in range(200)]
            values = [None if chance.random() < 0.4 else b"v" * chance.randrange(6) for _ in keys]
            start = stream.next_offset(0)
            stream.append_many(values, keys=keys)
            for batch in stream.read(start=start):
                table._apply(batch, 1, 1 << 62, None)
            for key, value in zip(keys, values, strict=True):
                model.pop(key, None)
                if value is not None:
                    model[key] = value
            assert table.as_dict() == model
            assert sorted(table.key_list()) == sorted(model)
    copy = Latest()
    copy._load(*table._dump())
    assert copy.as_dict() == model
    with pytest.raises(ValueError, match="ends"):
        Latest()._load(b"\xff" * 8, b"\0" * 8, b"x", b"", b"\0")
    with pytest.raises(ValueError, match="origin"):
        Latest()._load(b"\1" + bytes(7), bytes(8), b"x", b"", b"\2")
