"""Connections to a RabbitMQ server, one of AMQP and one of streams, on a loop in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pika
from pika import exceptions as amqp_errors
from pika.adapters.asyncio_connection import AsyncioConnection
from rstream.exceptions import ServerError, StreamDoesNotExist

from millstream.engines.connection import LoopConnection
from millstream.engines.rabbitmq.wire import Wire
from millstream.errors import (
    InvalidArgument,
    MillstreamError,
    StorageError,
    Unsupported,
)

Answer = TypeVar("Answer")
OPEN_SECONDS = 5.0
REQUEST_SECONDS = 10.0
LEAST = (4, 3)
"""Leases that end, priorities that are strict and dead letters that wait came with it."""
OPTIONS = {"tls_ca", "tls_cert", "tls_key", "stream_port"}
CHANNELS_KEPT = 64
PROTOCOL = (
    amqp_errors.IncompatibleProtocolError,
    amqp_errors.StreamLostError,
    amqp_errors.AMQPHeartbeatTimeout,
    amqp_errors.ProtocolSyntaxError,
)
"""What pika says of a server that speaks something else."""

for _name in ("pika", "rstream"):  # who calls gets the error; a second word of it goes nowhere
    logging.getLogger(_name).addHandler(logging.NullHandler())


class Address:
    """What ``rabbitmq://user:password@host:port/vhost?stream_port=5552`` says."""

    def __init__(self, text: str) -> None:
        parts = urlsplit(text)
        self.options = dict(parse_qsl(parts.query))
        self.secure = any(name.startswith("tls_") for name in self.options)
        try:
            self.port = parts.port or (5671 if self.secure else 5672)
            self.stream_port = int(self.options.get("stream_port", 5551 if self.secure else 5552))
        except ValueError as error:
            raise InvalidArgument(f"address {parts.hostname!r}: {error}") from error
        path = parts.path.strip("/")
        if not parts.hostname or "/" in path or parts.fragment:
            raise InvalidArgument("address: write it as rabbitmq://HOST:PORT or .../VHOST")
        self.host = parts.hostname
        self.vhost = unquote(path) or "/"
        self.shown = f"rabbitmq://{self.host}:{self.port}{'/' + path if path else ''}"
        self.user = unquote(parts.username) if parts.username else "guest"
        self.password = unquote(parts.password) if parts.password else "guest"
        if unknown := sorted(set(self.options) - OPTIONS):
            raise InvalidArgument(
                f"address {self.shown}: takes {', '.join(sorted(OPTIONS))}, not {unknown[0]}"
            )

    def tls(self) -> ssl.SSLContext | None:
        """The context that the options ask for; None: no TLS was asked for."""
        if not self.secure:
            return None
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


