"""A consumer group: a file that says which member has which partition, and the positions."""

from __future__ import annotations

import contextlib
import os
import time

from millstream import _native
from millstream._native import Position
from millstream.disk import files
from millstream.disk.files import LIVE
from millstream.disk.session import LATE_SECONDS, LOCK_SECONDS
from millstream.errors import (
    Closed,
    CorruptBatch,
    Indeterminate,
    InvalidArgument,
    InvalidType,
    NotFound,
    Poisoned,
    StorageError,
)
from millstream.log import reader, settings
from millstream.options import as_index
from millstream.timestamps import is_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    from millstream.groups.stats import GroupMember, GroupPartition, GroupStats
    from millstream.log.handle import Figures, StreamHandle
    from millstream.log.partition import PartitionLog

__all__ = ["Group"]

DIRECTORY = "groups"
SUFFIX = ".group"


def path_of(stream: StreamHandle, name: str) -> files.Path:
    """The file of a group."""
    return stream.path / DIRECTORY / (settings.check_name(name) + SUFFIX)


def names(stream_path: files.Path) -> list[str]:
    """The groups of a stream, sorted."""
    directory = stream_path / DIRECTORY
    files.require_directory(directory)
    found = (name[: -len(SUFFIX)] for name in files.names(directory) if name.endswith(SUFFIX))
    return sorted(name for name in found if settings.is_name(name))


# --- where to begin -------------------------------------------------------------------------------


def epoch_at(stream: StreamHandle, partition: int, offset: int) -> int:
    """The epoch of an offset that is there, or of the next one."""
    found = stream._log(partition).segments.locate_offset(offset)
    return stream.session.generation if found is None else int(found[0].epoch)


def position_at(stream: StreamHandle, partition: int, start: Any) -> Position:
    """The position at which `read` would begin. Raises OffsetOutOfRange."""
    log = stream._log(partition)
    if isinstance(start, Position):
        if start.partition != partition:
            raise InvalidArgument(f"{start!r} is not of partition {partition}")
        reader.check_epoch(log, start.epoch, start.offset)
        if not log.first_offset <= start.offset <= log.next_offset:
            raise log.out_of_range(start.offset)
        return start
    offset = reader.PartitionReader(log, start, durable=False, on_lost="raise").cursor.offset
    return Position(partition, epoch_at(stream, partition, offset), offset)


def first_positions(stream: StreamHandle, start: Any) -> list[Position]:
    """Where a new group begins in each partition; nothing for those of which it reads all."""
    if isinstance(start, Position):
        start = [start]
    if _is_many(start):
        given = {int(one.partition): position_at(stream, one.partition, one) for one in start}
        others = {int(one.partition): one for one in first_positions(stream, "earliest")}
        return list({**others, **given}.values())
    if isinstance(start, str) and start == "earliest":
        # A position, so that the group is told where retention removes records from now on.
        retired = [i for i in range(stream.partitions) if stream._log(i).first_offset > 0]
        return [position_at(stream, index, start) for index in retired]
    if as_index(start) is not None and stream.partitions > 1:
        raise InvalidArgument(
            f"start {start!r}: an offset is of one partition, and there are {stream.partitions};"
            " pass a Position, or a list of them"
        )
    return [position_at(stream, index, start) for index in range(stream.partitions)]


def create(stream: StreamHandle, name: str, start: Any) -> None:
    """Publish the file of a new group; another process's may come first, and stays."""
    path = path_of(stream, name)
    session, count = stream.session, stream.partitions
    first = first_positions(stream, start)
    memory = _native.private_memory(_native.group_size(count))
    group_id, salt = (int.from_bytes(os.urandom(8), "little") for _ in range(2))
    _native.group_init(
        memory, session.id, stream._stream_id, group_id, salt, session.generation, count
    )
    draft = _Draft(path, memory, stream)
    for position in first:
        draft._set_position(position.partition, position.epoch, position.offset)
    content = memory[:]
    files.make_directory(path.parent)
    files.make(path, len(content), content)


