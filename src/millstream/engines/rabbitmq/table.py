"""Small records that change by compare-and-set, held in a stream of RabbitMQ.

Each change names the version that it replaces, and the order of the stream decides: all who read it
drop the same changes, those whose version was another one by then. The version of a record is the
offset of its last change, plus one. A snapshot that no change came before is a new beginning, so
that the stream may lose its oldest part.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING, Any

from rstream.exceptions import ServerError, StreamAlreadyExists, StreamDoesNotExist

from millstream.engines.groups import Conflict
from millstream.engines.rabbitmq import records
from millstream.engines.rabbitmq.wire import Cursor

if TYPE_CHECKING:
    from millstream.engines.rabbitmq.connection import RabbitConnection
    from millstream.engines.rabbitmq.wire import Wire

SNAPSHOT_RECORDS = 2000
KEPT = {"max-length-bytes": 16 << 20, "stream-max-segment-size-bytes": 2 << 20}
LOOK_SECONDS = 5.0


class Table:
    """The records of one stream. Its coroutines belong on the loop of the connection."""

    def __init__(self, connection: RabbitConnection, stream: str) -> None:
        self._connection = connection
        self.stream = stream
        self.content: dict[str, Any] = {}
        self.version: dict[str, int] = {}
        self.time: dict[str, int] = {}
        """When each was changed last, by the server's clock; milliseconds."""
        self.now = 0
        """The server's clock at the last change that was read."""
        self._heard = 0.0
        self._next = 0
        self._last = -1
        self._since = 0
        self._tag = os.urandom(8)
        self._sent = 0
        self._lock = asyncio.Lock()

    async def make(self) -> None:
        """Make the stream, where it is not there."""
        wire = await self._connection.wire()
        try:
            await wire.create_stream(self.stream, KEPT)
        except StreamAlreadyExists:
            return
        except ServerError as error:
            if not isinstance(error, type) and error.code == StreamAlreadyExists.code:
                return
            raise

    def _forget(self) -> None:
        self.content.clear()
        self.version.clear()
        self.time.clear()
        self._last = -1

    def clock(self) -> float:
        """The server's clock, as well as it is known; milliseconds."""
        return self.now + (time.monotonic() - self._heard) * 1000

    async def refresh(self) -> None:
        """Read what was changed since the last time; nothing where there is no such stream."""
        async with self._lock:
            await self._read(await self._connection.wire(), b"")

    async def _read(self, wire: Wire, tag: bytes) -> bool | None:
        """Apply all up to the end; did the change with this tag hold?"""
        try:
            first, end = await wire.bounds(self.stream)
        except StreamDoesNotExist:
            self._forget()
            self._next = 0
            return None
        if first > self._next or end < self._next:
            self._forget()
            self._next = first
        held: bool | None = None
        if self._next >= end:
            return held
        known = self._next == 0 or bool(self.version) or self._last >= 0
        cursor = Cursor(wire, self.stream)
        await cursor.begin(self._next)
        try:
            while self._next < end:
                chunk = await cursor.chunk(LOOK_SECONDS)
                if chunk is None:
                    break
                if chunk.time > self.now:
                    self.now, self._heard = chunk.time, time.monotonic()
                for number, data in enumerate(chunk.messages()):
                    offset = chunk.first + number
                    if offset < self._next:
                        continue
                    one = records.Stored(offset, chunk.time, data)
                    change = json.loads(one.body)
                    if "all" in change:
                        if not known and change["behind"] == self._last:
                            self._begin(change, chunk.time)
                            known = True
                        self._since = 0
                    else:
                        done = self._apply(offset, chunk.time, change)
                        if one.tag and one.tag == tag:
                            held = done
                    self._last = offset
                self._next = max(self._next, chunk.first + chunk.count)
        finally:
            await cursor.close()
        return held

    def _apply(self, offset: int, at: int, change: dict[str, Any]) -> bool:
        self._since += 1
        key, expected = change["key"], change["expected"]
        if expected is not None and expected != self.version.get(key, 0):
            return False
        self.time[key] = at
        self.version[key] = offset + 1
        self.content[key] = change["content"]
        if change["content"] is None:
            for known in (self.time, self.version, self.content):
                del known[key]
        return True

    def _begin(self, change: dict[str, Any], at: int) -> None:
        self._forget()
        for key, (version, content) in change["all"].items():
            self.version[key], self.content[key], self.time[key] = version, content, at

    async def store(self, key: str, content: Any, expected: int | None) -> int:
        """Change a record whose version is `expected` (0: there is none; None: whatever it is).

        Args:
            key: its name.
            content: what JSON can hold; None removes it.
            expected: its version.

        Returns: the new version.

        Raises: Conflict.
        """
        async with self._lock:
            self._sent += 1
            tag = self._tag + self._sent.to_bytes(4, "big")
            change = {"key": key, "expected": expected, "content": content}
            wire = await self._connection.wire()
            await self._send(wire, change, tag)
            held = await self._read(wire, tag)
            if not held:
                raise Conflict(key)
            if self._since > SNAPSHOT_RECORDS:
                known = {key: [self.version[key], self.content[key]] for key in self.version}
                await self._send(wire, {"all": known, "behind": self._last}, b"")
                await self._read(wire, b"")
            return self.version.get(key, 0)

    async def _send(self, wire: Wire, change: dict[str, Any], tag: bytes) -> None:
        outlet = await wire.outlet(self.stream, "")
        body = json.dumps(change, sort_keys=True).encode()
        await outlet.send([records.encoded(body, None, None, None, tag)])
