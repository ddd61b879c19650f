"""The queues of a store: what `Store` does for them. All imported late: not every store has one."""

from __future__ import annotations

import os

from millstream import _native
from millstream.disk import files
from millstream.errors import CorruptBatch, NotFound, StorageError
from millstream.log import settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from millstream.log.settings import OnMismatch
    from millstream.options import Durability, RetryPolicy
    from millstream.queues.queue import Queue
    from millstream.store.store import Store

__all__ = ["StoreQueues"]


class StoreQueues:
    """Base of `millstream.Store`."""

    path: str
    _root: files.Path
    writable: bool
    _store_id: bytes
    _lock: _native.Lock
    _queues: dict[tuple[str, Durability | None, object], Queue]
    """By name, level and codec: a handle with a level or a codec of its own is another one."""

    def _check_open(self) -> None:
        raise NotImplementedError

    def _check_writable(self) -> None:
        raise NotImplementedError

    def _queue_path(self, name: str) -> files.Path:
        return self._root / "queues" / name

    def queue(
        self,
        name: str,
        *,
        capacity: int | None = None,
        priorities: int | None = None,
        slot_bytes: int | str | None = None,
        payload_bytes: int | str | None = None,
        payload_max: int | str | None = None,
        lease: float | None = None,
        ordering: Literal["key"] | None = None,
        retry: RetryPolicy | None = None,
        ttl: float | None = None,
        dedup_window: float | None = None,
        dead_limit: int | None = None,
        on_dead: Literal["skip", "stop"] | None = None,
        ageing: bool | None = None,
        codec: object = None,
        durability: Durability | None = None,
        create: bool = True,
        on_mismatch: OnMismatch = "raise",
    ) -> Queue:
        """Open a queue, creating it where it is not there.

        Of a queue that is there only the settings that are named here are looked at. So a worker
        that names `retry` can be deployed beside a web process that names nothing.

        Args:
            name: 1 to 128 characters of ``A-Z a-z 0-9 . _ -``, no leading dot.
            capacity: how many messages may be not finished; default 100,000.
            priorities: how many there are, 1 to 8; default 4.
            slot_bytes: what a message takes, with its head of 96 bytes; default 256. Longer ones
                lie in blocks.
            payload_bytes: how much the blocks may take, default 1 GiB.
            payload_max: the longest payload, default 16 MiB.
            lease: seconds for which a message is leased; default 30.
            ordering: "key": messages of one key are done one after the other, in their order.
            retry: how often, and when; default `RetryPolicy()`.
            ttl: seconds after which a message is not delivered any more; default never.
            dedup_window: seconds within which a `dedup_id` is stored once.
            dead_limit: how many dead letters are kept; default 10,000.
            on_dead: with ordering: "skip" a dead message of a key, or "stop" its key.
            ageing: let the longest waiting message come first now and then, whatever its priority.
            codec: "json", "pickle" (only where all writers are trusted), or an object with `encode`
                and `decode`; default: values are bytes. Not stored: each handle has its own.
            durability: of a new queue: stored with it; of one that is there: for this handle, with
                on_mismatch="alter" stored as well.
            create: False: raise `NotFound` where it is not there.
            on_mismatch: where another setting is stored than named here: "raise" `ConfigMismatch`;
                "alter" it, for every process, as `alter` does (what that cannot change still
                raises); "keep" what is stored.

        Raises: ConfigMismatch where the queue is there with other settings than given; NotFound
        when it is not there, with create=False or in a read-only store; InvalidArgument,
        StorageError; Unsupported where a read-only store is to be altered.

        >>> import millstream
        >>> with millstream.temporary() as store:
        ...     queue = store.queue("mail", capacity=1000)
        ...     _ = queue.put(b"hello")
        ...     with queue.get(timeout=5) as m:
        ...         m.value
        b'hello'
        """
        with _native.loading:
            from millstream import codecs
            from millstream.queues import settings as queue_settings
            from millstream.queues import slots
            from millstream.queues.queue import Queue
        self._check_open()
        settings.check_name(name)
        codecs.resolve(codec)
        settings.check_on_mismatch(on_mismatch)
        may_create = settings.check_create(create)
        alters = on_mismatch == "alter"
        options = {
            "capacity": capacity, "priorities": priorities, "slot_bytes": slot_bytes,
            "payload_bytes": payload_bytes, "payload_max": payload_max, "lease": lease,
            "ordering": ordering, "retry": retry, "ttl": ttl, "dedup_window": dedup_window,
            "dead_limit": dead_limit, "on_dead": on_dead, "ageing": ageing,
            "durability": durability,
        }  # fmt: skip
        asked = queue_settings.check(
            {field: value for field, value in options.items() if value is not None}
        )
        with self._lock:
            path = self._queue_path(name) / "queue.json"
            made = not files.exists(path)
            if made:
                if files.exists(self._queue_path(name)):
                    raise CorruptBatch(
                        f"{path}: is missing, where the queue is; restore it from a backup",
                        path=path,
                    )
                if not self.writable or not may_create:
                    raise settings.missing(self.path, "queue", name, self._queue_names())
                parent = self._root / "queues"
                files.make_directory(parent)
                slots.create(parent, name, queue_settings.new(asked), self._store_id)
            hashable = type(codec).__hash__ is not None
            level = None if made or alters else durability
            key = name, level, codec if hashable else id(codec)
            known = self._queues.get(key)
            usable = slots.LIVE, slots.OUTGROWN
            if known is not None and (known.closed or known._state not in usable):
                self._forget_queue(name)
                known = None
            config = files.read_json(path)
            differing = queue_settings.differing(config, asked, durability=alters)
            if differing and on_mismatch != "keep":
                queue_settings.require_alterable(f"queue {name!r}", config, differing)
            if differing and on_mismatch == "raise":
                raise settings.mismatch(f"queue {name!r}", config, differing)
            if known is None:
                store: Store = self  # type: ignore[assignment]
                known = self._queues[key] = Queue(store, name, config, level, codec)
        if differing and alters:
            known._alter(differing)
        return known

    def queues(self) -> list[str]:
        """Names of the queues, sorted."""
        self._check_open()
        return self._queue_names()

    def drop_queue(self, name: str) -> None:
        """Remove a queue and all its messages.

        Handles to it, in every process, raise `Closed` from now on.
        """
        with _native.loading:
            from millstream.queues import slots
        self._check_writable()
        with self._lock:
            settings.check_name(name)
            queue = self.queue(name, create=False)
            queue._set_state(slots.DROPPED)
            queue._wake_all()
            gone = self._root / "queues" / f".{name}-{os.urandom(4).hex()}.dropped"
            try:
                files.rename(self._queue_path(name), gone)
            except StorageError as error:
                if files.exists(self._queue_path(name)):
                    raise
                raise NotFound(f"{self.path}: another process dropped {name!r}") from error
            files.sync_directory(self._root / "queues")
            self._forget_queue(name)
            files.remove_tree(gone)

    def _forget_queue(self, name: str) -> None:
        for key in [key for key in self._queues if key[0] == name]:
            self._queues.pop(key)._dispose()

    def _queue_names(self) -> list[str]:
        directory = self._root / "queues"
        files.require_directory(directory)
        return sorted(name for name in files.names(directory) if settings.is_name(name))

    # --- opening and closing ----------------------------------------------------------------------

    def _open_queues_first(self) -> None:
        """Nobody else lives here: the hints of the last session are over."""
        directory = self._root / "queues"
        files.require_directory(directory)
        for name in files.names(directory):
            with _native.loading:
                from millstream.queues import slots
            if name.startswith("."):
                files.remove_tree(directory / name)  # it was not made, or was dropped
            else:
                slots.forget_hints(directory / name)

    def _sync_queues(self) -> list[Exception]:
        """What failed."""
        ended = [queue._sync_at_close() for queue in self._queues.values()]
        return [error for error in ended if error is not None]

    def _settle_queues(self) -> bool:
        """As the last: sync all queues; False: a sync of one failed earlier."""
        for name in self._queue_names():
            with _native.loading:
                from millstream.queues import slots
            if not slots.is_sound(self._queue_path(name)):
                return False
            slots.sync(self._queue_path(name))
        return True
