"""One thread that sleeps on a queue's futexes for the coroutines of a loop, and wakes them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from millstream.queue import Queue

Place = Literal["message", "room"]


class _Sleeper(NamedTuple):
    place: Place
    ticket: int
    deadline: float
    future: asyncio.Future[None]


class _Lane:
    """The sleepers of one place, and their thread."""

    def __init__(self, queue: Queue, place: Place, loop: asyncio.AbstractEventLoop) -> None:
        self.queue, self.place, self.loop = queue, place, loop
        self.sleepers: list[_Sleeper] = []
        self.lock = threading.Lock()
        self.asked = threading.Event()
        self.stopped = False
        self.thread = threading.Thread(target=self._run, name="millstream-aget", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            self.asked.wait()
            with self.lock:
                if not self.sleepers:
                    self.asked.clear()
            if self.stopped or self.queue.closed or self.loop.is_closed():
                self._wake()
                return
            with self.lock:
                if not self.sleepers:
                    continue
                first = min(sleeper.deadline for sleeper in self.sleepers)
                # An older ticket than the futex has ends the sleep at once, as it should.
                ticket = min(sleeper.ticket for sleeper in self.sleepers)
            with contextlib.suppress(Exception):  # the coroutine meets the same at its next try
                self.queue._sleep(self.place, ticket, max(first - time.monotonic(), 0.0))
            self._wake()

    def _wake(self) -> None:
        with self.lock:
            woken, self.sleepers = self.sleepers, []
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self.loop.call_soon_threadsafe(_finish, woken)


class Waiter:
    """The sleepers of one queue in one event loop."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.loop = asyncio.get_running_loop()
        self._lanes: dict[Place, _Lane] = {}

    def usable(self) -> bool:
        """Is it that of the loop that runs now?"""
        return self.loop is asyncio.get_running_loop()

    async def wait(self, place: Place, ticket: int, deadline: float) -> None:
        """Return when something may be there, after a while, or at the deadline."""
        lane = self._lanes.get(place)
        if lane is None or not lane.thread.is_alive():
            lane = self._lanes[place] = _Lane(self.queue, place, self.loop)
        future = self.loop.create_future()
        with lane.lock:
            lane.sleepers.append(_Sleeper(place, ticket, deadline, future))
        lane.asked.set()
        try:
            await future
        except asyncio.CancelledError:
            if not self.queue.closed:
                self.queue._wake(place, 1)  # the one that was meant for us
            raise

    def stop(self) -> None:
        """End the threads."""
        for lane in self._lanes.values():
            lane.stopped = True
            lane.asked.set()


def _finish(sleepers: list[_Sleeper]) -> None:
    for sleeper in sleepers:
        if not sleeper.future.done():
            sleeper.future.set_result(None)
