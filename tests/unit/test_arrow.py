"""Arrow in and out through the public face; pyarrow, polars and DuckDB consume and produce."""

from __future__ import annotations

import datetime
import decimal
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import millstream

pa = pytest.importorskip("pyarrow")

UTC = datetime.UTC
SECOND = 1_000_000
DEFAULT = ["partition", "offset", "timestamp", "key", "value"]
VALUES = [b"", b"one", None, b"thirteen byte", b"v" * 100, b"twelve bytes"] * 3
KEYS = [b"k%d" % (i % 4) if i % 3 else None for i in range(len(VALUES))]
TIMES = [10**15 + i * SECOND for i in range(len(VALUES))]


@pytest.fixture
def stream() -> Iterator[Any]:
    with millstream.temporary() as store:
        yield store.stream("s", partitions=1)


def import_polars() -> Any:
    if os.environ.get("MILLSTREAM_SANITIZE") == "thread":
        pytest.skip("`import polars` alone ends in a fault where ThreadSanitizer is loaded")
    return pytest.importorskip("polars")


def stored(stream: Any) -> list[tuple[bytes | None, bytes | None]]:
    """All records as (key, value)."""
    return [pair for batch in stream.read() for pair in zip(batch.keys, batch.values, strict=True)]


def values_of(stream: Any) -> list[bytes | None]:
    return [value for _, value in stored(stream)]


def only_batch(stream: Any) -> Any:
    [batch] = stream.read()
    return batch


def append_example(stream: Any, **more: Any) -> Any:
    stream.append_many(VALUES, keys=KEYS, timestamps=TIMES, **more)
    return only_batch(stream)


