"""Connections to a Kafka cluster: what its address says, what it answers, and clients for it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from millstream.errors import (
    Closed,
    Fenced,
    Indeterminate,
    InvalidArgument,
    LimitExceeded,
    MillstreamError,
    NotFound,
    StorageError,
    Unsupported,
)

CALL_SECONDS = 5.0
STEP_SECONDS = 0.1
LEAST = (4, 0)
"""Before it a record that came late could hold up all readers: a transaction that nobody ends."""
VERSIONS = ((34, (4, 5)), (31, (4, 4)), (30, (4, 3)), (28, (4, 2)), (26, (4, 1)), (22, (4, 0)))
"""Levels of the feature metadata.version from which on a cluster is of a version."""
OPTIONS = {"sasl", "tls", "tls_ca", "tls_cert", "tls_key"}
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
POOL_MOST = 4
AWAY = {
    KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT,
    KafkaError._RESOLVE, KafkaError._WAIT_COORD, KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.NOT_COORDINATOR,
    KafkaError.REQUEST_TIMED_OUT, KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.NETWORK_EXCEPTION,
    KafkaError.BROKER_NOT_AVAILABLE, KafkaError._TIMED_OUT_QUEUE,
}  # fmt: skip
UNREADY = {
    KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.NOT_COORDINATOR, KafkaError.UNSTABLE_OFFSET_COMMIT,
}  # fmt: skip
UNKNOWN = {
    KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION,
    KafkaError.UNKNOWN_TOPIC_ID,
}  # fmt: skip
DENIED = {
    KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED, KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}  # fmt: skip
FENCED = {
    KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID,
    KafkaError.REBALANCE_IN_PROGRESS, KafkaError.INVALID_PRODUCER_ID_MAPPING,
    KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._ASSIGNMENT_LOST,
    KafkaError.FENCED_MEMBER_EPOCH, KafkaError.STALE_MEMBER_EPOCH,
}  # fmt: skip
logger = logging.getLogger("millstream.engines.kafka")
logger.addHandler(logging.NullHandler())  # librdkafka writes to stderr what nobody asked for
logger.propagate = False


def ignore(error: KafkaError) -> None:
    """Errors of a client at work: whoever calls gets them."""


class Address:
    """What ``kafka://user:password@host:port,host:port?tls_ca=FILE`` says."""

    def __init__(self, text: str) -> None:
        rest = text.partition("://")[2]
        rest, _, query = rest.partition("?")
        user, _, hosts = rest.rpartition("@")
        self.hosts = [self._host(text, one) for one in hosts.rstrip("/").split(",")]
        self.servers = ",".join(f"[{h}]:{p}" if ":" in h else f"{h}:{p}" for h, p in self.hosts)
        self.shown = f"kafka://{self.servers}"
        name, colon, password = user.partition(":")
        self.user = unquote(name) if name else None
        self.password = unquote(password) if colon else None
        self.options = dict(parse_qsl(query))
        if unknown := sorted(set(self.options) - OPTIONS):
            raise InvalidArgument(
                f"address {self.shown}: takes {', '.join(sorted(OPTIONS))}, not {unknown[0]}"
            )
        self.mechanism = self.options.get("sasl", "PLAIN").upper()
        if self.mechanism not in MECHANISMS:
            raise InvalidArgument(
                f"address {self.shown}: sasl={self.mechanism}: expected one of"
                f" {', '.join(MECHANISMS)}"
            )
        if (self.user is None) != (self.password is None):
            raise InvalidArgument(f"address {self.shown}: names a user and a password, or neither")
        self.tls = any(name.startswith("tls") for name in self.options)
        self.context = self._context() if self.tls else None

    @staticmethod
    def _host(text: str, one: str) -> tuple[str, int]:
        host, colon, port = one.rpartition(":")
        if not colon or port.endswith("]"):
            host, port = one, "9092"
        host = host.strip("[]")
        if not host or any(c in host for c in "/#@ ") or not port.isdecimal() or len(port) > 5:
            raise InvalidArgument(
                f"address {text.partition('://')[2].rpartition('@')[2]!r}: write it as"
                " kafka://HOST:PORT, or kafka://HOST:PORT,HOST:PORT"
            )
        if not 0 < int(port) < 65536:
            raise InvalidArgument(f"address kafka://{one}: port {port} is out of range")
        return host, int(port)

    def _context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.options.get("tls_ca"))
            if "tls_cert" in self.options:
                context.load_cert_chain(self.options["tls_cert"], self.options.get("tls_key"))
        except (OSError, ssl.SSLError) as error:
            raise StorageError(
                getattr(error, "errno", None) or errno.EINVAL,
                f"its TLS files cannot be used: {error}",
                self.shown,
            ) from error
        return context

    def settings(self) -> dict[str, Any]:
        """What every client of librdkafka is told."""
        found: dict[str, Any] = {
            "bootstrap.servers": self.servers,
            "client.id": "millstream",
            "reconnect.backoff.max.ms": 1000,
            "topic.metadata.refresh.fast.interval.ms": 20,
            "topic.metadata.refresh.interval.ms": 10_000,
            "allow.auto.create.topics": False,
            "log_level": 4,
            "error_cb": ignore,
            "security.protocol": ("SASL_" if self.user is not None else "")
            + ("SSL" if self.tls else "PLAINTEXT"),
        }
        if self.user is not None:
            found |= {"sasl.mechanism": self.mechanism, "sasl.username": self.user,
                      "sasl.password": self.password}  # fmt: skip
        names = {"tls_ca": "ssl.ca.location", "tls_cert": "ssl.certificate.location",
                 "tls_key": "ssl.key.location"}  # fmt: skip
        found |= {names[k]: value for k, value in self.options.items() if k in names}
        return found


