"""`get`: the record that a reader finds at that offset, or an error that says why."""

import pickle
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from store_builder import flip

import millstream
from millstream import (
    Closed,
    Compaction,
    CorruptBatch,
    InvalidArgument,
    InvalidType,
    LimitExceeded,
    NotFound,
    OffsetOutOfRange,
    Position,
    Record,
    Retention,
)


def fill(stream, seed=1, records=3000):
    """Single records and batches, with and without keys, headers, nulls and times."""
    dice = random.Random(seed)
    at = 0
    while at < records:
        count = dice.choice([1, 1, 1, 7, 100])
        values = [dice.choice([None, b"", b"%d" % i, bytes(dice.randrange(400))])
                  for i in range(at, at + count)]  # fmt: skip
        keys = dice.choice([None, [dice.choice([None, b"k%d" % i]) for i in range(count)]])
        headers = dice.choice([None, {"a": b"1"}, [{"n": b"%d" % i} for i in range(count)]])
        times = dice.choice([None, 5, [dice.randrange(1 << 40) for _ in range(count)]])
        stream.append_many(values, keys=keys, headers=headers, timestamps=times, partition=0)
        at += count


def read_all(stream, **options):
    """What a reader finds, by offset."""
    return {
        int(offset): (value, key, headers, int(time), Position(0, batch.epoch, int(offset)))
        for batch in stream.read(partition=0, **options)
        for offset, value, key, headers, time in zip(
            batch.offsets, batch.values, batch.keys, batch.headers, batch.timestamps, strict=True
        )
    }


@pytest.fixture
def mixed(store):
    stream = store.stream("mixed", segment_bytes=1 << 16, partitions=2)
    fill(stream)
    assert stream.stats().partitions[0].segments > 3
    return stream


def test_it_is_what_a_reader_finds(mixed):
    found = read_all(mixed)
    order = [*found, *found]
    random.Random(7).shuffle(order)
    for offset in order:
        record = mixed.get(0, offset)
        assert tuple(record) == found[offset]
        assert (record.partition, record.offset) == (0, offset)
        assert mixed.get(record.position) == record


def test_many_are_what_a_reader_finds_in_the_order_asked_for(mixed):
    found = read_all(mixed)
    dice = random.Random(3)
    for asked in (
        [5], [2, 1, 0], [7, 7, 7], list(found), list(found)[::-1], np.array([9, 3000 - 1]),
        dice.sample(list(found), 500),
    ):  # fmt: skip
        batch = mixed.get_many(0, asked)
        assert batch.offsets.tolist() == list(asked)
        assert [tuple(record) for record in millstream._native.records_of(batch)] == [
            (*found[int(offset)][:4], Position(0, batch.epoch, int(offset))) for offset in asked
        ]


