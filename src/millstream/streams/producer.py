"""An idempotent producer: what it sends again, after a crash say, adds nothing."""

from __future__ import annotations

from millstream import _native
from millstream.errors import InvalidArgument
from millstream.log.producer_ids import ids_of
from millstream.log.sequences import sequences_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from millstream.streams.stream import Stream

__all__ = ["Producer"]


class Producer(_native.ProducerCore):
    """A producer of a stream; made by `Stream.producer`.

    Thread-safe. Pickles by its stream and id. `append` and `append_many` are the extension's own.

    Attributes:
        stream: where it appends.
        id: its name, the same for ever.
    """

    def __init__(self, stream: Stream, id: str) -> None:
        stream.session.check_writable()
        self.stream = stream
        self.id = id
        if str(id).startswith("@"):
            raise InvalidArgument(f"producer id {id!r}: ids that begin with @ are millstream's own")
        self._number = ids_of(stream).number(id)
        self._begin(stream, self._number)

    @property
    def last_sequence(self) -> int:
        """The last sequence of the last call whose records are all in the stream; -1: none.

        A process that begins anew goes on behind it: ``range(producer.last_sequence + 1, ...)``. A
        call of `append_many` of which a kill left the shares of some partitions does not count:
        sending it again adds the others. With several partitions it is the highest of all; each
        partition alone is `last_sequences`, which also shows what a power cut took from one of
        them.
        """
        return max(whole for _, whole in self._known())

    @property
    def last_sequences(self) -> tuple[int, ...]:
        """The last sequence in each partition; -1: none. What is not above it is a re-send."""
        return tuple(last for last, _ in self._known())

    def _known(self) -> list[tuple[int, int]]:
        self._check()
        logs = (self.stream._log(index) for index in range(self.stream.partitions))
        return [sequences_of(log).of(self._number) for log in logs]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " (closed)" if self.closed else ""
        return f"<Producer {self.id!r} of stream {self.stream.name!r}{state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Producer, (self.stream, self.id)


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Producer.__module__ = "millstream"
