"""Where a store is, as users write it: a path, or an address with a scheme.

A scheme that names a directory has a function that maps the address to its path, one that names a
server has an engine, imported when it is asked for. Other schemes are refused: as paths they would
make a directory of that name.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from millstream import _native
from millstream.errors import InvalidArgument, InvalidType, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from typing import Any

__all__ = ["ENGINES", "SCHEMES", "directory", "opener"]

LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
SCHEME_CHARACTERS = LETTERS | frozenset("0123456789+-.")


def _of_file(address: str) -> str:
    """The path of ``file:///path`` and ``file://localhost/path``; %-escapes are resolved."""
    with _native.loading:
        from urllib.parse import unquote
    host, slash, path = address.partition("://")[2].partition("/")
    if host.lower() not in ("", "localhost"):
        raise InvalidArgument(
            f"address {address!r}: a file: address names no machine but this one; write it as"
            f" file:///{host}{slash}{path}, with three slashes"
        )
    if not path.strip("/"):
        raise InvalidArgument(f"address {address!r}: names no directory; write file:///PATH")
    if "?" in path or "#" in path:
        raise InvalidArgument(
            f"address {address!r}: takes neither ? nor #; where the path has one, write %3F or %23"
        )
    return "/" + unquote(path, errors="surrogateescape")


SCHEMES: dict[str, Callable[[str], str]] = {"file": _of_file}
"""By name, in small letters."""

ENGINES: dict[str, tuple[str, str]] = {
    "kafka": ("millstream.engines.kafka", "kafka"),
    "nats": ("millstream.engines.nats", "nats"),
    "rabbitmq": ("millstream.engines.rabbitmq", "rabbitmq"),
}
"""By scheme: the module whose `open` opens a store of such a server, and the extra it needs."""
GROUP = "millstream.engines"
"""Entry points by which packages of others add engines: scheme = "module:function"."""


def scheme_of(text: str) -> str | None:
    """The scheme of an address, in small letters; None: it is a path.

    >>> scheme_of("Kafka://127.0.0.1:9092"), scheme_of("/var/lib/app"), scheme_of("./a://b")
    ('kafka', None, None)
    """
    head, separator, _ = text.partition("://")
    head = head.lower()
    if not separator or not LETTERS.issuperset(head[:1]) or not SCHEME_CHARACTERS.issuperset(head):
        return None
    return head or None


def _entry_point(scheme: str) -> EntryPoint | None:
    """The entry point of an engine of others, or None."""
    with _native.loading:
        from importlib.metadata import entry_points

        return next(iter(entry_points(group=GROUP, name=scheme)), None)


def _is_server(scheme: str) -> bool:
    return scheme in ENGINES or _entry_point(scheme) is not None


def opener(address: object) -> Callable[..., Any] | None:
    """What opens the store of a server at an address; None: it is none of a server.

    Raises: Unsupported where what the engine needs is not installed.
    """
    if not isinstance(address, str | bytes):
        return None
    scheme = scheme_of(os.fsdecode(address))
    if scheme is None or scheme in SCHEMES:
        return None
    module, extra = ENGINES.get(scheme, ("", ""))
    failed: ImportError | None = None
    entry = None if module else _entry_point(scheme)
    with _native.loading:
        from importlib import import_module

        try:
            if module:
                found: Callable[..., Any] = import_module(module).open
                import_module(f"{module}.store")  # with the client that it needs
            elif entry is not None:
                found = entry.load()
            else:
                return None
        except ImportError as error:
            failed = error
    if failed is None:
        return found
    need = f"; pip install 'millstream[{extra}]'" if extra else ""
    raise Unsupported(
        f"address {os.fsdecode(address)!r}: the engine of {scheme}:// cannot be imported:"
        f" {failed}{need}",
        engine=scheme,
    ) from failed


def _squeezed(text: str) -> str | None:
    """The scheme of an address with one slash, which `pathlib.Path` makes of two; no drive letter.

    >>> _squeezed("kafka:/127.0.0.1:9092"), _squeezed("c:/data"), _squeezed("/a:/b")
    ('kafka', None, None)
    """
    head, separator, rest = text.partition(":/")
    scheme = scheme_of(f"{head}://{rest}") if separator else None
    return scheme if scheme and len(scheme) > 1 else None


def directory(address: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """The path that a caller gave, as a path or as an address; an address is a str or bytes.

    An address has a scheme of two letters or more, then ``:/``. A name with a colon and no slash
    behind it, such as ``kafka:9092``, is a path, as is what begins with ``./`` or ``/``.

    Raises: InvalidArgument for a scheme that is not known, InvalidType.

    >>> directory("file:///var/lib/my%20app"), directory("data")
    ('/var/lib/my app', 'data')
    """
    try:
        text = os.fsdecode(address)
    except TypeError as error:
        raise InvalidType(f"path {address!r}: expected str, bytes or os.PathLike") from error
    scheme = scheme_of(text)
    if scheme is not None and scheme in SCHEMES:
        return SCHEMES[scheme](text)
    meant = scheme or scheme_of(text.lstrip())
    squeezed = None if meant else _squeezed(text.lstrip())
    if squeezed and not isinstance(address, str | bytes):
        raise InvalidArgument(
            f"path {text!r}: a path squeezes the // of {squeezed}://, so an address must be a"
            f" str; a directory of that name is {os.path.abspath(text)}"
        )
    near = meant or squeezed or ""
    if scheme is None and (near in SCHEMES or near in ENGINES):
        right = f"{near}:///PATH" if near in SCHEMES else f"{near}://HOST:PORT"
        raise InvalidArgument(
            f"address {text!r}: begins with a blank, or has one slash where two belong; write it as"
            f" {right}; a directory of that name is ./{text}"
        )
    if scheme is not None and _is_server(scheme):
        raise InvalidArgument(
            f"address {text!r}: names a server, and this needs a directory; millstream.open opens"
            " the server"
        )
    if near:
        known = ", ".join(f"{name}://" for name in sorted({*SCHEMES, *ENGINES}))
        raise InvalidArgument(
            f"address {text!r}: no scheme {near}:// is known, only {known} and plain"
            f" paths; a directory of that name is ./{text}"
        )
    return text
