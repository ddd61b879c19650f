"""Records as messages of NATS: what headers say of keys, nulls, times and the user's headers."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from millstream._native import batch_of

if TYPE_CHECKING:
    from millstream import Batch

KEY, NULL, TIME, HEADERS = "Ms-Key", "Ms-Null", "Ms-Time", "Ms-Headers"
SEQUENCE = "Ms-Sequence"
PLAIN = re.compile(r"[!-~](?:[ -~]*[!-~])?")
NAME = re.compile(r"(?!Nats-|Ms-|Status$|Description$)[A-Za-z0-9][A-Za-z0-9_-]*")
CODED = "base64:"


def text_of(value: bytes) -> str:
    """Bytes as the value of a header: as they are where a line can have them."""
    try:
        plain = value.decode("ascii")
    except UnicodeDecodeError:
        plain = ""
    if PLAIN.fullmatch(plain) and not plain.startswith(CODED):
        return plain
    return CODED + base64.b64encode(value).decode()


def bytes_of(text: str) -> bytes:
    """What `text_of` was given."""
    if text.startswith(CODED):
        return base64.b64decode(text[len(CODED) :])
    return text.encode()


def headers_of(
    value: bytes | None,
    key: bytes | None,
    given: Mapping[str, bytes] | None,
    timestamp: int | None = None,
) -> dict[str, str]:
    """The headers of the message that a record becomes."""
    made: dict[str, str] = {}
    if value is None:
        made[NULL] = "1"
    if key is not None:
        made[KEY] = text_of(key)
    if timestamp is not None:
        made[TIME] = str(timestamp)
    if given:
        rest = {}
        for name, content in given.items():
            plain = text_of(content)
            if NAME.fullmatch(name) and not plain.startswith(CODED):
                made[name] = plain
            else:
                rest[name] = plain
        if rest:
            made[HEADERS] = json.dumps(rest)
    return made


def given_headers(found: Mapping[str, str]) -> dict[str, bytes]:
    """The user's headers of a message."""
    made = {name: bytes_of(text) for name, text in found.items() if NAME.fullmatch(name)}
    if HEADERS in found:
        made |= {name: bytes_of(text) for name, text in json.loads(found[HEADERS]).items()}
    return made


def microseconds(text: str) -> int:
    """A time as the server writes it, as microseconds since 1970."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    seconds = datetime.fromisoformat(f"{whole}+00:00").timestamp()
    return int(seconds) * 1_000_000 + int((fraction + "000000")[:6])


class Stored:
    """A stored message, as a direct read gives it."""

    __slots__ = ("data", "headers", "sequence", "subject")

    def __init__(self, message: Any) -> None:
        self.headers: Mapping[str, str] = message.headers
        self.data: bytes = message.data
        self.sequence = int(self.headers["Nats-Sequence"])
        self.subject = self.headers["Nats-Subject"]

    @property
    def value(self) -> bytes | None:
        """The value of the record."""
        return None if NULL in self.headers else self.data

    @property
    def key(self) -> bytes | None:
        """Its key."""
        text = self.headers.get(KEY)
        return None if text is None else bytes_of(text)

    @property
    def timestamp(self) -> int:
        """Its own time, or when it was stored; microseconds."""
        text = self.headers.get(TIME)
        return microseconds(self.headers["Nats-Time-Stamp"]) if text is None else int(text)


def batch(partition: int, found: Sequence[Stored]) -> Batch:
    """The batch of some records that lie one behind the other."""
    import array

    first = found[0].sequence - 1
    offsets = None
    if found[-1].sequence - 1 - first != len(found) - 1:
        offsets = array.array("q", [one.sequence - 1 for one in found])
    keys = [one.key for one in found]
    headers = [given_headers(one.headers) for one in found]
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
