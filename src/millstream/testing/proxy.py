"""A proxy on loopback between a client and its server, which cuts connections and slows them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from millstream import _native
from millstream.errors import InvalidArgument

__all__ = ["Proxy"]

PIECE = 1 << 16


class Proxy:
    """Passes on what comes to a port of its own; for tests of what a network does.

    Attributes:
        port: where it listens, on 127.0.0.1.
        delay: seconds by which each piece comes later, in both directions.

    >>> with socket.create_server(("127.0.0.1", 0)) as server:
    ...     with Proxy("127.0.0.1", server.getsockname()[1]) as proxy:
    ...         client = socket.create_connection(("127.0.0.1", proxy.port))
    ...         other, _ = server.accept()
    ...         client.sendall(b"x")
    ...         print(other.recv(1))
    ...         proxy.cut()
    ...         print(other.recv(1), client.recv(1))
    ...         client.close(), other.close()
    b'x'
    b'' b''
    (None, None)
    """

    def __init__(self, host: str, port: int) -> None:
        self._to = host, port
        self.delay = 0.0
        self._lock = _native.Lock("connections of a proxy")
        self._open: set[socket.socket] = set()
        self._ended = False
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, name="millstream-proxy", daemon=True).start()

    def through(self, address: str) -> str:
        """The address of the server with our port in place of its own."""
        host = f"{self._to[0]}:{self._to[1]}"
        if host not in address:
            raise InvalidArgument(f"address {address!r}: does not name {host}")
        return address.replace(host, f"127.0.0.1:{self.port}", 1)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:  # it was closed
                return
            try:
                if self._ended:
                    raise ConnectionRefusedError
                server = socket.create_connection(self._to, 10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._open |= {client, server}
            for one, other in ((client, server), (server, client)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(
                    target=self._pass, args=(one, other), name="millstream-proxy", daemon=True
                ).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):  # somebody has closed it
            while piece := one.recv(PIECE):
                if self.delay:
                    time.sleep(self.delay)
                other.sendall(piece)
        self._close(one, other)

    def _close(self, *ends: socket.socket) -> None:
        for end in ends:
            with self._lock:
                self._open.discard(end)
            with contextlib.suppress(OSError):  # it is closed already
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self) -> None:
        """Close all connections that there are; new ones are let through."""
        with self._lock:
            ends = list(self._open)
        self._close(*ends)

    def close(self) -> None:
        """End it."""
        self._ended = True
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
