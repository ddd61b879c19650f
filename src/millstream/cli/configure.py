"""`create`, `alter`, `drop` and `add-partitions`, of streams and, below `queue`, of queues."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from millstream.cli.bench import positive, size_argument
from millstream.cli.output import Output, plural, text_of
from millstream.cli.records import count_argument, seconds_argument
from millstream.cli.stores import add_names, existing, existing_queue, opened

if TYPE_CHECKING:
    from millstream import Compaction, Queue, Retention, RetryPolicy, Store, Stream

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

NONE = "none"
LEVELS = ("process", "interval", "sync", "store")
RETENTION = ("bytes", "age", "records")
COMPACTION = ("min_dirty", "min_age", "tombstone_age", "max_rate")
RETRY = ("max_attempts", "backoff", "factor", "max_delay", "jitter")
QUEUE = (
    *("capacity", "lease", "ttl", "payload_max", "dedup_window", "ageing"),
    *("priorities", "slot_bytes", "payload_bytes", "ordering", "dead_limit", "on_dead"),
)
DEFAULTS = {
    "segment_bytes": "128MiB",
    "durability": "store",
    "compact_min_dirty": "0.5",
    "compact_min_age": "0",
    "compact_tombstone_age": "24h",
    "compact_max_rate": "64MiB",
}
"""Settings of a new stream, as help says them; a test makes one with them and one without."""
QUEUE_DEFAULTS = {
    "capacity": "100000",
    "lease": "30",
    "payload_max": "16MiB",
    "dedup_window": "0",
    "durability": "store",
    "max_attempts": "12",
    "backoff": "1",
    "factor": "2",
    "max_delay": "10m",
    "jitter": "0.25",
}
"""Settings of a new queue."""


def say_defaults(parser: argparse.ArgumentParser, defaults: dict[str, str]) -> None:
    """Say in the help of what makes something what holds where an option is not given."""
    for action in parser._actions:
        if action.dest in defaults:
            action.help = f"{action.help} (default: {defaults[action.dest]})"


def register(verbs: Verbs) -> None:
    """Add the verbs for streams."""
    parser = add(verbs, "create", run_create, "stream", "make a stream, and the store for it")
    add_if_not_exists(parser)
    parser.add_argument(
        "--partitions", type=count_argument, metavar="N", help="how many (default: 1)"
    )
    add_stream_settings(parser, "")
    say_defaults(parser, DEFAULTS)
    parser = add(verbs, "alter", run_alter, "stream", "change the settings of a stream, in use too")
    parser.add_argument(
        "--partitions",
        type=count_argument,
        metavar="N",
        help="how many there are to be: so many are added as are missing, none is removed",
    )
    add_stream_settings(parser, ', "none" ends it')
    parser = add(verbs, "add-partitions", run_add, "stream", "add partitions to a stream, for good")
    parser.add_argument("count", metavar="COUNT", type=positive, help="how many more")
    parser = add(verbs, "drop", run_drop, "stream", "remove a stream and all its records")
    add_dropping(parser)


def register_queue(verbs: Verbs) -> None:
    """Add the verbs for queues."""
    parser = add(verbs, "create", run_create_queue, "queue", "make a queue, and the store for it")
    add_if_not_exists(parser)
    add_queue_settings(parser, "")
    say_defaults(parser, QUEUE_DEFAULTS)
    fixed = parser.add_argument_group("what cannot be changed later")
    fixed.add_argument("--priorities", type=count_argument, metavar="N", help="1 to 8 (default: 4)")
    fixed.add_argument(
        "--ordering", choices=("key",), help="messages of one key are done one after the other"
    )
    fixed.add_argument(
        "--on-dead",
        choices=("skip", "stop"),
        help="with --ordering: what a dead message does to its key (default: skip)",
    )
    fixed.add_argument(
        "--dead-limit",
        type=count_argument,
        metavar="N",
        help="how many dead letters are kept (default: 10000)",
    )
    fixed.add_argument(
        "--slot-bytes",
        type=size_argument,
        metavar="SIZE",
        help="what a message takes at least (default: 256)",
    )
    fixed.add_argument(
        "--payload-bytes",
        type=size_argument,
        metavar="SIZE",
        help="room for what is longer than its slot (default: 1GiB)",
    )
    parser = add(verbs, "alter", run_alter_queue, "queue", "change settings of a queue, in use too")
    add_queue_settings(parser, ', "none": never')
    parser = add(verbs, "drop", run_drop_queue, "queue", "remove a queue and all its messages")
    add_dropping(parser)


def add(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], what: str, text: str
) -> argparse.ArgumentParser:
    """Add one verb with what all of them take."""
    parser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_names(parser, "store")
    parser.add_argument(what, metavar=what.upper(), help=f"name of the {what}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def add_if_not_exists(parser: argparse.ArgumentParser) -> None:
    """Add what lets a program that is deployed again create what it needs."""
    parser.add_argument(
        "--if-not-exists",
        action="store_true",
        help="one that is there is well, unless a setting that is named here is another",
    )


def add_dropping(parser: argparse.ArgumentParser) -> None:
    """Add what `drop` asks for."""
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask, drop it")
    parser.add_argument("--if-exists", action="store_true", help="one that is not there is well")


def add_level(parser: argparse.ArgumentParser) -> None:
    """Add the stored level of durability."""
    parser.add_argument(
        "--durability",
        choices=LEVELS,
        help='what a call has survived when it returns; "store": as the store says',
    )


def add_stream_settings(parser: argparse.ArgumentParser, end: str) -> None:
    """Add the settings of a stream."""
    for name, read, text in (
        ("bytes", size_argument, "so much of each partition, such as 10GiB"),
        ("age", seconds_argument, "records for so long, such as 7d"),
        ("records", count_argument, "so many records of each partition"),
    ):
        parser.add_argument(
            f"--retention-{name}",
            metavar=name.upper(),
            type=or_none(read),
            help=f"keep {text}{end}",
        )
    parser.add_argument(
        "--segment-bytes",
        metavar="SIZE",
        type=size_argument,
        help="how large a segment file grows, such as 64MiB",
    )
    add_level(parser)
    parser.add_argument(
        "--compact",
        action=argparse.BooleanOptionalAction,
        help="keep the last record of each key, or all of them again",
    )
    for name, metavar, reader, text in (
        ("min-dirty", "PART", float, "compact where so much was never compacted, 0 to 1"),
        ("min-age", "AGE", seconds_argument, "leave records alone for so long"),
        ("tombstone-age", "AGE", seconds_argument, "keep tombstones for so long"),
        ("max-rate", "SIZE", size_argument, "read and write so many bytes a second for it"),
    ):
        parser.add_argument(f"--compact-{name}", metavar=metavar, type=reader, help=text)


def or_none(read: Callable[[str], object]) -> Callable[[str], object]:
    """Return what reads an argument that may be "none"."""

    def parse(text: str) -> object:
        return text if text == NONE else read(text)

    return parse


def add_queue_settings(parser: argparse.ArgumentParser, end: str) -> None:
    """Add the settings of a queue that can be changed."""
    parser.add_argument(
        "--capacity", type=count_argument, metavar="N", help="how many messages may be not finished"
    )
    parser.add_argument(
        "--lease", type=seconds_argument, metavar="S", help="how long a message is leased"
    )
    parser.add_argument(
        "--ttl",
        type=or_none(seconds_argument),
        metavar="S",
        help=f"do not deliver a message after so long, such as 7d{end}",
    )
    parser.add_argument(
        "--payload-max", type=size_argument, metavar="SIZE", help="the longest payload"
    )
    parser.add_argument(
        "--dedup-window",
        type=seconds_argument,
        metavar="S",
        help="how long a --dedup-id is stored once",
    )
    parser.add_argument(
        "--ageing",
        action=argparse.BooleanOptionalAction,
        help="let the longest waiting message come first now and then",
    )
    add_level(parser)
    retry = parser.add_argument_group("how often a message is tried")
    retry.add_argument("--max-attempts", type=count_argument, metavar="N", help="1 to 62")
    retry.add_argument(
        "--backoff", type=seconds_argument, metavar="S", help="the wait after the first failure"
    )
    retry.add_argument(
        "--factor", type=float, metavar="F", help="each wait is so many times the one before"
    )
    retry.add_argument("--max-delay", type=seconds_argument, metavar="S", help="the longest wait")
    retry.add_argument(
        "--jitter", type=float, metavar="PART", help="of a wait that is left to chance, 0 to 1"
    )


# --- streams --------------------------------------------------------------------------------------


def run_create(args: argparse.Namespace) -> int:
    """Make a stream."""
    import millstream

    with millstream.open(args.store) as store:
        refuse_existing(args, "stream", args.stream, store.streams())
        of_files = {} if args.segment_bytes is None else {"segment_bytes": args.segment_bytes}
        stream = store.stream(
            args.stream,
            **of_files,
            partitions=args.partitions,
            retention=retention_of(args, None),
            durability=level_of(args),
            compact=compaction_of(args, None),
        )
        same_level(args, store.stream(args.stream).durability)
        tell(args, stream_settings(stream))
    return 0


def run_alter(args: argparse.Namespace) -> int:
    """Change the settings of a stream; those that are not named stay."""
    with opened(args.store, "rw") as store:
        stream = existing(store, args.stream)
        changed: dict[str, Any] = {
            "retention": retention_of(args, stream.retention),
            "segment_bytes": args.segment_bytes,
            "compact": compaction_of(args, stream.compaction),
        }
        changed = {name: value for name, value in changed.items() if value is not None}
        if args.compact is False:
            changed["compact"] = None
        if args.durability is not None:
            changed["durability"] = level_of(args)
        if not changed and args.partitions is None:
            Output(args.json).say("millstream: name a setting to change")
            return 2
        if args.partitions is not None:
            store.stream(args.stream, partitions=args.partitions, on_mismatch="alter")
        if changed:
            stream.alter(**changed)
        tell(args, stream_settings(stream))
    return 0


def run_add(args: argparse.Namespace) -> int:
    """Add partitions."""
    with opened(args.store, "rw") as store:
        stream = existing(store, args.stream)
        stream.add_partitions(args.count)
        tell(args, stream_settings(stream))
    return 0


def run_drop(args: argparse.Namespace) -> int:
    """Drop a stream."""

    def describe(store: Store) -> str:
        stats = existing(store, args.stream).stats()
        return f"{plural(stats.records, 'record')} in {plural(len(stats.partitions), 'partition')}"

    return drop(args, "stream", args.stream, describe, lambda store: store.drop_stream(args.stream))


def stream_settings(stream: Stream) -> dict[str, Any]:
    """Return the settings of a stream, as `create` and `alter` print them."""
    stats = stream.stats()
    return {
        "stream": stats.name,
        "partitions": len(stats.partitions),
        "retention": stats.retention.as_dict(),
        "segment_bytes": stats.segment_bytes,
        "durability": stats.durability,
        "compaction": None if stats.compaction is None else stats.compaction.as_dict(),
    }


def retention_of(args: argparse.Namespace, before: Retention | None) -> Retention | None:
    """Return the retention that the arguments name, the rest of it as before; None: they do not."""
    from millstream import Retention

    given = {name: getattr(args, f"retention_{name}") for name in RETENTION}
    named = {name: value for name, value in given.items() if value is not None}
    if not named:
        return None
    rest: dict[str, Any] = {} if before is None else before.as_dict()
    return Retention(**{**rest, **{n: None if v == NONE else v for n, v in named.items()}})


def compaction_of(args: argparse.Namespace, before: Compaction | None) -> Compaction | None:
    """Return the compaction that the arguments name; None: they do not, or they end it."""
    from millstream import Compaction, InvalidArgument

    given = {name: getattr(args, f"compact_{name}") for name in COMPACTION}
    named = {name: value for name, value in given.items() if value is not None}
    if args.compact is False and named:
        raise InvalidArgument("--no-compact: goes with no other option of compaction")
    if not named and not args.compact:
        return None
    rest: dict[str, Any] = {} if before is None else before.as_dict()
    return Compaction(**{**rest, **named})


# --- queues ---------------------------------------------------------------------------------------


def run_create_queue(args: argparse.Namespace) -> int:
    """Make a queue."""
    import millstream

    with millstream.open(args.store) as store:
        refuse_existing(args, "queue", args.queue, store.queues())
        queue = store.queue(
            args.queue, **named(args), retry=retry_of(args, None), durability=level_of(args)
        )
        same_level(args, store.queue(args.queue).durability)
        tell(args, queue_settings(queue))
    return 0


def run_alter_queue(args: argparse.Namespace) -> int:
    """Change the settings of a queue; those that are not named stay."""
    with opened(args.store, "rw") as store:
        queue = existing_queue(store, args.queue)
        changed = named(args)
        if args.ttl == NONE:
            changed["ttl"] = None
        if (retry := retry_of(args, queue.retry)) is not None:
            changed["retry"] = retry
        if args.durability is not None:
            changed["durability"] = level_of(args)
        if not changed:
            Output(args.json).say("millstream: name a setting to change")
            return 2
        queue.alter(**changed)
        tell(args, queue_settings(queue))
    return 0


def run_drop_queue(args: argparse.Namespace) -> int:
    """Drop a queue."""

    def describe(store: Store) -> str:
        stats = existing_queue(store, args.queue).stats()
        return f"{plural(stats.unfinished, 'message')}, {plural(stats.dead, 'dead letter')}"

    return drop(args, "queue", args.queue, describe, lambda store: store.drop_queue(args.queue))


def named(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a queue that the arguments name."""
    found = {name: getattr(args, name, None) for name in QUEUE}
    return {name: value for name, value in found.items() if value not in (None, NONE)}


