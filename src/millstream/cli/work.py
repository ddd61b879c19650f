"""`work`: run a worker until SIGTERM, then drain, and say what was released."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from millstream.cli.bench import positive
from millstream.cli.output import Output
from millstream.cli.records import seconds_argument
from millstream.cli.stores import existing_queue, opened

if TYPE_CHECKING:
    from millstream import Queue


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "work",
        help="run a worker of a queue",
        description="Call a function with the messages of a queue until SIGTERM or Ctrl-C. Then "
        "take nothing more, finish what is under way, release the rest, and say what was done. "
        "With STORE and QUEUE the function need not know of millstream; without them it is one "
        "that the module registered with @queue.worker(...), or the queue itself.",
    )
    parser.add_argument(
        "target",
        metavar="MODULE:FUNCTION",
        type=target_argument,
        help="what to call, found as Python imports it, here or installed",
    )
    parser.add_argument("store", metavar="STORE", nargs="?", help="directory of the store")
    parser.add_argument("queue", metavar="QUEUE", nargs="?", help="name of the queue")
    parser.add_argument(
        "--concurrency", type=positive, default=1, metavar="N", help="calls at once"
    )
    parser.add_argument(
        "--mode",
        choices=("thread", "process"),
        default="thread",
        help="what calls: threads of this process, or processes of their own",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="call with lists of up to N (default: with one message, not a list)",
    )
    parser.add_argument(
        "--linger",
        type=seconds_argument,
        default=0.0,
        metavar="S",
        help="with --batch: how long to wait for a list to fill, in seconds or as 5m",
    )
    parser.add_argument(
        "--time-limit",
        type=seconds_argument,
        default=300.0,
        metavar="S",
        help="for one call: so long its lease is renewed",
    )
    parser.add_argument(
        "--grace",
        type=seconds_argument,
        default=30.0,
        metavar="S",
        help="for the calls under way, once it is to end",
    )
    parser.add_argument("--until-empty", action="store_true", help="leave when all is done")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON on stdout")
    parser.set_defaults(run=run)


def target_argument(text: str) -> tuple[str, str]:
    """Read MODULE:FUNCTION."""
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODULE:FUNCTION")
    return module, name


def run(args: argparse.Namespace) -> int:
    """Find the function, work, and say what became of the messages."""
    output = Output(args.json)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    # What was done is ours to say, once.
    logging.getLogger("millstream.worker").setLevel(logging.WARNING)
    if args.store is not None and args.queue is None:
        output.say("millstream: name a QUEUE of the store")
        return 2
    sys.path.insert(0, os.getcwd())
    try:
        found = resolve(*args.target)
    except (ImportError, AttributeError) as error:
        output.say(f"millstream: {':'.join(args.target)}: {error}")
        return 3
    if args.store is None:
        return drain(args, output, registered(args, found))
    with opened(args.store, "rw") as store:
        queue = existing_queue(store, args.queue)
        decorate(args, queue, found)
        return drain(args, output, queue)


def resolve(module: str, name: str) -> Any:
    """Return what MODULE:NAME names."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def registered(args: argparse.Namespace, found: Any) -> Queue:
    """Return the queue that was named, or the only one of the module."""
    import millstream
    from millstream.errors import NotFound

    if isinstance(found, millstream.Queue):
        return found
    module = sys.modules[args.target[0]]
    queues = {id(one): one for one in vars(module).values() if isinstance(one, millstream.Queue)}
    if len(queues) != 1:
        text = f"{args.target[0]} has {len(queues)} queues: name one in place of the function, or"
        raise NotFound(f"{text} give STORE and QUEUE")
    return next(iter(queues.values()))


def decorate(args: argparse.Namespace, queue: Queue, function: Any) -> None:
    """Register a function with a queue as the arguments say."""
    queue.worker(
        concurrency=args.concurrency,
        mode=args.mode,
        batch=args.batch,
        linger=args.linger,
        time_limit=args.time_limit,
    )(function)


def drain(args: argparse.Namespace, output: Output, queue: Queue) -> int:
    """Work until told to stop; say what was done and released."""
    import millstream

    output.say(f"{queue.name}: working; SIGTERM or Ctrl-C drains")
    counts = millstream.run(queue, grace=args.grace, until_empty=args.until_empty)
    if args.json:
        output.json(dict(counts._asdict()))
    else:
        output.say(f"{queue.name}: {counts}")
    return 0
