"""Frozen dataclasses, made at once."""

from __future__ import annotations

from typing import Any, TypeVar

Made = TypeVar("Made")


def frozen(kind: type[Made], fields: dict[str, Any]) -> Made:
    """An instance of a frozen dataclass without slots; the dict of all its fields becomes its own.

    Its own `__init__` sets each field by a call of `object.__setattr__`: 18,000 instructions for
    the 13 fields of `PartitionStats`, which `Store.stats` makes a thousand times.
    """
    made = kind.__new__(kind)
    object.__setattr__(made, "__dict__", fields)
    return made
