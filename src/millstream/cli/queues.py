"""`queue`: messages in from arguments or stdin, out to stdout, and managing queues."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from millstream.cli import configure, queue_bench
from millstream.cli.output import Column, Output, count_text, plural, text_of, text_or_base64
from millstream.cli.records import (
    add_create,
    add_headers,
    count_argument,
    ready_lines,
    say_that_it_reads,
    seconds_argument,
    warn_similar,
)
from millstream.cli.stores import Mode, add_names, existing_queue, find_store, opened

if TYPE_CHECKING:
    from millstream import Put, Queue, QueueStats

PEEKED = 10
BATCH = 1_000  # messages that one call puts or takes
SHOWN_BYTES = 60  # of a payload, in tables
NUMBERS = ("id", "priority", "attempts")
PROSE = ("value", "key", "reason", "last_error")
COUNTS = ("ready", "delayed", "leased", "dead", "capacity")


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and the verbs below it."""
    parser = verbs.add_parser(
        "queue",
        help="put, take and manage messages",
        description="Put messages into a work queue, take them, and manage it.",
    )
    below = parser.add_subparsers(dest="queue_verb", metavar="VERB", required=True)
    register_put(below)
    register_get(below)
    parser = add(below, "ls", run_ls, "list queues", queue=False)
    parser = add(below, "info", run_info, "show a queue in detail")
    parser = add(below, "peek", run_peek, "show the next messages without taking them")
    parser.add_argument("-n", metavar="N", type=count_argument, default=PEEKED, help="how many")
    parser = add(below, "cancel", run_cancel, "remove messages that nobody has taken")
    parser.add_argument("ids", metavar="ID", nargs="+", type=count_argument, help="of a message")
    add(below, "pause", run_pause, "deliver nothing more until `resume`; what is taken goes on")
    add(below, "resume", run_resume, "deliver again")
    parser = below.add_parser(
        "dead", help="manage dead letters", description="Manage dead letters."
    )
    dead = parser.add_subparsers(dest="dead_verb", metavar="VERB", required=True)
    add(dead, "ls", run_dead_ls, "list dead letters: why, since when")
    for name, run, text in (
        ("redrive", run_dead_redrive, "put dead letters back, with all attempts before them"),
        ("purge", run_dead_purge, "delete dead letters for good"),
    ):
        parser = add(dead, name, run, text)
        parser.add_argument(
            "ids", metavar="ID", nargs="*", type=count_argument, help="of a dead letter"
        )
        parser.add_argument("--all", action="store_true", help="all of them")
    queue_bench.register(below)
    configure.register_queue(below)