class Stream:
    """Data that can only be asked for a stream, or `Array`: only for an array."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.data.__arrow_c_stream__(requested_schema)


class Array(Stream):
    __arrow_c_stream__ = None  # type: ignore[assignment]

    def __arrow_c_array__(self, requested_schema: object = None) -> object:
        return self.data.__arrow_c_array__(requested_schema)


# out ----------------------------------------------------------------------------------------------


def test_schema_is_the_same_for_every_batch(stream: Any) -> None:
    expected = pa.schema(
        [
            pa.field("partition", pa.int32(), nullable=False),
            pa.field("offset", pa.int64(), nullable=False),
            pa.field("timestamp", pa.timestamp("us", "UTC"), nullable=False),
            pa.field("key", pa.binary()),
            pa.field("value", pa.binary()),
        ]
    )
    for columns in [{}, {"keys": [b"k"]}, {"headers": {"h": b"v"}}, {"timestamps": [5]}]:
        stream.append_many([b"x"], **columns)
        start = stream.next_offset(0) - 1
        [batch] = stream.read(partition=0, start=start)
        assert batch.to_arrow().schema == expected
        assert pa.schema(batch) == expected
        assert pa.RecordBatchReader.from_stream(batch).schema == expected


def test_record_batch_holds_what_was_appended(stream: Any) -> None:
    table = append_example(stream).to_arrow()
    table.validate(full=True)
    assert table["key"].to_pylist() == KEYS
    assert table["value"].to_pylist() == VALUES
    assert table["offset"].to_pylist() == list(range(len(VALUES)))
    assert table["partition"].to_pylist() == [0] * len(VALUES)
    assert table["timestamp"].cast(pa.int64()).to_pylist() == TIMES
    assert table["timestamp"][0].as_py() == datetime.datetime.fromtimestamp(10**9, UTC)


def test_partition_column_names_the_partition() -> None:
    with millstream.temporary() as store:
        stream = store.stream("s", partitions=3)
        for partition in range(3):
            stream.append(b"%d" % partition, partition=partition)
        for batch in stream.read():
            rows = batch.to_arrow().to_pylist()
            assert [row["partition"] for row in rows] == [batch.partition]
            assert rows[0]["value"] == b"%d" % batch.partition


def test_keys_of_a_keyless_batch_are_null(stream: Any) -> None:
    stream.append_many([b"a", None, b"c"])
    column = only_batch(stream).to_arrow()["key"]
    column.validate(full=True)
    assert column.null_count == 3
    assert column.to_pylist() == [None] * 3


def test_headers_are_a_map_on_request(stream: Any) -> None:
    headers = [{}, {"a": b"1"}, {"a": b"", "ä": b"\xff"}]
    stream.append_many([b"x"] * 3, headers=headers)
    batch = only_batch(stream)
    assert batch.to_arrow().schema.names == DEFAULT
    table = batch.to_arrow(columns=["value", "headers"])
    table.validate(full=True)
    assert table.schema.field("headers").type == pa.map_(pa.string(), pa.binary())
    assert table["headers"].to_pylist() == [list(one.items()) for one in headers]
    stream.append(b"none")
    assert [batch.to_arrow(columns=["headers"]).num_rows for batch in stream.read()][-1] >= 1


def test_columns_come_in_schema_order_and_unknown_ones_are_named(stream: Any) -> None:
    batch = append_example(stream)
    assert batch.to_arrow(columns=["value", "offset"]).schema.names == ["offset", "value"]
    with pytest.raises(millstream.InvalidArgument, match="nope"):
        batch.to_arrow(columns=["nope"])
    with pytest.raises(millstream.InvalidArgument, match="at least one"):
        batch.to_arrow(columns=[])


def test_part_of_a_batch_exports_its_records_only(stream: Any) -> None:
    batch = append_example(stream)
    for begin, end in [(0, 1), (1, 2), (7, 18), (9, 13), (17, 18)]:
        part = batch[begin:end].to_arrow(columns=[*DEFAULT, "headers"])
        part.validate(full=True)
        assert part["key"].to_pylist() == KEYS[begin:end]
        assert part["value"].to_pylist() == VALUES[begin:end]
        assert part["offset"].to_pylist() == list(range(begin, end))
        assert part["timestamp"].cast(pa.int64()).to_pylist() == TIMES[begin:end]


def test_values_are_exported_without_a_copy(stream: Any) -> None:
    numpy = pytest.importorskip("numpy")
    stream.append_many([b"v" * 100] * 1000)
    batch = only_batch(stream)
    data = batch.to_arrow()["value"].buffers()[2]
    assert batch.values.data.__array_interface__["data"][0] == data.address
    assert not numpy.frombuffer(data, "u1").flags.writeable


def test_polars_reads_a_batch(stream: Any) -> None:
    polars = import_polars()
    frame = polars.DataFrame(append_example(stream))
    assert frame.columns == DEFAULT
    assert frame["key"].to_list() == KEYS
    assert frame["value"].to_list() == VALUES
    assert frame["timestamp"].dtype == polars.Datetime("us", "UTC")
    assert frame["offset"].to_list() == list(range(len(VALUES)))


def test_duckdb_queries_a_batch(stream: Any) -> None:
    duckdb = pytest.importorskip("duckdb")
    batch = append_example(stream)
    query = 'SELECT key, count(*), count(value), max("offset") FROM {} GROUP BY key ORDER BY key'
    with duckdb.connect() as connection:
        connection.register("records", batch.to_arrow())
        found = connection.sql(query.format("records")).fetchall()
        assert connection.sql(query.format("batch")).fetchall() == found
    assert [row[0] for row in found] == [b"k0", b"k1", b"k2", b"k3", None]
    assert sum(row[1] for row in found) == len(VALUES)
    assert sum(row[2] for row in found) == len(VALUES) - VALUES.count(None)


def test_pandas_reads_a_batch(stream: Any) -> None:
    pytest.importorskip("pandas")
    frame = append_example(stream).to_arrow().to_pandas()
    assert list(frame.columns) == DEFAULT
    assert frame["value"].tolist() == VALUES


def test_batches_of_a_log_make_one_table(stream: Any) -> None:
    for i in range(50):
        stream.append_many([b"%d" % (10 * i + j) for j in range(10)])
        stream.append(b"single")
    table = pa.Table.from_batches([batch.to_arrow() for batch in stream.read()])
    assert table["offset"].to_pylist() == list(range(550))
    assert table["value"].to_pylist().count(b"single") == 50


# lifetime -----------------------------------------------------------------------------------------


def test_export_outlives_batch_stream_and_store(tmp_path: Path) -> None:
    with millstream.open(tmp_path / "store") as store:
        stream = store.stream("s")
        stream.append_many([b"v" * 1000] * 1000, partition=0)
        tables = [batch.to_arrow() for batch in stream.read()]
    del store, stream
    gc.collect()
    assert b"".join(tables[0]["value"].to_pylist()) == b"v" * 10**6
    assert tables[0]["offset"].to_pylist()[-1] == 999


def test_one_column_outlives_its_table(stream: Any) -> None:
    column = append_example(stream).to_arrow()["value"]
    gc.collect()
    assert column.to_pylist() == VALUES


def test_release_in_another_thread(stream: Any) -> None:
    stream.append_many([b"v" * 1000] * 100)
    failures: list[object] = []

    def use(table: Any) -> None:
        try:
            assert table["value"].to_pylist() == [b"v" * 1000] * 100
        except BaseException as error:
            failures.append(error)

    for _ in range(20):
        threads = [
            threading.Thread(target=use, args=[batch.to_arrow()])
            for batch in stream.read()
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_capsules_that_nobody_takes_are_released(stream: Any) -> None:
    batch = append_example(stream)
    for _ in range(1000):
        batch.__arrow_c_array__()
        batch.__arrow_c_stream__()
        batch.__arrow_c_schema__()
    reader = pa.RecordBatchReader.from_stream(batch)
    del reader  # opened, never read


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_released_exports_give_their_memory_back(stream: Any) -> None:
    for _ in range(100):  # small batches: each read gathers them into memory of its own
        stream.append(b"v" * 3000)
    before = resident_bytes()
    for _ in range(3000):  # 900 MB in all
        for batch in stream.read():
            batch.to_arrow()
    assert resident_bytes() - before < 400 << 20  # AddressSanitizer holds 256 MiB back


def test_empty_log_gives_no_batch(stream: Any) -> None:
    assert [batch.to_arrow() for batch in stream.read()] == []


# in: tables ---------------------------------------------------------------------------------------


def example_table() -> Any:
    return pa.table(
        {
            "other": list(range(len(VALUES))),
            "payload": pa.array(VALUES, pa.binary()),
            "tail": pa.array(KEYS, pa.binary()),
            "when": pa.array(TIMES, pa.timestamp("us", "UTC")),
        }
    )


def polars_frame() -> Any:
    return import_polars().from_arrow(example_table())


def pandas_frame() -> Any:
    pytest.importorskip("pandas")
    return example_table().to_pandas()


def duckdb_relation() -> Any:
    return pytest.importorskip("duckdb").from_arrow(example_table())


PRODUCERS: dict[str, Callable[[], Any]] = {
    "table": example_table,
    "record batch": lambda: example_table().to_batches()[0],
    "reader": lambda: example_table().to_reader(),
    "many chunks": lambda: pa.Table.from_batches(example_table().to_batches(max_chunksize=5)),
    "struct array": lambda: example_table().to_struct_array().combine_chunks(),
    "stream only": lambda: Stream(example_table()),
    "array only": lambda: Array(example_table().to_batches()[0]),
    "polars": polars_frame,
    "pandas": pandas_frame,
    "duckdb": duckdb_relation,
}


@pytest.mark.parametrize("name", PRODUCERS)
def test_append_arrow_stores_columns_of(name: str, stream: Any) -> None:
    spans = stream.append_arrow(PRODUCERS[name](), value="payload", key="tail", timestamp="when")
    assert sum(span.count for span in spans) == len(VALUES)
    assert stored(stream) == list(zip(KEYS, VALUES, strict=True))
    assert [time for batch in stream.read() for time in batch.timestamps] == TIMES


def test_append_arrow_without_key_and_timestamp(stream: Any) -> None:
    stream.append_arrow(example_table(), value="payload")
    assert stored(stream) == [(None, value) for value in VALUES]
    batch = only_batch(stream)
    assert len(set(batch.timestamps)) == 1


def test_append_arrow_spreads_rows_by_key() -> None:
    with millstream.temporary() as store:
        stream = store.stream("s", partitions=4)
        keys = [b"k%d" % (i % 50) for i in range(1000)]
        table = pa.table({"value": [b"%d" % i for i in range(1000)], "key": keys})
        spans = stream.append_arrow(table, value="value", key="key")
        assert sum(span.count for span in spans) == 1000
        for batch in stream.read():
            assert {stream.partition_for(key) for key in batch.keys} == {batch.partition}
            numbers = [int(value) for value in batch.values]
            assert numbers == sorted(numbers)
            assert all(keys[number] == key for number, key in zip(numbers, batch.keys, strict=True))


def test_append_arrow_respects_slices_of_tables(stream: Any) -> None:
    table = example_table().slice(4, 9)
    stream.append_arrow(table, value="payload", key="tail")
    stream.append_arrow(table.to_batches()[0].slice(2, 3), value="payload", key="tail")
    struct = example_table().to_struct_array().combine_chunks()[5:8]
    stream.append_arrow(struct, value="payload", key="tail")
    expected = list(zip(KEYS, VALUES, strict=True))
    assert stored(stream) == expected[4:13] + expected[6:9] + expected[5:8]


def test_append_arrow_of_a_bare_column(stream: Any) -> None:
    stream.append_arrow(pa.array(VALUES))
    stream.append_arrow(pa.chunked_array([VALUES[:3], [], VALUES[3:]]))
    assert values_of(stream) == VALUES * 2
    with pytest.raises(millstream.InvalidArgument, match="'tail'"):
        stream.append_arrow(pa.array(VALUES), key="tail")


def test_append_arrow_takes_batches_of_another_stream(stream: Any) -> None:
    batch = append_example(stream)
    with millstream.temporary() as store:
        copy = store.stream("copy", partitions=1)
        copy.append_arrow(batch, value="value", key="key", timestamp="timestamp")
        assert stored(copy) == stored(stream)
        assert list(only_batch(copy).timestamps) == TIMES


def test_append_arrow_of_nothing_appends_nothing(stream: Any) -> None:
    empty = example_table().slice(0, 0)
    for data in [empty, empty.schema.empty_table(), empty.to_reader(), pa.array([], pa.binary())]:
        assert stream.append_arrow(data, value="payload") == []
    assert stream.next_offset(0) == 0


def test_append_arrow_names_the_columns_there_are(stream: Any) -> None:
    for columns in [
        {"value": "nope"},
        {"value": "payload", "key": "nope"},
        {"value": "payload", "timestamp": "nope"},
    ]:
        with pytest.raises(millstream.InvalidArgument, match=r"'nope'.*other, payload, tail, when"):
            stream.append_arrow(example_table(), **columns)
        with pytest.raises(ValueError, match="nope"):  # also where there is no row
            stream.append_arrow(example_table().slice(0, 0), **columns)
    twice = pa.Table.from_arrays([pa.array([b"1"])] * 2, ["v", "v"])
    with pytest.raises(millstream.InvalidArgument, match="several"):
        stream.append_arrow(twice, value="v")
    assert stream.next_offset(0) == 0


def test_append_arrow_of_other_things_is_a_type_error(stream: Any) -> None:
    for data in [[b"x"], b"x", None, 5, {"payload": [b"x"]}]:
        with pytest.raises(millstream.InvalidType, match="__arrow_c_stream__"):
            stream.append_arrow(data, value="payload")


def test_append_arrow_reports_what_a_failing_stream_said(stream: Any) -> None:
    table = example_table()

    def batches() -> Iterator[Any]:
        yield table.to_batches()[0]
        raise RuntimeError("the producer is tired")

    reader = pa.RecordBatchReader.from_batches(table.schema, batches())
    with pytest.raises(millstream.InvalidArgument, match="the producer is tired"):
        stream.append_arrow(reader, value="payload")


def test_append_arrow_refuses_rows_that_are_null_as_a_whole(stream: Any) -> None:
    column = pa.array([b"1", b"2"])
    struct = pa.StructArray.from_arrays([column], ["v"], mask=pa.array([False, True]))
    with pytest.raises(millstream.Unsupported, match="struct 1 is null"):
        stream.append_arrow(struct, value="v")


# in: columns --------------------------------------------------------------------------------------


LAYOUTS = {
    "binary": pa.binary(),
    "large binary": pa.large_binary(),
    "binary view": pa.binary_view(),
    "string": pa.string(),
    "large string": pa.large_string(),
    "string view": pa.string_view(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_append_many_takes_every_layout_of_bytes(name: str, stream: Any) -> None:
    array = pa.array([None if v is None else v.decode() for v in VALUES]).cast(LAYOUTS[name])
    stream.append_many(array)
    stream.append_many(array[2:9])
    stream.append_many(pa.chunked_array([array[3:5], array[:0], array[10:]]))
    stream.append_many([b"value"] * len(VALUES), keys=array)
    records = stored(stream)
    expected = VALUES + VALUES[2:9] + VALUES[3:5] + VALUES[10:]
    assert records[: len(expected)] == [(None, value) for value in expected]
    assert records[len(expected) :] == [(value, b"value") for value in VALUES]


def test_append_many_takes_polars_series(stream: Any) -> None:
    polars = import_polars()
    series = polars.Series(VALUES)
    text = polars.Series([None if value is None else value.decode() for value in VALUES])
    stream.append_many(series)
    stream.append_many(text)
    stream.append_many(text[3:8])
    stream.append_many(polars.concat([text, text[2:4]], rechunk=False))
    stream.append_many(polars.Series([1, 2, None], dtype=polars.Int32))
    stream.append_many(polars.Series([None, None]))
    numbers = [b"\1\0\0\0", b"\2\0\0\0", None]
    expected = VALUES + VALUES + VALUES[3:8] + VALUES + VALUES[2:4] + numbers + [None, None]
    assert values_of(stream) == expected


FIXED: dict[str, tuple[Any, list[bytes | None]]] = {
    "fixed size binary": (pa.array([b"ab", None, b"cd"], pa.binary(2)), [b"ab", None, b"cd"]),
    "uint8": (pa.array([1, None, 255], pa.uint8()), [b"\1", None, b"\xff"]),
    "int16": (pa.array([-2], pa.int16()), [b"\xfe\xff"]),
    "uint32": (pa.array([1 << 24], pa.uint32()), [b"\0\0\0\1"]),
    "int64": (pa.array([-1], pa.int64()), [b"\xff" * 8]),
    "float32": (pa.array([1.0], pa.float32()), [b"\0\0\x80\x3f"]),
    "date32": (pa.array([datetime.date(1970, 1, 3)]), [b"\2\0\0\0"]),
    "time64": (pa.array([7], pa.time64("us")), [b"\7" + b"\0" * 7]),
    "timestamp": (pa.array([3], pa.timestamp("ns")), [b"\3" + b"\0" * 7]),
    "decimal128": (pa.array([decimal.Decimal("1.25")]), [(125).to_bytes(16, "little")]),
    "null": (pa.nulls(2), [None, None]),
}


@pytest.mark.parametrize("name", FIXED)
def test_append_many_takes_fixed_widths_as_little_endian_bytes(name: str, stream: Any) -> None:
    array, expected = FIXED[name]
    stream.append_many(array)
    stream.append_many(array[1:])
    assert values_of(stream) == expected + expected[1:]


UNSUPPORTED = {
    "boolean": pa.array([True]),
    "dictionary": pa.array([b"a"]).dictionary_encode(),
    "list": pa.array([[1]]),
    "fixed size list": pa.array([[1]], pa.list_(pa.int8(), 1)),
    "struct": pa.array([{"a": 1}]),
    "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())),
    "run-end": pa.RunEndEncodedArray.from_arrays([2], [b"a"]),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_columns_without_bytes_are_refused_with_advice(name: str, stream: Any) -> None:
    array = UNSUPPORTED[name]
    with pytest.raises(millstream.Unsupported, match="cast it to binary"):
        stream.append_many(array)
    with pytest.raises(millstream.Unsupported, match="cast it to binary"):
        stream.append_many([b"x"] * len(array), keys=array)
    with pytest.raises(millstream.Unsupported, match="'payload'"):
        stream.append_arrow(pa.table({"payload": array}), value="payload")
    assert stream.next_offset(0) == 0


TIMESTAMPS = {
    "us": (pa.array([5, -5], pa.timestamp("us")), [5, -5]),
    "us UTC": (pa.array([5], pa.timestamp("us", "UTC")), [5]),
    "ms": (pa.array([5, -5], pa.timestamp("ms", "UTC")), [5_000, -5_000]),
    "s": (pa.array([5, -5], pa.timestamp("s", "Europe/Berlin")), [5_000_000, -5_000_000]),
    "ns": (pa.array([5999, -1], pa.timestamp("ns")), [5, -1]),
    "int64": (pa.array([7, 8], pa.int64()), [7, 8]),
    "chunks": (pa.chunked_array([[1], [2, 3]], pa.timestamp("us")), [1, 2, 3]),
}


@pytest.mark.parametrize("name", TIMESTAMPS)
def test_timestamps_of_each_unit_are_microseconds(name: str, stream: Any) -> None:
    array, expected = TIMESTAMPS[name]
    stream.append_many([b"x"] * len(expected), timestamps=array)
    table = pa.table({"value": [b"y"] * len(expected), "when": array})
    stream.append_arrow(table, value="value", timestamp="when")
    found = [time for batch in stream.read() for time in batch.timestamps]
    assert found == expected * 2


def test_timestamps_that_cannot_be_are_refused(stream: Any) -> None:
    for times, error, text in [
        (pa.array([0, None], pa.timestamp("us")), millstream.InvalidArgument, "element 1 is null"),
        (pa.array([0, 2**62], pa.timestamp("s")), millstream.LimitExceeded, "element 1"),
        (pa.array([0, -(2**62) - 1]), millstream.LimitExceeded, "element 1"),
        (pa.array([0.5, 1.5]), millstream.Unsupported, "no timestamp"),
        (pa.array(["now", "then"]), millstream.Unsupported, "no timestamp"),
    ]:
        with pytest.raises(error, match=text):
            stream.append_many([b"x", b"y"], timestamps=times)
        with pytest.raises(error, match=text):
            table = pa.table({"value": [b"x", b"y"], "when": times})
            stream.append_arrow(table, value="value", timestamp="when")
    assert stream.next_offset(0) == 0


def test_one_value_over_the_limit_appends_nothing(stream: Any) -> None:
    table = pa.table({"value": [b"x", b"y"], "key": [b"k", b"k" * 70_000]})
    with pytest.raises(millstream.LimitExceeded, match="key of element 1"):
        stream.append_arrow(table, value="value", key="key")
    assert stream.next_offset(0) == 0