class RabbitConnection(LoopConnection):
    """Clients of pika and rstream, on a loop in a thread of their own. Thread-safe."""

    def __init__(self, text: str, timeout: float | None) -> None:
        self.address = Address(text)
        self.timeout = REQUEST_SECONDS
        self._seconds = OPEN_SECONDS if timeout is None else timeout
        self._pid = os.getpid()
        self._closed = False
        self._tls = self.address.tls()
        self.version = ""
        self.amqp: Any = None
        """The connection of pika, or None while there is none."""
        self._wire: Wire | None = None
        self._idle: list[Channel] = []
        self._publisher: Publisher | None = None
        self.loop = asyncio.new_event_loop()
        self._lock = asyncio.Lock()
        self._thread = threading.Thread(target=self._run, name="millstream-rabbitmq", daemon=True)
        self._thread.start()
        try:
            self._on_loop(self._ready(), self._seconds + 1)
        except BaseException:
            self.close()
            raise

    # --- AMQP -------------------------------------------------------------------------------------

    async def _ready(self) -> Any:
        """The open connection of pika; made anew where the last one was lost."""
        async with self._lock:
            if self.amqp is None or not self.amqp.is_open:
                self._idle.clear()
                self._publisher = None
                try:
                    self.amqp = await asyncio.wait_for(self._connected(), self._seconds)
                except MillstreamError:
                    raise
                except Exception as error:
                    raise self._not_connected(error) from error
            return self.amqp

    async def _connected(self) -> Any:
        where = self.address
        future: asyncio.Future[Any] = self.loop.create_future()

        def failed(_: object, error: Any) -> None:
            if not future.done():
                future.set_exception(
                    error if isinstance(error, Exception) else ConnectionError(str(error))
                )

        parameters = pika.ConnectionParameters(
            host=where.host,
            port=where.port,
            virtual_host=where.vhost,
            credentials=pika.PlainCredentials(where.user, where.password),
            ssl_options=None if self._tls is None else pika.SSLOptions(self._tls, where.host),
            connection_attempts=1,
            retry_delay=0,
            socket_timeout=self._seconds,
            stack_timeout=self._seconds,
            client_properties={"connection_name": "millstream"},
        )
        connection = AsyncioConnection(
            parameters,
            on_open_callback=lambda made: _resolve(future, made),
            on_open_error_callback=failed,
            on_close_callback=failed,
            custom_ioloop=self.loop,
        )
        try:
            await future
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):  # it never was open
                connection.close()
            raise
        said = connection.server_properties or {}
        product, version = str(said.get("product")), str(said.get("version"))
        self.version = version
        numbers = tuple(int(one) for one in version.split(".")[:2] if one.isdigit())
        if product != "RabbitMQ" or numbers < LEAST:
            connection.close()
            raise Unsupported(
                f"{where.shown}: {product} {version} is too old; millstream needs RabbitMQ"
                f" {'.'.join(map(str, LEAST))} or later: before it a lease ends after a minute at"
                " the earliest, and a release counts as a failure",
                engine=f"rabbitmq {version}",
            )
        return connection

    def _not_connected(self, error: Exception) -> MillstreamError:
        reasons = [error]
        while below := _below(reasons[-1]):  # pika wraps it again and again
            reasons.append(below)
        error = reasons[-1]
        text = str(error) or repr(error)
        number, do = errno.ECONNREFUSED, "is the server running, and are host and port right?"
        denied = amqp_errors.ProbableAuthenticationError | amqp_errors.AuthenticationError
        other = "is what listens there a RabbitMQ server, and with TLS or without as the address"
        other += " says?"
        if isinstance(error, denied):
            number = errno.EACCES
            do = "name user and password: rabbitmq://USER:PASSWORD@HOST:PORT"
        elif isinstance(error, amqp_errors.ProbableAccessDeniedError) or "vhost" in text:
            number = errno.EACCES
            do = f"is there a virtual host {self.address.vhost!r}, and may {self.address.user!r}"
            do += " use it?"
        elif any(isinstance(one, ssl.SSLError) for one in reasons) or "SSL" in text.upper():
            number, do = errno.EPROTO, "name the authority that signed it: ?tls_ca=FILE"
        elif isinstance(error, TimeoutError):
            number, do = errno.ETIMEDOUT, other
            text = f"no answer within {self._seconds:g} s"
        elif isinstance(error, PROTOCOL):
            number, do = errno.EPROTO, other
        return StorageError(
            number, f"cannot be connected to: {_plain(text)}; {do}", self.address.shown
        )

    async def channel(self) -> Channel:
        """A channel that nobody else uses."""
        while self._idle:
            if (found := self._idle.pop()).raw.is_open:
                return found
        return await self._opened()

    async def _opened(self) -> Channel:
        amqp = await self._ready()
        future: asyncio.Future[Any] = self.loop.create_future()
        amqp.channel(on_open_callback=lambda raw: _resolve(future, raw))
        return Channel(self, await asyncio.wait_for(future, self.timeout))

    def keep(self, channel: Channel) -> None:
        """Give a channel back that holds nothing any more."""
        if channel.raw.is_open and len(self._idle) < CHANNELS_KEPT:
            self._idle.append(channel)
        elif channel.raw.is_open:
            channel.raw.close()

    async def publisher(self) -> Publisher:
        """The channel on which all is put."""
        if self._publisher is None or not self._publisher.channel.raw.is_open:
            channel = await self._opened()
            made = Publisher(channel)
            await channel.ask("confirm_delivery", ack_nack_callback=made.answered)
            self._publisher = made
        return self._publisher

    # --- streams ----------------------------------------------------------------------------------

    async def wire(self) -> Wire:
        """The connection of the stream protocol; made anew where the last one was lost."""
        async with self._lock:
            if self._wire is None or not self._wire.is_connection_alive():
                where = self.address
                wire = Wire(where.host, where.stream_port, self._tls)
                try:
                    await asyncio.wait_for(
                        wire.begin(where.vhost, where.user, where.password), self._seconds
                    )
                except Exception as error:
                    await wire.close()
                    raise StorageError(
                        errno.ECONNREFUSED,
                        f"its port {where.stream_port} of streams cannot be connected to:"
                        f" {_plain(str(error) or repr(error))}; enable them on the server:"
                        " rabbitmq-plugins enable rabbitmq_stream, and name their port:"
                        " ?stream_port=PORT",
                        where.shown,
                    ) from error
                self._wire = wire
            return self._wire

    # --- calls ------------------------------------------------------------------------------------

    def call(self, work: Coroutine[Any, Any, Answer], seconds: float | None = None) -> Answer:
        """Run a coroutine on the loop and return what it returns.

        Raises: StorageError where the server cannot be reached, or does not answer.
        """
        try:
            return self._on_loop(work, seconds)
        except MillstreamError:
            raise
        except StreamDoesNotExist:
            raise
        except (amqp_errors.AMQPError, ServerError, TimeoutError, OSError) as error:
            text = str(error)
            if not text or isinstance(error, ServerError):
                text = f"{type(error).__name__} {text}"
            raise StorageError(
                errno.EIO,
                f"the server does not answer as it should: {_plain(text)}; is it running?",
                self.address.shown,
            ) from error

    def close(self) -> None:
        """Close it and end the thread."""
        if self._closed:
            return
        if self._pid != os.getpid():
            self._closed = True
            return

        async def end() -> None:
            if self._wire is not None:
                await self._wire.close()
            if self.amqp is not None and self.amqp.is_open:
                self.amqp.close()
                end = self.loop.time() + self.timeout
                while not self.amqp.is_closed and self.loop.time() < end:
                    await asyncio.sleep(0.005)

        ending = asyncio.run_coroutine_threadsafe(end(), self.loop)
        until = time.monotonic() + self.timeout
        while not ending.done() and time.monotonic() < until:
            self._thread.join(0.005)
        self._closed = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(self.timeout)


