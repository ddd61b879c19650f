"""LMDB: sync=False with append=True (synced: sync=True)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import lmdb  # type: ignore[import-not-found,import-untyped,unused-ignore]

KEY = struct.Struct(">Q")


class Rival:
    title = f"lmdb {lmdb.__version__} sync=False (synced: True), append"

    def __init__(self, path: str, synced: bool) -> None:
        self.environment = lmdb.open(path, map_size=4 << 30, sync=synced, metasync=synced)
        self.next = 0

    def append(self, value: bytes) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.put(KEY.pack(self.next), value, append=True)
        self.next += 1

    def append_many(self, values: list[bytes]) -> None:
        items = [(KEY.pack(key), value) for key, value in enumerate(values, self.next)]
        with self.environment.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(items, append=True)
        self.next += len(values)

    def finish(self) -> None:
        pass

    def read_each(self) -> Iterator[object]:
        with self.environment.begin() as transaction, transaction.cursor() as cursor:
            yield from cursor.iternext(keys=False, values=True)

    def read_batches(self) -> Iterator[int]:
        with self.environment.begin() as transaction:
            keys = [KEY.pack(key) for key in range(self.next)]
            for at in range(0, self.next, 1_000):
                with transaction.cursor() as cursor:
                    yield len(cursor.getmulti(keys[at : at + 1_000]))

    def getter(self) -> Callable[[int], object]:
        get = self.environment.begin().get
        return lambda index: get(KEY.pack(index))
