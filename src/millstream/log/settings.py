"""The configuration of streams: what users give, checked, and what `stream.json` holds of it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

from millstream import _native
from millstream.disk import files
from millstream.errors import (
    Closed,
    ConfigMismatch,
    CorruptBatch,
    InvalidArgument,
    InvalidType,
    NotFound,
)
from millstream.options import DURABILITIES, Compaction, Retention, boolean, integer, parse_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeAlias, TypeVar

    from millstream.disk.session import Session
    from millstream.options import Durability

    OnMismatch: TypeAlias = Literal["raise", "alter", "keep"]

    class Numbered(Protocol):
        """A handle of what has a number of its configuration in shared memory."""

        def _begin_config(self) -> None: ...
        def _end_config(self) -> None: ...

    class Handles(Protocol):
        """The streams or the queues of a store."""

        _session: Session
        _directory: files.Path

    Asked = ParamSpec("Asked")
    Made = TypeVar("Made")
    Some = TypeVar("Some", bound=Handles)
    Opening: TypeAlias = Callable[Concatenate[Some, str, Asked], Made]


NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
PARTITIONS_MAX = 4096
SEGMENT_BYTES = 128 << 20
SURPRISE_SECONDS = 1.0
"""How long a reader, in short waits, finds nothing until it is told that a mistaken name may have
made what it reads."""
JOURNAL = "@journal"
"""Directory of the journal among the streams: no stream of a user can have that name."""


def is_name(name: str) -> bool:
    """Can a stream be called that?"""
    return 0 < len(name) <= 128 and name[0] != "." and NAME_CHARACTERS.issuperset(name)


def check_name(name: str) -> str:
    """Names never become paths: a short list of characters, no leading dot."""
    if not isinstance(name, str):
        raise InvalidType(f"name {name!r}: expected str")
    if not is_name(name):
        raise InvalidArgument(
            f"name {name!r:.80}: expected 1 to 128 characters of A-Z a-z 0-9 . _ - without a"
            " leading dot"
        )
    return name


def check_partitions(partitions: int) -> int:
    """How many partitions a stream can have."""
    return integer("partitions", partitions, 1, PARTITIONS_MAX)


def check_segment_bytes(size: int | str) -> int:
    """The size rounded up to pages."""
    size = parse_bytes(size)
    if not 1 << 16 <= size <= 2 << 30:
        raise InvalidArgument(f"segment_bytes {size!r}: expected from 64 KiB to 2 GiB")
    return size + 4095 & ~4095


def check_durability(durability: Any) -> Durability | None:
    """One of the levels, or None."""
    known = isinstance(durability, str) and durability in DURABILITIES
    if durability is not None and not known:
        raise InvalidArgument(
            f"durability {durability!r}: expected one of {', '.join(DURABILITIES)}"
        )
    checked: Durability | None = durability
    return checked


def retention_config(retention: Any) -> dict[str, Any]:
    """A retention as `stream.json` has it; None: everything is kept."""
    if retention is None:
        retention = Retention()
    if not isinstance(retention, Retention):
        raise InvalidType(f"retention {retention!r}: expected a millstream.Retention or None")
    return {"bytes": retention.bytes, "age": retention.age, "records": retention.records}


def compaction_config(compact: Any) -> dict[str, Any] | None:
    """A compaction as `stream.json` has it; None: there is none."""
    if compact is not None and not isinstance(compact, Compaction):
        raise InvalidType(f"compact {compact!r}: expected a millstream.Compaction or None")
    return None if compact is None else compact.as_dict()


def compaction_of(config: dict[str, Any]) -> Compaction | None:
    """The compaction that a `stream.json` has."""
    stored = config.get("compact")
    return None if stored is None else Compaction(**stored)


@contextlib.contextmanager
def changing(handle: Numbered) -> Iterator[None]:
    """Write a configuration file in the block; every process takes it over at its next call.

    For the holder of maintenance. The number in shared memory is even meanwhile: whoever sees that
    reads the file again at each call, until it is odd. Where the writer was killed, the next one to
    see it and to get the word makes it odd.
    """
    handle._begin_config()
    try:
        yield
    finally:
        handle._end_config()


def check_on_mismatch(value: object) -> None:
    """One of the three ways to deal with other settings than those that are stored."""
    if not isinstance(value, str) or value not in ("raise", "alter", "keep"):
        raise InvalidArgument(f'on_mismatch {value!r}: expected "raise", "alter" or "keep"')


def mismatch(what: str, stored: dict[str, Any], differing: dict[str, Any]) -> ConfigMismatch:
    """The error that names the first setting which is another one than the caller named."""
    field, value = next(iter(differing.items()))
    return ConfigMismatch(
        f"{what} has {field} {stored.get(field)}, not {value}; leave it out, change it with"
        ' alter(), or open with on_mismatch="alter" (change it) or "keep" (as it is)'
    )


def differing(
    stored: dict[str, Any], given: dict[str, Any], durability: Durability | None
) -> dict[str, Any]:
    """What the caller named, where something else is stored."""
    named = {**given, "durability": durability}
    return {
        field: value
        for field, value in named.items()
        if value is not None and stored.get(field) != value
    }


def require_more(name: str, stored: int, partitions: int) -> None:
    """Raise `ConfigMismatch` for fewer partitions than there are."""
    if partitions < stored:
        raise ConfigMismatch(
            f"stream {name!r} has {stored} partitions, not {partitions}: they can be added, never"
            " removed; leave it out"
        )


SHOWN = 10


def check_create(create: object) -> bool:
    """May it be made where it is not there?"""
    return create is None or boolean("create", create)


def others(name: str, there: Sequence[str]) -> str:
    """A sentence about what there is beside a name: what looks like it, or else the first ones."""
    with _native.loading:
        import difflib
    if close := difflib.get_close_matches(name, there, 3):
        return f"Did you mean {' or '.join(map(repr, close))}?"
    if not there:
        return "There is none."
    more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
    return (
        f"There {'is' if len(there) == 1 else 'are'} {', '.join(map(repr, there[:SHOWN]))}{more}."
    )


def is_missing(path: files.Path, what: str) -> bool:
    """Is there no configuration, and no stream or queue? CorruptBatch where there is one."""
    while True:
        directory = files.inode(path.parent)  # another process may be making it, or dropping it
        if files.exists(path):
            return False
        if directory == 0:
            return True
        if files.exists(path.parent / files.LEFT):  # it was dropped, and goes
            return True
        if files.inode(path.parent) == directory:
            raise CorruptBatch(
                f"{path}: is missing, where the {what} is; restore it from a backup", path=path
            )


def once_more(what: str) -> Callable[[Opening[Some, Asked, Made]], Opening[Some, Asked, Made]]:
    """Open a stream or a queue again that another process dropped in the middle of it."""

    def wrap(work: Opening[Some, Asked, Made]) -> Opening[Some, Asked, Made]:
        @functools.wraps(work)
        def opened(self: Some, name: str, /, *asked: Asked.args, **named: Asked.kwargs) -> Made:
            check_name(name)
            try:
                return work(self, name, *asked, **named)
            except (Closed, NotFound):
                self._session.check_open()
                if not is_missing(self._directory / name / f"{what}.json", what):
                    raise
                return work(self, name, *asked, **named)

        return opened

    return wrap


def missing(where: str, what: str, name: str, there: Sequence[str]) -> NotFound:
    """The error for a name that is not there, whoever made it since."""
    text = others(name, [one for one in there if one != name])
    return NotFound(f"{where}: there is no {what} {name!r}. {text}")


def given(
    partitions: int | None,
    retention: Retention | None,
    segment_bytes: int | str | None,
    compact: Compaction | None = None,
) -> dict[str, Any]:
    """What the caller of `Store.stream` asks for, checked; None: whatever is stored."""
    return {
        "partitions": None if partitions is None else check_partitions(partitions),
        "segment_bytes": None if segment_bytes is None else check_segment_bytes(segment_bytes),
        "retention": None if retention is None else retention_config(retention),
        "compact": compaction_config(compact),
    }


def new(asked: dict[str, Any], durability: Durability | None) -> dict[str, Any]:
    """The configuration of a new stream."""
    return {
        "format": files.FORMAT,
        "stream_id": os.urandom(8).hex(),
        "partitions": asked["partitions"] or 1,
        "hash": "xxh3-64",
        "segment_bytes": asked["segment_bytes"] or SEGMENT_BYTES,
        "retention": asked["retention"] or retention_config(None),
        "compact": asked["compact"],
        "durability": durability,
    }
