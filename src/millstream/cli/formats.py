r"""How `cat` and `tail` write a record: as it is, as JSON, or by a format like kcat's.

    %s value    %S its length   %k key    %K its length    %h headers (name=value,name=value)
    %o offset   %p partition    %t stream  %T timestamp in milliseconds            %% a percent
    %{name} a field of a value that is a JSON object, nothing where there is none
    \n \t \r \0 \\ \xHH        as in C

A null value or key is written as nothing, with the length -1; `--json` tells null from empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from millstream.cli.output import text_or_base64, to_json

if TYPE_CHECKING:
    from millstream import Batch


class Record(NamedTuple):
    """One record with all that can be said about it; the timestamp is in microseconds."""

    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]


Writer = Callable[[Record], bytes]

TOKENS: dict[str, Writer] = {
    "s": lambda record: record.value or b"",
    "S": lambda record: length(record.value),
    "k": lambda record: record.key or b"",
    "K": lambda record: length(record.key),
    "o": lambda record: b"%d" % record.offset,
    "p": lambda record: b"%d" % record.partition,
    "T": lambda record: b"%d" % (record.timestamp // 1000),
    "h": lambda record: b",".join(
        name.encode() + b"=" + data for name, data in record.headers.items()
    ),
}
ESCAPES = {"n": b"\n", "t": b"\t", "r": b"\r", "0": b"\0", "\\": b"\\"}
PIECE = re.compile(r"%(\{[^}]*\}|.)|\\x([0-9a-fA-F]{2})|\\(.)|([^%\\]+)|(.)", re.DOTALL)


def length(data: bytes | None) -> bytes:
    """Return a length as text; -1 for null."""
    return b"%d" % (-1 if data is None else len(data))


def compile_format(text: str, stream: str) -> Writer:
    """Return the writer of a format; ValueError says which token does not exist."""
    pieces: list[bytes | Writer] = []
    for token, code, escape, plain, alone in PIECE.findall(text):
        if token == "%" or plain:
            pieces.append((plain or "%").encode("utf-8", "surrogateescape"))
        elif token == "t":
            pieces.append(stream.encode())
        elif token in TOKENS:
            pieces.append(TOKENS[token])
        elif token[1:]:
            pieces.append(partial(field, token[1:-1]))
        elif code:
            pieces.append(bytes.fromhex(code))
        elif escape in ESCAPES:
            pieces.append(ESCAPES[escape])
        else:
            what = f"%{token}" if token else f"\\{escape}" if escape else alone
            raise ValueError(f"unknown token {what!r} in the format")
    return lambda record: b"".join(
        piece if isinstance(piece, bytes) else piece(record) for piece in pieces
    )


def field(name: str, record: Record) -> bytes:
    """Return a field of a JSON object: text as it is, all else as JSON."""
    import json

    try:
        found = json.loads(record.value or b"").get(name, "")
    except (ValueError, AttributeError):  # no JSON, or no object
        return b""
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")


def json_writer(stream: str) -> Writer:
    """Return a writer of one JSON object a line."""

    def write(record: Record) -> bytes:
        fields: dict[str, Any] = {
            "stream": stream,
            "partition": record.partition,
            "offset": record.offset,
            "timestamp": timestamp_text(record.timestamp),
            "key": None if record.key is None else text_or_base64(record.key),
            "value": None if record.value is None else text_or_base64(record.value),
        }
        if record.headers:
            fields["headers"] = {
                name: text_or_base64(data) for name, data in record.headers.items()
            }
        return to_json(fields) + b"\n"

    return write


def raw_writer(end: bytes) -> Writer:
    """Return a writer of bare values, each with `end` behind it."""
    return lambda record: (record.value or b"") + end


def timestamp_text(micros: int) -> str:
    """Return a time as ISO 8601 in UTC, whatever its year."""
    from datetime import UTC, datetime, timedelta

    try:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)
    except OverflowError:
        import numpy as np

        return f"{np.datetime64(micros, 'us')}Z"
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def records_of(batch: Batch) -> Iterator[Record]:
    """Yield the records of a batch."""
    columns = zip(
        batch.offsets.tolist(),
        batch.timestamps.tolist(),
        batch.keys,
        batch.values,
        batch.headers,
        strict=True,
    )
    for offset, timestamp, key, value, headers in columns:
        yield Record(batch.partition, offset, timestamp, key, value, headers)
