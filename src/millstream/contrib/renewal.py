"""Leases of drop-ins whose frameworks run a task for as long as it takes."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from millstream import Closed, LeaseLost, MillstreamError

if TYPE_CHECKING:
    from millstream import Message

__all__ = ["AGAIN_SECONDS_MAX", "Renewal"]

LOGGER = logging.getLogger("millstream")
AGAIN_SECONDS_MAX = 300.0
"""Until a task runs again whose outcome could not be kept, since the disk is full, say."""


class Renewal:
    """The leases that this process holds, renewed by a thread until they end."""

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._messages: dict[int, Message] = {}
        self._over = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, message: Message) -> None:
        """Renew it from now on."""
        if self._thread is None:
            with self._starting:
                self._start()
        self._messages[id(message)] = message

    def leave(self, message: Message) -> None:
        """Renew it no more."""
        self._messages.pop(id(message), None)

    def _start(self) -> None:
        if self._thread is None:
            name = "millstream-renewal"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._lease / 3):
            for message in list(self._messages.values()):
                try:
                    message.extend(self._lease)
                except (LeaseLost, Closed):  # or it has just ended; who acknowledges it is told
                    self._messages.pop(id(message), None)
                except MillstreamError:
                    if not self._over.is_set():
                        LOGGER.exception("the lease of %r is not renewed", message)

    def end(self) -> None:
        """Renew nothing more."""
        self._over.set()
