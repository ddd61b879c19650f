"""What can be appended, how it is chosen where, and what is refused without storing anything."""

import array
import math
import mmap
import sys
import threading
import time
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from timing import until

import millstream
from millstream import InvalidArgument, InvalidType, LimitExceeded, NotFound

MIB = 1 << 20


def rows(stream, **options):
    return [
        row
        for batch in stream.read(**options)
        for row in zip(batch.keys, batch.values, batch.headers, batch.timestamps, strict=True)
    ]


def values(stream, **options):
    return [value for batch in stream.read(**options) for value in batch.values]


def keys(stream, **options):
    return [key for batch in stream.read(**options) for key in batch.keys]


BYTES_LIKE = {
    "bytes": b"abcd",
    "bytearray": bytearray(b"abcd"),
    "memoryview": memoryview(b"xabcdx")[1:5],
    "memoryview of ints": memoryview(array.array("i", [0x64636261])),
    "numpy": np.frombuffer(b"abcd", np.uint8),
    "numpy scalar": np.uint32(0x64636261),
    "numpy bytes": np.bytes_(b"abcd"),
    "mmap": None,
    "subclass": type("B", (bytes,), {})(b"abcd"),
}


@pytest.mark.parametrize("kind", BYTES_LIKE)
def test_value_key_and_header_may_be_any_bytes(stream, kind):
    data = BYTES_LIKE[kind]
    if kind == "mmap":
        data = mmap.mmap(-1, 4)
        data[:] = b"abcd"
    stream.append(data, key=data, headers={"h": data}, timestamp=5)
    stream.append_many([data, b"x"], keys=[data, None], headers=[None, {"h": data}], timestamps=5)
    h = {"h": b"abcd"}
    assert rows(stream) == [
        (b"abcd", b"abcd", h, 5),
        (b"abcd", b"abcd", {}, 5),
        (None, b"x", h, 5),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        "text",
        5,
        1.5,
        [b"a"],
        object(),
        memoryview(b"abcdef")[::2],
        np.arange(6, dtype=np.uint8)[::2],
    ],
)
def test_what_is_not_bytes_is_refused_and_nothing_stored(stream, wrong):
    for call in (
        lambda: stream.append(wrong),
        lambda: stream.append(b"v", key=wrong),
        lambda: stream.append(b"v", headers={"h": wrong}),
        lambda: stream.append_many([b"v", wrong]),
        lambda: stream.append_many([b"v"] * 2, keys=[b"k", wrong]),
        lambda: stream.append_many([b"v"] * 2, headers=[None, {"h": wrong}]),
        lambda: stream.append_many([b"v"] * 2, headers={"h": wrong}),
    ):
        with pytest.raises(InvalidType) as caught:
            call()
        assert isinstance(caught.value, TypeError)
    assert stream.next_offset(0) == 0


def test_error_names_the_element(stream):
    with pytest.raises(InvalidType, match="value of element 2.*str"):
        stream.append_many([b"a", b"b", "c"])
    with pytest.raises(InvalidType, match="value of element 1.*int"):
        stream.append_many(x for x in (b"a", 1))
    with pytest.raises(InvalidType, match="'h' of element 1.*int"):
        stream.append_many([b"a", b"b"], headers=[{}, {"g": b"1", "h": 1}])


@pytest.mark.parametrize(
    "wrong", [[("h", b"v")], "h", 5, {"h": None}, {b"h": b"v"}, {1: b"v"}, {"\ud800": b"v"}]
)
def test_headers_must_be_a_mapping_of_str_to_bytes(stream, wrong):
    with pytest.raises((InvalidType, InvalidArgument)):
        stream.append(b"v", headers=wrong)
    with pytest.raises((InvalidType, InvalidArgument)):
        stream.append_many([b"v"], headers=[wrong])
    assert stream.next_offset(0) == 0


