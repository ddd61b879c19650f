"""`append`, `cat` and `tail`: records in from stdin, records out to stdout."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import errno
import heapq
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from millstream.cli.formats import (
    Record,
    Writer,
    compile_format,
    json_writer,
    raw_writer,
    records_of,
)
from millstream.cli.output import Output, plural
from millstream.cli.stores import add_names, closest, existing, find_store, opened, parse_start

if TYPE_CHECKING:
    from millstream import Batch, Span, Stream
    from millstream.options import Start

CHUNK_BYTES = 1 << 18
BATCH_RECORDS = 10_000
BATCH_BYTES = 4 << 20
LINE_BYTES_MAX = 512 << 20  # what we hold of a line that does not end; above any limit of a value
TAIL_RECORDS = 10


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs."""
    register_append(verbs)
    parser = verbs.add_parser(
        "cat",
        help="print records",
        description="Print the records of a stream, from the first one on, and leave at the end. "
        "Values are written as they are, each followed by a newline. The records of one partition "
        "come in order; with -o -N those of all partitions are merged by time. An offset goes for "
        "each partition: those that end before it are passed over; if all do, it ends with 3.",
        epilog="FORMAT: %s value, %S its length, %k key, %K its length, %h headers, %o offset, "
        "%p partition, %t stream, %T timestamp in ms, %% percent, and \\n \\t \\r \\0 \\\\ \\xHH.",
    )
    add_reading(parser, "raise", "-f")
    parser.add_argument(
        "-o",
        "--offset",
        metavar="START",
        type=start_argument,
        default="earliest",
        help="where to start: an offset, -N for the last N records, earliest, latest, or a time "
        "such as 2013-07-01T12:00 (local) or 2013-07-01T12:00Z",
    )
    parser.add_argument("-e", "--exit", action="store_true", help="leave at the end (as ever)")
    parser.add_argument(
        "-n",
        "-c",
        "--max-records",
        metavar="N",
        type=count_argument,
        help="leave after N records (default: all)",
    )
    parser.set_defaults(run=run_cat, follow=False)
    parser = verbs.add_parser(
        "tail",
        help="print the last records, and with -f those to come",
        description="Print the last records of a stream, merged by time; with -f wait for more "
        "until Ctrl-C. Where retention removes records before they were read, that is said on "
        "stderr, and it goes on.",
    )
    add_reading(parser, "earliest")
    parser.add_argument(
        "-n",
        "--lines",
        metavar="N",
        type=count_argument,
        default=TAIL_RECORDS,
        help="how many records",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="wait for more")
    parser.set_defaults(run=run_tail)


