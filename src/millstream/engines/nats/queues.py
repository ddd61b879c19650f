"""Queues on NATS: a work-queue stream, a consumer for each priority, schedules for delays."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from millstream import DeadLetter, Put, QueueStats, RetryPolicy, StoredMessage, codecs, timestamps
from millstream.engines.nats import records
from millstream.engines.nats.connection import NOT_FOUND, TOO_MANY, ApiError
from millstream.engines.queue import ServerQueue, moment
from millstream.errors import (
    InvalidArgument,
    InvalidType,
    LeaseLost,
    LimitExceeded,
    NotFound,
    Reject,
    Retry,
    Snooze,
    StorageError,
    Unsupported,
)
from millstream.options import CENTURY, FOREVER, check_timeout, integer, number
from millstream.queue_errors import QueueFull

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from millstream.engines.nats.connection import NatsConnection
    from millstream.engines.nats.store import NatsStore
    from millstream.options import Durability

__all__ = ["NatsMessage", "NatsQueue"]

REASON, ERROR, ATTEMPTS = "Ms-Reason", "Ms-Error", "Ms-Attempts"
ID, PRIORITY, PUT_AT = "Ms-Id", "Ms-Priority", "Ms-Put-At"
LETTER = {REASON, ERROR, ATTEMPTS, ID, PRIORITY, PUT_AT}
PULL_SECONDS = 5.0
LANE_SECONDS = 0.02
ROOM_SECONDS = 0.05


class NatsQueue(ServerQueue["NatsMessage"]):
    """A queue on a NATS server; made by `NatsStore.queue`. Thread-safe."""

    store: NatsStore
    connection: NatsConnection

    def __init__(
        self,
        store: NatsStore,
        name: str,
        settings: dict[str, Any],
        durability: Durability,
        consent: frozenset[str],
        codec: object,
    ) -> None:
        self.store = store
        self.name = name
        self.durability = durability
        self.capacity: int | None = settings["capacity"]
        self.priorities = int(settings["priorities"])
        self.lease = float(settings["lease"])
        self.retry = RetryPolicy(**settings["retry"])
        self.ttl: float | None = settings["ttl"]
        self.dedup_window = float(settings["dedup_window"])
        self._consent = consent
        self._codec = codecs.resolve(codec)
        self.connection = store.connection
        self.stream = f"queue~{name}"

    def __repr__(self) -> str:
        return f"<NatsQueue {self.name!r} of {self.store.path!r}>"

    # --- putting ----------------------------------------------------------------------------------

    def put(
        self,
        value: Any,
        *,
        priority: int = 0,
        delay: float = 0.0,
        at: Any = None,
        key: Any = None,
        ttl: float | None = None,
        dedup_id: Any = None,
        headers: Any = None,
        timeout: float | None = None,
    ) -> int:
        """Put a message; its id. That of a delayed one holds until it is due."""
        checked = check_timeout(timeout)
        subject, data, given = self._message(
            value, priority, delay, at, key, ttl, dedup_id, headers
        )
        return self.send(subject, data, given, checked)

    def _message(
        self, value: Any, priority: int, delay: float, at: Any, key: Any, ttl: float | None,
        dedup_id: Any, headers: Any,
    ) -> tuple[str, bytes, dict[str, str]]:  # fmt: skip
        self.connection.check_open()
        self.store.check_writable()
        if integer("priority", priority, 0) and "queue.priority" not in self._consent:
            raise self.store.capabilities.refusal("queue.priority")
        integer("priority", priority, 0, self.priorities - 1)
        data = self._encoded(value)
        given = {} if headers is None else _headers(headers)
        made = records.headers_of(data, None if key is None else bytes(key), given)
        ttl = self.ttl if ttl is None else number("ttl", ttl, 0.0, CENTURY)
        if dedup_id is not None:
            raw = dedup_id.encode() if isinstance(dedup_id, str) else bytes(dedup_id)
            made["Nats-Msg-Id"] = records.text_of(raw)
        seconds = number("delay", delay, 0.0, CENTURY)
        if at is not None:
            if seconds:
                raise InvalidArgument("delay and at: one of them")
            seconds = max(0.0, timestamps.microseconds(at) / 1e6 - time.time())
        subject = f"{self.stream}.{priority}"
        lifetime = "Nats-TTL"
        if seconds > 0:
            if self.capacity is not None:
                raise self._no_delay()
            due = datetime.now(UTC) + timedelta(seconds=seconds)
            made["Nats-Schedule"] = f"@at {due.strftime('%Y-%m-%dT%H:%M:%S.%f')}Z"
            made["Nats-Schedule-Target"] = subject
            lifetime = "Nats-Schedule-TTL"
            subject = f"{self.stream}.delay.{os.urandom(8).hex()}"  # one each: the last would win
        if ttl is not None:
            made[lifetime] = f"{max(1, math.ceil(ttl))}s"
        most = int(self.connection.client.max_payload)
        size = len(data) + sum(len(name) + len(text) + 4 for name, text in made.items()) + 64
        if size > most:
            raise LimitExceeded(
                f"a message of {size} bytes with its headers: {self.store.engine} at"
                f" {self.store.path} takes {most}; raise max_payload in its configuration"
            )
        return subject, data, made

    def _no_delay(self) -> Unsupported:
        return Unsupported(
            capability="queue.delay",
            engine=self.store.engine,
            instead="this queue has a capacity, and the server takes one of the two",
        )

    def send(
        self, subject: str, data: bytes, headers: dict[str, str], timeout: float | None
    ) -> int:
        """Store a message; its id. Raises QueueFull where no room came in time."""
        deadline = time.monotonic() + (FOREVER if timeout is None else timeout)
        while True:
            try:
                work = self.connection.publish(subject, data, headers, self.where)
                return int(self.connection.call(work)["seq"])
            except ApiError as error:
                if error.err_code != TOO_MANY:
                    raise StorageError(
                        errno.EIO, f"nothing was put: {error}", self.where
                    ) from error
                if time.monotonic() >= deadline:
                    raise QueueFull(
                        f"{self.where}: {self.capacity} messages are not finished"
                    ) from error
            time.sleep(ROOM_SECONDS)

    def put_many(self, items: Iterable[Any], timeout: float | None = 0) -> list[int]:
        """Put values or `Put`s; their ids. All are checked before the first is sent."""
        checked = check_timeout(timeout)
        made = []
        for item in items:
            put = item if isinstance(item, Put) else Put(item)
            made.append(
                self._message(
                    put.value, put.priority, put.delay, put.at, put.key, put.ttl, put.dedup_id,
                    put.headers,
                )
            )  # fmt: skip
        return [self.send(*one, checked) for one in made]

    # --- getting ----------------------------------------------------------------------------------

    def get_many(self, count: int, *, timeout: float | None = None) -> list[NatsMessage]:
        """Lease up to so many: those that are there, or the first that comes."""
        wanted = integer("count", count, 0)
        checked = check_timeout(timeout)
        self.connection.check_open()
        self.store.check_writable()
        deadline = time.monotonic() + (FOREVER if checked is None else checked)
        while wanted:
            left = deadline - time.monotonic()
            for lane in range(self.priorities):
                # With one lane the server waits for us; several are asked in turn.
                waits = 0.0 if self.priorities > 1 else max(0.0, min(left, PULL_SECONDS))
                found = self._pull(lane, wanted, waits)
                if found:
                    return found
            if time.monotonic() >= deadline:
                break
            if self.priorities > 1:
                time.sleep(LANE_SECONDS)
        return []

    def _pull(self, lane: int, count: int, seconds: float) -> list[NatsMessage]:
        """What a lane has; the request is over when this returns, so that nothing comes late."""
        asked = time.monotonic()
        wall = time.time()
        body: dict[str, Any] = {"batch": count if seconds < 0.01 else 1}
        if seconds < 0.01:
            body["no_wait"] = True
        else:
            body["expires"] = int(seconds * 1e9)
        name = f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.lane{lane}"
        work = self.connection.pull(name, body, seconds + 10.0, int(body["batch"]))
        try:
            found = self.connection.call(work, seconds + 10.0)
        except ApiError as error:
            raise NotFound(f"{self.where}: it is not there any more: {error}") from error
        except TimeoutError as error:
            raise StorageError(errno.ETIMEDOUT, "the server does not answer", self.where) from error
        return [NatsMessage(self, one, lane, asked, wall) for one in found]

    # --- looking ----------------------------------------------------------------------------------

    def _lanes(self) -> list[dict[str, Any]]:
        """What the server says of the consumer of each priority."""
        return [
            self.connection.do(f"CONSUMER.INFO.{self.stream}.lane{lane}")
            for lane in range(self.priorities)
        ]

    def _state(self, subjects: str = "") -> dict[str, Any]:
        body = {"subjects_filter": subjects} if subjects else None
        found: dict[str, Any] = self.connection.do(f"STREAM.INFO.{self.stream}", body)["state"]
        return found

    def __len__(self) -> int:
        """How many are not finished."""
        return int(self._state()["messages"]) - self.dead.exhausted()

    def stats(self) -> QueueStats:
        """The queue in numbers, as of now."""
        lanes, state = self._lanes(), self._state()
        delayed = sum((self._state(f"{self.stream}.delay.*").get("subjects") or {}).values())
        ready = tuple(int(lane["num_pending"]) for lane in lanes)
        return QueueStats(
            name=self.name, durability=self.durability, capacity=self.capacity or 0,
            unfinished=len(self), ready=sum(ready), delayed=delayed, held=0,
            leased=sum(int(lane["num_ack_pending"]) for lane in lanes), dead=len(self.dead),
            by_priority=ready, paused=False, oldest_age=None, put=int(state["last_seq"]),
            done=int(state["last_seq"]) - int(state["messages"]), failed=0, cancelled=0,
            redelivered=sum(int(lane["num_redelivered"]) for lane in lanes), expired=0, evicted=0,
            corrupt=0, refused=0, slots=0, blocks=0, health="sound", priorities=self.priorities,
            lease=self.lease, ordering=None, retry=self.retry, ttl=self.ttl,
            dedup_window=self.dedup_window, dead_limit=0, on_dead="skip", ageing=False,
            slot_bytes=0, payload_bytes=0, payload_max=int(self.connection.client.max_payload),
        )  # fmt: skip

    def _untouched(self, most: int) -> list[tuple[int, records.Stored]]:
        """(priority, message) of what was never leased, in the order in which it would come."""
        found: list[tuple[int, records.Stored]] = []
        for lane, info in enumerate(self._lanes()):
            sequence = int(info["delivered"]["stream_seq"]) + 1
            while len(found) < most:
                body = {
                    "seq": sequence, "batch": min(most - len(found), 1000),
                    "next_by_subj": f"{self.stream}.{lane}",
                }  # fmt: skip
                name = f"$JS.API.DIRECT.GET.{self.stream}"
                page = [
                    records.Stored(one)
                    for one in self.connection.call(
                        self.connection.collect(name, body, 10.0, 1 << 30), 10.0
                    )
                ]
                if not page:
                    break
                found += [(lane, one) for one in page]
                sequence = page[-1].sequence + 1
        return found

    def peek(self, count: int = 1) -> list[StoredMessage]:
        """The messages that would come next and were never leased, without taking them."""
        return [
            StoredMessage(
                one.sequence, "ready", self.decoded(one.data), one.key,
                records.given_headers(one.headers), lane, 0, moment(one.timestamp), None, None,
            )
            for lane, one in self._untouched(integer("count", count, 0))
        ]  # fmt: skip

    def cancel(self, id: int) -> bool:
        """Remove a message by its id; False where it was leased, or is finished."""
        self.store.check_writable()
        sequence = integer("id", id, 0)
        found = self.connection.call(
            self.connection.collect(
                f"$JS.API.DIRECT.GET.{self.stream}", {"seq": sequence}, 10.0, 1
            ),
            10.0,
        )
        if not found:
            return False
        lane = records.Stored(found[0]).subject.removeprefix(f"{self.stream}.")
        if lane.isdigit():
            info = self.connection.do(f"CONSUMER.INFO.{self.stream}.lane{lane}")
            if sequence <= int(info["delivered"]["stream_seq"]):
                return False
        return self.delete(self.stream, sequence)

    def delete(self, stream: str, sequence: int) -> bool:
        """Remove a message of a JetStream stream; False where it is not there."""
        try:
            self.connection.call(
                self.connection.api(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence})
            )
        except ApiError as error:
            if error.code == 404 or error.err_code in NOT_FOUND:
                return False
            raise self.connection.refused(error, self.where) from error
        return True

    def purge(self) -> int:
        """Remove all messages that were never leased; how many."""
        self.store.check_writable()
        gone = sum(self.delete(self.stream, one.sequence) for _, one in self._untouched(1 << 30))
        delayed = self.connection.do(
            f"STREAM.PURGE.{self.stream}", {"filter": f"{self.stream}.delay.*"}
        )
        return gone + int(delayed["purged"])

    def pause(self) -> None:
        """Raise Unsupported."""
        raise self.store.capabilities.refusal("queue.pause")

    def resume(self) -> None:
        """Raise Unsupported."""
        raise self.store.capabilities.refusal("queue.pause")

    def worker(self, **_: object) -> Any:
        """Raise Unsupported."""
        raise self.store.capabilities.refusal("queue.worker")

    @property
    def dead(self) -> NatsDeadLetters:
        """The dead letters."""
        return NatsDeadLetters(self)


def _headers(given: Any) -> Mapping[str, bytes]:
    if not hasattr(given, "items"):
        raise InvalidType(f"headers {given!r}: expected a mapping of str to bytes")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, bytes | bytearray | memoryview):
            raise InvalidType(f"header {name!r}: expected str and bytes-like")
    return {name: bytes(value) for name, value in given.items()}


class NatsMessage:
    """A leased message of a queue on NATS."""

    def __init__(
        self, queue: NatsQueue, message: Any, lane: int, asked: float, wall: float
    ) -> None:
        self.queue = queue
        self.priority = lane
        self.data: bytes = message.data
        self._headers: Mapping[str, str] = message.headers or {}
        self._reply: str = message.reply
        tokens = message.reply.split(".")
        tokens = tokens[4:] if len(tokens) == 9 else tokens[6:]
        self.attempt, self.id = int(tokens[0]), int(tokens[1])
        self.put_at = moment(int(tokens[3]) // 1000)
        self._received = time.monotonic()
        # The server's lease began when it sent this, behind our request and before we had it: what
        # is late for the sooner one is refused here, before it is sent.
        late = max(asked, self._received - 0.05)
        self._ends = late + queue.lease
        self.deadline = moment(int((time.time() + self._ends - time.monotonic()) * 1e6))
        self.finished = ""

    def __repr__(self) -> str:
        return f"<NatsMessage {self.id} of {self.queue!r}: attempt {self.attempt}>"

    @property
    def value(self) -> Any:
        """The payload, as the codec reads it."""
        return self.queue.decoded(self.data)

    @property
    def key(self) -> bytes | None:
        """Its key."""
        text = self._headers.get(records.KEY)
        return None if text is None else records.bytes_of(text)

    @property
    def headers(self) -> dict[str, bytes]:
        """Its headers."""
        return records.given_headers(self._headers)

    @property
    def lost(self) -> bool:
        """Is the lease over, by our clock?"""
        return not self.finished and time.monotonic() >= self._ends

    def _answer(self, data: bytes, finished: str) -> None:
        if self.finished:
            raise InvalidArgument(f"message {self.id}: it was finished already: {self.finished}")
        if self.lost:
            raise LeaseLost(
                f"{self.queue.where}: the lease of message {self.id} ended before this call;"
                " somebody else may have it now"
            )
        self.queue.connection.check_open()
        self.queue.connection.call(self.queue.connection.ask(self._reply, data))
        self.finished = finished

    def ack(self) -> None:
        """It is done. Raises LeaseLost where the lease is over by our clock."""
        self._answer(b"+ACK", "ack")

    def nack(self, delay: float | None = None, reason: object = "") -> None:
        """It failed: deliver it again, later; after the last attempt it is a dead letter."""
        policy = self.queue.retry
        seconds = (
            policy.delay(self.attempt) if delay is None else number("delay", delay, 0, CENTURY)
        )
        if self.attempt >= policy.max_attempts:
            self._bury("failed", str(reason), "dead")
            return
        self._answer(b"-NAK " + json.dumps({"delay": int(seconds * 1e9)}).encode(), "nack")

    def reject(self, reason: object = "") -> None:
        """To the dead letters."""
        self._bury(str(reason) or "rejected", str(reason), "dead")

    def _bury(self, reason: str, error: str, finished: str) -> None:
        if self.finished or self.lost:
            self._answer(b"", "")  # raises
        queue = self.queue
        headers = {
            **{name: text for name, text in self._headers.items() if not name.startswith("Nats-")},
            REASON: records.text_of(reason.encode()), ERROR: records.text_of(error.encode()),
            ATTEMPTS: str(self.attempt),
            ID: str(self.id), PRIORITY: str(self.priority),
            PUT_AT: str(int(self.put_at.timestamp() * 1e6)), "Nats-Msg-Id": str(self.id),
        }  # fmt: skip
        work = queue.connection.publish(f"dead~{queue.name}", self.data, headers, queue.where)
        try:
            queue.connection.call(work)
        except ApiError as refused:
            raise queue.connection.refused(refused, queue.where) from refused
        self._answer(b"+TERM", finished)

    def release(self, delay: float = 0) -> None:
        """Raise Unsupported: NATS counts each delivery."""
        raise self.queue.store.capabilities.refusal("queue.release")

    def extend(self, seconds: float | None = None) -> None:
        """Begin the lease anew, as long as it was."""
        if seconds is not None and float(seconds) != self.queue.lease:
            raise InvalidArgument(
                f"seconds {seconds!r}: the lease of a queue on NATS begins anew with its own"
                f" length, {self.queue.lease:g}; leave it out"
            )
        asked = time.monotonic()
        self._answer(b"+WPI", "")
        self._ends = asked + self.queue.lease
        self.deadline = moment(int((time.time() + self.queue.lease) * 1e6))

    def __enter__(self) -> NatsMessage:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if self.finished:
            return False
        if error is None:
            self.ack()
            return False
        if isinstance(error, Retry):
            self.nack(error.delay, repr(error))
            return True
        if isinstance(error, Snooze):
            self.release(error.delay)
        if isinstance(error, Reject):
            self.reject(error.reason)
            return True
        if isinstance(error, Exception):
            self.nack(None, repr(error))
        return False


class NatsDeadLetters:
    """The messages that are tried no more: those that we put there, and those of advisories."""

    def __init__(self, queue: NatsQueue) -> None:
        self._queue = queue
        self._stream = f"dead~{queue.name}"

    def __len__(self) -> int:
        info = self._queue.store.info(self._stream)
        return 0 if info is None else int(info["state"]["messages"])

    def exhausted(self) -> int:
        """How many of them are messages that still lie in the queue's stream."""
        body = {"subjects_filter": "$JS.EVENT.>"}
        state = self._queue.connection.do(f"STREAM.INFO.{self._stream}", body)["state"]
        return sum((state.get("subjects") or {}).values())

    def _read(self, stream: str, sequence: int, most: int) -> list[records.Stored]:
        connection = self._queue.connection
        body = {"seq": sequence, "batch": most} if most > 1 else {"seq": sequence}
        work = connection.collect(f"$JS.API.DIRECT.GET.{stream}", body, 10.0, most)
        return [records.Stored(one) for one in connection.call(work, 10.0)]

    def _all(self) -> Iterator[tuple[int, records.Stored, DeadLetter]]:
        """(sequence of the letter, message, letter), the oldest first."""
        sequence = 1
        while page := self._read(self._stream, sequence, 1000):
            for one in page:
                sequence = one.sequence + 1
                if one.subject == self._stream:
                    yield one.sequence, one, self._letter(one)
                    continue
                advice = json.loads(one.data)
                found = self._read(self._queue.stream, int(advice["stream_seq"]), 1)
                if not found:  # it was acknowledged after all, or has gone
                    self._queue.delete(self._stream, one.sequence)
                    continue
                yield one.sequence, found[0], self._lapsed(found[0], advice, one.timestamp)
            if len(page) < 1000:
                return

    def _letter(self, one: records.Stored) -> DeadLetter:
        headers = one.headers
        error = records.bytes_of(headers[ERROR]).decode()
        at = moment(one.timestamp)
        return DeadLetter(
            int(headers[ID]), self._queue.decoded(one.data),
            records.bytes_of(headers[REASON]).decode(), error, error, at, at,
            int(headers[ATTEMPTS]), one.key, records.given_headers(headers),
            int(headers[PRIORITY]), moment(int(headers[PUT_AT])),
        )  # fmt: skip

    def _lapsed(self, one: records.Stored, advice: dict[str, Any], at: int) -> DeadLetter:
        lane = int(one.subject.rpartition(".")[2])
        return DeadLetter(
            one.sequence, self._queue.decoded(one.data), "the lease ran out", "", "", moment(at),
            moment(at), int(advice["deliveries"]), one.key, records.given_headers(one.headers),
            lane, moment(one.timestamp),
        )  # fmt: skip

    def list(self, count: int | None = None) -> list[DeadLetter]:
        """Up to so many of them, the oldest first."""
        most = None if count is None else integer("count", count, 0)
        found: list[DeadLetter] = []
        for _, _, letter in self._all():
            if most is not None and len(found) >= most:
                break
            found.append(letter)
        return found

    def redrive(self, ids: int | Iterable[int] | None = None) -> int:
        """Try these again, or all; how many. Killed on the way, one may come twice."""
        self._queue.store.check_writable()
        count = 0
        for sequence, message, letter in self._chosen(ids):
            headers = {
                name: text
                for name, text in message.headers.items()
                if not name.startswith("Nats-") and name not in LETTER
            }
            subject = f"{self._queue.stream}.{letter.priority}"
            self._queue.send(subject, message.data, headers, 0)
            self._forget(sequence, message)
            count += 1
        return count

    def purge(self, ids: int | Iterable[int] | None = None) -> int:
        """Remove these, or all; how many."""
        self._queue.store.check_writable()
        count = 0
        for sequence, message, _ in self._chosen(ids):
            self._forget(sequence, message)
            count += 1
        return count

    def _forget(self, sequence: int, message: records.Stored) -> None:
        if message.subject != self._stream:
            self._queue.delete(self._queue.stream, message.sequence)
        self._queue.delete(self._stream, sequence)

    def _chosen(
        self, ids: int | Iterable[int] | None
    ) -> Iterator[tuple[int, records.Stored, DeadLetter]]:
        wanted = None if ids is None else {ids} if isinstance(ids, int) else set(ids)
        for found in list(self._all()):
            if wanted is None or found[2].id in wanted:
                yield found
