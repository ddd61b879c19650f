"""For the tests of programs that use millstream: a clock to advance, and a store to throw away.

With pytest, ``pytest_plugins = ["millstream.testing"]`` in the topmost `conftest.py`, or an import
of `store` there, gives the fixture `store`. Without pytest, `clock` and `millstream.temporary` are
all that is needed.

Processes that a test starts take their clock from the environment: with ``MILLSTREAM_CLOCK=+86400``
all clocks of millstream in such a process, and in what it starts, are a day ahead of the machine's
from its first import on. Its sleepers look every 2 ms. They share stores with processes of other
skews, as machines do whose clocks differ: a lease ends by the clock of who looks. With a number
below 0 only the wall clock is set back; no time passes backwards. `clock` begins from there.

>>> import os, subprocess, sys, millstream
>>> with millstream.temporary() as store:
...     _ = store.queue("reminders").put(b"water the plants", delay=86400)
...     code = f"import millstream as m; m.open({store.path!r}).queue('reminders').get(timeout=5)"
...     command = [sys.executable, "-c", code]
...     tomorrow = {**os.environ, "MILLSTREAM_CLOCK": "+86401"}
...     subprocess.run(command, env=tomorrow).returncode
0
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from millstream import _native
from millstream.errors import InvalidArgument
from millstream.options import number
from millstream.store.store import Store, temporary

__all__ = ["Clock", "clock", "store"]

_running: list[Clock] = []


class Clock:
    """The virtual clock of this process; `clock` makes it."""

    def __init__(self) -> None:
        self._skew_ns = 0
        self._set_ns = 0

    def __repr__(self) -> str:
        state = f"{self._skew_ns / 1e9:g} s ahead" if self in _running else "ended"
        return f"<Clock: {state}>"

    @property
    def now(self) -> float:
        """Seconds since 1970 of the virtual clock."""
        return _native.wall_us() / 1e6

    def advance(self, seconds: float) -> float:
        """Let seconds pass at once; return the new `now`.

        Sleepers in this process see it within a few milliseconds, everybody else at their next
        call. Queues count on being used once a month: pass longer times in steps, with a call
        between. What ends at the same moment (a lease and its renewal) may come in either order: to
        see a lease renewed, advance by less than it, more than once.

        Raises: InvalidArgument for a negative number: time does not run backwards.
        """
        number("seconds", seconds, 0, 100 * 365.25 * 86400)
        if self not in _running:
            raise InvalidArgument("this clock has ended with its block")
        self._skew_ns += round(seconds * 1e9)
        _native.set_clock(True, self._skew_ns, self._set_ns)
        return self.now

    def set_wall(self, seconds: float) -> float:
        """Set the wall clock ahead by seconds, or back where they are negative; return `now`.

        As an administrator or NTP does it: no time passes, so that delays, leases and ages do not
        change; what is to be delivered at a time of day is.

        Raises: InvalidArgument for more than a hundred years.

        >>> import millstream
        >>> with clock() as time, millstream.temporary() as store:
        ...     queue = store.queue("q")
        ...     at = int((time.now + 3600) * 1e6)
        ...     _ = queue.put(b"at a time", at=at), queue.put(b"after an hour", delay=3600)
        ...     _ = time.set_wall(+3601)
        ...     [message.value for message in queue.get_many(2, timeout=5)]
        [b'at a time']
        """
        number("seconds", seconds, -100 * 365.25 * 86400, 100 * 365.25 * 86400)
        if self not in _running:
            raise InvalidArgument("this clock has ended with its block")
        self._set_ns += round(seconds * 1e9)
        _native.set_clock(True, self._skew_ns, self._set_ns)
        return self.now


@contextlib.contextmanager
def clock() -> Iterator[Clock]:
    """Run this process on a virtual clock, so that leases and delays pass without sleeping.

    The clock begins at the real time, goes on at the usual pace, and jumps when told to. It is the
    clock of this process only: a store that others have open as well has two times meanwhile. Make
    the store inside the block: leases given there end in the virtual time.

    Yields: the `Clock`.

    >>> import millstream
    >>> from millstream.testing import clock
    >>> with clock() as time, millstream.temporary() as store:
    ...     reminders = store.queue("reminders")
    ...     _ = reminders.put(b"water the plants", delay=86400 * 7)
    ...     _ = time.advance(86400 * 6)
    ...     print(reminders.get_many(1, timeout=0))
    ...     _ = time.advance(86400)
    ...     with reminders.get(timeout=5) as message:
    ...         print(message.value)
    []
    b'water the plants'
    """
    if _running:
        raise RuntimeError("the virtual clock of this process is running already")
    virtual = Clock()
    _running.append(virtual)
    _native.set_clock(True, 0)
    try:
        yield virtual
    finally:
        _native.set_clock(False, 0)
        _running.remove(virtual)


def _store() -> Iterator[Store]:
    """A store in a temporary directory, removed after the test."""
    with temporary(durability="process") as made:
        yield made


try:
    import pytest
except ImportError:  # `clock` needs none
    store = contextlib.contextmanager(_store)
else:
    store = pytest.fixture(name="store")(_store)
