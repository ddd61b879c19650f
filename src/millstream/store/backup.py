"""A consistent copy of a store while others write.

Bytes below a tail never change, so copying up to it is enough. Queues: see queues/backup.py.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from millstream import _native
from millstream.disk import files, members
from millstream.errors import Closed, InvalidArgument, NotFound, StorageError
from millstream.groups import group
from millstream.log import eras, sequences

if TYPE_CHECKING:
    from millstream.log.partition import PartitionLog
    from millstream.store.store import Store
    from millstream.streams.stream import Stream

CHUNK_BYTES = 4 << 20
Handle = TypeVar("Handle")


def backup(store: Store, path: str) -> None:
    """Copy `store` to the new directory at `path`."""
    if files.lies_in(path, store.session.directory):
        raise InvalidArgument(f"{path}: lies within the store that is to be copied")
    made = files.make_target(path)
    directory = files.Directory(path, follow=True)
    try:
        target = directory.path
        if set(files.names(target)) - {files.LOST_AND_FOUND}:
            raise StorageError(
                39, "the target of a backup must be an empty or a new directory", target
            )
        try:
            _copy(store, target)
        except BaseException as error:
            _remove(directory, error, whole=made)
            raise
    finally:
        directory.close()


def _remove(directory: files.Directory, error: BaseException, *, whole: bool) -> None:
    """What a copy that failed has made; what cannot be removed is said with the error."""
    try:
        if whole:
            files.remove_whole(directory)
            return
        for name in files.names(directory.path):
            if name != files.LOST_AND_FOUND:
                files.remove_any(directory.path / name)
    except StorageError as left:
        error.add_note(f"what was copied is still there: {left}")


def _copy(store: Store, target: files.Path) -> None:
    files.make_directory(target / "streams")
    had_journal = store._transactions.exist()
    moment = _capture(store, target)
    if (
        store._transactions.exist() and not had_journal
    ):  # the first transaction of all came in between
        if files.exists(target / "queues"):
            files.remove_tree(target / "queues")
        moment = _capture(store, target)
    if moment is None:
        return
    for stream, tails, groups in moment:
        directory = target / "streams" / stream.name
        with _unless_dropped(store, store.stream, stream, directory):
            _copy_stream(stream, tails, directory)
            _copy_groups(groups, directory / "groups")
    body = files.read_json(store.session.config_path)
    body["clean"] = False
    body["clock"] = store.session.clock.state()
    members.create(target, store.session.id)
    files.write_json(target / "store.json", body)
    files.sync_directory(target)


def _capture(
    store: Store, target: files.Path
) -> list[tuple[Stream, list[tuple[int, bytes]], dict[str, bytes]]] | None:
    """How far the logs of each stream go, and its groups; the queues are copied.

    All of it between two transactions: the journal is not copied, since all in it is done.
    Where something is, and this reader cannot do it, the whole store is copied as it lies: None.
    """
    with store._transactions.none_commits() as is_done:
        if not is_done:
            _copy_as_it_lies(store.session.root, target)
            return None
        streams = list(_there(store.stream, store.streams()))
        groups: dict[Stream, dict[str, bytes]] = {}
        ends: dict[Stream, list[tuple[int, bytes]]] = {}
        for stream in streams:  # before the logs, so that no position is behind their ends
            with _unless_dropped(store, store.stream, stream):
                groups[stream] = _groups(stream)
        for stream in groups:  # one moment for all partitions: how far each log goes now
            with _unless_dropped(store, store.stream, stream):
                ends[stream] = [
                    sequences.snapshot(stream._log(index)) for index in range(stream.partitions)
                ]
        if store.queues():
            with _native.loading:
                from millstream.queues import backup as queue_backup
            files.make_directory(target / "queues")
            for queue in _there(store.queue, store.queues()):
                directory = target / "queues" / queue.name
                with _unless_dropped(store, store.queue, queue, directory):
                    queue_backup.copy(queue, directory)
            files.sync_directory(target / "queues")
    return [(stream, end, groups[stream]) for stream, end in ends.items()]


def _there(handle: Callable[..., Handle], names: list[str]) -> Iterator[Handle]:
    """Handles of all that others have not dropped meanwhile; none is made anew."""
    for name in names:
        with contextlib.suppress(NotFound):
            yield handle(name, create=False)


@contextlib.contextmanager
def _unless_dropped(
    store: Store, make: Callable[..., object], one: Any, copy: files.Path | None = None
) -> Iterator[None]:
    """Go on without what another process drops in the block, and without what was copied of it."""
    try:
        yield
        if one.path.directory.was_dropped:  # so that what was not there is no part of it
            raise NotFound(f"{one.path}: was dropped")
    except (Closed, NotFound):
        store.session.check_open()
        try:
            dropped = make(one.name, create=False) is not one
        except NotFound:
            dropped = True
        if not dropped:
            raise
        if copy is not None and files.exists(copy):
            files.remove_tree(copy)


def _copy_as_it_lies(source: files.Path, target: files.Path) -> None:
    """A directory that nobody writes to; whoever opens the copy to write recovers it."""
    # What makes a store of it comes last.
    for name in sorted(files.names(source), key=lambda name: (name == "store.json", name)):
        if name == files.LOST_AND_FOUND:
            continue
        if stat.S_ISDIR(files.mode(source / name)):
            files.make_directory(target / name)
            _copy_as_it_lies(source / name, target / name)
        else:
            _copy_file(source / name, target / name)
    files.sync_directory(target)


def _copy_file(source: files.Path, target: files.Path) -> None:
    end = files.data_end(source)
    descriptor = files.open_file(source, write=False)
    try:
        copy = files.open_file(target, write=True, create=True)
        try:
            for at in range(0, end, CHUNK_BYTES):
                data = files.read(descriptor, min(CHUNK_BYTES, end - at), at, source)
                files.write(copy, data, at, target)
            files.extend(copy, files.size(descriptor), target)
            files.sync(copy, target)
        finally:
            files.close(copy)
    finally:
        files.close(descriptor)


def _groups(stream: Stream) -> dict[str, bytes]:
    """The files of a stream's groups. A copy of a position that is torn leaves the other one."""
    found = {}
    for name in stream.groups():
        with contextlib.suppress(NotFound):  # it was removed meanwhile
            path = group.path_of(stream, name)
            descriptor = files.open_file(path, write=False)
            try:
                found[path.name] = files.read(descriptor, files.size(descriptor), 0, path)
            finally:
                files.close(descriptor)
    return found


