"""All benchmarks in one go: `python -m benchmarks [--quick] [--json] [--out DIR]`.

Prints a line for each row as it is measured (stderr), then the table (stdout). Ends with 1 when a
benchmark could not be run; that a target is missed is a figure, not a failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":  # as `python benchmarks/report.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import harness, rivals
from benchmarks.harness import Bench, Row
from benchmarks.rivals import queues

MODULES = (
    "append", "read", "sync", "wake", "processes", "open", "memory", "groups", "compact", "queue",
    "transactions", "tails", "growth",
)  # fmt: skip
TITLES = ("Work", "Ours", "Limit", "Ratio", "Target", "Met")
Table = list[tuple[str, ...]]


def benchmarks(module: ModuleType) -> Iterator[Callable[[Bench], None]]:
    """Yield the benchmarks of a module in the order of its text."""
    for name, found in vars(module).items():
        if name.startswith("test_") and callable(found):
            yield found


def measure(bench: Bench, only: str, failures: dict[str, str]) -> None:
    """Run the benchmarks, and keep what the failing ones said."""
    for name in MODULES:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        bench.question = (module.__doc__ or "").split("\n")[0]
        for function in benchmarks(module):
            full = f"{name}.{function.__name__.removeprefix('test_')}"
            if only not in full:
                continue
            began = time.monotonic()
            try:
                function(bench)
            except Exception as error:  # the other rows are worth having
                failures[full] = f"{type(error).__name__}: {error}"
                say(f"{full}: {failures[full]}")
            else:
                row = bench.rows[-1]
                taken = time.monotonic() - began
                say(f"{full}: {row.shown(row.ours)}, limit {row.shown(row.limit)} [{taken:.1f} s]")


def say(text: str) -> None:
    """Tell how it goes."""
    print(text, file=sys.stderr, flush=True)


def met(row: Row) -> str:
    """Return whether the target is met, as text."""
    return {True: "yes", False: "NO", None: "-"}[row.met]


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text."""
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
    work = f"{row.work} ({row.note})" if row.note else row.work
    limit = row.shown(row.limit)
    if row.limit:
        limit = f"{limit}: {row.limit_is}"
    return work, row.shown(row.ours), limit, ratio, row.target, met(row)


