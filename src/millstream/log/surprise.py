"""What a mistaken name may have made: who finds nothing in it is told so, once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from millstream.errors import MillstreamWarning
from millstream.log import settings


def point_out(where: str, what: str, name: str, there: Sequence[str]) -> None:
    """Warn whoever called the package that a stream or queue was made just now, by its name alone.

    `there`: the names of all that there are.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith("millstream."):
        frame, level = frame.f_back, level + 1
    others = settings.others(name, [one for one in there if one != name])
    warnings.warn(
        f"{where}: the {what} {name!r} was not there: it was made just now, and there is nothing to"
        f" read. {others} With create=False that is NotFound; with create=True it is meant",
        MillstreamWarning,
        stacklevel=level,
    )