# --- before the client ----------------------------------------------------------------------------
# librdkafka tries again for ever, and says much the same of a wrong protocol, a TLS listener and an
# old broker. One request of our own tells them apart at once, and gives the version, which no call
# of the client does.


def _ask_versions(address: Address, host: str, port: int, seconds: float) -> bytes:
    name = b"millstream"
    body = struct.pack(">hhih", 18, 3, 1, len(name)) + name + b"\0"
    body += bytes([len(name) + 1]) + name + b"\x021" + b"\0"
    with socket.create_connection((host, port), seconds) as plain:
        plain.settimeout(seconds)
        context = address.context
        wire = plain if context is None else context.wrap_socket(plain, server_hostname=host)
        with wire:
            wire.sendall(struct.pack(">i", len(body)) + body)
            (size,) = struct.unpack(">i", _read(wire, 4))
            if not 0 < size < 1 << 20:
                raise ValueError(f"it answered {struct.pack('>i', size)!r}")
            return _read(wire, size)


def _read(wire: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = wire.recv(count - len(found))
        if not part:
            raise ConnectionResetError("it closed the connection")
        found += part
    return found


def _uvarint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def features_of(data: bytes) -> dict[str, int]:
    """The finalized features in an answer to ApiVersions of version 3, each with its level.

    Raises: ValueError, IndexError, struct.error where it is none.
    """
    correlation, code = struct.unpack_from(">ih", data)
    if correlation != 1:
        raise ValueError(f"it answered request {correlation}")
    if code == 35:  # an old broker, which answers in version 0
        return {}
    if code:
        raise ValueError(f"error {code}")
    count, at = _uvarint(data, 6)
    for _ in range(count - 1):
        _, at = _uvarint(data, at + 6)
    tags, at = _uvarint(data, at + 4)
    found: dict[str, int] = {}
    for _ in range(tags):
        tag, at = _uvarint(data, at)
        size, at = _uvarint(data, at)
        if tag == 2:
            found = _levels(data[at : at + size])
        at += size
    return found


def _levels(data: bytes) -> dict[str, int]:
    count, at = _uvarint(data, 0)
    found = {}
    for _ in range(count - 1):
        size, at = _uvarint(data, at)
        name = data[at : at + size - 1].decode()
        at += size - 1
        (found[name],) = struct.unpack_from(">h", data, at)
        _, at = _uvarint(data, at + 4)
    return found


def version_of(features: Mapping[str, int]) -> tuple[int, int] | None:
    """The version that a cluster's features say; None: it is older than all we know."""
    level = features.get("metadata.version", 0)
    return next((version for least, version in VERSIONS if level >= least), None)


class KafkaConnection:
    """Clients of confluent-kafka for one cluster. Thread-safe."""

    def __init__(self, text: str, timeout: float | None) -> None:
        self.address = Address(text)
        self.timeout = CALL_SECONDS if timeout is None else max(0.1, float(timeout))
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._producers: dict[int, tuple[Any, threading.Lock]] = {}
        self._counts: dict[tuple[int, str], int] = {}
        self._idle: list[Any] = []
        self._readers: set[Any] = set()
        self._errors: list[KafkaError] = []
        self.settings = self.address.settings()
        self.version = self._probe()
        self.admin: Any = AdminClient(
            {**self.settings, "error_cb": self._errors.append, "logger": logger}
        )
        self.topics(check=True)

    # --- connecting -------------------------------------------------------------------------------

    def _probe(self) -> str:
        end = time.monotonic() + self.timeout
        last: BaseException | None = None
        for host, port in self.address.hosts:
            seconds = max(0.05, (end - time.monotonic()) / len(self.address.hosts))
            try:
                features = features_of(_ask_versions(self.address, host, port, seconds))
            except (OSError, ValueError, IndexError, struct.error) as error:
                last = error
                continue
            version = version_of(features)
            if version is None or version < LEAST:
                raise Unsupported(
                    f"{self.address.shown}: the Kafka cluster is too old (metadata.version"
                    f" {features.get('metadata.version', 'is missing')}); millstream needs"
                    f" {'.'.join(map(str, LEAST))} or later",
                    engine="kafka",
                )
            return ".".join(map(str, version))
        assert last is not None
        raise self._not_connected(last) from last

    def _not_connected(self, error: BaseException) -> StorageError:
        text = str(error) or f"no answer within {self.timeout:g} s"
        number, do = errno.EPROTO, "is what listens there a Kafka server?"
        if isinstance(error, ssl.SSLCertVerificationError):
            do = "name the authority that signed it: ?tls_ca=FILE"
        elif isinstance(error, ssl.SSLError):
            do = "does that port speak TLS, and does it want a certificate (tls_cert, tls_key)?"
        elif isinstance(error, TimeoutError):
            number, text = errno.ETIMEDOUT, f"no answer within {self.timeout:g} s"
        elif isinstance(error, ConnectionResetError):
            do = "is what listens there a Kafka server, and does it want TLS (?tls_ca=FILE)?"
        elif isinstance(error, ValueError) and "\\x15\\x03" in text:
            do = "that port speaks TLS: name the authority, ?tls_ca=FILE"
        elif isinstance(error, OSError):
            number, do = error.errno or errno.ECONNREFUSED, (
                "is the server running, and are host and port right?"
            )  # fmt: skip
        return StorageError(number, f"cannot be connected to: {text}; {do}", self.address.shown)

    def topics(self, *, name: str | None = None, check: bool = False) -> dict[str, Any]:
        """Metadata of all topics, or of one; those that are not there are left out.

        Raises: StorageError where the cluster cannot be reached or does not let us in.
        """
        end = time.monotonic() + self.timeout
        while True:
            self._errors.clear()
            step = max(STEP_SECONDS, end - time.monotonic()) if not check else STEP_SECONDS
            try:
                found = self.admin.list_topics(*([] if name is None else [name]), timeout=step)
            except KafkaException as error:
                self.admin.poll(0)
                known = {one.code() for one in self._errors}
                if check and self.address.user is None and KafkaError._ALL_BROKERS_DOWN in known:
                    self._fail_sign_in()
                if known & DENIED or time.monotonic() >= end:
                    self._fail(self._errors, error)
                continue
            return {key: one for key, one in found.topics.items() if one.error is None}

    def _fail_sign_in(self) -> NoReturn:
        raise StorageError(
            errno.EACCES,
            "cannot be connected to: it closes the connection; does it want a user? name one:"
            " kafka://USER:PASSWORD@HOST:PORT?sasl=SCRAM-SHA-512",
            self.address.shown,
        )

    def _fail(self, seen: Iterable[KafkaError], error: KafkaException) -> NoReturn:
        first = next((one for one in seen if one.code() in DENIED), error.args[0])
        raise self.error_of(first, "") from error

    # --- errors -----------------------------------------------------------------------------------

    def error_of(self, error: KafkaError, what: str) -> MillstreamError:
        """Our error for one of librdkafka or of the server."""
        code, text = error.code(), error.str() or error.name()
        where = f"{what}: " if what else ""
        if code in FENCED:
            return Fenced(f"{where}another one has it now ({text}); nothing of this was kept")
        if code in UNKNOWN:
            return NotFound(f"{self.address.shown}: {where}is not there ({text})")
        if code in DENIED:
            do = (
                "are user, password and mechanism (?sasl=SCRAM-SHA-512) right, and may the user do"
                " this?"
            )
            return StorageError(errno.EACCES, f"{where}{text}; {do}", self.address.shown)
        if code == KafkaError._MSG_TIMED_OUT:
            return Indeterminate(
                errno.ETIMEDOUT,
                f"{where}the server did not answer within {self.timeout:g} s, so it may be stored"
                " or not; look before it is sent again, or send it with a producer",
                self.address.shown,
            )
        if code in (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE):
            return LimitExceeded(
                f"{where}a record is larger than the server takes ({text}); raise"
                " max.message.bytes of the topic"
            )
        if code == KafkaError.INVALID_TIMESTAMP:
            return InvalidArgument(
                f"{where}the server refuses a timestamp: the topic's message.timestamp.after.max.ms"
                " or message.timestamp.before.max.ms bounds them; nothing was stored"
            )
        if code == KafkaError.INVALID_SESSION_TIMEOUT:
            return InvalidArgument(
                f"{where}the server refuses the session: its group.min.session.timeout.ms (6 s by"
                " default) and group.max.session.timeout.ms bound it"
            )
        if code in AWAY:
            return StorageError(
                errno.EIO,
                f"{where}the server cannot be reached: {text}; is it running?",
                self.address.shown,
            )
        return StorageError(errno.EIO, f"{where}the server refused: {text}", self.address.shown)

    def check_open(self) -> None:
        """Raise Closed where it is."""
        if self._closed or self._pid != os.getpid():
            raise Closed(f"{self.address.shown}: the store is closed; open it again")

    def call(self, work: Callable[[], Any], what: str) -> Any:
        """What a call of the client returns; its errors are ours."""
        self.check_open()
        try:
            return work()
        except KafkaException as error:
            raise self.error_of(error.args[0], what) from error

    def ask(self, request: Callable[..., Mapping[Any, Any]], what: str) -> dict[Any, Any]:
        """The answers to an admin request that a leader or coordinator may not be ready for yet."""
        end = time.monotonic() + self.timeout
        while True:
            try:
                futures = self.call(lambda: request(request_timeout=self.timeout), what)
                return {key: self.result(future, what) for key, future in futures.items()}
            except StorageError as error:
                cause = error.__cause__
                if (
                    not isinstance(cause, KafkaException)
                    or cause.args[0].code() not in UNREADY
                    or time.monotonic() >= end
                ):
                    raise
                time.sleep(STEP_SECONDS / 4)

    def result(self, future: Any, what: str) -> Any:
        """What an admin request came to."""
        return self.call(lambda: future.result(self.timeout + 5), what)

    # --- clients ----------------------------------------------------------------------------------

    def producer(self, most: int) -> tuple[Any, threading.Lock]:
        """The idempotent producer for topics that take so many bytes at once, and its lock."""
        self.check_open()
        with self._lock:
            if most not in self._producers:
                self._producers[most] = self.new_producer(most, {}), threading.Lock()
            return self._producers[most]

    def new_producer(self, most: int, more: Mapping[str, Any]) -> Any:
        """A producer that waits for all replicas, and tries again without doubling."""
        return confluent_kafka.Producer(
            {
                **self.settings, "enable.idempotence": True, "acks": "all", "linger.ms": 0,
                "message.max.bytes": 1_000_000_000,  # the server's bound is checked by us
                "batch.size": max(1, min(1_000_000, most - 512)),
                "queue.buffering.max.messages": 1_000_000,
                "queue.buffering.max.kbytes": 1 << 21,
                "message.timeout.ms": int(self.timeout * 1000), "logger": logger, **more,
            }
        )  # fmt: skip

    def transacting(self, name: str | None) -> Any:
        """A producer for transactions; it fences the one that had the name before."""
        self.check_open()
        settings = {
            "transactional.id": name or f"millstream.{os.urandom(12).hex()}",
            "transaction.timeout.ms": int(max(10.0, 2 * self.timeout) * 1000),
        }
        client = self.new_producer(1_000_000, settings)
        self.call(lambda: client.init_transactions(self.timeout), "beginning transactions")
        return client

    @contextlib.contextmanager
    def transaction(self, client: Any, what: str) -> Iterator[None]:
        """Commit what a client does in the block, or abort it.

        Raises: Fenced where another client has its name, or a group its consumer's partitions;
        Indeterminate where it is not known what came of it.
        """
        self.call(client.begin_transaction, what)
        try:
            yield
        except BaseException:
            with contextlib.suppress(KafkaException):  # the server does, when its time is over
                client.abort_transaction(self.timeout)
            raise
        try:
            client.commit_transaction(self.timeout)
        except KafkaException as error:
            failed = error.args[0]
            if failed.txn_requires_abort():
                with contextlib.suppress(KafkaException):
                    client.abort_transaction(self.timeout)
            elif failed.code() not in FENCED:
                raise Indeterminate(
                    errno.ETIMEDOUT,
                    f"{what}: the transaction is committed or not, no answer came within"
                    f" {self.timeout:g} s ({failed.str()}); look before it is done again",
                    self.address.shown,
                ) from error
            raise self.error_of(failed, what) from error

    def know(self, producer: Any, topic: str, partitions: int) -> None:
        """Have a producer know of partitions that were added: it looks by itself now and then."""
        before = self._counts.setdefault((id(producer), topic), partitions)
        if before < partitions:
            self.call(lambda: producer.list_topics(topic, self.timeout), f"stream {topic!r}")
            self._counts[id(producer), topic] = partitions

    def forget(self, producer: Any) -> None:
        """Have another producer made for the next call: this one cannot go on."""
        with self._lock:
            self._producers = {
                most: pair for most, pair in self._producers.items() if pair[0] is not producer
            }

    def new_consumer(self, more: Mapping[str, Any]) -> Any:
        """A consumer that raises where an offset is not there, and commits nothing by itself."""
        return confluent_kafka.Consumer(
            {
                **self.settings, "group.id": "millstream", "enable.auto.commit": False,
                "enable.auto.offset.store": False, "auto.offset.reset": "error",
                "enable.partition.eof": True, "isolation.level": "read_committed",
                "fetch.wait.max.ms": 50, "fetch.error.backoff.ms": 50,
                "fetch.queue.backoff.ms": 1, "queued.min.messages": 200_000,
                "fetch.message.max.bytes": 8 << 20, "logger": logger, **more,
            }
        )  # fmt: skip

    def reader(self) -> Any:
        """A consumer without a group, for `give_back`."""
        self.check_open()
        with self._lock:
            if self._idle:
                return self._idle.pop()
            made = self.new_consumer({})
            self._readers.add(made)
            return made

    def give_back(self, reader: Any) -> None:
        """Keep a reader for the next one, or close it."""
        if self._closed or self._pid != os.getpid():
            return
        reader.unassign()
        with self._lock:
            if len(self._idle) < POOL_MOST:
                self._idle.append(reader)
                return
            self._readers.discard(reader)
        reader.close()

    def close(self) -> None:
        """Close all clients. What was answered is stored; nothing is left to send."""
        if self._closed:
            return
        self._closed = True
        if self._pid != os.getpid():
            return
        for reader in self._readers:
            reader.close()
        for producer, _ in self._producers.values():
            producer.purge(in_queue=True, in_flight=True, blocking=False)
        self._producers.clear()
        self._idle.clear()
        self._readers.clear()
