"""`verify`, `repair` and `dump`: the second reader, which shares no code with the engine."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

from millstream.cli.output import Output, count_text, size_text
from millstream.cli.records import count_argument
from millstream.cli.stores import find_store

COUNTS = ("streams", "partitions", "segments", "batches", "records", "bytes")


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs."""
    parser = verbs.add_parser(
        "verify",
        help="check every byte, changing none",
        description="Read every batch of a store with a reader of its own and report what is not "
        "as it was written. Changes nothing; ends with 1 if there are problems.",
    )
    add_store(parser)
    parser.set_defaults(run=run_verify)
    parser = verbs.add_parser(
        "repair",
        help="make a damaged store usable again, losing only what is said",
        description="Make a damaged store usable again. No other process may have it open. What "
        "cannot be kept is set aside, not deleted. Ends with 1 if something cannot be repaired.",
    )
    add_store(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, do nothing")
    parser.set_defaults(run=run_repair)
    parser = verbs.add_parser(
        "dump",
        help="print what the files hold: segments, batches",
        description="Print what the files of a store hold, as the second reader sees it.",
    )
    add_store(parser)
    parser.add_argument("-p", "--partition", type=count_argument, help="only this partition")
    parser.set_defaults(run=run_dump)


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add what all three take."""
    parser.add_argument("store", metavar="STORE", help="directory of the store")
    parser.add_argument("stream", metavar="STREAM", nargs="?", help="only this stream")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_verify(args: argparse.Namespace) -> int:
    """Verify a store; 1 if there are problems."""
    from millstream import inspect

    output = Output(args.json)
    find_store(args.store)
    with output.progress("verify", None, "bytes", chatter=False) as progress:
        report = inspect.verify(args.store, args.stream, progress=progress.reach)
    counts = {name: getattr(report, name) for name in COUNTS}
    code = 1 if report.problems else 0
    if args.json:
        problems, notes = fields(report.problems), fields(report.notes)
        output.json({"well": not problems, **counts, "problems": problems, "notes": notes})
        return code
    shown = [f"{count_text(counts[name])} {name}" for name in COUNTS[:-1]]
    output.line(", ".join([*shown, size_text(counts["bytes"])]))
    for note in report.notes:
        output.line(f"note: {note.kind}: {note.path}: {note.text}")
    for problem in report.problems:
        output.line(str(problem), "red")
    count = len(report.problems)
    output.line(f"{count} problem{'' if count == 1 else 's'}" if count else "no problems")
    return code


def run_repair(args: argparse.Namespace) -> int:
    """Repair a store and say what was done; 1 if something could not be."""
    from millstream import inspect

    output = Output(args.json)
    find_store(args.store)
    actions = inspect.repair(args.store, args.stream, dry_run=args.dry_run)
    if args.json:
        output.json({"dry_run": args.dry_run, "actions": fields(actions)})
    elif not actions:
        output.line("nothing to repair")
    else:
        output.line("would be done:" if args.dry_run else "done:")
        for action in actions:
            output.line(str(action))
    return 1 if any(action.kind == "cannot" for action in actions) else 0


def run_dump(args: argparse.Namespace) -> int:
    """Print what the files hold."""
    from millstream import inspect

    output = Output(args.json)
    find_store(args.store)
    for line in inspect.dump(args.store, args.stream, args.partition, json=args.json):
        if args.json:
            output.json(line)
        else:
            output.line(str(line))
    return 0


def fields(found: Iterable[Any]) -> list[object]:
    """Return findings as plain dictionaries."""
    return [
        {field.name: getattr(one, field.name) for field in dataclasses.fields(one)} for one in found
    ]
