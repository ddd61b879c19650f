"""`contrib.polars`: each query gives what a full read gives, and reads less."""

import random
from datetime import UTC, datetime, timedelta

import pytest

import millstream

pytest.importorskip("polars")

import polars as pl

from millstream.contrib.polars import ScanCounts, scan

BEGIN = datetime(2020, 1, 1, tzinfo=UTC)
RECORDS = 3000
col = pl.col


def fill(store, *, sorted_times=True):
    """A stream with two partitions and a record a second, in many batches."""
    stream = store.stream("s", partitions=2, segment_bytes="64KiB")
    dice = random.Random(3)
    for begin in range(0, RECORDS, 100):
        seconds = list(range(begin, begin + 100))
        if not sorted_times:
            dice.shuffle(seconds)
        stream.append_many(
            [b"%d" % number + bytes(80) for number in range(begin, begin + 100)],
            keys=[None if number % 3 else b"%d" % (number % 7) for number in range(100)],
            timestamps=[BEGIN + timedelta(seconds=second) for second in seconds],
            headers={"h": b"1"},
            partition=begin // 100 % 2,
        )
    return stream


def full(stream):
    """All records, without `scan`."""
    batches = [batch for p in range(2) for batch in stream.read(partition=p)]
    names = ["partition", "offset", "timestamp", "key", "value", "headers"]
    return pl.concat([pl.DataFrame(batch.arrow(names)) for batch in batches])


@pytest.fixture
def stream(store):
    return fill(store)


@pytest.fixture
def counts():
    return ScanCounts()


def at(second):
    return BEGIN + timedelta(seconds=second)


QUERIES = {
    "all": (pl.lit(True), RECORDS),
    "offsets from": (col("offset") >= 1400, 200),
    "offsets after": (col("offset") > 1400, 198),
    "offsets up to": (col("offset") <= 9, 20),
    "offsets before": (col("offset") < 10, 20),
    "one offset": (col("offset") == 700, 2),
    "an offset that is no whole number": (col("offset") > 1400.5, 198),
    "literal first": (pl.lit(1400) <= col("offset"), 200),
    "between": (col("offset").is_between(10, 19), 20),
    "between, open": (col("offset").is_between(10, 19, closed="none"), 16),
    "a partition": ((col("partition") == 1) & (col("offset") >= 1490), 10),
    "no partition": (col("partition") == 5, 0),
    "beyond the end": (col("offset") > 10**6, 0),
    "contradiction": ((col("offset") > 20) & (col("offset") < 10), 0),
    "times from": (col("timestamp") >= at(2900), 100),
    "times before": (col("timestamp") < at(100), 100),
    "times between": (col("timestamp").is_between(at(1000), at(1099)), 100),
    "one time": (col("timestamp") == at(1234), 1),
    "both": ((col("offset") >= 100) & (col("timestamp") < at(400)), 200),
    "values": (col("value").bin.starts_with(b"17"), None),
    "keys": ((col("key") == b"3") & (col("offset") >= 1400), None),
    "or": ((col("offset") < 5) | (col("offset") >= 1495), 20),
    "not": (~(col("offset") < 1495), 10),
    "compared with itself": (col("offset") == col("offset"), RECORDS),
    "a calculated constant": (col("offset") >= pl.lit(700) * 2, 200),
    "a calculated column": (col("offset") + 5 >= 1405, 200),
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_gives_what_a_full_read_gives(stream, counts, name):
    predicate, rows = QUERIES[name]
    expected = full(stream).filter(predicate)
    if rows is not None:
        assert len(expected) == rows
    found = scan(stream, headers=True, counts=counts).filter(predicate).collect()
    assert found.equals(expected)
    assert counts.records + counts.skipped == RECORDS
    assert counts.records >= len(found)


@pytest.mark.parametrize("name", QUERIES)
def test_times_that_do_not_rise(store, name):
    stream, predicate = fill(store, sorted_times=False), QUERIES[name][0]
    expected = full(stream).filter(predicate)
    assert scan(stream, headers=True).filter(predicate).collect().equals(expected)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *[("offsets from", 200), ("offsets after", 198), ("offsets up to", 20)],
        *[("offsets before", 20), ("one offset", 2), ("literal first", 200), ("between", 20)],
        *[("between, open", 16), ("a partition", 10), ("no partition", 0), ("beyond the end", 0)],
        *[("contradiction", 0), ("times from", 100), ("a calculated constant", 200)],
        ("keys", 200),
    ],
)
def test_what_is_not_asked_for_is_skipped(stream, counts, name, most):
    scan(stream, counts=counts).filter(QUERIES[name][0]).collect()
    assert (counts.records, counts.skipped) == (most, RECORDS - most)


