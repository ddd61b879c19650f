"""A queue as one process has it open: its maps, its settings, growing and syncing them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from millstream import _native, codecs, timestamps
from millstream.disk import files
from millstream.disk.session import LATE_SECONDS, LOCK_SECONDS
from millstream.errors import (
    Closed,
    Indeterminate,
    InvalidType,
    LockTimeout,
    MillstreamError,
    Poisoned,
    StorageError,
    StoreFull,
)
from millstream.options import Durability, RetryPolicy, check_timeout
from millstream.queues import capacity, dedup, slots

if TYPE_CHECKING:
    from millstream.disk.session import Session
    from millstream.sleepers import Sleepers

__all__ = ["QueueHandle"]

COUNTER_BITS = 40


class QueueHandle(_native.QueueCore):
    """What this process has of a queue: its files, opened, grown and synced; its configuration."""

    def __init__(
        self,
        session: Session,
        name: str,
        config: dict[str, Any],
        durability: Durability | None,
        codec: object,
    ) -> None:
        self.session = session
        self.name = name
        self._directory = files.Directory(session.queue_path(name))
        """Held open: a queue of the same name that is made later is another one."""
        self.path = self._directory.path
        self._override = durability
        self._codec = codec
        self._config = config
        self._waiters: list[Sleepers] = []
        self._was_dropped = False
        """Why it is closed: not with the store."""
        self._random: Callable[[], float] | None = None
        try:
            self._files = slots.Files(self.path, config, session.id, write=session.writable)
            try:
                self._open()
            except BaseException:
                self._files.close()
                raise
        except BaseException:
            self._directory.close()
            raise

    # --- opening ----------------------------------------------------------------------------------

    def _open(self) -> None:
        for _ in range(100):
            try:
                self._open_as_configured()
                return
            except slots.OtherSize as other:
                self._fit(other)
        raise StorageError(11, "its capacity is raised again and again", self.path)

    def _fit(self, other: slots.OtherSize) -> None:
        """The capacity was raised since the configuration was read, or is being raised now."""
        config = files.read_json(self.path / "queue.json")
        self._files.close()
        self._config = config = slots.fitting(config, other)
        self._files = slots.Files(self.path, config, self.session.id, write=self.session.writable)

    def _open_as_configured(self) -> None:
        hints = self._files.map_hints()
        if hints is None and self.session.writable:
            with self._files.making_hints():
                hints = self._files.map_hints()
                if hints is None:
                    self._make_hints()
                    return
        if hints is None:
            hints = self._files.private_hints()
        self._files.counts()
        self._use(hints)
        if self._config["dedup_window"] and self.session.writable:
            self._use_dedup(dedup.open_table(self._files))

    def _numbers(self, config: dict[str, Any], queue_files: slots.Files) -> dict[str, Any]:
        """What the core needs to know of a configuration."""
        return {
            **{name: config[name] for name in ("slot_bytes", "capacity", "dead_limit")},
            **{name: config[name] for name in ("priorities", "ageing")},
            "block_max": queue_files.sizes.block_max,
            "max_attempts": config["retry"]["max_attempts"],
            "generation": self.session.generation,
            "block_key": config["on_dead"] == "stop",
            "dedup_window_us": int(config["dedup_window"] * 1e6),
            "clock_offset_us": self.session.clock.offset,
            "clock_since_us": self.session.clock.since,
        }

    def _use(self, hints: Any) -> None:
        numbers = self._numbers(self._config, self._files)
        members = self.session.members
        self._attach(
            self._files.slots, self._files.blocks, hints, numbers, members, self.session.writable
        )
        self._configure()

    def _make_hints(self) -> None:
        """As the first to open it, alone: recover the queue into new hints."""
        hints, temporary = self._files.make_hints()
        try:
            slot_count, block_count = self._files.counts()
            # A copied directory may have holes where the original had blocks.
            self._files.allocate_slots(slot_count)
            if block_count:
                self._files.allocate_blocks(block_count)
            self._use(hints)
            self._begin_ids(self.session.generation << COUNTER_BITS | 1)
            self._recover(verify=bool(self._poison) or not self.session.clean)
            if self._config["dedup_window"]:
                dedup.open_first(self)
            if not self.session.replaying:  # it comes first, and knew of no commit here
                self._withdraw_undecided()
            if slot_count == 0:
                first = min(slots.EXTENT_SLOTS, self._files.sizes.slot_max)
                self._files.allocate_slots(first)
                self._publish_slots(first)
            if self._poison:
                self._dirty()
                self._files.sync()  # all was verified; what is there now is what is written
                self._set_poison(0)
            self._files.publish_hints(temporary)
        except BaseException:
            files.remove(temporary)
            raise

    def _configure(self) -> None:
        config = self._config
        self._retry = RetryPolicy(**config["retry"])
        self._durability: Durability = self._override or config["durability"] or self.session.level
        self._configure_core(
            float(config["lease"]),
            config["ttl"],
            config["payload_max"],
            codecs.resolve(self._codec),
            self._durability,
        )
        self._set_policy(
            self._retry.max_attempts,
            config["ageing"],
            config["on_dead"] == "stop",
            int(config["dedup_window"] * 1e6),
        )

    def _follow(self) -> None:
        """Take over the settings where another process, or another handle, altered them."""
        number = self._config_number
        if number == self._config_seen:
            return
        self._take_over(files.read_json(self.path / "queue.json"))
        if number % 2:
            self._config_seen = number
        elif self.session.writable:  # while it is even, it is read again at the next call
            before = self._hints_at
            word = self._word("maintenance", self.path, LOCK_SECONDS)
            if word.try_take():  # who altered them was killed
                try:
                    if self._hints_at == before:
                        self._end_config()
                finally:
                    word.release()

    def _take_over(self, config: dict[str, Any]) -> None:
        if config["capacity"] != self._config["capacity"]:
            if self._files.hints_inode == 0:  # nobody else's hints say so
                capacity.join(self)
            # Else the state of the hints says when: then those of the other capacity are there.
            config["capacity"] = self._config["capacity"]
        self._config = config
        if config["dedup_window"] and self._dedup is None and self.session.writable:
            self._use_dedup(dedup.open_table(self._files))
        self._configure()

    def _current(self) -> QueueHandle:
        """Itself, with the settings as they are stored now; a closed one keeps what it had."""
        if not self.closed and self._state in (files.LIVE, files.OUTGROWN):
            self._keep_up()
        return self

    @property
    def capacity(self) -> int:
        """How many messages may be not finished."""
        return int(self._current()._config["capacity"])

    @property
    def lease(self) -> float:
        """Seconds that a lease lasts."""
        return float(self._current()._config["lease"])

    @property
    def retry(self) -> RetryPolicy:
        """How often a message is tried, and how long it waits in between."""
        return self._current()._retry

    @property
    def durability(self) -> Durability:
        """What a put or an acknowledgement through this handle has survived when it returns."""
        return self._current()._durability

    # --- hooks of the core ------------------------------------------------------------------------

    def _keep_up(self) -> None:
        """Check that it is there, and follow a raised capacity and changed settings."""
        self.session.check_open()
        if self.closed:
            what = "was dropped" if self._was_dropped else "is closed; open the store again"
            raise Closed(f"{self.path}: the queue {what}")
        if self._state == files.DROPPED:
            self._dispose()
            raise Closed(f"{self.path}: the queue was dropped")
        while self._state == files.OUTGROWN:
            try:
                capacity.follow(self)
            except Closed:
                self._was_dropped = self._directory.was_dropped
                self._dispose()
                raise
        if self._state == files.REPLACED:
            self._dispose()
            raise Closed(f"{self.path}: recovered by another process; open the store again")
        if self.session.layered:
            self.session.check_layer(self.path, self._is_behind)
        self._follow()

    def _is_behind(self) -> bool:
        """Were the hints made since? Whoever made them has opened the other files to write."""
        return files.inode(self._files.path("hints")) != self._files.hints_inode

    def _check_writable(self) -> None:
        self._keep_up()
        self.session.check_writable()
        if self._poison:
            raise Poisoned(
                5,
                "an earlier sync failed; close the store in every process and open it again",
                self.path,
            )

    def _withdraw_undecided(self) -> None:
        """What is prepared will never be committed. Holder of the journal, or the first of all."""
        for _, _, slot, word in self._scan(("prepared", "acking")):
            self._decide(slot, word, False)

    def _encoded(self, value: Any) -> bytes:
        """What the codec makes of a value."""
        if isinstance(value, _native.Put):
            raise InvalidType("value: a Put is an item of put_many; give put its arguments")
        codec = codecs.resolve(self._codec)
        made: bytes = value if codec is None else codec.encode(value)
        return made

    @contextlib.contextmanager
    def _maintaining(self, what: str, *, sound: bool = True) -> Iterator[None]:
        """Hold the maintenance word of the hints in use."""
        while True:
            self._keep_up()
            if sound:
                self._check_writable()
            before = self._hints_at
            with self._word("maintenance", f"{self.path}: {what}", LOCK_SECONDS):
                # Another thread may have gone on to other hints, whose word this is not.
                if self._hints_at == before and self._state == files.LIVE:
                    yield
                    return

    def _drop(self) -> None:
        """Say to all who have it open that it was dropped: in the hints that they all use."""
        with self._maintaining("dropping", sound=False):
            self._set_state(files.DROPPED)
        self._wake_all()

    def _grow_slots(self, seen: int) -> None:
        with self._maintaining("growing"):
            if self._slot_count == seen:
                most, grow = self._files.sizes.slot_max, self._files.allocate_slots
                self._publish_slots(_grown(seen, slots.EXTENT_SLOTS, most, grow))

    def _grow_blocks(self, seen: int) -> None:
        with self._maintaining("growing"):
            if self._block_count == seen:
                most, grow = self._files.sizes.block_max, self._files.allocate_blocks
                self._publish_blocks(_grown(seen, slots.EXTENT_BLOCKS, most, grow))

    def _check_undecided(self, waited_long: bool) -> None:
        """Something waits for a transaction: raise where it would wait in vain.

        For one of this thread, that is under way; or of another life, while what was committed
        then is put again: nobody is left who would decide it before that is done.
        """
        if self.session.replaying:
            raise LockTimeout(f"{self.path}: held by a transaction of a process that is dead")
        if waited_long:
            self.session.undecided.check()

    def _decide_undecided(self) -> None:
        """Somebody died, and a transaction has prepared something here: maybe that one's."""
        if self.session.undecided.exist():
            self.session.undecided.decide_queue(self)

    def _retry_delay(self, attempt: int) -> float:
        if self._random is None:
            with _native.loading:
                from random import random
            self._random = random
        return self._retry.delay(attempt, self._random())

    def _keep_traceback(self, number: int, error: BaseException) -> None:
        """A message is a dead letter since this error."""
        with _native.loading:
            from millstream.queues import tracebacks
        tracebacks.keep(self.path, number, error)

    def _due(self, at: Any) -> int:
        return timestamps.microseconds(at)

    def _grow_dedup(self) -> None:
        dedup.grow(self)

    def _follow_dedup(self) -> None:
        dedup.follow(self)

    def _changed(self) -> None:
        """Something was changed, for the first time since a sync began, or long ago."""
        if self._durability == "interval":
            background = self.session.notices
            background.notice_queue(self)
            if not background.runs() or self._unsynced_seconds > LATE_SECONDS:
                self._sync_in_background()

    def _leave_to_background(self) -> None:
        """A call ends before what it changed is as durable as it should be."""
        if self._durability != "process":
            with contextlib.suppress(Exception):
                self.session.notices.notice_queue(self)
                self.session.notices.runs()

    def _make_durable(self, timeout: float = LOCK_SECONDS) -> None:
        """Return when all that was changed before this call survives a power cut."""
        begun, _ = self._syncs
        began_ns = _native.monotonic_ns()
        word = self._word("sync", f"{self.path}: syncing", timeout)
        if word.mine:  # in the middle of a sync of this thread, which may have begun before
            if word.inherited:
                self._dirty()
            self._sync_now()
            return
        with word:
            if word.inherited:  # the sync of its dead holder may have failed unseen
                self._dirty()
            # A sync that began after our change covers it.
            if self._syncs[1] <= begun:
                self._sync_now()
        self._synced(began_ns)

    def _sync_now(self) -> None:
        """Holder of the sync word."""
        if self._poison:
            raise Poisoned(5, "an earlier sync failed", self.path)
        number = self._begin_sync()
        try:
            self._files.sync()
        except StorageError as error:
            self._undo_sync()
            if not self.closed:
                self._set_poison(1)
            raise Indeterminate(
                error.errno or 5, f"the sync behind a change failed: {error.strerror}", self.path
            ) from error
        if self.closed:  # meanwhile, and so were the files
            raise Closed(f"{self.path}: the queue was closed while it was synced")
        self._end_sync(number)

    def _sync_in_background(self) -> None:
        """Sync what this process changed; by whoever changes something, where it is overdue."""
        if not self._take_changed() or self.closed or self._state != files.LIVE or self._poison:
            return
        try:
            self._make_durable()
        except BaseException:
            self._give_back_changed()
            raise

    def flush(self, *, timeout: float | None = None) -> None:
        """Return when all that was done before this call, by anyone, survives a power cut.

        Raises: LockTimeout where another process syncs for longer than `timeout` seconds (default
        30); Indeterminate, Poisoned.
        """
        checked = check_timeout(timeout)
        self._check_writable()
        self._make_durable(LOCK_SECONDS if checked is None else checked)

    def _health(self) -> str:
        if self._poison:
            return "sync failed"
        if self._is_overdue:
            return "sync overdue"
        return "background failing" if self.session.notices.trouble else "sound"

    # --- the end ----------------------------------------------------------------------------------

    def _sync_at_close(self) -> Exception | None:
        """Sync what this process wrote; what failed."""
        try:
            if not self.closed and self._state == files.LIVE and not self._poison:
                self._make_durable()
        except (StorageError, MillstreamError) as error:
            return error
        return None

    def _dispose(self) -> None:
        """Give up this handle; messages that were taken through it keep their bytes."""
        if not self.closed:
            self._was_dropped = self._was_dropped or self._state == files.DROPPED
            self._close()
            self._wake_all()  # those who wait here, of all processes, check again
            self._files.close()
            self._directory.close()
        for waiter in list(self._waiters):
            waiter.stop()


def _grown(count: int, extent: int, most: int, allocate: Callable[[int], None]) -> int:
    """Twice as many, or where the disk has no room for that one extent more; how many it is now."""
    twice, more = min(max(2 * count, extent), most), min(count + extent, most)
    try:
        allocate(twice)
    except StoreFull:
        if twice == more:
            raise
        allocate(more)
        return more
    return twice
