"""Reading: from where, how far, in which order, waiting, and what retention was faster than."""

import threading
import time
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest
from timing import SOON

import millstream
from millstream import (
    Closed,
    InvalidArgument,
    InvalidType,
    NotFound,
    OffsetOutOfRange,
    Position,
    Span,
)
from millstream.log.segments import Segments


def values(stream, **options):
    return [value for batch in stream.read(**options) for value in batch.values]


def offsets(stream, **options):
    return [int(offset) for batch in stream.read(**options) for offset in batch.offsets]


def number(value):
    return int(value.partition(b":")[0])


@pytest.fixture
def mixed(store):
    """Records 0 to 2,999: single ones, small batches, large ones, over several segments."""
    stream = store.stream("mixed", segment_bytes=1 << 16)
    at = 0
    for turn in range(30):
        for _ in range(10):
            stream.append(b"%d:" % at, timestamp=at)
            at += 1
        for count in (5, 25, 60):
            made = [b"%d:" % (at + i) + bytes(turn * 5 if count == 60 else 0) for i in range(count)]
            stream.append_many(made, timestamps=list(range(at, at + count)))
            at += count
    assert at == stream.next_offset(0) == 3000
    assert stream.stats().partitions[0].segments > 3
    return stream


# --- where it begins and ends ---------------------------------------------------------------------


def test_everything_comes_once_and_in_order(mixed):
    found = list(mixed.read())
    assert [number(v) for batch in found for v in batch.values] == list(range(3000))
    for before, batch in pairwise(found):
        assert batch.first_offset == before.next_offset
    for batch in found:
        assert batch.offsets.tolist() == list(range(batch.first_offset, batch.next_offset))
        assert batch.timestamps.tolist() == batch.offsets.tolist()
        assert len(batch) == len(batch.values) == len(batch.keys) == len(batch.headers) >= 1


def test_any_offset_is_a_start(mixed):
    for start in [*range(220), *range(220, 3000, 37), 2998, 2999, 3000]:
        [*first] = mixed.read(start=start, max_records=3)
        found = [number(v) for batch in first for v in batch.values]
        assert found == list(range(start, min(start + 3, 3000)))


@pytest.mark.parametrize("most", [0, 1, 2, 17, 60, 2999, 3000, 3001, 1 << 70])
def test_max_records_is_exact(mixed, most):
    assert offsets(mixed, max_records=most) == list(range(min(most, 3000)))
    assert offsets(mixed, start=100, max_records=most) == list(range(100, min(100 + most, 3000)))


def test_start_takes_many_kinds(mixed):
    [batch] = mixed.read(start=1234, max_records=1)
    position = Position(0, batch.epoch, 1234)
    for start in (
        1234,
        np.int64(1234),
        np.uint16(1234),
        position,
        datetime.fromtimestamp(1234e-6, UTC),
        datetime.fromtimestamp(1234e-6),
        np.datetime64(1234, "us"),
    ):
        assert offsets(mixed, start=start, max_records=1) == [1234]
    assert offsets(mixed, start="earliest", max_records=1) == [0]
    assert offsets(mixed, start="latest") == []
    assert offsets(mixed, start=3000) == []
    assert offsets(mixed, start=position, partition=0)[0] == 1234


@pytest.mark.parametrize("wrong", [-1, 3001, 1 << 63, 1 << 64, -(1 << 70)])
def test_start_that_is_nowhere_carries_the_range(mixed, wrong):
    with pytest.raises(OffsetOutOfRange) as caught:
        mixed.read(start=wrong)
    error = caught.value
    assert (error.partition, error.first, error.next) == (0, 0, 3000)
    assert isinstance(error, IndexError)
    assert str(wrong) in str(error)
    assert offsets(mixed, start=wrong, on_lost="earliest", max_records=1) == [0]


