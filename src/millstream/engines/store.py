"""What every engine over a server does alike: the store."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from millstream import StoreStats
from millstream.errors import ConfigMismatch, InvalidArgument, MillstreamError, Unsupported
from millstream.options import DURABILITIES

if TYPE_CHECKING:
    from typing import Self

    from millstream.capabilities import Capabilities
    from millstream.options import Durability

__all__ = ["ServerStore"]


class ServerStore:
    """Base of the stores of engines: each brings a connection, capabilities, streams, queues."""

    connection: Any
    _capabilities: Capabilities
    path: str
    writable: bool
    durability: Durability
    streams: Any
    queues: Any
    stream: Any
    queue: Any
    _closed = True
    """Until it is open."""

    @property
    def engine(self) -> str:
        """Its name and the version of the server."""
        return self._capabilities.engine

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do, by name."""
        return self._capabilities

    def require(self, *names: str, emulated: bool = True) -> None:
        """Raise `Unsupported` where the engine lacks one of these capabilities."""
        self.connection.check_open()
        self._capabilities.require(*names, emulated=emulated)

    def check_writable(self) -> None:
        """Raise Unsupported where it was opened to read."""
        if not self.writable:
            raise Unsupported(f"{self.path}: the store was opened read-only (mode='r')")

    def level(self, durability: object) -> Durability:
        """Check a level that a caller named against what the engine can do."""
        if durability not in DURABILITIES:
            raise InvalidArgument(
                f"durability {durability!r}: expected one of {', '.join(DURABILITIES)}"
            )
        self._capabilities.require(f"durability.{durability}")
        found: Durability = durability
        return found

    def _compare(
        self,
        kind: str,
        name: str,
        stored: dict[str, Any],
        named: dict[str, Any],
        on_mismatch: str,
    ) -> None:
        if on_mismatch not in ("raise", "alter", "keep"):
            raise InvalidArgument(f'on_mismatch {on_mismatch!r}: expected "raise" or "keep"')
        if on_mismatch == "keep":
            return
        for field, value in named.items():
            if value is not None and stored.get(field) != value:
                raise ConfigMismatch(
                    f"{self.path}: {kind} {name!r} has {field} {stored.get(field)}, not {value};"
                    ' leave it out, open with on_mismatch="keep", or make another one'
                )

    def stats(self) -> StoreStats:
        """The store in numbers: each stream, group and queue that millstream made there."""
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
            queues=tuple(self.queue(name, create=False).stats() for name in self.queues()),
        )

    def processes(self) -> list[Any]:
        """None: a server knows connections, which its own tools show."""
        return []

    @property
    def closed(self) -> bool:
        """Is the handle closed?"""
        return self._closed

    def close(self) -> None:
        """Close the connection. What was answered is stored; nothing else is left to do."""
        if not self._closed:
            self._closed = True
            self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            try:
                self.close()
            except MillstreamError:  # there is nobody to tell
                return
