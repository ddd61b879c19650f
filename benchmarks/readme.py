"""Make the tables of the README from a report: `python -m benchmarks.readme REPORT.json`.

REPORT.json is what `python -m benchmarks --json` printed. Everything between the two comments of
the README is replaced: the machine, the date, and a table each of logs and queues, rows that
millstream loses and rivals that were not measured included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import rivals
from benchmarks.report import left_out, rate
from benchmarks.rivals import queues

README = Path(__file__).resolve().parent.parent / "README.md"
WIDTH = 120
QUEUES = (
    "Queues, each with the settings that it recommends for speed. Survives: what a message does,"
    " once put has returned. Lease: does what a killed consumer had come back by itself?"
)
BEGIN, END = "<!-- `python -m benchmarks.readme` replaces what follows -->", "<!-- end -->"


def table(found: list[dict[str, Any]], works: tuple[str, ...], more: tuple[str, ...]) -> list[str]:
    """A row a rival; the best of each work is bold."""
    measured = [one for one in found if not one["skipped"]]
    middles = {
        work: {
            one["name"]: statistics.median(one["rates"][work])
            for one in measured
            if one["rates"].get(work)
        }
        for work in works
    }
    lines = [f"| | {' | '.join((*more, *works))} |", "| --- |" + " --- |" * len((*more, *works))]
    for one in measured:
        cells = [one["name"], *({True: "yes", False: "no"}.get(one[key], one[key]) for key in more)]
        for work in works:
            text = rate(one["rates"].get(work)).replace("M", " M").replace("k", " k")
            best = max(middles[work].values(), default=None)
            is_best = best is not None and middles[work].get(one["name"]) == best
            cells.append(f"**{text}**" if is_best else text.replace("-", "–"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def text_of(document: dict[str, Any]) -> str:
    """What stands between the comments."""
    machine = document["machine"]
    begun = (
        f"{machine['date'][:10]}, commit {machine['commit']}: {machine['cores']} cores of"
        f" {machine['cpu']}, {machine['memory_gib']} GiB, {machine['file_system']}, Linux"
        f" {machine['kernel'].partition('-')[0]}, Python {machine['python']}; scale"
        f" {document['scale']}. Records and messages of 100 bytes, a second: medians of rounds,"
        " each a process and a directory of its own, unsynced (into the page cache) unless it says"
        " synced. The best of a column is bold."
    )
    lines = [
        textwrap.fill(begun, WIDTH),
        "",
        *table(document["rivals"], rivals.WORKS, ()),
        *("\n" + textwrap.fill(line, WIDTH) for line in left_out(document["rivals"])),
        "",
        textwrap.fill(QUEUES, WIDTH),
        "",
        *table(document["queues"], queues.WORKS, ("keeps", "lease")),
        *("\n" + textwrap.fill(line, WIDTH) for line in left_out(document["queues"])),
    ]
    return "\n".join(lines).replace("| | keeps | lease |", "| | survives | lease |")


def replaced(readme: str, text: str) -> str:
    """The README with another text between the comments."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"README.md: expected {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    """Write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("report", metavar="REPORT.json", type=Path)
    document = json.loads(parser.parse_args().report.read_text(encoding="utf-8"))
    README.write_text(replaced(README.read_text(encoding="utf-8"), text_of(document)), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
