"""The two errors of queues that are the standard library's as well.

Not with the others in `errors`: the module `queue`, whose they are, imports `threading` and more,
half of what importing millstream takes. Whoever has a queue pays for it.
"""

from __future__ import annotations

import queue

from millstream.errors import MillstreamError

__all__ = ["Empty", "QueueFull"]


class QueueFull(MillstreamError, queue.Full):
    """As many messages as the queue holds are not finished. Nothing was stored.

    A ``queue.Full`` of the standard library.

    What to do: put later or with a longer `timeout`, take more, or raise `capacity` with
    `alter`.
    """


class Empty(MillstreamError, queue.Empty):
    """No message was ready in time. A ``queue.Empty`` of the standard library.

    What to do: get again; where it does not come by itself, see `stats()`: delayed, leased,
    paused?
    """


QueueFull.__module__ = Empty.__module__ = "millstream"
