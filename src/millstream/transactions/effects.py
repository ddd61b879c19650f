"""What a transaction does, as data, and as the batch of the journal that says so."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

__all__ = [
    "Ack", "Asked", "Effects", "GroupPosition", "Place", "Put", "Share", "check_count", "decode",
    "encode", "length_of",
]  # fmt: skip

TO_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class Place(NamedTuple):
    """A stream or a queue: its name, and its id, which no later one of that name has."""

    name: str
    id: int


class Share(NamedTuple):
    """What one partition of a stream gets."""

    place: int
    """Of `Effects.places`: the stream."""
    partition: int
    timestamps: Any
    values: list[Any]
    keys: list[Any] | None
    headers: list[Any] | None


class Put(NamedTuple):
    """A message for a queue, PREPARED there as `word` in `slot`."""

    place: int
    slot: int
    word: int
    id: int
    priority: int
    due: int
    """On the store's clock, unless `absolute`: on that of the wall. 0: at once."""
    expires: int
    dedup: tuple[int, int] | None
    absolute: bool
    value: bytes
    key: bytes | None
    headers: Any


class Asked(NamedTuple):
    """A message that a transaction is to put: the part of `Put` that is known before."""

    priority: int
    due: int
    expires: int
    dedup: tuple[int, int] | None
    absolute: bool
    value: bytes
    key: bytes | None
    headers: Any


class Ack(NamedTuple):
    """A message of a queue that is over, ACKING as `word` in `slot`."""

    place: int
    slot: int
    word: int
    id: int


class GroupPosition(NamedTuple):
    """Where a group goes on in a partition of a stream."""

    place: int
    group: str
    group_id: int
    partition: int
    epoch: int
    offset: int


class Effects(NamedTuple):
    """All that a transaction does."""

    places: list[Place]
    shares: list[Share]
    puts: list[Put]
    acks: list[Ack]
    positions: list[GroupPosition]


def encode(effects: Effects) -> tuple[list[Any], list[Any] | None, list[Any] | None]:
    """Values, keys and headers of the batch; the first value is the manifest."""
    values: list[Any] = [b""]
    keyed = headed = False
    for share in effects.shares:
        keyed = keyed or share.keys is not None
        headed = headed or share.headers is not None
    for put in effects.puts:
        keyed = keyed or put.key is not None
        headed = headed or put.headers is not None
    keys: list[Any] | None = [None] if keyed else None
    headers: list[Any] | None = [None] if headed else None
    shares = []
    for place, partition, timestamps, rows, row_keys, row_headers in effects.shares:
        count = len(rows)
        flags = (row_keys is not None) | (row_headers is not None) << 1
        shares.append((place, partition, timestamps, count, flags))
        values += rows
        if keys is not None:
            keys += row_keys or [None] * count
        if headers is not None:
            headers += row_headers or [None] * count
    for put in effects.puts:
        values.append(put.value)
        if keys is not None:
            keys.append(put.key)
        if headers is not None:
            headers.append(put.headers)
    puts = [(*put[:8], int(put.absolute)) for put in effects.puts]
    manifest = (len(values) - 1, effects.places, shares, puts, effects.acks, effects.positions)
    values[0] = TO_JSON(manifest).encode()
    return values, keys, headers


BITS_64 = 1 << 64
TIME_MAX = 1 << 63
"""In microseconds: what 64 bits with a sign hold."""


def _rows(found: Any, what: str, *sizes: int) -> list[list[Any]]:
    """A list of lists of these sizes, or ValueError."""
    if not isinstance(found, list):
        raise ValueError(f"its {what} are no list but {found!r:.60}")
    for row in found:
        if not isinstance(row, list) or len(row) not in sizes:
            raise ValueError(f"{row!r:.60} is none of its {what}")
    return found


def _number(found: Any, what: str, limit: int, least: int = 0) -> int:
    if type(found) is not int or not least <= found < limit:
        raise ValueError(f"{found!r:.60} as {what} is no number of [{least}, {limit})")
    return found


