"""Records as messages of Kafka: what headers say beside the user's own, and batches of messages."""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from millstream._native import batch_of

if TYPE_CHECKING:
    from millstream import Batch

STAMP = "Ms-Time"
"""Microseconds since 1970, where Kafka's milliseconds do not say all of a time."""
OURS, THEIRS = "Ms-", "Ms-User-"
"""A user's header that begins like ours is sent with a longer name."""
BATCH_BYTES = 61
"""What Kafka puts before the records of a batch."""
Headers = list[tuple[str, bytes]]


class Row:
    """A record that is to be sent. `timestamp`: milliseconds, 0 is now."""

    __slots__ = ("headers", "key", "timestamp", "value")

    def __init__(
        self, value: bytes | None, key: bytes | None, timestamp: int, headers: Headers | None
    ) -> None:
        self.value = value
        self.key = key
        self.timestamp = timestamp
        self.headers = headers

    @property
    def size(self) -> int:
        """Bytes of a batch of it alone, as the server counts them."""
        body = 3 + _field(self.key) + _field(self.value) + _varint(len(self.headers or ()))
        for name, content in self.headers or ():
            body += _field(name.encode()) + _field(content)
        return BATCH_BYTES + _varint(body) + body


def _varint(value: int) -> int:
    return (max(1, (value << 1).bit_length()) + 6) // 7


def _field(content: bytes | None) -> int:
    return 1 if content is None else _varint(len(content)) + len(content)


def row_of(
    value: bytes | None,
    key: bytes | None,
    given: Mapping[str, bytes] | None,
    stamp: int | None,
    log_append_time: bool,
) -> Row:
    """The message that a record becomes."""
    headers: Headers = []
    milliseconds = 0
    if stamp is not None:
        milliseconds = max(1, stamp // 1000)  # 0 says "now" to librdkafka
        if log_append_time or milliseconds * 1000 != stamp:
            headers.append((STAMP, b"%d" % stamp))
    for name, content in (given or {}).items():
        headers.append((THEIRS + name[3:] if name.startswith(OURS) else name, bytes(content)))
    return Row(value, key, milliseconds, headers or None)


def batch(partition: int, found: Sequence[Any]) -> Batch:
    """The batch of messages of one partition."""
    offsets = array.array("q", [one.offset() for one in found])
    keys = [one.key() for one in found]
    stamps = array.array("q", [one.timestamp()[1] * 1000 for one in found])
    headers: list[dict[str, bytes]] | None = None
    for index, listed in enumerate([one.headers() for one in found]):
        if not listed:
            continue
        if headers is None:
            headers = [{}] * len(found)
        made = {}
        for name, content in listed:
            if name == STAMP:
                stamps[index] = int(content)
            else:
                made[OURS + name[8:] if name.startswith(THEIRS) else name] = content or b""
        headers[index] = made
    first = offsets[0]
    return batch_of(
        partition,
        1,
        first,
        [one.value() for one in found],
        keys=keys if any(key is not None for key in keys) else None,
        headers=headers if headers is not None and any(headers) else None,
        timestamps=stamps,
        offsets=None if offsets[-1] - first == len(found) - 1 else offsets,
    )
