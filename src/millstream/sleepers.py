"""Threads for the coroutines of an event loop: one that sleeps on a futex, some that sync."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

from millstream import _native
from millstream.errors import Reentered

IDLE_SECONDS = 1.0
"""How long a thread stays that nobody waits for, while its loop goes on."""
END_SECONDS = 5.0
CALLS_MOST = 32
"""Calls of one loop and queue that are in threads at a time."""


class _Sleeper(NamedTuple):
    ticket: int
    deadline: float
    future: asyncio.Future[None]


class Sleepers:
    """The coroutines of one loop that wait for the same, and their thread.

    The thread begins with the first wait. It ends when the loop ends (as `asyncio.run` ends it), at
    `stop`, or when nobody has waited for a second. None is left behind when `asyncio.run` returns.

    Args:
        name: of the thread.
        sleep: called there with the oldest ticket and with seconds: sleeps so long, maybe less.
        wake: ends such a sleep.
    """

    def __init__(
        self, name: str, sleep: Callable[[int, float], object], wake: Callable[[], object]
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.name = name
        self._sleep = sleep
        self._wake = wake
        self._lock = _native.Lock(f"{name}: coroutines that wait", reentrant=True)
        self._asked = _native.Flag()
        self._waiting: list[_Sleeper] = []
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._ending: AsyncGenerator[None, None] | None = None

    @property
    def over(self) -> bool:
        """Can nobody wait here any more?"""
        return self._stopped or self.loop.is_closed()

    async def wait(self, ticket: int, deadline: float) -> None:
        """Return when something may be there, after a while, or at the deadline.

        Raises what the sleep raised, StorageError where there can be no thread. Where it is
        cancelled, who slept for it is woken.
        """
        if self._ending is None:
            # The loop closes its asynchronous generators when it ends: it has no other hook.
            self._ending = self._until_the_loop_ends()
            await anext(self._ending)
        sleeper = _Sleeper(ticket, deadline, self.loop.create_future())
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self.name, daemon=True)
                _native.start(thread, self.name)
                self._thread = thread
            self._waiting.append(sleeper)
        self._asked.set()
        try:
            await sleeper.future
        except asyncio.CancelledError:
            with self._lock:
                self._waiting = [one for one in self._waiting if one is not sleeper]
            raise

    async def _until_the_loop_ends(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """End the thread; those who wait are woken, and check again."""
        with self._lock:
            self._stopped = True
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        self._asked.set()
        with contextlib.suppress(Exception):  # closed meanwhile: nothing is slept on any more
            self._wake()
        with contextlib.suppress(Reentered):  # it ends when the call under this one has returned
            _native.join(thread, END_SECONDS)

    def _run(self) -> None:
        while True:
            asked = self._asked.wait(IDLE_SECONDS)
            with self._lock:
                waiting = self._waiting
                if self.over or not (asked or waiting):
                    self._thread = None
                    break
                if not waiting:
                    self._asked.clear()
                    continue
                first = min(sleeper.deadline for sleeper in waiting)
                # An older ticket than the futex has ends the sleep at once, as it should.
                ticket = min(sleeper.ticket for sleeper in waiting)
            error: BaseException | None = None
            try:
                self._sleep(ticket, max(first - time.monotonic(), 0.0))
            except BaseException as caught:  # handed to the waiter, and raised there
                error = caught
            self._finish(error)
        self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        with self._lock:
            woken, self._waiting = self._waiting, []
        if woken:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self.loop.call_soon_threadsafe(_wake_up, woken, error)


def _wake_up(sleepers: list[_Sleeper], error: BaseException | None) -> None:
    for sleeper in sleepers:
        if sleeper.future.done():
            continue
        if error is None:
            sleeper.future.set_result(None)
        else:
            sleeper.future.set_exception(error)


class Calls:
    """Calls that block, each in a thread, for the coroutines of one loop.

    Not asyncio's executor, whose lock a fork in a signal handler would wait for, and whose end
    takes another thread. When the loop ends (as `asyncio.run` ends it), those under way are
    awaited.
    """

    def __init__(self, name: str, path: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.name = name
        self.path = path
        self._room = asyncio.Semaphore(CALLS_MOST)
        self._threads: list[threading.Thread] = []
        self._ending: AsyncGenerator[None, None] | None = None

    @property
    def over(self) -> bool:
        """Can nothing be called here any more?"""
        return self.loop.is_closed()

    async def call(self, function: Callable[[], Any]) -> Any:
        """What the function returns or raises. StorageError where there can be no thread.

        Where this is cancelled behind the beginning, the function goes on.
        """
        if self._ending is None:
            self._ending = self._until_the_loop_ends()
            await anext(self._ending)
        async with self._room:
            future: asyncio.Future[Any] = self.loop.create_future()
            thread = threading.Thread(
                target=self._run, args=(function, future), name=self.name, daemon=True
            )
            _native.start(thread, self.path)
            self._threads = [one for one in self._threads if one.is_alive()]
            self._threads.append(thread)
            return await future

    async def _until_the_loop_ends(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            for thread in self._threads:
                with contextlib.suppress(Reentered):  # it ends when the call under this one has
                    _native.join(thread, END_SECONDS)

    def _run(self, function: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        found: Any = None
        error: BaseException | None = None
        try:
            found = function()
        except StopIteration as caught:  # which no future can have
            error = RuntimeError(f"what was called raised {caught!r}")
        except BaseException as caught:  # handed to the waiter, and raised there
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self.loop.call_soon_threadsafe(_finish, future, found, error)


def _finish(future: asyncio.Future[Any], found: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(found)
    else:
        future.set_exception(error)
