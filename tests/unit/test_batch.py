"""Batches: views without a copy, lazy columns, slices, and how long they live."""

import gc
import pickle

import numpy as np
import pytest

import millstream
from millstream import InvalidArgument, InvalidType, Position

LARGE = [b"%05d" % i for i in range(2000)]


def only(stream, **options):
    [batch] = stream.read(**options)
    return batch


def address(array):
    return array.__array_interface__["data"][0]


@pytest.fixture
def large(stream):
    stream.append_many(LARGE, keys=[b"k%d" % (i % 7) for i in range(2000)],
                       timestamps=list(range(2000)))  # fmt: skip
    return only(stream)


@pytest.fixture
def gathered(store):
    """Six stored batches that become one, with every mix of columns."""
    stream = store.stream("gathered")
    stream.append(b"plain", timestamp=1)
    stream.append(b"keyed", key=b"k", timestamp=2)
    stream.append(None, key=b"t", timestamp=3)
    stream.append(b"headed", headers={"h": b"1", "g": b""}, timestamp=4)
    stream.append_many([b"a", None, b""], keys=[None, b"x", b""], timestamps=[5, 3, 7])
    stream.append_many([b"z", b"y"], headers=[None, {"n": b"2"}], timestamps=8)
    return only(stream)


def test_large_batch_is_a_view_of_the_map(stream, large):
    again = only(stream)
    for mine, theirs in (
        (large.values.data, again.values.data),
        (large.values.offsets, again.values.offsets),
        (large.keys.data, again.keys.data),
        (large.timestamps, again.timestamps),
        (large.values_as("S5"), again.values_as("S5")),
    ):
        assert address(mine) == address(theirs), "the same memory, not a copy"
        assert not mine.flags.owndata
    assert address(large.values_as("S5")) == address(large.values.data)
    # A slice is a view of the same bytes, further on.
    cut = large[100:200]
    assert address(cut.values_as("S5")) == address(large.values.data) + 500
    assert address(cut.timestamps) == address(large.timestamps) + 800
    # It lies in the segment's file, as this process has it mapped.
    with open("/proc/self/maps") as maps:
        at = address(large.values.data)
        [line] = [
            line
            for line in maps
            if int(line.split("-")[0], 16) <= at < int(line.split("-")[1].split()[0], 16)
        ]
    assert line.rstrip().endswith("0000000000000001.seg")


def test_nothing_of_a_batch_can_be_written(large, gathered):
    for batch in (large, gathered):
        arrays = [
            batch.offsets,
            batch.timestamps,
            batch.values.data,
            batch.values.offsets,
            batch.keys.data,
            batch.keys.offsets,
        ]
        for array in arrays:
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            if not array.flags.owndata:
                with pytest.raises(ValueError, match="WRITEABLE"):
                    array.flags.writeable = True
        assert batch.values.view(0).readonly
        with pytest.raises(TypeError):
            batch.values[0] = b"x"
        with pytest.raises(AttributeError):
            batch.partition = 1
    assert not large.values_as("S5").flags.writeable


def test_columns_of_a_gathered_batch(gathered):
    assert len(gathered) == 9
    assert gathered.offsets.tolist() == list(range(9))
    assert gathered.timestamps.tolist() == [1, 2, 3, 4, 5, 3, 7, 8, 8]
    assert gathered.timestamps.dtype == np.int64
    assert gathered.values == [b"plain", b"keyed", None, b"headed", b"a", None, b"", b"z", b"y"]
    assert gathered.keys == [None, b"k", b"t", None, None, b"x", b"", None, None]
    assert gathered.headers == [{}] * 3 + [{"h": b"1", "g": b""}] + [{}] * 4 + [{"n": b"2"}]
    assert (gathered.values.null_count, gathered.keys.null_count) == (2, 5)
    assert gathered.nbytes == sum(len(v or b"") for v in [*gathered.values, *gathered.keys])


