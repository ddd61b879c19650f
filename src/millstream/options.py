"""Frozen values that configure stores and streams, and the readers of what users write for them."""

from __future__ import annotations

import contextlib
import functools
import operator

from millstream import _native
from millstream.errors import InvalidArgument, InvalidType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any, Literal, TypeAlias

    from millstream._native import Position

    Durability: TypeAlias = Literal["process", "interval", "sync"]
    """What an append has survived when it returns.

    ``"process"``: the death of any process. ``"interval"``: also a power cut, but for what was
    written since the last completed sync began (one starts every 100 ms). ``"sync"``: also a power
    cut.
    """

    Start: TypeAlias = int | Position | datetime | Literal["earliest", "latest"]
    """Where reading begins: an offset, a position, a time, or one of the ends."""


__all__ = [
    "DURABILITIES",
    "Compaction",
    "Durability",
    "Retention",
    "RetryPolicy",
    "parse_bytes",
    "parse_seconds",
]

DURABILITIES: tuple[Durability, ...] = ("process", "interval", "sync")

_SIZE = r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgtp])(i?))?b?\s*"
_AGE = r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(us|ms|s|m|h|d|w|y)\s*"
_SECONDS = {
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1,
    "m": 60,
    "h": 3600,
    "d": 86400,
    "w": 604800,
    "y": 31557600,
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Make the alias when it is asked for: `typing` takes a third of the package's import."""
        if name != "Durability":
            raise AttributeError(f"module 'millstream.options' has no attribute {name!r}")
        within = _native.loading.mine  # an import, in which a module of ours asks
        with contextlib.nullcontext() if within else _native.loading:
            from typing import Literal
        return Literal[DURABILITIES]


def as_index(value: Any) -> int | None:
    """Return an int, also where it is one of NumPy; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(what: str, value: object, least: int, most: int | None = None) -> int:
    """Check a count that a caller gave: an int (also one of NumPy) from `least` to `most`."""
    number = as_index(value)
    if number is None:
        raise InvalidType(f"{what} {value!r}: expected an int")
    if number < least or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidArgument(f"{what} {number}: expected an int {allowed}")
    return number


def boolean(what: str, value: object) -> bool:
    """Check a flag that a caller gave: what else would count as true, "no" does too."""
    if not isinstance(value, bool):
        raise InvalidType(f"{what} {value!r}: expected True or False")
    return value


FOREVER = 1e9
"""Seconds, more than 30 years: no wait is longer."""
CENTURY = 100.0 * 365 * 86400
"""Seconds: no delay and no time to live is longer."""


def check_timeout(timeout: object) -> float | None:
    """Check a time-out that a caller gave: None, or seconds; more than 30 years are cut to that."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise InvalidType(f"timeout {timeout!r}: expected a number of seconds or None")
    if not timeout >= 0:
        raise InvalidArgument(f"timeout {timeout!r}: cannot be negative")
    return float(min(timeout, FOREVER))


def parse_bytes(size: int | str) -> int:
    """Read a number of bytes: 4096, ``"10GiB"`` (1024s), ``"10GB"`` (1000s).

    >>> parse_bytes("1.5KiB"), parse_bytes("2MB"), parse_bytes(7)
    (1536, 2000000, 7)
    """
    if isinstance(size, str):
        with _native.loading:
            import re
        match = re.fullmatch(_SIZE, size, re.IGNORECASE)
        if match is None:
            raise InvalidArgument(
                f'size {size!r}: expected a number of bytes such as 4096, "10GiB" or "10GB"'
            )
        digits, prefix, binary = match.groups()
        unit: int = (1024 if binary else 1000) ** " kmgtp".index((prefix or " ").lower())
        return round(float(digits) * unit) if "." in digits else int(digits) * unit
    number = as_index(size)
    if number is None:
        raise InvalidType(f"size {size!r}: expected an int or a str")
    if number < 0:
        raise InvalidArgument(f"size {size}: cannot be negative")
    return number


def parse_seconds(age: float | str | object) -> float:
    """Read a duration: seconds, ``"30d"`` (us, ms, s, m, h, d, w, y), or a ``timedelta``.

    >>> parse_seconds("90m"), parse_seconds(2.5)
    (5400.0, 2.5)
    """
    seconds: float
    if isinstance(age, str):
        with _native.loading:
            import re
        match = re.fullmatch(_AGE, age, re.IGNORECASE)
        if match is None:
            raise InvalidArgument(
                f'age {age!r}: expected seconds or a text such as "90m", "24h" or "30d"'
            )
        seconds = float(match[1]) * _SECONDS[match[2].lower()]
    elif hasattr(age, "total_seconds"):
        seconds = float(age.total_seconds())
    elif isinstance(age, (int, float)) and not isinstance(age, bool):
        seconds = float("inf") if age > 1e300 else float(age)  # of an int: no float may have it
    else:
        raise InvalidType(f"age {age!r}: expected a number of seconds, a str or a timedelta")
    if not 0 <= seconds < float("inf"):
        raise InvalidArgument(f"age {age!r}: expected a time that is finite and not negative")
    return seconds


class _Frozen:
    """A value object of a few fields, which `as_dict` lists."""

    # By hand: dataclasses would take a third of the time that importing the package may take.
    __slots__ = ()

    def as_dict(self) -> dict[str, Any]:
        """Return what it was made of."""
        raise NotImplementedError  # each class below has its own fields

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a {type(self).__name__} cannot be changed: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} cannot be changed: {name}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in self.as_dict().items())
        return f"{type(self).__name__}({fields})"

    def __reduce__(self) -> tuple[object, ...]:
        return (functools.partial(type(self), **self.as_dict()), ())