def test_headers_of_many_are_shared_or_one_a_record(stream):
    stream.append_many([b"0", b"1"], headers={"a": b"1", "b": b""})
    stream.append_many([b"2", b"3", b"4"], headers=[{"ü": b"x"}, None, {}])
    stream.append_many([b"5"], headers=iter([{"late": b"x"}]))
    found = [headers for batch in stream.read() for headers in batch.headers]
    both = {"a": b"1", "b": b""}
    assert found == [both, both, {"ü": b"x"}, {}, {}, {"late": b"x"}]
    with pytest.raises(InvalidArgument, match="1 headers for 2 values"):
        stream.append_many([b"", b""], headers=[{}])
    with pytest.raises(InvalidType):
        stream.append_many([b"", b""], headers=5)


LOCAL = datetime(2013, 1, 1, 10, 17)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (0, 0),
        (-1, -1),
        (1 << 62, 1 << 62),
        (np.int64(7), 7),
        (datetime(1970, 1, 1, 0, 0, 1, 5, tzinfo=UTC), 1_000_005),
        (datetime(1969, 12, 31, 23, tzinfo=UTC), -3_600_000_000),
        (datetime(1970, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), 0),
        (LOCAL, round(LOCAL.timestamp() * 1e6)),
        (np.datetime64("1970-01-01T00:00:02"), 2_000_000),
        (np.datetime64(3_999, "ns"), 3),
        (np.datetime64("1970-01-02"), 86_400_000_000),
    ],
)
def test_timestamps_of_every_kind(stream, given, stored):
    stream.append(b"fast", timestamp=given)
    stream.append(bytearray(b"slow"), timestamp=given)
    stream.append_many([b"many"], timestamps=given)
    stream.append_many([b"many"], timestamps=[given])
    assert [row[3] for row in rows(stream)] == [stored] * 4


def test_timestamp_defaults_to_now(stream):
    before = time.time_ns() // 1000
    stream.append(b"")
    stream.append_many([b"", b""])
    after = time.time_ns() // 1000
    found = [row[3] for row in rows(stream)]
    assert all(before <= stamp <= after for stamp in found)
    assert found[1] == found[2]


@pytest.mark.parametrize(
    "column",
    [
        [3, 1, 2],
        (3, 1, 2),
        iter([3, 1, 2]),
        np.array([3, 1, 2]),
        np.array([3, 1, 2], np.int32),
        np.array([3, 1, 2], np.uint64),
        np.array([3, 1, 2], ">i8"),
        np.array([3, 9, 1, 9, 2, 9])[::2],
        np.array([3, 1, 2], "M8[us]"),
        np.array([3000, 1999, 2001], "M8[ns]"),
        [np.datetime64(3, "us"), datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC), 2],
        array.array("q", [3, 1, 2]),
        memoryview(array.array("q", [3, 1, 2])),
        memoryview(array.array("i", [3, 1, 2])),
    ],
)
def test_one_timestamp_a_record(stream, column):
    stream.append_many([b"a", b"b", b"c"], timestamps=column)
    assert [row[3] for row in rows(stream)] == [3, 1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        "2013-01-01",
        1.5,
        True,
        float("nan"),
        1 << 63,
        -(1 << 63),
        (1 << 62) + 1,
        np.datetime64("NaT", "us"),
        *(np.datetime64(1 << 62, unit) for unit in ("Y", "M", "W", "D", "h", "m", "s", "ms")),
        np.datetime64(-(1 << 62), "s"),
        np.ma.masked,
        np.ma.masked_array(np.datetime64(1, "s"), mask=True),
        np.float64(3),
        np.timedelta64(3, "us"),
        object(),
        datetime(1, 1, 1).date(),
        [1.5],
        [None],
    ],
)
def test_timestamps_that_are_none_are_refused(stream, wrong):
    for call in (
        lambda: stream.append(b"v", timestamp=wrong),
        lambda: stream.append(bytearray(b"v"), timestamp=wrong),
        lambda: stream.append_many([b"v"], timestamps=wrong),
        lambda: stream.append_many([b"v"], timestamps=[wrong]),
    ):
        with pytest.raises((InvalidType, InvalidArgument)):
            call()
    assert stream.next_offset(0) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        [1, 2],
        np.array([1, 2]),
        np.array([[1], [2], [3]]),
        np.array([1, 2, 1 << 63], np.uint64),
        np.array([1, 2, (1 << 64) - 1], np.uint64),
        np.array([1, 2, 1 << 62]) + 1,
        np.array([1.0, 2.0, 3.0]),
        np.array(["NaT"] * 3, "M8[us]"),
        np.array([1, 1 << 62, 2]).view("M8[s]"),
        np.array([1, 1 << 62, 2]).view("M8[25s]"),
        np.ma.masked_array(np.array([1, 2, 3], "M8[s]"), mask=[0, 1, 0]),
        np.ma.masked_array([1, 2, 3], mask=[0, 0, 1]),
        np.ma.masked_array([1, 2, 3], mask=[1, 0, 0]).astype(object),
        5.5,
    ],
)
def test_timestamp_columns_that_do_not_fit_are_refused(stream, wrong):
    with pytest.raises((InvalidType, InvalidArgument)):
        stream.append_many([b"a", b"b", b"c"], timestamps=wrong)
    assert stream.next_offset(0) == 0


