"""The configuration of queues: what users give, checked, and what `queue.json` holds of it."""

from __future__ import annotations

import os
from typing import Any

from millstream.disk.files import FORMAT
from millstream.errors import ConfigMismatch, InvalidArgument, InvalidType
from millstream.log.settings import check_durability
from millstream.options import CENTURY, RetryPolicy, integer, number, parse_bytes

PAYLOAD_MAX = 16 << 20
FIXED = ("priorities", "slot_bytes", "payload_bytes", "ordering", "dead_limit", "on_dead")
"""What `alter` cannot change: the files are laid out for it, or messages lie as it says."""

DEFAULTS: dict[str, Any] = {
    "capacity": 100_000,
    "priorities": 4,
    "slot_bytes": 256,
    "payload_bytes": 1 << 30,
    "payload_max": PAYLOAD_MAX,
    "lease": 30.0,
    "ordering": None,
    "retry": RetryPolicy(),
    "ttl": None,
    "dedup_window": 0.0,
    "dead_limit": 10_000,
    "on_dead": "skip",
    "ageing": False,
    "durability": None,
}


def _slot_bytes(value: Any) -> int:
    return integer("slot_bytes", parse_bytes(value), 128, 65536) + 63 & ~63


def _choice(what: str, value: Any, *known: Any) -> Any:
    if not any(type(value) is type(one) and value == one for one in known):
        raise InvalidArgument(f"{what} {value!r}: expected one of {', '.join(map(repr, known))}")
    return value


def _retry(value: Any) -> dict[str, float]:
    if value is None:
        value = RetryPolicy()
    if not isinstance(value, RetryPolicy):
        raise InvalidType(f"retry {value!r}: expected a millstream.RetryPolicy")
    return value.as_dict()


CHECKS: dict[str, Any] = {
    "capacity": lambda value: integer("capacity", value, 1, (1 << 24) - 2),
    "priorities": lambda value: integer("priorities", value, 1, 8),
    "slot_bytes": _slot_bytes,
    "payload_bytes": lambda value: integer("payload_bytes", parse_bytes(value), 0, 64 << 30),
    "payload_max": lambda value: integer("payload_max", parse_bytes(value), 0, 1 << 30),
    "lease": lambda value: number("lease", value, 0.001, 30 * 86400.0),
    "ordering": lambda value: _choice("ordering", value, None, "key"),
    "retry": _retry,
    "ttl": lambda value: None if value is None else number("ttl", value, 0.0, CENTURY),
    "dedup_window": lambda value: number("dedup_window", value, 0.0, CENTURY),
    "dead_limit": lambda value: integer("dead_limit", value, 0, 1 << 23),
    "on_dead": lambda value: _choice("on_dead", value, "skip", "stop"),
    "ageing": lambda value: _choice("ageing", value, False, True),
    "durability": check_durability,
}


def check(given: dict[str, Any]) -> dict[str, Any]:
    """Options of a queue, checked, as `queue.json` has them."""
    for name in given:
        if name not in CHECKS:
            raise InvalidType(f"{name!r} is no option of a queue")
    checked = {name: CHECKS[name](value) for name, value in given.items()}
    check_together(checked)
    return checked


def check_together(config: dict[str, Any]) -> None:
    """Raise `InvalidArgument` where capacity and dead_limit ask for too many slots."""
    if config.get("capacity", 0) + config.get("dead_limit", 0) >= 1 << 24:
        raise InvalidArgument("capacity and dead_limit: together at most 16,777,215")


def new(checked: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a new queue."""
    config = check(DEFAULTS) | checked
    check_together(config)
    return {"format": FORMAT, "queue_id": os.urandom(8).hex(), **config}


def differing(
    stored: dict[str, Any], checked: dict[str, Any], *, durability: bool
) -> dict[str, Any]:
    """What the caller named, where something else is stored; `durability`: that as well."""
    return {
        field: value
        for field, value in checked.items()
        if stored[field] != value and (durability or field != "durability")
    }


def require_alterable(what: str, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise `ConfigMismatch` where one of the settings cannot become what is asked for."""
    for field, value in asked.items():
        if stored[field] == value:
            continue
        why = ""
        if field in FIXED:
            why = "it cannot be changed"
        elif field == "capacity" and value < stored[field]:
            why = "it can be raised, never lowered"
        elif field == "dedup_window" and not value:
            why = "it can be another one, but not none"
        if why:
            raise ConfigMismatch(
                f"{what} has {field} {stored[field]}, not {value}; {why}: leave it out, or make"
                " another queue"
            )
