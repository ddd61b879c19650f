"""Recovery of one partition, at its first use in a generation: find where the log ends, and why.

What is kept is made dirty again and synced; what lies behind a torn tail is set aside under another
name. Where bytes that had been synced are damaged the log is corrupt: it stays as it is, appends
are refused, readers come as far as the damage.
"""

from __future__ import annotations

from millstream.disk import files
from millstream.errors import CorruptBatch, NotFound
from millstream.log.control import NOWHERE, POISON_CORRUPT, Mark

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream import _native
    from millstream.log.partition import PartitionLog

EVERYTHING = (1 << 64) - 1


def extend(log: PartitionLog) -> None:
    """Walk on from where the last walk ended: nobody tells a read-only process the tail."""
    if log.native.poison:
        return
    chain, _ = _chain(log)
    mark, kept, _ = _walk(log, chain, searching=False)
    _open(log, chain, mark, kept, log.native.poison)


def recover(log: PartitionLog) -> None:
    """Walk the partition and open it for this generation. Other processes wait, or find it done."""
    if not log.session.writable:
        _recover_owned(log)
        return
    with log.native.word("walk", str(log), 600.0):
        if log.native.walked != log.session.generation:
            _recover_owned(log)


def _recover_owned(log: PartitionLog) -> None:
    chain, rest = _chain(log)
    mark, kept, reason = _walk(log, chain)
    poison = 0
    readable = [segment for segment in rest if segment]
    doubtful = reason or any(segment.activated or _was_used(segment) for segment in readable)
    if None in rest or (doubtful and _synced_behind(chain[kept:], readable, mark[0], bool(chain))):
        poison = POISON_CORRUPT
    if mark[0] < log.native.synced_to:
        poison = POISON_CORRUPT  # it was synced, and its file is not there, or not whole
    if kept < len(chain) and poison == 0:
        readable = chain[kept + 1 :] + readable
        chain = chain[: kept + 1]
    if log.session.writable:
        _remove_unpublished(log)
        if poison == 0:
            _set_aside(log, readable)
        _sync_kept(log, chain, mark)
    _open(log, chain, mark, kept, poison)


def _open(
    log: PartitionLog, chain: list[_native.Segment], mark: Mark, kept: int, poison: int
) -> None:
    first = chain[0] if chain else None
    oldest = first.number if first else log.native.first_segment if poison else 0
    active = chain[min(kept, len(chain) - 1)].number if chain else 0
    log.native.recovered(mark, active, oldest, first.base_offset if first else mark[1], poison)
    if any(segment.compaction for segment in chain):
        log.native.replaced()
    log.native.set_active(None)
    log.native.set_next(None)
    log.segments.refresh()


def _chain(log: PartitionLog) -> tuple[list[_native.Segment], list[_native.Segment | None]]:
    """The segments that follow one another, and the others.

    Others are spares, what a power cut left, and None where the header of a file is damaged.
    """
    chain: list[_native.Segment] = []
    rest: list[_native.Segment | None] = []
    listed = log.segments.listed()
    # The oldest one is missing, and retention did not take it.
    broken = not log.is_open and log.native.first_segment not in (0, *listed)
    for number in listed:
        try:
            segment = log.segments.segment(number, write=log.session.writable)
        except NotFound:
            continue  # retired by another process, while we only read
        except CorruptBatch:
            # It was synced before the file had its name, so no power cut did this
            rest.append(None)
            broken = True
            continue
        # First: a spare that was mapped earlier may be in use by now, and this reads its record.
        activated = segment.activated
        # A spare below is one that a slow process published after others had gone on: it holds
        # nothing.
        before = {other.number for other in rest if other}
        follows = (
            segment.predecessor == chain[-1].number if chain else segment.predecessor not in before
        )
        broken = broken or (activated and not follows)
        (chain if activated and not broken else rest).append(segment)
    return chain, rest


def _walk(
    log: PartitionLog, chain: list[_native.Segment], *, searching: bool = True
) -> tuple[Mark, int, str]:
    """(end of the valid log, index of the segment it lies in, what is wrong there or "")."""
    mend = log.session.writable
    start, mark = _start(log, chain)
    reason = ""
    index = start
    for index in range(start, len(chain)):
        segment = chain[index]
        if index > start:
            mark = (mark[0], mark[1], segment.predecessor_hash, mark[3])
        last = index + 1 == len(chain)
        limit = EVERYTHING if last else chain[index + 1].base_position
        mark, reason = segment.walk(mark, limit, mend)
        if last:
            if reason == "end":
                reason = ""
            break
        if (
            mark[0] != limit
            or mark[2] & 0xFFFFFFFF != chain[index + 1].predecessor_hash & 0xFFFFFFFF
        ):
            reason = reason or "the next segment does not follow"
            break
    if (
        searching
        and index + 1 == len(chain)
        and chain
        and reason == ""
        and not _zero_at(chain[index], mark[0])
    ):
        reason = "bytes behind the last batch"
    return mark, index, reason


