"""One connection to a NATS server: a thread with an event loop, and calls into it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import nats
from nats import errors as nats_errors

from millstream.engines.connection import LoopConnection
from millstream.errors import (
    InvalidArgument,
    MillstreamError,
    StorageError,
    Unsupported,
)

Answer = TypeVar("Answer")
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 5.0
LEAST = (2, 12)
"""Atomic batches and schedules came with it."""
OPTIONS = {"tls_ca", "tls_cert", "tls_key", "token", "creds", "sync_interval"}
WRONG_SEQUENCE = {10071, 10164}
NOT_FOUND = {10059, 10037, 10014, 10043}
TOO_MANY = 10077


class ApiError(Exception):
    """What the server answered instead of what was asked for."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        self.code = int(error.get("code", 0))
        self.err_code = int(error.get("err_code", 0))
        super().__init__(str(error.get("description", error)))


class Address:
    """What ``nats://user:password@host:port?tls_ca=FILE`` says."""

    def __init__(self, text: str) -> None:
        parts = urlsplit(text)
        try:
            port = parts.port or 4222
        except ValueError as error:
            raise InvalidArgument(f"address {text!r}: {error}") from error
        if not parts.hostname or parts.path.strip("/") or parts.fragment:
            raise InvalidArgument(f"address {text!r}: write it as nats://HOST:PORT")
        self.shown = f"nats://{parts.hostname}:{port}"
        self.user = unquote(parts.username) if parts.username else None
        self.password = unquote(parts.password) if parts.password else None
        self.options = dict(parse_qsl(parts.query))
        if unknown := sorted(set(self.options) - OPTIONS):
            raise InvalidArgument(
                f"address {self.shown}: takes {', '.join(sorted(OPTIONS))}, not {unknown[0]}"
            )

    def tls(self) -> ssl.SSLContext | None:
        """The context that the options ask for; None: no TLS was asked for."""
        named = {"tls_ca", "tls_cert", "tls_key"} & set(self.options)
        if not named:
            return None
        try:
            context = ssl.create_default_context(cafile=self.options.get("tls_ca"))
            if "tls_cert" in named:
                context.load_cert_chain(self.options["tls_cert"], self.options.get("tls_key"))
        except (OSError, ssl.SSLError) as error:
            raise StorageError(
                getattr(error, "errno", None) or errno.EINVAL,
                f"its TLS files cannot be used: {error}",
                self.shown,
            ) from error
        return context


async def _ignore(error: Exception) -> None:
    """Errors of a connection: whoever calls gets them, and nobody else."""


def _first_of(found: list[Exception]) -> Callable[[Exception], Coroutine[Any, Any, None]]:
    async def note(error: Exception) -> None:
        found.append(error)

    return note


