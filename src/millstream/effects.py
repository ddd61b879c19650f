"""What a transaction does, as data, and as the batch of the journal that says so."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

__all__ = ["Ack", "Effects", "Mark", "Place", "Put", "Share", "decode", "encode", "length_of"]

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


class Ack(NamedTuple):
    """A message of a queue that is over, ACKING as `word` in `slot`."""

    place: int
    slot: int
    word: int
    id: int


class Mark(NamedTuple):
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
    marks: list[Mark]


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
    manifest = (len(values) - 1, effects.places, shares, puts, effects.acks, effects.marks)
    values[0] = TO_JSON(manifest).encode()
    return values, keys, headers


def decode(manifest: list[Any], values: list[Any], keys: list[Any], headers: list[Any]) -> Effects:
    """What `encode` was given; the lists begin behind the manifest."""
    _, place_rows, share_rows, put_rows, ack_rows, mark_rows = manifest
    shares, at = [], 0
    for place, partition, timestamps, count, flags in share_rows:
        rows = slice(at, at + count)
        its_keys = keys[rows] if flags & 1 else None
        its_headers = headers[rows] if flags & 2 else None
        share = Share(place, partition, timestamps, values[rows], its_keys, its_headers)
        shares.append(share)
        at += count
    puts = []
    for row in put_rows:
        dedup = None if row[7] is None else (row[7][0], row[7][1])
        content = values[at], keys[at], headers[at] or None
        absolute = len(row) > 8 and bool(row[8])  # earlier versions did not tell
        puts.append(Put._make((*row[:7], dedup, absolute, *content)))
        at += 1
    places = [Place(*row) for row in place_rows]
    acks = [Ack(*row) for row in ack_rows]
    return Effects(places, shares, puts, acks, [Mark(*row) for row in mark_rows])


def length_of(effects: Effects) -> int:
    """How many records of the journal it takes."""
    return 1 + sum(len(share.values) for share in effects.shares) + len(effects.puts)
