"""The client of RabbitMQ's stream protocol: rstream's, with what it lacks.

rstream hands each chunk to every subscriber, reads 256 bytes at a time, and does not know the
command that tells how long a stream is; so frames are read here, and all else is rstream's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING, Any

from rstream import schema
from rstream.client import Client
from rstream.connection import Connection, ConnectionClosed
from rstream.constants import Key, OffsetType
from rstream.encoding import decode_frame
from rstream.exceptions import ServerError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

READ_BYTES = 1 << 18
FRAME_MOST = 1 << 20
HEARTBEAT_SECONDS = 60
DELIVER, STATS, STATS_ANSWER = Key.Deliver.value, 28, 0x8000 | 28
CLOSE_SECONDS = 1.0
CREDIT = 16
PUBLISHERS_MOST = 200
BATCH_ENTRY = 0x80


class Wire(Client):  # type: ignore[misc]
    """One connection."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        super().__init__(
            host,
            port,
            ssl_context=tls,
            frame_max=FRAME_MOST,
            heartbeat=HEARTBEAT_SECONDS,
            connection_name="millstream",
        )
        self.cursors: dict[int, Cursor] = {}
        self._numbers = itertools.count(1)
        self._publishers: dict[tuple[str, str], Outlet] = {}
        self._ended = asyncio.Event()

    async def begin(self, vhost: str, user: str, password: str) -> None:
        """Connect."""
        self._conn = _Socket(self.host, self.port, self._ssl_context)
        await self._conn.open()
        self.start_task("listener", self._listener())
        await self.authenticate(vhost, user, password)

    async def _listener(self) -> None:
        assert isinstance(self._conn, _Socket)
        try:
            while True:
                data = await self._conn._read_frame_raw()
                kind = int.from_bytes(data[:2], "big")
                if kind == DELIVER:
                    cursor = self.cursors.get(data[4])
                    if cursor is not None:
                        cursor.take(Chunk(data))
                    continue
                if kind == STATS_ANSWER:
                    self._answer((STATS, int.from_bytes(data[4:8], "big")), data)
                    continue
                frame = decode_frame(data)
                if isinstance(frame, schema.PublishConfirm | schema.PublishError):
                    self._confirm(frame)
                elif isinstance(frame, schema.MetadataUpdate):
                    self._gone(frame.metadata_info.stream)
                elif isinstance(frame, schema.Close):
                    return
                else:
                    self._answer((frame.key, frame.corr_id), frame)
        except (ConnectionClosed, OSError, ValueError):
            return
        finally:
            self._is_not_closed = False
            self._fail(ConnectionError("the connection of streams was lost"))
            for name in set(self._tasks) - {"listener"}:
                self._tasks.pop(name).cancel()
            if self._conn._writer is not None:
                self._conn._writer.close()

    def _answer(self, key: Any, found: Any) -> None:
        future = self._waiters.get(key)
        if future is not None and not future.done():
            future.set_result(found)

    def _confirm(self, frame: Any) -> None:
        for outlet in self._publishers.values():
            if outlet.id == frame.publisher_id:
                outlet.answered(frame)

    def _gone(self, stream: str) -> None:
        """Forget what belongs to a stream that was removed."""
        error = ServerError(f"stream {stream} was removed")
        for key in [key for key in self._publishers if key[0] == stream]:
            self._publishers.pop(key).fail(error)
        for cursor in [one for one in self.cursors.values() if one.stream == stream]:
            cursor.end(error)

    def _fail(self, error: Exception) -> None:
        for future in list(self._waiters.values()):
            if not future.done():
                future.set_exception(error)
        for outlet in self._publishers.values():
            outlet.fail(error)
        for cursor in list(self.cursors.values()):
            cursor.end(error)

    async def _heartbeat_sender(self) -> None:
        while self._heartbeat and self.is_connection_alive():
            await self.send_frame(schema.Heartbeat())
            await asyncio.sleep(self._heartbeat / 2)

    async def close(self) -> None:
        """Close it; nothing is awaited of the server."""
        self._is_not_closed = False
        for name in list(self._tasks):
            await self.stop_task(name)
        if self._conn is not None:
            with contextlib.suppress(OSError, TimeoutError):  # it is closed all the same
                if (writer := self._conn._writer) is not None:
                    writer.close()
                    await asyncio.wait_for(writer.wait_closed(), CLOSE_SECONDS)

    # --- streams ----------------------------------------------------------------------------------

    async def bounds(self, stream: str) -> tuple[int, int]:
        """Offset of the oldest record, and the one that the next will get.

        Raises: StreamDoesNotExist.
        """
        number = self._corr_id_seq.next()
        name = stream.encode()
        body = b"".join(
            (STATS.to_bytes(2, "big"), b"\0\1", number.to_bytes(4, "big"),
             len(name).to_bytes(2, "big"), name)
        )  # fmt: skip
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        key: Any = STATS, number
        self._waiters[key] = future
        future.add_done_callback(lambda _: self._waiters.pop(key, None))
        assert self._conn is not None
        await self._conn._write_frame_raw(len(body).to_bytes(4, "big") + body)
        data = await asyncio.wait_for(future, 10)
        code = int.from_bytes(data[8:10], "big")
        if code != 1:
            raise ServerError.from_code(code)(f"stream {stream}")
        found, at = {}, 14
        for _ in range(int.from_bytes(data[10:14], "big")):
            size = int.from_bytes(data[at : at + 2], "big")
            at += 2 + size
            value = int.from_bytes(data[at : at + 8], "big", signed=True)
            found[bytes(data[at - size : at])] = value
            at += 8
        return max(0, found[b"first_chunk_id"]), found[b"committed_offset"] + 1

    async def outlet(self, stream: str, reference: str) -> Outlet:
        """A publisher of a stream, with a durable name or "" for none."""
        found = self._publishers.pop((stream, reference), None)
        if found is None:
            while len(self._publishers) >= PUBLISHERS_MOST:
                key = next(iter(self._publishers))  # the one that was not used for longest
                await self.delete_publisher(self._publishers.pop(key).id)
            used = {one.id for one in self._publishers.values()}
            found = Outlet(self, next(one for one in range(256) if one not in used))
            self._publishers[stream, reference] = found
            try:
                await self.declare_publisher(stream, reference, found.id)
            except BaseException:
                self._publishers.pop((stream, reference), None)
                raise
        self._publishers[stream, reference] = found
        return found


