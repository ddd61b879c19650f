"""Streams that nothing bounds: how large one may get before it is pointed out."""

from __future__ import annotations

import warnings

from millstream import _native
from millstream.disk import files
from millstream.errors import MillstreamWarning
from millstream.log import compacted, settings
from millstream.options import Retention

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream.log.handle import StreamHandle

__all__ = ["LARGE_BYTES"]

LARGE_BYTES = 1 << 30
FREE_SHARE = 10

_warned = False


def is_bounded(stream: StreamHandle) -> bool:
    """Is there a retention, or a compaction?"""
    return stream.retention != Retention() or stream.compaction is not None


def is_large(stream: StreamHandle, log_bytes: int, large_bytes: int | None = None) -> bool:
    """Is it as large as `large_bytes` (default 1 GiB), or a tenth of the disk that is free?"""
    if log_bytes >= (LARGE_BYTES if large_bytes is None else large_bytes):
        return True
    return log_bytes * FREE_SHARE >= files.free_bytes(stream.path) and log_bytes > 0


def describe(log_bytes: int) -> str:
    """What is wrong with an unbounded stream that large, and what to do."""
    return (
        f"{log_bytes / (1 << 20):,.1f} MiB of log, and neither retention nor compaction: it grows"
        " until the disk is full. Say how much is kept: alter(retention=Retention(age=...)),"
        ' where all is to be kept Retention(bytes="1TiB")'
    )


def check(stream: StreamHandle) -> None:
    """Warn, once a process, of a stream that nothing bounds and that has become large.

    In the background, when a partition has gone on to another segment.
    """
    global _warned
    if _warned or is_bounded(stream) or not settings.is_name(stream.name):  # no name: the journal
        return
    log_bytes = sum(compacted.extent(log)[0] for log in stream._opened())
    if not is_large(stream, log_bytes):
        return
    _warned = True
    try:
        warnings.warn(f"{stream.path}: {describe(log_bytes)}", MillstreamWarning, stacklevel=2)
    except MillstreamWarning as raised:  # the filters say "error", and here is nobody to catch it
        with _native.loading:
            import logging
        logging.getLogger("millstream").warning("%s", raised)