def test_every_cut_of_a_gathered_batch(store, gathered):
    stream = store.stream("gathered")
    whole = list(zip(gathered.keys, gathered.values, gathered.headers,
                     gathered.timestamps.tolist(), strict=True))  # fmt: skip
    for start in range(9):
        for stop in range(start + 1, 10):
            cuts = [
                gathered[start:stop],
                *stream.read(start=start, max_records=stop - start),
            ]
            found = [
                [
                    row
                    for batch in part
                    for row in zip(batch.keys, batch.values, batch.headers,
                                   batch.timestamps.tolist(), strict=True)
                ]
                for part in (cuts[:1], cuts[1:])
            ]  # fmt: skip
            assert found == [whole[start:stop]] * 2
            assert cuts[0].first_offset == start
            assert cuts[0].next_offset == stop
            assert cuts[0].values.null_count == sum(row[1] is None for row in whole[start:stop])


def test_small_batches_are_gathered_and_large_ones_lie_alone(store):
    stream = store.stream("s")
    for i in range(1000):
        stream.append(b"%d" % i)
    stream.append_many(LARGE)
    for i in range(1000):
        stream.append(b"%d" % i)
    found = list(stream.read())
    assert sum(len(batch) for batch in found) == 4000
    assert [len(batch) for batch in found].count(2000) == 1
    assert len(found) < 20


@pytest.mark.parametrize("column", ["values", "keys"])
def test_bytes_column_is_a_sequence(large, column):
    data = getattr(large, column)
    expected = LARGE if column == "values" else [b"k%d" % (i % 7) for i in range(2000)]
    assert len(data) == 2000
    assert list(data) == data.tolist() == expected == data
    assert data == tuple(expected)
    assert data != expected[:-1]
    assert (data[0], data[-1], data[-2000]) == (expected[0], expected[-1], expected[0])
    assert expected[5] in data
    assert b"nowhere" not in data
    assert list(reversed(data))[:3] == expected[:-4:-1]
    for cut in (slice(10, 20), slice(-3, None), slice(None, None, 700), slice(20, 10),
                slice(5, 1, -1)):  # fmt: skip
        assert list(data[cut]) == expected[cut]
    assert list(data[10:20][2:4]) == expected[12:14]
    assert bytes(data.view(-1)) == expected[-1]
    for wrong in (2000, -2001):
        with pytest.raises(IndexError):
            data[wrong]
        with pytest.raises(IndexError):
            data.view(wrong)
    with pytest.raises(TypeError):
        data["0"]
    with pytest.raises(TypeError):
        hash(data)
    offsets, flat = data.offsets, data.data
    assert [bytes(flat[offsets[i] : offsets[i + 1]]) for i in (0, 7, 1999)] == [
        expected[i] for i in (0, 7, 1999)
    ]
    assert "2000" in repr(data)


def test_column_without_a_key_is_all_null(stream):
    stream.append_many(LARGE)
    keys = only(stream).keys
    assert keys[0] is None
    assert keys.null_count == len(keys) == 2000
    assert set(keys) == {None}
    assert keys.view(3) is None
    assert keys.offsets.tolist() == [0] * 2001
    assert keys.data.tolist() == []


def test_headers_column_is_a_sequence(gathered):
    headers = gathered.headers
    assert len(headers) == 9
    assert headers[3] == headers[-6] == {"h": b"1", "g": b""}
    assert headers[2:4] == [{}, {"h": b"1", "g": b""}]
    assert headers != [{}] * 9
    for wrong in (9, -10):
        with pytest.raises(IndexError):
            headers[wrong]


# --- values as an array ---------------------------------------------------------------------------

READING = np.dtype([("sensor", "<u4"), ("celsius", "<f4")])


def test_structured_values_come_back_as_they_went(stream):
    made = np.zeros(5000, READING)
    made["sensor"] = np.arange(5000)
    made["celsius"] = np.linspace(-20, 40, 5000)
    stream.append_many(made)
    batch = only(stream)
    assert (batch.values_as(READING) == made).all()
    assert (batch[10:20].values_as(READING) == made[10:20]).all()
    assert (batch.values_as("<u8") == made.view("<u8")).all()
    assert batch.values_as("V8").shape == (5000,)


@pytest.mark.parametrize("count", [1, 3, 5000])
def test_rows_come_back_as_rows(stream, count):
    made = np.arange(count * 3, dtype="<f8").reshape(count, 3)
    stream.append_many(made)
    assert (only(stream).values_as(("<f8", (3,))) == made).all()


