"""Arrow in, Arrow out: append a table, query the log with what is installed.

Readings of sensors go in as an Arrow table (a NumPy array where pyarrow is not installed), keyed by
sensor. Each value is one 16-byte record, and comes back as columns: with polars, DuckDB, or NumPy.

Run it: `python examples/arrow_pipeline.py`.
"""

import importlib.util

import numpy as np

import millstream

READINGS = 200_000
SENSORS = 50
READING = np.dtype([("sensor", "<u4"), ("flags", "<u4"), ("celsius", "<f8")])


def readings() -> np.ndarray:
    """Make readings up; sensor n reads n degrees and some noise."""
    random = np.random.default_rng(7)
    made = np.zeros(READINGS, READING)
    made["sensor"] = random.integers(0, SENSORS, READINGS)
    made["celsius"] = made["sensor"] + random.normal(0, 0.5, READINGS)
    return made


def append(stream: millstream.Stream, made: np.ndarray) -> str:
    """Append all in batches of 10,000; no Python object is made for a row."""
    keys = np.char.add("sensor-", made["sensor"].astype(str)).astype("S")
    if importlib.util.find_spec("pyarrow") is None:
        for first in range(0, READINGS, 10_000):
            part = slice(first, first + 10_000)
            stream.append_many(made[part], keys=keys[part])
        return "NumPy"
    import pyarrow as pa

    kind, raw = pa.binary(READING.itemsize), pa.py_buffer(made)
    payload = pa.FixedSizeBinaryArray.from_buffers(kind, READINGS, [None, raw])
    table = pa.table({"sensor": pa.array(keys.tolist(), pa.binary()), "payload": payload})
    for batch in table.to_batches(10_000):
        stream.append_arrow(batch, value="payload", key="sensor")
    return "Arrow"


def mean_with_polars(stream: millstream.Stream) -> dict[int, float]:
    """Mean temperature of each sensor, with polars."""
    import polars as pl

    frames = [
        pl.DataFrame({name: rows[name].copy() for name in ("sensor", "celsius")})
        for rows in (batch.values_as(READING) for batch in stream.read())
    ]
    found = pl.concat(frames).group_by("sensor").agg(pl.col("celsius").mean())
    return dict(found.iter_rows())


def mean_with_numpy(stream: millstream.Stream) -> dict[int, float]:
    """Mean temperature of each sensor, with NumPy: the values are views of the mapped file."""
    total, count = np.zeros(SENSORS), np.zeros(SENSORS)
    for batch in stream.read():
        rows = batch.values_as(READING)
        np.add.at(total, rows["sensor"], rows["celsius"])
        np.add.at(count, rows["sensor"], 1)
    return dict(enumerate(total / count))


def busiest_with_duckdb(stream: millstream.Stream) -> tuple[str, int]:
    """Return the sensor with most readings; DuckDB scans the Arrow columns of the batches."""
    import duckdb
    import pyarrow as pa

    log = pa.Table.from_batches([batch.to_arrow() for batch in stream.read()])
    query = "select key, count(*) from log group by key order by 2 desc, 1 limit 1"
    [(key, count)] = duckdb.sql(query).fetchall()
    assert log.num_rows == READINGS
    return bytes(key).decode(), count


def main() -> None:
    made = readings()
    with millstream.temporary() as store:
        stream = store.stream("readings", partitions=4)
        how = append(stream, made)
        stats = stream.stats()
        print(f"{stats.records:,} readings appended from {how}, {stats.log_bytes:,} bytes of log")
        polars = importlib.util.find_spec("polars") is not None
        means = (mean_with_polars if polars else mean_with_numpy)(stream)
        print(f"means by {'polars' if polars else 'NumPy'}:")
        for sensor in (0, SENSORS // 2, SENSORS - 1):
            print(f"  sensor {sensor:2}: {means[sensor]:6.2f} degrees")
        if importlib.util.find_spec("duckdb") and importlib.util.find_spec("pyarrow"):
            sensor_name, count = busiest_with_duckdb(stream)
            print(f"busiest by DuckDB: {sensor_name} with {count:,} readings")


if __name__ == "__main__":
    main()
