"""A file written by os.write, a batch made ready before: its rows are the system call's alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

RECORD = 104
CHUNK = RECORD * 10_000


class Rival:
    title = "file, os.write, ready bytes"

    def __init__(self, path: str, synced: bool) -> None:
        self.path = path
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.synced = synced
        self.ready: dict[int, bytes] = {}

    def append(self, value: bytes) -> None:
        os.write(self.file, b"\x64\0\0\0" + value)
        if self.synced:
            os.fdatasync(self.file)

    def append_many(self, values: list[bytes]) -> None:
        ready = self.ready.get(id(values))
        if ready is None:
            ready = b"".join(b"\x64\0\0\0" + value for value in values)
            self.ready[id(values)] = ready
        os.write(self.file, ready)
        if self.synced:
            os.fdatasync(self.file)

    def finish(self) -> None:
        pass

    def read_each(self) -> Iterator[object]:
        raise NotImplementedError

    def read_batches(self) -> Iterator[int]:
        with open(self.path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                yield len(chunk) // RECORD

    def getter(self) -> Callable[[int], object]:
        raise NotImplementedError