def _zero_at(segment: _native.Segment, position: int) -> bool:
    return segment.search(position, files.data_end(segment.path)) is None


def _start(log: PartitionLog, chain: list[_native.Segment]) -> tuple[int, Mark]:
    """Where to begin.

    At the durable mark where its hash fits, else at its segment's start, else at the first.
    """
    if not chain:
        return 0, NOWHERE
    durable, durable_hash = log.native.durable, log.native.durable_hash
    index = 0
    for i, segment in enumerate(chain):
        if segment.base_position <= durable and durable:
            index = i
    segment = chain[index]
    base: Mark = (
        segment.base_position,
        segment.base_offset,
        segment.predecessor_hash,
        segment.timestamp_max,
    )
    following = chain[index + 1].base_position if index + 1 < len(chain) else segment.capacity_end
    if segment.base_position < durable <= following:
        try:
            mark = segment.mark_at(durable)
        except CorruptBatch:
            return index, base
        if mark[2] & 0xFFFFFFFF == durable_hash:
            return index, mark
    return index, base


def _was_used(segment: _native.Segment) -> bool:
    """Is there something where the activation record or the first batch of a spare would be?"""
    segment.suppose(0)
    head = segment.contents(64)
    return any(head[files.PAGE : files.PAGE + 72]) or any(head[-64:])


def _synced_behind(
    chain: list[_native.Segment], rest: list[_native.Segment], failure: int, begun: bool
) -> bool:
    """Is there a valid batch behind the failure, written when the failing bytes had been synced?"""
    if not begun:
        # The oldest segment has no activation record: it lies before the oldest that has one.
        bases = [segment.base_position for segment in rest if segment.activated]
        first = rest[0].number if rest else 1
        failure = 0 if first == 1 or not bases else max(min(bases) - 1, 0)
    for segment in chain + rest:
        if not segment.activated:
            segment.suppose(failure)  # where it must have begun, if it was the next one
        position, data_end = max(failure, segment.base_position), files.data_end(segment.path)
        while position < segment.capacity_end:
            found = segment.search(position, data_end)
            if found is None:
                break
            position, synced = found
            if synced > failure:
                return True
            position += 8
    return False


def _set_aside(log: PartitionLog, segments: list[_native.Segment]) -> None:
    """Rename what is cut off to ``.lost``; unlink spares that hold nothing but zeros."""
    for segment in segments:
        path = segment.path
        if not segment.activated and _is_empty(path):
            files.remove(path)
        else:
            files.rename(path, path + ".lost")
        log.segments.drop(segment.number)
    if segments:
        files.sync_directory(log.path)


def _is_empty(path: files.Path) -> bool:
    """Nothing but zeros behind the header page?"""
    descriptor = files.open_file(path, write=False)
    try:
        position, size = files.PAGE, files.size(descriptor)
        while position < size:
            data = files.read(descriptor, 1 << 20, position, path)
            if data.count(0) != len(data):
                return False
            position += len(data) or size
    finally:
        files.close(descriptor)
    return True


def _remove_unpublished(log: PartitionLog) -> None:
    """Remove what the dead were making. The living make nothing here before the walk has ended."""
    for name in files.names(log.path):
        if name.endswith(".tmp"):
            files.remove(log.path / name)


def _sync_kept(log: PartitionLog, chain: list[_native.Segment], mark: Mark) -> None:
    """Make what is kept dirty again and sync it.

    After a failed sync the kernel calls unwritten pages clean.
    """
    durable = log.native.durable
    for i, segment in enumerate(chain):
        end = chain[i + 1].base_position if i + 1 < len(chain) else mark[0]
        if end < durable or segment.base_position > mark[0]:
            continue
        kept = min(end, mark[0])
        if segment.compaction:  # what it saves stays a hole, but for the header of the filler
            kept = min(kept, segment.base_position + segment.compaction[2] + 64)
        descriptor = files.open_file(segment.path, write=True)
        try:
            # A copy of the directory may have holes, and no store may go into one.
            head = segment.size - segment.data_bytes
            files.allocate(descriptor, head + kept - segment.base_position, segment.path)
            segment.dirty(max(segment.base_position, min(durable, end)), kept)
            files.sync(descriptor, segment.path)
        finally:
            files.close(descriptor)
    if files.exists(log.path):
        files.sync_directory(log.path)
