"""What processes tell each other in a stream that each has read up to its end.

Imported by the modules of frameworks, not by programs.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

import millstream
from millstream import NotFound, Retention
from millstream.contrib.results import Log

__all__ = ["Rows"]

EXPIRES = struct.Struct("<d")
Durability: TypeAlias = Literal["process", "interval", "sync"]
Get: TypeAlias = Callable[[bytes], bytes | None]
PRUNED_LEAST = 1000
SHORT_BYTES = 32
KEPT_LEAST = 3600.0
"""Seconds that a new stream of rows keeps: longer than rows last as a rule."""


class Rows(Log):
    """Values by key that expire, of all processes: the last one of each.

    Retention removes what has expired. A process that asks keeps in memory where those lie that
    have not, about 250 bytes for each, and is woken by what is appended; one that only puts keeps
    nothing.

    All of a stream are put by `put`, or all changed by `change`.
    """

    def __init__(
        self, store: millstream.Store, name: str, durability: Durability | None = None
    ) -> None:
        try:
            stream = store.stream(name, partitions=1, durability=durability, create=False)
        except NotFound:
            stream = store.stream(
                name,
                partitions=1,
                durability=durability,
                segment_bytes="4MiB",
                retention=Retention(age=KEPT_LEAST),
                on_mismatch="keep",  # another process has just made it
            )
        super().__init__(stream)
        self._producer = self.stream.producer("rows")
        self._at: dict[bytes, tuple[float, int, bytes | None]] = {}
        """When each key expires, the offset of its value, and the value, where that is short."""
        self._many = PRUNED_LEAST

    def _apply(self, batch: millstream.Batch) -> None:
        for offset, (key, value) in enumerate(
            zip(batch.keys, batch.values, strict=True), batch.first_offset
        ):
            self._note(key or b"", value or b"", offset)
        if len(self._at) > self._many:
            now = time.time()
            self._at = {key: row for key, row in self._at.items() if row[0] > now}
            self._many = max(2 * len(self._at), PRUNED_LEAST)

    def _note(self, key: bytes, row: bytes, offset: int) -> None:
        (expires,) = EXPIRES.unpack_from(row)
        value = row[EXPIRES.size :] if len(row) <= EXPIRES.size + SHORT_BYTES else None
        self._at[key] = expires, offset, value

    def _prune(self, first: int) -> None:
        pass  # by their times

    def _row(self, value: bytes, ttl: float) -> bytes:
        """As it is stored; the stream keeps it for as long as it lasts."""
        age = self.stream.retention.age
        if age is not None and age < ttl:
            self.stream.alter(retention=Retention(age=ttl))
        return EXPIRES.pack(time.time() + ttl) + value

    @property
    def durability(self) -> Durability:
        """Of the stream."""
        return self.stream.durability

    def put(self, key: bytes, value: bytes, ttl: float) -> None:
        """Set the value of a key for some seconds."""
        self.stream.append(self._row(value, ttl), key=key)

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None where there is none, or it has expired."""
        self.catch_up()
        return self._get(key)

    def _get(self, key: bytes) -> bytes | None:
        expires, offset, value = self._at.get(key, (0.0, 0, None))
        if expires > time.time():
            if value is not None:
                return value
            with contextlib.suppress(millstream.OffsetOutOfRange):
                return (self.stream.get(0, offset).value or b"")[EXPIRES.size :]
        return None

    def change(
        self,
        key: bytes,
        ttl: float,
        decide: Callable[[Callable[[bytes], bytes | None]], bytes | None],
    ) -> bool:
        """Set the value of a key to what `decide` makes of the values, all as they are at once.

        It appends where nothing was appended since it has read: its sequence is the offset that it
        expects, of one producer that all share, and the second of one sequence adds nothing.

        Returns: False where it decides for None: then nothing is changed.
        """
        while True:
            self.catch_up()
            expected = self._next
            value = decide(self._get)
            if value is None:
                return False
            row = self._row(value, ttl)
            done = self._producer.append(row, key=key, sequence=expected)
            if done is None:  # another one was faster
                continue
            with self._lock:
                if self._next == done.offset:  # it need not be read
                    self._note(key, row, done.offset)
                    self._next += 1
            return True

    def wait_for(self, key: bytes, seconds: float) -> bytes | None:
        """The value of a key, once there is one; None: it did not come within these seconds."""
        deadline = time.monotonic() + seconds
        while True:
            value = self.get(key)
            left = deadline - time.monotonic()
            if value is not None or left <= 0:
                return value
            self.wait(left)
