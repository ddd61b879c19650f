# What a caller gives for a number, a time or a text, checked: one place, one wording.
from cpython.number cimport PyNumber_Index

cdef int64_t FOREVER_NS = <int64_t>1 << 62
cdef int64_t DELAY_MOST_US = <int64_t>100 * 365 * 86400 * 1000000


cdef object index_of(str what, object value):
    """An int, also where it is one of NumPy."""
    if isinstance(value, bool):
        raise _errors.InvalidType(f"{what} {value!r}: expected an int")
    try:
        return PyNumber_Index(value)
    except TypeError as error:
        raise _errors.InvalidType(f"{what} {value!r}: expected an int") from error


cdef int refuse_mask(object value, str what) except -1:
    """A masked array of NumPy would give what lies under its mask."""
    if hasattr(value, "mask") and hasattr(value, "filled"):
        raise _errors.InvalidType(f"{what}: a masked array; pass a list with None, or Arrow")
    return 0


cdef bytes as_bytes(object value, str what):
    """Bytes of anything bytes-like."""
    if type(value) is bytes:
        return value
    refuse_mask(value, what)
    if not PyObject_CheckBuffer(value):
        raise _errors.InvalidType(f"{what}: expected bytes-like, found {type(value).__name__}")
    try:
        return memoryview(value).tobytes()
    except (BufferError, ValueError) as error:  # released, or what its exporter says
        raise _errors.InvalidType(f"{what}: not bytes that can be read: {error}") from error


cdef bytes utf8(str what, str text):
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _errors.InvalidArgument(f"{what} {text!r:.40}: not text as UTF-8 has it") from error


cdef int64_t microseconds_of(str what, object seconds) except -1:
    """A time-span that a caller gave, in microseconds, rounded up: never early."""
    cdef double given
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise _errors.InvalidType(f"{what} {seconds!r}: expected a number of seconds")
    if not 0 <= seconds <= DELAY_MOST_US / 1000000:
        raise _errors.InvalidArgument(f"{what} {seconds!r}: expected from 0 seconds to 100 years")
    given = seconds
    cdef int64_t whole = <int64_t>(given * 1e6)
    return whole + (whole < given * 1e6)


cdef int64_t deadline_of(object timeout) except -1:
    """The instant of CLOCK_MONOTONIC at which a wait ends."""
    if timeout is None:
        return FOREVER_NS
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise _errors.InvalidType(f"timeout {timeout!r}: expected a number of seconds or None")
    if not timeout >= 0:
        raise _errors.InvalidArgument(f"timeout {timeout!r}: cannot be negative")
    return ms_clock_monotonic_ns() + <int64_t>(<double>min(timeout, 1e9) * 1e9)