def add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    *,
    queue: bool = True,
) -> argparse.ArgumentParser:
    """Add one verb with what all of them take."""
    description = f"{text[0].upper()}{text[1:]}."
    parser = verbs.add_parser(name, help=text, description=description)
    add_names(parser, "store")
    if queue:
        add_names(parser, "queue")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def register_put(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `put`."""
    text = "put messages: the arguments, or each line of stdin"
    parser = add(verbs, "put", run_put, text)
    parser.description = (
        "Put each VALUE, or each line of stdin, as one message. Store and queue are made if they "
        "do not exist, unless --no-create forbids it. The ids of VALUEs are printed. Ends with 3 "
        "when the queue is full."
    )
    parser.add_argument("values", metavar="VALUE", nargs="*", help="a payload (default: stdin)")
    parser.add_argument(
        "-P", "--priority", type=count_argument, default=0, metavar="N", help="0 is the most urgent"
    )
    when = parser.add_mutually_exclusive_group()
    when.add_argument(
        "--delay", type=seconds_argument, metavar="S", help="deliver after that time: 90, 5m, 2h"
    )
    when.add_argument(
        "--at", type=moment_argument, metavar="TIME", help="deliver at an ISO 8601 time"
    )
    parser.add_argument("--key", help="of every message; orders them where the queue is ordered")
    parser.add_argument(
        "--ttl",
        type=seconds_argument,
        metavar="S",
        help="drop it after that time (default: none; then the queue's)",
    )
    parser.add_argument("--dedup-id", metavar="ID", help="of the one VALUE, within the window")
    add_headers(parser, "message")
    parser.add_argument(
        "--timeout",
        type=seconds_argument,
        default=0.0,
        metavar="S",
        help="wait for room that long",
    )
    parser.add_argument("-0", "-z", "--null", action="store_true", help="lines of stdin end in NUL")
    add_create(parser)
    new = parser.add_argument_group("if the queue is new")
    new.add_argument(
        "--capacity",
        type=count_argument,
        metavar="N",
        help="messages not finished (default: 100000)",
    )
    new.add_argument("--priorities", type=count_argument, metavar="N", help="1 to 8 (default: 4)")
    new.add_argument("--ordering", choices=("key",), help="one message of a key at a time")
    new.add_argument(
        "--dedup-window",
        type=seconds_argument,
        metavar="S",
        help="how long a --dedup-id is stored once (default: 0)",
    )


def register_get(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `get`."""
    parser = add(verbs, "get", run_get, "take messages, print and acknowledge them")
    parser.description = (
        "Take messages, write their payloads to stdout, each followed by a newline, and "
        "acknowledge what was written. Ends with 3 when there was none."
    )
    parser.add_argument("-n", metavar="N", type=count_argument, default=1, help="how many at most")
    parser.add_argument(
        "--timeout", type=seconds_argument, default=0.0, metavar="S", help="wait for one that long"
    )
    parser.add_argument("-0", "-z", "--null", action="store_true", help="end payloads with NUL")


def moment_argument(text: str) -> datetime:
    """Read an ISO 8601 time; without a zone it is local."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not an ISO 8601 time") from None


@contextmanager
def queue_of(args: argparse.Namespace, mode: Mode = "rw") -> Iterator[Queue]:
    """Open a queue that exists."""
    with opened(args.store, mode) as store:
        yield existing_queue(store, args.queue)


# --- messages -------------------------------------------------------------------------------------


def run_put(args: argparse.Namespace) -> int:
    """Put messages and say how many, also when it ends early."""
    import millstream

    output = Output(args.json)
    options = {name: getattr(args, name) for name in ("capacity", "priorities", "ordering")}
    options["dedup_window"] = args.dedup_window
    given = {name: value for name, value in options.items() if value is not None}
    ids: list[int] = []
    count = 0
    if not args.create:
        find_store(args.store)
    with millstream.open(args.store) as store:
        if not args.create:
            existing_queue(store, args.queue)
        else:
            warn_similar(output, "queue", args.queue, store.queues())
        queue = store.queue(args.queue, **given)
        if not args.values:
            say_that_it_reads(output)
        try:
            for values in payloads(args):
                put = queue.put_many(items_of(args, values), timeout=args.timeout)
                count += len(put)
                ids += put if args.values else []
                if len(put) < len(values):
                    raise millstream.QueueFull(f"queue {args.queue!r} is full")
        finally:
            if args.json:
                output.json({"put": count, **({"ids": ids} if args.values else {})})
            else:
                for one in ids:
                    output.line(str(one))
                output.say(f"{plural(count, 'message')} put")
    return 0


def payloads(args: argparse.Namespace) -> Iterator[list[bytes]]:
    """Yield the payloads to put, in lists."""
    if args.values:
        yield [os.fsencode(value) for value in args.values]
        return
    for lines in ready_lines(0, b"\0" if args.null else b"\n"):
        for start in range(0, len(lines), BATCH):
            yield lines[start : start + BATCH]


def items_of(args: argparse.Namespace, values: Iterable[bytes]) -> list[Put]:
    """Return what `put_many` takes."""
    from millstream import Put

    shared: dict[str, Any] = {
        "priority": args.priority,
        "delay": args.delay,
        "at": args.at,
        "key": None if args.key is None else os.fsencode(args.key),
        "ttl": args.ttl,
        "dedup_id": None if args.dedup_id is None else os.fsencode(args.dedup_id),
        "headers": dict(args.header) or None,
    }
    shared = {name: value for name, value in shared.items() if value is not None}
    return [Put(value, **shared) for value in values]


def run_get(args: argparse.Namespace) -> int:
    """Take messages; each is acknowledged once it was written."""
    import millstream

    output = Output(args.json)
    end = b"\0" if args.null else b"\n"
    left = args.n
    deadline = time.monotonic() + args.timeout
    with queue_of(args) as queue:
        while left > 0:
            wait = max(0.0, deadline - time.monotonic())
            taken = queue.get_many(min(left, BATCH), timeout=wait)
            if not taken:
                break
            try:
                for message in taken:
                    if args.json:
                        output.json(described(message))
                    else:
                        sys.stdout.buffer.write(message.value + end)
                sys.stdout.flush()
            except BaseException:
                for message in taken:
                    message.release()
                raise
            queue.ack_many(taken)
            left -= len(taken)
        if left == args.n and args.n > 0:
            raise millstream.Empty(f"no message was ready in queue {args.queue!r}")
    return 0


def described(message: Any) -> dict[str, Any]:
    """Return a message, taken or peeked at, as a dictionary."""
    fields: dict[str, Any] = {"id": message.id}
    for name in ("state", "priority", "attempt", "attempts", "put_at", "due", "deadline"):
        if hasattr(message, name):
            fields[name] = plain_time(getattr(message, name))
    fields["key"] = None if message.key is None else text_or_base64(message.key)
    value = message.value  # None: damaged
    fields["value"] = None if value is None else text_or_base64(bytes(value))
    if message.headers:
        fields["headers"] = {name: text_or_base64(data) for name, data in message.headers.items()}
    for name in ("expires", "reason", "first_error", "last_error", "first_at", "last_at"):
        if getattr(message, name, None) is not None:
            fields[name] = plain_time(getattr(message, name))
    if getattr(message, "traceback", ""):
        fields["traceback"] = message.traceback
    return fields


def plain_time(value: object) -> object:
    """Return a time as ISO 8601 in UTC, anything else as it is."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return value


def shown(data: bytes) -> str:
    """Return the beginning of a payload for a table, on one line."""
    text = data[:SHOWN_BYTES].decode("utf-8", "backslashreplace")
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text + ("..." if len(data) > SHOWN_BYTES else "")


# --- reading --------------------------------------------------------------------------------------


def run_ls(args: argparse.Namespace) -> int:
    """List the queues."""
    output = Output(args.json)
    with opened(args.store) as store:
        found = [store.queue(name).stats() for name in store.queues()]
    if args.json:
        output.json([numbers_of(stats) for stats in found])
        return 0
    output.table(
        [Column("Queue"), *(Column(name.capitalize(), right=True) for name in COUNTS), Column("")],
        [
            (
                stats.name,
                *(count_text(getattr(stats, field)) for field in COUNTS),
                "paused" if stats.paused else "",
            )
            for stats in found
        ],
        nothing="no queues in this store",
    )
    return 0


def numbers_of(stats: QueueStats) -> dict[str, Any]:
    """Return a queue in numbers, with its settings, as a dictionary."""
    names = [field.name for field in dataclasses.fields(stats)]
    return {**{name: getattr(stats, name) for name in names}, "retry": stats.retry.as_dict()}


def run_info(args: argparse.Namespace) -> int:
    """Show a queue in detail."""
    output = Output(args.json)
    with queue_of(args, "r") as queue:
        fields = numbers_of(queue.stats())
    if args.json:
        output.json(fields)
        return 0
    for name, value in fields.items():
        text = count_text(value) if type(value) is int else text_of(value)
        output.line(f"{name.replace('_', ' ')}: {text}")
    return 0


def run_peek(args: argparse.Namespace) -> int:
    """Show messages without taking them."""
    with queue_of(args, "r") as queue:
        found = [described(message) for message in queue.peek(args.n)]
    return print_messages(args, found, ("id", "state", "priority", "attempts", "key", "value"))


def print_messages(
    args: argparse.Namespace, found: list[dict[str, Any]], names: tuple[str, ...]
) -> int:
    """Print messages as a table or as JSON lines."""
    output = Output(args.json)
    if args.json:
        for fields in found:
            output.json(fields)
        return 0
    present = [name for name in names if any(name in fields for fields in found)]
    output.table(
        [
            Column(name.replace("_", " ").capitalize(), right=name in NUMBERS, prose=name in PROSE)
            for name in present
        ],
        [[cell(name, fields.get(name)) for name in present] for fields in found],
        nothing=f"{args.queue}: no {'dead letters' if 'reason' in names else 'messages'}",
    )
    return 0


def cell(name: str, value: object) -> str:
    """Return one field of a message for a table; its times to the second."""
    if name.endswith("_at") and isinstance(value, str):
        return f"{value[:19]}Z"
    if isinstance(value, dict):
        return f"base64 {str(value.get('base64'))[:SHOWN_BYTES]}"
    return "" if value is None else shown(str(value).encode("utf-8", "surrogateescape"))


# --- managing --------------------------------------------------------------------------------


def run_cancel(args: argparse.Namespace) -> int:
    """Cancel messages; 3 if one of them could not be."""
    output = Output(args.json)
    with queue_of(args) as queue:
        done = {one: bool(queue.cancel(one)) for one in dict.fromkeys(args.ids)}
    if args.json:
        output.json({"cancelled": [one for one in done if done[one]]})
    output.say(f"{plural(sum(done.values()), 'message')} cancelled")
    for one in done:
        if not done[one]:
            output.say(f"millstream: {one}: not there, finished, or taken by somebody")
    return 0 if all(done.values()) else 3


def run_pause(args: argparse.Namespace) -> int:
    """Pause a queue."""
    with queue_of(args) as queue:
        queue.pause()
    return say_done(args, "paused")


def run_resume(args: argparse.Namespace) -> int:
    """Resume a queue."""
    with queue_of(args) as queue:
        queue.resume()
    return say_done(args, "resumed")


def say_done(args: argparse.Namespace, what: str) -> int:
    """Say what was done with the queue."""
    output = Output(args.json)
    if args.json:
        output.json({what: True})
    else:
        output.say(f"{args.queue}: {what}")
    return 0


def run_dead_ls(args: argparse.Namespace) -> int:
    """List dead letters."""
    with queue_of(args, "r") as queue:
        found = [described(letter) for letter in queue.dead.list()]
    names = ("id", "attempts", "reason", "last_error", "last_at", "key", "value")
    return print_messages(args, found, names)


def needs_all(args: argparse.Namespace) -> bool:
    """Complain, and return True, unless it was said which dead letters are meant."""
    if bool(args.ids) == args.all:
        Output(False).say("millstream: name the IDs of dead letters, or say --all")
        return True
    return False


def run_dead_redrive(args: argparse.Namespace) -> int:
    """Put dead letters back; 3 if one of them is none."""
    return with_letters(args, "redriven", lambda queue, ids: queue.dead.redrive(ids))


def run_dead_purge(args: argparse.Namespace) -> int:
    """Delete dead letters; 3 if one of them is none."""
    return with_letters(args, "purged", lambda queue, ids: queue.dead.purge(ids))


def with_letters(
    args: argparse.Namespace, what: str, do: Callable[[Queue, int | None], int]
) -> int:
    """Do something with all dead letters or with some, and say with how many of them."""
    import millstream

    if needs_all(args):
        return 2
    output = Output(args.json)
    unknown = []
    count = 0
    with queue_of(args) as queue:
        before = len(queue.dead)
        try:
            for one in [None] if args.all else dict.fromkeys(args.ids):
                done = do(queue, one)
                count += done
                if one is not None and not done:
                    unknown.append(one)
        except millstream.QueueFull:
            if args.all:
                count = before - len(queue.dead)
            raise
        finally:
            if args.json:
                output.json({what: count})
            else:
                output.say(f"{args.queue}: {plural(count, 'dead letter')} {what}")
    for one in unknown:
        output.say(f"millstream: {one}: no dead letter of queue {args.queue!r}")
    left = before - count if args.all and what == "redriven" else 0
    if left > 0:
        output.say(f"millstream: queue {args.queue!r} is full: {plural(left, 'dead letter')} left")
    return 3 if unknown or left > 0 else 0