def retry_of(args: argparse.Namespace, before: RetryPolicy | None) -> RetryPolicy | None:
    """Return the policy that the arguments name, the rest of it as before; None: they do not."""
    from millstream import RetryPolicy

    given = {name: getattr(args, name) for name in RETRY}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    rest: dict[str, Any] = {} if before is None else before.as_dict()
    return RetryPolicy(**{**rest, **given})


def queue_settings(queue: Queue) -> dict[str, Any]:
    """Return the settings of a queue, as `create` and `alter` print them."""
    stats = queue.stats()
    settings = {name: getattr(stats, name) for name in (*QUEUE, "durability")}
    return {"queue": queue.name, **settings, "retry": stats.retry.as_dict()}


# --- both -----------------------------------------------------------------------------------------


def level_of(args: argparse.Namespace) -> Any:
    """Return the level that is to be stored; None: that of the store."""
    return None if args.durability == "store" else args.durability


def same_level(args: argparse.Namespace, stored: str) -> None:
    """Raise where what is there has another level: given to an opener it holds for its handle."""
    from millstream.errors import ConfigMismatch

    if level_of(args) not in (None, stored):
        raise ConfigMismatch(f"durability is {stored}, not {args.durability}; see `alter`")


def refuse_existing(args: argparse.Namespace, what: str, name: str, names: Sequence[str]) -> None:
    """Raise where something of that name is there and that is not well."""
    from millstream.errors import ConfigMismatch

    if name in names and not args.if_not_exists:
        raise ConfigMismatch(f"there is a {what} {name!r} in this store; see `alter`")