@pytest.mark.parametrize("wrong", [None, 1.5, True, b"earliest", [], Span(0, 1, 0, 1), object()])
def test_start_of_a_wrong_type_is_refused(mixed, wrong):
    with pytest.raises(InvalidType):
        mixed.read(start=wrong)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"start": "first"}, InvalidArgument),
        ({"start": Position(1, 1, 0), "partition": 0}, InvalidArgument),
        ({"start": Position(7, 1, 0)}, NotFound),
        ({"start": Position(0, 9, 3001)}, OffsetOutOfRange),
        ({"start": np.datetime64("NaT", "us")}, InvalidArgument),
        ({"partition": 1}, NotFound),
        ({"max_records": -1}, InvalidArgument),
        ({"max_records": 1.5}, InvalidType),
        ({"max_records": True}, InvalidType),
        ({"on_lost": "skip"}, InvalidArgument),
        ({"on_lost": None}, InvalidArgument),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(mixed, wrong, error):
    with pytest.raises(error):
        mixed.read(**wrong)
    with pytest.raises(error):
        mixed.aread(**wrong)


def test_read_ends_at_the_tail_and_a_new_one_sees_more(stream):
    assert values(stream) == []
    reader = stream.read(partition=0)
    stream.append(b"a")
    assert [list(batch.values) for batch in reader] == [[b"a"]]
    stream.append(b"b")
    assert list(reader) == []
    assert values(stream, start=1) == [b"b"]


# --- times ----------------------------------------------------------------------------------------


def test_offset_at_is_the_first_at_or_after(mixed):
    for stamp in [*range(0, 3000, 113), 2999]:
        assert mixed.offset_at(stamp, 0) == stamp
    assert mixed.offset_at(-5, 0) == 0
    assert mixed.offset_at(3000, 0) == 3000
    assert mixed.offset_at(datetime.fromtimestamp(0.0015, UTC), 0) == 1500
    assert mixed.offset_at(np.datetime64(77, "us"), 0) == 77
    for wrong in ("2013", 1.5, None):
        with pytest.raises(InvalidType):
            mixed.offset_at(wrong, 0)


def test_offset_at_with_times_that_fall(store):
    stream = store.stream("s", segment_bytes=1 << 16)
    stamps = np.random.default_rng(7).integers(0, 10_000, 2000).tolist()
    for at in range(0, 2000, 50):
        stream.append_many([bytes(200)] * 50, timestamps=stamps[at : at + 50])
    for stamp in (0, 1, 5000, 9990, 9999, *stamps[:20]):
        expected = next((i for i, one in enumerate(stamps) if one >= stamp), 2000)
        assert stream.offset_at(stamp, 0) == expected


# --- all partitions -------------------------------------------------------------------------------


def test_partitions_are_interleaved_and_each_in_order(store):
    stream = store.stream("p", partitions=5)
    for turn in range(40):
        for partition in range(5):
            stream.append_many([b"%d" % turn] * 60 + [bytes(5000)], partition=partition)
    found = list(stream.read())
    assert sum(len(batch) for batch in found) == 5 * 40 * 61
    following = dict.fromkeys(range(5), 0)
    for batch in found:
        assert batch.first_offset == following[batch.partition]
        following[batch.partition] = batch.next_offset
    # No partition is read to its end before the others begin.
    assert {batch.partition for batch in found[:5]} == set(range(5))
    assert {batch.partition for batch in found[-5:]} == set(range(5))
    assert sum(len(batch) for batch in stream.read(max_records=100)) == 100


def test_many_partitions_are_read_with_few_descriptors(store):
    stream = store.stream("p", partitions=40)
    for partition in range(40):
        stream.append_many([b"%d" % partition] * 3, partition=partition)
    found = values(stream)
    assert sorted(found) == sorted(b"%d" % p for p in range(40) for _ in range(3))


def test_offset_is_meant_for_each_partition(store):
    stream = store.stream("p", partitions=2)
    stream.append_many([b"a", b"b", b"c"], partition=0)
    stream.append(b"x", partition=1)
    assert values(stream, start=1) == [b"b", b"c"]
    with pytest.raises(OffsetOutOfRange) as caught:
        stream.read(start=2)
    assert caught.value.partition == 1
    assert values(stream, start=2, on_lost="earliest") == [b"c", b"x"]
    assert values(stream, start=Position(0, 1, 2)) == [b"c"]