# --- columns --------------------------------------------------------------------------------------


def test_lists_tuples_generators_and_views_are_sequences(stream):
    for made in ([b"a", None], (b"a", None), iter([b"a", None]), (x for x in (b"a", None))):
        stream.append_many(made)
    stream.append_many({b"a": 1, b"b": 2})
    assert values(stream) == [b"a", None] * 4 + [b"a", b"b"]


STRUCT = np.dtype([("a", "<u2"), ("b", "S3")])


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (np.array([1, 2], "<u2"), [b"\1\0", b"\2\0"]),
        (np.array([1, 2], ">u2"), [b"\0\1", b"\0\2"]),
        (np.array([(1, b"x"), (2, b"yyy")], STRUCT), [b"\1\0x\0\0", b"\2\0yyy"]),
        (np.array([[1, 2], [3, 4]], "u1"), [b"\1\2", b"\3\4"]),
        (np.arange(8, dtype="u1").reshape(2, 2, 2), [bytes(range(4)), bytes(range(4, 8))]),
        (np.array([b"ab", b"c"]), [b"ab", b"c\0"]),
        (np.array([1, 2, 3, 4], "u1")[::2], [b"\1", b"\3"]),
        (np.array([1, 2, 3, 4], "u1")[::-1], [b"\4", b"\3", b"\2", b"\1"]),
        (np.arange(12, dtype="u1").reshape(3, 4)[:, :2], [b"\0\1", b"\4\5", b"\10\11"]),
        (np.array([0, 1], "M8[us]"), [bytes(8), b"\1" + bytes(7)]),
        (np.array([True, False]), [b"\1", b"\0"]),
        (np.array([b"a", None], object), [b"a", None]),
        (np.array([], "u4"), []),
        (np.zeros((2, 0), "u1"), [b"", b""]),
    ],
)
def test_numpy_elements_or_rows_are_values(stream, column, expected):
    stream.append_many(column)
    assert values(stream) == expected


def test_numpy_string_keys_lose_their_padding(store):
    stream = store.stream("p", partitions=4)
    stream.append_many(np.arange(3), keys=np.array([b"a", b"bbb", b""]))
    for key in (b"a", b"bbb", b""):
        assert key in keys(stream, partition=stream.partition_for(key))
    stream.append_many([b"v"], keys=np.array([7], "<u4"), partition=0)
    assert keys(stream, partition=0)[-1] == b"\7\0\0\0"


