"""Plots of what was measured in rounds: lines of blocks for a terminal, SVG files by matplotlib.

Bars end at the median of their rounds and show how far the rounds lie apart; curves go through the
medians. The project's benchmarks draw their report with this, too.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from millstream.cli.output import Output, cell_width, fold, terminal_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, OTHERS = "#1f6f8b", "#b8c4c9"
HIGH, WIDE = 0.34, 9.0  # inches: of a bar, of a plot
NAMES_MAX, LEAST_BAR = 34, 12  # columns of the terminal


@dataclass(frozen=True)
class Bar:
    """What was measured: its name, a value a round, and whether it is ours or a comparison."""

    name: str
    rounds: Sequence[float]
    ours: bool = True


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, the first on top."""

    title: str
    unit: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Curve:
    """Values a round at each of some places."""

    name: str
    at: Sequence[float]
    rounds: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Curves:
    """Curves over the same ticks; one of the axes is logarithmic."""

    title: str
    unit: str
    curves: Sequence[Curve]
    ticks: Sequence[str]
    log: str
    """ "x" or "y"; the other axis begins at 0."""
    along: str = ""


Plot: TypeAlias = Bars | Curves


# --- on a terminal --------------------------------------------------------------------------------


def show(output: Output, plots: Sequence[Plot]) -> None:
    """Print plots as lines of blocks, where stdout is a terminal; nothing with `--json`."""
    width = terminal_width()
    if width is None or output.json_only:
        return
    for plot in (part for one in plots for part in parts_of(one)):
        output.gap()
        scale = ", logarithmic" if isinstance(plot, Curves) and plot.log == "y" else ""
        output.line(f"{plot.title}: {plot.unit}{scale}", "bold")
        for line in lines_of(output, plot, width):
            output.print([(line, "")])
    if any(len(rounds) > 1 for plot in plots for _, rounds in rows_of(plot)):
        low, middle, high = marks_of(output)
        output.line(f"{low} to the least round, {middle} to the median, {high} to the greatest")


def parts_of(plot: Plot) -> list[Plot]:
    """Each curve for itself: the blocks of a small one beside a large one would all be none."""
    if isinstance(plot, Bars) or len(plot.curves) == 1:
        return [plot]
    return [
        replace(plot, title=f"{plot.title}: {curve.name}", curves=[curve]) for curve in plot.curves
    ]


def rows_of(plot: Plot) -> list[tuple[str, Sequence[float]]]:
    """The names and rounds of a plot's bars, or of each point of its curves."""
    if isinstance(plot, Bars):
        return [(bar.name, bar.rounds) for bar in plot.bars]
    return [pair for one in plot.curves for pair in zip(plot.ticks, one.rounds, strict=True)]


def marks_of(output: Output) -> tuple[str, str, str]:
    """What a bar is drawn with."""
    return ("█", "▓", "░") if output.blocks else ("#", "=", "-")


def lines_of(output: Output, plot: Plot, width: int) -> Iterator[str]:
    """The lines of one plot; names that are too long stand above their bars."""
    rows = rows_of(plot)
    texts = [number(statistics.median(rounds)) for _, rounds in rows]
    wide = max(map(cell_width, texts))
    most = max(max(rounds) for _, rounds in rows)
    names = max(cell_width(name) for name, _ in rows)
    above = names > NAMES_MAX or width - names - wide - 4 < LEAST_BAR
    names = 0 if above else names + 2
    room = max(1, width - names - wide - 2)
    scale = log_scale(rows) if isinstance(plot, Curves) and plot.log == "y" else (0.0, most)
    for (name, rounds), text in zip(rows, texts, strict=True):
        if above:
            yield from fold(name, width)
        shown = bar_of(marks_of(output), rounds, scale, room)
        begin = "" if above else name + " " * (names - cell_width(name))
        yield f"{begin}{text:>{wide}}  {shown}"


def log_scale(rows: Sequence[tuple[str, Sequence[float]]]) -> tuple[float, float]:
    """The smallest and greatest value of a logarithmic scale: the first has a bar as well."""
    values = [value for _, rounds in rows for value in rounds]
    return max(min(values), 1e-12) / 2, max(values)


def bar_of(
    marks: tuple[str, str, str], rounds: Sequence[float], scale: tuple[float, float], room: int
) -> str:
    """One bar with its spread."""
    begin, most = scale

    def columns(value: float) -> int:
        if most <= 0:
            return 0
        if begin > 0:
            return round(math.log(max(value, begin) / begin) / math.log(most / begin) * room)
        return round(value / most * room)

    low, middle, high = map(columns, (min(rounds), statistics.median(rounds), max(rounds)))
    solid, shaded, light = marks
    return solid * low + shaded * (middle - low) + light * (high - middle)


def number(value: float) -> str:
    """Show three digits or so.

    >>> number(0.123456), number(12.3456), number(12345.6)
    ('0.123', '12.3', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- as files -------------------------------------------------------------------------------------


def write(plots: dict[str, Plot], directory: Path) -> list[Path]:
    """Write an SVG file for each name, below a directory that is made where it is not there.

    Raises: ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "millstream"  # the same figures, the same files
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in plots.items():
        high = 1 + HIGH * len(plot.bars) if isinstance(plot, Bars) else 4.0
        figure, axes = pyplot.subplots(figsize=(WIDE, high), layout="constrained")
        figure.suptitle(plot.title, x=0.01, ha="left", fontsize=10)
        if isinstance(plot, Bars):
            draw_bars(axes, plot)
        else:
            draw_curves(axes, plot)
        axes.spines[["top", "right"]].set_visible(False)
        file = directory / (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".svg")
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
        written.append(file)
    return written


def draw_bars(axes: Axes, plot: Bars) -> None:
    """Bars that end at the median, with lines from the smallest round to the greatest."""
    bars = plot.bars[::-1]
    middles = [statistics.median(bar.rounds) for bar in bars]
    spread = (
        [middle - min(bar.rounds) for middle, bar in zip(middles, bars, strict=True)],
        [max(bar.rounds) - middle for middle, bar in zip(middles, bars, strict=True)],
    )
    axes.barh(
        range(len(bars)),
        middles,
        xerr=spread,
        color=[OURS if bar.ours else OTHERS for bar in bars],
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlabel(plot.unit)
    axes.set_xlim(left=0)


def draw_curves(axes: Axes, plot: Curves) -> None:
    """Curves through the medians, shaded from the smallest round to the greatest."""
    for curve in plot.curves:
        middles = [statistics.median(rounds) for rounds in curve.rounds]
        axes.plot(curve.at, middles, marker="o", label=curve.name)
        low, high = [min(one) for one in curve.rounds], [max(one) for one in curve.rounds]
        axes.fill_between(curve.at, low, high, alpha=0.2)
    at: Any = plot.curves[0].at
    if plot.log == "x":
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    axes.set_xticks(at, plot.ticks)
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel(plot.along)
    axes.set_ylabel(plot.unit)
    if len(plot.curves) > 1:
        axes.legend(frameon=False)
