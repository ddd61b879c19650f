"""`compact`: keep of each key the last record, now."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from millstream.cli.output import Output, count_text, plural, size_text
from millstream.cli.records import count_argument
from millstream.cli.stores import add_names, existing, opened

if TYPE_CHECKING:
    from millstream import CompactionProgress


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "compact",
        help="keep of each key the last record",
        description="Remove records that later ones of the same key supersede, while others read "
        "and write. Offsets do not change. The segment that is appended to stays as it is.",
    )
    add_names(parser, "store", "stream")
    parser.add_argument(
        "-p", "--partition", type=count_argument, help="only this partition (default: all)"
    )
    parser.add_argument("--memory", metavar="SIZE", default="64MiB", help="for keys, 32 bytes each")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compact a stream."""
    output = Output(args.json)
    with opened(args.store, mode="rw") as store:
        stream = existing(store, args.stream)
        with output.progress("compact", None, "bytes", chatter=False) as shown:

            def reach(at: CompactionProgress) -> None:
                shown.reach(at.done_bytes, at.total_bytes)

            result = stream.compact(partition=args.partition, memory=args.memory, progress=reach)
    if args.json:
        output.json(dataclasses.asdict(result))
        return 0
    output.line(
        f"{plural(result.segments, 'segment')} read, {plural(result.rounds, 'round')}: "
        f"{count_text(result.records_removed)} records removed, "
        f"{size_text(result.bytes_before)} to {size_text(result.bytes_after)}"
    )
    return 0
