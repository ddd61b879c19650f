"""`advise`: common mistakes that a store shows."""

from __future__ import annotations

import argparse
import dataclasses

from millstream.cli.bench import size_argument
from millstream.cli.output import Output
from millstream.cli.stores import add_names, opened


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "advise",
        help="search for common mistakes in how streams and queues are used",
        description="Search for common mistakes in how streams and queues are used. Read only.",
    )
    add_names(parser, "store")
    parser.add_argument(
        "--large",
        type=size_argument,
        metavar="SIZE",
        help="of a stream without retention, from which on it is pointed out (default: 1GiB)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found, if anything."""
    output = Output(args.json)
    with opened(args.store) as store:
        found = store.advice(large=args.large)
    if args.json:
        output.json([dataclasses.asdict(one) for one in found])
        return 0
    for one in found:
        output.line(f"{one.where}: {one.kind}", "bold")
        output.line(f"  {one.text}")
    if not found:
        output.say("nothing found, which is no proof that all is well")
    return 0
