"""Store and forward: a stream or a queue of this store into another engine, and nothing is lost.

A stream goes record by record, each with its offset as the sequence of a producer of the target, so
that what was sent before adds nothing, whoever was killed and when. A queue goes message by message
and is acknowledged behind the target's answer: at least once.
"""

from __future__ import annotations

import contextlib
import re
import threading
from typing import TYPE_CHECKING, Any, Protocol

from millstream import _native
from millstream._native import Position
from millstream.errors import (
    Closed,
    ConfigMismatch,
    Fenced,
    InvalidType,
    LeaseLost,
    MillstreamError,
    StorageError,
    WaitTimeout,
)
from millstream.options import Retention, check_timeout
from millstream.queue_errors import Empty, QueueFull
from millstream.queues.queue import Queue
from millstream.streams.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from millstream._native import Batch, Span
    from millstream.capabilities import Capability

__all__ = ["Relay"]

MESSAGE_ID = "millstream-id"
"""Header of a message in a target that drops nothing by itself: the same when it is sent again."""
RECORDS = 1000
LOOK_SECONDS = 0.2
"""How long it waits for a record, until it looks whether it is to end."""
PAUSE_FIRST, PAUSE_MOST = 0.1, 5.0
"""Between tries while the target does not take anything: twice as long each time."""


