"""The way back: a stream of another engine into one of this store, and nothing is doubled.

Each record is appended with its offset there as the sequence of a producer here, so that record and
position are in one batch: what was fetched before adds nothing, whoever was killed and when.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any, Protocol

from millstream import _native
from millstream.errors import (
    Closed,
    ConfigMismatch,
    InvalidType,
    MillstreamError,
    StorageError,
    WaitTimeout,
)
from millstream.options import check_timeout
from millstream.store.relay import LOOK_SECONDS, PAUSE_FIRST, PAUSE_MOST, forward
from millstream.streams.stream import Stream

if TYPE_CHECKING:
    from millstream._native import Batch

__all__ = ["Mirror"]


class Source(Protocol):
    """What a mirror needs of the other engine; every store is one."""

    def require(self, *names: str) -> None:
        """Raise Unsupported where it lacks one of these."""
        ...

    def stream(self, name: str, *, create: bool) -> Any:
        """Open a stream."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class Mirror:
    """Copies a stream of another engine into one of this store; made by `Store.mirror`.

    Partitions, keys, headers and timestamps are those of the source; offsets are this stream's own.
    A source that is away holds it up, and nothing else.

    Attributes:
        received: records that this mirror has appended.
        error: what the source said last, while it gives nothing; "" otherwise.
    """

    def __init__(self, source: Source, address: str, topic: str, into: Stream) -> None:
        self.into = into
        self.topic = topic
        self.received = 0
        self.error = ""
        self._source = source
        self._stopping = _native.Flag()
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        source.require("stream.start_at_offset")
        self._from = source.stream(topic, create=False)
        if self._from.partitions != into.partitions:
            raise ConfigMismatch(
                f"{self._from!r} has {self._from.partitions} partitions and {into!r}"
                f" {into.partitions}; make a stream with as many"
            )
        # A topic that was made anew under its name is another one, where the engine tells.
        identity = getattr(self._from, "id", None) or re.sub("//.*@", "//", address)
        digest = _native.xxh3_64(f"{identity} {topic}".encode())
        self._producer = into.producer(f"mirror-{topic}"[:100] + f"-{digest:016x}")
        self._next = {
            index: last + 1 if last >= 0 else None
            for index, last in enumerate(self._producer.last_sequences)
        }

    @staticmethod
    def check(into: object) -> None:
        """Raise InvalidType for what is no stream."""
        if not isinstance(into, Stream):
            raise InvalidType(f"into {into!r}: expected a Stream of this store")

    def __repr__(self) -> str:
        state = f": {self.error}" if self.error else ""
        return f"<Mirror of {self._from!r} into {self.into!r}{state}>"

    @property
    def lag(self) -> int:
        """Offsets of the source that are not here yet."""
        return sum(
            self._from.next_offset(index)
            - (self._from.first_offset(index) if following is None else following)
            for index, following in self._next.items()
        )

    def run(self, *, timeout: float | None = None) -> int:
        """Fetch until `stop`, or until nothing came for `timeout` seconds; how many were appended.

        Raises: OffsetOutOfRange where the source has removed what was not fetched yet, or ends
        before what was; what this store raises.
        """
        checked = check_timeout(timeout)
        before, tries, idle = self.received, 0, 0.0
        while not self._stopping.is_set():
            try:
                found = self._fetch()
            except (StorageError, WaitTimeout) as error:
                self.error = str(error)
                pause = min(PAUSE_MOST, PAUSE_FIRST * 2.0 ** min(tries, 10))
                tries += 1
                self._stopping.wait(pause)
                continue
            tries, self.error = 0, ""
            for batch in found:
                self._append(batch)
            if found:
                idle = 0.0
                continue
            if checked is not None and idle >= checked:
                break
            wait = LOOK_SECONDS if checked is None else min(LOOK_SECONDS, checked - idle)
            self._stopping.wait(wait)
            idle += wait
        return self.received - before

    def _fetch(self) -> list[Batch]:
        """Some batches of the partition that is furthest behind its turn; none: there are none."""
        for index in list(self._next):
            following = self._next.pop(index)
            self._next[index] = following  # its turn comes after the others
            start = "earliest" if following is None else following
            found = []
            for batch in self._from.read(partition=index, start=start):
                found.append(batch)
                if len(found) == 16:
                    break
            if found:
                return found
        return []

    def _append(self, batch: Batch) -> None:
        self.received += sum(span.count for span in forward(self._producer, batch))
        self._next[int(batch.partition)] = int(batch.next_offset)

    # --- in the background ------------------------------------------------------------------------

    def start(self) -> Mirror:
        """Run in a thread of its own until `stop`."""
        if self._thread is not None:
            raise Closed("the mirror runs already")
        self._thread = threading.Thread(target=self._work, name="millstream-mirror", daemon=True)
        _native.start(self._thread, self.topic)
        return self

    def _work(self) -> None:
        try:
            self.run()
        except MillstreamError as error:
            self._failed = error  # stop() raises it
            self.error = str(error)

    def end(self) -> None:
        """Have `run` end behind the batches that are under way; also from a signal handler."""
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
            self._source.close()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Mirror.__module__ = "millstream"
