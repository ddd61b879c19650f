"""`ls` and `info`: what there is, and who has it open."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from millstream.cli.formats import timestamp_text
from millstream.cli.output import Column, Output, age_text, count_text, plural, size_text
from millstream.cli.stores import add_names, existing, opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from millstream import GroupStats, PartitionStats, QueueStats, StoreProcess, Stream

COUNTED = ("ready", "delayed", "held", "leased", "dead", "done")


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs."""
    parser = verbs.add_parser(
        "ls",
        help="list streams, consumer groups and queues",
        description="List the streams, consumer groups and queues of a store.",
    )
    add_names(parser, "store")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=run_ls)
    parser = verbs.add_parser(
        "info",
        help="show a stream, or all that is in the store, in detail",
        description="Show how streams and queues are configured and what is in them, where their"
        " consumer groups are, and who has the store open.",
    )
    add_names(parser, "store")
    parser.add_argument("stream", metavar="STREAM", nargs="?", help="only this stream")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run_info)


def run_ls(args: argparse.Namespace) -> int:
    """List the streams, groups and queues."""
    output = Output(args.json)
    with opened(args.store) as store:
        found = [describe(store.stream(name)) for name in store.streams()]
        stats = store.stats()
    if args.json:
        rows = [{"kind": "stream", **one} for one in found]
        rows += [{"kind": "group", **group_row(group)} for group in stats.groups]
        rows += [{"kind": "queue", **queue_row(queue)} for queue in stats.queues]
        output.json(rows)
        return 0
    if not found and not stats.queues:
        output.say("nothing is in this store")
    if found:
        print_streams(output, found)
    if stats.groups:
        output.gap()
        print_groups(output, stats.groups)
    if stats.queues:
        output.gap()
        print_queues(output, stats.queues)
    return 0


def group_row(group: GroupStats) -> dict[str, Any]:
    """Return a group as `ls` shows it."""
    return {
        "name": group.name,
        "stream": group.stream,
        "members": len(group.members),
        "lag": group.lag,
        "lag_seconds": group.lag_seconds,
        "health": group.health,
    }


def print_groups(output: Output, groups: Sequence[GroupStats]) -> None:
    """Print groups as a table."""
    titles = ("Members", "Lag", "Behind")
    output.table(
        [Column("Group"), Column("Stream"), *(Column(one, right=True) for one in titles)],
        [
            (
                group.name,
                group.stream,
                len(group.members),
                count_text(group.lag),
                age_text(group.lag_seconds) if group.lag else "-",
            )
            for group in groups
        ],
    )


def queue_row(queue: QueueStats) -> dict[str, Any]:
    """Return a queue as `ls` shows it."""
    names = ("name", *COUNTED, "put", "failed", "expired", "oldest_age", "paused", "health")
    return {name: getattr(queue, name) for name in names}


def print_queues(output: Output, queues: Sequence[QueueStats]) -> None:
    """Print queues as a table."""
    output.table(
        [
            Column("Queue"),
            *(Column(name.capitalize(), right=True) for name in COUNTED),
            Column("Oldest", right=True),
            Column(""),
        ],
        [
            (
                queue.name,
                *(count_text(getattr(queue, name)) for name in COUNTED),
                age_text(queue.oldest_age),
                "paused" if queue.paused else "",
            )
            for queue in queues
        ],
    )


def print_streams(output: Output, found: Sequence[dict[str, Any]]) -> None:
    """Print streams as a table."""
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
    )


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
    """Show streams in detail, and without a name all else as well."""
    output = Output(args.json)
    with opened(args.store) as store:
        names = store.streams() if args.stream is None else [args.stream]
        found = [existing(store, name).stats() for name in names]
        whole = store.stats()
        groups = [group for group in whole.groups if group.stream in names]
        queues = whole.queues if args.stream is None else ()
        processes = store.processes() if args.stream is None else []
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
        parts: dict[str, Any] = {"groups": [group_row(group) for group in groups]}
        if args.stream is None:
            parts["queues"] = [queue_row(queue) for queue in queues]
            parts["processes"] = [process_row(one) for one in processes]
        output.json({**about, "streams": streams, **parts})
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
    if groups:
        output.gap()
        print_groups(output, groups)
    if queues:
        output.gap()
        print_queues(output, queues)
    if processes:
        output.gap()
        print_processes(output, processes)
    return 0


def process_row(process: StoreProcess) -> dict[str, Any]:
    """Return a process as JSON has it."""
    groups = [
        {"stream": stream, "group": group, "partitions": list(parts)}
        for (stream, group), parts in process.partitions.items()
    ]
    return {**dataclasses.asdict(process), "partitions": groups}


def print_processes(output: Output, processes: Sequence[StoreProcess]) -> None:
    """Print who has the store open to write."""
    output.table(
        [
            Column("Process", right=True),
            Column("Since"),
            Column("Holds", prose=True),
            Column("Command", prose=True),
        ],
        [
            (one.pid, timestamp_text(one.since), holdings_text(one), one.command or "?")
            for one in processes
        ],
    )


def holdings_text(process: StoreProcess) -> str:
    """Return what a process holds, in words."""
    held = [f"{plural(count, 'message')} of {name}" for name, count in process.leases.items()]
    held += [
        f"{plural(len(parts), 'partition')} of {stream} for {group}"
        for (stream, group), parts in process.partitions.items()
    ]
    return ", ".join(held) or "-"