def test_gathered_values_of_one_width_are_an_array(stream):
    for i in range(50):
        stream.append(np.uint32(i))
    stream.append_many(np.arange(50, 60, dtype="<u4"))
    found = np.concatenate([batch.values_as("<u4") for batch in stream.read()])
    assert found.tolist() == list(range(60))


@pytest.mark.parametrize(
    "made", [[b"abcd", None], [b"abcd", b"abc"], [b""], [b"abc", b"abcde"], [None]]
)
def test_values_that_are_not_of_one_width_are_no_array(stream, made):
    stream.append_many(made)
    with pytest.raises(InvalidArgument, match="4 bytes"):
        only(stream).values_as("<u4")


def test_dtypes_that_cannot_be_viewed_are_refused(stream):
    stream.append_many([bytes(8)] * 3)
    batch = only(stream)
    for wrong in ("<u4", "V0", "O", [("a", "O")], "S"):
        with pytest.raises(InvalidArgument):
            batch.values_as(wrong)
    for wrong in ("garbage", 5, object()):
        with pytest.raises(InvalidType):
            batch.values_as(wrong)


# --- slices and life ------------------------------------------------------------------------------


def test_slices_are_batches(large):
    cut = large[500:1500][100:-100]
    assert len(cut) == 800
    assert (cut.first_offset, cut.next_offset) == (600, 1400)
    assert (cut.partition, cut.epoch) == (large.partition, large.epoch)
    assert list(cut.values) == LARGE[600:1400]
    assert len(large[:]) == 2000
    assert len(large[-5:]) == 5
    for wrong in (slice(5, 5), slice(2000, None), slice(5, 1), slice(0, 10, 2), slice(9, 1, -1)):
        with pytest.raises(InvalidArgument):
            large[wrong]
    with pytest.raises(TypeError):
        large[0]
    with pytest.raises(TypeError):
        pickle.dumps(large)


def test_batches_outlive_close_and_retention_and_drop(tmp_path):
    with millstream.open(tmp_path / "s") as store:
        stream = store.stream("s", segment_bytes=1 << 16)
        for _ in range(50):
            stream.append_many(LARGE)
        stream.append(b"small")
        other = store.stream("gone")
        other.append_many(LARGE)
        dropped = only(other)
        store.drop_stream("gone")
        found = list(stream.read())
        views = [batch.values.view(7) for batch in found if len(batch) > 1]
        stream.delete_before(Position(0, 1, stream.next_offset(0)))
        assert stream.first_offset(0) > 0
    iterator = iter(found[0].values)
    kept = found[0].values_as("S5")
    found = [*found, dropped]
    for batch in found[:-2] + found[-1:]:
        assert list(batch.values) == LARGE
    assert list(found[-2].values) == [b"small"]
    del found, batch, stream, store, dropped
    gc.collect()
    assert [bytes(view) for view in views] == [LARGE[7]] * 50
    assert next(iterator) == LARGE[0]
    assert kept[-1] == LARGE[-1]


def test_maps_go_with_the_last_view(tmp_path):
    def mapped():
        with open("/proc/self/maps") as maps:
            return sum(str(tmp_path) in line and ".seg" in line for line in maps)

    with millstream.open(tmp_path / "s") as store:
        store.stream("s").append_many(LARGE)
        batch = only(store.stream("s"))
        view = batch[3:].values.view(0)
    del store, batch
    gc.collect()
    assert mapped() == 1
    assert bytes(view) == LARGE[3]
    del view
    gc.collect()
    assert mapped() == 0


def test_a_batch_that_nobody_filled_is_empty():
    """What `__new__` alone makes, as copying and unpickling by hand do."""
    batch = millstream.Batch.__new__(millstream.Batch)
    assert len(batch) == batch.nbytes == batch.first_offset == batch.next_offset == 0
    assert list(batch.values) == list(batch.keys) == list(batch.headers) == []
    assert len(batch.offsets) == len(batch.timestamps) == 0
    with pytest.raises(millstream.InvalidArgument):
        batch.values_as("<u2")
    with pytest.raises(millstream.InvalidArgument):
        batch[:1]