class NatsConnection(LoopConnection):
    """A client of nats-py, on a loop in a thread of its own. Thread-safe."""

    def __init__(self, text: str, timeout: float | None) -> None:
        self.address = Address(text)
        self.timeout = REQUEST_SECONDS
        self._pid = os.getpid()
        self._closed = False
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="millstream-nats", daemon=True)
        self._thread.start()
        self._collecting: dict[str, Collector] = {}
        self._number = 0
        try:
            self.client: Any = self._connect(CONNECT_SECONDS if timeout is None else timeout)
            found = self.client.connected_server_version
            self.version = f"{found.major}.{found.minor}.{found.patch}"
            self._check_server((found.major, found.minor))
        except BaseException:
            self.close()
            raise

    def _connect(self, seconds: float) -> Any:
        where = self.address
        options: dict[str, Any] = {
            "tls": where.tls(), "user": where.user, "password": where.password,
            "token": where.options.get("token"), "user_credentials": where.options.get("creds"),
        }  # fmt: skip
        given = {name: value for name, value in options.items() if value is not None}

        seen: list[Exception] = []

        async def connect() -> Any:
            client = nats.aio.client.Client()
            try:
                await asyncio.wait_for(
                    client.connect(
                        where.shown,
                        allow_reconnect=False,
                        max_reconnect_attempts=1,
                        connect_timeout=max(1, int(seconds)),
                        reconnect_time_wait=0,
                        error_cb=_first_of(seen),
                        inbox_prefix=b"_INBOX",
                        name="millstream",
                        **given,
                    ),
                    seconds,
                )
            except BaseException:
                await client.close()
                raise
            client._error_cb = _ignore
            client.options["allow_reconnect"] = True
            client.options["max_reconnect_attempts"] = -1
            client.options["reconnect_time_wait"] = 0.1
            self.inbox = client.new_inbox()
            await client.subscribe(
                f"{self.inbox}.*", cb=self._collect, pending_msgs_limit=0, pending_bytes_limit=0
            )
            return client

        try:
            return self._on_loop(connect(), seconds + 1)
        except MillstreamError:
            raise
        except Exception as error:
            raise self._not_connected(seen[0] if seen else error, seconds) from error

    def _not_connected(self, error: Exception, seconds: float) -> MillstreamError:
        text = str(error) or f"no answer within {seconds:g} s"
        said = text.lower()
        number, do = errno.ECONNREFUSED, "is the server running, and are host and port right?"
        if "authorization" in said:
            number, do = errno.EACCES, "name user and password: nats://USER:PASSWORD@HOST:PORT"
        elif isinstance(error, ssl.SSLError) or "certificate" in said or "secure" in said:
            number, do = errno.EPROTO, "name the authority that signed it: ?tls_ca=FILE"
        elif isinstance(error, TimeoutError):
            number, do = errno.ETIMEDOUT, "is what listens there a NATS server?"
        elif not isinstance(error, OSError | nats_errors.NoServersError):
            number, do = errno.EPROTO, "is what listens there a NATS server?"
        return StorageError(number, f"cannot be connected to: {text}; {do}", self.address.shown)

    def _check_server(self, found: tuple[int, int]) -> None:
        engine = f"nats {self.version}"
        if found < LEAST:
            raise Unsupported(
                f"{self.address.shown}: {engine} is too old; millstream needs"
                f" {'.'.join(map(str, LEAST))} or later",
                engine=engine,
            )
        if not self.client._server_info.get("jetstream"):
            raise Unsupported(
                f"{self.address.shown}: {engine} runs without JetStream; start it with -js",
                engine=engine,
            )

    # --- calls ------------------------------------------------------------------------------------

    def call(self, work: Coroutine[Any, Any, Answer], seconds: float | None = None) -> Answer:
        """Run a coroutine on the loop and return what it returns.

        Raises: StorageError where the server cannot be reached, or does not answer.
        """
        try:
            return self._on_loop(work, seconds)
        except (nats_errors.Error, TimeoutError, ConnectionError) as error:
            if isinstance(error, MillstreamError):
                raise
            text = str(error) or f"no answer within {seconds or self.timeout:g} s"
            raise StorageError(
                errno.EIO,
                f"the server cannot be reached: {text}; is it running?",
                self.address.shown,
            ) from error

    async def ask(
        self,
        subject: str,
        data: bytes,
        headers: dict[str, str] | None = None,
        seconds: float | None = None,
    ) -> bytes:
        """The answer to one request."""
        answer = await self.client.request(
            subject, data, timeout=seconds or self.timeout, headers=headers or None
        )
        found: bytes = answer.data
        return found

    async def api(self, subject: str, body: object = None) -> dict[str, Any]:
        """The answer to a request of JetStream's API.

        Raises: ApiError.
        """
        data = b"" if body is None else json.dumps(body).encode()
        return _checked(await self.ask(f"$JS.API.{subject}", data))

    async def publish(
        self, subject: str, data: bytes, headers: dict[str, str], what: str
    ) -> dict[str, Any]:
        """Store one message and return what JetStream says of it.

        Raises: ApiError; Indeterminate where no answer came.
        """
        try:
            return _checked(await self.ask(subject, data, headers))
        except (TimeoutError, nats_errors.TimeoutError) as error:
            raise self.unsure(what) from error

    def do(self, subject: str, body: object = None) -> dict[str, Any]:
        """`api` for threads; the server's refusals are StorageErrors."""
        self.check_open()
        try:
            return self.call(self.api(subject, body))
        except ApiError as error:
            raise self.refused(error, subject) from error

    def refused(self, error: ApiError, what: str) -> StorageError:
        """The error of what the server refused."""
        return StorageError(errno.EIO, f"{what}: the server refused: {error}", self.address.shown)

    # --- many messages ----------------------------------------------------------------------------

    async def _collect(self, message: Any) -> None:
        found = self._collecting.get(message.subject.rpartition(".")[2])
        if found is not None:
            found.take(message)

    async def collect(self, subject: str, body: object, seconds: float, enough: int) -> list[Any]:
        """The messages that answer a request, up to a status or to so many of them."""
        self._number += 1
        token = f"{self._number:x}"
        collector = self._collecting[token] = Collector(self.loop.create_future(), enough)
        try:
            await self.client.publish(
                subject, json.dumps(body).encode(), reply=f"{self.inbox}.{token}"
            )
            await asyncio.wait_for(collector.done, seconds)
        finally:
            del self._collecting[token]
        return collector.found

    async def pull(self, subject: str, body: object, seconds: float, enough: int) -> list[Any]:
        """The same of a consumer: its messages come under their own subjects."""
        collector = Collector(self.loop.create_future(), enough)

        async def take(message: Any) -> None:
            collector.take(message)

        inbox = self.client.new_inbox()
        subscription = await self.client.subscribe(inbox, cb=take)
        try:
            await self.client.publish(subject, json.dumps(body).encode(), reply=inbox)
            await asyncio.wait_for(collector.done, seconds)
        finally:
            await subscription.unsubscribe()
        return collector.found

    def close(self) -> None:
        """Close it and end the thread."""
        if self._closed:
            return
        if self._pid != os.getpid():
            self._closed = True
            return
        client = getattr(self, "client", None)
        if client is not None:
            closing = asyncio.run_coroutine_threadsafe(client.close(), self.loop)
            end = time.monotonic() + self.timeout
            while not closing.done() and time.monotonic() < end:
                self._thread.join(0.005)
        self._closed = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(self.timeout)


class Collector:
    """Messages that answer one request."""

    def __init__(self, done: asyncio.Future[None], enough: int) -> None:
        self.done = done
        self.found: list[Any] = []
        self._enough = enough

    def take(self, message: Any) -> None:
        """Keep a message; a status ends it."""
        headers = message.headers
        if headers and "Status" in headers and not message.data:
            status = headers["Status"]
            if status not in ("404", "408", "409", "204", "100") and not self.done.done():
                description = headers.get("Description", "")
                self.done.set_exception(ApiError({"description": f"{status} {description}"}))
        else:
            self.found.append(message)
            if len(self.found) < self._enough:
                return
        if not self.done.done():
            self.done.set_result(None)


def _checked(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data)
    if "error" in found:
        raise ApiError(found["error"])
    return found
