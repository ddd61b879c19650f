"""`top`: a store as it changes, in the terminal."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from millstream.cli.output import Output
from millstream.cli.stores import add_names

if TYPE_CHECKING:
    from collections.abc import Callable


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "top",
        help="watch a store in the terminal",
        description="Show streams, consumer groups, queues and processes of a store as they change."
        " Enter looks closer, / filters, s sorts, ? says what else; nothing is changed before you"
        " confirmed it. Needs the extra millstream[top].",
    )
    add_names(parser, "store")
    parser.add_argument(
        "--every",
        type=seconds_argument,
        default=1.0,
        metavar="SECONDS",
        help="how often it looks",
    )
    parser.add_argument("--json", action="store_true", help="print what it would show, once")
    parser.set_defaults(run=run)


def seconds_argument(text: str) -> float:
    """Parse a number of seconds, a tenth at least."""
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: expected 0.1 to 3600 seconds")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Show it, or print it once."""
    from millstream import Unsupported
    from millstream.cli.picture import Watch

    if args.json:
        watch = Watch(args.store)
        try:
            Output(json=True).json(watch.picture())
        finally:
            watch.close()
        return 0
    try:
        show = terminal_view()
    except ImportError as error:
        raise Unsupported(f"top: {error}; pip install 'millstream[top]'") from error
    watch = Watch(args.store)
    try:
        show(watch, args.every)
    finally:
        watch.close()
    return 0


def terminal_view() -> Callable[..., None]:
    """Return what shows a watch; textual is imported only for it."""
    from millstream.cli.top_view import show

    return show
