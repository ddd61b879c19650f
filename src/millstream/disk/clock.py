"""The store's clock: what is relative, and what has an age, is measured by it.

It begins as the wall clock when the store is made, in microseconds since 1970, and goes on with
CLOCK_BOOTTIME, which nobody sets. No file holds its reading: within a boot it is CLOCK_BOOTTIME and
a constant, and `store.json` has the constant with the id of the boot. Only across boots the wall
clock says how much time has passed; a step back counts as none. The wall clock may be wrong, so
what it says is not enough to delete: it counts as age only as the machine runs on, a day for each
hour (docs/design.md, Time).
"""

from __future__ import annotations

from millstream import _native
from millstream.disk import files
from millstream.errors import CorruptBatch, StorageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["StoreClock"]

DAY = 86_400_000_000
LEAST = 1_577_836_800_000_000
"""2020: a wall clock that is before it was never set."""
MOST = 1 << 61
CONFIRMED = 24
"""So many times as fast as the machine runs is believed what the wall clock said over a boot."""
GAPS_MOST = 32
FIELDS = ("offset", "since", "seen", "wall")


class Gap:
    """A boot, over which the wall clock said how much time had passed.

    `at` is the store's clock behind it, `doubted` what nothing has confirmed yet, `void` what was
    not so: the wall clock was set back in the same boot.
    """

    __slots__ = ("at", "doubted", "void")

    def __init__(self, at: int, doubted: int, void: int = 0) -> None:
        self.at = at
        self.doubted = doubted
        self.void = void


def _boot() -> str:
    """Id of this boot; "": not known here, so that each first opening counts as a boot."""
    try:
        return files.boot()
    except (StorageError, ValueError):
        return ""


class StoreClock:
    """The clock of one store, as this process has it open.

    Attributes:
        offset: microseconds to add to CLOCK_BOOTTIME.
        since: what a time in a file counts as that this clock cannot have given, since it lies
            ahead of it or before anybody's wall clock: when the clock began, or when it went on and
            did not know how much time had passed.
    """

    __slots__ = ("_boot", "_gaps", "_seen", "_wall", "offset", "since")

    def __init__(
        self,
        saved: dict[str, Any] | None = None,
        noted: tuple[int, int] | None = None,
        *,
        joins: bool = False,
        clean: bool = True,
    ) -> None:
        """Go on with what `store.json` has, and what a member noted last.

        `joins`: others have the store open, so that it is their boot.
        """
        boot, wall = _native.boot_us(), _native.wall_us()
        self._boot = _native.virtual_clock() or _boot()
        self._gaps: list[Gap] = []
        if saved is None:  # a new store, or one of an earlier version
            self.offset, self.since, self._seen, self._wall = wall - boot, wall, wall, wall
            return
        try:
            self.offset, self.since, self._seen, self._wall = (int(saved[name]) for name in FIELDS)
            self._gaps = [Gap(*map(int, gap)) for gap in saved["gaps"]]
            its_boot = str(saved["boot"])
            if any(abs(int(saved[name])) > MOST for name in FIELDS):
                raise ValueError("a time that there is not")
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptBatch(f"store.json: not the state of a clock: {error!r}") from error
        if noted is None or noted[0] < self._seen:
            noted = self._seen, self._wall
        if joins or (self._boot and its_boot == self._boot and self.offset + boot >= noted[0]):
            return
        self._go_on(*noted, boot, wall, clean=clean)

    def _go_on(self, seen: int, then: int, boot: int, wall: int, *, clean: bool) -> None:
        """Another boot: the time since it was last seen is what the wall clock says."""
        known = min(then, wall) >= LEAST
        passed = max(0, wall - then) if known else 0
        self._gaps = self._doubts(seen, then)
        self._seen, self._wall = seen + passed, wall
        self.offset = self._seen - boot
        if passed:
            self._gaps.append(Gap(self._seen, passed))
        if not (clean and passed):
            self.since = self._seen

    def _doubts(self, now: int, wall: int) -> list[Gap]:
        """The gaps of which not all is confirmed, as of a moment of the boot that was saved last.

        As the machine runs, the oldest are believed first; where the wall clock was set back since,
        it had said too much over the last one.
        """
        if not self._gaps:
            return self._gaps
        ran = now - self._seen
        back, confirmed = max(0, ran - (wall - self._wall)), max(0, CONFIRMED * ran)
        gaps = [Gap(gap.at, gap.doubted, gap.void) for gap in self._gaps]
        last = gaps[-1]
        wrong = min(back, last.doubted)
        last.doubted, last.void = last.doubted - wrong, last.void + wrong
        for gap in gaps:
            sure = min(confirmed, gap.doubted)
            gap.doubted, confirmed = gap.doubted - sure, confirmed - sure
        gaps = [gap for gap in gaps if gap.doubted or gap.void]
        while len(gaps) > GAPS_MOST:  # as if both had been at the later one: nothing gets older
            first = gaps.pop(0)
            gaps[0].doubted, gaps[0].void = (
                gaps[0].doubted + first.doubted,
                gaps[0].void + first.void,
            )
        return gaps

    def now(self) -> int:
        """Microseconds of this clock."""
        return self.offset + _native.boot_us()

    def note(self) -> tuple[int, int]:
        """What a member notes now and then: (this clock, the wall clock)."""
        return self.now(), _native.wall_us()

    def state(self) -> dict[str, Any]:
        """What `store.json` is to have."""
        now, wall = self.note()
        return {
            "boot": self._boot,
            **dict(zip(FIELDS, (self.offset, self.since, now, wall), strict=True)),
            "gaps": [(gap.at, gap.doubted, gap.void) for gap in self._doubts(now, wall)],
        }

    def age(self, stamp: int) -> float:
        """Seconds that have passed for sure since a time that a file has."""
        now, wall = self.note()
        if stamp > now + DAY or stamp < LEAST <= self.since:
            stamp = self.since
        gaps = self._doubts(now, wall)
        unsure = sum(gap.doubted + gap.void for gap in gaps if stamp < gap.at)
        return max(0, now - stamp - unsure) / 1e6

    def to_wall(self, stamp: int) -> int:
        """A time that a file has, as the wall clock would have it, for people."""
        now, wall = self.note()
        return stamp + wall - now