def tell(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Say the settings that are stored now."""
    output = Output(args.json)
    if args.json:
        output.json(settings)
        return
    what, *rest = settings.items()
    shown = ", ".join(f"{name.replace('_', ' ')} {text_of(value)}" for name, value in rest)
    output.say(f"{what[1]}: {shown}")


def drop(
    args: argparse.Namespace,
    what: str,
    name: str,
    describe: Callable[[Store], str],
    do: Callable[[Store], None],
) -> int:
    """Drop something, once whoever is at the terminal has said so; 2 where nobody is."""
    output = Output(args.json)
    with opened(args.store) as store:
        there = store.streams() if what == "stream" else store.queues()
        if name not in there and args.if_exists:
            if args.json:
                output.json({what: name, "dropped": False})
            else:
                output.say(f"no {what} {name!r} in this store")
            return 0
        lost = describe(store)
    if not args.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            output.say(f"millstream: {what} {name!r} has {lost}; to drop it without asking: --yes")
            return 2
        if not output.confirm(f"Drop {what} {name!r} of {args.store}, with {lost}?"):
            output.say("millstream: not dropped")
            return 3
    with opened(args.store, "rw") as store:
        do(store)
    if args.json:
        output.json({what: name, "dropped": True})
    else:
        output.say(f"dropped {what} {name!r}: {lost}")
    return 0