@pytest.mark.parametrize(
    "wrong",
    [
        np.array("x"),
        np.array(5),
        np.array(["text"]),
        np.asfortranarray(np.ones((3, 2), "u1")),
        np.ones((2, 4), "u1")[:, ::2],
        np.array([(1, b"x")], [("a", "i4"), ("o", "O")]),
        np.ma.array([1, 2], mask=[False, True]),
        b"abc",
        bytearray(b"abc"),
        memoryview(b"abc"),
        "abc",
        5,
        None,
    ],
)
def test_columns_that_have_no_elements_of_bytes_are_refused(stream, wrong):
    with pytest.raises(InvalidType):
        stream.append_many(wrong)
    if wrong is not None:
        with pytest.raises(InvalidType):
            stream.append_many([b"v"], keys=wrong)
    assert stream.next_offset(0) == 0


def test_numpy_strings_of_varying_length_are_refused(stream):
    with pytest.raises(InvalidType, match="encode"):
        stream.append_many(np.array(["a"], np.dtypes.StringDType()))


def test_arrow_columns_of_every_kind(stream):
    pa = pytest.importorskip("pyarrow")
    stream.append_many(
        pa.array([b"a", None, b"c"]),
        keys=pa.chunked_array([["k"], [None, "l"]]),
        timestamps=pa.array([1, 2, 3], pa.timestamp("us")),
    )
    stream.append_many(pa.array([1, 2], pa.int16()), timestamps=9)
    assert [(k, v, t) for k, v, _, t in rows(stream)] == [
        (b"k", b"a", 1),
        (None, None, 2),
        (b"l", b"c", 3),
        (None, b"\1\0", 9),
        (None, b"\2\0", 9),
    ]


def test_mismatched_lengths_append_nothing(stream):
    for wrong in (
        {"keys": [b"k"]},
        {"keys": np.array([b"k"] * 3)},
        {"timestamps": [1]},
        {"timestamps": []},
        {"headers": []},
    ):
        with pytest.raises(InvalidArgument):
            stream.append_many([b"a", b"b"], **wrong)
    assert stream.next_offset(0) == 0


def test_empty_appends_nothing(stream):
    assert stream.append_many([]) == []
    assert stream.append_many(np.empty(0, "u4"), keys=[], headers=[], timestamps=[]) == []
    assert stream.append_many(iter(())) == []
    assert stream.next_offset(0) == 0


def test_list_that_changes_while_an_append_waits_is_stored_as_it_was(store):
    """The column pointed into elements of the caller's list, which another thread could clear."""
    stream = store.stream("s", partitions=2)
    made = [bytes([65 + i]) * 100 for i in range(20)]

    class Trap:
        """Clears the list when its headers are looked at, after the values were."""

        def items(self):
            made.clear()
            for _ in range(1000):
                bytes(100)
            return [("h", b"1")]

    stream.append_many(made, headers=[Trap(), *[None] * 19], partition=0)
    assert values(stream) == [bytes([65 + i]) * 100 for i in range(20)]


# --- partitions -----------------------------------------------------------------------------------


def test_partition_is_chosen_by_hand_or_key_or_turn(store):
    stream = store.stream("p", partitions=4)
    assert stream.append(b"", key=b"k", partition=3).partition == 3
    assert stream.append(b"", partition=np.int64(2)).partition == 2
    assert {stream.append(b"").partition for _ in range(4)} == {0, 1, 2, 3}
    assert stream.append(bytearray(b""), key=b"k").partition == stream.partition_for(b"k")
    [span] = stream.append_many([b"a"] * 100, keys=[b"%d" % i for i in range(100)], partition=1)
    assert (span.partition, span.count) == (1, 100)


def test_records_without_key_of_one_call_go_together_to_the_next_in_turn(store):
    stream = store.stream("p", partitions=4)
    for _ in range(5):
        before = [stream.next_offset(p) for p in range(4)]
        by_key = stream.partition_for(b"k")
        spans = stream.append_many([b"1", b"2", b"3"], keys=[None, b"k", None])
        grown = [stream.next_offset(p) - before[p] for p in range(4)]
        assert sum(grown) == 3
        assert grown[by_key] in (1, 3)
        assert sum(1 for count in grown if count) == len(spans) <= 2


