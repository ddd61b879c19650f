"""Draw a report: `python -m benchmarks.plots REPORT.json DIRECTORY` writes SVG files.

Bars end at the median, lines on them go from the smallest round to the largest. Curves are drawn
for the series of bench_growth.py, and of bench_tails.py from the median call to the slowest.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import rivals
from benchmarks.bench_tails import SHARES
from benchmarks.rivals import queues

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Bar = tuple[str, list[float], bool]  # what it is called, its rounds, whether it is ours

OURS, OTHERS = "#1f6f8b", "#b8c4c9"
HIGH, WIDE = 0.34, 9.0  # inches: of a bar, of a plot


def bars(axes: Axes, found: list[Bar], unit: str) -> None:
    """Horizontal bars with their spreads, the first on top."""
    found = found[::-1]
    middles = [statistics.median(rounds) for _, rounds, _ in found]
    below = [middle - min(rounds) for middle, (_, rounds, _) in zip(middles, found, strict=True)]
    above = [max(rounds) - middle for middle, (_, rounds, _) in zip(middles, found, strict=True)]
    colours = [OURS if ours else OTHERS for _, _, ours in found]
    axes.barh(range(len(found)), middles, xerr=(below, above), color=colours,
              error_kw={"elinewidth": 1, "capsize": 2})  # fmt: skip
    axes.set_yticks(range(len(found)), [name for name, _, _ in found])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlabel(unit)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[Bar]]:
    """The bars of each question and unit, ours before its limit."""
    made: dict[tuple[str, str], list[Bar]] = {}
    for row in rows:
        if row["series"]:
            continue
        found = made.setdefault((row["question"], row["unit"]), [])
        found.append((row["work"], row["ours"], True))
        if row["limit"]:
            found.append((row["limit_is"], row["limit"], False))
    return made


def curves(axes: Axes, points: list[dict[str, Any]]) -> None:
    """One series, with its spread."""
    at = [row["at"] for row in points]
    middles = [statistics.median(row["ours"]) for row in points]
    axes.plot(at, middles, marker="o", label=points[0]["series"])
    axes.fill_between(at, [min(row["ours"]) for row in points],
                      [max(row["ours"]) for row in points], alpha=0.2)  # fmt: skip


def draw(document: dict[str, Any], directory: Path) -> list[Path]:
    """Write all plots that a report has rows for; their files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "millstream"  # the same report, the same files
    from matplotlib import pyplot

    written = []

    def plot(name: str, title: str, high: float, fill: Callable[[Axes], None]) -> None:
        figure, axes = pyplot.subplots(figsize=(WIDE, high), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        fill(axes)
        file = directory / (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".svg")
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
        written.append(file)

    directory.mkdir(parents=True, exist_ok=True)
    rows = [row for row in document["rows"] if row["ours"]]
    for (question, unit), found in groups(rows).items():
        high = 1 + HIGH * len(found)
        name = f"{question.partition(',')[0]} {unit.replace('/', ' a ').replace('µ', 'u')}"
        plot(name, question, high,
             lambda axes, found=found, unit=unit: bars(axes, found, unit))  # fmt: skip
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["series"]:
            kinds.setdefault(row["series"], []).append(row)
    tails = [points for points in kinds.values() if points[0]["work"].endswith(", p50")]

    def fill_tails(axes: Axes) -> None:
        for points in tails:
            curves(axes, points)
        axes.set_yscale("log")
        axes.set_xticks(range(len(SHARES)), list(SHARES))
        axes.set_ylabel(tails[0][0]["unit"])
        axes.legend(frameon=False)

    if tails:
        plot("tail latencies", tails[0][0]["question"], 4.5, fill_tails)

    for name, points in kinds.items():
        if points in tails:
            continue

        def fill(axes: Axes, points: list[dict[str, Any]] = points, name: str = name) -> None:
            curves(axes, points)
            axes.set_xscale("log")
            axes.set_xticks([row["at"] for row in points], [f"{row['at']:,}" for row in points])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel(name.rpartition(", ")[2])
            axes.set_ylabel(points[0]["unit"])

        plot(f"growth {name}", name, 3.5, fill)

    for kind, works in (("rivals", rivals.WORKS), ("queues", queues.WORKS)):
        for work in works:
            found = [(one["name"], [rate / 1e6 for rate in one["rates"][work]],
                      one["name"].startswith("millstream"))
                     for one in document[kind] if one["rates"].get(work)]  # fmt: skip
            found.sort(key=lambda bar: -statistics.median(bar[1]))
            if found:
                what = "Records" if kind == "rivals" else "Messages"
                plot(f"{kind} {work}", f"{what} of 100 bytes: {work}", 1 + HIGH * len(found),
                     lambda axes, found=found: bars(axes, found, "million a second"))  # fmt: skip
    return written


def main() -> int:
    """Draw it, and name the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("report", metavar="REPORT.json", type=Path)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path)
    options = parser.parse_args()
    document = json.loads(options.report.read_text(encoding="utf-8"))
    print(*draw(document, options.directory), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
