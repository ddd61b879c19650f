"""The store, as its transactions know it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from millstream.disk.session import Session
    from millstream.queues.queue import Queue
    from millstream.streams.stream import Stream
    from millstream.transactions.journal import Journal
    from millstream.transactions.transaction import Transaction

__all__ = ["Holdings"]


class Holdings(Protocol):
    """Streams and queues by name, and what is under way over them."""

    session: Session
    under_way: set[Transaction]

    def stream(self, name: str, /) -> Stream:
        """A stream that is there. Raises NotFound."""
        ...

    def queue(self, name: str, /) -> Queue:
        """A queue that is there. Raises NotFound."""
        ...

    def stream_names(self) -> list[str]:
        """Names of all streams, the journal among them."""
        ...

    def queue_names(self) -> list[str]:
        """Names of all queues."""
        ...

    def open_queues(self) -> Iterator[Queue]:
        """The handles that this process has."""
        ...

    def flush(self) -> None:
        """Sync all of it."""
        ...

    def journal(self) -> Journal:
        """The journal, made by the first transaction."""
        ...

    def journal_stream(self, config: dict[str, Any], /) -> Stream:
        """A handle to the stream in which the journal is."""
        ...