class Retention(_Frozen):
    """How much of a stream is kept. Cannot be changed.

    Whole segments go, oldest first; readers and groups are not waited for.

    Args:
        bytes: per partition, a number or a text such as ``"10GiB"``.
        age: since the append, in seconds or a text such as ``"30d"``; held in ``age`` as seconds.
        records: per partition.

    >>> Retention(bytes="1KiB", age="2m")
    Retention(bytes=1024, age=120.0, records=None)
    """

    __slots__ = ("age", "bytes", "records")
    bytes: int | None
    age: float | None
    records: int | None

    def __init__(
        self,
        *,
        bytes: int | str | None = None,
        age: float | str | object | None = None,
        records: int | None = None,
    ) -> None:
        if records is not None:
            records = integer("records", records, 0)
        object.__setattr__(self, "bytes", None if bytes is None else parse_bytes(bytes))
        object.__setattr__(self, "age", None if age is None else parse_seconds(age))
        object.__setattr__(self, "records", records)

    def as_dict(self) -> dict[str, float | None]:
        """Return what it was made of."""
        return {"bytes": self.bytes, "age": self.age, "records": self.records}


class Compaction(_Frozen):
    """Keep the last record of each key, and those without a key. Cannot be changed.

    A null value under a key is a tombstone: the key is gone, and later so is the tombstone.

    Args:
        min_dirty: compact in the background when this part of the sealed log was never compacted, 0
            to 1.
        min_age: records stay at least so long whatever follows, in seconds or a text such as
            ``"1h"``.
        tombstone_age: a tombstone stays so long after it was first compacted; readers that are
            further behind may miss it.
        max_rate: bytes a second that the background reads and writes for it, a number or a text.

    >>> Compaction(min_age="1h")
    Compaction(min_dirty=0.5, min_age=3600.0, tombstone_age=86400.0, max_rate=67108864)
    """

    __slots__ = ("max_rate", "min_age", "min_dirty", "tombstone_age")
    min_dirty: float
    min_age: float
    tombstone_age: float
    max_rate: int

    def __init__(
        self,
        *,
        min_dirty: float = 0.5,
        min_age: float | str | object = 0.0,
        tombstone_age: float | str | object = "24h",
        max_rate: int | str = "64MiB",
    ) -> None:
        object.__setattr__(self, "min_dirty", number("min_dirty", min_dirty, 0.0, 1.0))
        object.__setattr__(self, "min_age", parse_seconds(min_age))
        object.__setattr__(self, "tombstone_age", parse_seconds(tombstone_age))
        rate = integer("max_rate", parse_bytes(max_rate), 1 << 12)
        object.__setattr__(self, "max_rate", rate)

    def as_dict(self) -> dict[str, float]:
        """Return what it was made of."""
        return {
            "min_dirty": self.min_dirty,
            "min_age": self.min_age,
            "tombstone_age": self.tombstone_age,
            "max_rate": self.max_rate,
        }


def plain(value: float) -> str:
    """Return a number as one writes it: 2,592,000 and not 2.592e+06."""
    return f"{value:,.15g}"


def number(what: str, value: object, least: float, most: float) -> float:
    """Check a number that a caller gave: finite, from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidType(f"{what} {value!r}: expected a number")
    if not least <= value <= most:
        raise InvalidArgument(
            f"{what} {value!r}: expected a number from {plain(least)} to {plain(most)}"
        )
    return float(value)


class RetryPolicy(_Frozen):
    """How often a message of a queue is tried, and how long it waits in between.

    The waits grow from `backoff` by `factor` up to `max_delay`; the defaults make about 27 minutes
    of trying. Cannot be changed.

    Args:
        max_attempts: leases of a message, 1 to 62; after the last that failed it is dead.
        backoff: seconds after the first failure.
        factor: each wait is so many times the one before.
        max_delay: seconds, the longest wait.
        jitter: part of a wait by which it is shorter or longer at random, 0 to 1.

    >>> policy = RetryPolicy(max_attempts=4, jitter=0.0)
    >>> [policy.delay(attempt) for attempt in (1, 2, 3)]
    [1.0, 2.0, 4.0]
    """

    __slots__ = ("backoff", "factor", "jitter", "max_attempts", "max_delay")
    max_attempts: int
    backoff: float
    factor: float
    max_delay: float
    jitter: float

    def __init__(
        self,
        *,
        max_attempts: int = 12,
        backoff: float = 1.0,
        factor: float = 2.0,
        max_delay: float = 600.0,
        jitter: float = 0.25,
    ) -> None:
        most = float(10 * 365 * 86400)
        checked = {
            "max_attempts": integer("max_attempts", max_attempts, 1, 62),
            "backoff": number("backoff", backoff, 0.0, most),
            "factor": number("factor", factor, 1.0, 1000.0),
            "max_delay": number("max_delay", max_delay, 0.0, most),
            "jitter": number("jitter", jitter, 0.0, 1.0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def as_dict(self) -> dict[str, float]:
        """Return what it was made of."""
        return {
            "max_attempts": self.max_attempts,
            "backoff": self.backoff,
            "factor": self.factor,
            "max_delay": self.max_delay,
            "jitter": self.jitter,
        }

    def delay(self, attempt: int, random: float = 0.5) -> float:
        """Seconds to wait after the failure of an attempt.

        Args:
            attempt: 1 for the first.
            random: from 0 (the shortest wait) to 1 (the longest).
        """
        steps = min(max(attempt, 1) - 1, 100)  # 1000 ** 100 still is a float
        wait = min(self.backoff * self.factor**steps, self.max_delay)
        return wait * (1.0 + self.jitter * (2.0 * random - 1.0))


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Compaction.__module__ = "millstream"
Retention.__module__ = "millstream"
RetryPolicy.__module__ = "millstream"