def test_batches_behind_an_end_of_time_are_skipped(stream, counts):
    scan(stream, counts=counts).filter(col("timestamp") < at(100)).collect()
    assert 100 <= counts.records < RECORDS


def test_only_columns_that_are_named_are_made(stream):
    frame = scan(stream)
    assert frame.select("value").collect().columns == ["value"]
    assert frame.select("timestamp", "key").collect().columns == ["timestamp", "key"]
    found = frame.filter(col("offset") == 0).select("value").collect()["value"].to_list()
    assert found == [b"0" + bytes(80), b"100" + bytes(80)]
    assert frame.select(pl.len()).collect().item() == RECORDS
    assert frame.select(col("offset").max()).collect().item() == RECORDS // 2 - 1


def test_head_ends_early(stream, counts):
    assert len(scan(stream, counts=counts).head(5).collect()) == 5
    assert counts.records < RECORDS
    found = scan(stream).filter(col("offset") > 7).head(3).collect()
    assert found["offset"].to_list() == [8, 9, 10]


def test_a_function_of_python_is_applied_and_not_pushed_down(stream, counts):
    odd = col("offset").map_batches(lambda offsets: offsets % 2 == 1, return_dtype=pl.Boolean)
    found = scan(stream, counts=counts).filter(odd).collect()
    assert found["offset"].to_list() == [*range(1, RECORDS // 2, 2)] * 2
    assert counts.records == RECORDS


def test_constants_of_nanoseconds(stream):
    for text in ("2020-01-01T00:00:05.000000001", "2020-01-01T00:00:05"):
        constant = pl.lit(text).str.to_datetime(time_unit="ns", time_zone="UTC")
        for predicate in (col("timestamp") >= constant, col("timestamp") < constant):
            expected = full(stream).filter(predicate)
            assert scan(stream, headers=True).filter(predicate).collect().equals(expected)


def test_it_is_read_when_it_is_collected(store, counts):
    stream = store.stream("s", partitions=1)
    frame = scan(stream, headers=True)
    empty = frame.collect()
    assert (empty.shape, empty.schema["headers"]) == ((0, 6), frame.collect_schema()["headers"])
    stream.append(b"1", headers={"h": b"1"})
    found = frame.collect()
    assert found.schema == empty.schema
    assert found["value"].to_list() == [b"1"]
    assert dict(full_of(stream).schema) == dict(found.schema)
    stream.append(b"2")
    assert frame.collect()["value"].to_list() == [b"1", b"2"]


def full_of(stream):
    (batch,) = stream.read()
    return pl.DataFrame(
        batch.arrow(["partition", "offset", "timestamp", "key", "value", "headers"])
    )


@pytest.mark.parametrize("what", [None, "path", 1])
def test_what_is_no_stream_is_refused_at_once(what):
    with pytest.raises(millstream.InvalidType, match="expected a Stream"):
        scan(what)


def test_what_retention_and_compaction_removed(store):
    retention = millstream.Retention(records=500)
    stream = store.stream("r", partitions=1, segment_bytes="64KiB", retention=retention)
    for _ in range(30):
        stream.append_many([bytes(100)] * 100)
    stream.enforce_retention()
    first = stream.first_offset(0)
    assert first > 0
    found = scan(stream).filter(col("offset") >= 5).collect()
    assert found["offset"].to_list() == list(range(first, 3000))
    compacted = store.stream(
        "c", partitions=1, segment_bytes="64KiB", compact=millstream.Compaction(min_age=0)
    )
    for number in range(3000):
        compacted.append(bytes(100), key=b"%d" % (number % 10))
    compacted.compact()
    every = [offset for batch in compacted.read() for offset in batch.offsets.tolist()]
    assert len(every) < 3000
    for limit in (100, 1500, 2995):
        found = scan(compacted).filter(col("offset") <= limit).collect()
        assert found["offset"].to_list() == [offset for offset in every if offset <= limit]


def test_duckdb_projects_and_filters(stream, counts):
    duckdb = pytest.importorskip("duckdb")
    log = scan(stream, counts=counts)  # found by its name
    query = 'select "offset", value from log where "offset" >= 1490 and "partition" = 1 order by 1'
    found = duckdb.sql(query).fetchall()
    assert [offset for offset, _ in found] == list(range(1490, 1500))
    assert found[0][1].rstrip(b"\0") == b"2990"
    duckdb.sql('select count(*) from log where "offset" < 10').fetchall()
    del log
    assert counts.records + counts.skipped == 2 * RECORDS
