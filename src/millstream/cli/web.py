"""`web`: a store in a browser, and as JSON: one page, nothing from other hosts.

Read only, unless it was started to allow actions; then whoever has the token may act.
"""

from __future__ import annotations

import argparse
import ipaddress
from typing import TYPE_CHECKING, NamedTuple

from millstream.cli.metrics import address_argument
from millstream.cli.output import Output
from millstream.cli.stores import add_names

if TYPE_CHECKING:
    from millstream.cli.web_server import Server

TOKEN_LEAST = 8
"""Characters of a token that is asked for over a network."""


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "web",
        help="watch a store in a browser",
        description="Serve one page, and below /api what it shows as JSON, until Ctrl-C: streams,"
        " consumer groups, queues, dead letters and processes, with the history of an hour. Read"
        " only, unless --allow-actions is given.",
    )
    add_names(parser, "store")
    parser.add_argument(
        "--listen",
        type=address_argument,
        default="127.0.0.1:8080",
        metavar="ADDRESS",
        help="serve it there; one off loopback needs --token (default: 127.0.0.1:8080)",
    )
    parser.add_argument(
        "--allow-actions",
        action="store_true",
        help="let who sends the token redrive, purge, pause, resume and seek",
    )
    parser.add_argument(
        "--token",
        metavar="TEXT",
        help="a secret that actions are sent with, as a bearer token; off loopback reading, too",
    )
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="how often")
    parser.add_argument("--json", action="store_true", help="print what it would show, once")
    parser.set_defaults(run=run)


class Access(NamedTuple):
    """Who may do what.

    Attributes:
        token: the secret; None: there is none.
        actions: may who has it change the store?
        open_to_read: may the store be read without it? So it is on loopback alone.
    """

    token: str | None
    actions: bool
    open_to_read: bool


def access_of(args: argparse.Namespace) -> Access:
    """Check what was asked for. Raises Unsupported."""
    from millstream import Unsupported

    host = args.listen[0]
    local = is_loopback(host)
    if args.token is not None and not (args.token and args.token.isascii()):
        raise Unsupported("--token: expected ASCII characters")
    if not local and args.token is not None and len(args.token) < TOKEN_LEAST:
        raise Unsupported(
            f"--listen {host}: a token of {TOKEN_LEAST} characters or more is needed there, since"
            " others can try shorter ones"
        )
    if not local and args.token is None:
        raise Unsupported(
            f"--listen {host}: who reaches that address would read the store; give --token, or"
            " listen on 127.0.0.1"
        )
    if args.allow_actions and args.token is None:
        raise Unsupported("--allow-actions: needs --token, which actions are sent with")
    return Access(args.token, args.allow_actions, local)


def is_loopback(host: str) -> bool:
    """Is it reached from this machine alone?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(args: argparse.Namespace) -> int:
    """Serve it, or print it once."""
    from millstream.cli.picture import Watch

    output = Output(args.json)
    access = access_of(args)
    watch = Watch(args.store)
    try:
        if args.json:
            output.json(watch.picture())
            return 0
        server = made(args, watch, access)
        try:
            host, port = server.server_address[:2]
            shown = f"[{host!s}]" if ":" in str(host) else str(host)
            output.say(f"serving http://{shown}:{port}/")
            server.serve_forever(poll_interval=0.2)
        finally:
            server.server_close()
    finally:
        watch.close()
    return 0


def made(args: argparse.Namespace, watch: object, access: Access) -> Server:
    """Make the server. Raises Unsupported where the address is taken, or none of ours."""
    from millstream import Unsupported
    from millstream.cli.web_server import Server

    host, port = args.listen
    try:
        return Server((host, port), watch, access, args.every)  # type: ignore[arg-type]
    except OSError as error:
        raise Unsupported(f"--listen {host}:{port}: {error.strerror}") from error