def _telling(content: bytes) -> bytes:
    """State, generation, changes and partitions: no owner words and no deadlines."""
    return content[64:84] + content[20480:]


class _Draft(_native.GroupCore):
    """A group in memory that is about to become a file."""

    def __init__(self, path: files.Path, memory: _native.Map, stream: StreamHandle) -> None:
        self.path = path
        session = stream.session
        self._attach(
            memory, session.id, stream._stream_id, session.generation, session.members, True
        )
        self._configure_level("process")

    def _changed(self) -> None:
        pass

    def _leave_to_background(self) -> None:
        pass


class Group(_native.GroupCore):
    """A consumer group of a stream, to read and to set; `Stream.group` gives it.

    Positions and lag can be read from any process, also where the store was opened read-only.

    Attributes:
        stream: the stream.
        name: the name.
    """

    _descriptor: int = -1
    """What is said of one that was given up."""

    def __init__(self, stream: StreamHandle, name: str) -> None:
        self.stream = stream
        self.name = name
        self.path = path_of(stream, name)
        self._last_epochs: dict[int, tuple[tuple[int, ...], int]] = {}
        self._told: dict[int, tuple[Figures, Any, int | None, GroupPartition]] = {}
        """What was said of each partition last: true while all else is as it was then."""
        self._decide: Callable[[Group, int], None] | None = None
        """Called for a partition that has a pending position: apply or revert it."""
        write = stream.session.writable
        try:
            self._descriptor = files.open_file(self.path, write=write)
        except NotFound as error:
            there = names(stream.path)
            raise settings.missing(stream.path, "group", name, there) from error
        try:
            self._map()
            if write and self._generation != stream.session.generation:
                with _native.lock_of(f"{self.path}: voiding"):
                    self._void_earlier()
            if self._state != LIVE:  # who removed it came no further
                if write:
                    _unlink(self._descriptor, self.path)
                raise settings.missing(stream.path, "group", name, names(stream.path))
        except BaseException:
            self._dispose()
            raise
        self._configure_level(stream.durability)

    def __repr__(self) -> str:
        return f"<Group {self.name!r} of {self.stream!r}{' (closed)' if self.closed else ''}>"

    # --- the file ---------------------------------------------------------------------------------

    def _map(self) -> None:
        session, length = self.stream.session, files.size(self._descriptor)
        mapping = files.map_file(self._descriptor, length, self.path, write=session.writable)
        self._below = mapping if session.follows_layers else None
        stream_id, generation = self.stream._stream_id, session.generation
        self._attach(mapping, session.id, stream_id, generation, session.members, session.writable)

    def _map_again(self) -> None:
        self._check_live()
        self._map()
        if self._room < self._partitions:
            raise CorruptBatch(
                f"{self.path}: shorter than its {self._partitions} partitions need; see `millstream"
                " verify`",
                path=self.path,
                expected=_native.group_size(self._partitions),
                found=files.size(self._descriptor),
            )

    def _is_behind(self) -> bool:
        """Does a reader's map miss what the file says, of members, holders and positions?

        What is compared never comes back to a value that it had. So where the file said the same
        before and after, a map of that file says it as well.
        """
        if self._below is None:
            return False
        before, shown, after = self._stored(), self._below[:], self._stored()
        return _telling(before) == _telling(after) != _telling(shown)

    def _stored(self) -> bytes:
        return files.read(self._descriptor, files.size(self._descriptor), 0, self.path)

    def _tune(self) -> None:
        """Follow the level of the stream."""
        self._configure_level(self.stream.durability)
        self._take_changed()  # so that the next commit reports again

    def _void_earlier(self) -> None:
        """As the first of this generation: no member of an earlier one lives."""
        files.lock(self._descriptor, 0, self.path, timeout=LOCK_SECONDS)
        try:
            if self._generation == self.stream.session.generation:
                return
            # A copied directory may have holes where the original had blocks.
            files.allocate(self._descriptor, files.size(self._descriptor), self.path)
            self._void()
            if self._poison:
                # What a failed sync may have called clean is written again: all of the file is.
                content = files.read(self._descriptor, files.size(self._descriptor), 0, self.path)
                files.write(self._descriptor, content, 0, self.path)
                files.sync(self._descriptor, self.path)
                self._set_poison(0)
        finally:
            files.unlock(self._descriptor, 0)

    def _follow(self) -> None:
        """Have room for the partitions that were added since."""
        wanted = self.stream.partitions
        if self.stream.session.writable and self._partitions < wanted:
            files.allocate(self._descriptor, _native.group_size(wanted), self.path)
            self._map()
            self._grow(wanted)
            self.stream._wake()
        elif self._room < self._partitions:
            self._map()

    def _keep_up(self) -> None:
        """As a call begins: check, and do what others left to whoever comes."""
        self.stream._keep_up()
        self._check_live()

    @property
    def removed(self) -> bool:
        """Did somebody remove the group? One that was made since is another one."""
        return bool(self._state != LIVE)

    def _check_live(self) -> None:
        """Raise `Closed` where the group is not there any more, or not for this handle."""
        self.stream._check_live()
        if self.stream.session.layered:
            self.stream.session.check_layer(self.path, self._is_behind)
        if self.removed:
            raise Closed(
                f"{self.path}: the group was removed; `consumer(group={self.name!r})` of the stream"
                " makes it anew"
            )
        if self.closed:
            raise Closed(f"{self.path}: the group is closed; open the store again")

    def _check_writable(self) -> None:
        self._keep_up()
        self.stream.session.check_writable()
        if self._poison:
            raise Poisoned(
                5,
                "an earlier sync failed; close the store in every process and open it again",
                self.path,
            )

    def _dispose(self) -> None:
        if not self.closed:
            self._close()
        self._below = None
        # Of several threads one gets it: closed twice it may be what another file has got since.
        descriptor = self.__dict__.pop("_descriptor", -1)
        if descriptor >= 0:
            files.close(descriptor)

    # --- durability -------------------------------------------------------------------------------

    def _changed(self) -> None:
        if self.stream._durability == "interval":
            background = self.stream.session.notices
            background.notice_queue(self)
            if not background.runs() or self._unsynced_seconds > LATE_SECONDS:
                self._sync_in_background()

    def _leave_to_background(self) -> None:
        """A commit ends before it is as durable as it should be."""
        if self.stream._durability != "process":
            with contextlib.suppress(Exception):
                self.stream.session.notices.notice_queue(self)
                self.stream.session.notices.runs()

    def _await_log(self, partition: int, offset: int) -> None:
        """Return when the records before a position survive a power cut."""
        log = self.stream._log(partition)
        if log.native.durable_offset < offset:
            log.wait_durable(log.native.tail, time.monotonic() + LOCK_SECONDS)

    def _make_durable(self) -> None:
        """Return when all positions that were committed before this call survive a power cut."""
        begun, _ = self._syncs
        began_ns = _native.monotonic_ns()
        word = self._sync_word(f"{self.path}: syncing", LOCK_SECONDS)
        if word.mine:  # in the middle of a sync of this thread, which may have begun before
            self._sync_now()
            return
        with word:
            if self._syncs[1] <= begun:  # a sync that began after our change covers it
                self._sync_now()
        self._synced(began_ns)

    def _sync_now(self) -> None:
        """Holder of the sync word."""
        if self._poison:
            raise Poisoned(5, "an earlier sync failed", self.path)
        if self.closed or self._descriptor < 0:
            raise Closed(f"{self.path}: the group was removed or closed while it was synced")
        number = self._begin_sync()
        try:
            files.sync(self._descriptor, self.path)
        except StorageError as error:
            if not self.closed:
                self._set_poison(1)
            raise Indeterminate(
                error.errno or 5, f"the sync behind a commit failed: {error.strerror}", self.path
            ) from error
        self._end_sync(number)

    def _sync_in_background(self) -> None:
        """Sync what this process committed; by whoever commits, where it is overdue."""
        if not self._take_changed() or self.closed or self._state != LIVE or self._poison:
            return
        try:
            for log in self.stream._opened():
                log.sync()  # first: a position must not survive without the records before it
            self._make_durable()
        except BaseException:
            self._give_back_changed()
            raise

    # --- reading ----------------------------------------------------------------------------------

    @property
    def health(self) -> Literal["sound", "background failing", "sync overdue", "sync failed"]:
        """How its positions fare on their way to the disk.

        "sync failed" says the group's file, so every process sees it: commits raise `Poisoned`
        until all have closed the store. The others are of this process: "sync overdue" that what it
        committed at level "interval" has waited for more than 3 s, "background failing" that what
        syncs it does not get on.
        """
        self._keep_up()
        if self._poison:
            return "sync failed"
        if self.stream._durability == "interval" and self._unsynced_seconds > LATE_SECONDS:
            return "sync overdue"
        return "background failing" if self.stream.session.notices.trouble else "sound"

    def positions(self) -> dict[int, Position | None]:
        """Where the group goes on in each partition; None: at offset 0, nothing was committed.

        Raises: CorruptBatch where a power cut left no copy of a position.
        """
        self._keep_up()
        self._follow()
        return {index: self._committed(index) for index in range(self.stream.partitions)}

    def _committed(self, partition: int) -> Position | None:
        found = self._position(partition)
        return None if found is None else Position(partition, found[0], found[1])

    def _damaged(self, partition: int) -> CorruptBatch:
        """The error for a position of which no copy is whole."""
        with _native.loading:
            import shlex
        words = self.stream.session.path, self.stream.name, self.name, "earliest", "-p"
        command = shlex.join(["millstream", "groups", "seek", *words, str(partition)])
        return CorruptBatch(
            f"{self.path}: both copies of the position of partition {partition} are damaged, so"
            " where the group goes on there is not known; to have all its records again, close the"
            f" group's consumers and run `{command}` (or name another place than earliest);"
            " `Group.seek` and a consumer's own `seek` set it, too",
            path=self.path,
        )

    def lag(self, partition: int | None = None) -> int:
        """Records that were appended and are not committed: of one partition, or of all.

        What retention removed before the group came to it counts. Durability does not matter here.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     stream = store.stream("s")
        ...     _ = stream.append_many([b"a", b"b", b"c"])
        ...     with stream.consumer(group="g", max_records=2) as consumer:
        ...         batch = consumer.poll()
        ...         consumer.commit()
        ...     stream.group("g").lag()
        1
        """
        which = range(self.stream.partitions) if partition is None else [partition]
        self._keep_up()
        self._follow()
        return sum(self._lag(index) for index in which)

    def _lag(self, partition: int) -> int:
        log = self.stream._log(partition)
        position = self._committed(log.index)
        begin = 0 if position is None else int(position.offset)
        return max(0, log.next_offset - begin)

    def members(self) -> list[GroupMember]:
        """The members that read for the group now, and what of it."""
        self._keep_up()
        self._follow()
        return self._members_of(self._living(), self._shares())

    def _members_of(self, living: list[Any], shares: list[Any]) -> list[GroupMember]:
        with _native.loading:
            from millstream.groups.stats import GroupMember
        if not living:
            return []
        parts: dict[int, list[int]] = {}
        for index, (_, holder, _) in enumerate(shares):
            parts.setdefault(holder, []).append(index)
        describe = self.stream.session.members.describe
        return [
            GroupMember(slot, number, describe(word), joined, tuple(parts.get(slot + 1, ())))
            for slot, word, number, joined in living
        ]

    def _readers(self) -> dict[int, tuple[int, ...]]:
        """By owner word, the partitions that the consumers of a process read."""
        self._keep_up()
        self._follow()
        words = {slot + 1: word for slot, word, _, _ in self._living()}
        found: dict[int, tuple[int, ...]] = dict.fromkeys(words.values(), ())
        for index, (_, holder, _) in enumerate(self._shares() if words else ()):
            if holder in words:
                found[words[holder]] += (index,)
        return found

    def _living(self) -> list[tuple[int, int, int, int]]:
        """(slot, owner word, number, joined) of each member whose process is not proved dead.

        The next process to open the store to write ends the others; a reader must see them so.
        """
        if self._generation != self.stream.session.generation:
            return []  # of a generation that nobody lives in
        is_dead = self.stream.session.members.is_dead
        return [member for member in self._members() if not is_dead(member[1])]

    def partitions(self) -> list[GroupPartition]:
        """Position, end, lag and owner of each partition, as of now.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     stream = store.stream("s")
        ...     _ = stream.append_many([b"a", b"b"], timestamps=[5, 6])
        ...     with stream.consumer(group="g", max_records=1) as consumer:
        ...         batch = consumer.poll()
        ...         consumer.commit()
        ...     part, = stream.group("g").partitions()
        ...     part.lag, part.lag_seconds > 86400
        (1, True)
        """
        self._keep_up()
        self._follow()
        return self._partitions_of(self._living(), self._shares(), self.stream._all_figures())

    def _partitions_of(
        self, living: list[Any], shares: list[Any], figures: list[Figures]
    ) -> list[GroupPartition]:
        with _native.loading:
            from millstream.frozen import frozen
            from millstream.groups.stats import GroupPartition
        slots = {member[0] for member in living}
        found, none = [], (None, 0, 0)
        for index, one in enumerate(figures):
            share = shares[index] if index < len(shares) else none
            owner = share[1] - 1 if share[1] - 1 in slots else None
            told = self._told.get(index)
            if told is not None and told[0] == one and told[1] == share and told[2] == owner:
                found.append(told[3])
                continue
            log, key, _, first, end, _, _, _ = one
            position, begin, lost = None, 0, False
            if share[0] is not None:
                epoch, begin, _ = share[0]
                position = Position(index, epoch, begin)
                lost = not self._is_held(log, key, epoch, begin, end)
            lag = max(0, end - begin)
            if not lag or first >= end:
                since = None
            elif (
                told is not None
                and told[3].lag_since is not None
                and told[1][0] == share[0]
                and told[0][1] == key
                and told[0][3] == first
            ):
                since = told[3].lag_since  # it is the same record that waits
            else:
                since = self.stream._time_at(index, max(begin, first))
            part = frozen(
                GroupPartition,
                {
                    "partition": index,
                    "position": position,
                    "next_offset": end,
                    "lag": lag,
                    "lag_since": since,
                    "lost": lost,
                    "owner": owner,
                    "fence": share[2],
                },
            )
            found.append(part)
            self._told[index] = one, share, owner, part
        return found

    def _is_held(
        self, log: PartitionLog, key: tuple[int, ...], epoch: int, offset: int, end: int
    ) -> bool:
        """`reader.is_held`, without a look at the segments where none is of a later epoch."""
        known = self._last_epochs.get(log.index)
        if known is None or known[0] != key:
            found = log.segments.locate_offset(max(end - 1, 0))
            known = self._last_epochs[log.index] = key, found[0].epoch if found else 0
        return offset <= end if epoch >= known[1] else reader.is_held(log, epoch, offset)

    def stats(self) -> GroupStats:
        """The group in numbers, as of now."""
        return self._stats_of(self.stream._all_figures())

    def _stats_of(self, figures: list[Figures]) -> GroupStats:
        with _native.loading:
            from millstream.groups.stats import GroupStats
        self._keep_up()
        self._follow()
        health: str = self.health
        living = self._living()
        try:
            shares = self._shares()
            members = tuple(self._members_of(living, shares))
            partitions = tuple(self._partitions_of(living, shares, figures))
        except CorruptBatch:
            health, members, partitions = "corrupt", (), ()
        return GroupStats(self.stream.name, self.name, health, members, partitions)

    # --- changing ---------------------------------------------------------------------------------

    def seek(self, to: Any, *, partition: int | None = None) -> dict[int, Position]:
        """Set where the group goes on; it must have no members. Returns what was set.

        Durability: as a commit.

        Args:
            to: an offset (of one partition), a `Position`, a datetime, "earliest" or "latest".
            partition: one of them; None: all (that of the `Position`).

        Raises: OffsetOutOfRange, InvalidArgument where the group has members.
        """
        self._check_writable()
        self._follow()
        if isinstance(to, Position) and partition is None:
            partition = int(to.partition)
        if partition is None and as_index(to) is not None and self.stream.partitions > 1:
            raise InvalidArgument(f"to {to!r}: an offset is of one partition; say which")
        which = range(self.stream.partitions) if partition is None else [partition]
        goals = [position_at(self.stream, self.stream._log(index).index, to) for index in which]
        self._watch(True)
        for goal in goals:
            ended = self._set_position(goal.partition, goal.epoch, goal.offset)
            if ended != "ok":
                what = "members" if ended == "held" else "a transaction that is not decided"
                raise InvalidArgument(
                    f"{self.path}: the group has {what}; close its consumers first, or let one of"
                    " them seek"
                )
        return {int(goal.partition): goal for goal in goals}

    def remove(self) -> None:
        """Forget the group and its positions; it must have no members.

        Raises: InvalidArgument where it has members.
        """
        self._check_writable()
        self._watch(True)
        descriptor = files.open_file(self.path, write=True)  # another thread may let go of ours
        try:
            while not self._drop():
                if who := ", ".join(member.process for member in self.members()):
                    raise InvalidArgument(f"{self.path}: the group has members: {who}")
                self._watch(True)  # they left or died meanwhile
            _unlink(descriptor, self.path)
        finally:
            files.close(descriptor)
        self._dispose()


