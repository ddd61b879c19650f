"""Draw a report: `python -m benchmarks.plots REPORT.json DIRECTORY` writes SVG files.

Bars end at the median, lines on them go from the smallest round to the largest. Curves are drawn
for the series of bench_growth.py, and of bench_tails.py from the median call to the slowest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import rivals
from benchmarks.bench_tails import SHARES
from benchmarks.rivals import queues
from millstream.cli.plots import Bar, Bars, Curve, Curves, Plot, write

Rows = list[dict[str, Any]]


def plots(document: dict[str, Any]) -> dict[str, Plot]:
    """All plots that a report has rows for, by the names of their files."""
    rows = [row for row in document["rows"] if row["ours"]]
    found: dict[str, Plot] = {}
    for (question, unit), bars in questions(rows).items():
        name = f"{question.partition(',')[0]} {unit.replace('/', ' a ').replace('µ', 'u')}"
        found[name] = Bars(question, unit, bars)
    kinds: dict[str, Rows] = {}
    for row in rows:
        if row["series"]:
            kinds.setdefault(row["series"], []).append(row)
    tails = {name: points for name, points in kinds.items() if ended(points[0], ", p50")}
    if tails:
        first = next(iter(tails.values()))[0]
        curves = [curve(name, points) for name, points in tails.items()]
        ticks = list(SHARES)[: len(curves[0].at)]
        found["tail latencies"] = Curves(first["question"], first["unit"], curves, ticks, "y")
    for name, points in kinds.items():
        if name not in tails:
            ticks = [f"{row['at']:,}" for row in points]
            along = name.rpartition(", ")[2]
            one = [curve(name, points)]
            found[f"growth {name}"] = Curves(name, points[0]["unit"], one, ticks, "x", along)
    for kind, works in (("rivals", rivals.WORKS), ("queues", queues.WORKS)):
        for work in works:
            bars = [Bar(one["name"], [rate / 1e6 for rate in one["rates"][work]],
                        one["name"].startswith("millstream"))
                    for one in document[kind] if one["rates"].get(work)]  # fmt: skip
            bars.sort(key=lambda bar: -statistics.median(bar.rounds))
            if bars:
                what = "Records" if kind == "rivals" else "Messages"
                title = f"{what} of 100 bytes: {work}"
                found[f"{kind} {work}"] = Bars(title, "million a second", bars)
    return found


def ended(row: dict[str, Any], text: str) -> bool:
    """Does the name of a row end so?"""
    work: str = row["work"]
    return work.endswith(text)


def questions(rows: Rows) -> dict[tuple[str, str], list[Bar]]:
    """The bars of each question and unit, ours before its limit."""
    made: dict[tuple[str, str], list[Bar]] = {}
    for row in rows:
        if row["series"]:
            continue
        found = made.setdefault((row["question"], row["unit"]), [])
        found.append(Bar(row["work"], row["ours"]))
        if row["limit"]:
            found.append(Bar(row["limit_is"], row["limit"], ours=False))
    return made


def curve(name: str, points: Rows) -> Curve:
    """One series."""
    return Curve(name, [row["at"] for row in points], [row["ours"] for row in points])


def main() -> int:
    """Draw it, and name the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("report", metavar="REPORT.json", type=Path)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path)
    options = parser.parse_args()
    document = json.loads(options.report.read_text(encoding="utf-8"))
    print(*write(plots(document), options.directory), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