def print_table(titles: tuple[str, ...], lines: Table) -> None:
    """Print with rich where it is installed, plainly otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        for line in lines:
            pairs = zip(titles[1:], line[1:], strict=True)
            print(line[0], *(f"  {title}: {cell}" for title, cell in pairs), sep="\n")
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = RichTable(*titles)
    for line in lines:
        style = "red" if line[-1] == "NO" else None
        table.add_row(*line, style=style)
    console.print(table)


Section = tuple[str, tuple[str, ...], Table, list[str]]
"""Its question, the heads of its columns, its lines, what is said below it."""


def begun(document: dict[str, Any]) -> list[str]:
    """What is said before the tables."""
    machine = document["machine"]
    lines = [
        f"millstream {machine['commit']}, {machine['date']}, scale {document['scale']}. "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"Linux {machine['kernel']}, {machine['file_system']}; Python {machine['python']}.",
        'Values of 100 bytes, durability "process" unless said; medians (min..max) of rounds. '
        "Ratio: our speed as a share of the limit's.",
    ]
    if machine["load"] > 0.5:
        busy = f"The machine was busy before (load {machine['load']:.1f}): figures are noisy."
        lines.append(busy)
    return lines


def sections(document: dict[str, Any], rows: list[Row]) -> Iterator[Section]:
    """The tables."""
    for question in dict.fromkeys(row.question for row in rows):
        yield question, TITLES, [cells(row) for row in rows if row.question == question], []
    found = document["rivals"]
    if found:
        lines: Table = [
            (one["name"], *map(rate, (one["rates"].get(work) for work in rivals.WORKS)))
            for one in found if not one["skipped"]
        ]  # fmt: skip
        question = "What do others do? (records a second; see README.md)"
        yield question, ("Rival", *rivals.WORKS), lines, left_out(found)
    found = document["queues"]
    if found:
        lines = [(one["name"], one["keeps"], "yes" if one["lease"] else "no",
                  *map(rate, (one["rates"].get(work) for work in queues.WORKS)))
                 for one in found if not one["skipped"]]  # fmt: skip
        question = "And with the same messages? (a second; survives: what a message does)"
        yield question, ("Queue", "Survives", "Lease", *queues.WORKS), lines, left_out(found)


def left_out(found: list[dict[str, Any]]) -> list[str]:
    """Rivals and works that were not measured, and why."""
    skipped = [f"{one['name']} ({one['skipped']})" for one in found if one["skipped"]]
    skipped += [f"{one['name']}, {work} ({why})"
                for one in found for work, why in one.get("failed", {}).items()]  # fmt: skip
    return ["Not measured: " + "; ".join(skipped)] if skipped else []


def ended(document: dict[str, Any], rows: list[Row]) -> list[str]:
    """What is said behind the tables."""
    judged = [row.met for row in rows if row.met is not None]
    lines = [f"FAILED {name}: {what}" for name, what in document["failures"].items()]
    took = f"{sum(judged)} of {len(judged)} targets met, in {document['seconds']:.0f} s."
    return [*lines, took]


def print_report(document: dict[str, Any], rows: list[Row]) -> None:
    """Print what a person reads."""
    print(*begun(document), sep="\n")
    for question, titles, lines, below in sections(document, rows):
        print(f"\n{question}")
        print_table(titles, lines)
        print(*below, sep="\n", end="\n" if below else "")
    if sys.stdout.isatty():
        from benchmarks.plots import plots  # not by `against`, where millstream may be older
        from millstream.cli.output import Output
        from millstream.cli.plots import show

        show(Output(), list(plots(document).values()))
    print()
    print(*ended(document, rows), sep="\n")


def markdown(document: dict[str, Any], rows: list[Row]) -> str:
    """The same as Markdown."""
    parts = [*begun(document)]
    for question, titles, lines, below in sections(document, rows):
        table = [titles, ("---",) * len(titles), *lines]
        text = "\n".join(f"| {' | '.join(line)} |" for line in table)
        parts += [f"## {question}", text, *below]
    return "\n\n".join([*parts, *ended(document, rows)]) + "\n"


def rate(values: list[float] | None) -> str:
    """Return a median of records a second, as text."""
    if not values:
        return "-"
    middle = sorted(values)[len(values) // 2]
    if middle >= 1e6:
        return f"{harness.number(middle / 1e6)}M"
    return f"{harness.number(middle / 1e3)}k"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, say whether everything ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute instead of five")
    parser.add_argument("--tiny", action="store_true", help="only that it works; no figures")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with TEXT in their names")
    parser.add_argument(
        "--rival", action="append", metavar="TEXT", help="only rivals with TEXT in their names"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.json, report.md and plots (SVG), too"
    )
    parser.add_argument("--dir", default=None, help="where files go; on a disk")
    parser.add_argument(
        "--rivals", action=argparse.BooleanOptionalAction, help="measure rivals, too"
    )
    options = parser.parse_args(arguments)
    scale = harness.TINY if options.tiny else harness.QUICK if options.quick else harness.FULL
    with_rivals = options.rivals
    if with_rivals is None:
        with_rivals = bool(options.rival) or not options.only
    failures: dict[str, str] = {}
    began = time.monotonic()
    where = options.dir or harness.disk()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)  # said now, not when all is measured
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("--out draws plots: pip install 'millstream[plots]'")
    if shutil.disk_usage(where).free < scale.disk_bytes:
        parser.error(f"{where}: needs {scale.disk_bytes >> 30} GiB free; --dir chooses another")
    bench = Bench(scale, where)
    try:
        document: dict[str, Any] = {"machine": harness.machine(str(bench.directory))}
        measure(bench, options.only, failures)
        found = rivals.measure(bench, say, options.rival) if with_rivals else []
        queued = queues.measure(bench, say, options.rival) if with_rivals else []
    finally:
        bench.close()
    document.update(
        scale=scale.name,
        seconds=time.monotonic() - began,
        rows=[row.as_dict() for row in bench.rows],
        rivals=found,
        queues=queued,
        failures=failures,
    )
    text = json.dumps(document, indent=1, ensure_ascii=False)
    if options.out:
        from benchmarks.plots import plots
        from millstream.cli.plots import write

        (options.out / "report.json").write_text(text + "\n", encoding="utf-8")
        (options.out / "report.md").write_text(markdown(document, bench.rows), encoding="utf-8")
        drawn = write(plots(document), options.out)
        say(f"{options.out}: report.json, report.md, {len(drawn)} plots")
    if options.json:
        print(text)
    else:
        print_report(document, bench.rows)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
