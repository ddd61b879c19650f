"""Where a function of a user failed: the tracebacks of dead letters, in a file beside the queue.

A line of JSON each, for people and for `DeadLetter.traceback`; the messages do not need it. What
is in it survives a kill of the process; nobody syncs it, and a full disk keeps nothing from dying.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Any

from millstream import _native
from millstream.disk import files
from millstream.errors import LockTimeout, NotFound, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = ["keep", "of_letters"]

NAME, BEFORE = "tracebacks", "tracebacks.before"
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
    try:
        _append(directory, line)
    except (StorageError, LockTimeout, NotFound) as failed:
        log = logging.getLogger("millstream.queue")
        log.warning("%s: the traceback of message %d is not kept: %s", directory, number, failed)


def _append(directory: files.Path, line: bytes) -> None:
    path = directory / NAME
    descriptor = _opened(path)
    try:
        files.lock(descriptor, 0, path, timeout=LOCK_SECONDS)
        try:
            end = files.size(descriptor)
            if end and files.read(descriptor, 1, end - 1, path) != b"\n":
                line = b"\n" + line  # somebody was killed in the middle of a line
            files.write(descriptor, line, end, path)
            if end + len(line) > FILE_MAX and files.inode(path) == files.inode(descriptor):
                files.rename(path, directory / BEFORE)
        finally:
            files.unlock(descriptor, 0)
    finally:
        files.close(descriptor)


def _opened(path: files.Path) -> int:
    while True:
        with contextlib.suppress(NotFound):
            return files.open_file(path, write=True)
        try:
            return files.open_file(path, write=True, create=True)
        except StorageError as error:
            if error.errno != errno.EEXIST:  # else another process was quicker
                raise


def of_letters(directory: files.Path, ids: Iterable[int]) -> dict[int, str]:
    """The traceback of each of these messages that one was kept of: the last one."""
    wanted = set(ids)
    found: dict[int, str] = {}
    for name in (BEFORE, NAME):
        try:
            content = files.content(directory / name)
        except NotFound:
            continue
        with _native.loading:
            import json
        for line in content.splitlines():
            try:
                said: Any = json.loads(line)
                number, text = said["id"], said["traceback"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # torn by a kill, or damaged
            if isinstance(text, str) and isinstance(number, int) and number in wanted:
                found[number] = text
    return found
