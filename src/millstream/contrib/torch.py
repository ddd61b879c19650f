"""A stream as a data set of PyTorch: ``DataLoader(StreamDataset(stream), num_workers=4)``.

``pip install 'millstream[torch]'``. Workers of a loader, and ranks of a distributed training, share
the records; with `StatefulDataLoader` of torchdata a training that was stopped goes on where it
was, each record once.

    from millstream.contrib.torch import StreamDataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = StreamDataset(store.stream("samples"), transform=decode)
    loader = StatefulDataLoader(data, batch_size=64, num_workers=4)
    for batch in loader:
        train(batch)
        save(loader.state_dict())
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import millstream
from millstream import InvalidArgument, Stream
from millstream.contrib import require

require("torch", "torch", (2, 0), (3,))

from torch import distributed  # noqa: E402
from torch.utils.data import IterableDataset, get_worker_info  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from millstream import Batch

__all__ = ["StreamDataset"]

STRIPE = 1024
FIELDS = ("value", "key", "headers", "partition", "offset", "timestamp")


class StreamDataset(IterableDataset):  # type: ignore[misc]
    """The records of a stream, in stripes of 1,024 offsets that workers and ranks take in turn.

    An epoch has what there is when its iteration begins in a worker; partition by partition, each
    by rising offset. Shuffle behind it, if at all. Each process opens the store for itself, to read
    alone, whether it was forked or spawned.

    Args:
        source: a stream, or the path of a store.
        name: of the stream, where `source` is a path.
        fields: what a record gives: one of value, key, headers, partition, offset and timestamp
            (microseconds since 1970 UTC), or several, which give a dict.
        transform: called with that, in the worker; what it returns is the sample.
        on_lost: where retention was faster: "raise" `OffsetOutOfRange`, or go on at the "earliest"
            record.
        rank: of this process, and
        world_size: of how many, in distributed training; default: as `torch.distributed` says where
            it is initialized, else 0 and 1.

    Raises: InvalidArgument (fields, rank), NotFound (no such store or stream).
    """

    def __init__(
        self,
        source: Stream | str | os.PathLike[str],
        name: str | None = None,
        *,
        fields: str | Sequence[str] = "value",
        transform: Callable[[Any], Any] | None = None,
        on_lost: Literal["raise", "earliest"] = "raise",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(source, Stream):
            if name is not None:
                raise InvalidArgument("StreamDataset: give a stream, or a path and name=, not both")
            self._path, self._name = str(source.store.path), source.name
        elif name is None:
            raise InvalidArgument("StreamDataset: of a path, say name=, the name of the stream")
        else:
            self._path, self._name = os.path.abspath(source), name
            with millstream.open(self._path, mode="r") as store:
                store.stream(name, create=False)
        self._fields = (fields,) if isinstance(fields, str) else tuple(fields)
        wrong = [one for one in self._fields if one not in FIELDS]
        if wrong or not self._fields:
            raise InvalidArgument(f"StreamDataset: fields {fields!r}: expected some of {FIELDS}")
        self._alone = isinstance(fields, str)
        self._transform = transform
        self._on_lost = on_lost
        initialized = distributed.is_available() and distributed.is_initialized()
        self._rank = rank if rank is not None else distributed.get_rank() if initialized else 0
        size = world_size
        self._ranks = (
            size if size is not None else distributed.get_world_size() if initialized else 1
        )
        if not 0 <= self._rank < self._ranks:
            raise InvalidArgument(f"StreamDataset: rank {self._rank} of {self._ranks}")
        self._next: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._going_on = False

    def _shard(self) -> tuple[int, int]:
        """Which of how many: workers of all ranks."""
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return self._rank * count + number, self._ranks * count

    def __iter__(self) -> Iterator[Any]:
        """Samples: those that are left of the epoch of `load_state_dict`, or all of a new one."""
        shard, shards = self._shard()
        with millstream.open(self._path, mode="r") as store:
            stream = store.stream(self._name, create=False)
            if not self._going_on:
                partitions = range(stream.partitions)
                self._ends = {index: stream.next_offset(index) for index in partitions}
                self._next = {index: stream.first_offset(index) for index in partitions}
            self._going_on = False
            for partition, end in self._ends.items():
                if self._next[partition] < end:
                    yield from self._read(stream, partition, end, shard, shards)
                self._next[partition] = end

    def _read(
        self, stream: Stream, partition: int, end: int, shard: int, shards: int
    ) -> Iterator[Any]:
        begin = self._next[partition]
        for batch in stream.read(partition=partition, start=begin, on_lost=self._on_lost):
            offsets = batch.offsets
            mine = (offsets // STRIPE % shards == shard) & (offsets < end)
            rows = np.flatnonzero(mine).tolist()
            for row in rows:
                sample = self._sample(batch, row)
                self._next[partition] = int(offsets[row]) + 1  # before: it is out of our hands
                yield sample
            self._next[partition] = min(batch.next_offset, end)
            if batch.next_offset >= end:
                return

    def _sample(self, batch: Batch, row: int) -> Any:
        found = {name: _field(batch, row, name) for name in self._fields}
        sample = found[self._fields[0]] if self._alone else found
        return sample if self._transform is None else self._transform(sample)

    # --- for StatefulDataLoader -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where this process is in its epoch: all that `load_state_dict` needs to go on."""
        shard, shards = self._shard()
        return {
            "stream": self._name,
            "shard": shard,
            "shards": shards,
            "next": dict(self._next),
            "ends": dict(self._ends),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there with the next iteration.

        Raises: InvalidArgument where it is of another stream, or of another number of workers or
        ranks, which have other shares of the records.
        """
        shard, shards = self._shard()
        if state["stream"] != self._name:
            raise InvalidArgument(
                f"StreamDataset: the state is of stream {state['stream']!r}, not {self._name!r}"
            )
        if (state["shard"], state["shards"]) != (shard, shards):
            raise InvalidArgument(
                f"StreamDataset: the state is of worker {state['shard']} of {state['shards']}, this"
                f" is {shard} of {shards}; go on with as many workers and ranks as before"
            )
        self._next, self._ends = dict(state["next"]), dict(state["ends"])
        self._going_on = bool(self._ends)


def _field(batch: Batch, row: int, name: str) -> Any:
    if name == "partition":
        return batch.partition
    if name in ("offset", "timestamp"):
        return int((batch.offsets if name == "offset" else batch.timestamps)[row])
    return getattr(batch, f"{name}s" if name != "headers" else name)[row]
