"""Waiting under gevent: in a real thread, while the hub runs other greenlets.

Imported, and asked, only where `gevent.monkey` was imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

THREADS = 64
"""How many greenlets of a hub sleep at once; the others wait for a place, a second at most."""

_rooms: dict[int, Any] = {}


def room() -> Callable[..., object] | None:
    """What calls a function in a real thread; None: this thread may sleep itself."""
    if not sys.modules["gevent.monkey"].is_module_patched("threading"):
        return None
    hub = sys.modules["gevent._hub_local"].get_hub_if_exists()
    if hub is None or hub.dead:  # a real thread without greenlets
        return None
    # A callback of its own, or a signal handler that came into one.
    if sys.modules["greenlet"].getcurrent() is hub:
        return None
    found = _rooms.get(id(hub))
    if found is None or found.hub is not hub:
        for gone in [key for key, pool in _rooms.items() if pool.hub is None or pool.hub.dead]:
            del _rooms[gone]
        found = _rooms[id(hub)] = sys.modules["gevent.threadpool"].ThreadPool(THREADS, hub=hub)
    apply: Callable[..., object] = found.apply
    return apply


def pause(seconds: float) -> None:
    """Let the other greenlets of this thread run."""
    sys.modules["gevent.hub"].sleep(seconds)
