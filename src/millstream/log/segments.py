"""Which segment files a partition has: listed, found by position or offset, mapped, given up."""

from __future__ import annotations

from bisect import bisect_right

from millstream import _native
from millstream.disk import files
from millstream.errors import CorruptBatch, NotFound
from millstream.log import segment_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from millstream.disk.session import Session
    from millstream.log.cache import SegmentCache

__all__ = ["Segments"]


class Segments:
    """The segments of one partition, as this process has them mapped.

    Attributes:
        path: the directory of the partition.
        native: its control block, which says where the log begins and is appended to.
        numbers: of the log's segments, rising, as they were when they were listed last.
    """

    def __init__(
        self,
        session: Session,
        path: files.Path,
        index: int,
        stream_id: int,
        native: _native.Partition,
        cache: SegmentCache,
    ) -> None:
        self.session, self.path, self.native = session, path, native
        self.numbers: list[int] = []
        self._index, self._stream_id, self._cache = index, stream_id, cache
        self._structure = -1
        self._bases: dict[int, tuple[int, int]] = {}
        self._inodes: dict[int, int] = {}
        """Inodes of the mapped files: compaction may have replaced a file since."""
        self._unsealed: set[int] = set()
        self._lock = _native.Lock(f"{path}: its segments", session.members, reentrant=True)

    def file(self, number: int) -> files.Path:
        """Path of a segment."""
        return self.path / f"{number:016d}.seg"

    def listed(self) -> list[int]:
        """Numbers of all published segment files, rising."""
        names = files.names(self.path)
        return sorted(int(name[:16]) for name in names if segment_file.is_segment(name))

    def refresh(self) -> None:
        """Read again which segments the log has."""
        with self._lock:
            structure, first, active = (
                self.native.structure,
                self.native.first_segment,
                self.native.active_number,
            )
            numbers = [number for number in self.listed() if first <= number <= active]
            for gone in set(self.numbers) - set(numbers):
                self._bases.pop(gone, None)
                self._inodes.pop(gone, None)
                self.drop(gone)
            self._drop_replaced()
            self.numbers, self._structure = numbers, structure

    def _drop_replaced(self) -> None:
        """Let go of the maps whose file is not the one of that name any more: it was compacted.

        Readers that hold such a map go on in it: it has all that it had.
        """
        if not self.native.compacted:
            return
        for number, inode in self._inodes.copy().items():  # which others add to
            if files.inode(self.file(number)) != inode:
                self._inodes.pop(number, None)
                self.drop(number)

    def current(self) -> list[int]:
        """The numbers of the log's segments."""
        active = self.native.active_number
        moved = active and (not self.numbers or self.numbers[-1] != active)
        if self._structure != self.native.structure or (moved and not self._has_rolled(active)):
            self.refresh()
        return self.numbers

    def _has_rolled(self, active: int) -> bool:
        """Has the core only gone on to the next segment? Then a sync need not list the files."""
        segment = self.native.active
        with self._lock:
            if self._structure != self.native.structure or segment is None or not self.numbers:
                return False
            if segment.number != active or not segment.activated:
                return False
            if segment.predecessor == self.numbers[-1]:
                self.numbers = [*self.numbers, active]
            return self.numbers[-1] == active

    def segment(self, number: int, *, write: bool = False) -> _native.Segment:
        """Map a segment, or find it mapped."""
        found = self._cache.get(self, number)
        if self.session.layered and self._may_be_copied_up(number):
            write = write or self.session.writable
            found = found if found is not None and found.writable else None
        if found is not None and (found.writable or not write):
            return found
        path = self.file(number)
        descriptor = files.open_file(path, write=write)
        try:
            length = files.size(descriptor)
            inode = self._inodes[number] = files.inode(descriptor)
            mapping = files.map_file(descriptor, length, path, write=write)
        finally:
            files.close(descriptor)
        segment = _native.Segment(
            mapping, self.session.id, self._stream_id, self._index, number, write, path
        )
        self._cache.put(self, segment)
        if self._inodes.get(number) != inode:  # compaction has put another in its place meanwhile
            self.drop(number)
            return self.segment(number, write=write)
        return segment

    def is_mapped(self, segment: _native.Segment, descriptor: int) -> bool:
        """Is an open file the one that a segment is a map of?"""
        return self._inodes.get(segment.number) == files.inode(descriptor)

    def _may_be_copied_up(self, number: int) -> bool:
        """On an overlay: may a map of it have been made before somebody opened it to append?

        The map would stay with the file below. So what is appended to is mapped anew by readers
        each time, once more when it is sealed, and by writers only to write, which copies it up.
        """
        if number >= self.native.active_number:
            self._unsealed.add(number)
            return True
        if number in self._unsealed:
            self._unsealed.discard(number)
            return True
        return False

    def drop(self, number: int) -> None:
        """Let the map of one go."""
        self._cache.drop(self, number)

    def forget(self) -> None:
        """Let all maps go."""
        self._cache.forget(self)

    def let_go(self, segment: _native.Segment) -> None:
        """The cache gives a map up: what was made from it lives on, the next append maps anew."""
        if self.native.active is segment:
            self.native.set_active(None)
        if self.native.next is segment:
            self.native.set_next(None)
        self.native.displace()
        descriptor = segment.give_up()
        if descriptor >= 0:
            files.close(descriptor)

    def activated(self, number: int) -> _native.Segment:
        """Map a segment of the log, which must have a valid activation record."""
        return self._checked(self.segment(number))

    @staticmethod
    def _checked(segment: _native.Segment) -> _native.Segment:
        if not segment.activated:
            raise CorruptBatch(
                f"{segment.path}: its activation record is not valid; nothing was changed, see"
                " `millstream verify`",
                path=segment.path,
                position=files.PAGE,
            )
        return segment

    def base(self, number: int) -> tuple[int, int]:
        """(base position, base offset) of a segment of the log; they never change."""
        found = self._bases.get(number)
        if found is None:
            segment = self.activated(number)
            found = self._bases[number] = (segment.base_position, segment.base_offset)
        return found

    def _last_at_or_before(self, which: int, wanted: int) -> tuple[_native.Segment, int] | None:
        """The last segment whose base is at most `wanted`, and where it ends.

        `which` says what base: 0 the position, 1 the offset.
        """
        # Before the numbers: what was appended later may lie in a segment they do not have
        tail = self.native.tail
        numbers = self.current()
        try:
            at = bisect_right(numbers, wanted, key=lambda number: self.base(number)[which])
            if at == 0:
                return None
            end = self.base(numbers[at])[0] if at < len(numbers) else tail
            return self.activated(numbers[at - 1]), end
        except NotFound as error:
            if not self.not_found(error):
                raise
        return self._last_at_or_before(which, wanted)

    def locate(self, position: int) -> tuple[_native.Segment, int] | None:
        """The segment that holds a position below the tail, and the position where it ends."""
        return self._last_at_or_before(0, position)

    def locate_offset(self, offset: int) -> tuple[_native.Segment, int] | None:
        """The segment that holds an offset, and the position where it ends."""
        return self._last_at_or_before(1, offset)

    def between(self, begin: int, end: int) -> list[tuple[_native.Segment, int, int]]:
        """The segments that hold the positions [begin, end), with their parts.

        What is retired is left out.
        """
        while True:
            parts: list[tuple[_native.Segment, int, int]] = []
            until = end
            try:
                for number in reversed(self.current()):
                    base = self.base(number)[0]
                    # Also those without a batch, too small for the one that came: the next one
                    # names them.
                    if base < end and (base >= begin or until > begin):
                        parts.append((self.activated(number), max(begin, base), min(end, until)))
                    until = base
                    if base < begin:
                        break
                return parts[::-1]
            except NotFound as error:
                if not self.not_found(error):
                    raise

    def allocated_bytes(self) -> int:
        """Bytes of disk that the partition's files take."""
        return sum(files.allocated_bytes(self.path / name) for name in files.names(self.path))

    def not_found(self, error: NotFound) -> bool:
        """Was a segment retired while it was searched for? Then search again."""
        self.refresh()  # another thread may have done so since the caller had its numbers
        return error.path not in {str(self.file(number)) for number in self.numbers}
