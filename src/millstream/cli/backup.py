"""`backup`: a consistent copy while others write."""

from __future__ import annotations

import argparse

from millstream.cli.output import Output
from millstream.cli.stores import add_names, opened


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "backup",
        help="copy a store while others write",
        description="Make a consistent copy of a store in TARGET, which must not exist, while "
        "other processes go on writing.",
    )
    add_names(parser, "store")
    parser.add_argument("target", metavar="TARGET", help="directory to make")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Copy a store."""
    output = Output(args.json)
    with opened(args.store) as store:
        store.backup(args.target)
    if args.json:
        output.json({"target": args.target})
    else:
        output.say(f"copied to {args.target}")
    return 0