def _unlink(descriptor: int, path: files.Path) -> None:
    """Remove the file of a group that was dropped, maybe by one that was killed since.

    Under its lock, and by its inode: somebody else may have done it, and made the group anew.
    """
    with _native.lock_of(f"{path}: removing"):
        files.lock(descriptor, 0, path, timeout=LOCK_SECONDS)
        try:
            if files.inode(descriptor) == files.inode(path):
                files.remove(path)
        finally:
            files.unlock(descriptor, 0)
    files.sync_directory(path.parent)


def _is_many(start: Any) -> bool:
    return isinstance(start, (list, tuple)) and all(isinstance(one, Position) for one in start)


def check_start(start: Any) -> None:
    """Refuse what no consumer can begin at, also where the group is there already."""
    if isinstance(start, str):
        if start in ("earliest", "latest"):
            return
        raise InvalidArgument(f'start {start!r}: expected "earliest", "latest", a time, a Position')
    if isinstance(start, Position) or _is_many(start) or is_time(start):
        return
    if as_index(start) is None:
        raise InvalidType(
            f'start {start!r}: expected "earliest", "latest", a datetime, an offset, a Position or'
            " a list of them"
        )


# --- a store that nobody has open -----------------------------------------------------------------


def sync_all(stream_path: files.Path) -> bool:
    """As the last to close: sync the groups of a stream; False: a sync of one failed earlier."""
    for name in names(stream_path):
        path = stream_path / DIRECTORY / (name + SUFFIX)
        with contextlib.suppress(NotFound):
            descriptor = files.open_file(path, write=True)
            try:
                if files.read(descriptor, 4, 68, path) != bytes(4):
                    return False
                files.sync(descriptor, path)
            finally:
                files.close(descriptor)
    return True


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Group.__module__ = "millstream"