def _copy_groups(found: dict[str, bytes], target: files.Path) -> None:
    if found:
        files.make_directory(target)
    for name, content in found.items():
        files.make(target / name, len(content), content)


def _copy_stream(stream: Stream, tails: list[tuple[int, bytes]], target: files.Path) -> None:
    files.make_directory(target)
    config = files.read_json(stream.path / "stream.json")
    eras.cut(config, len(tails))
    files.write_json(target / "stream.json", config)
    for index, (tail, saved) in enumerate(tails):
        directory = target / f"{index:05d}"
        files.make_directory(directory)
        _copy_partition(stream._log(index), tail, directory)
        if saved:
            files.replace(directory / "sequences", saved)
        files.sync_directory(directory)
    producers = stream.path / "producers"
    if files.exists(producers):  # after the tails: whoever appended before them is in it
        files.replace(target / "producers", files.content(producers))
    files.sync_directory(target)


def _copy_partition(log: PartitionLog, tail: int, directory: files.Path) -> None:
    copied: list[files.Path] = []
    numbers = log.segments.current()
    for i, number in enumerate(numbers):
        try:
            segment = log.segments.activated(number)
            following = (
                log.segments.activated(numbers[i + 1]).base_position
                if i + 1 < len(numbers)
                else tail
            )
        except NotFound:
            # Retention was faster: what it removed here and before it is no part of the log any
            # more.
            while copied:
                files.remove(copied.pop())
            continue
        if segment.base_position > tail:
            break
        path = directory / segment.path.name
        _copy_segment(segment, min(following, tail), path)
        copied.append(path)


def _copy_segment(segment: _native.Segment, end: int, target: files.Path) -> None:
    """Header, activation record, index and batches below `end`; the rest stays a hole."""
    descriptor = files.open_file(target, write=True, create=True)
    try:
        if segment.compaction:  # and a hole up to where the log goes on
            end = min(end, segment.base_position + segment.compaction[2] + 64)
        view = segment.contents(end)
        for at in range(0, len(view), CHUNK_BYTES):
            files.write(descriptor, view[at : at + CHUNK_BYTES], at, target)
        files.extend(descriptor, segment.size, target)
        files.sync(descriptor, target)
    finally:
        files.close(descriptor)
