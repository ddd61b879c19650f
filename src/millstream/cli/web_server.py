"""The server of `millstream web`: the page, JSON below /api, and actions for who has the token.

Its rules: what it serves says that nothing of other hosts may be loaded; a name that the browser
was told by somebody else's DNS is refused by its Host header; an action is a POST with a bearer
token, which no other site can make a browser send; there is no CORS.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from millstream.cli.output import Output, to_json
from millstream.cli.picture import act

if TYPE_CHECKING:
    from collections.abc import Callable

    from millstream.cli.picture import Watch
    from millstream.cli.web import Access

__all__ = ["Server"]

BODY_MAX = 1 << 16
METHODS = "GET, HEAD, POST"
SECONDS = 30.0
PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'sha256-{script}';"
    " style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Refused(Exception):
    """A request is answered by this status and text."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def page() -> tuple[bytes, str]:
    """The page, and the policy that lets its own script and style in, and nothing else."""
    content = files("millstream.cli").joinpath("web.html").read_bytes()

    def hashed(tag: bytes) -> str:
        within = re.search(b"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
        assert within is not None
        return base64.b64encode(hashlib.sha256(within[1]).digest()).decode("ascii")

    return content, POLICY.format(script=hashed(b"script"), style=hashed(b"style"))


class Route(NamedTuple):
    """What answers a method of a path.

    Attributes:
        method: GET or POST.
        pattern: of the path; its named groups are arguments.
        answer: a method of the handler.
        keys: which the object that a POST sends may have. Others are refused: a misspelt `ids`
            would have all dead letters removed.
    """

    method: str
    pattern: str
    answer: Callable[..., Any]
    keys: tuple[str, ...] = ()


class Server(ThreadingHTTPServer):
    """Serves a watch; a thread for each connection, and one that looks all the time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, address: tuple[str, int], watch: Watch, access: Access, every: float
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.watch, self.access, self.every = watch, access, max(0.2, every)
        self.page, self.policy = page()
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look, name="millstream-web", daemon=True)
        super().__init__(address, Handler)  # closes it again where the address cannot be had
        self._looking.start()

    def _look(self) -> None:
        """Take pictures whether somebody asks or not: for rates, and the history."""
        from millstream.errors import MillstreamError

        while not self._over.wait(self.every):
            try:
                self.watch.picture(max_age=self.every / 2)
            except (MillstreamError, OSError) as error:
                Output().say(f"millstream: {error}")

    def server_close(self) -> None:
        """Stop looking, and listening."""
        self._over.set()
        super().server_close()
        if self._looking.is_alive():
            self._looking.join(SECONDS)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "millstream", ""
    timeout = SECONDS
    routes: ClassVar[list[Route]] = []

    # --- answering --------------------------------------------------------------------------------

    def do_GET(self) -> None:
        """Answer, the page or JSON."""
        self._answer("GET")

    def do_HEAD(self) -> None:
        """The same without the body."""
        self._answer("GET")

    def do_POST(self) -> None:
        """Act."""
        self._answer("POST")

    def do_PUT(self) -> None:
        """Refuse what is a method, but not one that there is here."""
        self.close_connection = True  # its body is not read
        self._refuse(
            HTTPStatus.METHOD_NOT_ALLOWED,
            f"{self.command}: there are {METHODS}",
            {"Allow": METHODS},
        )

    do_DELETE = do_PATCH = do_OPTIONS = do_PUT

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request of ours in JSON as well."""
        self.close_connection = True
        status = HTTPStatus(code)
        self._refuse(status, message or status.phrase)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of what goes well."""

    def _answer(self, method: str) -> None:
        from millstream.errors import (
            CorruptBatch,
            InvalidArgument,
            MillstreamError,
            NotFound,
            OffsetOutOfRange,
            StorageError,
        )

        body = b""
        try:
            body = self._body() if method == "POST" else b""
            self._check_host()
            path = urlsplit(self.path)
            if method == "GET" and path.path == "/":
                self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
                return
            self._check_token(method)
            found = self._found(method, path.path, parse_qs(path.query), body)
            self._send(HTTPStatus.OK, to_json(found), "application/json")
        except Refused as refused:
            self._refuse(refused.status, str(refused))
        except NotFound as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except (InvalidArgument, OffsetOutOfRange) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except (StorageError, CorruptBatch) as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        except MillstreamError as error:
            self._refuse(HTTPStatus.CONFLICT, str(error))

    def _send(
        self,
        status: HTTPStatus,
        content: bytes,
        kind: str,
        more: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in {**PAGE_HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", self.server.policy)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: HTTPStatus, text: str, more: dict[str, str] | None = None) -> None:
        self._send(status, to_json({"error": text}), "application/json", more)

    # --- who asks ---------------------------------------------------------------------------------

    def _body(self) -> bytes:
        """What was sent; read whatever comes of it, or it would pass for the next request."""
        length = self.headers.get("Content-Length", "0")
        is_number = re.fullmatch(r"[0-9]{1,9}", length) is not None
        if self.headers.get("Transfer-Encoding") or not is_number or int(length) > BODY_MAX:
            self.close_connection = True
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body of at most {BODY_MAX} bytes, please"
            )
        return self.rfile.read(int(length))

    def _check_host(self) -> None:
        """On loopback: a page of somebody whose name points here now must not read the store."""
        host = (self.headers.get("Host") or "").lower()
        name = re.sub(r":[0-9]*$", "", host).strip("[]")
        ours = {"localhost", "127.0.0.1", "::1", str(self.server.server_address[0])}
        if self.server.access.open_to_read and name not in ours:
            raise Refused(HTTPStatus.FORBIDDEN, f"Host {host!r}: this is not its address")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host:
            raise Refused(HTTPStatus.FORBIDDEN, f"Origin {origin!r}: another page may not ask")

    def _check_token(self, method: str) -> None:
        access = self.server.access
        if method == "POST" and not access.actions:
            raise Refused(HTTPStatus.FORBIDDEN, "read only: start it with --allow-actions --token")
        if method == "GET" and access.open_to_read:
            return
        given = self.headers.get("Authorization", "")
        expected = f"Bearer {access.token}"
        if not hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode("utf-8")):
            raise Refused(HTTPStatus.FORBIDDEN, "the bearer token is missing, or not the one")

    # --- what there is ----------------------------------------------------------------------------

    def _found(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        for route in self.routes:
            matched = re.fullmatch(route.pattern, path)
            if matched is None or route.method != method:
                continue
            names = {name: unquote(value) for name, value in matched.groupdict().items()}
            if method == "GET":
                return route.answer(self, query, **names)
            return route.answer(self, parsed(body, route.keys), **names)
        raise Refused(HTTPStatus.NOT_FOUND, f"{method} {path}: there is no such thing")

    def store(self, query: dict[str, list[str]]) -> Any:
        """The picture."""
        every = self.server.every
        access = self.server.access
        return {**self.server.watch.picture(max_age=every), "every": every, "acts": access.actions}

    def listed(self, query: dict[str, list[str]], kind: str) -> Any:
        """The streams, queues or processes of the picture."""
        return self.server.watch.picture(max_age=self.server.every)[kind]

    def groups(self, query: dict[str, list[str]], name: str) -> Any:
        """The groups of a stream."""
        for stream in self.listed(query, "streams"):
            if stream["name"] == name:
                return stream["groups"]
        raise Refused(HTTPStatus.NOT_FOUND, f"no stream {name!r} in this store")

    def history(self, query: dict[str, list[str]]) -> Any:
        """The last hour, of all or of what is below a name."""
        prefix = one_of(query, "of", "").rstrip("/")
        found = self.server.watch.history.of(prefix)
        if prefix and not found["series"] and prefix not in self._places():
            raise Refused(HTTPStatus.NOT_FOUND, f"of {prefix!r}: there is no such thing")
        return found

    def _places(self) -> set[str]:
        """What may have a history, though there is no point of it yet."""
        picture = self.server.watch.picture(max_age=self.server.every)
        places = {"streams", "queues"}
        places |= {f"queues/{queue['name']}" for queue in picture["queues"]}
        for stream in picture["streams"]:
            base = f"streams/{stream['name']}"
            places |= {base, f"{base}/groups"}
            places |= {f"{base}/groups/{group['name']}" for group in stream["groups"]}
        return places

    def stream(self, query: dict[str, list[str]], name: str) -> Any:
        """A stream."""
        return self.server.watch.stream(name)

    def records(self, query: dict[str, list[str]], name: str, partition: str) -> Any:
        """Records of a partition."""
        start = one_of(query, "start", "")
        number = whole("start", start) if start else None
        return self.server.watch.records(name, whole("partition", partition), number)

    def group(self, query: dict[str, list[str]], name: str, group: str) -> Any:
        """A group."""
        return self.server.watch.group(name, group)

    def queue(self, query: dict[str, list[str]], name: str) -> Any:
        """A queue."""
        return self.server.watch.queue(name)

    def messages(self, query: dict[str, list[str]], name: str) -> Any:
        """Messages that wait."""
        return self.server.watch.messages(name, whole("count", one_of(query, "count", "100")))

    def letters(self, query: dict[str, list[str]], name: str) -> Any:
        """Dead letters."""
        return self.server.watch.letters(name, whole("count", one_of(query, "count", "100")))

    # --- what may be done -------------------------------------------------------------------------

    def act(self, what: str, **named: Any) -> Any:
        """Do it."""
        return act(self.server.watch.path, what, **named)

    def redrive(self, body: dict[str, Any], name: str) -> Any:
        """Have dead letters tried again."""
        return self.act("redrive", queue=name, ids=ids_of(body))

    def purge_dead(self, body: dict[str, Any], name: str) -> Any:
        """Remove dead letters."""
        return self.act("purge dead", queue=name, ids=ids_of(body))

    def purge(self, body: dict[str, Any], name: str) -> Any:
        """Remove what waits."""
        return self.act("purge", queue=name)

    def pause(self, body: dict[str, Any], name: str) -> Any:
        """Pause a queue."""
        return self.act("pause", queue=name)

    def resume(self, body: dict[str, Any], name: str) -> Any:
        """Resume a queue."""
        return self.act("resume", queue=name)

    def seek(self, body: dict[str, Any], name: str, group: str) -> Any:
        """Set where a group goes on."""
        to, partition = body.get("to"), body.get("partition")
        if not isinstance(to, str | int) or isinstance(to, bool):
            raise Refused(HTTPStatus.BAD_REQUEST, "to: expected an offset, a name or a time")
        if partition is not None and (
            not isinstance(partition, int) or isinstance(partition, bool)
        ):
            raise Refused(HTTPStatus.BAD_REQUEST, "partition: expected a number")
        return self.act("seek", stream=name, group=group, to=str(to), partition=partition)


QUEUE, STREAM = r"/api/queues/(?P<name>[^/]+)", r"/api/streams/(?P<name>[^/]+)"
GROUP = STREAM + r"/groups/(?P<group>[^/]+)"
Handler.routes = [
    Route("GET", r"/api/store", Handler.store),
    Route("GET", r"/api/(?P<kind>streams|queues|processes)", Handler.listed),
    Route("GET", r"/api/history", Handler.history),
    Route("GET", STREAM, Handler.stream),
    Route("GET", STREAM + r"/partitions/(?P<partition>[0-9]+)", Handler.records),
    Route("GET", STREAM + r"/groups", Handler.groups),
    Route("GET", GROUP, Handler.group),
    Route("GET", QUEUE, Handler.queue),
    Route("GET", QUEUE + r"/messages", Handler.messages),
    Route("GET", QUEUE + r"/dead", Handler.letters),
    Route("POST", QUEUE + r"/dead/redrive", Handler.redrive, ("ids",)),
    Route("POST", QUEUE + r"/dead/purge", Handler.purge_dead, ("ids",)),
    Route("POST", QUEUE + r"/purge", Handler.purge),
    Route("POST", QUEUE + r"/pause", Handler.pause),
    Route("POST", QUEUE + r"/resume", Handler.resume),
    Route("POST", GROUP + r"/seek", Handler.seek, ("to", "partition")),
]


def parsed(body: bytes, keys: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object that was sent, which may have these keys; nothing is an empty one."""
    try:
        found = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(HTTPStatus.BAD_REQUEST, "expected a JSON object")
    for key in found:
        if key not in keys:
            known = f"expected {' or '.join(keys)}" if keys else "expected an empty object"
            raise Refused(HTTPStatus.BAD_REQUEST, f"{key}: unknown; {known}")
    return found


def ids_of(body: dict[str, Any]) -> list[int] | None:
    """The ids of messages, as texts or numbers; None: all."""
    ids = body.get("ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(re.fullmatch(r"[0-9]{1,20}", str(one)) for one in ids):
        raise Refused(HTTPStatus.BAD_REQUEST, "ids: expected a list of ids")
    return [int(one) for one in ids]


def one_of(query: dict[str, list[str]], name: str, otherwise: str) -> str:
    """A field of the query."""
    return query.get(name, [otherwise])[-1]


def whole(name: str, text: str) -> int:
    """A number of a query or path."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name}: expected a number, found {text!r}")
    return min(int(text), 1000) if name == "count" else int(text)
