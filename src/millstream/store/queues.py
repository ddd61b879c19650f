"""The queues of a store: the handles that this process has. All imported late: not all use them."""

from __future__ import annotations

from millstream import _native
from millstream.disk import files
from millstream.disk.publish import finish_drop, withdraw
from millstream.errors import NotFound
from millstream.log import settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from millstream.disk.open_store import OpenStore
    from millstream.disk.session import Session
    from millstream.log.settings import OnMismatch
    from millstream.options import Durability
    from millstream.queues.queue import Queue

__all__ = ["Queues"]


class Queues:
    """By name, level and codec: a handle with a level or a codec of its own is another one."""

    def __init__(self, store: OpenStore, session: Session, lock: _native.Lock) -> None:
        self._store, self._session, self._lock = store, session, lock
        self._directory = session.root / "queues"
        self._handles: dict[tuple[str, Durability | None, object], Queue] = {}

    def __iter__(self) -> Iterator[Queue]:
        """The handles, as they are now."""
        return iter(list(self._handles.values()))

    def known(self, name: str) -> Queue | None:
        """The handle that has nothing of its own, where it is open and the queue is there."""
        found = self._handles.get((name, None, None))
        return found if found is not None and self._is_usable(found) else None

    def names(self) -> list[str]:
        """Names of all that are there, sorted."""
        files.require_directory(self._directory)
        return sorted(name for name in files.names(self._directory) if settings.is_name(name))

    @settings.once_more("queue")
    def open(
        self,
        name: str,
        options: dict[str, Any],
        codec: object,
        durability: Durability | None,
        create: bool | None,
        on_mismatch: OnMismatch,
    ) -> Queue:
        """`Store.queue`."""
        with _native.loading:
            from millstream import codecs
            from millstream.queues import settings as queue_settings
            from millstream.queues import slots
            from millstream.queues.queue import Queue
        codecs.resolve(codec)
        settings.check_on_mismatch(on_mismatch)
        may_create = settings.check_create(create)
        alters = on_mismatch == "alter"
        asked = queue_settings.check(
            {field: value for field, value in options.items() if value is not None}
        )
        with self._lock:
            path = self._session.queue_path(name) / "queue.json"
            made = settings.is_missing(path, "queue")
            if made:
                if not self._session.writable or not may_create:
                    raise settings.missing(self._session.path, "queue", name, self.names())
                files.make_directory(self._directory)
                slots.create(self._directory, name, queue_settings.new(asked), self._session.id)
            hashable = type(codec).__hash__ is not None
            level = None if made or alters else durability
            key = name, level, codec if hashable else id(codec)
            known = self._handles.get(key)
            if known is not None and not self._is_usable(known):
                self._forget(name)
                known = None
            config = files.read_json(path)
            differing = queue_settings.differing(config, asked, durability=alters)
            if differing and on_mismatch != "keep":
                queue_settings.require_alterable(f"queue {name!r}", config, differing)
            if differing and on_mismatch == "raise":
                raise settings.mismatch(f"queue {name!r}", config, differing)
            if known is None:
                known = self._handles[key] = Queue(self._store, name, config, level, codec)
                if self._state_of(known) == files.DROPPED and self._session.writable:
                    self._withdraw(name, known)  # who dropped it was killed, or is at it
                    return self.open(name, options, codec, durability, create, on_mismatch)
            if made and create is None and not asked:
                known._expect()
        if differing and alters:
            known._alter(differing)
        return known

    def drop(self, name: str) -> None:
        """`Store.drop_queue`."""
        with self._lock:
            settings.check_name(name)
            there = files.exists(self._directory / name)
            try:
                queue = self._store.queue(name, create=False)
            except NotFound:
                if not there:
                    raise
                return  # a drop had not ended, and opening what was left of it has ended it
            queue._drop()
            self._withdraw(name, queue)

    def _withdraw(self, name: str, queue: Queue) -> None:
        withdraw(self._directory, name, "queue.json", queue.path.directory, self._forget)

    def _is_usable(self, queue: Queue) -> bool:
        state = self._state_of(queue)
        if state == files.OUTGROWN:  # what was dropped since says so elsewhere
            held = queue.path.directory
            return files.is_at(held, self._session.queue_path(queue.name)) and not held.was_dropped
        return state == files.LIVE

    @staticmethod
    def _state_of(queue: Queue) -> int:
        return 0 if queue.closed else queue._state

    def _forget(self, name: str) -> None:
        for key in [key for key in self._handles if key[0] == name]:
            self._handles.pop(key)._dispose()

    # --- opening and closing ----------------------------------------------------------------------

    def open_first(self) -> None:
        """Nobody else has the store open: the hints of before are over."""
        files.require_directory(self._directory)
        for name in files.names(self._directory):
            with _native.loading:
                from millstream.queues import slots
            if name.startswith("."):
                files.remove_tree(self._directory / name)  # it was not made, or was dropped
            elif not finish_drop(self._directory / name):
                slots.forget_hints(self._directory / name)

    def sync(self) -> list[Exception]:
        """Before leaving: what failed."""
        ended = [queue._sync_at_close() for queue in self]
        return [error for error in ended if error is not None]

    def sync_all(self) -> bool:
        """As the last: sync all queues; False: a sync of one failed earlier."""
        for name in self.names():
            with _native.loading:
                from millstream.queues import slots
            if not slots.is_sound(self._session.queue_path(name)):
                return False
            slots.sync(self._session.queue_path(name))
        return True

    def have_undecided(self) -> bool:
        """Has a transaction prepared something that nobody has decided?"""
        with _native.loading:
            from millstream.queues import slots
        return any(slots.has_undecided(self._session.queue_path(name)) for name in self.names())

    def dispose(self) -> None:
        """Give up all handles."""
        for queue in self:
            queue._dispose()
        self._handles = {}  # their maps go with their last holder