@pytest.mark.parametrize("wrong", [-1, 4, 1 << 40, -(1 << 70)])
def test_unknown_partition_is_not_found(store, wrong):
    stream = store.stream("p", partitions=4)
    for call in (
        lambda: stream.append(b"v", partition=wrong),
        lambda: stream.append(b"v", key=b"k", partition=wrong),
        lambda: stream.append_many([b"v"], partition=wrong),
        lambda: next(stream.read(partition=wrong)),
        lambda: stream.next_offset(wrong),
        lambda: stream.first_offset(wrong),
        lambda: stream.durable_offset(wrong),
        lambda: stream.offset_at(0, wrong),
    ):
        with pytest.raises(NotFound, match="partitions 0 to 3"):
            call()
    assert stream.stats().records == 0


@pytest.mark.parametrize("wrong", ["0", 1.0, b"0", [0]])
def test_partition_of_a_wrong_type_is_refused(store, wrong):
    stream = store.stream("p", partitions=4)
    with pytest.raises(InvalidType):
        stream.append(b"v", partition=wrong)
    with pytest.raises(InvalidType):
        stream.next_offset(wrong)
    with pytest.raises(InvalidType):
        stream.read(partition=wrong)


@pytest.mark.parametrize("wrong", ["k", 5, None, [b"k"]])
def test_partition_for_takes_bytes(stream, wrong):
    with pytest.raises(InvalidType):
        stream.partition_for(wrong)


# --- limits ---------------------------------------------------------------------------------------


def zeros(size):
    """So many zeros that take no memory."""
    return mmap.mmap(-1, size)


def test_limits_are_kept_and_named(stream):
    for call, limit in (
        (lambda: stream.append(zeros(256 * MIB + 1)), 256 * MIB),
        (lambda: stream.append(b"", key=bytes(65537)), 65536),
        (lambda: stream.append_many([b"v"] * 2, keys=[b"", bytes(65537)]), 65536),
        (lambda: stream.append(b"", headers={str(i): b"" for i in range(1025)}), 1024),
        (lambda: stream.append(b"", headers={"x" * 256: b""}), 255),
        (lambda: stream.append(b"", headers={"ü" * 128: b""}), 255),
        (lambda: stream.append(b"", headers={"x": bytes(MIB + 1)}), MIB),
        (lambda: stream.append_many([zeros(200 * MIB)] * 6), 1 << 30),
    ):
        with pytest.raises(LimitExceeded, match=rf"\b{limit}\b"):
            call()
    assert stream.next_offset(0) == 0


def test_the_largest_of_each_is_stored(store):
    stream = store.stream("s", segment_bytes=1 << 16)
    stream.append(b"", key=bytes(65536), headers={"x" * 255: bytes(MIB)})
    stream.append(b"", headers={str(i): b"%d" % i for i in range(1024)})
    big = bytes(range(256)) * (MIB // 8)
    stream.append(big)
    [first, second, third] = rows(stream)
    assert first[0] == bytes(65536)
    assert first[2] == {"x" * 255: bytes(MIB)}
    assert second[2] == {str(i): b"%d" % i for i in range(1024)}
    assert third[1] == big


def test_bad_element_of_another_partition_appends_nothing(store):
    stream = store.stream("p", partitions=8)
    names = [b"%d" % i for i in range(64)]
    with pytest.raises(LimitExceeded):
        stream.append_many([b"v"] * 63 + [zeros(256 * MIB + 1)], keys=names)
    assert stream.stats().records == 0


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (math.nan, InvalidArgument),
        (-1, InvalidArgument),
        ("1", InvalidType),
        (True, InvalidType),
        ([], InvalidType),
    ],
)
def test_time_out_that_is_none_is_refused(stream, wrong, error):
    position = stream.append(b"first")
    for call in (
        lambda: stream.append(b"v", timeout=wrong),
        lambda: stream.append(bytearray(b"v"), timeout=wrong),
        lambda: stream.append_many([b"v"], timeout=wrong),
        lambda: stream.flush(timeout=wrong),
        lambda: stream.wait_durable(position, timeout=wrong),
        lambda: stream.read(follow=True, timeout=wrong),
        lambda: stream.aread(follow=True, timeout=wrong),
        lambda: stream.store.flush(timeout=wrong),
        lambda: millstream.open(stream.store.path, timeout=wrong),
    ):
        with pytest.raises(error):
            call()
    assert stream.next_offset(0) == 1