def register_append(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `append`."""
    parser = verbs.add_parser(
        "append",
        help="append the lines of stdin",
        description="Append each line of stdin as one record, in batches: whatever there is, as "
        "soon as stdin has no more ready. Store and stream are made if they do not exist, unless "
        "--no-create forbids it.",
    )
    add_names(parser, "store", "stream")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "-k",
        "-K",
        "--key-separator",
        metavar="SEP",
        type=separator_argument,
        help="each line is KEY SEP VALUE; one without SEP has no key",
    )
    keys.add_argument("--key", help="the key of every record")
    parser.add_argument(
        "-p",
        "--partition",
        type=count_argument,
        help="the partition to append to (default: by the key, else in turn)",
    )
    parser.add_argument(
        "--partitions",
        type=count_argument,
        metavar="N",
        help="how many, if the stream is new (default: 1)",
    )
    add_create(parser)
    parser.add_argument(
        "--durability",
        choices=("process", "interval", "sync"),
        help="what a record has survived when it counts as appended (default: as stored)",
    )
    add_headers(parser, "record")
    parser.add_argument(
        "--producer",
        metavar="ID",
        help="number the records, and leave out those that this producer has appended before: the "
        "same input, given again, adds nothing",
    )
    parser.add_argument(
        "--first-sequence",
        metavar="N",
        type=count_argument,
        help="with --producer: the number of the first record (default: 0)",
    )
    parser.add_argument(
        "-0", "-z", "--null", action="store_true", help="records end with NUL, not newline"
    )
    parser.add_argument("-Z", "--empty-null", action="store_true", help="an empty value is null")
    parser.add_argument("--json", action="store_true", help="print the count as JSON on stdout")
    parser.set_defaults(run=run_append)


def add_headers(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option for headers of all that is written."""
    parser.add_argument(
        "--header",
        metavar="NAME=VALUE",
        type=header_argument,
        action="append",
        default=[],
        help=f"a header of every {what}; may be given again",
    )


def add_create(parser: argparse.ArgumentParser) -> None:
    """Add whether what is not there is made: a typo, where it should not be."""
    parser.add_argument(
        "--create",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make what is not there, or end with 3",
    )


def warn_similar(output: Output, what: str, name: str, names: Sequence[str]) -> None:
    """Say what may have been meant, where something of another name is about to be made."""
    if name not in names and (near := closest(name, names)):
        output.say(f"note: {what} {name!r} is new; there is {near!r}, too")


def add_reading(parser: argparse.ArgumentParser, on_lost: str, *format_options: str) -> None:
    """Add what `cat` and `tail` share; -f means what it does in kcat and in tail(1)."""
    add_names(parser, "store", "stream")
    parser.add_argument(
        "-p", "--partition", type=count_argument, help="only this partition (default: all)"
    )
    parser.add_argument(
        "--on-lost",
        choices=("raise", "earliest"),
        default=on_lost,
        help="where retention was faster: end with 3, or say so and go on at what is left",
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        *format_options,
        "--format",
        metavar="FORMAT",
        type=format_argument,
        help="how to write a record (default: its value and a newline)",
    )
    shape.add_argument("-J", "--json", action="store_true", help="one JSON object a line")
    shape.add_argument("-z", "--null", action="store_true", help="end values with NUL, not newline")


def count_argument(text: str) -> int:
    """Read a number that cannot be negative."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return int(text)


def seconds_argument(text: str) -> float:
    """Read seconds, plain or as 90m."""
    from millstream.errors import MillstreamError
    from millstream.options import parse_seconds

    try:
        return float(text) if text.replace(".", "", 1).isdigit() else parse_seconds(text)
    except MillstreamError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def separator_argument(text: str) -> bytes:
    """Read a separator of one byte or more."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return os.fsencode(text)


def format_argument(text: str) -> str:
    """Read a format, and see that it can be compiled."""
    try:
        compile_format(text, "")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def header_argument(text: str) -> tuple[str, bytes]:
    """Read NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, os.fsencode(value)


def start_argument(text: str) -> Start:
    """Read what -o takes."""
    try:
        return parse_start(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an offset, earliest, latest or an ISO 8601 time"
        ) from None


# --- append -------------------------------------------------------------------------------------


def run_append(args: argparse.Namespace) -> int:
    """Append stdin and say how much it was, also when it ends early."""
    import millstream

    output = Output(args.json)
    if args.first_sequence is not None and args.producer is None:
        raise millstream.InvalidArgument("--first-sequence: goes with --producer ID alone")
    key = None if args.key is None else os.fsencode(args.key)
    sequence = args.first_sequence or 0
    counts: dict[int, int] = {}
    if not args.create:
        find_store(args.store)
    with millstream.open(args.store) as store:
        if not args.create:
            existing(store, args.stream)
        else:
            warn_similar(output, "stream", args.stream, store.streams())
        stream = store.stream(args.stream, partitions=args.partitions)
        if args.partition is not None:
            stream.next_offset(args.partition)  # where stdin is empty, nothing else would ask
        append_many: Callable[..., list[Span]] = stream.append_many
        if args.producer is not None:
            append_many = stream.producer(args.producer).append_many
        say_that_it_reads(output)
        try:
            for lines in ready_lines(0, b"\0" if args.null else b"\n"):
                keys, values = split_keys(lines, args.key_separator, key)
                with interrupted_later():  # what is in is counted
                    try:
                        spans = append_many(
                            [value or None for value in values] if args.empty_null else values,
                            keys=keys,
                            headers=dict(args.header) or None,
                            partition=args.partition,
                            durability=args.durability,
                            **({} if args.producer is None else {"first_sequence": sequence}),
                        )
                    except millstream.StoreFull as full:  # here; other partitions have their part
                        add_spans(counts, full.appended)
                        raise
                    add_spans(counts, spans)
                    sequence += len(lines)
        finally:
            total = sum(counts.values())
            known = max(sequence - (args.first_sequence or 0) - total, 0)
            if args.json:
                by_partition = {str(partition): counts[partition] for partition in sorted(counts)}
                resent = {"resent": known} if args.producer else {}
                output.json({"appended": total, **resent, "partitions": by_partition})
            else:
                left = f", {plural(known, 're-send')} left out" if args.producer else ""
                output.say(f"{plural(total, 'record')} appended{left}")
    return 0


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block; a second one does not wait."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a job in the background goes on without it
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def add_spans(counts: dict[int, int], spans: Iterable[Span]) -> None:
    """Count what was appended to each partition."""
    for span in spans:
        counts[span.partition] = counts.get(span.partition, 0) + span.count


def say_that_it_reads(output: Output) -> None:
    """Say that lines are awaited, to who would wait as well: where stdin is a terminal."""
    if os.isatty(0):
        output.say("reading lines; Ctrl-D ends")


def ready_lines(descriptor: int, end: bytes) -> Iterator[list[bytes]]:
    """Yield lists of lines: all that are complete, before each wait for more.

    The last line needs no end. Only complete lines are held, and the one that is not yet.
    """
    lines: list[bytes] = []
    size = 0
    pieces: list[bytes] = []  # of the line that has not ended
    pending = 0
    while True:
        full = len(lines) >= BATCH_RECORDS or size >= BATCH_BYTES
        if lines and (full or not select.select([descriptor], [], [], 0)[0]):
            yield lines
            lines, size = [], 0
        chunk = os.read(descriptor, CHUNK_BYTES)
        if not chunk:
            break
        first, *more = chunk.split(end)
        pieces.append(first)
        pending += len(first)
        if more:
            lines.append(b"".join(pieces))
            lines += more[:-1]
            size += len(chunk) + pending
            pieces, pending = [more[-1]], len(more[-1])
        elif pending > LINE_BYTES_MAX:
            raise too_long()
    if pending:
        lines.append(b"".join(pieces))
    if lines:
        yield lines


def too_long() -> Exception:
    """Return the error of a line that no record can hold."""
    from millstream.errors import LimitExceeded

    return LimitExceeded(f"a line of stdin is longer than {LINE_BYTES_MAX >> 20} MiB")


def split_keys(
    lines: list[bytes], separator: bytes | None, key: bytes | None
) -> tuple[list[bytes | None] | None, list[bytes]]:
    """Return the keys, None where no record has one, and the values."""
    if separator is None:
        return (None if key is None else [key] * len(lines)), lines
    parts = [line.partition(separator) for line in lines]
    keys = [key if found else None for key, found, _ in parts]
    return keys, [value if found else line for line, found, value in parts]


# --- cat, tail ----------------------------------------------------------------------------------


def run_cat(args: argparse.Namespace) -> int:
    """Print records from a start to the end."""
    sink = Sink(args)
    with opened(args.store) as store:
        source = Source(existing(store, args.stream), args)
        if isinstance(args.offset, int) and args.offset < 0:
            ends = source.tails()
            sink.records(source.merged(source.last(ends, -args.offset), ends))
            return 0
        for batch in source.batches(args.offset):
            if not sink.batch(batch):
                break
        sink.flush()
    return 0


def run_tail(args: argparse.Namespace) -> int:
    """Print the last records, and with -f those to come."""
    sink = Sink(args)
    # A follower joins the members where it may: only then do writers wake it at once, and it
    # lives on when one of them is killed and the next recovers the store.
    find_store(args.store)
    member = args.follow and os.access(args.store, os.W_OK)
    with opened(args.store, "rw" if member else "r") as store:
        stream = existing(store, args.stream)
        source = Source(stream, args)
        # The reader stands at the end before we ask where that is: nothing falls in between.
        reader = stream.read(
            partition=args.partition, start="latest", follow=args.follow, on_lost=args.on_lost
        )
        ends = source.tails()
        sink.records(source.merged(source.last(ends, args.lines), ends))
        sink.flush()
        if args.follow:
            with while_somebody_reads():
                for batch in source.noticed(reader, dict(ends)):
                    seen = ends.get(batch.partition, 0) - batch.first_offset
                    if seen < len(batch):
                        sink.batch(batch[seen:] if seen > 0 else batch)
                        sink.flush()
    return 0


@contextlib.contextmanager
def while_somebody_reads() -> Iterator[None]:
    """Raise BrokenPipeError in the block when the reader of stdout leaves, also between writes."""

    def leave(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads stdout any more")

    def watch() -> None:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are told without being asked for
        poll.poll()
        _thread.interrupt_main(signal.SIGPIPE)

    before = signal.signal(signal.SIGPIPE, leave)
    try:
        threading.Thread(target=watch, daemon=True).start()
        yield
    finally:
        signal.signal(signal.SIGPIPE, before)


class Sink:
    """Writes records to stdout as the arguments say, up to a number of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out = sys.stdout.buffer
        self.left: int | None = getattr(args, "max_records", None)
        self.end = b"\0" if args.null else b"\n"
        self.raw = not args.json and args.format is None
        self.write: Writer = raw_writer(self.end)
        if args.json:
            self.write = json_writer(args.stream)
        elif args.format is not None:
            self.write = compile_format(args.format, args.stream)

    def batch(self, batch: Batch) -> bool:
        """Write a batch; return whether more is wanted."""
        if self.raw and (self.left is None or self.left >= len(batch)):
            self.out.writelines((value or b"") + self.end for value in batch.values)
            self.left = None if self.left is None else self.left - len(batch)
            return self.left != 0
        return self.records(records_of(batch))

    def records(self, records: Iterable[Record]) -> bool:
        """Write records; return whether more is wanted."""
        if self.left == 0:
            return False
        for record in records:
            self.out.write(self.write(record))
            if self.left is not None:
                self.left -= 1
                if self.left == 0:
                    return False
        return True

    def flush(self) -> None:
        """Hand what was written to whoever reads us."""
        self.out.flush()


class Source:
    """What `cat` and `tail` read of a stream, as the arguments say; what is lost is told."""

    def __init__(self, stream: Stream, args: argparse.Namespace) -> None:
        self.stream = stream
        self.partition: int | None = args.partition
        self.on_lost: Literal["raise", "earliest"] = args.on_lost
        self.output = Output()

    def batches(self, start: Start) -> Iterator[Batch]:
        """Yield batches from one start.

        An offset is one of each partition: those that end before it are passed over, if not all do.
        """
        if not isinstance(start, int):
            yield from self.noticed(self.read(self.partition, start), {})
            return
        ends = self.tails()
        within = [number for number, end in ends.items() if start <= end] or list(ends)
        for number in within:  # what is refused is refused before anything is printed
            if start > ends[number] or start < self.stream.first_offset(number):
                self.read(number, start)
        for number in within:
            yield from self.noticed(self.read(number, start), {number: start})

    def read(self, partition: int | None, start: Start) -> Iterator[Batch]:
        """Read on from a start, or, as was asked for, from what retention has left."""
        if self.on_lost == "earliest" and isinstance(start, int) and partition is not None:
            end = self.stream.next_offset(partition)
            if start > end:  # was never there: not lost
                return self.stream.read(partition=partition, start=start)
        return self.stream.read(partition=partition, start=start, on_lost=self.on_lost)

    def noticed(self, batches: Iterator[Batch], due: dict[int, int]) -> Iterator[Batch]:
        """Yield batches, and say where retention removed what would have come; `due` comes next."""
        for batch in batches:
            number, first = batch.partition, batch.first_offset
            expected = due.get(number, first)
            # A gap may be of compaction or of repair, too.
            if expected < first and (left := self.stream.first_offset(number)) > expected:
                self.output.say(
                    f"millstream: partition {number}: retention removed offsets {expected} to"
                    f" {min(left, first) - 1} before they were read"
                )
            due[number] = batch.next_offset
            yield batch

    def tails(self) -> dict[int, int]:
        """Return the next offset of each partition, or of one."""
        one = self.partition
        numbers = range(self.stream.partitions) if one is None else [one]
        return {number: self.stream.next_offset(number) for number in numbers}

    def last(self, ends: dict[int, int], count: int) -> dict[int, int]:
        """Return where to start in each partition for the last `count` records of all, by time.

        A partition keeps its order, whatever the timestamps: a record counts as late as the latest
        before it.
        """
        import numpy as np

        stream = self.stream
        starts = {p: max(stream.first_offset(p), end - count) for p, end in ends.items()}
        if len(ends) == 1 or count == 0:
            return starts
        times, owners = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number, end in ends.items():
            found = [
                batch.timestamps[batch.offsets < end]
                for batch in stream.read(partition=number, start=starts[number], on_lost="earliest")
                if batch.first_offset < end
            ]
            if found:
                times.append(np.maximum.accumulate(np.concatenate(found)))
                owners.append(np.full(len(times[-1]), number))
        order = np.argsort(np.concatenate(times), kind="stable")[-count:]
        kept = np.concatenate(owners)[order]
        return {number: end - int((kept == number).sum()) for number, end in ends.items()}

    def merged(self, starts: dict[int, int], ends: dict[int, int]) -> Iterator[Record]:
        """Yield the records of several partitions by time, those of each in its order."""

        def partition(number: int) -> Iterator[tuple[int, int, Record]]:
            latest = -(1 << 63)
            due = {number: starts[number]}
            for batch in self.noticed(self.read(number, starts[number]), due):
                for record in records_of(batch):
                    if record.offset >= ends[number]:
                        return
                    latest = max(latest, record.timestamp)
                    yield latest, number, record

        parts = [partition(number) for number in starts if starts[number] < ends[number]]
        for _, _, record in heapq.merge(*parts, key=lambda part: part[:2]):
            yield record
