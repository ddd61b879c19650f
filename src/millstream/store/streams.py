"""The streams of a store: the handles that this process has, and what it asks of them all."""

from __future__ import annotations

import contextlib

from millstream import _native
from millstream.disk import files, reserve
from millstream.disk.publish import finish_drop, withdraw
from millstream.errors import MillstreamError, NotFound
from millstream.log import control, settings
from millstream.log.cache import SegmentCache
from millstream.log.settings import JOURNAL
from millstream.streams.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from millstream.disk.open_store import OpenStore
    from millstream.disk.session import Session
    from millstream.log.settings import OnMismatch
    from millstream.options import Durability

__all__ = ["Streams"]


class Streams:
    """By name and level: a handle with a level of its own is another one."""

    def __init__(self, store: OpenStore, session: Session, lock: _native.Lock) -> None:
        self._store, self._session, self._lock = store, session, lock
        self._directory = session.root / "streams"
        self._handles: dict[tuple[str, Durability | None], Stream] = {}
        self.cache = SegmentCache(session.members)

    def __iter__(self) -> Iterator[Stream]:
        """The handles, as they are now."""
        return iter(list(self._handles.values()))

    def known(self, name: str) -> Stream | None:
        """The handle that has nothing of its own, where it is open and the stream is there."""
        found = self._handles.get((name, None))
        return found if found is not None and self._state_of(found) == files.LIVE else None

    def names(self) -> list[str]:
        """Names of all that are there, sorted, the journal among them."""
        files.require_directory(self._directory)
        names = files.names(self._directory)
        return sorted(name for name in names if settings.is_name(name) or name == JOURNAL)

    def public_names(self) -> list[str]:
        """Names of those that users made."""
        return [name for name in self.names() if name != JOURNAL]

    @settings.once_more("stream")
    def open(
        self,
        name: str,
        given: dict[str, Any],
        durability: Durability | None,
        create: bool | None,
        on_mismatch: OnMismatch,
    ) -> Stream:
        """`Store.stream`."""
        settings.check_durability(durability)
        settings.check_on_mismatch(on_mismatch)
        may_create = settings.check_create(create)
        alters = on_mismatch == "alter"
        with self._lock:
            path = self._session.stream_path(name) / "stream.json"
            made = settings.is_missing(path, "stream")
            if made:
                session = self._session
                if not session.writable or not may_create:
                    raise settings.missing(session.path, "stream", name, self.public_names())
                config = settings.new(given, durability)
                control.create(self._directory, name, config, session.id, session.generation)
            key = name, None if made or alters else durability
            if (known := self._handles.get(key)) and self._state_of(known) != files.LIVE:
                self._forget(name)
                known = None
            config = files.read_json(path)
            differing = settings.differing(config, given, durability if alters else None)
            if "partitions" in differing and on_mismatch != "keep":
                settings.require_more(name, config["partitions"], differing["partitions"])
            if differing and on_mismatch == "raise":
                raise settings.mismatch(f"stream {name!r}", config, differing)
            if known is None:
                known = self._handles[key] = Stream(self._store, name, config, key[1], self.cache)
                if self._state_of(known) == files.DROPPED and self._session.writable:
                    self._withdraw(name, known)  # who dropped it was killed, or is at it
                    return self.open(name, given, durability, create, on_mismatch)
                self._session.notices.watch(known)  # these the thread syncs and retains
            named = durability is not None or any(one is not None for one in given.values())
            known._is_surprise = made and create is None and not named
        if differing and alters:
            known._alter(differing)
        return known

    def drop(self, name: str) -> None:
        """`Store.drop_stream`."""
        with self._lock:
            there = files.exists(self._directory / name)
            try:
                stream = self._store.stream(name, create=False)
            except NotFound:
                if not there:
                    raise
                return  # a drop had not ended, and opening what was left of it has ended it
            stream._set_state(files.DROPPED)
            self._withdraw(name, stream)

    def _withdraw(self, name: str, stream: Stream) -> None:
        withdraw(self._directory, name, "stream.json", stream.path.directory, self._forget)

    @staticmethod
    def _state_of(stream: Stream) -> int:
        return 0 if stream.closed else stream._state

    def _forget(self, name: str) -> None:
        """Give up the handles of a stream that was dropped."""
        for key in [key for key in self._handles if key[0] == name]:
            self._handles.pop(key)._dispose()

    # --- opening and closing ----------------------------------------------------------------------

    def open_first(self, *, closed_cleanly: bool) -> None:
        """Nobody else has the store open: after an unclean end make the control files anew."""
        session = self._session
        files.require_directory(self._directory)
        for name in files.names(self._directory):
            directory = self._directory / name
            if name.startswith("."):
                files.remove_tree(directory)  # a creation or a drop that did not end
            elif not finish_drop(directory) and not session.clean:
                known = directory, session.id, session.generation, closed_cleanly
                reserve.lend(session.root, control.rebuild, *known)

    def hold(self, *, checksums: bool = True) -> bool:
        """Is it clean, as its file says? A control file may have been damaged or lost since."""
        session = self._session
        return all(
            control.is_sound(path, session.id, session.generation)
            and (control.has_checksum(path) or not checksums)
            for path in map(session.stream_path, self.names())
        )

    def recover_the_rest(self, handle: Callable[[str], Stream]) -> None:
        """Walk what nobody used since an unclean end, so that the store can be set clean.

        `handle` opens a stream, or the journal, by its name.
        """
        try:
            names = self.names()
        except MillstreamError:  # no descriptor is left, say
            return
        for name in names:
            # It stays unclean, and the next open says why
            with contextlib.suppress(MillstreamError):
                stream = handle(name)
                for index in range(stream.partitions):
                    stream._log(index)

    def sync_groups(self) -> list[Exception]:
        """Leave the groups, and sync what was committed here; what failed."""
        return [error for stream in self for error in stream._groups.close()]

    def sync_all(self) -> bool:
        """As the last, all partitions being sound: sync all groups; False: one failed earlier."""
        with _native.loading:
            from millstream.groups import group
        synced = [group.sync_all(self._session.stream_path(name)) for name in self.names()]
        return all(synced)

    def add_checksums(self) -> None:
        """Say of each control file that it is what the last to close left."""
        for name in self.names():
            control.add_checksum(self._session.stream_path(name))

    def dispose(self) -> None:
        """Give up all handles."""
        for stream in self:
            stream._dispose()
