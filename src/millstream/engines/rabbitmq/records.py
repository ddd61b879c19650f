"""Records as messages of AMQP 1.0, as RabbitMQ's streams hold them and any client reads them.

The value is the body, the headers are application properties; names that begin with ``ms-`` say
what AMQP has no place for.
"""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from millstream._native import batch_of

if TYPE_CHECKING:
    from millstream import Batch

OURS = "ms-"
KEY, NULL, TIME, TAG, ESCAPED = "ms-key", "ms-null", "ms-time", "ms-tag", "ms-h-"
PROPERTIES, DATA, ANY_MAP, BINARY = b"\x00\x53\x74", b"\x00\x53\x75", 0xD1, b"\xb0"


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return b"\xb1" + len(raw).to_bytes(4, "big") + raw


def _binary(value: bytes) -> bytes:
    return BINARY + len(value).to_bytes(4, "big") + value


def encoded(
    value: bytes | None,
    key: bytes | None,
    headers: Mapping[str, bytes] | None,
    timestamp: int | None,
    tag: bytes,
) -> bytes:
    """A record as a message; `tag` finds it again."""
    items = [_text(TAG), _binary(tag)] if tag else []
    if value is None:
        items += _text(NULL), b"\x41"
    if key is not None:
        items += _text(KEY), _binary(key)
    if timestamp is not None:
        items += _text(TIME), b"\x81" + timestamp.to_bytes(8, "big", signed=True)
    for name, content in (headers or {}).items():
        items += _text(ESCAPED + name if name.startswith(OURS) else name), _binary(content)
    made = b""
    if items:
        body = len(items).to_bytes(4, "big") + b"".join(items)
        made = PROPERTIES + bytes([ANY_MAP]) + len(body).to_bytes(4, "big") + body
    return made + DATA + _binary(value or b"")


def _of_ours(data: bytes) -> tuple[bytes, dict[str, Any]] | None:
    """Body and properties of a message that `encoded` made; None for one of others."""
    found: dict[str, Any] = {}
    at = 0
    if data[:3] == PROPERTIES:
        if data[3] != ANY_MAP:
            return None
        at = 12
        name = None
        for _ in range(int.from_bytes(data[8:12], "big")):
            code = data[at]
            at += 1
            item: Any
            if code in (0xB0, 0xB1):
                size = int.from_bytes(data[at : at + 4], "big")
                at += 4
                item = data[at : at + size]
                at += size
                if code == 0xB1:
                    item = item.decode("utf-8", "surrogateescape")
            elif code == 0x41:
                item = True
            elif code == 0x81:
                item = int.from_bytes(data[at : at + 8], "big", signed=True)
                at += 8
            else:
                return None
            if name is None:
                name = item
            else:
                found[name] = item
                name = None
    if data[at : at + 4] != DATA + BINARY:
        return None
    begin = at + 8
    size = int.from_bytes(data[at + 4 : begin], "big")
    return (data[begin:], found) if begin + size == len(data) else None


def _of_others(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Body and properties of a message that somebody else wrote."""
    from rstream import amqp_decoder

    message = amqp_decoder(data)
    body = message.body
    if not isinstance(body, bytes):
        body = b"".join(map(bytes, body)) if isinstance(body, list) else str(body).encode()
    given = {}
    for name, item in (message.application_properties or {}).items():
        text = name.decode() if isinstance(name, bytes) else str(name)
        given[text] = item if isinstance(item, bytes) else str(item).encode()
    return body, given


class Stored:
    """A stored record."""

    __slots__ = ("_found", "body", "offset", "time")

    def __init__(self, offset: int, time: int, data: bytes) -> None:
        self.offset = offset
        self.time = time
        self.body, self._found = _of_ours(data) or _of_others(data)

    @property
    def sequence(self) -> int:
        """One more than its offset."""
        return self.offset + 1

    @property
    def tag(self) -> bytes:
        """What its writer finds it by."""
        tag: bytes = self._found.get(TAG, b"")
        return tag

    @property
    def value(self) -> bytes | None:
        """The value of the record."""
        return None if NULL in self._found else self.body

    @property
    def key(self) -> bytes | None:
        """Its key."""
        key: bytes | None = self._found.get(KEY)
        return key

    @property
    def timestamp(self) -> int:
        """Its own time, or when it was stored; microseconds."""
        return int(self._found.get(TIME, self.time * 1000))

    @property
    def headers(self) -> dict[str, bytes]:
        """The user's headers."""
        return {
            name.removeprefix(ESCAPED): item
            for name, item in self._found.items()
            if not name.startswith(OURS) or name.startswith(ESCAPED)
        }


def batch(partition: int, found: Sequence[Stored]) -> Batch:
    """The batch of some records that lie one behind the other."""
    first = found[0].offset
    offsets = None
    if found[-1].offset - first != len(found) - 1:
        offsets = array.array("q", [one.offset for one in found])
    keys = [one.key for one in found]
    headers = [one.headers for one in found]
    return batch_of(
        partition,
        1,
        first,
        [one.value for one in found],
        keys=keys if any(key is not None for key in keys) else None,
        headers=headers if any(headers) else None,
        timestamps=array.array("q", [one.timestamp for one in found]),
        offsets=offsets,
    )
