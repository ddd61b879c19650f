"""What users write for a time, as microseconds since 1970 UTC."""

from __future__ import annotations

import array
import sys

from millstream import _native
from millstream.errors import InvalidArgument, InvalidType, MillstreamError
from millstream.options import as_index

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any, TypeGuard

SMALLEST, LARGEST = -(1 << 62), 1 << 62
COARSER = ("Y", "M", "W", "D", "h", "m", "s", "ms")
"""Units of numpy from which a time may have no microseconds within 64 bits."""


def is_datetime(value: object) -> TypeGuard[datetime]:
    """Is it a datetime? Without importing what takes a tenth of the package's import."""
    # Another thread may be importing it, so that it is there and has nothing in it yet.
    kind = getattr(sys.modules.get("datetime"), "datetime", None)
    return kind is not None and isinstance(value, kind)


def is_time(value: object) -> bool:
    """Is it a datetime, or one of NumPy?"""
    return is_datetime(value) or getattr(getattr(value, "dtype", None), "kind", "") == "M"


def microseconds(value: Any) -> int:
    """One time: int of microseconds, datetime or numpy.datetime64.

    A naive datetime is local time, as in Python.

    >>> from datetime import UTC, datetime
    >>> microseconds(datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC))
    1000000
    """
    if is_datetime(value):
        with _native.loading:
            from datetime import UTC, datetime, timedelta
        epoch = datetime(1970, 1, 1, tzinfo=UTC)
        try:
            return int((value.astimezone(UTC) - epoch) // timedelta(microseconds=1))
        except (OverflowError, OSError, TypeError, ValueError) as error:
            raise InvalidArgument(f"timestamp {value!r}: {error}") from error
    if getattr(getattr(value, "dtype", None), "kind", "") == "M" and value.ndim == 0:
        value = int(_of_numpy(value))
    number = as_index(value)
    if number is None:
        raise InvalidType(
            f"timestamp {value!r}: expected an int of microseconds since 1970 UTC, a datetime or a"
            " numpy.datetime64"
        )
    if not SMALLEST <= number <= LARGEST:
        raise InvalidArgument(f"timestamp {number}: out of range (microseconds since 1970)")
    return number


def _unmasked(values: Any) -> Any:
    """Return an array of numpy, unless its mask says that an element is missing."""
    mask = getattr(values, "mask", None)
    if mask is not None and mask.any():
        at = "it" if values.ndim == 0 else f"element {int(mask.argmax())}"
        raise InvalidArgument(f"timestamps: {at} is masked; give each record a time")
    return values


def _of_numpy(values: Any) -> Any:
    """Times of numpy, of any unit, as int64 of microseconds."""
    with _native.loading:
        import numpy
    values = numpy.asarray(_unmasked(values))
    if numpy.isnat(values).any():
        raise InvalidArgument("timestamps: one of them is NaT")
    try:
        converted = values.astype("M8[us]")
        # A conversion that overflows gives another time, in most versions of numpy without a word;
        # from microseconds back to a coarser unit it does not overflow.
        if numpy.datetime_data(values.dtype)[0] in COARSER:
            same = (converted.astype(values.dtype) == values).all()
        else:
            same = True
    except OverflowError:
        same = False
    if not same:
        raise InvalidArgument(
            f"timestamps of {values.dtype}: one of them is out of range (microseconds since 1970)"
        )
    return converted.view("i8")


def column(values: Any, count: int) -> Any:
    """One time for all records as an int, or one a record as a buffer of int64."""
    try:
        shape = getattr(values, "shape", None)
    except ValueError as error:  # of a memoryview that was released
        raise InvalidType(f"timestamps: {error}") from error
    if isinstance(values, int) or is_datetime(values) or shape == ():
        return microseconds(values)
    if type(values).__name__ == "Memory":  # of a column that append_arrow has checked
        made = values
        length = len(memoryview(values).cast("B")) // 8
    elif hasattr(values, "__array_interface__") and values.dtype.kind in "Miu":
        with _native.loading:
            import numpy
        if values.ndim != 1:
            raise InvalidArgument(f"timestamps: an array of {values.ndim} dimensions, expected 1")
        values = numpy.asarray(_unmasked(values))
        if values.dtype.kind == "u" and len(values) and values.max() > LARGEST:
            raise InvalidArgument("timestamps: out of range (microseconds since 1970)")
        if values.dtype.kind == "M":
            values = _of_numpy(values)
        made = numpy.ascontiguousarray(values, dtype="<i8")
        length = len(made)
        if length and not (made.min() >= SMALLEST and made.max() <= LARGEST):
            raise InvalidArgument("timestamps: out of range (microseconds since 1970)")
    elif hasattr(values, "__arrow_c_array__") or hasattr(values, "__arrow_c_stream__"):
        made = _native.arrow_timestamps(values)
        length = len(made)
    else:
        try:
            made = array.array("q", [microseconds(value) for value in values])
        except (TypeError, ValueError) as error:
            if isinstance(error, MillstreamError):
                raise
            raise InvalidType(
                f"timestamps: expected one time or a sequence, found {values!r:.60}"
            ) from error
        length = len(made)
    if length != count:
        raise InvalidArgument(f"{length} timestamps for {count} values")
    return made
