"""Results of tasks by their keys, in a stream: whoever asks for one knows where each of them lies.

A process that asks keeps in memory where those lie that are not expired, about 250 bytes for each,
and is woken by what is appended: nobody polls. Workers only append, and read nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time

import millstream
from millstream import Retention

__all__ = ["FINAL", "OTHER", "Log", "Results", "expiring"]

FINAL, OTHER = b"+", b"-"
"""What a value begins with in the stream."""


class Log:
    """A stream with one partition that this process has read up to its end."""

    def __init__(self, stream: millstream.Stream) -> None:
        self.stream = stream
        self._next = self._first = 0
        self._lock = threading.Lock()

    def catch_up(self) -> None:
        """Know all that any process appended before this call."""
        end = self.stream.next_offset(0)
        if end == self._next:
            return
        with self._lock:
            for batch in self.stream.read(partition=0, start=self._next, on_lost="earliest"):
                self._apply(batch)
                self._next = batch.next_offset
            self._next = max(self._next, end)  # what was there may be gone
            if (first := self.stream.first_offset(0)) != self._first:
                self._prune(first)
                self._first = first

    def _apply(self, batch: millstream.Batch) -> None:
        raise NotImplementedError  # each log below knows its own records

    def _prune(self, first: int) -> None:
        raise NotImplementedError  # and what of them it keeps in memory

    def wait(self, seconds: float) -> None:
        """Return when there is something that has not been read, or after these seconds."""
        if self.stream.next_offset(0) == self._next:
            batches = self.stream.read(
                partition=0, start=self._next, on_lost="earliest", follow=True, timeout=seconds
            )
            next(batches, None)


def expiring(store: millstream.Store, name: str, expires: float | None) -> millstream.Stream:
    """The stream of a log whose records all expire after some seconds; None: never."""
    return store.stream(
        name,
        partitions=1,
        segment_bytes="16MiB",
        retention=Retention(age=expires) if expires else Retention(),
        on_mismatch="alter",
    )


class Results(Log):
    """Values by key, the last one of each; but a success stays, whatever a lost worker says."""

    def __init__(self, store: millstream.Store, name: str, expires: float | None) -> None:
        super().__init__(expiring(store, name, expires))
        self._expires = expires
        self.at: dict[bytes, int] = {}
        """The offset of each key's value, the inverse of it where that is final; oldest first."""

    def _apply(self, batch: millstream.Batch) -> None:
        offset = batch.first_offset
        for key, value in zip(batch.keys, batch.values, strict=True):
            if key is not None and (self.at.get(key, 0) >= 0 or value is None):
                self.at.pop(key, None)
                if value is not None:
                    self.at[key] = ~offset if value[:1] == FINAL else offset
            offset += 1

    def _prune(self, first: int) -> None:
        while self.at:
            key, offset = next(iter(self.at.items()))
            if max(offset, ~offset) >= first:
                return
            del self.at[key]

    def set(self, key: bytes, value: bytes | None, mark: bytes = OTHER) -> None:
        """Append a value; None takes it away."""
        self.stream.append(None if value is None else mark + value, key=key)

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None where there is none, or it is expired."""
        self.catch_up()
        offset = self.at.get(key)
        if offset is None:
            return None
        with contextlib.suppress(millstream.OffsetOutOfRange):
            start = max(offset, ~offset)
            for batch in self.stream.read(partition=0, start=start, max_records=1):
                age = time.time() - int(batch.timestamps[0]) / 1e6
                if not self._expires or age < self._expires:
                    return (batch.values[0] or b"")[1:]
        return None