class Target(Protocol):
    """What a relay needs of the other engine; every store is one."""

    @property
    def capabilities(self) -> Mapping[str, Capability]:
        """What it can do."""
        ...

    def require(self, *names: str) -> None:
        """Raise Unsupported where it lacks one of these."""
        ...

    def stream(self, name: str, *, partitions: int | None = None) -> Any:
        """Open a stream."""
        ...

    def queue(self, name: str) -> Any:
        """Open a queue."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class Relay:
    """Sends what is in a stream or a queue to another engine; made by `Store.relay`.

    Several at once, also in several processes, share the partitions of a stream. A target that is
    away makes the lag grow, and nothing else: what was not sent stays here.

    Attributes:
        group: of a stream: the consumer group that says how far it is, as `stats` and ``top`` show.
        sent: records or messages of this relay that the target has taken.
        error: what the target said last, while it takes nothing; "" otherwise.
    """

    def __init__(
        self, source: Stream | Queue, target: Target, to: str, topic: str | None, store_id: str
    ) -> None:
        self.source = source
        self.topic = topic or source.name
        self.sent = 0
        self.error = ""
        self._target = target
        self._stopping = _native.Flag()
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._store_id = store_id
        digest = _native.xxh3_64(re.sub("//.*@", "//", to).encode())
        self.group = f"relay.{self.topic}.{digest & 0xFFFFFFFF:08x}"[-128:].lstrip(".")
        if isinstance(source, Stream):
            self._prepare(source)
        else:
            self._into = target.queue(self.topic)
            can = target.capabilities["queue.dedup"].level == "native"
            self._dedups = can and self._into.stats().dedup_window > 0

    @staticmethod
    def check(source: object) -> None:
        """Raise InvalidType for what is neither a stream nor a queue."""
        if not isinstance(source, (Stream, Queue)):
            raise InvalidType(f"source {source!r}: expected a Stream or a Queue of this store")

    def __repr__(self) -> str:
        state = f": {self.error}" if self.error else ""
        return f"<Relay of {self.source!r} to {self._into!r}{state}>"

    def _prepare(self, source: Stream) -> None:
        self._target.require("stream.producer", "stream.timestamp")
        self._into = self._target.stream(self.topic, partitions=source.partitions)
        loses: str | None = getattr(self._into, "loses", None)
        kept: Retention = self._into.retention
        if loses is None and kept != Retention():
            loses = f"has a retention of {kept}, which removes records that nobody has read yet"
        if loses:
            raise ConfigMismatch(f"{self._into!r}: {loses}; relay into a stream that keeps them")
        self._producer = self._into.producer(
            f"relay-{self._store_id}-{source.name}-{source._stream_id:x}"[:128]
        )
        for index, last in enumerate(self._producer.last_sequences):
            if last >= source.next_offset(index):
                raise ConfigMismatch(
                    f"{self._into!r}, partition {index}: has record {last} of {source!r}, which"
                    f" ends at {source.next_offset(index) - 1}: a backup that is older than what"
                    " was relayed was restored; relay to another topic"
                )

    @property
    def lag(self) -> int:
        """Records, or messages, that the target has not taken yet."""
        if isinstance(self.source, Queue):
            return len(self.source)
        if self.group not in self.source.groups():
            return sum(
                self.source.next_offset(index) - self.source.first_offset(index)
                for index in range(self.source.partitions)
            )
        return self.source.group(self.group).lag()

    def run(self, *, timeout: float | None = None) -> int:
        """Send until `stop`, or until nothing came for `timeout` seconds; how many were sent.

        Raises: LimitExceeded where the target does not take a record; what this store raises.
        """
        checked = check_timeout(timeout)
        before = self.sent
        if isinstance(self.source, Stream):
            self._run_stream(self.source, checked)
        else:
            self._run_queue(self.source, checked)
        return self.sent - before

    def _run_stream(self, source: Stream, timeout: float | None) -> None:
        tries, idle = 0, 0.0
        look = LOOK_SECONDS if timeout is None else min(LOOK_SECONDS, timeout)
        with source.consumer(self.group, max_records=RECORDS, on_lost="raise") as consumer:
            while not self._stopping.is_set():
                batch = consumer.poll(look)
                if batch is None:
                    idle += look
                    if timeout is not None and idle >= timeout:
                        return
                    continue
                idle = 0.0
                # Only what survives a power cut: else another record could get its offset.
                last = Position(batch.partition, batch.epoch, batch.next_offset - 1)
                source.wait_durable(last)
                try:
                    self._send(batch)
                except (StorageError, WaitTimeout, Fenced) as error:  # fenced: others send it, too
                    consumer.rewind()
                    self._wait(tries, error)
                    tries += 1
                    continue
                tries, self.error = 0, ""
                self.sent += len(batch)
                with contextlib.suppress(Fenced):  # another relay has it, and sends it again
                    consumer.commit(batch)

    def _send(self, batch: Batch) -> None:
        forward(self._producer, batch)

    def _run_queue(self, source: Queue, timeout: float | None) -> None:
        tries = 0
        while not self._stopping.is_set():
            try:
                message = source.get(timeout=LOOK_SECONDS if timeout is None else timeout)
            except Empty:
                if timeout is None:
                    continue
                return
            try:
                named = f"{self._store_id}:{source.name}:{message.id}"
                headers = dict(message.headers)
                if not self._dedups:  # who reads it there can tell what came twice
                    headers[MESSAGE_ID] = named.encode()
                self._into.put(
                    message.data, key=message.key, headers=headers,
                    dedup_id=named if self._dedups else None, timeout=0,
                )  # fmt: skip
            except BaseException as error:
                with contextlib.suppress(LeaseLost):  # others have it
                    message.release()
                if not isinstance(error, (StorageError, WaitTimeout, QueueFull)):
                    raise
                self._wait(tries, error)
                tries += 1
                continue
            with contextlib.suppress(LeaseLost):  # it took long: others send it again
                message.ack()
            tries, self.error = 0, ""
            self.sent += 1

    def _wait(self, tries: int, error: Exception) -> None:
        self.error = str(error)
        self._stopping.wait(min(PAUSE_MOST, PAUSE_FIRST * 2.0 ** min(tries, 10)))

    # --- in the background ------------------------------------------------------------------------

    def start(self) -> Relay:
        """Run in a thread of its own until `stop`."""
        if self._thread is not None:
            raise Closed("the relay runs already")
        self._thread = threading.Thread(target=self._work, name="millstream-relay", daemon=True)
        _native.start(self._thread, self.topic)
        return self

    def _work(self) -> None:
        try:
            self.run()
        except MillstreamError as error:
            self._failed = error  # stop() raises it
            self.error = str(error)

    def end(self) -> None:
        """Have `run` end behind the batch that is under way; also from a signal handler."""
        self._stopping.set()

    def stop(self) -> None:
        """`end`, and wait for the one in the background.

        Raises: what ended that one before.
        """
        self.end()
        if self._thread is not None:
            _native.join(self._thread)
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Stop, and close the other store."""
        try:
            self.stop()
        finally:
            self._target.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def forward(producer: Any, batch: Batch) -> list[Span]:
    """Append the records of a batch as a producer, each with its offset as its sequence."""
    keys = list(batch.keys)
    headers = list(batch.headers)
    spans: list[Span] = producer.append_many(
        list(batch.values),
        sequences=batch.offsets.tolist(),
        keys=keys if any(key is not None for key in keys) else None,
        headers=headers if any(headers) else None,
        timestamps=batch.timestamps.tolist(),
        partition=batch.partition,
    )
    return spans


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Relay.__module__ = "millstream"
