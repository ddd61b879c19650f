"""Eras of a stream: `add_partitions` begins a new one, in which most keys belong elsewhere.

The latest era that has a key counts; within an era, the partition to which the key belonged then.
"""

from __future__ import annotations

from millstream.disk import files, reserve
from millstream.log import control, settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from millstream.log.handle import StreamHandle


LATE_WRITER_SECONDS = 60.0
"""A writer that has chosen a partition waits for it for half of that at most."""


class Era:
    """A time without a change of the partitions.

    `ends` has of each partition the offset at which the next era begins; None: it is the present
    one, which began at `since`, microseconds since 1970.
    """

    __slots__ = ("ends", "partitions", "since")

    def __init__(self, partitions: int, ends: list[int] | None = None, since: int = 0) -> None:
        self.partitions = partitions
        self.ends = ends
        self.since = since

    def end(self, partition: int) -> int:
        """The offset behind what a partition has of it."""
        if self.ends is None:
            return 1 << 62
        return self.ends[partition] if partition < len(self.ends) else 0


def of(config: dict[str, Any]) -> tuple[Era, ...]:
    """All eras that a `stream.json` has, oldest first."""
    ended = [Era(len(ends), ends) for ends in config.get("eras", [])]
    return (*ended, Era(int(config["partitions"]), None, config.get("since", 0)))


def up_to(stream: StreamHandle, partitions: int) -> list[Era]:
    """The eras of a stream when it has so many partitions, oldest first."""
    if stream._eras[-1].partitions < partitions:  # another process was faster than its notice
        stream._reload()
    return [*(era for era in stream._eras if era.partitions < partitions), Era(partitions)]


def cut(config: dict[str, Any], partitions: int) -> None:
    """Make a `stream.json` the one of the time when there were so many partitions."""
    config["partitions"] = partitions
    if "eras" in config:
        config["eras"] = [ends for ends in config["eras"] if len(ends) < partitions]


def begin(stream: StreamHandle, wanted: Callable[[int], int]) -> int:
    """Have as many partitions as `wanted` makes of how many there are; how many it is then."""
    with stream._log(0).maintaining:
        path = stream.path / "stream.json"
        config = files.read_json(path)
        before = int(config["partitions"])
        partitions = wanted(before)
        settings.require_more(stream.name, before, partitions)
        if partitions == before:
            return before
        # What lies before an era's end is never lost: later records must not come to lie there.
        stream.flush()
        _end_present(config, [stream._log(i).native.durable_offset for i in range(before)])
        config["partitions"] = partitions
        config["since"] = stream.session.clock.now()
        control.grow(stream.path, partitions)
        with settings.changing(stream):
            reserve.lend(stream.session.root, files.write_json, path, config)
            stream._set_partitions(partitions)
    return partitions


def _end_present(config: dict[str, Any], ends: list[int]) -> None:
    eras = config.setdefault("eras", [])
    before = eras[-1] if eras else []
    if ends != before + [0] * (len(ends) - len(before)):  # else nothing was appended in it
        eras.append(ends)


def left_elsewhere(stream: StreamHandle, partition: int) -> list[tuple[int, int, int]]:
    """(partition, end, time) of where another partition may have what one has the later word about.

    It lies before the end, or, from a writer that had not heard of the new era yet, in a segment
    that was begun before the time.
    """
    eras = up_to(stream, stream.partitions)
    if len(eras) < 2:
        return []
    last, late = eras[-2], stream._eras[-1].since + int(LATE_WRITER_SECONDS * 1e6)
    return [(one, last.end(one), late) for one in range(last.partitions) if one != partition]