def test_added_partitions_are_followed_from_their_first_record(store):
    stream = store.stream("p")
    stream.append(b"0")
    reader = stream.read(start="latest", follow=True, timeout=20)
    stream.add_partitions(2)
    stream.append(b"1", partition=1)
    stream.append(b"2", partition=2)
    found = [v for _ in range(2) for v in next(reader).values]
    assert sorted(found) == [b"1", b"2"]


# --- waiting --------------------------------------------------------------------------------------


def later(*actions):
    """Do them one by one in a thread, as soon as something waits or not."""

    def run():
        for action in actions:
            time.sleep(0.02)  # the reader waits by now; if not, this shows less
            action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_follow_gets_what_comes_and_ends_when_nothing_does(stream):
    stream.append(b"0")
    thread = later(lambda: stream.append(b"1"), lambda: stream.append_many([b"2", b"3"]))
    begun = time.monotonic()
    assert values(stream, follow=True, timeout=0.3) == [b"0", b"1", b"2", b"3"]
    assert time.monotonic() - begun >= 0.3
    thread.join()


def test_follow_ends_at_max_records(stream):
    thread = later(lambda: stream.append_many([b"1", b"2", b"3"]))
    assert values(stream, follow=True, max_records=2) == [b"1", b"2"]
    thread.join()


def test_follow_without_time_ends_at_once(stream):
    begun = time.monotonic()
    assert values(stream, follow=True, timeout=0) == []
    stream.append(b"1")
    assert values(stream, follow=True, timeout=0.0) == [b"1"]
    assert time.monotonic() - begun < SOON


def test_waiting_reader_wakes_soon(store):
    stream = store.stream("p", partitions=8)
    reader = stream.read(follow=True, timeout=600)
    delays = []
    for turn in range(20):
        sent = []

        def append(sent=sent, turn=turn):
            sent.append(time.perf_counter())
            stream.append(b"%d" % turn)

        thread = later(append)
        [value] = next(reader).values
        delays.append(time.perf_counter() - sent[0])
        assert value == b"%d" % turn
        thread.join()
    assert max(delays) < SOON


def test_follow_ends_with_closed_when_the_stream_goes(tmp_path):
    for end in ("close", "drop"):
        store = millstream.open(tmp_path / end)
        stream = store.stream("s", partitions=2)
        stream.append(b"x", partition=0)
        thread = later(
            store.close if end == "close" else lambda store=store: store.drop_stream("s")
        )
        with pytest.raises(Closed):
            for _ in stream.read(follow=True, timeout=20):
                pass
        thread.join()
        store.close()


def test_many_readers_wait_at_once(store):
    stream = store.stream("p", partitions=3)
    found = [[] for _ in range(6)]

    def read(i):
        found[i] += values(stream, follow=True, timeout=20, max_records=200)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for i in range(200):
        stream.append(b"%d" % i)
    for thread in threads:
        thread.join()
    for one in found:
        assert sorted(one, key=int) == [b"%d" % i for i in range(200)]


# --- durable --------------------------------------------------------------------------------------


def test_durable_reader_gets_only_what_was_synced(stream):
    stream.append_many([b"a", b"b"])
    assert values(stream, durable=True) == []
    stream.flush()
    stream.append(b"c")
    assert values(stream, durable=True) == [b"a", b"b"]
    assert values(stream, durable=True, start="latest") == []
    assert values(stream) == [b"a", b"b", b"c"]
    assert values(stream, durable=True, start=2) == []
    reader = stream.read(durable=True, start="latest", follow=True, timeout=20)
    thread = later(stream.flush)
    assert list(next(reader).values) == [b"c"]
    thread.join()


def test_durable_reader_of_large_and_small_batches_stops_at_the_mark(store):
    stream = store.stream("s", segment_bytes=1 << 16)
    for turn in range(30):
        stream.append_many([b"%d" % turn] * 30)
        stream.append_many([bytes(200)] * 50)
        if turn == 15:
            stream.flush()
    assert sum(len(batch) for batch in stream.read(durable=True)) == 16 * 80
    assert sum(len(batch) for batch in stream.read()) == 30 * 80


# --- retention was faster -------------------------------------------------------------------------


def rolled(store, name="r"):
    stream = store.stream(name, segment_bytes=1 << 16)
    for at in range(60):
        stream.append_many([b"%d:" % (at * 10 + i) + bytes(500) for i in range(10)])
    assert stream.next_offset(0) == 600
    return stream


