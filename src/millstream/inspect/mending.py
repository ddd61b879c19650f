"""Repair: set damaged bytes of a closed store aside; what lies behind them can be read again.

Rules: (1) no damaged byte is deleted: a file is changed by putting a changed copy in its place, and
stays beside it as `.corrupt`. (2) A name is never without the old or the new file behind it.
(3) The store is set unclean last, and only when no problem is left: that a store is clean may
be all that tells damage at a tail from a torn one, which the next open would cut off.
Crash: after a kill at any instruction run it again; at worst a `.tmp` copy lies about.

Threads: one call at a time a store, held by the gate; no other process may have it open.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from millstream.errors import NotFound, StorageError, VersionMismatch
from millstream.inspect import producers
from millstream.inspect.catalog import (
    STORE_JSON,
    SegmentInfo,
    StoreInfo,
    check_members,
    linked_elsewhere,
    open_store,
    open_stream,
    probe,
    read_json,
    stream_paths,
    unreadable,
)
from millstream.inspect.columns import Batch, decode
from millstream.inspect.layout import (
    ACTIVATION,
    BATCH,
    BATCH_BYTES_MAX,
    FILLER,
    LOW,
    MEMBER,
    File,
    Invalid,
    Place,
    Problem,
    hash64,
    top_of,
)
from millstream.inspect.mending_queues import plan
from millstream.inspect.queues import queue_paths
from millstream.inspect.reading import logs
from millstream.inspect.walk import Log, Walk, unactivated

COPY_BYTES = 1 << 20
Patch = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that repair did, would do (`dry_run`), or cannot do.

    `kind`: "filler", "activation", "given_up", "sequences", "slots", "blocks", "dedup", "message",
    "unclean" or "cannot"; `position` is a byte of the file.
    """

    kind: str
    path: Path
    position: int | None
    text: str

    def __str__(self) -> str:
        """Return one line."""
        at = "" if self.position is None else f" at byte {self.position}"
        return f"{self.kind}: {self.path}{at}: {self.text}"


def repair(
    path: str | os.PathLike[str],
    stream: str | None = None,
    *,
    queue: str | None = None,
    dry_run: bool = False,
) -> list[Action]:
    """Make the valid batches behind damaged ones readable again; returns what was done.

    Records in damaged bytes stay lost, and their offsets unused. Damaged messages of queues become
    dead letters. The damaged files are kept.

    Durability: what was done is synced when the call returns.

    Args:
        path: directory of a store that no process has open.
        stream: only this one, and no queue.
        queue: only this one, and no stream.
        dry_run: change nothing, say what would be done.

    Raises:
        StorageError: a process has the store open (its pid is named), or a file system's refusal.
        NotFound: no such store, stream or queue.
    """
    with Held(top_of(path)) as place, gate(place):
        return Repair(place, dry_run=dry_run).run(stream, queue)


