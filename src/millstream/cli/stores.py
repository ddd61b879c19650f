"""Names that verbs are told: asking for them, opening what has them, saying which there are."""

from __future__ import annotations

import contextlib
import os
import re
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from millstream import NotFound, Queue, Store, Stream
    from millstream.options import Start

Mode = Literal["r", "rw"]
PARTS = {"members", "queues", "store.json", "streams"}
SHOWN = 8  # names, where one is not among them
NAMES = {
    "store": "directory of the store",
    "stream": "name of the stream",
    "queue": "name of the queue",
    "group": "name of the group",
}


def add_names(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add what a verb must be told: some of NAMES, in that order."""
    for name in names:
        parser.add_argument(name, metavar=name.upper(), help=NAMES[name])


def find_store(path: str) -> None:
    """Raise NotFound where there is nothing of a store: only verbs that say so make one."""
    from millstream import address
    from millstream.errors import NotFound

    if address.opener(path) is not None:  # of a server, which says so itself
        return
    path = address.directory(path)
    if not os.path.isdir(path):
        raise NotFound(f"{path}: no such store{like_it(path)}")
    if not PARTS.intersection(os.listdir(path)):
        raise NotFound(f"{path}: not a store: it has none of {', '.join(sorted(PARTS))}")


def like_it(path: str) -> str:
    """Return the name of a store beside a path that may have been meant."""
    parent, name = os.path.split(os.path.abspath(path))
    with contextlib.suppress(OSError), os.scandir(parent) as found:
        near = closest(name, [one.name for one in found if one.is_dir()])
        place = os.path.join(os.path.dirname(path), near)
        if near and PARTS.intersection(os.listdir(place)):
            return f"; did you mean {place}?"
    return ""


def closest(name: str, names: Iterable[str]) -> str:
    """Return the one of some names that is most like another, "" where none is."""
    import difflib

    return next(iter(difflib.get_close_matches(name, names, n=1)), "")


def unknown(what: str, name: str, names: Sequence[str]) -> NotFound:
    """Return the error of a name that is not there: it says what is, and what may be meant."""
    from millstream.errors import NotFound

    there = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") or "none"
    near = closest(name, names)
    hint = f"; did you mean {near!r}?" if near else ""
    return NotFound(f"no {what}; there are: {there}{hint}")


@contextmanager
def opened(path: str, mode: Mode = "r") -> Iterator[Store]:
    """Open a store that exists, or a server's, for reading unless said otherwise."""
    import millstream

    find_store(path)
    with millstream.open(path, mode=mode) as store:
        yield store


def existing(store: Store, name: str) -> Stream:
    """Return a stream that exists."""
    names = list(store.streams())
    if name not in names:
        also = " (a queue is called that: `millstream queue`)" if name in store.queues() else ""
        raise unknown(f"stream {name!r} in this store{also}", name, names)
    return store.stream(name)


def existing_queue(store: Store, name: str) -> Queue:
    """Return a queue that exists."""
    names = list(store.queues())
    if name not in names:
        also = " (a stream is called that)" if name in store.streams() else ""
        raise unknown(f"queue {name!r} in this store{also}", name, names)
    return store.queue(name)


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
