"""`metrics`: a store in the text format of Prometheus, printed or served."""

from __future__ import annotations

import argparse
import re

from millstream.cli.output import Output
from millstream.cli.stores import add_names, opened


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "metrics",
        help="print what a store is like for Prometheus, or serve it",
        description="Print queues, streams and groups in the text format of Prometheus, or serve it"
        " at /metrics until Ctrl-C. Read only. Needs the extra millstream[prometheus].",
    )
    add_names(parser, "store")
    parser.add_argument(
        "--listen",
        type=address_argument,
        metavar="ADDRESS",
        help="serve it there, 127.0.0.1:9464 say; whoever reaches that address can read it",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=run)


def address_argument(text: str) -> tuple[str, int]:
    """Parse HOST:PORT."""
    found = re.fullmatch(r"(?P<host>[^:]+|\[[0-9a-fA-F:]+\]):(?P<port>[0-9]{1,5})", text)
    if found is None or int(found["port"]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HOST:PORT, as in 127.0.0.1:9464")
    return found["host"].strip("[]"), int(found["port"])


def run(args: argparse.Namespace) -> int:
    """Print the metrics, or serve them."""
    from millstream import Unsupported

    try:
        from millstream.contrib.prometheus import Collector
    except ImportError as error:
        raise Unsupported(str(error)) from error
    from prometheus_client import CollectorRegistry, generate_latest, start_http_server

    output, registry = Output(args.json), CollectorRegistry()
    with opened(args.store) as store:
        registry.register(Collector(store))
        if args.listen is None and args.json:
            every = (sample for family in registry.collect() for sample in family.samples)
            output.json([{"name": o.name, "labels": o.labels, "value": o.value} for o in every])
            return 0
        if args.listen is None:
            for line in generate_latest(registry).decode().splitlines():
                output.print([(line, "")])  # never folded
            return 0
        host, port = args.listen
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise Unsupported(f"--listen {host}:{port}: {error.strerror}") from error
        try:
            output.say(f"serving http://{host}:{server.server_port}/metrics")
            thread.join()
        finally:
            server.shutdown()
            server.server_close()
    return 0