class Held(Place):
    """A directory that is held open: what is changed lies in it, wherever its path leads by now."""

    def __init__(self, path: Path) -> None:
        try:
            self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"no store in {path}: there is no such directory") from None
        except OSError as error:
            raise StorageError(error.errno, error.strerror, str(path)) from None
        super().__init__(path)
        found = os.fstat(self.fd)
        self.identity = found.st_dev, found.st_ino

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    @contextmanager
    def folder(self, path: Path) -> Iterator[int]:
        """A descriptor of the directory that a file of the store lies in."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(".", flags, dir_fd=self.fd)
        try:
            for name in path.relative_to(self.path).parent.parts:
                below = os.open(name, flags, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)


@contextmanager
def gate(place: Held) -> Iterator[None]:
    """Hold the gate of a store that no other process has open; StorageError if one has."""
    path, flags = place.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    name = path / "members"
    try:
        fd = os.open("members", flags, dir_fd=place.fd)
    except FileNotFoundError:
        raise NotFound(f"no store in {path}: it has no file 'members'") from None
    except OSError as error:
        raise StorageError(error.errno, error.strerror, str(name)) from None
    try:
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        except OSError as error:
            text = "a process is opening or closing the store, or repairs it; try again"
            raise StorageError(error.errno, text, str(path)) from None
        held = probe(fd, 1, 1)
        if held is not None:
            text = "a process has the store open for reading; close it there first"
            raise StorageError(errno.EBUSY, text, str(path))
        held = probe(fd, 64, 64 * 1024)
        if held is not None:
            entry = os.pread(fd, MEMBER.size, held // 64 * 64).ljust(MEMBER.size, b"\0")
            text = f"process {MEMBER.read(entry)['pid']} has the store open; close it there first"
            raise StorageError(errno.EBUSY, text, str(path))
        yield
    finally:
        os.close(fd)


class Repair:
    """One run over a store whose gate is held."""

    def __init__(self, place: Held, *, dry_run: bool) -> None:
        self.place, self.path, self.dry_run = place, place.path, dry_run
        self.actions: list[Action] = []
        self.changed = False

    def run(self, stream: str | None, queue: str | None = None) -> list[Action]:
        """Go through the streams, then the queues."""
        try:
            store, _ = open_store(self.path)
        except Invalid as bad:
            self.cannot(bad.problem("store", self.path / "store.json", None))
            return self.actions
        try:
            check_members(self.path, store.store_id)
        except Invalid as bad:
            self.cannot(bad.problem("members", self.path / "members", 0))
            return self.actions
        if (shared := linked_elsewhere(self.path)) is not None:
            self.cannot(shared)  # what is mended in one of the two may be stored to in the other
            return self.actions
        for where in [] if queue is not None else stream_paths(self.path, stream):
            try:
                found = open_stream(where)
            except Invalid as bad:
                self.cannot(bad.problem("stream", where / "stream.json", None))
                continue
            except StorageError as error:
                self.cannot(unreadable(where / "stream.json", error))
                continue
            for number in range(found.config["partitions"]):
                log = self.activations(store, Log(store, found, number))
                self.batches(log)
                made = producers.mended(store, log)
                if made is not None:
                    self.actions.append(Action("sequences", made[0], 0, made[2]))
                    self.replace(made[0], [(0, made[1])])
        for where in [] if stream is not None else queue_paths(self.path, queue):
            self.queue(store, where)
        every = stream is None and queue is None
        if self.changed and store.clean and self.all_sound(every, stream):
            text = "set unclean, so that the next open walks it"
            self.actions.append(Action("unclean", self.path / "store.json", None, text))
            if not self.dry_run:
                self.place.check()
                set_unclean(self.place)
        return self.actions

    def all_sound(self, every: bool, stream: str | None) -> bool:
        """Whether nothing is left that an open of an unclean store could take for a torn tail."""
        if any(action.kind == "cannot" for action in self.actions):
            return False
        others = (log for log in logs(self.path) if log.stream.name != stream)
        if every:
            return True
        try:
            return not any(isinstance(event, Problem) for log in others for event in log.events())
        except (StorageError, VersionMismatch):
            return False

    def cannot(self, problem: Problem) -> None:
        """Report what is beyond repair."""
        advice = problem.advice or "restore it from a backup; nothing of it can be guessed"
        text = f"cannot repair: expected {problem.expected}, found {problem.found}; {advice}"
        self.actions.append(Action("cannot", problem.path, problem.position, text))

    # activation records

    def activations(self, store: StoreInfo, log: Log) -> Log:
        """Rebuild the records that follow with certainty; returns the log as it is then."""
        broken = [f for f in log.findings if isinstance(f, Problem) and f.kind == "activation"]
        for problem in broken:
            rebuilt = rebuild(log, problem.path, store)
            if rebuilt is None:
                continue
            text = f"rebuilt for position {rebuilt.base_position}, offset {rebuilt.base_offset}"
            self.actions.append(Action("activation", problem.path, 4096, text))
            self.replace(problem.path, [(4096, record_of(rebuilt))])
            if not self.dry_run:
                log = Log(store, log.stream, log.number)
        return log

    # batches

    def batches(self, log: Log) -> None:
        """Put fillers over damaged batches that something valid follows.

        Where nothing but whole segments is missing, at an end of the log, the rest goes on without.
        """
        before_it = len(self.actions)
        gone: list[Problem] = []
        patches: dict[Path, list[Patch]] = {}
        segment: SegmentInfo | None = None
        before: Batch | None = None  # the last one in this segment
        damage: Problem | None = None
        for event in [*log.events(), None]:
            if damage is not None and segment is not None and not isinstance(event, Problem):
                span = self.span(log, segment, before, damage, event)
                if span is None:
                    self.cannot(damage)
                else:
                    patches.setdefault(segment.path, []).extend(span)
                damage = None
            if isinstance(event, SegmentInfo):
                segment, before = event, None
            elif isinstance(event, Batch):
                before = event
            elif isinstance(event, Problem):
                if damage is not None:
                    self.cannot(damage)
                damage = event if event.kind == "batch" else None
                rebuilt = any((a.kind, a.path) == ("activation", event.path) for a in self.actions)
                if rebuilt or damage is not None:
                    continue
                if is_beyond(log, event):
                    gone.append(event)
                else:
                    self.cannot(event)
        for path, found in patches.items():
            self.replace(path, found)
        if gone and any(action.kind == "cannot" for action in self.actions[before_it:]):
            for problem in gone:
                self.cannot(problem)
        elif gone:
            self.give_up(log, gone)

    def give_up(self, log: Log, gone: list[Problem]) -> None:
        """Let the log end, or begin, where its files do: forget what the control file says."""
        path, at = log.stream.path / "control", 4096 + 256 * log.number
        for problem in gone:
            lost = "records are lost"
            if problem.offset_range is not None:
                first, after = problem.offset_range
                lost = f"records {first} to {after} (not included) are lost"
                lost = "no record is lost" if first == after else lost
            text = f"partition {log.number} goes on without {problem.path.name}: {lost};"
            text += f" expected {problem.expected}, found {problem.found}"
            self.actions.append(Action("given_up", path, at, text))
        self.replace(path, [(at, bytes(256))])

    def span(
        self,
        log: Log,
        segment: SegmentInfo,
        before: Batch | None,
        damage: Problem,
        event: object,
    ) -> list[Patch] | None:
        """Return the headers that cover one damaged range, or None if its end is not known."""
        if damage.position is None or damage.offset_range is None:
            return None
        at = damage.position
        if isinstance(event, Batch) and event.path == segment.path:
            end, sequence = event.file_position, event.chain
        elif isinstance(event, SegmentInfo) and not event.link_broken:
            end = segment.file_position(event.base_position)
            sequence = event.predecessor_hash & LOW
        elif event is None and log.trusted and log.block["hint_tail"] == segment.end_position:
            end = segment.file_position(log.block["hint_tail"])
            sequence = log.block["hint_hash"] & LOW
        else:
            return None
        chain = segment.predecessor_hash & LOW if before is None else before.link
        offset = damage.offset_range[0]
        patches = []
        while at < end:
            length = min(end - at, BATCH_BYTES_MAX)
            if length < BATCH.size:
                return None
            if 0 < end - at - length < BATCH.size:
                length -= BATCH.size
            position = at - segment.data_position + segment.base_position
            raw = filler(segment.salt, position, length, offset, chain, sequence)
            patches.append((at, raw))
            text = f"{length} bytes set aside, records {damage.offset_range[0]} to"
            text += f" {damage.offset_range[1]} (not included) are lost"
            self.actions.append(Action("filler", segment.path, at, text))
            at, chain = at + length, sequence
        return patches

    # queues

    def queue(self, store: StoreInfo, path: Path) -> None:
        """Mend one queue: header pages, state words, damaged messages."""
        try:
            made = plan(store, path)
        except Invalid as bad:
            self.cannot(bad.problem("queue", path / "queue.json", None))
            return
        except StorageError as error:
            self.cannot(unreadable(path, error))
            return
        self.actions += [Action(*done) for done in made.done]
        for problem in made.cannot:
            self.cannot(problem)
        for file, patches in made.patches.items():
            self.replace(file, patches, made.used.get(file), made.least.get(file, 0))

    # files

    def replace(
        self, path: Path, patches: list[Patch], used: int | None = None, least: int = 0
    ) -> None:
        """Put a changed copy in the place of a file; the original becomes `.corrupt`.

        `used`: what is behind means nothing and stays sparse. `least`: bytes that it must have.
        """
        self.changed = True
        if self.dry_run:
            return
        self.place.check()  # what was read is of the directory that is held
        copy = f"{path.name}.repair.tmp"
        try:
            with self.place.folder(path) as folder:
                try:
                    copy_changed(folder, path, copy, patches, used, least)
                    self.place.check()
                    # A second name, then one rename: at no instant is the segment without a file.
                    set_aside(folder, path.name)
                    os.fsync(folder)
                    os.replace(copy, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                    os.fsync(folder)
                except OSError:
                    with suppress(OSError):
                        os.unlink(copy, dir_fd=folder)
                    raise
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(error.errno, error.strerror, str(path)) from error


def set_aside(folder: int, name: str) -> None:
    """Give a file the first free of `NAME.corrupt`, `NAME.2.corrupt`, ... as a second name."""
    count = 1
    while True:
        aside = f"{name}.corrupt" if count == 1 else f"{name}.{count}.corrupt"
        try:
            os.link(name, aside, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            count += 1
        else:
            return


def is_beyond(log: Log, problem: Problem) -> bool:
    """Whether what is missing lay before all segments that are left, or behind them."""
    if problem.kind != "missing":
        return False
    numbers = [segment.number for segment in log.segments]
    return not numbers or not numbers[0] < int(problem.path.stem) < numbers[-1]


def rebuild(log: Log, path: Path, store: StoreInfo) -> SegmentInfo | None:
    """Return a segment whose record is damaged with the one that it must have had, or None."""
    number = int(path.stem)
    older = [segment for segment in log.segments if segment.number < number]
    newer = [segment for segment in log.segments if segment.number > number]
    with File(path) as file:
        segment = unactivated(file, log.stream.name, log.number)
        segment = replace(segment, epoch=newer[0].epoch if newer else store.generation)
        walk, epoch = log.walk_before(number), 1
        if walk is not None:
            segment, epoch = replace(segment, predecessor=older[-1].number), older[-1].epoch
        elif number != 1:
            return None
        else:
            walk = Walk(segment)
        segment = replace(
            segment,
            base_position=walk.position,
            predecessor_hash=walk.hash,
            timestamp_max=walk.timestamp_max,
        )
        try:
            batch = decode(file, segment, walk.position, segment.limit_position)
            walk.check(batch)
        except Invalid:
            return None
        fits = not newer or newer[0].predecessor == number
        if not (walk.exact and fits and segment.epoch == epoch) or walk.filler:
            return None
        return replace(segment, base_offset=batch.base_offset)


def record_of(segment: SegmentInfo) -> bytes:
    """Return the activation record of a segment."""
    values = [getattr(segment, name) for name in ACTIVATION.names[1:]]
    raw = ACTIVATION.pack.pack(0, *values)
    return struct.pack("<Q", hash64(raw[8:], segment.salt)) + raw[8:]


def filler(salt: int, position: int, length: int, offset: int, chain: int, sequence: int) -> bytes:
    """Return the header of a FILLER; what follows it stays as it is."""
    raw = BATCH.pack.pack(0, length, 1, FILLER, offset, 0, chain, 0, 0, 0, 0, sequence)
    return struct.pack("<Q", hash64(raw[8:], salt + position)) + raw[8:]


def copy_changed(
    folder: int, source: Path, target: str, patches: list[Patch], used: int | None, least: int
) -> None:
    """Write and sync a copy with patches in it; blocks behind all that is used, none shared."""
    fd = open_new(folder, target)
    try:
        with File(source, folder) as file:
            end = file.size if used is None else min(used, file.size)
            os.ftruncate(fd, max(file.size, least))
            for at in range(0, end, COPY_BYTES):
                size = min(COPY_BYTES, end - at)
                part = file.read(at, size)[:size]
                if len(part) < size:
                    raise OSError(errno.EIO, "the file shrank while it was copied")
                write_all(fd, part, at)
        for at, raw in patches:
            write_all(fd, memoryview(raw), at)
        os.fchmod(fd, 0o600)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview, at: int) -> None:
    """Write all of the data, however many calls it takes."""
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done


def open_new(folder: int, name: str) -> int:
    """Make a file in the place of what an earlier run may have left."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(name, flags, 0o600, dir_fd=folder)


def set_unclean(place: Held) -> None:
    """Replace `store.json` by one that says unclean."""
    path = place.path / "store.json"
    body = {**read_json(path, STORE_JSON), "clean": False}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    whole = json.dumps({"body": body, "checksum": f"{hash64(text.encode()):016x}"}) + "\n"
    place.check()  # what was read is of the directory that is held
    copy = f"{path.name}.repair.tmp"
    try:
        with place.folder(path) as folder:
            fd = open_new(folder, copy)
            try:
                write_all(fd, memoryview(whole.encode()), 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(copy, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
    except OSError as error:
        raise StorageError(error.errno, error.strerror, str(path)) from error