class _Socket(Connection):  # type: ignore[misc]
    """rstream's connection, which reads more at a time."""

    async def _read(self, n: int) -> bytearray:
        assert self._reader is not None
        while len(self._buffer) < n:
            found = await self._reader.read(READ_BYTES)
            if not found:
                raise ConnectionClosed
            self._buffer += found
        data: bytearray = self._buffer[:n]
        del self._buffer[:n]
        return data


class Outlet:
    """A publisher; what it sends is confirmed by its publishing id."""

    def __init__(self, wire: Wire, id: int) -> None:
        self._wire = wire
        self.id = id
        self._numbers = itertools.count(1)
        self._open: dict[int, list[asyncio.Future[None]]] = {}

    def answered(self, frame: Any) -> None:
        """Take up confirms and errors."""
        if isinstance(frame, schema.PublishConfirm):
            for number in frame.publishing_ids:
                for future in self._open.pop(number, ()):
                    if not future.done():
                        future.set_result(None)
            return
        for one in frame.errors:
            error = ServerError.from_code(one.response_code)("the server refused a record")
            for future in self._open.pop(one.publishing_id, ()):
                if not future.done():
                    future.set_exception(error)

    def fail(self, error: Exception) -> None:
        """Nothing more is confirmed."""
        for futures in self._open.values():
            for future in futures:
                if not future.done():
                    future.set_exception(error)
        self._open.clear()

    def _await(self, number: int) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open.setdefault(number, []).append(future)
        return future

    async def send(self, messages: Sequence[bytes]) -> None:
        """Store messages as one entry, which is there whole or not at all, and await that."""
        number = next(self._numbers)
        done = self._await(number)
        if len(messages) == 1:
            frame: Any = schema.Publish(self.id, [schema.Message(number, None, messages[0])])
        else:
            body = b"".join(b"".join((len(one).to_bytes(4, "big"), one)) for one in messages)
            frame = schema.PublishSubBatching(
                self.id, 1, number, BATCH_ENTRY, len(messages), len(body), len(body), body
            )
        await self._wire.send_frame(frame)
        await asyncio.wait_for(done, 10)

    async def send_numbered(self, messages: Sequence[tuple[int, bytes]]) -> None:
        """Store messages under publishing ids, and await that; what has one already is dropped."""
        waiting = []
        part: list[Any] = []
        size = 0
        for number, data in messages:
            waiting.append(self._await(number))
            if size + len(data) + 12 > FRAME_MOST - 64:
                await self._wire.send_publish_frame(schema.Publish(self.id, part))
                part, size = [], 0
            part.append(schema.Message(number, None, data))
            size += len(data) + 12
        await self._wire.send_publish_frame(schema.Publish(self.id, part))
        await asyncio.wait_for(asyncio.gather(*waiting), 10)


