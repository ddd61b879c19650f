"""Ourselves, doing what the rivals do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import millstream


class Rival:
    title = f"millstream {millstream.__version__}"

    def __init__(self, path: str, synced: bool) -> None:
        level = "sync" if synced else "process"
        self.stream = millstream.open(path, durability=level).stream("s")  # type: ignore[arg-type]
        self.append = self.stream.append
        self.append_many = self.stream.append_many

    def finish(self) -> None:
        pass

    def read_each(self) -> Iterator[object]:
        for batch in self.stream.read():
            yield from batch.values

    def read_batches(self) -> Iterator[int]:
        for batch in self.stream.read():
            yield len(batch)

    def getter(self) -> Callable[[int], object]:
        get = self.stream.get
        return lambda index: get(0, index).value
