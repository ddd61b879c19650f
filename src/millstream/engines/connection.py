"""What engines do alike whose client lives in an event loop: it runs in a thread of its own."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING, Any, TypeVar

from millstream.errors import Closed, Indeterminate

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["LoopConnection"]

Answer = TypeVar("Answer")


class LoopConnection:
    """Base of their connections."""

    address: Any
    loop: asyncio.AbstractEventLoop
    timeout: float
    _closed: bool
    _pid: int

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def check_open(self) -> None:
        """Raise Closed where it is."""
        if self._closed or self._pid != os.getpid():
            raise Closed(f"{self.address.shown}: the store is closed; open it again")

    def _on_loop(self, work: Coroutine[Any, Any, Answer], seconds: float | None) -> Answer:
        if self._closed or self._pid != os.getpid():
            work.close()
            self.check_open()
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(None if seconds is None else seconds + 1)
        except BaseException:
            future.cancel()
            raise

    def unsure(self, what: str) -> Indeterminate:
        """The error of a message that was sent, and for which no answer came."""
        return Indeterminate(
            errno.ETIMEDOUT,
            f"{what}: the server did not answer within {self.timeout:g} s, so it may be stored or"
            " not; look before it is sent again, or send it with a producer",
            self.address.shown,
        )
