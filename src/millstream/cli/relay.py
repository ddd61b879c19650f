"""`relay`: send a stream or a queue to another engine until SIGTERM."""

from __future__ import annotations

import argparse
import signal
from typing import TYPE_CHECKING

from millstream.cli.output import Output
from millstream.cli.records import seconds_argument
from millstream.cli.stores import add_names, existing, existing_queue, opened

if TYPE_CHECKING:
    from millstream import Queue, Stream


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "relay",
        help="send a stream or a queue to a server",
        description="Send what is in a stream, or in a queue, to the server at URL, until SIGTERM "
        "or Ctrl-C. A stream arrives exactly once and in order, whoever is killed; a queue at "
        "least once. Several at once share the work. What the server does not take stays here.",
    )
    add_names(parser, "store")
    parser.add_argument("name", metavar="NAME", help="name of the stream, or else of the queue")
    parser.add_argument("url", metavar="URL", help="address of the server, as nats://HOST:PORT")
    parser.add_argument("--topic", metavar="T", help="what it is called there (default: NAME)")
    parser.add_argument(
        "--timeout", type=seconds_argument, metavar="S", help="end when nothing came for so long"
    )
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Relay until a signal."""
    output = Output(args.json)
    with opened(args.store, mode="rw") as store:
        source: Stream | Queue
        if args.name in store.queues() and args.name not in store.streams():
            source = existing_queue(store, args.name)
        else:
            source = existing(store, args.name)
        with store.relay(source, to=args.url, topic=args.topic) as relay:
            signal.signal(signal.SIGTERM, lambda *_: relay.end())
            signal.signal(signal.SIGINT, lambda *_: relay.end())
            if not args.json:
                output.say(f"{args.name}: relaying, {relay.lag} to send; SIGTERM or Ctrl-C ends")
            relay.run(timeout=args.timeout)
            counts = {"sent": relay.sent, "lag": relay.lag}
    if args.json:
        output.json(counts)
    else:
        output.say(f"sent {counts['sent']}, {counts['lag']} left")
    return 0
