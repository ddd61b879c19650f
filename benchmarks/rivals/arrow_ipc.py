"""An Arrow IPC stream file, batches made from lists."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pyarrow

SCHEMA = pyarrow.schema([("value", pyarrow.binary())])


class Rival:
    title = f"pyarrow {pyarrow.__version__} IPC stream, from lists"

    def __init__(self, path: str, synced: bool) -> None:
        self.path = path
        self.file = pyarrow.OSFile(path, "wb")
        self.writer = pyarrow.ipc.new_stream(self.file, SCHEMA)
        self.synced = synced

    def append(self, value: bytes) -> None:
        self.append_many([value])

    def append_many(self, values: list[bytes]) -> None:
        array = pyarrow.array(values, pyarrow.binary())
        self.writer.write_batch(pyarrow.record_batch([array], schema=SCHEMA))
        if self.synced:
            os.fdatasync(self.file.fileno())

    def finish(self) -> None:
        self.writer.close()
        self.file.close()

    def read_each(self) -> Iterator[object]:
        with pyarrow.memory_map(self.path) as source, pyarrow.ipc.open_stream(source) as reader:
            for batch in reader:
                yield from batch.column(0).to_pylist()

    def read_batches(self) -> Iterator[int]:
        with pyarrow.memory_map(self.path) as source, pyarrow.ipc.open_stream(source) as reader:
            for batch in reader:
                yield batch.num_rows

    def getter(self) -> Callable[[int], object]:
        raise NotImplementedError
