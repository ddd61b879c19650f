"""Where a function of a user failed: the tracebacks of dead letters, in a file beside the queue.

A line of JSON each, for people and for `DeadLetter.traceback`; the messages do not need it. What
is in it survives a kill of the process; nobody syncs it, and a full disk keeps nothing from dying.

A message is a dead letter before its line is written. So a line whose message is none when that is
asked behind the reading of the line belongs to nobody any more: dies the message again, it gets
another line. That is what `erase` goes by, at whatever instruction somebody was killed before.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from typing import TYPE_CHECKING

from millstream import _native
from millstream.disk import files
from millstream.errors import LockTimeout, NotFound, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["erase", "keep", "of_letters"]

NAME, BEFORE = "tracebacks", "tracebacks.before"
LINE = re.compile(rb'\{"id": ([0-9]{1,20}), "traceback": ".*"\}')
TEXT_MAX = 16 << 10
FILE_MAX = 4 << 20
"""A file that is longer takes the place of the one before it, and another begins."""
LOCK_SECONDS = 1.0


def keep(directory: files.Path, number: int, error: BaseException) -> None:
    """Keep the traceback of the error that a message died of, at most the last 16 KiB of it.

    `directory` is that of the queue. Where it cannot be kept that is logged.
    """
    with _native.loading:
        import json
        import traceback
    text = "".join(traceback.format_exception(error))
    if len(text) > TEXT_MAX:
        text = f"...\n{text[-TEXT_MAX:]}"
    line = json.dumps({"id": number, "traceback": text}).encode("ascii") + b"\n"
    with _reported(directory, f"the traceback of message {number} is not kept"):
        _append(directory, line)


def erase(directory: files.Path, dead: Callable[[], Iterable[int]]) -> None:
    """Remove the tracebacks of all messages but the dead letters; where that fails it is logged.

    `dead` gives the ids of the dead letters. After a kill the next call removes what is left.
    """
    with _reported(directory, "tracebacks of what is no dead letter any more are not erased"):
        if files.exists(directory / NAME) or files.exists(directory / BEFORE):
            _erase(directory, dead)


def _erase(directory: files.Path, dead: Callable[[], Iterable[int]]) -> None:
    with _locked(directory / NAME):
        found = {name: _lines(directory / name) for name in (BEFORE, NAME)}
        kept = set(dead())
        for name in files.names(directory):
            if name.startswith(f"{NAME}.") and name.endswith(".tmp"):
                files.remove(directory / name)  # of somebody who was killed
        # The file that is locked comes last: behind it another has its name, and may be locked.
        for name, lines in found.items():
            rest = [line for line in lines if _id_of(line) in kept]
            if not rest:
                files.remove(directory / name)
            elif len(rest) < len(lines):
                files.replace(directory / name, b"".join(line + b"\n" for line in rest))


@contextlib.contextmanager
def _reported(directory: files.Path, what: str) -> Iterator[None]:
    try:
        yield
    except (StorageError, LockTimeout, NotFound) as failed:
        logging.getLogger("millstream.queue").warning("%s: %s: %s", directory, what, failed)


@contextlib.contextmanager
def _locked(path: files.Path) -> Iterator[int]:
    """The file of that name, made where it is not there, and nobody else's meanwhile."""
    while True:
        descriptor = _opened(path)
        try:
            files.lock(descriptor, 0, path, timeout=LOCK_SECONDS)
            try:
                if files.inode(path) == files.inode(descriptor):  # not replaced while we waited
                    yield descriptor
                    return
            finally:
                files.unlock(descriptor, 0)
        finally:
            files.close(descriptor)


def _append(directory: files.Path, line: bytes) -> None:
    path = directory / NAME
    with _locked(path) as descriptor:
        end = files.size(descriptor)
        if end and files.read(descriptor, 1, end - 1, path) != b"\n":
            line = b"\n" + line  # somebody was killed in the middle of a line
        files.write(descriptor, line, end, path)
        if end + len(line) > FILE_MAX:
            files.rename(path, directory / BEFORE)


def _opened(path: files.Path) -> int:
    while True:
        with contextlib.suppress(NotFound):
            return files.open_file(path, write=True)
        try:
            return files.open_file(path, write=True, create=True)
        except StorageError as error:
            if error.errno != errno.EEXIST:  # else another process was quicker
                raise


def _lines(path: files.Path) -> list[bytes]:
    try:
        return files.content(path).splitlines()
    except NotFound:
        return []


def _id_of(line: bytes) -> int | None:
    """Whose line it is, without reading it whole; None: it was torn by a kill, or damaged."""
    found = LINE.fullmatch(line)
    return None if found is None else int(found[1])


def of_letters(directory: files.Path, ids: Iterable[int]) -> dict[int, str]:
    """The traceback of each of these messages that one was kept of: the last one."""
    wanted = set(ids)
    last: dict[int, bytes] = {}
    for name in (BEFORE, NAME):
        for line in _lines(directory / name):
            number = _id_of(line)
            if number is not None and number in wanted:
                last[number] = line
    with _native.loading:
        import json
    found = {}
    for number, line in last.items():
        with contextlib.suppress(ValueError, RecursionError):  # damaged
            found[number] = str(json.loads(line)["traceback"])
    return found
