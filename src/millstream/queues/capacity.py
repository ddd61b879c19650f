"""Raising the capacity of a queue that is in use: larger hints in place of those there are.

Slots are only added, so all that a message is stays where it is. Hints have the size of the
capacity, and are replaced whole: the process that raises it holds their maintenance word, says in
their state that they are outgrown, takes the words that are in them (the wheel, the buckets of
keys) and keeps them, makes the new ones from the state words and publishes them by a rename.
Everybody reads the state at each call, waits for that maintenance word and goes on with the new
hints. Where its holder was killed, the next one does the same again.

A call that began before may still leave a hint where nobody reads: the new hints begin as after a
death, so the sweep finds it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from millstream.disk import files
from millstream.disk.session import LOCK_SECONDS
from millstream.errors import LockTimeout, StorageError
from millstream.queues import slots

if TYPE_CHECKING:
    from millstream import _native
    from millstream.queues.handle import QueueHandle


def raise_to(queue: QueueHandle, config: dict[str, Any]) -> None:
    """Go on with this configuration, of a larger capacity. Holder of maintenance.

    Raises: StoreFull where there is no room for the hints; nothing has changed then.
    """
    queue._files.extend(config)
    queue_files = slots.Files(queue.path, config, queue.session.id, write=True)
    try:
        hints, temporary = queue_files.make_hints()
        try:
            queue._set_state(files.OUTGROWN)
            try:
                files.write_json(queue.path / "queue.json", config)
            except BaseException:
                queue._set_state(files.LIVE)
                raise
            _publish(queue, queue_files, config, hints, temporary)
        except BaseException:
            files.remove(temporary)
            raise
    except BaseException:
        queue_files.close()
        raise


def _publish(
    queue: QueueHandle,
    queue_files: slots.Files,
    config: dict[str, Any],
    hints: _native.Map,
    temporary: files.Path,
) -> None:
    numbers = queue._numbers(config, queue_files)
    taken = queue._move_hints(queue_files.slots, queue_files.blocks, hints, numbers)
    try:
        queue_files.publish_hints(temporary)
    except StorageError:  # whoever comes next, here or elsewhere, takes the words again
        queue._give_back_hints(taken)
        raise
    queue._wake_all()  # those who sleep on the old ones check again
    _use(queue, queue_files, config, hints)
    queue._wake_all()


def _use(
    queue: QueueHandle, queue_files: slots.Files, config: dict[str, Any], hints: _native.Map
) -> None:
    queue_files.go_on_from(queue._files)
    queue._files = queue_files
    queue._config = config
    queue._use(hints)


def follow(queue: QueueHandle) -> None:
    """The hints in use here are outgrown: go on with the ones that are there instead."""
    if not queue.session.writable:
        _follow_reading(queue)
        return
    before = queue._hints_at
    with queue._word("maintenance", f"{queue.path}: capacity", LOCK_SECONDS):
        if queue._hints_at != before or queue._state != files.OUTGROWN:
            return  # another thread has done it, or it was given up
        queue_files, config, hints = _newest(queue)
        if hints is not None and queue_files.hints_inode != queue._files.hints_inode:
            # Those may be outgrown as well: only the holder of the last one's word may make others.
            _use(queue, queue_files, config, hints)
            return
        queue_files.close()
        # The process that did it was killed before they were published.
        config = files.read_json(queue.path / "queue.json")
        queue_files = slots.Files(queue.path, config, queue.session.id, write=True)
        hints, temporary = queue_files.make_hints()
        try:
            _publish(queue, queue_files, config, hints, temporary)
        except BaseException:
            files.remove(temporary)
            raise


def join(queue: QueueHandle) -> None:
    """Where only the slots were read, since nobody had made hints: map what is there now."""
    queue_files, config, hints = _newest(queue)
    _use(queue, queue_files, config, queue_files.private_hints() if hints is None else hints)


def _newest(queue: QueueHandle) -> tuple[slots.Files, dict[str, Any], _native.Map | None]:
    """The hints that are there, whatever their state, with what fits them."""
    path, session = queue.path / "queue.json", queue.session
    config = files.read_json(path)
    while True:
        queue_files = slots.Files(queue.path, config, session.id, write=session.writable)
        try:
            return queue_files, config, queue_files.map_hints()
        except slots.OtherSize as other:
            queue_files.close()
            config = slots.fitting(files.read_json(path), other)


def _follow_reading(queue: QueueHandle) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        queue_files, config, hints = _newest(queue)
        if hints is not None and slots.state_of(hints) != files.OUTGROWN:
            _use(queue, queue_files, config, hints)
            return
        queue_files.close()
        if time.monotonic() > deadline:
            raise LockTimeout(f"{queue.path}: its capacity is being raised for {LOCK_SECONDS:g} s")
        time.sleep(0.001)