def test_time_out_may_be_infinite_or_zero(stream):
    assert stream.append(b"v", timeout=math.inf, durability="sync").offset == 0
    assert stream.append(b"v", timeout=0).offset == 1
    stream.flush(timeout=math.inf)


@pytest.mark.parametrize("wrong", ["fast", "", 1, ["sync"], b"sync"])
def test_level_that_is_none_is_refused(stream, wrong):
    for call in (
        lambda: stream.append(b"v", durability=wrong),
        lambda: stream.append_many([b"v"], durability=wrong),
        lambda: stream.store.stream("t", durability=wrong),
        lambda: stream.alter(durability=wrong),
        lambda: millstream.temporary(durability=wrong),
    ):
        with pytest.raises(InvalidArgument):
            call()
    assert stream.store.streams() == ["s"]
    assert stream.next_offset(0) == 0


@pytest.mark.parametrize("level", ["process", "interval", "sync"])
def test_each_level_for_one_call(store, level):
    stream = store.stream("p", partitions=4)
    position = stream.append(b"v", durability=level)
    spans = stream.append_many([b"v"] * 50, keys=[b"%d" % i for i in range(50)], durability=level)
    assert stream.stats().records == 51
    if level == "sync":
        assert stream.durable_offset(position.partition) > position.offset
        for span in spans:
            assert stream.durable_offset(span.partition) >= span.first_offset + span.count


def test_interval_for_one_call_is_synced_soon(stream):
    position = stream.append(b"v", durability="interval")
    until(lambda: stream.durable_offset(0) > position.offset)


def test_threads_append_at_once(store):
    stream = store.stream("p", partitions=3, segment_bytes=1 << 16)
    sys.setswitchinterval(1e-5)
    try:

        def work(number):
            for i in range(300):
                stream.append(b"%d:%d" % (number, i), key=b"%d" % number)
                stream.append_many([b"-"] * 3)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(0.005)
    assert stream.stats().records == 6 * 300 * 4
    for number in range(6):
        mine = [v for v in values(stream) if v.startswith(b"%d:" % number)]
        assert mine == [b"%d:%d" % (number, i) for i in range(300)]


def test_what_a_time_and_a_mask_cannot_change_is_stored_as_it_was_given(stream):
    unmasked = np.ma.masked_array(np.array([3, 4], "M8[25s]"), mask=False)
    stream.append_many([b"c", b"d"], timestamps=unmasked)
    stream.append(b"e", timestamp=np.datetime64("146000", "Y"))  # about as far as they reach
    found = [int(row[3]) for row in rows(stream)]
    assert found == [75_000_000, 100_000_000, 4_545_147_772_800_000_000]


def test_a_masked_array_is_no_value(stream, store):
    masked = np.ma.masked_array(np.array([1, 2], "u1"), mask=[0, 1])
    for call in (
        lambda: stream.append(masked),
        lambda: stream.append(b"v", key=masked),
        lambda: stream.append_many([masked]),
        lambda: stream.append_many([b"v"], keys=[masked]),
        lambda: store.queue("q").put(masked),
    ):
        with pytest.raises(InvalidType, match="mask"):
            call()
    assert stream.next_offset(0) == 0


@pytest.mark.parametrize("one", [5, b"abc", "abc"])
def test_a_transaction_takes_no_single_value_for_many(one):
    with millstream.temporary() as store:
        stream = store.stream("s", create=True)
        with store.transaction() as tx, pytest.raises(InvalidType, match="value: expected .*found"):
            tx.append_many(stream, one)
        assert stream.next_offset(0) == 0
