"""Logs with gaps, as compaction leaves them: their extent, and what the gaps count."""

from __future__ import annotations

from itertools import pairwise

from millstream.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream.log.partition import PartitionLog


def extent(log: PartitionLog) -> tuple[int, int]:
    """(bytes of log, records) from the first record kept to the tail."""
    while True:
        mark, numbers = log.end(), log.segments.current()
        try:
            if not numbers:
                return 0, 0
            position, offset = log.segments.base(numbers[0])
            missing = gaps(log, numbers)
            return mark[0] - position - missing[0], mark[1] - offset - missing[1]
        except NotFound as error:
            if not log.segments.not_found(error):
                raise


def gaps(log: PartitionLog, numbers: list[int]) -> tuple[int, int]:
    """(bytes, records) that compaction took from these segments."""
    missing = [0, 0]
    if log.native.compacted:
        for number, following in pairwise(numbers):
            found = _gap(log, number, following)
            missing[0] += found[0]
            missing[1] += found[1]
    return missing[0], missing[1]


def _gap(log: PartitionLog, number: int, following: int) -> tuple[int, int]:
    segment = log.segments.activated(number)
    record = segment.compaction
    if record is None:
        return 0, 0
    end = log.segments.base(following)
    held = end[0] - segment.base_position, end[1] - segment.base_offset
    return max(held[0] - record[2], 0), max(held[1] - record[3], 0)
