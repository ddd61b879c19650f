"""Retention: whole segments go, oldest first, whatever reads them."""

from __future__ import annotations

from millstream.errors import InvalidType
from millstream.log import compacted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream._native import Position
    from millstream.log.handle import StreamHandle
    from millstream.log.partition import PartitionLog
    from millstream.options import Retention


def retire(log: PartitionLog, keep: Retention) -> int:
    """Remove the segments that a retention does not keep; how many."""
    if keep.bytes is None and keep.age is None and keep.records is None:
        return 0
    with log.maintaining:
        numbers = log.segments.current()
        if not numbers:
            return 0
        mark = log.end()
        clock = log.session.clock
        first = numbers[0]
        for i, following in enumerate(numbers[1:], 1):
            after = log.segments.activated(following)
            bytes_, records = 0, 0
            if keep.bytes is not None or keep.records is not None:
                bytes_, records = compacted.gaps(log, numbers[i:])
            bytes_ = mark[0] - after.base_position - bytes_
            records = mark[1] - after.base_offset - records
            too_many_bytes = keep.bytes is not None and bytes_ >= keep.bytes
            too_many = keep.records is not None and records >= keep.records
            # Its last append came before its successor was activated.
            too_old = keep.age is not None and clock.age(after.activated_at) > keep.age
            if not (too_many_bytes or too_many or too_old):
                break
            first = following
        return log.retire_before(first)


def delete_before(stream: StreamHandle, position: Position) -> int:
    """`Stream.delete_before`."""
    from millstream._native import Position

    if not isinstance(position, Position):
        raise InvalidType(f"position {position!r}: expected a Position")
    log = stream._log(position.partition)
    if not log.first_offset <= position.offset <= log.next_offset:
        if position.offset < log.first_offset:
            return log.first_offset
        raise log.out_of_range(position.offset)
    with log.maintaining:
        found = log.segments.locate_offset(position.offset)
        if found is not None:
            log.retire_before(found[0].number)
    return log.first_offset