class Chunk:
    """Some records that were stored together."""

    __slots__ = ("_data", "count", "first", "time")

    def __init__(self, data: bytearray) -> None:
        self.time = int.from_bytes(data[13:21], "big")
        """When it was stored; milliseconds."""
        self.first = int.from_bytes(data[29:37], "big")
        self.count = int.from_bytes(data[9:13], "big")
        self._data = data

    def messages(self) -> list[bytes]:
        """Its records, encoded."""
        data = memoryview(self._data)
        found: list[bytes] = []
        at = 53
        for _ in range(int.from_bytes(data[7:9], "big")):
            if data[at] < BATCH_ENTRY:
                size = int.from_bytes(data[at : at + 4], "big")
                at += 4 + size
                found.append(bytes(data[at - size : at]))
                continue
            raw: Any = self._data
            messages, size = schema.SubEntryChunk.read(raw, data[at], at + 1)
            found += map(bytes, messages)
            at += 1 + size
        return found


class Cursor:
    """A subscription from an offset on."""

    def __init__(self, wire: Wire, stream: str) -> None:
        self._wire = wire
        self.stream = stream
        self._chunks: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        self._id = -1
        self.ended: Exception | None = None

    async def begin(self, offset: int) -> None:
        """Subscribe."""
        used = self._wire.cursors
        self._id = next(one for one in range(256) if one not in used)
        used[self._id] = self
        try:
            await self._wire.subscribe(
                self.stream,
                self._id,
                schema.OffsetSpec.from_params(OffsetType.OFFSET, offset),
                initial_credit=CREDIT,
            )
        except BaseException:
            used.pop(self._id, None)
            raise

    def take(self, chunk: Chunk) -> None:
        """Keep a chunk."""
        self._chunks.put_nowait(chunk)

    def end(self, error: Exception) -> None:
        """Nothing more comes."""
        self.ended = error
        self._chunks.put_nowait(error)

    def ready(self) -> bool:
        """Is there a chunk?"""
        return not self._chunks.empty()

    async def chunk(self, seconds: float) -> Chunk | None:
        """The next one, or None where none came in time."""
        if self._chunks.empty():
            if self.ended is not None:
                raise self.ended
            if seconds <= 0:
                return None
            try:
                found = await asyncio.wait_for(self._chunks.get(), seconds)
            except TimeoutError:
                return None
        else:
            found = self._chunks.get_nowait()
        if isinstance(found, Exception):
            raise found
        await self._wire.credit(self._id, 1)
        return found

    async def close(self) -> None:
        """Unsubscribe."""
        if self._wire.cursors.get(self._id) is self:
            if self.ended is None and self._wire.is_connection_alive():
                with contextlib.suppress(ServerError, TimeoutError, OSError):  # it is gone
                    await self._wire.unsubscribe(self._id)
            self._wire.cursors.pop(self._id, None)
