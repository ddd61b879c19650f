"""What handles know of the store that made them: a protocol, imported for types alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from millstream.disk.session import Session

__all__ = ["OpenStore"]


class OpenStore(Protocol):
    """The `millstream.Store` that made a handle, as far as its handles know it."""

    session: Session

    @property
    def path(self) -> str:
        """The directory."""
        ...

    @property
    def closed(self) -> bool:
        """Is it closed?"""
        ...

    def stream(self, name: str, *rest: Any, **settings: Any) -> Any:
        """Open a stream."""
        ...

    def queue(self, name: str, *rest: Any, **settings: Any) -> Any:
        """Open a queue."""
        ...

    def streams(self) -> list[str]:
        """Names of the streams, sorted."""
        ...

    def queues(self) -> list[str]:
        """Names of the queues, sorted."""
        ...

    def transaction(self, *rest: Any, **settings: Any) -> Any:
        """Change streams, queues and positions of consumers all at once, or not at all."""
        ...

    def flush(self, *rest: Any, **settings: Any) -> None:
        """Return when all that was stored here before this call survives a power cut."""
        ...
