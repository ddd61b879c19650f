"""`ls` and `info`: what there is."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from millstream.cli.formats import timestamp_text
from millstream.cli.output import Column, Output, age_text, count_text, size_text
from millstream.cli.stores import add_names, existing, opened

if TYPE_CHECKING:
    from millstream import PartitionStats, Stream


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs."""
    parser = verbs.add_parser("ls", help="list streams", description="List the streams of a store.")
    add_names(parser, "store")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=run_ls)
    parser = verbs.add_parser(
        "info",
        help="show a stream, or every stream, in detail",
        description="Show how streams are configured and what each of their partitions holds.",
    )
    add_names(parser, "store")
    parser.add_argument("stream", metavar="STREAM", nargs="?", help="only this stream")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run_info)


def run_ls(args: argparse.Namespace) -> int:
    """List the streams."""
    output = Output(args.json)
    with opened(args.store) as store:
        found = [describe(store.stream(name)) for name in store.streams()]
    if args.json:
        output.json(found)
        return 0
    titles = ("Partitions", "Records", "Log", "Files", "Oldest", "Newest")
    output.table(
        [Column("Stream"), *(Column(title, right=True) for title in titles)],
        [
            (
                one["name"],
                one["partitions"],
                count_text(one["records"]),
                size_text(one["log_bytes"]),
                size_text(one["allocated_bytes"]),
                age_text(one["oldest_seconds"]),
                age_text(one["newest_seconds"]),
            )
            for one in found
        ],
        nothing="no streams in this store",
    )
    return 0


def describe(stream: Stream) -> dict[str, Any]:
    """Return one stream as `ls` shows it; ages are those of the records' timestamps."""
    stats = stream.stats()
    ends = [ends_of(stream, part) for part in stats.partitions]
    times = [moment for pair in ends for moment in pair]
    now = time.time()
    return {
        "name": stream.name,
        "partitions": len(stats.partitions),
        "records": stats.records,
        "log_bytes": stats.log_bytes,
        "allocated_bytes": stats.allocated_bytes,
        "oldest": timestamp_text(min(times)) if times else None,
        "newest": timestamp_text(max(times)) if times else None,
        "oldest_seconds": now - min(times) / 1e6 if times else None,
        "newest_seconds": now - max(times) / 1e6 if times else None,
    }


def ends_of(stream: Stream, part: PartitionStats) -> list[int]:
    """Return the timestamps of the first and the last record of a partition, if it can be read."""
    from millstream.errors import MillstreamError

    found: list[int] = []
    for offset in sorted({part.first_offset, part.next_offset - 1}):
        if part.first_offset <= offset < part.next_offset:
            # Damaged or gone by now: `verify` says more.
            with contextlib.suppress(MillstreamError):
                one = stream.read(partition=part.partition, start=offset, max_records=1)
                found.extend(int(batch.timestamps[0]) for batch in one)
    return found


def run_info(args: argparse.Namespace) -> int:
    """Show streams in detail."""
    output = Output(args.json)
    with opened(args.store) as store:
        names = store.streams() if args.stream is None else [args.stream]
        found = [existing(store, name).stats() for name in names]
        about: dict[str, Any] = {
            "path": store.path,
            "durability": store.durability,
            "needs_recovery": store.needs_recovery,
        }
    if args.json:
        streams = [
            {
                **dataclasses.asdict(stats),
                "retention": stats.retention.as_dict(),
                "compaction": None if stats.compaction is None else stats.compaction.as_dict(),
            }
            for stats in found
        ]
        output.json({**about, "streams": streams})
        return 0
    output.line(f"{about['path']}: durability {about['durability']}", "bold")
    if about["needs_recovery"]:
        output.line("not closed cleanly; the next open for writing recovers it")
    titles = ("Partition", "First", "Next", "Durable", "Segments", "Log", "Files")
    for stats in found:
        output.gap()
        kept = stats.retention
        rules = [
            f"{name} {text}"
            for name, value, text in (
                ("bytes", kept.bytes, size_text(kept.bytes or 0)),
                ("age", kept.age, age_text(kept.age)),
                ("records", kept.records, count_text(kept.records or 0)),
            )
            if value is not None
        ]
        output.line(
            f"{stats.name}: durability {stats.durability}, retention "
            f"{' '.join(rules) or 'everything'}"
            f"{'' if stats.compaction is None else ' of the last record of a key'}, "
            f"segments to {size_text(stats.segment_bytes)}",
            "bold",
        )
        output.table(
            [*(Column(title, right=True) for title in titles), Column("Health")],
            [
                (
                    part.partition,
                    part.first_offset,
                    part.next_offset,
                    part.durable_offset,
                    part.segments,
                    size_text(part.log_bytes),
                    size_text(part.allocated_bytes),
                    part.health,
                )
                for part in stats.partitions
            ],
        )
    return 0
