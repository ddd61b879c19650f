"""`groups`: which consumers read a stream, how far behind, and setting where they go on."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from millstream.cli.formats import timestamp_text
from millstream.cli.output import Column, Output, count_text, plural
from millstream.cli.records import count_argument, start_argument
from millstream.cli.stores import add_names, existing, opened, unknown

if TYPE_CHECKING:
    from millstream import Group, GroupMember, GroupPartition, Store, Stream
    from millstream.options import Start


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and the verbs below it."""
    parser = verbs.add_parser(
        "groups",
        help="manage consumer groups",
        description="Show who reads a stream and how far behind they are; set where they go on.",
    )
    below = parser.add_subparsers(dest="groups_verb", metavar="VERB", required=True)
    parser = add(below, "ls", run_ls, "list consumer groups", group=False)
    parser.add_argument("stream", metavar="STREAM", nargs="?", help="only of this stream")
    add(below, "info", run_info, "show members and positions of a group")
    parser = add(below, "lag", run_lag, "print how many records a group has yet to commit")
    parser.add_argument(
        "-p", "--partition", type=count_argument, help="only this partition (default: all)"
    )
    parser = add(below, "seek", run_seek, "set where a group without members goes on")
    parser.add_argument(
        "to",
        metavar="TO",
        type=start_argument,
        help="an offset, -N for the last N records, earliest, latest, or a time such as "
        "2013-07-01T12:00 (local) or 2013-07-01T12:00Z",
    )
    parser.add_argument(
        "-p", "--partition", type=count_argument, help="only this partition (default: all)"
    )
    add(below, "rm", run_rm, "forget a group without members, and its positions")


def add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    *,
    group: bool = True,
) -> argparse.ArgumentParser:
    """Add one verb with what all of them take."""
    parser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_names(parser, "store")
    if group:
        add_names(parser, "stream", "group")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def group_of(store: Store, args: argparse.Namespace) -> Group:
    """Return the group that the arguments name."""
    return named_group(existing(store, args.stream), args.group)


def named_group(stream: Stream, name: str) -> Group:
    """Return a group that exists."""
    names = stream.groups()
    if name not in names:
        raise unknown(f"group {name!r} of stream {stream.name!r}", name, names)
    return stream.group(name)


def run_ls(args: argparse.Namespace) -> int:
    """List the groups of one stream, or of all."""
    output = Output(args.json)
    with opened(args.store) as store:
        names = store.streams() if args.stream is None else [args.stream]
        streams = [existing(store, name) for name in names]
        found = [describe(stream, name) for stream in streams for name in stream.groups()]
    if args.json:
        output.json(found)
        return 0
    output.table(
        [
            Column("Stream"),
            Column("Group"),
            Column("Members", right=True),
            Column("Lag", right=True),
        ],
        [(one["stream"], one["group"], one["members"], count_text(one["lag"])) for one in found],
        nothing="no consumer groups",
    )
    return 0


def describe(stream: Stream, name: str) -> dict[str, Any]:
    """Return one group as `ls` shows it."""
    group = stream.group(name)
    return {
        "stream": stream.name,
        "group": name,
        "members": len(group.members()),
        "lag": group.lag(),
    }


def run_info(args: argparse.Namespace) -> int:
    """Show members, and where the group is in each partition."""
    output = Output(args.json)
    with opened(args.store) as store:
        group = group_of(store, args)
        members, partitions, health = group.members(), group.partitions(), group.health
    if args.json:
        found = [plain(part) for part in partitions]
        who = [dataclasses.asdict(member) for member in members]
        lag = sum(part.lag for part in partitions)
        about = {**names(args), "lag": lag, "health": health}
        output.json({**about, "members": who, "partitions": found})
        return 0
    said = "" if health == "sound" else f", {health}"
    output.line(f"{plural(len(members), 'member')}{said}")
    if members:
        output.table(
            [
                Column("Member", right=True),
                Column("Process", prose=True),
                Column("Joined"),
                Column("Has", prose=True),
            ],
            [member_row(member) for member in members],
        )
    titles = ("Partition", "Position", "End", "Lag", "Member")
    output.table([Column(title, right=True) for title in titles], list(map(row, partitions)))
    return 0


def names(args: argparse.Namespace) -> dict[str, str]:
    """Return what was asked about."""
    return {"stream": args.stream, "group": args.group}


def member_row(member: GroupMember) -> tuple[object, ...]:
    """Return a member as a row of the table."""
    share = ", ".join(map(str, member.partitions)) or "-"
    return member.slot, member.process, timestamp_text(member.joined), share


def plain(part: GroupPartition) -> dict[str, object]:
    """Return a partition as JSON has it."""
    position = part.position and {"epoch": part.position.epoch, "offset": part.position.offset}
    return {**dataclasses.asdict(part), "position": position}


def row(part: GroupPartition) -> tuple[object, ...]:
    """Return a partition as a row of the table."""
    position = "0" if part.position is None else str(part.position.offset)
    lost = " (lost)" if part.lost else ""
    owner = "-" if part.owner is None else part.owner
    return part.partition, position + lost, part.next_offset, count_text(part.lag), owner


def run_lag(args: argparse.Namespace) -> int:
    """Print the lag."""
    output = Output(args.json)
    with opened(args.store) as store:
        group = group_of(store, args)
        lag = group.lag(args.partition)
    if args.json:
        output.json({**names(args), "lag": lag})
    else:
        output.line(str(lag))
    return 0


def run_seek(args: argparse.Namespace) -> int:
    """Set the position of one partition, or of all."""
    output = Output(args.json)
    with opened(args.store, "rw") as store:
        group = group_of(store, args)
        set_ = seek(group, args.to, args.partition)
    if args.json:
        output.json({**names(args), "positions": {str(p): offset for p, offset in set_.items()}})
    else:
        for partition, offset in set_.items():
            output.line(f"partition {partition}: offset {offset}")
    return 0


def seek(group: Group, to: Start, partition: int | None) -> dict[int, int]:
    """Seek, where an offset is meant for each partition, and one below zero from the end."""
    numbers = range(group.stream.partitions) if partition is None else [partition]
    goals: dict[int, Start] = {}
    for number in numbers:
        goal = to
        if isinstance(to, int) and to < 0:
            first = group.stream.first_offset(number)
            goal = max(first, group.stream.next_offset(number) + to)
        group.stream.read(partition=number, start=goal)  # all are checked before one is set
        goals[number] = goal
    found: dict[int, int] = {}
    for number, goal in goals.items():
        found[number] = int(group.seek(goal, partition=number)[number].offset)
    return found


def run_rm(args: argparse.Namespace) -> int:
    """Forget a group."""
    output = Output(args.json)
    with opened(args.store, "rw") as store:
        group_of(store, args).remove()
    if args.json:
        output.json({**names(args), "removed": True})
    else:
        output.say(f"removed group {args.group} of {args.stream}")
    return 0
