"""What an engine can do: names that all engines share, and what each says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from millstream.errors import InvalidArgument, InvalidType, Unsupported

__all__ = ["NAMES", "Capabilities", "Capability", "Level"]

Level: TypeAlias = Literal["native", "emulated", "none"]
"""Done by the engine; by us above it, as well as the note says; or refused."""

NAMES: dict[str, str] = {
    "stream.null": "values of None (tombstones) stay apart from empty ones",
    "stream.headers": "records have headers",
    "stream.timestamp": "records keep the timestamps that their writers give them",
    "stream.partitions": "a key goes to the partition that xxh3-64 says, on every engine",
    "stream.add_partitions": "partitions can be added",
    "stream.atomic_append": "a partition's share of `append_many` is seen whole or not at all",
    "stream.start_at_offset": "reading begins at an offset; beyond the end it raises",
    "stream.start_at_time": "reading begins at a time",
    "stream.get": "one record can be read by its position",
    "stream.group": "groups keep positions: commit, seek, lag",
    "stream.rebalance": "members of a group share the partitions",
    "stream.fenced_commit": "who lost a partition cannot commit in it",
    "stream.retention": "old records are removed by age, bytes or count, as the limits say",
    "stream.delete_before": "records before a position can be removed",
    "stream.compaction": "the last record of each key is kept",
    "stream.view": "the latest value of each key, in memory",
    "stream.producer": "what a producer sends again, at any time, adds nothing",
    "stream.transaction": "appends to several streams happen all or not at all",
    "queue.priority": "messages of a higher priority come first, strictly",
    "queue.delay": "a message comes after a delay, or at a time",
    "queue.ttl": "a message that is too old is not delivered",
    "queue.dedup": "a `dedup_id` is stored once within a window",
    "queue.key_order": "messages of one key are done one after the other",
    "queue.lease": "a message comes again when its lease is over",
    "queue.fenced_ack": "an acknowledgement behind the end of the lease is refused",
    "queue.extend": "a lease can be made longer",
    "queue.nack_delay": "a failed message comes again after a delay",
    "queue.release": "a message can be given back without being counted",
    "queue.attempts": "leases are counted, up to a limit",
    "queue.hang_counted": "a lease that ran out counts as an attempt",
    "queue.dead_letters": "a message that is tried no more is kept, with the reason",
    "queue.redrive": "dead letters can be tried again",
    "queue.peek": "messages can be read without taking them",
    "queue.cancel": "a message can be removed by its id",
    "queue.purge": "all ready messages can be removed",
    "queue.depth": "messages can be counted by state",
    "queue.capacity": "puts beyond a number of messages are refused",
    "queue.pause": "deliveries can be paused",
    "queue.worker": "functions can be registered, and run by `run` and `Worker`",
    "queue.transaction": "acknowledgements and puts happen all or not at all",
    "durability.process": "what was answered survives the death of any process, the server's too",
    "durability.interval": "it survives a power cut, but for the last `limits` seconds",
    "durability.sync": "it survives a power cut",
}
"""Every capability, and what it promises where its level is not "none"."""


@dataclass(frozen=True, slots=True)
class Capability:
    """What an engine says of one capability.

    Attributes:
        level: "native", "emulated" (by millstream, with the engine's own means) or "none".
        note: what differs from a store in a directory; of "none": what to do instead.
        limits: bounds by name, in the units that the name says.

    >>> Capability("native", limits={"records": 1000}).limits["records"]
    1000
    """

    level: Level
    note: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)


class Capabilities(Mapping[str, Capability]):
    """The capabilities of an engine, by name; it answers for each of `NAMES`.

    Args:
        engine: its name and version.
        known: what it says; a name that is left out is "none".

    >>> some = Capabilities("toy 1.0", {"queue.delay": Capability("native")})
    >>> some["queue.delay"].level, some["queue.ttl"].level
    ('native', 'none')
    """

    def __init__(self, engine: str, known: Mapping[str, Capability]) -> None:
        for name in known:
            _check(name)
        self.engine = engine
        self._known = dict(known)

    def __getitem__(self, name: str) -> Capability:
        return self._known.get(_check(name)) or Capability("none")

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)

    def __repr__(self) -> str:
        able = sum(one.level != "none" for one in self.values())
        return f"<Capabilities of {self.engine}: {able} of {len(self)}>"

    def require(self, *names: str, emulated: bool = True) -> None:
        """Return where the engine has all of them.

        Args:
            names: some of `NAMES`.
            emulated: is what is emulated enough?

        Raises: Unsupported, which names the first that it has not; InvalidArgument.
        """
        for name in names:
            found = self[name]
            if found.level == "none" or (found.level == "emulated" and not emulated):
                raise self.refusal(name)

    def refusal(self, name: str) -> Unsupported:
        """The error of a call that needs what the engine has not."""
        found = self[name]
        instead = found.note
        if found.level == "emulated":
            short = name.partition(".")[2]
            instead = f"millstream can emulate it: emulate={{{short!r}}} says that you agree"
        return Unsupported(capability=name, engine=self.engine, instead=instead)

    def consent(self, kind: str, emulate: object) -> frozenset[str]:
        """Check what a caller agreed to have emulated; as whole names.

        Args:
            kind: "stream" or "queue".
            emulate: a collection of names without their kind.

        Raises: InvalidArgument, InvalidType; Unsupported where the engine cannot emulate it.
        """
        if isinstance(emulate, str | bytes) or not hasattr(emulate, "__iter__"):
            raise InvalidType(f"emulate {emulate!r}: expected a set of names")
        names = frozenset(f"{kind}.{one}" for one in emulate)
        for name in sorted(names):
            if self[name].level == "none":
                raise self.refusal(name)
        return names


def _check(name: object) -> str:
    if not isinstance(name, str):
        raise InvalidType(f"capability {name!r}: expected str")
    if name not in NAMES:
        kinds = sorted(one for one in NAMES if one.startswith(name.partition(".")[0] + "."))
        raise InvalidArgument(
            f"capability {name!r}: is not known; there are {', '.join(kinds or NAMES)}"
        )
    return name


# Public names have one home, whatever file they are in; pickles and tracebacks say it.
Capability.__module__ = "millstream"