def _name(found: Any, what: str) -> str:
    if type(found) is not str:
        raise ValueError(f"{found!r:.60} as {what} is no text")
    return found


def _time(found: Any, what: str) -> int:
    return _number(found, what, TIME_MAX, -TIME_MAX)


def check_count(manifest: Any) -> int:
    """How many records follow a manifest; ValueError: it is none."""
    if not isinstance(manifest, list) or len(manifest) != 6:
        raise ValueError(f"{manifest!r:.60} is no manifest")
    return _number(manifest[0], "the records behind it", 1 << 32)


def decode(manifest: list[Any], values: list[Any], keys: list[Any], headers: list[Any]) -> Effects:
    """What `encode` was given; the lists begin behind the manifest.

    Raises:
        ValueError: it says what cannot be.
    """
    _, place_rows, share_rows, put_rows, ack_rows, position_rows = manifest
    places = []
    for name, number in _rows(place_rows, "places", 2):
        places.append(Place(_name(name, "a place"), _number(number, "its id", BITS_64)))
    shares, at = [], 0
    for place, partition, timestamps, count, flags in _rows(share_rows, "shares", 5):
        _number(place, "a place", len(places))
        _number(partition, "a partition", 1 << 32)
        _number(count, "the records of a share", len(values) - at + 1)
        if isinstance(timestamps, list):
            _number(len(timestamps), "the timestamps of a share", count + 1, count)
            for timestamp in timestamps:
                _time(timestamp, "a timestamp")
        else:
            _time(timestamps, "a timestamp")
        _number(flags, "the flags of a share", 4)
        rows = slice(at, at + count)
        its_keys = keys[rows] if flags & 1 else None
        its_headers = headers[rows] if flags & 2 else None
        share = Share(place, partition, timestamps, values[rows], its_keys, its_headers)
        shares.append(share)
        at += count
    _number(len(_rows(put_rows, "puts", 8, 9)), "puts", len(values) - at + 1, len(values) - at)
    puts = []
    for row in put_rows:
        place, slot, word, number, priority, due, expires, hashes = row[:8]
        _number(place, "a place", len(places))
        _number(slot, "a slot", 1 << 32)
        _number(word, "a state word", BITS_64)
        _number(number, "the id of a message", BITS_64)
        _number(priority, "a priority", 1 << 31)
        _time(due, "a time")
        _time(expires, "a time")
        dedup = None
        if hashes is not None:
            ((first, second),) = _rows([hashes], "deduplication ids", 2)
            dedup = _number(first, "a hash", BITS_64), _number(second, "a hash", BITS_64)
        if values[at] is None:
            raise ValueError("a message has no value")
        content = values[at], keys[at], headers[at] or None
        # Earlier versions did not tell.
        absolute = len(row) > 8 and bool(_number(row[8], "whether a time is of the wall clock", 2))
        puts.append(Put._make((*row[:7], dedup, absolute, *content)))
        at += 1
    acks = []
    for place, slot, word, number in _rows(ack_rows, "acks", 4):
        _number(place, "a place", len(places))
        _number(slot, "a slot", 1 << 32)
        _number(word, "a state word", BITS_64)
        acks.append(Ack(place, slot, word, _number(number, "the id of a message", BITS_64)))
    positions = []
    for place, group, group_id, partition, epoch, offset in _rows(position_rows, "positions", 6):
        _number(place, "a place", len(places))
        _number(partition, "a partition", 1 << 32)
        _number(epoch, "an epoch", BITS_64)
        _number(offset, "an offset", BITS_64)
        number = _number(group_id, "the id of a group", BITS_64)
        name = _name(group, "a group")
        positions.append(GroupPosition(place, name, number, partition, epoch, offset))
    return Effects(places, shares, puts, acks, positions)


def length_of(effects: Effects) -> int:
    """How many records of the journal it takes."""
    return 1 + sum(len(share.values) for share in effects.shares) + len(effects.puts)