def test_reader_behind_the_start_is_told_the_range_or_goes_on(store):
    stream = rolled(store)
    strict = stream.read(partition=0)
    lenient = stream.read(partition=0, on_lost="earliest")
    assert next(strict).first_offset == next(lenient).first_offset == 0
    first = stream.delete_before(Position(0, 1, 400))
    assert 0 < first <= 400
    with pytest.raises(OffsetOutOfRange) as caught:
        for batch in strict:
            assert batch.next_offset < first
    assert (caught.value.first, caught.value.next, caught.value.partition) == (first, 600, 0)
    found = [int(o) for batch in lenient for o in batch.offsets]
    assert found[-1] == 599
    assert first in found
    assert found[found.index(first) :] == list(range(first, 600))
    with pytest.raises(OffsetOutOfRange):
        stream.read(start=0)
    assert offsets(stream, start=0, on_lost="earliest")[0] == first
    assert offsets(stream, start="earliest")[0] == first
    assert offsets(stream, start=datetime(1970, 1, 1, tzinfo=UTC))[0] == first


def test_readers_and_retention_at_once(store):
    """Segments vanish under readers that begin at the earliest, look up times, and follow."""
    stream = store.stream("r", segment_bytes=1 << 16)
    stop = threading.Event()
    failed = []

    def guard(work):
        try:
            while not stop.is_set():
                work()
        except Exception as error:
            failed.append(error)
            stop.set()

    def remove():
        following = stream.next_offset(0)
        if following > 200:
            stream.delete_before(Position(0, 1, following - 100))

    def read():
        previous = -1
        for batch in stream.read(on_lost="earliest"):
            assert batch.first_offset > previous
            assert number(batch.values[0]) == batch.first_offset
            previous = batch.next_offset - 1
            if stop.is_set():
                return

    def look_up():
        assert stream.offset_at(0, 0) <= stream.next_offset(0)
        next(iter(stream.read(start=datetime(1970, 1, 2, tzinfo=UTC), on_lost="earliest")), None)

    threads = [threading.Thread(target=guard, args=(w,)) for w in (remove, read, read, look_up)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 4
    at = 0
    while time.monotonic() < deadline and not stop.is_set():
        stream.append_many([b"%d:" % (at + i) + bytes(700) for i in range(20)])
        at += 20
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert stream.first_offset(0) > 0


@pytest.mark.parametrize("on_lost", ["earliest", "raise"])
def test_retention_between_the_check_of_an_offset_and_the_look_for_it(monkeypatch, on_lost):
    with millstream.temporary() as store:
        stream = store.stream("s", segment_bytes="64KiB")
        last = [stream.append(b"%d" % i + b"x" * 60_000) for i in range(6)][-1]
        locate, done = Segments.locate_offset, []

        def late(self, offset):
            if not done:
                done.append(offset)
                stream.delete_before(last)
            return locate(self, offset)

        monkeypatch.setattr(Segments, "locate_offset", late)
        if on_lost == "raise":
            with pytest.raises(millstream.OffsetOutOfRange):
                list(stream.read(start=1))
        else:
            batches = list(stream.read(start=1, on_lost="earliest"))
            assert [batch.first_offset for batch in batches] == [last.offset]
        assert done


@pytest.mark.parametrize("start", ["earliest", "latest", datetime.now(UTC)])
def test_what_is_appended_and_removed_while_a_place_is_looked_for_is_no_error(monkeypatch, start):
    """An offset was not asked for, so it need not be there."""
    with millstream.temporary() as store:
        stream = store.stream("s", segment_bytes="64KiB")
        stream.append(b"x" * 60_000, timestamp=1)
        locate, done = Segments.locate_offset, []

        def late(self, offset):
            if not done:
                done.append(offset)
                stream.delete_before([stream.append(b"x" * 60_000) for _ in range(3)][-1])
            return locate(self, offset)

        monkeypatch.setattr(Segments, "locate_offset", late)
        found = sum(len(batch) for batch in stream.read(start=start))
        assert found == (start != "latest")
        assert done
