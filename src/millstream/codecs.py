"""Codecs: they make bytes of the values of a queue, and values of the bytes.

A codec is any object with ``encode(value)``, which gives bytes, and ``decode(data)``. Whoever opens
a queue names its codec; nothing in the data chooses one. Without a codec, values are bytes.

>>> import millstream
>>> from millstream import codecs
>>> with millstream.temporary() as store:
...     jobs = store.queue("jobs", codec=codecs.json)
...     _ = jobs.put({"to": "ann@example.org"})
...     with jobs.get(timeout=1) as message:
...         message.value["to"]
'ann@example.org'
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from millstream import _native
from millstream.errors import InvalidArgument, InvalidType

__all__ = ["Codec", "json", "pickle", "resolve"]


@runtime_checkable
class Codec(Protocol):
    """What `codec=` takes."""

    def encode(self, value: Any, /) -> Any:
        """Return the bytes of a value.

        What it raises comes out of `put` and `put_many` as it is; the value is not stored.
        """

    def decode(self, data: Any, /) -> Any:
        """Return the value of these bytes; any exception says that they have none."""


class _Standard:
    """A module of the standard library, imported when it is needed."""

    _name: str
    _found: Any = None

    def _module(self) -> Any:
        found = self._found
        if found is None:
            with _native.loading:
                found = self._found = importlib.import_module(self._name)
        return found


class _Json(_Standard):
    """JSON as UTF-8, without spaces, by the standard library. NaN and infinity are refused.

    >>> json.encode({"a": [1, None]})
    b'{"a":[1,null]}'
    >>> json.decode(b'{"a":[1,null]}')
    {'a': [1, None]}
    """

    _name = "json"

    def encode(self, value: Any, /) -> bytes:
        """Return the JSON text of a value."""
        text: str = self._module().dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
        return text.encode("utf-8")

    def decode(self, data: Any, /) -> Any:
        """Return the value of a JSON text."""
        return self._module().loads(bytes(data).decode("utf-8"))

    def __repr__(self) -> str:
        return "millstream.codecs.json"

    def __reduce__(self) -> str:
        return "json"


class _Pickle(_Standard):
    """Nearly any Python object, by pickle.

    Warning: whoever can write to the store's directory can run code in every process that takes
    from the queue: decoding a pickle runs what it says. Use it only where all writers are trusted
    as much as the program itself; else use `json`. It is never chosen but by this name.

    >>> pickle.decode(pickle.encode({1, 2}))
    {1, 2}
    """

    _name = "pickle"

    def encode(self, value: Any, /) -> bytes:
        """Return the pickle of a value."""
        module = self._module()
        data: bytes = module.dumps(value, module.HIGHEST_PROTOCOL)
        return data

    def decode(self, data: Any, /) -> Any:
        """Return the value of a pickle, which runs what the pickle says."""
        return self._module().loads(data)

    def __repr__(self) -> str:
        return "millstream.codecs.pickle"

    def __reduce__(self) -> str:
        return "pickle"


json = _Json()
pickle = _Pickle()


class _Module:
    """The functions of a module such as `msgspec.json` or `orjson`; pickles by the module's name.

    A codec goes to worker processes together with the handle of its queue; modules cannot.
    """

    def __init__(self, name: str) -> None:
        module = importlib.import_module(name)
        self.name = name
        self._encode, self.decode = _functions(module) or _refuse(module)

    def encode(self, value: Any, /) -> Any:
        """Return the bytes of a value."""
        data = self._encode(value)
        return data.encode("utf-8") if isinstance(data, str) else data

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[object, ...]:
        return (_Module, (self.name,))


_Pair = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def _functions(found: object) -> _Pair | None:
    for names in (("encode", "decode"), ("dumps", "loads")):
        encode, decode = (getattr(found, name, None) for name in names)
        if callable(encode) and callable(decode):
            return encode, decode
    return None


def _refuse(codec: object) -> _Pair:
    raise InvalidType(f"codec {codec!r}: expected an object with encode and decode")


def resolve(codec: object) -> Codec | None:
    """Return the codec that a caller named: an object, a module, ``"json"`` or ``"pickle"``.

    Args:
        codec: None (values are bytes), those two names, an object with `encode` and `decode`, or a
            module with these or with `dumps` and `loads`.

    Raises: InvalidArgument (another name), InvalidType.

    >>> resolve("json")
    millstream.codecs.json
    >>> resolve(None) is None
    True
    """
    if codec is None:
        return None
    if isinstance(codec, str):
        known: dict[str, _Json | _Pickle] = {"json": json, "pickle": pickle}
        if codec not in known:
            raise InvalidArgument(f'codec {codec!r}: expected "json", "pickle" or an object')
        found = known[codec]
        found._module()  # now, so that no call of the codec is in the middle of an import
        return found
    if isinstance(codec, types.ModuleType):
        return _Module(codec.__name__)
    if isinstance(codec, Codec) and all(map(callable, (codec.encode, codec.decode))):
        return codec
    _refuse(codec)
    return None
