"""The configuration of streams: what users give, checked, and what `stream.json` holds of it."""

from __future__ import annotations

import os

from millstream.errors import ConfigMismatch, InvalidArgument, InvalidType
from millstream.files import FORMAT
from millstream.options import DURABILITIES, Compaction, Retention, integer, parse_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from millstream.options import Durability

NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
PARTITIONS_MAX = 4096
SEGMENT_BYTES = 128 << 20


def is_name(name: str) -> bool:
    """Can a stream be called that?"""
    return 0 < len(name) <= 128 and name[0] != "." and NAME_CHARACTERS.issuperset(name)


def check_name(name: str) -> str:
    """Names never become paths: a short list of characters, no leading dot."""
    if not isinstance(name, str):
        raise InvalidType(f"name {name!r}: expected str")
    if not is_name(name):
        raise InvalidArgument(
            f"name {name!r:.80}: expected 1 to 128 characters of A-Z a-z 0-9 . _ - without a"
            " leading dot"
        )
    return name


def check_partitions(partitions: int) -> int:
    """How many partitions a stream can have."""
    return integer("partitions", partitions, 1, PARTITIONS_MAX)


def check_segment_bytes(size: int | str) -> int:
    """The size rounded up to pages."""
    size = parse_bytes(size)
    if not 1 << 16 <= size <= 2 << 30:
        raise InvalidArgument(f"segment_bytes {size!r}: expected from 64 KiB to 2 GiB")
    return size + 4095 & ~4095


def check_durability(durability: Any) -> Durability | None:
    """One of the levels, or None."""
    known = isinstance(durability, str) and durability in DURABILITIES
    if durability is not None and not known:
        raise InvalidArgument(
            f"durability {durability!r}: expected one of {', '.join(DURABILITIES)}"
        )
    checked: Durability | None = durability
    return checked


def retention_config(retention: Any) -> dict[str, Any]:
    """A retention as `stream.json` has it; None: everything is kept."""
    if retention is None:
        retention = Retention()
    if not isinstance(retention, Retention):
        raise InvalidType(f"retention {retention!r}: expected a millstream.Retention or None")
    return {"bytes": retention.bytes, "age": retention.age, "records": retention.records}


def compaction_config(compact: Any) -> dict[str, Any] | None:
    """A compaction as `stream.json` has it; None: there is none."""
    if compact is not None and not isinstance(compact, Compaction):
        raise InvalidType(f"compact {compact!r}: expected a millstream.Compaction or None")
    return None if compact is None else compact.as_dict()


def compaction_of(config: dict[str, Any]) -> Compaction | None:
    """The compaction that a `stream.json` has."""
    stored = config.get("compact")
    return None if stored is None else Compaction(**stored)


def check_config(name: str, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise `ConfigMismatch` where what was given is not what is stored."""
    for field, value in given.items():
        if value is not None and stored.get(field) != value:
            advice = (
                "it can only grow, by add_partitions()"
                if field == "partitions"
                else "change it with alter()"
            )
            raise ConfigMismatch(
                f"stream {name!r} has {field} {stored.get(field)}, not {value}; {advice}"
            )


def given(
    partitions: int | None,
    retention: Retention | None,
    segment_bytes: int | str | None,
    compact: Compaction | None = None,
) -> dict[str, Any]:
    """What the caller of `Store.stream` asks for, checked; None: whatever is stored."""
    return {
        "partitions": None if partitions is None else check_partitions(partitions),
        "segment_bytes": None if segment_bytes is None else check_segment_bytes(segment_bytes),
        "retention": None if retention is None else retention_config(retention),
        "compact": compaction_config(compact),
    }


def new(asked: dict[str, Any], durability: Durability | None) -> dict[str, Any]:
    """The configuration of a new stream."""
    return {
        "format": FORMAT,
        "stream_id": os.urandom(8).hex(),
        "partitions": asked["partitions"] or 1,
        "hash": "xxh3-64",
        "segment_bytes": asked["segment_bytes"] or SEGMENT_BYTES,
        "retention": asked["retention"] or retention_config(None),
        "compact": asked["compact"],
        "durability": durability,
    }
