"""A file with a 1 MiB buffer: length and bytes. A kill takes what is in the buffer."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

LENGTH = struct.Struct("<I")


class Rival:
    title = "file, write(struct + value), 1 MiB buffer"

    def __init__(self, path: str, synced: bool) -> None:
        self.path = path
        self.file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115
        self.synced = synced

    def append(self, value: bytes) -> None:
        self.file.write(LENGTH.pack(len(value)) + value)
        if self.synced:
            self._sync()

    def append_many(self, values: list[bytes]) -> None:
        write, pack = self.file.write, LENGTH.pack
        for value in values:
            write(pack(len(value)) + value)
        if self.synced:
            self._sync()

    def _sync(self) -> None:
        self.file.flush()
        os.fdatasync(self.file.fileno())

    def finish(self) -> None:
        self.file.flush()

    def read_each(self) -> Iterator[object]:
        with open(self.path, "rb", buffering=1 << 20) as file:
            read, unpack = file.read, LENGTH.unpack
            while length := read(4):
                yield read(unpack(length)[0])

    def read_batches(self) -> Iterator[int]:
        raise NotImplementedError

    def getter(self) -> Callable[[int], object]:
        raise NotImplementedError
