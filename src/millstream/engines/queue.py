"""What every engine over a server does alike: queues."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from millstream.errors import InvalidType, LeaseLost
from millstream.queue_errors import Empty

if TYPE_CHECKING:
    from collections.abc import Sequence

    from millstream.engines.protocols import Message

__all__ = ["ServerQueue", "moment"]

Leased = TypeVar("Leased", bound="Message")


def moment(microseconds: int) -> datetime:
    """A time as a datetime in UTC."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)


class ServerQueue(Generic[Leased]):
    """Base of the queues of engines: each brings how messages are put, leased and ended."""

    store: Any
    name: str
    connection: Any
    _codec: Any

    if TYPE_CHECKING:

        def get_many(self, count: int, *, timeout: float | None = None) -> list[Leased]:
            """Lease up to so many."""

    @property
    def where(self) -> str:
        """What errors call it."""
        return f"{self.store.path}, queue {self.name!r}"

    def _encoded(self, value: Any) -> bytes:
        if self._codec is not None:
            return bytes(self._codec.encode(value))
        try:
            return bytes(memoryview(value))
        except TypeError as error:
            raise InvalidType(
                f"value: expected bytes-like, found {type(value).__name__}; or open with a codec"
            ) from error

    def decoded(self, data: bytes) -> Any:
        """A payload as the codec reads it."""
        return data if self._codec is None else self._codec.decode(data)

    def get(self, *, timeout: float | None = None) -> Leased:
        """Lease the next message. Raises Empty."""
        found = self.get_many(1, timeout=timeout)
        if not found:
            raise Empty(f"{self.where}: no message came in time")
        return found[0]

    def ack_many(self, messages: Sequence[Leased]) -> list[Leased]:
        """Acknowledge many, and return those whose lease was lost before."""
        lost = []
        for message in messages:
            try:
                message.ack()
            except LeaseLost:
                lost.append(message)
        return lost

    def __bool__(self) -> bool:
        return True

    def flush(self, *, timeout: float | None = None) -> None:
        """Return at once: a put that has returned is as durable as the server makes it."""
        self.connection.check_open()
