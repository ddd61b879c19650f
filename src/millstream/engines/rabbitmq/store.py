"""The streams and queues of one RabbitMQ server."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from pika import exceptions as amqp_errors
from rstream.exceptions import ServerError, StreamAlreadyExists, StreamDoesNotExist

from millstream.engines.groups import Conflict
from millstream.engines.rabbitmq import capabilities
from millstream.engines.rabbitmq.connection import RabbitConnection
from millstream.engines.rabbitmq.queues import RabbitQueue, arguments_of
from millstream.engines.rabbitmq.streams import RabbitStream
from millstream.engines.rabbitmq.table import Table
from millstream.engines.store import ServerStore
from millstream.errors import (
    ConfigMismatch,
    InvalidArgument,
    InvalidType,
    MillstreamError,
    NotFound,
    Unsupported,
)
from millstream.options import DURABILITIES, Retention, RetryPolicy, integer, number

if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Literal

    from millstream.options import Compaction, Durability

    OnMismatch = Literal["raise", "alter", "keep"]

__all__ = ["RabbitStore"]

PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
SETTINGS = "millstream.settings"
PARTITIONS_MOST = 256
SETTLE_SECONDS = 2.0
"""A server that is killed within a second behind a declaration starts with that queue empty,
whatever it has confirmed: nobody puts into a new queue before."""


class RabbitStore(ServerStore):
    """Streams and queues of a RabbitMQ server; made by `millstream.open`.

    Thread-safe. After a fork the child must open it again.
    """

    connection: RabbitConnection

    _closed = True
    """Until it is open."""

    def __init__(
        self,
        address: str,
        *,
        durability: Durability | None = None,
        mode: str = "rw",
        timeout: float | None = None,
    ) -> None:
        self.connection = RabbitConnection(address, timeout)
        self._capabilities = capabilities.of(self.connection.version)
        self.path = self.connection.address.shown
        self.writable = mode == "rw"
        self.durability: Durability = "process"
        self._default = durability
        self._tables: dict[str, Table] = {}
        self._stored = self.table(SETTINGS)
        try:
            if durability is not None:
                self.durability = self.level(durability)
            if self.writable:
                self.connection.call(self._stored.make())
            self.settings()
        except BaseException:
            self.connection.close()
            raise
        self._closed = False

    def __repr__(self) -> str:
        return f"<RabbitStore {self.path!r}{' (closed)' if self._closed else ''}>"

    @property
    def native(self) -> Any:
        """The connection of pika, an `AsyncioConnection`; what it does belongs on `loop`."""
        return self.connection.amqp

    @property
    def loop(self) -> Any:
        """The event loop of the clients, which runs in a thread: `run_coroutine_threadsafe`."""
        return self.connection.loop

    def level(self, durability: object, kind: str = "") -> Durability:
        """Check a level that a caller named against what streams, or queues, can do."""
        if durability not in DURABILITIES:
            raise InvalidArgument(
                f"durability {durability!r}: expected one of {', '.join(DURABILITIES)}"
            )
        if kind == "stream" and durability != "process":
            raise Unsupported(
                capability=f"durability.{durability}",
                engine=self.engine,
                instead="the server never syncs a stream, whatever is set; a queue is synced, and"
                " so is a stream of a directory, with a relay to this one",
            )
        found: Durability = durability
        return found

    def _name(self, kind: str, name: object) -> str:
        if not isinstance(name, str):
            raise InvalidType(f"name {name!r}: expected str")
        if not PLAIN_NAME.fullmatch(name):
            raise InvalidArgument(
                f"{kind} {name!r:.80}: {self.engine} takes 1 to 128 characters of A-Z a-z 0-9 _ -"
                " (behind a . are the partitions of a stream, and the dead letters of a queue)"
            )
        return name

    def table(self, stream: str) -> Table:
        """The table in a stream of the server; one for all who use it here."""
        return self._tables.setdefault(stream, Table(self.connection, stream))

    # --- what there is ----------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The settings of all that millstream made there, by kind and name."""
        self.connection.check_open()
        self.connection.call(self._stored.refresh())
        return self._stored.content

    def _store(self, key: str, settings: dict[str, Any] | None) -> None:
        """Keep settings, or None to forget them; somebody else's that came first stay."""
        expected = 0 if settings is not None else None
        try:
            self.connection.call(self._stored.store(key, settings, expected))
        except Conflict:
            return

    def _names(self, kind: str) -> list[str]:
        keys = [key.partition(".") for key in self.settings()]
        return sorted(name for first, _, name in keys if first == kind)

    # --- streams ----------------------------------------------------------------------------------

    def stream(
        self,
        name: str,
        *,
        partitions: int | None = None,
        retention: Retention | None = None,
        durability: Durability | None = None,
        compact: Compaction | None = None,
        create: bool | None = None,
        on_mismatch: OnMismatch = "raise",
        emulate: Collection[str] = (),
    ) -> RabbitStream:
        """Open a stream, creating it where it is not there; see `millstream.Store.stream`."""
        self.connection.check_open()
        consent = self._capabilities.consent("stream", emulate)
        name = self._name("stream", name)
        if compact is not None:
            raise self._capabilities.refusal("stream.compaction")
        if partitions is not None:
            partitions = integer("partitions", partitions, 1, PARTITIONS_MOST)
        if retention is not None and not isinstance(retention, Retention):
            raise InvalidType(f"retention {retention!r}: expected a millstream.Retention or None")
        if retention is not None and retention.records is not None:
            raise Unsupported(
                capability="stream.retention", engine=self.engine,
                instead="a retention by age or bytes: the server knows none by records",
            )  # fmt: skip
        level = self.level(durability or self._default or "process", "stream")
        known = self.settings().get(f"stream.{name}")
        if known is None:
            if create is False or not self.writable:
                raise NotFound(f"{self.path}: there is no stream {name!r}")
            self._make_stream(name, partitions or 1, retention or Retention())
            known = self.settings()[f"stream.{name}"]
        named: dict[str, Any] = {"partitions": partitions}
        if retention is not None:
            named["retention"] = retention.as_dict()
        self._compare("stream", name, known, named, on_mismatch)
        return RabbitStream(self, name, known, level, consent)

    def _make_stream(self, name: str, partitions: int, retention: Retention) -> None:
        arguments: dict[str, Any] = {}
        if retention.age is not None:
            arguments["max-age"] = f"{max(1, int(retention.age))}s"
        if retention.bytes is not None:
            arguments["max-length-bytes"] = retention.bytes
            arguments["stream-max-segment-size-bytes"] = max(1 << 16, retention.bytes // 4)
        parts = [f"{name}.{index}" for index in range(partitions)]

        async def make() -> None:
            wire = await self.connection.wire()
            keys = [str(index) for index in range(partitions)]
            await wire.create_super_stream(name, parts, keys, arguments)

        try:
            self.connection.call(make())
        except Exception as error:
            if getattr(error, "code", None) != StreamAlreadyExists.code:
                raise
            if f"stream.{name}" in self.settings():  # somebody else was faster
                return
            raise ConfigMismatch(
                f"{self.path}: there is an exchange or a stream {name!r} that millstream did not"
                " make; take another name, or use it with `native`"
            ) from error
        self._store(f"stream.{name}", {"partitions": partitions, "retention": retention.as_dict()})

    def streams(self) -> list[str]:
        """Names of the streams that millstream made there, sorted."""
        return self._names("stream")

    def drop_stream(self, name: str) -> None:
        """Remove a stream and all its records, and its groups."""
        self.check_writable()
        if f"stream.{self._name('stream', name)}" not in self.settings():
            raise NotFound(f"{self.path}: there is no stream {name!r}")

        async def remove() -> None:
            wire = await self.connection.wire()
            for work in (wire.delete_super_stream(name), wire.delete_stream(groups_of(name))):
                try:
                    await work
                except ServerError as error:
                    if error.code != StreamDoesNotExist.code:
                        raise

        self.connection.call(remove())
        self._store(f"stream.{name}", None)

    # --- queues -----------------------------------------------------------------------------------

    def queue(
        self,
        name: str,
        *,
        capacity: int | None = None,
        priorities: int | None = None,
        lease: float | None = None,
        ordering: Literal["key"] | None = None,
        retry: RetryPolicy | None = None,
        ttl: float | None = None,
        dedup_window: float | None = None,
        codec: object = None,
        durability: Durability | None = None,
        create: bool | None = None,
        on_mismatch: OnMismatch = "raise",
        emulate: Collection[str] = (),
    ) -> RabbitQueue:
        """Open a queue, creating it where it is not there; see `millstream.Store.queue`."""
        self.connection.check_open()
        self._capabilities.consent("queue", emulate)
        name = self._name("queue", name)
        if ordering is not None:
            raise self._capabilities.refusal("queue.key_order")
        if capacity is not None:
            raise self._capabilities.refusal("queue.capacity")
        if dedup_window is not None:
            raise self._capabilities.refusal("queue.dedup")
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise InvalidType(f"retry {retry!r}: expected a millstream.RetryPolicy")
        most = capabilities.PRIORITIES
        named: dict[str, Any] = {
            "priorities": None
            if priorities is None
            else integer("priorities", priorities, 1, most),
            "lease": None if lease is None else number("lease", lease, 0.001, 30 * 86400.0),
            "retry": None if retry is None else retry.as_dict(),
            "ttl": None if ttl is None else number("ttl", ttl, 0.001, 49 * 86400.0),
        }
        level = self.level(durability or self._default or "sync")
        known = self.settings().get(f"queue.{name}")
        if known is None:
            if create is False or not self.writable:
                raise NotFound(f"{self.path}: there is no queue {name!r}")
            self._make_queue(name, named)
            known = self.settings()[f"queue.{name}"]
        self._compare("queue", name, known, named, on_mismatch)
        return RabbitQueue(self, name, known, level, codec)

    def _make_queue(self, name: str, named: dict[str, Any]) -> None:
        defaults = {"priorities": 4, "lease": 30.0, "retry": RetryPolicy().as_dict()}
        settings = {
            field: defaults.get(field) if value is None else value for field, value in named.items()
        }
        dead = {"x-queue-type": "quorum", "x-delivery-limit": -1}

        async def make() -> None:
            for queue, arguments in (
                (f"{name}.dead", dead), (name, arguments_of(name, settings)),
            ):  # fmt: skip
                channel = await self.connection.channel()
                await channel.ask("queue_declare", queue=queue, durable=True, arguments=arguments)
                self.connection.keep(channel)

        async def there() -> bool:
            channel = await self.connection.channel()
            try:
                await channel.ask("queue_declare", queue=name, passive=True)
            except amqp_errors.ChannelClosedByBroker:
                return False
            self.connection.keep(channel)
            return True

        foreign = ConfigMismatch(
            f"{self.path}: there is a queue {name!r} that millstream did not make, or with other"
            " settings; take another name, or use it with `native`"
        )
        if self.connection.call(there()) and f"queue.{name}" not in self.settings():
            raise foreign
        try:
            self.connection.call(make())
        except MillstreamError as error:
            if "PRECONDITION" not in str(error) or f"queue.{name}" in self.settings():
                raise
            raise foreign from error
        time.sleep(SETTLE_SECONDS)
        self._store(f"queue.{name}", settings)

    def queues(self) -> list[str]:
        """Names of the queues that millstream made there, sorted."""
        return self._names("queue")

    def drop_queue(self, name: str) -> None:
        """Remove a queue, all its messages and its dead letters."""
        self.check_writable()
        if f"queue.{self._name('queue', name)}" not in self.settings():
            raise NotFound(f"{self.path}: there is no queue {name!r}")

        async def remove() -> None:
            channel = await self.connection.channel()
            for queue in (name, f"{name}.dead"):
                await channel.ask("queue_delete", queue=queue)
            self.connection.keep(channel)

        self.connection.call(remove())
        self._store(f"queue.{name}", None)

    needs_recovery = False
    """The server recovers by itself."""

    def transaction(self, **_: object) -> Any:
        """Raise Unsupported: RabbitMQ has none over several streams."""
        raise self._capabilities.refusal("stream.transaction")

    # --- the end ----------------------------------------------------------------------------------


def groups_of(stream: str) -> str:
    """The stream that holds the groups of a stream."""
    return f"millstream.groups.{stream}"
