"""The streams of one Kafka cluster."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import ConfigResource, NewTopic, ResourceType

from millstream import StoreStats
from millstream.engines.kafka import capabilities
from millstream.engines.kafka.connection import STEP_SECONDS, UNKNOWN, KafkaConnection
from millstream.engines.kafka.streams import KafkaStream
from millstream.engines.store import ServerStore
from millstream.errors import (
    ConfigMismatch,
    InvalidArgument,
    InvalidType,
    NotFound,
    StorageError,
    Unsupported,
)
from millstream.options import Compaction, Retention, integer

if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Literal, NoReturn

    from millstream.engines.kafka.transactions import KafkaTransaction
    from millstream.options import Durability

    OnMismatch = Literal["raise", "alter", "keep"]

__all__ = ["KafkaStore"]

NAME = re.compile(r"(?!\.{1,2}$)(?!__)[A-Za-z0-9._-]{1,200}")
POSITIONS = "__millstream."
"""Before the name of a stream: the topic that says how far its producers are."""
MOST_PARTITIONS = 1000
ALWAYS = str((1 << 63) - 1)
ALTERED = {"retention.ms", "retention.bytes"}


class KafkaStore(ServerStore):
    """The streams of a Kafka cluster; made by `millstream.open`.

    Thread-safe. After a fork the child must open it again.
    """

    connection: KafkaConnection

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
        self.connection = KafkaConnection(address, timeout)
        self._capabilities = capabilities.of(self.connection.version)
        self.path = self.connection.address.shown
        self.writable = mode == "rw"
        self.durability: Durability = "process"
        try:
            if durability is not None:
                self.durability = self.level(durability)
        except BaseException:
            self.connection.close()
            raise
        self._transacting: list[Any] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<KafkaStore {self.path!r}{' (closed)' if self._closed else ''}>"

    @property
    def native(self) -> Any:
        """The `AdminClient` of confluent-kafka; `native_settings` are for a client of your own."""
        return self.connection.admin

    @property
    def native_settings(self) -> dict[str, Any]:
        """What a client of confluent-kafka needs to connect as this store does."""
        return dict(self.connection.settings)

    def _name(self, name: object) -> str:
        if not isinstance(name, str):
            raise InvalidType(f"name {name!r}: expected str")
        if not NAME.fullmatch(name):
            raise InvalidArgument(
                f"stream {name!r:.80}: {self.engine} takes 1 to 200 characters of A-Z a-z 0-9 . _ -"
                " and neither . nor .. nor a __ before it, which topics of Kafka's own have"
            )
        return name

    # --- topics -----------------------------------------------------------------------------------

    def config_of(self, name: str) -> dict[str, str]:
        """The settings of a topic."""
        resource = ConfigResource(ResourceType.TOPIC, name)
        request = partial(self.connection.admin.describe_configs, [resource])
        [found] = self.connection.ask(request, f"stream {name!r}").values()
        return {key: entry.value for key, entry in found.items() if entry.value is not None}

    def make_topic(self, name: str, partitions: int, config: dict[str, str]) -> None:
        """Make a topic, with as many replicas as the cluster says; one that is there is left."""
        admin, what = self.connection.admin, f"stream {name!r}"
        new = NewTopic(name, partitions, -1, config=config)
        futures = self.connection.call(
            lambda: admin.create_topics([new], request_timeout=self.connection.timeout), what
        )
        try:
            futures[name].result(self.connection.timeout + 5)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise self.connection.error_of(error.args[0], what) from error
        self.await_topic(name, partitions)

    def await_topic(self, name: str, partitions: int) -> None:
        """Return when all brokers' answers have it, with a leader of each partition."""
        end = time.monotonic() + self.connection.timeout
        while True:
            found = self.connection.topics(name=name).get(name)
            led = [one for one in found.partitions.values() if one.leader >= 0] if found else []
            if len(led) >= partitions:
                return
            if time.monotonic() > end:
                raise StorageError(5, f"stream {name!r}: a partition has no leader", self.path)
            time.sleep(STEP_SECONDS / 4)

    def positions_topic(self, stream: KafkaStream) -> str:
        """The topic that says how far the producers of a stream are, with its partitions."""
        name = POSITIONS + stream.name
        found = self.connection.topics(name=name).get(name)
        if found is None:
            config = {"cleanup.policy": "compact", "segment.bytes": str(16 << 20),
                      "segment.ms": "86400000"}  # fmt: skip
            self.make_topic(name, stream.partitions, config)
        elif len(found.partitions) < stream.partitions:
            with_more = KafkaStream(self, name, len(found.partitions), {}, "process")
            with_more.add_partitions(stream.partitions - len(found.partitions))
        return name

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
    ) -> KafkaStream:
        """Open a topic, creating it where it is not there; see `millstream.Store.stream`.

        A topic of ours keeps what it gets, unless `retention` or `compact` say otherwise; with
        durability "sync" it has ``flush.messages=1``. A topic that is there stays as it is;
        ``on_mismatch="alter"`` changes its retention.
        """
        self.connection.check_open()
        self._capabilities.consent("stream", emulate)
        name = self._name(name)
        if partitions is not None:
            partitions = integer("partitions", partitions, 1, MOST_PARTITIONS)
        if retention is not None and not isinstance(retention, Retention):
            raise InvalidType(f"retention {retention!r}: expected a millstream.Retention or None")
        if compact is not None and not isinstance(compact, Compaction):
            raise InvalidType(f"compact {compact!r}: expected a millstream.Compaction or None")
        if retention is not None and retention.records is not None:
            raise Unsupported(
                capability="stream.retention",
                engine=self.engine,
                instead="Kafka counts no records: bound age or bytes",
            )
        if on_mismatch not in ("raise", "alter", "keep"):
            raise InvalidArgument(
                f'on_mismatch {on_mismatch!r}: expected "raise", "alter" or "keep"'
            )
        level = self.durability if durability is None else self.level(durability)
        found = self.connection.topics(name=name).get(name)
        named = _settings(retention, compact)
        if found is None:
            if create is False or not self.writable:
                raise NotFound(f"{self.path}: there is no stream {name!r}")
            self.make_topic(name, partitions or 1, _whole(named, level))
            found = self.connection.topics(name=name)[name]
        config = self.config_of(name)
        there = len(found.partitions)
        if on_mismatch != "keep":
            self._compare_topic(name, there, partitions, config, named, on_mismatch == "alter")
        return KafkaStream(self, name, there, config, level)

    def _compare_topic(
        self,
        name: str,
        there: int,
        partitions: int | None,
        config: dict[str, str],
        named: dict[str, str],
        alter: bool,
    ) -> None:
        if partitions is not None and partitions != there:
            raise ConfigMismatch(
                f"{self.path}: stream {name!r} has partitions {there}, not {partitions}; leave it"
                ' out, open with on_mismatch="keep", or call add_partitions'
            )
        other = {key: value for key, value in named.items() if config.get(key) != value}
        if alter and other and set(other) <= ALTERED:
            self._alter(name, other)
            config.update(other)
            return
        for key, value in other.items():
            raise ConfigMismatch(
                f"{self.path}: the topic of stream {name!r} has {key}={config.get(key)}, not"
                f' {value}; leave it out, open with on_mismatch="keep", or alter the topic'
            )

    def _alter(self, name: str, changed: dict[str, str]) -> None:
        from confluent_kafka.admin import AlterConfigOpType, ConfigEntry

        self.check_writable()
        entries = [
            ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
            for key, value in changed.items()
        ]
        resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)
        request = partial(self.connection.admin.incremental_alter_configs, [resource])
        self.connection.ask(request, f"stream {name!r}")

    def streams(self) -> list[str]:
        """Names of the topics, sorted; not those of Kafka's own and ours, which begin with __."""
        self.connection.check_open()
        return sorted(name for name in self.connection.topics() if not name.startswith("__"))

    def drop_stream(self, name: str) -> None:
        """Remove a topic and all its records; positions of groups in it go with it."""
        self.connection.check_open()
        self.check_writable()
        there = self.connection.topics()
        if self._name(name) not in there:
            raise NotFound(f"{self.path}: there is no stream {name!r}")
        names = [one for one in (name, POSITIONS + name) if one in there]
        what = f"stream {name!r}"
        futures = self.connection.call(
            lambda: self.connection.admin.delete_topics(
                names, request_timeout=self.connection.timeout
            ),
            what,
        )
        for future in futures.values():
            try:
                future.result(self.connection.timeout + 5)
            except KafkaException as error:
                if error.args[0].code() not in UNKNOWN:
                    raise self.connection.error_of(error.args[0], what) from error
        end = time.monotonic() + self.connection.timeout
        while name in self.connection.topics() and time.monotonic() < end:
            time.sleep(STEP_SECONDS / 4)

    def transaction(
        self, *, durability: Durability | None = None, max_bytes: int | str = 64 << 20
    ) -> KafkaTransaction:
        """Append to streams and commit positions of consumers all at once, or not at all.

        See `millstream.Store.transaction`; of what it does here ``append``, ``append_many`` and
        ``commit``. Readers see all of it, or nothing.
        """
        from millstream.engines.kafka.transactions import KafkaTransaction

        self.connection.check_open()
        self.check_writable()
        if durability is not None:
            self.level(durability)
        return KafkaTransaction(self, max_bytes)

    def transacting(self) -> Any:
        """A producer for one transaction, which has none open; give it back to `transacted`."""
        try:
            return self._transacting.pop()
        except IndexError:
            return self.connection.transacting(None)

    def transacted(self, producer: Any) -> None:
        """Keep it for the next one."""
        self._transacting.append(producer)

    # --- queues -----------------------------------------------------------------------------------

    def queue(self, name: str, **settings: object) -> NoReturn:
        """Raise Unsupported: a share group is no queue of ours."""
        self.connection.check_open()
        asked = {"ordering": "queue.key_order", "capacity": "queue.capacity"}
        wanted = [asked[key] for key in settings if key in asked]
        raise self._capabilities.refusal(*wanted[:1] or ["queue.lease"])

    def queues(self) -> list[str]:
        """None."""
        self.connection.check_open()
        return []

    def drop_queue(self, name: str) -> None:
        """Raise Unsupported."""
        self.queue(name)

    # --- the store --------------------------------------------------------------------------------

    needs_recovery = False
    """The server recovers by itself."""

    def stats(self) -> StoreStats:
        """The store in numbers: each topic, and the groups that have a position in it."""
        streams = [self.stream(name, create=False) for name in self.streams()]
        return StoreStats(
            path=self.path,
            durability=self.durability,
            needs_recovery=False,
            members=0,
            streams=tuple(stream.stats() for stream in streams),
            groups=tuple(
                stream.group(name).stats() for stream in streams for name in stream.groups()
            ),
            queues=(),
        )

    def close(self) -> None:
        """Close the connections. What was answered is stored; nothing else is left to do."""
        if not self._closed:
            self._closed = True
            self._transacting.clear()
            self.connection.close()


def _settings(retention: Retention | None, compact: Compaction | None) -> dict[str, str]:
    """Settings of a topic that a caller's words stand for."""
    found = {}
    if retention is not None:
        found["retention.ms"] = str(-1 if retention.age is None else int(retention.age * 1000))
        found["retention.bytes"] = str(-1 if retention.bytes is None else retention.bytes)
    if compact is not None:
        bounded = retention is not None and retention != Retention()
        found["cleanup.policy"] = "compact,delete" if bounded else "compact"
        found["min.compaction.lag.ms"] = str(int(compact.min_age * 1000))
        found["delete.retention.ms"] = str(int(compact.tombstone_age * 1000))
        found["min.cleanable.dirty.ratio"] = f"{compact.min_dirty:g}"
    return found


def _whole(named: dict[str, str], level: Durability) -> dict[str, str]:
    """All settings of a topic that is made: it keeps records of every time."""
    made = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1",
            "message.timestamp.type": "CreateTime", "message.timestamp.before.max.ms": ALWAYS,
            "message.timestamp.after.max.ms": ALWAYS}  # fmt: skip
    if level == "sync":
        made["flush.messages"] = "1"
    return made | named