def _resolve(future: asyncio.Future[Any], found: Any) -> None:
    if not future.done():
        future.set_result(found)


def _below(error: object) -> Any:
    """What an error of pika is about; None: itself."""
    if several := getattr(error, "exceptions", None):
        return several[-1]
    if (one := getattr(error, "exception", None)) is not None:
        return one
    given: Any = getattr(error, "args", ())
    return given[0] if len(given) == 1 and isinstance(given[0], Exception) else None


def _plain(text: str) -> str:
    """An error of pika on one line, without its lists of frames."""
    return " ".join(text.split())[:300]


class Channel:
    """A channel of AMQP whose calls are awaited; what ends it ends all that waits on it."""

    def __init__(self, connection: RabbitConnection, raw: Any) -> None:
        self.connection = connection
        self.raw = raw
        self.error: Exception | None = None
        self._waiting: set[asyncio.Future[Any]] = set()
        self._got: Callable[[Any], None] | None = None
        raw.add_on_close_callback(self._on_close)
        raw.add_callback(self._on_empty, [pika.spec.Basic.GetEmpty], one_shot=False)

    def _on_close(self, _: object, error: Exception) -> None:
        self.error = error
        for future in self._waiting:
            if not future.done():
                future.set_exception(error)

    def _on_empty(self, _: object) -> None:
        if self._got is not None:
            self._got(None)

    def future(self) -> asyncio.Future[Any]:
        """A future that fails where the channel is closed."""
        made: asyncio.Future[Any] = self.connection.loop.create_future()
        self._waiting.add(made)
        made.add_done_callback(self._waiting.discard)
        return made

    async def ask(self, name: str, **arguments: Any) -> Any:
        """Call a method of pika's channel, and await its answer."""
        future = self.future()
        getattr(self.raw, name)(callback=lambda frame: _resolve(future, frame), **arguments)
        return await asyncio.wait_for(future, self.connection.timeout)

    async def get(self, queue: str) -> tuple[Any, Any, bytes] | None:
        """A message, or None where none is ready."""
        future = self.future()
        self._got = lambda found: _resolve(future, found)
        self.raw.basic_get(queue, lambda _, *found: _resolve(future, found))
        try:
            found: tuple[Any, Any, bytes] | None = await asyncio.wait_for(
                future, self.connection.timeout
            )
        finally:
            self._got = None
        return found

    async def barrier(self) -> None:
        """Return when the server has handled all that was sent on this channel before."""
        await self.ask("basic_qos", prefetch_count=0)


class Refused(Exception):
    """The server did not take a message: its queue is full."""


class Unroutable(Exception):
    """There is no queue for a message."""


class Publisher:
    """A channel with confirms."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._tag = 0
        self._open: dict[int, tuple[asyncio.Future[Any], str]] = {}
        self._returned: set[str] = set()
        channel.raw.add_on_return_callback(self._on_return)

    def _on_return(self, _: object, method: Any, properties: Any, body: object) -> None:
        self._returned.add(properties.message_id)

    def send(self, queue: str, body: bytes, properties: Any) -> asyncio.Future[Any]:
        """Send a message; what is returned is done when the server has it.

        Raises, through the future: Refused, Unroutable, AMQPError.
        """
        future = self.channel.future()
        self._tag += 1
        self._open[self._tag] = future, properties.message_id
        self.channel.raw.basic_publish("", queue, body, properties, mandatory=True)
        return future

    def answered(self, frame: Any) -> None:
        """Take up what the server says of one message, or of all up to it."""
        method = frame.method
        first = method.delivery_tag
        tags = [first]
        if method.multiple:
            tags = [tag for tag in self._open if tag <= first]
        for tag in tags:
            future, named = self._open.pop(tag, (None, ""))
            returned = named in self._returned
            self._returned.discard(named)
            if future is None or future.done():
                continue
            if isinstance(method, pika.spec.Basic.Nack):
                future.set_exception(Refused())
            elif returned:
                future.set_exception(Unroutable())
            else:
                future.set_result(None)
