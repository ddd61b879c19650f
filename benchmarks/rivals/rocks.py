"""RocksDB by rocksdict, raw mode, WriteBatch for batches (synced: set_sync)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from importlib.metadata import version

from rocksdict import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    Options,
    Rdict,
    WriteBatch,
    WriteOptions,
)

KEY = struct.Struct(">Q")


class Rival:
    title = f"rocksdict {version('rocksdict')} (RocksDB), WriteBatch"

    def __init__(self, path: str, synced: bool) -> None:
        self.database = Rdict(path, Options(raw_mode=True))
        options = WriteOptions()
        options.sync = synced
        self.database.set_write_options(options)
        self.options = options
        self.next = 0

    def append(self, value: bytes) -> None:
        self.database[KEY.pack(self.next)] = value
        self.next += 1

    def append_many(self, values: list[bytes]) -> None:
        batch = WriteBatch(raw_mode=True)
        for key, value in enumerate(values, self.next):
            batch.put(KEY.pack(key), value)
        self.database.write(batch, self.options)
        self.next += len(values)

    def finish(self) -> None:
        pass

    def read_each(self) -> Iterator[object]:
        return iter(self.database.values())

    def read_batches(self) -> Iterator[int]:
        raise NotImplementedError

    def getter(self) -> Callable[[int], object]:
        database = self.database
        return lambda index: database[KEY.pack(index)]
