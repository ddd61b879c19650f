"""Opening stores and streams for the verbs that do not create them, and reading offsets."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from millstream import Store, Stream
    from millstream.stream import Start

Mode = Literal["r", "rw"]
PARTS = {"members", "queues", "store.json", "streams"}


def find_store(path: str) -> None:
    """Raise NotFound where there is nothing of a store, so that no verb but `append` makes one."""
    from millstream.errors import NotFound

    if not os.path.isdir(path):
        raise NotFound(f"{path}: no such store")
    if not PARTS.intersection(os.listdir(path)):
        raise NotFound(f"{path}: not a store: it has none of {', '.join(sorted(PARTS))}")


@contextmanager
def opened(path: str, mode: Mode = "r") -> Iterator[Store]:
    """Open a store that exists, for reading unless said otherwise."""
    import millstream

    find_store(path)
    with millstream.open(path, mode=mode) as store:
        yield store


def existing(store: Store, name: str) -> Stream:
    """Return a stream that exists."""
    from millstream.errors import NotFound

    names = list(store.streams())
    if name not in names:
        there = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "none"
        raise NotFound(f"no stream {name!r} in this store; there are: {there}")
    return store.stream(name)


def parse_start(text: str) -> Start:
    """Read what `-o` takes: an offset, -N for the last N, a name, or an ISO 8601 timestamp.

    A timestamp without a zone is local time, as `date` and `journalctl --since` have it.
    """
    if text in ("earliest", "beginning"):
        return "earliest"
    if text in ("latest", "end"):
        return "latest"
    if re.fullmatch(r"-?[0-9]{1,19}", text):
        return int(text)
    moment = datetime.fromisoformat(text)  # ValueError tells argparse
    return moment.astimezone(UTC)