def test_it_finds_what_comes_while_it_is_used(store):
    """Also where the segment that it knew last is appended to, and rolled away from."""
    stream = store.stream("s", segment_bytes=1 << 16)
    for offset in range(400):
        with pytest.raises(OffsetOutOfRange) as raised:
            stream.get(0, offset)
        assert (raised.value.first, raised.value.next) == (0, offset)
        stream.append(b"%d" % offset * 100)
        assert stream.get(0, offset).value == b"%d" % offset * 100
        assert stream.get(0, offset // 2).value == b"%d" % (offset // 2) * 100
    assert stream.stats().partitions[0].segments > 1


def test_it_finds_what_another_process_appends(store):
    stream = store.stream("s", segment_bytes=1 << 16)
    program = (
        "import sys, millstream\n"
        "with millstream.open(sys.argv[1]) as store:\n"
        "    for i in range(3000): store.stream('s').append(b'%d' % i * 30)\n"
    )
    stream.append(b"0" * 30)
    assert stream.get(0, 0).offset == 0
    subprocess.run([sys.executable, "-c", program, store.path], check=True)
    for offset in range(3001):
        assert stream.get(0, offset).value == b"%d" % max(offset - 1, 0) * 30


def test_a_position_is_of_its_epoch(tmp_path):
    positions = []
    for turn in range(3):
        with millstream.open(tmp_path / "s") as store:
            positions.append(store.stream("s").append(b"%d" % turn))
            for number, position in enumerate(positions):
                assert store.stream("s").get(position).value == b"%d" % number
                assert store.stream("s").get(position).epoch == position.epoch
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s")
        for other in (0, 2, 99, 1 << 62):
            for _ in range(2):
                with pytest.raises(OffsetOutOfRange, match="epoch"):
                    stream.get(Position(0, other, 0))
        batch = stream.get_many(0, [2, 0, 1])
        assert list(batch.values) == [b"2", b"0", b"1"]
        assert batch.epoch == positions[1].epoch  # of its last


def test_what_retention_removed_is_out_of_range_and_the_rest_stays(mixed):
    found = read_all(mixed)
    kept = mixed.get(0, 0)
    for offset in found:
        mixed.get(0, offset)
    first = mixed.delete_before(mixed.get(0, 1500).position)
    assert 0 < first <= 1500
    for offset, content in found.items():
        if offset < first:
            with pytest.raises(OffsetOutOfRange) as raised:
                mixed.get(0, offset)
            assert raised.value.first == first
        else:
            assert tuple(mixed.get(0, offset)) == content
    assert tuple(kept) == found[0]  # it holds its map
    mixed.alter(retention=Retention(records=1))
    mixed.enforce_retention()
    with pytest.raises(OffsetOutOfRange):
        mixed.get_many(0, [first])


def test_what_compaction_removed_is_not_found(store):
    stream = store.stream("s", segment_bytes=1 << 16, compact=Compaction())
    for turn in range(40):
        stream.append_many([b"%d" % turn * 500] * 10, keys=[b"k%d" % i for i in range(10)])
    before = read_all(stream)
    for offset in before:
        assert tuple(stream.get(0, offset)) == before[offset]
    assert stream.compact().records_removed > 100
    after = read_all(stream)
    count = Counter()
    for offset, content in before.items():
        if offset in after:
            assert tuple(stream.get(0, offset)) == content
        else:
            with pytest.raises(NotFound, match="compaction"):
                stream.get(0, offset)
        count[offset in after] += 1
    assert min(count.values()) > 20
    kept = list(after)
    assert stream.get_many(0, kept).offsets.tolist() == kept


def test_it_goes_on_where_maps_are_given_up(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        fill(stream, records=6000)
        found = read_all(stream)
        stream._cache.most = 2
        for offset in random.Random(5).choices(list(found), k=2000):
            assert tuple(stream.get(0, offset)) == found[offset]


@pytest.mark.parametrize("beside", [True, False])
def test_readers_get_too(tmp_path, beside):
    with millstream.open(tmp_path / "s") as store:
        fill(store.stream("s", segment_bytes=1 << 16))
        found = read_all(store.stream("s"))
        if beside:
            with millstream.open(tmp_path / "s", mode="r") as reader:
                for offset in found:
                    assert tuple(reader.stream("s").get(0, offset)) == found[offset]
                store.stream("s").append(b"last")
                assert reader.stream("s").get(0, len(found)).value == b"last"
    with millstream.open(tmp_path / "s", mode="r") as reader:
        for offset in found:
            assert tuple(reader.stream("s").get(0, offset)) == found[offset]


def test_a_damaged_batch_is_said_at_each_get(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s")
        for i in range(100):
            stream.append(b"%03d" % i * 20)
        path = stream._log(0).segments.file(1)
    content = path.encode() if isinstance(path, str) else path
    with open(content, "rb") as file:
        at = file.read().index(b"050" * 20)
    flip(path, at)
    with millstream.open(tmp_path / "s", mode="r") as store:
        stream = store.stream("s")
        for _ in range(2):
            with pytest.raises(CorruptBatch):
                stream.get(0, 50)
            with pytest.raises(CorruptBatch):
                stream.get_many(0, [50])


def test_a_record_outlives_its_store(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        position = store.stream("s").append(b"v", key=b"k", headers={"h": b"1"}, timestamp=7)
        stream, record = store.stream("s"), store.stream("s").get(position)
    assert tuple(record) == (b"v", b"k", {"h": b"1"}, 7, position)
    with pytest.raises(Closed):
        stream.get(position)
    with pytest.raises(Closed):
        stream.get_many(0, [0])


def test_a_dropped_stream_has_no_records(store):
    position = store.stream("s").append(b"v")
    other = store.stream("s")
    store.drop_stream("s")
    with pytest.raises(Closed):
        other.get(position)


def test_a_record_is_a_value(store):
    position = store.stream("s").append(b"v", key=b"k", headers={"h": b"1"}, timestamp=7)
    record = store.stream("s").get(position)
    made = Record(b"v", b"k", {"h": b"1"}, 7, position)
    value, key, headers, timestamp, where = record
    assert (value, key, headers, timestamp, where) == made == record == tuple(made)
    assert hash(record) == hash(made)
    assert record != Record(b"v", None, {}, 7, position)
    assert len(record) == 5
    assert record[0] == b"v"
    assert (made.partition, made.epoch, made.offset) == tuple(position)
    assert repr(record) == repr(made)
    for one in (record, made):
        assert pickle.loads(pickle.dumps(one)) == record
        with pytest.raises(AttributeError):
            one.value = b"w"
        one.headers["x"] = b""  # a dict of the caller's own
        assert one.headers == {"h": b"1"}


def test_a_record_is_made_by_hand_to_try_a_function_with():
    record = Record(b"v", None, None, 0, None)
    assert tuple(record) == (b"v", None, {}, 0, None)
    assert pickle.loads(pickle.dumps(record)) == record
    assert tuple(Record.__new__(Record)) == (None, None, {}, 0, Position(0, 0, 0))


BAD = [
    ((0, 10), OffsetOutOfRange, "offset 10; there are offsets 0 to 9"),
    ((0, -1), OffsetOutOfRange, "there are offsets 0 to 9"),
    ((0, 1 << 70), OffsetOutOfRange, "there are offsets 0 to 9"),
    ((2, 0), NotFound, "partition 2: the stream has partitions 0 to 1"),
    ((-1, 0), NotFound, "partition -1"),
    ((1 << 70, 0), NotFound, "partition"),
    ((0, "0"), InvalidType, "offset '0': expected an int"),
    ((0, 0.0), InvalidType, "offset 0.0: expected an int"),
    ((0, True), InvalidType, "offset True: expected an int"),
    (("0", 0), InvalidType, "partition '0': expected an int"),
    ((0,), InvalidType, "expected a Position, or a partition and an offset"),
    ((Position(0, 1, 0), 0), InvalidArgument, "says already"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD, ids=lambda value: str(value))
def test_what_is_not_there_is_said(store, arguments, error, text):
    stream = store.stream("s", partitions=2)
    stream.append_many([b"%d" % i for i in range(10)], partition=0)
    for _ in range(2):
        with pytest.raises(error, match=text):
            stream.get(*arguments)
        assert stream.get(0, 9).value == b"9"


BAD_OFFSETS = [
    ([], InvalidArgument, "none"),
    (np.array([], int), InvalidArgument, "none"),
    (5, InvalidType, "expected a list of int"),
    ([1, 10], OffsetOutOfRange, "offset 10"),
    ("ab", InvalidType, "offset 'a'"),
    (np.array([1.0]), InvalidType, "offset 1.0"),
    (np.ma.masked_array([1, 2], [0, 1]), InvalidType, "masked"),
]


@pytest.mark.parametrize(("offsets", "error", "text"), BAD_OFFSETS, ids=lambda value: str(value))
def test_what_are_no_offsets_is_said(store, offsets, error, text):
    stream = store.stream("s")
    stream.append_many([b"%d" % i for i in range(10)])
    with pytest.raises(error, match=text):
        stream.get_many(0, offsets)


def test_more_than_a_batch_may_hold_is_refused(store):
    stream = store.stream("s")
    stream.append(bytes(200 << 20))
    with pytest.raises(LimitExceeded, match="2 GiB"):
        stream.get_many(0, [0] * 11)


def test_what_no_position_can_be_is_named_as_it_was_given(stream):
    stream.append(b"x")
    none_such = 2**64 - 1
    with pytest.raises(millstream.OffsetOutOfRange, match=f"epoch {none_such} was lost"):
        stream.get(millstream.Position(0, none_such, 0))
    with pytest.raises(millstream.OffsetOutOfRange, match="offset -1;"):
        stream.get(0, -1)
    with pytest.raises(millstream.OffsetOutOfRange, match=f"offset {2**70};"):
        stream.get(0, 2**70)
    with pytest.raises(millstream.OffsetOutOfRange, match="offset -3;"):
        stream.get_many(0, [0, -3])
