"""A stream as a lazy frame of polars: ``scan(stream).filter(...).collect()``.

``pip install 'millstream[polars]'``. What a query asks of offsets, times and partitions becomes
seeks in the log, and columns that it does not name are never made.

>>> import millstream
>>> import polars as pl
>>> from millstream.contrib.polars import ScanCounts, scan
>>> with millstream.temporary() as store:
...     stream = store.stream("s", partitions=1)
...     _ = stream.append_many([b"%d" % number for number in range(1000)])
...     counts = ScanCounts()
...     frame = scan(stream, counts=counts).filter(pl.col("offset") >= 998).select("value")
...     frame.collect()["value"].to_list(), counts
([b'998', b'999'], ScanCounts(records=2, skipped=998))
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from millstream import InvalidType, OffsetOutOfRange, Stream
from millstream.contrib import require

require("polars", "polars", (1, 20), (3,))

import polars as pl  # noqa: E402
from polars.io.plugins import register_io_source  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from millstream import Batch

__all__ = ["ScanCounts", "scan"]

COLUMNS: dict[str, Any] = {
    "partition": pl.Int32,
    "offset": pl.Int64,
    "timestamp": pl.Datetime("us", "UTC"),
    "key": pl.Binary,
    "value": pl.Binary,
}
PAIRS = pl.List(pl.Struct({"key": pl.String, "value": pl.Binary}))
HEADERS: Any = pl.Map(pl.String, pl.Binary) if hasattr(pl, "Map") else PAIRS
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
FLIPPED = {"Gt": "Lt", "GtEq": "LtEq", "Lt": "Gt", "LtEq": "GtEq", "Eq": "Eq"}
CLOSED = {"Both": ("GtEq", "LtEq"), "Left": ("GtEq", "Lt"), "Right": ("Gt", "LtEq")}
CLOSED["None"] = ("Gt", "Lt")


@dataclass
class ScanCounts:
    """What scans had to read.

    Attributes:
        records: that were made rows, before what is left of the filter was applied.
        skipped: that were never looked at, or whose timestamp alone was; each offset is one.
    """

    records: int = 0
    skipped: int = 0


def scan(
    stream: Stream, *, headers: bool = False, counts: ScanCounts | None = None
) -> pl.LazyFrame:
    """The records of a stream that are there when the query is collected, as a lazy frame.

    Columns: partition (Int32), offset (Int64), timestamp (Datetime of microseconds, UTC), key and
    value (Binary). Rows come partition by partition, each by rising offset.

    Pushed down are comparisons and ``is_between`` of the columns offset, timestamp and partition
    with constants, joined by ``&`` or in several ``filter``; ``head``; and the columns that are
    asked for. Timestamps need not rise: from a begin of time on, the log is sought; from an end of
    time on, batches that are wholly later are skipped by their timestamps. All else is filtered by
    polars.

    Args:
        stream: stays the caller's; must be open when the frame is collected.
        headers: have a column of that name, too.
        counts: is added to by each collect.

    Raises: InvalidType; when it is collected: what `Stream.read` raises.

    >>> import millstream
    >>> with millstream.temporary() as store:
    ...     stream = store.stream("s", partitions=1)
    ...     _ = stream.append(b"1", key=b"k")
    ...     scan(stream).select("key", "value").collect().rows()
    [(b'k', b'1')]
    """
    if not isinstance(stream, Stream):
        raise InvalidType(f"scan({stream!r}): expected a Stream")
    schema = {**COLUMNS, "headers": HEADERS} if headers else COLUMNS
    own = ScanCounts() if counts is None else counts

    def source(
        asked: list[str] | None, predicate: pl.Expr | None, most: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        bounds = Bounds()
        needed = set(schema if asked is None else asked)
        if predicate is not None:
            needed |= set(predicate.meta.root_names())
            bounds.narrow(_tree(predicate))
        read = [name for name in schema if name in needed] or ["offset"]
        for batch in _batches(stream, bounds, own):
            frame = pl.DataFrame(batch.arrow(read))  # type: ignore[arg-type]
            if predicate is not None:
                frame = frame.filter(predicate)
            if asked is not None:
                frame = frame.select(asked)
            if most is not None:
                frame = frame.head(most)
                most -= len(frame)
            yield frame
            if most == 0:
                return

    return register_io_source(source, schema=schema, is_pure=False)


def _batches(stream: Stream, bounds: Bounds, counts: ScanCounts) -> Iterator[Batch]:
    """What the bounds leave of each partition, as it is now."""
    for partition in range(stream.partitions):
        first, end = stream.first_offset(partition), stream.next_offset(partition)
        begin = max(first, bounds.offset.least)
        last = min(end - 1, bounds.offset.most)
        if bounds.time.least > -math.inf and begin <= last:
            moment = EPOCH + int(bounds.time.least) * MICROSECOND
            begin = max(begin, stream.offset_at(moment, partition))
        if not bounds.partition.least <= partition <= bounds.partition.most or begin > last:
            counts.skipped += end - first
            continue
        counts.skipped += int(begin) - first + end - 1 - int(last)
        for batch in _between(stream, partition, int(begin), int(last)):
            if bounds.time.most < math.inf and (batch.timestamps > bounds.time.most).all():
                counts.skipped += len(batch)
                continue
            counts.records += len(batch)
            yield batch


def _between(stream: Stream, partition: int, begin: int, last: int) -> Iterator[Batch]:
    """Batches of the records from one offset to another; none where retention took them."""
    with contextlib.suppress(OffsetOutOfRange):  # retention took all of them just now
        for batch in stream.read(partition=partition, start=begin, on_lost="earliest"):
            if batch.next_offset <= last + 1:
                yield batch
                continue
            rows = int(np.searchsorted(batch.offsets, last, side="right"))
            if rows:
                yield batch[:rows]
            return


# --- what a predicate says ------------------------------------------------------------------------


@dataclass
class Range:
    """From the least to the most, both of them in it; it may be wider than what is asked for."""

    least: float = -math.inf
    most: float = math.inf

    def narrow(self, operator: str, value: float) -> None:
        """Leave what compares so with a value."""
        if operator in ("Gt", "GtEq", "Eq"):
            self.least = max(self.least, math.floor(value))
        if operator in ("Lt", "LtEq", "Eq"):
            self.most = min(self.most, math.ceil(value))
        if value == int(value):
            if operator == "Gt":
                self.least = max(self.least, int(value) + 1)
            if operator == "Lt":
                self.most = min(self.most, int(value) - 1)


@dataclass
class Bounds:
    """What a predicate leaves of a stream, at most."""

    offset: Range = field(default_factory=Range)
    time: Range = field(default_factory=Range)
    partition: Range = field(default_factory=Range)

    def narrow(self, tree: Any) -> None:
        """Take in a predicate, as polars serializes it; what is not understood narrows nothing."""
        match tree:
            case {"BinaryExpr": {"left": left, "op": "And", "right": right}}:
                self.narrow(left)
                self.narrow(right)
            case {"BinaryExpr": {"left": {"Column": str(name)}, "op": str(op), "right": right}}:
                self._compare(name, op, right)
            case {"BinaryExpr": {"left": left, "op": str(op), "right": {"Column": str(name)}}}:
                self._compare(name, FLIPPED.get(op, ""), left)
            case {
                "Function": {
                    "input": [{"Column": str(name)}, low, high],
                    "function": {"Boolean": {"IsBetween": {"closed": str(closed)}}},
                }
            } if closed in CLOSED:
                for operator, value in zip(CLOSED[closed], (low, high), strict=True):
                    self._compare(name, operator, value)

    def _compare(self, name: str, operator: str, constant: Any) -> None:
        ranges = {"offset": self.offset, "timestamp": self.time, "partition": self.partition}
        if name not in ranges or operator not in FLIPPED:
            return
        value = _constant(constant)
        if isinstance(value, datetime) and value.tzinfo is not None and name == "timestamp":
            # A constant of nanoseconds is cut to microseconds here: both ends stay in.
            wide = {"Gt": "GtEq", "Lt": "LtEq"}.get(operator, operator)
            ranges[name].narrow(wide, (value - EPOCH) // MICROSECOND)
        elif isinstance(value, int | float) and math.isfinite(value) and name != "timestamp":
            ranges[name].narrow(operator, value)


def _tree(expression: pl.Expr) -> Any:
    """An expression as its JSON; None where it has none, as with a function of Python in it."""
    try:
        return json.loads(expression.meta.serialize(format="json"))
    except pl.exceptions.ComputeError:
        return None


def _constant(tree: Any) -> Any:
    """The value of an expression that names no column, or None."""
    expression = pl.Expr.deserialize(io.StringIO(json.dumps(tree)), format="json")
    if expression.meta.root_names():
        return None
    frame = pl.select(expression)
    return frame.item() if frame.shape == (1, 1) else None
