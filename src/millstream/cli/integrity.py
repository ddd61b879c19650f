"""`verify`, `repair` and `dump`: the second reader, which shares no code with the engine."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from millstream.cli.output import Output, plural, size_text
from millstream.cli.records import count_argument
from millstream.cli.stores import add_names, find_store, unknown

if TYPE_CHECKING:
    from millstream.inspect import Note

COUNTED = ("stream", "partition", "segment", "batch", "record")
COUNTS = ("streams", "partitions", "segments", "batches", "records", "queues", "messages", "bytes")


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs."""
    parser = verbs.add_parser(
        "verify",
        help="check every byte, changing none",
        description="Read every batch and message of a store with a reader of its own and report "
        "what is not as it was written. Changes nothing; ends with 1 if there are problems.",
    )
    add_parts(parser)
    parser.set_defaults(run=run_verify)
    parser = verbs.add_parser(
        "repair",
        help="make a damaged store usable again, losing only what is said",
        description="Make a damaged store usable again. No other process may have it open. What "
        "cannot be kept is set aside, not deleted. Ends with 1 if something cannot be repaired.",
    )
    add_parts(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, do nothing")
    parser.set_defaults(run=run_repair)
    parser = verbs.add_parser(
        "dump",
        help="print what the files hold: segments, batches, messages",
        description="Print what the files of a store hold, as the second reader sees it.",
    )
    add_parts(parser)
    parser.add_argument(
        "-p", "--partition", type=count_argument, help="only this partition (default: all)"
    )
    parser.set_defaults(run=run_dump)


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Add what all three take."""
    add_names(parser, "store")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("stream", metavar="STREAM", nargs="?", help="only this stream, no queue")
    one.add_argument("--queue", metavar="QUEUE", help="only this queue, no stream (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def find_named(args: argparse.Namespace) -> None:
    """Raise NotFound where there is no such store, stream or queue, by the names on disk alone."""
    find_store(args.store)
    for what, name in (("stream", args.stream), ("queue", args.queue)):
        directory = os.path.join(args.store, f"{what}s")
        names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
        if name is not None and name not in names:
            shown = [one for one in names if not one.startswith(".")]
            raise unknown(f"{what} {name!r} in this store", name, shown)


def run_verify(args: argparse.Namespace) -> int:
    """Verify a store; 1 if there are problems."""
    from millstream import inspect

    output = Output(args.json)
    find_named(args)
    with output.progress("verify", None, "bytes", chatter=False) as progress:
        report = inspect.verify(args.store, args.stream, queue=args.queue, progress=progress.reach)
    counts = {name: getattr(report, name) for name in COUNTS}
    code = 1 if report.problems else 0
    if args.json:
        problems, notes = fields(report.problems), fields(report.notes)
        output.json({"well": not problems, **counts, "problems": problems, "notes": notes})
        return code
    shown = [plural(count, noun) for count, noun in zip(counts.values(), COUNTED, strict=False)]
    if report.queues:
        shown += [plural(report.queues, "queue"), plural(report.messages, "message")]
    output.line(", ".join([*shown, size_text(counts["bytes"])]))
    for line in told(report.notes):
        output.line(f"note: {line}")
    for problem in report.problems:
        output.line(str(problem), "red")
    output.line(plural(len(report.problems), "problem") if report.problems else "no problems")
    return code


def run_repair(args: argparse.Namespace) -> int:
    """Repair a store and say what was done; 1 if something could not be."""
    from millstream import inspect

    output = Output(args.json)
    find_named(args)
    actions = inspect.repair(args.store, args.stream, queue=args.queue, dry_run=args.dry_run)
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
    find_named(args)
    wanted = {"queue": args.queue, "json": args.json}
    for line in inspect.dump(args.store, args.stream, args.partition, **wanted):
        if args.json:
            output.json(line)
        else:
            output.line(str(line))
    return 0


def told(notes: Iterable[Note]) -> Iterator[str]:
    """Yield lines about notes, those that say the same of many files only once."""
    alike: dict[tuple[str, str], list[Note]] = {}
    for note in notes:
        alike.setdefault((note.kind, note.text), []).append(note)
    for (kind, text), group in alike.items():
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        yield f"{kind}: {group[0].path}{more}: {text}"


def fields(found: Iterable[Any]) -> list[object]:
    """Return findings as plain dictionaries."""
    return [
        {field.name: getattr(one, field.name) for field in dataclasses.fields(one)} for one in found
    ]
