"""Results of Celery in a store: ``result_backend="millstream:///var/lib/app"``.

``pip install 'millstream[celery]'``. Importing this module also names the broker, `millstream://`;
after an installation by pip both are there without it.

Results are records of the stream `celery.results`, whose retention is ``result_expires``. Who asks
for results keeps in memory where those lie that are not expired, about 250 bytes for each, and is
woken by what is appended: nobody polls. Workers only append, and read nothing. The parts of chords
are in the stream `celery.chords`: the worker that adds the last one sends the callback.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import millstream
from millstream.contrib import require

require("celery", "celery", (5, 5), (6,))

from celery import states  # noqa: E402
from celery.app.backends import BACKEND_ALIASES  # noqa: E402
from celery.backends.base import KeyValueStoreBackend  # noqa: E402
from celery.canvas import maybe_signature  # noqa: E402
from celery.exceptions import ChordError, TimeoutError  # noqa: E402
from celery.result import GroupResult, allow_join_result  # noqa: E402
from kombu.utils.encoding import bytes_to_str  # noqa: E402

from millstream.contrib.kombu import Broker, path_of  # noqa: E402
from millstream.contrib.results import FINAL, OTHER, Log, Results, expiring  # noqa: E402

__all__ = ["Backend"]

BACKEND_ALIASES.setdefault("millstream", "millstream.contrib.celery:Backend")

RESULTS, CHORDS = "celery.results", "celery.chords"


@dataclass
class Chord:
    """What is known of one."""

    parts: dict[str, tuple[float, int, bytes]] = field(default_factory=dict)
    """By task: its place in the group, the offset of its first record, its result."""
    size: int | None = None
    more: int = 0
    full_at: int | None = None
    """The offset of the record with which it had all its parts."""


class Chords(Log):
    """The chords under way."""

    def __init__(self, store: millstream.Store, name: str, expires: float | None) -> None:
        super().__init__(expiring(store, name, expires))
        self.open: dict[bytes, Chord] = {}

    def _apply(self, batch: millstream.Batch) -> None:
        columns = zip(batch.keys, batch.values, batch.headers, strict=True)
        for offset, (key, value, headers) in enumerate(columns, batch.first_offset):
            assert key is not None
            kind = headers["kind"]
            if kind == b"done":
                self.open.pop(key, None)
                continue
            chord = self.open.setdefault(key, Chord())
            if kind == b"size":
                chord.size = int(value or 0)
            elif kind == b"more":
                chord.more += 1
            else:
                place = float(headers["place"])
                chord.parts.setdefault(headers["task"].decode(), (place, offset, value or b""))
            if chord.size is not None and len(chord.parts) >= chord.size + chord.more:
                chord.full_at = offset if chord.full_at is None else chord.full_at

    def _prune(self, first: int) -> None:
        for key in [key for key, chord in self.open.items() if chord.parts]:
            if max(offset for _, offset, _ in self.open[key].parts.values()) < first:
                del self.open[key]

    def say(self, key: bytes, value: bytes, **headers: bytes) -> int:
        """Append what happened; its offset."""
        return int(self.stream.append(value, key=key, headers=headers).offset)


class Backend(KeyValueStoreBackend):  # type: ignore[misc]
    """The result backend."""

    supports_autoexpire = True
    supports_native_join = True
    supports_result_compression = True

    def __init__(self, *args: Any, url: str | None = None, **options: Any) -> None:
        super().__init__(*args, url=url, **options)
        asked = self.app.conf.get("result_chord_expires")
        own = None if asked is None else self.prepare_expires(asked, type=int)
        self._chord_seconds = self.expires if own is None else own
        self._broker = Broker.join(path_of(url or ""))
        weakref.finalize(self, self._broker.leave)
        # A store that cannot be opened, and streams that others made, are said now.
        there = self._broker.store.streams()
        if RESULTS in there:
            self._results  # noqa: B018
        if CHORDS in there:
            self._chords  # noqa: B018

    def __reduce__(self, args: Any = (), kwargs: Any = None) -> Any:
        return super().__reduce__(args, {**(kwargs or {}), "url": self.url})

    def _log(self, name: str, log: type[Results | Chords], expires: float | None) -> Any:
        broker = self._broker
        store = broker.store
        found = broker.shared.get(name)
        if found is None:
            found = broker.shared.setdefault(name, log(store, name, expires))
        return found

    @property
    def _results(self) -> Results:
        results: Results = self._log(RESULTS, Results, self.expires)
        return results

    @property
    def _chords(self) -> Chords:
        chords: Chords = self._log(CHORDS, Chords, self._chord_seconds)
        return chords

    # --- results ----------------------------------------------------------------------------------

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        return self._results.get(key)

    def mget(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of keys."""
        return [self._results.get(key) for key in keys]

    def set(self, key: bytes, value: str | bytes) -> None:
        """Set the value of a key."""
        self._results.set(key, value.encode() if isinstance(value, str) else value)

    def delete(self, key: bytes) -> None:
        """Take a key away."""
        self._results.set(key, None)

    def _set_with_state(self, key: bytes, value: str | bytes, state: str) -> None:
        data = value.encode() if isinstance(value, str) else value
        self._results.set(key, data, FINAL if state == states.SUCCESS else OTHER)

    def _store_result(
        self,
        task_id: str,
        result: object,
        state: str,
        traceback: object = None,
        request: object = None,
        **options: Any,
    ) -> object:
        meta = self._get_result_meta(
            result=result, state=state, traceback=traceback, request=request
        )
        meta["task_id"] = bytes_to_str(task_id)
        self._set_with_state(self.get_key_for_task(task_id), self.encode(meta), state)
        return result

    def mark_as_done(
        self,
        task_id: str,
        result: object,
        request: Any = None,
        store_result: bool = True,
        state: str = states.SUCCESS,
    ) -> None:
        """Add a part to its chord, and the callback to its queue; store the success behind it.

        Not the other way round: Celery acknowledges the message of a process that it lost where
        its success is stored, and a chord without that part would never end.
        """
        if request and request.chord:
            self.on_chord_part_return(request, state, result)
        if store_result and not (request and request.ignore_result):
            self.store_result(task_id, result, state, request=request)

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Callable[[], object] | None = None,
    ) -> Any:
        """Wait for the result of a task. Raises TimeoutError."""
        for _, meta in self.get_many([task_id], timeout, interval, on_interval=on_interval):
            return meta

    def get_many(
        self,
        task_ids: Any,
        timeout: float | None = None,
        interval: float | None = 0.5,
        no_ack: bool = True,
        on_message: Callable[[Any], object] | None = None,
        on_interval: Callable[[], object] | None = None,
        max_iterations: int | None = None,
        READY_STATES: Any = states.READY_STATES,
    ) -> Iterator[tuple[str, Any]]:
        """Yield the results of tasks as they come. Raises TimeoutError."""
        self._ensure_not_eager()
        results = self._results
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = {self.get_key_for_task(task_id): task_id for task_id in task_ids}
        seen: dict[bytes, int | None] = {}
        while True:
            results.catch_up()
            for key in [key for key in waiting if results.at.get(key) != seen.get(key)]:
                seen[key] = results.at.get(key)
                meta = self.get_task_meta(waiting[key])
                if meta["status"] in READY_STATES:
                    task_id = bytes_to_str(waiting.pop(key))
                    if on_message is not None:
                        on_message(meta)
                    yield task_id, meta
            if not waiting:
                return
            if on_interval is not None:
                on_interval()
            left = 3600.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{len(waiting)} results did not come within {timeout} s")
            results.wait(min(interval or 0.5, left))
            if max_iterations is not None:
                max_iterations -= 1
                if not max_iterations:
                    return

    # --- chords -----------------------------------------------------------------------------------

    def apply_chord(self, header_result_args: Any, body: Any, **options: Any) -> None:
        """Keep the structure of a header that has groups in it."""
        self.ensure_chords_allowed()
        if isinstance(header_result_args[1], list | tuple):
            header = self.app.GroupResult(*header_result_args)
            if any(isinstance(one, GroupResult) for one in header.results):
                header.save(backend=self)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Say how many parts there will be; before the last one is sent."""
        self._chords.say(group_id.encode(), str(chord_size).encode(), kind=b"size")

    def add_to_chord(self, chord_id: str, result: object) -> None:
        """One part more."""
        self._chords.say(chord_id.encode(), b"", kind=b"more")

    def on_chord_part_return(
        self, request: Any, state: str, result: Any, propagate: object = None, **options: Any
    ) -> None:
        """Add a part; who adds the last one sends the callback.

        One that is run again, since its worker was killed when it had added it, sends it as well,
        unless that is known to be done: at least once.
        """
        task, group = request.id, request.group
        if not group or not task:
            return
        key, chords = group.encode(), self._chords
        encoded = self.encode([1, task, state, self.encode_result(result, state)])
        data = encoded.encode() if isinstance(encoded, str) else encoded
        place = "inf" if request.group_index is None else str(request.group_index)
        offset = chords.say(key, data, kind=b"part", task=task.encode(), place=place.encode())
        chords.catch_up()
        chord = chords.open.get(key)
        if chord is None or chord.full_at is None or task not in chord.parts:
            return
        again = chord.parts[task][1] < offset
        if chord.full_at == offset or again:
            self._finish_chord(request, state, result, chord)
            chords.say(key, b"", kind=b"done")

    def _finish_chord(self, request: Any, state: str, result: object, chord: Chord) -> None:
        """Send the callback, or have it fail as its parts did."""
        callback = maybe_signature(request.chord, app=self.app)
        try:
            header = GroupResult.restore(request.group, backend=self, app=self.app)
            if header is not None:  # groups are in it: their results are looked up, ours too
                self.store_result(request.id, result, state, request=request)
                header.on_ready()
                with allow_join_result():
                    timeout = self.app.conf.result_chord_join_timeout
                    values = header.join_native(timeout=timeout, propagate=True)
            else:
                parts = sorted(chord.parts.values())
                values = [self._part(data) for _, _, data in parts]
            callback.delay(values)
        except Exception as error:  # whatever a task raised, or sending does
            failed = error if isinstance(error, ChordError) else ChordError(f"{error!r}")
            failed.__cause__ = None if failed is error else error
            self.chord_error_from_stack(callback, failed)

    def _part(self, data: bytes) -> Any:
        _, task, state, value = self.decode(data)
        if state in states.EXCEPTION_STATES:
            value = self.exception_to_python(value)
        if state in states.PROPAGATE_STATES:
            raise ChordError(f"Dependency {task} raised {value!r}") from value
        return value
