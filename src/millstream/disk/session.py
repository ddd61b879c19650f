"""A store as this process has it open: id, state, members, clock, what this process may do."""

from __future__ import annotations

from millstream import _native
from millstream.disk import files
from millstream.errors import Closed, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from millstream.disk.clock import StoreClock
    from millstream.disk.members import Members
    from millstream.disk.notices import Notices, Undecided
    from millstream.options import Durability

__all__ = ["Session", "State"]


class State:
    """How far the opening or closing of a store is. No `enum`: opening a store imports little.

    OPENING: nobody can call it yet, and what fails has nothing to close.
    REPLAYING: this process alone is there, and applies what transactions had committed.
    """

    OPENING, REPLAYING, OPEN, CLOSED = range(4)


CALLABLE = (State.REPLAYING, State.OPEN)
LOCK_SECONDS = 30.0
"""How long a call waits for a word or a file that another process has, where it gives no time."""
LATE_SECONDS = 3.0
"""What waits at level `interval` for longer is synced by the next append, put or commit."""


class Session:
    """What a store is, its members, and what this process may do there.

    Attributes:
        path: the directory, as it was given.
        directory: the same, held open: what is opened later belongs to it, wherever `path` leads by
            then.
        root: the path of what lies in it.
        spare: descriptors for looking at it where none is left.
        writable: False: it was opened with mode="r".
        id: 16 bytes that no other store has.
        generation: the number that the first opener after an unclean end raises.
        clean: was it closed cleanly before the first of those who have it open?
        durability: the stored level; `asked` is that of the call that opened it, if it named one.
        private: a reader of a store that needs recovery has control files in its own memory.
        layered: it lies on an overlay; `follows_layers`: and what is mapped may be left behind.
        temporary: its directory goes when it is closed, and nothing in it is synced.
    """

    id: bytes
    generation: int
    clean: bool
    clock: StoreClock
    members: Members
    notices: Notices
    undecided: Undecided

    def __init__(self, directory: files.Directory, durability: Durability, *, writable: bool):
        self.path = directory.text
        self.directory = directory
        self.root = directory.path
        self.spare = files.Spare(directory)
        self.writable = writable
        self.durability: Durability = durability
        self.asked: Durability | None = None
        self.private = False
        self.layered = False
        self.temporary = False
        self.state = State.OPENING
        self.fork = _native.fork_count()

    @property
    def level(self) -> Durability:
        """What an append has survived where neither stream, handle nor call say it."""
        return self.asked or self.durability

    @property
    def follows_layers(self) -> bool:
        """Can a process that writes leave what is mapped here behind, on a lower layer?"""
        return self.layered and not self.writable

    @property
    def replaying(self) -> bool:
        """Are transactions of before being applied, and is nobody else there?"""
        return self.state == State.REPLAYING

    @property
    def inherited(self) -> bool:
        """Was it opened by the parent of this process?"""
        return self.fork != _native.fork_count()

    @property
    def closed(self) -> bool:
        """Is there nothing here that can be called?"""
        return self.state not in CALLABLE or self.fork != _native.fork_count()

    @property
    def config_path(self) -> files.Path:
        """The file that makes a store of the directory."""
        return self.root / "store.json"

    def stream_path(self, name: str) -> files.Path:
        """The directory of a stream."""
        return self.root / "streams" / name

    def queue_path(self, name: str) -> files.Path:
        """The directory of a queue."""
        return self.root / "queues" / name

    def close(self) -> None:
        """Let go of the directory."""
        self.spare.close()
        self.directory.close()

    def check_open(self) -> None:
        """Raise `Closed` where it is not."""
        # By hand what `closed` and `inherited` ask: every call comes here, some several times.
        if self.fork != _native.fork_count():
            raise Closed(
                f"{self.path}: the store was inherited through a fork; open it again in the child"
            )
        if self.state not in CALLABLE:
            raise Closed(f"{self.path}: the store is closed")

    def check_writable(self) -> None:
        """Raise `Closed`, or `Unsupported` where it is open to read only."""
        self.check_open()
        if not self.writable:
            raise Unsupported(f"{self.path}: the store was opened read-only (mode='r')")

    def check_layer(self, path: str, is_behind: Callable[[], bool]) -> None:
        """Refuse a reader whose maps stayed on the lower layer of an overlay."""
        if self.follows_layers and is_behind():
            raise Closed(
                f"{path}: a process that writes has had the file copied to the upper layer of this"
                " overlay, and what is mapped here is the one below: open the store again"
            )
