"""The streams and queues of one NATS server."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from millstream.engines.nats import capabilities
from millstream.engines.nats.connection import NOT_FOUND, ApiError, NatsConnection
from millstream.engines.nats.queues import NatsQueue
from millstream.engines.nats.streams import NatsStream
from millstream.engines.store import ServerStore
from millstream.errors import (
    ConfigMismatch,
    InvalidArgument,
    InvalidType,
    NotFound,
)
from millstream.options import Retention, RetryPolicy, integer, number

if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Literal

    from millstream.options import Compaction, Durability

    OnMismatch = Literal["raise", "alter", "keep"]

__all__ = ["NatsStore"]

NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
OURS = "millstream"
"""The entry of a JetStream stream's metadata that says what it is."""
PARTITIONS_MAX = 256


class NatsStore(ServerStore):
    """Streams and queues of a NATS server with JetStream; made by `millstream.open`.

    Thread-safe. After a fork the child must open it again.
    """

    connection: NatsConnection

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
        self.connection = NatsConnection(address, timeout)
        synced = self.connection.address.options.get("sync_interval") == "always"
        self._capabilities = capabilities.of(str(self.connection.version), synced)
        self.path = self.connection.address.shown
        self.writable = mode == "rw"
        self.durability: Durability = "sync" if synced else "interval"
        try:
            if durability is not None:
                self.durability = self.level(durability)
        except BaseException:
            self.connection.close()
            raise
        self._closed = False

    def __repr__(self) -> str:
        return f"<NatsStore {self.path!r}{' (closed)' if self._closed else ''}>"

    @property
    def native(self) -> Any:
        """The client of nats-py; its coroutines belong on `loop`."""
        return self.connection.client

    @property
    def loop(self) -> Any:
        """The event loop of the client, which runs in a thread: `run_coroutine_threadsafe`."""
        return self.connection.loop

    def _name(self, kind: str, name: object) -> str:
        if not isinstance(name, str):
            raise InvalidType(f"name {name!r}: expected str")
        if not NAME.fullmatch(name):
            raise InvalidArgument(
                f"{kind} {name!r:.80}: {self.engine} takes 1 to 128 characters of A-Z a-z 0-9 _ -"
                " (a . would part a subject)"
            )
        return name

    def info(self, stream: str) -> dict[str, Any] | None:
        """What JetStream says of one of its streams; None: it is not there."""
        self.connection.check_open()
        try:
            return self.connection.call(self.connection.api(f"STREAM.INFO.{stream}"))
        except ApiError as error:
            if error.err_code in NOT_FOUND:
                return None
            raise self.connection.refused(error, stream) from error

    def settings_of(self, info: dict[str, Any]) -> dict[str, Any]:
        """What millstream wrote beside a JetStream stream.

        Raises: ConfigMismatch where somebody else made it.
        """
        config = info["config"]
        text = (config.get("metadata") or {}).get(OURS)
        if text is None:
            raise ConfigMismatch(
                f"{self.path}: the JetStream stream {config['name']!r} was not made by millstream;"
                " take another name, or use it with `native`"
            )
        found: dict[str, Any] = json.loads(text)
        return found

    def names(self, kind: str) -> list[str]:
        """Names of what millstream made there of one kind, sorted."""
        found, offset = [], 0
        while True:
            page = self.connection.do("STREAM.LIST", {"offset": offset})
            for info in page.get("streams") or ():
                text = (info["config"].get("metadata") or {}).get(OURS)
                if text and json.loads(text).get("kind") == kind:
                    found.append(json.loads(text)["name"])
            offset += len(page.get("streams") or ())
            if offset >= page.get("total", 0):
                return sorted(set(found))

    def make(self, config: dict[str, Any], settings: dict[str, Any]) -> None:
        """Make a JetStream stream of ours; one that is there with the same settings is left."""
        config = {"storage": "file", "allow_direct": True, **config}
        config["metadata"] = {OURS: json.dumps(settings, sort_keys=True)}
        self.connection.do(f"STREAM.CREATE.{config['name']}", config)

    def remove(self, *streams: str) -> None:
        """Remove JetStream streams, those that are there."""
        for name in streams:
            try:
                self.connection.call(self.connection.api(f"STREAM.DELETE.{name}"))
            except ApiError as error:
                if error.err_code not in NOT_FOUND:
                    raise self.connection.refused(error, name) from error

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
    ) -> NatsStream:
        """Open a stream, creating it where it is not there; see `millstream.Store.stream`."""
        self.connection.check_open()
        consent = self._capabilities.consent("stream", emulate)
        name = self._name("stream", name)
        if compact is not None:
            raise self._capabilities.refusal("stream.compaction")
        if partitions is not None:
            partitions = integer("partitions", partitions, 1, PARTITIONS_MAX)
        if retention is not None and not isinstance(retention, Retention):
            raise InvalidType(f"retention {retention!r}: expected a millstream.Retention or None")
        level = self.durability if durability is None else self.level(durability)
        info = self.info(name)
        if info is None:
            if create is False or not self.writable:
                raise NotFound(f"{self.path}: there is no stream {name!r}")
            self._make_stream(name, partitions or 1, retention)
            info = self.info(name)
            assert info is not None
        settings = self.settings_of(info)
        named = {"partitions": partitions}
        if retention is not None:
            named["retention"] = retention.as_dict()  # type: ignore[assignment]
        self._compare("stream", name, settings, named, on_mismatch)
        return NatsStream(self, name, settings, level, consent)

    def _make_stream(self, name: str, partitions: int, retention: Retention | None) -> None:
        keep = retention or Retention()
        settings = {
            "kind": "stream", "name": name, "partitions": partitions, "retention": keep.as_dict()
        }  # fmt: skip
        limits = {
            "max_age": int((keep.age or 0) * 1e9),
            "max_bytes": -1 if keep.bytes is None else keep.bytes,
            "max_msgs": -1 if keep.records is None else keep.records,
        }
        for index in reversed(range(partitions)):  # the first one last: it says that all are there
            self.make(
                {
                    "name": partition_name(name, index),
                    "subjects": [f"{name}.{index}", f"{name}.{index}.>"],
                    "allow_atomic": True,
                    "discard": "old",
                    **limits,
                },
                settings,
            )

    def streams(self) -> list[str]:
        """Names of the streams that millstream made there, sorted."""
        return self.names("stream")

    def drop_stream(self, name: str) -> None:
        """Remove a stream and all its records, and its groups."""
        self.check_writable()
        info = self.info(self._name("stream", name))
        if info is None:
            raise NotFound(f"{self.path}: there is no stream {name!r}")
        partitions = self.settings_of(info)["partitions"]
        all_of = [partition_name(name, index) for index in range(partitions)]
        self.remove(*all_of, f"groups~{name}")

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
    ) -> NatsQueue:
        """Open a queue, creating it where it is not there; see `millstream.Store.queue`."""
        self.connection.check_open()
        consent = self._capabilities.consent("queue", emulate)
        name = self._name("queue", name)
        if ordering is not None:
            raise self._capabilities.refusal("queue.key_order")
        if priorities not in (None, 1) and "queue.priority" not in consent:
            raise self._capabilities.refusal("queue.priority")
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise InvalidType(f"retry {retry!r}: expected a millstream.RetryPolicy")
        named = {
            "capacity": None if capacity is None else integer("capacity", capacity, 1),
            "priorities": None if priorities is None else integer("priorities", priorities, 1, 8),
            "lease": None if lease is None else number("lease", lease, 0.001, 30 * 86400.0),
            "retry": None if retry is None else retry.as_dict(),
            "ttl": None if ttl is None else number("ttl", ttl, 1.0, 100 * 365 * 86400.0),
            "dedup_window": None
            if dedup_window is None
            else number("dedup_window", dedup_window, 0.1, 30 * 86400.0),
        }
        level = self.durability if durability is None else self.level(durability)
        info = self.info(f"queue~{name}")
        if info is None:
            if create is False or not self.writable:
                raise NotFound(f"{self.path}: there is no queue {name!r}")
            self._make_queue(name, named, consent)
            info = self.info(f"queue~{name}")
            assert info is not None
        settings = self.settings_of(info)
        self._compare("queue", name, settings, named, on_mismatch)
        return NatsQueue(self, name, settings, level, consent, codec)

    def _make_queue(self, name: str, named: dict[str, Any], consent: Collection[str]) -> None:
        defaults: dict[str, Any] = {
            "priorities": 4 if "queue.priority" in consent else 1, "lease": 30.0,
            "retry": RetryPolicy().as_dict(), "dedup_window": 120.0,
        }  # fmt: skip
        settings: dict[str, Any] = {"kind": "queue", "name": name}
        settings |= {
            field: defaults.get(field) if value is None else value for field, value in named.items()
        }
        bounded = settings["capacity"] is not None
        self.make(
            {
                "name": f"dead~{name}",
                "subjects": [
                    f"dead~{name}",
                    f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.queue~{name}.*",
                ],
                "duplicate_window": int(120e9),
            },
            {"kind": "dead", "name": name},
        )
        self.make(
            {
                "name": f"queue~{name}",
                "subjects": [f"queue~{name}.*", f"queue~{name}.delay.*"],
                "retention": "workqueue",
                "allow_msg_ttl": True,
                "duplicate_window": int(float(settings["dedup_window"]) * 1e9),
                # Schedules exclude the discarding of what is new: it is one or the other.
                **({"discard": "new", "max_msgs": settings["capacity"]} if bounded
                   else {"allow_msg_schedules": True}),
            },
            settings,
        )  # fmt: skip
        for lane in range(int(settings["priorities"])):
            config = {
                "durable_name": f"lane{lane}", "name": f"lane{lane}", "ack_policy": "explicit",
                "ack_wait": int(float(settings["lease"]) * 1e9), "max_ack_pending": -1,
                "max_deliver": int(settings["retry"]["max_attempts"]),
                "filter_subject": f"queue~{name}.{lane}", "deliver_policy": "all",
            }  # fmt: skip
            body = {"stream_name": f"queue~{name}", "config": config, "action": ""}
            self.connection.do(f"CONSUMER.CREATE.queue~{name}.lane{lane}.queue~{name}.{lane}", body)

    def queues(self) -> list[str]:
        """Names of the queues that millstream made there, sorted."""
        return self.names("queue")

    def drop_queue(self, name: str) -> None:
        """Remove a queue, all its messages and its dead letters."""
        self.check_writable()
        info = self.info(f"queue~{self._name('queue', name)}")
        if info is None:
            raise NotFound(f"{self.path}: there is no queue {name!r}")
        self.settings_of(info)
        self.remove(f"queue~{name}", f"dead~{name}")

    needs_recovery = False
    """The server recovers by itself."""

    def transaction(self, **_: object) -> Any:
        """Raise Unsupported: NATS has none over several streams."""
        raise self._capabilities.refusal("stream.transaction")

    # --- the end ----------------------------------------------------------------------------------


def partition_name(stream: str, index: int) -> str:
    """The JetStream stream of a partition."""
    return stream if index == 0 else f"{stream}~{index}"
