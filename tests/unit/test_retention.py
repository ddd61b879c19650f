"""What is kept: by bytes, age and records, in the background and by hand, whole segments only."""

from datetime import timedelta

import pytest
from timing import until

import millstream
from millstream import Compaction, InvalidType, OffsetOutOfRange, Position, Retention
from millstream.log import compacted, compaction, reader
from millstream.testing import clock

RECORD = bytes(1000)


def fill(stream, count=600, partition=None):
    for _ in range(count // 10):
        stream.append_many([RECORD] * 10, partition=partition)


def segments(path, partition=0):
    return sorted(p.name for p in (path / f"{partition:05d}").glob("*.seg"))


@pytest.fixture
def small(tmp_path):
    """A store whose background does not come between."""
    with millstream.open(tmp_path / "s", durability="process") as store:
        store._background.stop()
        yield store


# --- by hand --------------------------------------------------------------------------------------


def test_without_retention_everything_is_kept(small):
    stream = small.stream("s", segment_bytes=1 << 16)
    fill(stream)
    assert stream.enforce_retention() == 0
    assert stream.first_offset(0) == 0


def test_by_bytes(small, tmp_path):
    stream = small.stream("s", segment_bytes=1 << 16, retention=Retention(bytes=200_000))
    fill(stream)
    before = segments(tmp_path / "s/streams/s")
    removed = stream.enforce_retention()
    assert removed > 0
    assert segments(tmp_path / "s/streams/s") == before[removed:]
    kept = stream.stats().log_bytes
    assert 200_000 <= kept < 200_000 + (1 << 16) + 2000, "whole segments, as few as hold it"
    assert stream.enforce_retention() == 0
    first = stream.first_offset(0)
    assert 0 < first < 600
    assert sum(len(batch) for batch in stream.read()) == 600 - first


def test_by_records(small):
    stream = small.stream("s", segment_bytes=1 << 16, retention=Retention(records=100))
    fill(stream)
    stream.enforce_retention()
    assert 100 <= stream.stats().records < 200
    stream.alter(retention=Retention(records=0))
    stream.enforce_retention()
    assert stream.stats().partitions[0].segments == 1, "the active one stays"
    assert 0 < stream.stats().records < 100


def test_by_age_of_the_append_not_of_the_timestamp(small):
    stream = small.stream("s", segment_bytes=1 << 16, retention=Retention(age="1h"))
    for _ in range(30):
        stream.append_many([RECORD] * 10, timestamps=0)
    assert stream.enforce_retention() == 0
    with clock() as virtual:
        virtual.advance(3500)
        assert stream.enforce_retention() == 0
        virtual.advance(200)
        assert stream.enforce_retention() > 0
    assert stream.stats().partitions[0].segments == 1
    assert stream.next_offset(0) == 300


def test_each_limit_of_several_is_held(small):
    keep = Retention(bytes="10GiB", records=150, age="30d")
    stream = small.stream("s", segment_bytes=1 << 16, retention=keep)
    fill(stream)
    stream.enforce_retention()
    assert 150 <= stream.stats().records < 250


def test_each_partition_is_held_for_itself(small):
    stream = small.stream("s", partitions=3, segment_bytes=1 << 16, retention=Retention(records=50))
    fill(stream, 600, partition=0)
    fill(stream, 40, partition=1)
    stream.enforce_retention()
    first, second, third = stream.stats().partitions
    assert 50 <= first.records < 150
    assert second.records == 40
    assert third.records == 0
    assert stream.append(b"x", partition=0).offset == 600


def test_what_was_removed_stays_removed_and_offsets_go_on(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s", segment_bytes=1 << 16, retention=Retention(records=50))
        fill(stream)
        stream.enforce_retention()
        first = stream.first_offset(0)
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s")
        assert (stream.first_offset(0), stream.next_offset(0)) == (first, 600)
        assert stream.append(b"x").offset == 600
        assert next(stream.read()).first_offset == first
    assert millstream.inspect.verify(tmp_path / "s").ok


# --- in the background ----------------------------------------------------------------------------


def test_background_holds_it_while_appending(store):
    stream = store.stream("s", segment_bytes=1 << 16, retention=Retention(records=100))
    fill(stream)
    until(lambda: stream.stats().records < 200)
    assert stream.stats().records >= 100


def test_background_holds_it_where_nobody_appends(tmp_path):
    """Only processes that had appended, to the partitions they had used, held the retention."""
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s", partitions=3, segment_bytes=1 << 16)
        for partition in range(3):
            fill(stream, 300, partition=partition)
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s")
        assert stream.stats().records == 900
        with millstream.open(tmp_path / "s") as other:
            other.stream("s").alter(retention=Retention(records=50))
        assert stream.stats().retention.records == 50
        until(lambda: stream.stats().records < 3 * 150)
    with millstream.open(tmp_path / "s") as store:
        store.stream("s").alter(retention=Retention(records=0))
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s")
        until(lambda: all(part.segments == 1 for part in stream.stats().partitions))


def test_writer_that_looks_at_nothing_follows_an_altered_retention(tmp_path):
    """Another process altered it, and the background of the writer never heard of it."""
    with (
        millstream.open(tmp_path / "s", durability="process") as store,
        millstream.open(tmp_path / "s") as other,
    ):
        writer = store.stream("s", segment_bytes=1 << 16)
        fill(writer, 300)
        other.stream("s").alter(retention=Retention(records=50))
        other.close()
        fill(writer, 200)
        until(lambda: writer.first_offset(0) > 300)


# --- delete_before --------------------------------------------------------------------------------


def test_delete_before_removes_segments_that_lie_wholly_before(small, tmp_path):
    stream = small.stream("s", segment_bytes=1 << 16)
    fill(stream)
    path = tmp_path / "s/streams/s"
    before = segments(path)
    assert stream.delete_before(Position(0, 1, 0)) == 0
    assert segments(path) == before
    first = stream.delete_before(Position(0, 1, 300))
    assert 200 < first <= 300
    assert stream.first_offset(0) == first
    assert stream.delete_before(Position(0, 1, 10)) == first, "is gone already"
    with pytest.raises(OffsetOutOfRange):
        stream.delete_before(Position(0, 1, 601))
    last = stream.delete_before(Position(0, 1, 600))
    assert len(segments(path)) == 1
    assert last == stream.first_offset(0) < 600
    for wrong in (300, None, "x", (0, 1, 300)):
        with pytest.raises(InvalidType):
            stream.delete_before(wrong)


def test_delete_before_of_an_empty_partition(small):
    stream = small.stream("s", partitions=2)
    assert stream.delete_before(Position(1, 1, 0)) == 0
    with pytest.raises(OffsetOutOfRange):
        stream.delete_before(Position(1, 1, 1))


def test_position_before_the_first_one_kept(small):
    stream = small.stream("s", segment_bytes=1 << 16)
    position = stream.append(b"first")
    fill(stream)
    stream.delete_before(Position(0, 1, 500))
    with pytest.raises(OffsetOutOfRange) as caught:
        stream.read(start=position)
    assert caught.value.first == stream.first_offset(0)


# --- the value itself -----------------------------------------------------------------------------


def test_retention_is_a_value():
    keep = Retention(bytes="1KiB", age=timedelta(minutes=2), records=5)
    assert (keep.bytes, keep.age, keep.records) == (1024, 120.0, 5)
    assert keep == Retention(bytes=1024, age=120, records=5)
    assert hash(keep) == hash(Retention(bytes="1KiB", age="2m", records=5))
    assert keep != Retention()
    assert keep != 5
    with pytest.raises(AttributeError):
        keep.bytes = 5
    with pytest.raises(AttributeError):
        del keep.age
    with pytest.raises(TypeError):
        Retention(5)


# --- in the middle of other calls -----------------------------------------------------------------

LOOKS = {
    "extent": compacted.extent,
    "offset_at": lambda log: reader.offset_at(log, 35),
    "epoch_end": lambda log: reader.epoch_end(log, 0),
    "between": lambda log: [part[1:] for part in log.segments.between(0, log.native.tail)],
    "locate_offset": lambda log: log.segments.locate_offset(3),
    "up_to": lambda log: [end for _, end in compaction._up_to(log, 9, 0)],
    "sealed": lambda log: compaction.sealed(log, Compaction()),
    "read": lambda log: [bytes(v[:1]) for b in log.stream.read(partition=0) for v in b.values],
}


@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_while_retention_removes_finds_what_is_left(tmp_path, monkeypatch, look):
    """Its numbers of segments are those of before; some of the files are gone."""
    with millstream.open(tmp_path / "s", durability="process") as store:
        for number in range(6):
            store.stream("s", segment_bytes=1 << 16).append(
                b"%d" % number * 40_000, timestamp=number * 10
            )
    with (
        millstream.open(tmp_path / "s", durability="process") as store,
        millstream.open(tmp_path / "s", durability="process") as other,
    ):
        log = store.stream("s")._log(0)
        kind, current = type(log.segments), type(log.segments).current
        before, removed = current(log.segments), []

        def in_between(self):
            if self is not log.segments or removed:
                return current(self)
            removed.append(other.stream("s").delete_before(Position(0, 1, 3)))
            self.forget()
            self._bases.clear()
            return before

        monkeypatch.setattr(kind, "current", in_between)
        found = LOOKS[look](log)
        assert removed
        if look == "sealed":  # next time
            assert found == []
        elif look != "read":
            assert found == LOOKS[look](log)
        assert LOOKS["read"](log)[-1] == b"5"
